"""The public functions: arguments are checked here, once, then handed to `ewa_kernels.ops`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ewa_kernels import ops, reference
from ewa_kernels.backends import resolve

__all__ = [
    "average_experts_",
    "expert_offsets",
    "merge_experts",
    "moe_ffn",
    "random_permutation",
]

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOATING_NAMES = "float16, bfloat16, float32 or float64"
_INTEGERS: Any = (int, torch.SymInt, numbers.Integral)
_MAX_TOKENS = 2**31


def random_permutation(num_tokens: int, seed: int | Tensor, *, device: torch.device | str | None = None) -> Tensor:
    """A pseudo-random bijection on 0…T−1: grouped row i holds token `permutation[i]`.

    The same (T, seed) gives the same permutation on every device and version, for ever.
    `ewa_kernels.reference.random_permutation` says how it is made and what is tested of it.

    Args:
        num_tokens: T, 0 ≤ T < 2³¹.
        seed: int in 0…2⁶³−1, or int64 tensor with one element, which is read on its device: no host sync.
        device: where the result lives; the seed tensor's device, or torch's default, if None.

    Returns:
        int32 `[T]`.

    Raises:
        TypeError: `num_tokens` or `seed` is of another type.
        ValueError: `num_tokens` or `seed` is out of range, or the seed tensor has not one element.
    """
    check_int("num_tokens", num_tokens, minimum=0, below=_MAX_TOKENS)
    seed = seed_tensor(seed)
    if device is not None:
        seed = seed.to(device)
    return ops.random_permutation(num_tokens, seed)


def expert_offsets(num_tokens: int, num_experts: int) -> list[int]:
    """Expert e owns grouped rows `offsets[e]` … `offsets[e+1]`−1, with offsets[e] = ⌊e·T/E⌋.

    Args:
        num_tokens: T ≥ 0.
        num_experts: E ≥ 1.

    Returns:
        E + 1 ints, from 0 to T.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is out of range.
    """
    check_int("num_tokens", num_tokens, minimum=0)
    check_int("num_experts", num_experts, minimum=1)
    return reference.expert_offsets(num_tokens, num_experts)


def moe_ffn(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    seed: int | Tensor,
    activation: str = "gelu",
    gated: bool = False,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """y[t] = down_weight[e] @ act(up_weight[e] @ x[t] + up_bias[e]) + down_bias[e], e the expert of token t.

    Tokens are dealt to the experts by `random_permutation(T, seed)` and `expert_offsets(T, E)`.
    Gated (GLU): `pre` = up_weight[e] @ x[t] + up_bias[e] has 2F rows, gate first; hidden = act(pre[:F]) * pre[F:].

    Args:
        x: `[..., D]`, float16, bfloat16, float32 or float64; T is the product of the leading sizes.
        up_weight: `[E, F, D]`, or `[E, 2F, D]` if gated; dtype and device of x (any dtype under autocast).
        up_bias: `[E, F]`, or `[E, 2F]` if gated, or None.
        down_weight: `[E, D, F]`.
        down_bias: `[E, D]` or None.
        seed: int in 0…2⁶³−1, or int64 tensor with one element, on the CPU or on x's device.
        activation: gelu (erf), gelu_tanh, relu, relu2, silu or identity.
        gated: see above.
        dropout_p: probability in [0, 1] with which an element of hidden is dropped; drawn from `seed` too.
        backend: auto, reference, or one that `python -m ewa_kernels` lists.

    Returns:
        y, `[..., D]`, of x's dtype; under autocast of autocast's.

    Raises:
        TypeError: an argument is of a wrong type, dtype or device.
        ValueError: an argument has a wrong shape or is out of range.
        BackendError: the backend cannot run here.
        RuntimeError: forward-mode AD is asked for; only backend="reference" supports it.
    """
    _check_ffn(x, up_weight, up_bias, down_weight, down_bias, activation, gated, dropout_p)
    seed = seed_tensor(seed, x.device)
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    backend = resolve("moe_ffn", backend, x.device, dtype)
    if backend == "reference":
        return reference.moe_ffn(
            x,
            up_weight,
            up_bias,
            down_weight,
            down_bias,
            seed=seed,
            activation=activation,
            gated=gated,
            dropout_p=dropout_p,
        )
    operands: tuple[Tensor | None, ...] = (x, up_weight, up_bias, down_weight, down_bias)
    _refuse_forward_ad(operands)
    if autocast:  # what autocast does to the operands of F.linear
        operands = tuple(None if t is None else t.to(dtype) for t in operands)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    tokens, *parameters = operands
    assert tokens is not None
    y, _, _ = ops.moe_ffn(
        tokens.reshape(-1, tokens.shape[-1]),
        *parameters,
        seed,
        activation,
        gated,
        float(dropout_p),
        needs_grad,
        backend,
    )
    return y.reshape(x.shape)


def average_experts_(
    tensors: Iterable[Tensor | Sequence[Tensor]],
    share_rate: float | Tensor,
    *,
    backend: str = "auto",
) -> None:
    """W̄_i = (1−β)·W_i + β/(E−1)·Σ_{j≠i} W_j for all experts at once, in place.

    The mean over experts is kept and every expert's distance from it is scaled by 1 − βE/(E−1);
    β = (E−1)/E makes all experts equal, E = 1 is a no-op. Gradients are not recorded.

    Args:
        tensors: stacked experts, each `[E, ...]`, float16, bfloat16, float32 or float64; E may differ from one
            to the next. In place of a stacked tensor, a list of E tensors of one shape, dtype and device.
        share_rate: β in [0, 1]: a float, or a one-element floating tensor. One on a GPU is read there, without
            a host sync, and so its range is not checked.
        backend: auto or reference.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a tensor has no expert dimension or shares memory between its elements, a list of experts
            does not match, a tensor is given twice, or share_rate is out of range. Nothing has been changed then.
        BackendError: the backend cannot run here.

    Source: equation 6 of arXiv 2308.06093.
    """
    flat, group_sizes = check_experts(tensors)
    beta = _share_rate_tensor(share_rate)
    for device in {tensor.device for tensor in flat} or {torch.device("cpu")}:
        resolve("average_experts_", backend, device)
    with torch.no_grad():
        ops.average_experts_(flat, group_sizes, beta)


def merge_experts(tensor: Tensor) -> Tensor:
    """The mean over experts, accumulated in float64 and rounded once: `[E, ...]` → `[...]`. Differentiable.

    Raises:
        TypeError: `tensor` is not a floating-point tensor.
        ValueError: it has no expert dimension, or no expert.
    """
    _check_stacked("tensor", tensor)
    return reference.merge_experts(tensor)


def draw_seed(x: Tensor) -> Tensor:
    """A seed from torch's default generator of x's device: int64, no dimensions, on that device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    return ops.draw_seed(x)


# --- checks ---


def seed_tensor(seed: int | Tensor, device: torch.device | None = None) -> Tensor:
    """`seed` as an int64 tensor with one element: an int on the CPU, a tensor where it is.

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
        return seed
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed must be an int or an int64 tensor, got {_kind(seed)}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in 0…2^63−1, got {seed}")
    return torch.tensor(int(seed), dtype=torch.int64, device="cpu" if device is not None else None)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_probability(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a number, ValueError unless it is in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a number in [0, 1], got {_kind(value)}")
    if not 0 <= float(value) <= 1:  # a NaN fails too
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_bool(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {_kind(value)}")


def check_size(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is an int, ValueError unless it is at least 1."""
    check_int(name, value, minimum=1)


def check_int(name: str, value: Any, *, minimum: int, below: int | None = None) -> None:
    """Raises TypeError unless `value` is an int, ValueError unless minimum ≤ value < below."""
    if isinstance(value, bool) or not isinstance(value, _INTEGERS):
        raise TypeError(f"{name} must be an int, got {_kind(value)}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if below is not None and value >= below:
        raise ValueError(f"{name} must be less than {below}, got {value}")


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r}"


def _check_floating(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name} must be {_FLOATING_NAMES}, got {tensor.dtype}")


def _check_stacked(name: str, tensor: Any) -> None:
    _check_floating(name, tensor)
    if tensor.ndim == 0:
        raise ValueError(f"{name} must have a leading expert dimension [E, ...], got shape []")
    if tensor.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one expert, got shape {list(tensor.shape)}")


def _check_shape(name: str, tensor: Tensor, meaning: str, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {meaning} = {list(shape)}, got {list(tensor.shape)}")


def _check_ffn(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
) -> None:
    check_choice("activation", activation, reference.ACTIVATIONS)
    check_bool("gated", gated)
    check_probability("dropout_p", dropout_p)

    parameters = {"up_weight": up_weight, "down_weight": down_weight}
    if up_bias is not None:
        parameters["up_bias"] = up_bias
    if down_bias is not None:
        parameters["down_bias"] = down_bias
    _check_floating("x", x)
    mixed_dtypes = torch.is_autocast_enabled(x.device.type)
    for name, tensor in parameters.items():
        _check_floating(name, tensor)
        if tensor.device != x.device:
            raise TypeError(f"{name} must be on {x.device} like x, got {tensor.device}")
        if tensor.dtype != x.dtype and not mixed_dtypes:
            raise TypeError(f"{name} must be {x.dtype} like x, got {tensor.dtype}")

    rows = "2F" if gated else "F"
    if up_weight.ndim != 3 or 0 in up_weight.shape:
        raise ValueError(f"up_weight must be [E, {rows}, D] with no size 0, got {list(up_weight.shape)}")
    num_experts, num_up, d_model = up_weight.shape
    if gated and num_up % 2:
        raise ValueError(f"up_weight must have an even number of rows (gate, then value) if gated, got {num_up}")
    d_ff = num_up // 2 if gated else num_up
    _check_shape("down_weight", down_weight, "[E, D, F]", (num_experts, d_model, d_ff))
    if up_bias is not None:
        _check_shape("up_bias", up_bias, f"[E, {rows}]", (num_experts, num_up))
    if down_bias is not None:
        _check_shape("down_bias", down_bias, "[E, D]", (num_experts, d_model))
    if x.ndim == 0 or x.shape[-1] != d_model:
        raise ValueError(f"x must be [..., D] with D = {d_model}, got {list(x.shape)}")
    num_tokens = math.prod(x.shape[:-1])
    if num_tokens >= _MAX_TOKENS:
        raise ValueError(f"x must hold fewer than 2^31 tokens, got {num_tokens}")


def _refuse_forward_ad(tensors: Iterable[Tensor | None]) -> None:
    """torch would answer forward-mode AD through a custom operation with zeros, silently."""
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError('moe_ffn does not support forward-mode AD (torch.func.jvp): use backend="reference"')


def check_experts(tensors: Any) -> tuple[list[Tensor], list[int]]:
    """Checks the `tensors` of `average_experts_` and flattens them.

    Returns:
        All tensors, and for each group 0 if it is one stacked tensor, else how many tensors it has.
    """
    if isinstance(tensors, Tensor):
        raise TypeError("tensors must be a list of stacked tensors [E, ...], got one Tensor")
    if not isinstance(tensors, Iterable):
        raise TypeError(f"tensors must be a list of stacked tensors [E, ...], got {type(tensors).__name__}")
    flat: list[Tensor] = []
    group_sizes: list[int] = []
    seen: set[tuple[Any, ...]] = set()
    for i, group in enumerate(tensors):
        if isinstance(group, (list, tuple)):
            if not group:
                raise ValueError(f"tensors[{i}] must hold at least one expert, got an empty list")
            members = {f"tensors[{i}][{e}]": expert for e, expert in enumerate(group)}
            for name, expert in members.items():
                _check_floating(name, expert)
                for what in ("shape", "dtype", "device"):
                    ours, first = getattr(expert, what), getattr(group[0], what)
                    if ours != first:
                        kind = ValueError if what == "shape" else TypeError
                        raise kind(f"{name} must have the {what} of tensors[{i}][0], {first}, got {ours}")
            group_sizes.append(len(members))
        else:
            _check_stacked(f"tensors[{i}]", group)
            members = {f"tensors[{i}]": group}
            group_sizes.append(0)
        for name, tensor in members.items():
            if any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
                raise ValueError(
                    f"{name} must have memory of its own for every element, got strides {list(tensor.stride())} "
                    f"for shape {list(tensor.shape)}"
                )
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
            if tensor.numel() > 0 and tensor.device.type != "meta":
                if key in seen:
                    raise ValueError(f"{name} must not be given twice: it would be averaged twice")
                seen.add(key)
            flat.append(tensor)
    return flat, group_sizes


def _share_rate_tensor(share_rate: float | Tensor) -> Tensor:
    if not isinstance(share_rate, Tensor):
        check_probability("share_rate", share_rate)
        return torch.tensor(float(share_rate), dtype=torch.float64, device="cpu")
    if share_rate.numel() != 1:
        raise ValueError(f"share_rate must have one element, got shape {list(share_rate.shape)}")
    _check_floating("share_rate", share_rate)
    if share_rate.device.type == "cpu" and not torch.compiler.is_compiling():
        check_probability("share_rate", share_rate.item())
    return share_rate.detach()
