"""What arguments must be: each check raises an error that names the argument, what it got and what it needs."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import memory, private_torch
from .activations import ACTIVATIONS

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOATING_NAMES = "float16, bfloat16, float32 or float64"
_INTEGERS: Any = (int, torch.SymInt, numbers.Integral)
MAX_TOKENS = 2**31


def seed_tensor(seed: Any, device: torch.device | None = None) -> Tensor:
    """`seed` as an int64 tensor with one element: an int on the CPU (on `device` in what is compiled, which may make a
    CUDA graph of it), a tensor where it is.

    Raises:
        TypeError: neither an int nor an int64 tensor on the CPU or `device`.
        ValueError: out of range, or not one element.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor, got a {seed.dtype} tensor")
        if seed.numel() != 1:
            raise ValueError(f"seed must have one element, got shape {list(seed.shape)}")
        if device is not None and seed.device.type != "cpu" and seed.device != device:
            raise TypeError(f"seed must be on the CPU or on {device} like x, got {seed.device}")
        if seed.device.type == "cpu" and not private_torch.is_watched((seed,)) and int(seed) < 0:
            raise ValueError(f"seed must be in 0…2^63−1, got {int(seed)}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed must be an int or an int64 tensor, got {_kind(seed)}")
    if not 0 <= int(seed) < 2**63:
        raise ValueError(f"seed must be in 0…2^63−1, got {seed}")
    if device is not None and not torch.compiler.is_compiling():
        device = torch.device("cpu")
    return torch.full((), int(seed), dtype=torch.int64, device=device)


def seed(seed: Any, device: torch.device) -> int | Tensor:
    """The same, where it is needed: an int, unless it is a tensor on `device` and that is no CPU.

    Raises:
        TypeError, ValueError: see `seed_tensor`.
    """
    if type(seed) is int and 0 <= seed < 2**63:
        return seed
    tensor = seed_tensor(seed, device)
    return int(tensor) if tensor.device.type == "cpu" else tensor


def module(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is an nn.Module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(value).__name__}")


def choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def saved(value: Any, recompute: Any) -> Any:
    """What is to be kept for backward, which `recompute` says too.

    Raises:
        TypeError: `recompute` is no bool.
        ValueError: it is True, and `saved` says something else. Whether that is a word that is known is not checked.
    """
    boolean("recompute", recompute)
    if not recompute:
        return value
    if value not in ("full", "recompute"):
        raise ValueError(f"saved must be 'recompute', or not given, with recompute=True, got {value!r}")
    return "recompute"


def probability(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a number, ValueError unless it is in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a number in [0, 1], got {_kind(value)}")
    if not 0 <= float(value) <= 1:  # a NaN fails too
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def nonnegative(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a number, ValueError unless it is finite and at least 0."""
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a number of at least 0, got {_kind(value)}")
    if not 0 <= float(value) < math.inf:  # a NaN fails too
        raise ValueError(f"{name} must be finite and at least 0, got {value}")


def boolean(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {_kind(value)}")


def mask(mask: object, x: Tensor) -> None:
    """Of tokens: bool, of x's leading shape."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be torch.bool, got {mask.dtype}")
    if mask.device != x.device:
        raise TypeError(f"mask must be on {x.device} like x, got {mask.device}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must be {list(x.shape[:-1])}, one for each token of x, got {list(mask.shape)}")


def found_inf(value: Any) -> None:
    """Raises TypeError unless `value` is None, a number or a tensor, ValueError unless a tensor has one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"found_inf must have one element, got shape {list(value.shape)}")
    elif value is not None and not isinstance(value, (bool, float, int, numbers.Real)):
        raise TypeError(f"found_inf must be a bool, a number, a tensor or None, got {_kind(value)}")


def size(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is an int, ValueError unless it is at least 1."""
    integer(name, value, minimum=1)


def integer(name: str, value: Any, *, minimum: int, below: int | None = None) -> None:
    """Raises TypeError unless `value` is an int, ValueError unless minimum ≤ value < below."""
    if isinstance(value, bool) or not isinstance(value, _INTEGERS):
        raise TypeError(f"{name} must be an int, got {_kind(value)}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if below is not None and value >= below:
        raise ValueError(f"{name} must be less than {below}, got {value}")


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r}"


def floating(name: str, tensor: Any) -> None:
    """Raises TypeError unless `tensor` is a floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name} must be {_FLOATING_NAMES}, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense (torch.strided), got {tensor.layout}")


def one_element(name: str, tensor: Any) -> None:
    """Raises TypeError unless `tensor` is a floating-point tensor, ValueError unless it has one element."""
    floating(name, tensor)
    if tensor.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {list(tensor.shape)}")


def stacked(name: str, tensor: Any) -> None:
    """Raises TypeError unless `tensor` is a floating-point tensor, ValueError unless it is `[E, ...]`, E ≥ 1."""
    floating(name, tensor)
    if tensor.ndim == 0:
        raise ValueError(f"{name} must have a leading expert dimension [E, ...], got shape []")
    if tensor.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one expert, got shape {list(tensor.shape)}")


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for `device`. Meta has none; torch 2.11 cannot trace the question which devices have."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """In which autocast has the layer computed; None where it is off, and for float64, which it leaves alone."""
    if x.dtype == torch.float64 or not autocast_enabled(x.device):
        return None
    return torch.get_autocast_dtype(x.device.type)


def _shape(name: str, tensor: Tensor, meaning: str, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {meaning} = {list(shape)}, got {list(tensor.shape)}")


def ffn(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
) -> None:
    choice("activation", activation, ACTIVATIONS)
    boolean("gated", gated)
    probability("dropout_p", dropout_p)

    parameters = {"up_weight": up_weight, "down_weight": down_weight}
    if up_bias is not None:
        parameters["up_bias"] = up_bias
    if down_bias is not None:
        parameters["down_bias"] = down_bias
    _like_x(x, parameters)

    rows = "2F" if gated else "F"
    if up_weight.ndim != 3 or 0 in up_weight.shape:
        raise ValueError(f"up_weight must be [E, {rows}, D] with no size 0, got {list(up_weight.shape)}")
    num_experts, num_up, d_model = up_weight.shape
    if gated and num_up % 2:
        raise ValueError(f"up_weight must have an even number of rows (gate, then value) if gated, got {num_up}")
    d_ff = num_up // 2 if gated else num_up
    _shape("down_weight", down_weight, "[E, D, F]", (num_experts, d_model, d_ff))
    if up_bias is not None:
        _shape("up_bias", up_bias, f"[E, {rows}]", (num_experts, num_up))
    if down_bias is not None:
        _shape("down_bias", down_bias, "[E, D]", (num_experts, d_model))
    _tokens(x, "D", d_model)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises TypeError or ValueError unless these are an `expert_linear`'s."""
    parameters = {"weight": weight}
    if bias is not None:
        parameters["bias"] = bias
    _like_x(x, parameters)
    if weight.ndim != 3 or 0 in weight.shape:
        raise ValueError(f"weight must be [E, D_out, D_in] with no size 0, got {list(weight.shape)}")
    num_experts, d_out, d_in = weight.shape
    if bias is not None:
        _shape("bias", bias, "[E, D_out]", (num_experts, d_out))
    _tokens(x, "D_in", d_in)
    num_tokens(x)


def _like_x(x: Tensor, parameters: dict[str, Tensor]) -> None:
    """Raises TypeError unless all are floating, on x's device, and of its dtype where there is no autocast."""
    floating("x", x)
    mixed_dtypes = autocast_enabled(x.device)
    for name, tensor in parameters.items():
        floating(name, tensor)
        if tensor.device != x.device:
            raise TypeError(f"{name} must be on {x.device} like x, got {tensor.device}")
        if tensor.dtype != x.dtype and not mixed_dtypes:
            raise TypeError(f"{name} must be {x.dtype} like x, got {tensor.dtype}")


def _tokens(x: Tensor, name: str, width: int) -> None:
    """Raises ValueError unless x is `[..., width]`."""
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(f"x must be [..., {name}] with {name} = {width}, got {list(x.shape)}")


def num_tokens(x: Tensor) -> None:
    """Raises ValueError unless x `[..., D]` holds fewer tokens than an int32 can tell apart."""
    number = math.prod(x.shape[:-1])
    if number >= MAX_TOKENS:
        raise ValueError(f"x must hold fewer than 2^31 tokens, got {number}")


def partition(permutation: Any, expert_offsets: Any, routing_weights: Any, x: Tensor, num_experts: int) -> None:
    """Raises TypeError or ValueError unless their types and shapes are right for x's tokens, or k choices for each.

    For their values see `partition_values`.
    """
    num_tokens = num_rows = math.prod(x.shape[:-1])
    rows = "T"
    if routing_weights is not None:
        floating("routing_weights", routing_weights)
        if routing_weights.device != x.device:
            raise TypeError(f"routing_weights must be on {x.device} like x, got {routing_weights.device}")
        if routing_weights.ndim != 2 or routing_weights.shape[0] != num_tokens or routing_weights.shape[1] < 1:
            raise ValueError(
                f"routing_weights must be [T, k] with T = {num_tokens} and k ≥ 1, got {list(routing_weights.shape)}"
            )
        num_rows, rows = routing_weights.numel(), "T·k"
        if num_rows >= MAX_TOKENS:
            raise ValueError(f"routing_weights must hold fewer than 2^31 choices, got {num_rows}")
    for name, tensor, meaning, size in (
        ("permutation", permutation, f"[{rows}]", num_rows),
        ("expert_offsets", expert_offsets, "[E + 1]", num_experts + 1),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {_kind(tensor)}")
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
        if tensor.device != x.device:
            raise TypeError(f"{name} must be on {x.device} like x, got {tensor.device}")
        _shape(name, tensor, meaning, (size,))


def partition_values(permutation: Tensor, expert_offsets: Tensor, routing_weights: Tensor | None) -> None:
    """Raises ValueError unless the offsets rise from 0 to R and the permutation `[R]` holds each of 0…R−1 once.

    R is T, or T·k with routing weights. Both are read on the host.
    """
    num_rows, offsets = len(permutation), expert_offsets.tolist()
    if offsets[0] != 0 or offsets[-1] != num_rows or any(a > b for a, b in itertools.pairwise(offsets)):
        rows = "T" if routing_weights is None else "T·k"
        raise ValueError(f"expert_offsets must rise from 0 to {rows} = {num_rows}, got {offsets}")
    if not torch.equal(permutation.sort().values, torch.arange(num_rows, device=permutation.device)):
        raise ValueError(f"permutation must hold each of 0…{num_rows - 1} once")


def choices(tensor: Any, num_experts: int) -> None:
    """Raises TypeError or ValueError unless `[T, k]` numbers of experts; values are checked on the CPU only."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"choices must be a Tensor, got {_kind(tensor)}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"choices must be int32 or int64, got {tensor.dtype}")
    if tensor.ndim != 2:
        raise ValueError(f"choices must be [T, k], got {list(tensor.shape)}")
    if tensor.numel() == 0 or not private_torch.has_values(tensor):
        return
    low, high = tensor.min(), tensor.max()
    if low < 0 or high >= num_experts:
        raise ValueError(f"choices must be in 0…{num_experts - 1}, got {int(low)}…{int(high)}")


def experts(tensors: Any, given: str = "tensors") -> tuple[list[Tensor], list[int]]:
    """Checks the `tensors` of `average_experts_`, or what else the argument `given` is called, and flattens them.

    Returns:
        All tensors, and for each group 0 if it is one stacked tensor, else how many tensors it has.
    """
    if isinstance(tensors, Tensor):
        raise TypeError(f"{given} must be a list of stacked tensors [E, ...], got one Tensor")
    if not isinstance(tensors, Iterable):
        raise TypeError(f"{given} must be a list of stacked tensors [E, ...], got {type(tensors).__name__}")
    named: dict[str, Tensor] = {}
    group_sizes: list[int] = []
    for i, group in enumerate(tensors):
        name = f"{given}[{i}]"
        if isinstance(group, (list, tuple)):
            if not group:
                raise ValueError(f"{name} must hold at least one expert, got an empty list")
            for e, expert in enumerate(group):
                floating(f"{name}[{e}]", expert)
                for what in ("shape", "dtype", "device"):
                    ours, first = getattr(expert, what), getattr(group[0], what)
                    if ours != first:
                        kind = ValueError if what == "shape" else TypeError
                        raise kind(f"{name}[{e}] must have the {what} of {name}[0], {first}, got {ours}")
                named[f"{name}[{e}]"] = expert
            group_sizes.append(len(group))
        else:
            stacked(name, group)
            named[name] = group
            group_sizes.append(0)
    for name, tensor in named.items():
        if memory.overlaps_itself(tensor):
            strides, shape = list(tensor.stride()), list(tensor.shape)
            raise ValueError(
                f"{name} must have memory of its own for every element, got strides {strides} for shape {shape}"
            )
    places = [place for name, tensor in named.items() for place in memory.places(name, tensor)]
    for first, second in memory.overlaps(places):
        if first[:3] == second[:3] and first.steps == second.steps:
            raise ValueError(f"{second.name} must not be given twice: it would be averaged twice")
        raise ValueError(f"{second.name} must have memory of its own, but shares some with {first.name}")
    return list(named.values()), group_sizes


def own_memory(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError if two of these tensors, each with its name, share memory."""
    for first, second in memory.overlaps([place for name, tensor in tensors for place in memory.places(name, tensor)]):
        raise ValueError(f"{second.name} must have memory of its own, but shares some with {first.name}")


def share_rate_tensor(share_rate: float | Tensor) -> Tensor:
    """`share_rate` as a one-element tensor: a number on the CPU, a tensor where it is, unread if not on the CPU."""
    if not isinstance(share_rate, Tensor):
        probability("share_rate", share_rate)
        return torch.tensor(float(share_rate), dtype=torch.float64, device="cpu")
    one_element("share_rate", share_rate)
    if share_rate.device.type == "cpu" and not torch.compiler.is_compiling():
        probability("share_rate", share_rate.item())
    return share_rate.detach()
