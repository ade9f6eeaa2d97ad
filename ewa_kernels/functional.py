"""The public functions: arguments are checked here, once, then handed to `ewa_kernels.ops`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import calls, checks, linear, ops, private_torch, reference, seeds
from .backends import resolve
from .kernels import graphs, merging
from .problem import Deal, Inputs, Options, Places
from .train import shards

ROUNDINGS = ("stochastic", "nearest")

__all__ = [
    "average_experts_",
    "expert_linear",
    "expert_offsets",
    "grouped_ffn",
    "merge_experts",
    "moe_ffn",
    "partition_by_expert",
    "random_permutation",
    "route",
]


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
    checks.integer("num_tokens", num_tokens, minimum=0, below=checks.MAX_TOKENS)
    seed = checks.seed_tensor(seed)
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
    checks.integer("num_tokens", num_tokens, minimum=0)
    checks.integer("num_experts", num_experts, minimum=1)
    return [e * num_tokens // num_experts for e in range(num_experts + 1)]


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
    saved: str = "full",
    recompute: bool = False,
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
        seed: int in 0…2⁶³−1, or int64 tensor with one element, on the CPU or on x's device; on x's device while a CUDA
            graph is captured, which would repeat any other in each replay.
        activation: gelu (erf), gelu_tanh, quick_gelu, relu, relu2, silu or identity.
        gated: see above.
        dropout_p: probability in [0, 1] with which an element of hidden is dropped; drawn from `seed` too.
        backend: auto, reference, or one that `python -m ewa_kernels` lists.
        saved: what is kept for backward, besides parameters and permutation: "full": x and `pre`; "8bit": both in 8
            bits; "4bit": x in 8 bits and `pre` in 4; "recompute": x alone, from which `pre` is computed again;
            "recompute-8bit": x alone, in 8 bits. The output is the same, gradients are of what was kept:
            `ewa_kernels.codec` says how far that is off.
        recompute: True means saved="recompute".

    Returns:
        y, `[..., D]`, of x's dtype; under autocast of autocast's.

    Raises:
        TypeError: an argument is of a wrong type, dtype or device.
        ValueError: an argument has a wrong shape or is out of range.
        BackendError: the backend cannot run here.
        RuntimeError: forward-mode AD, or a gradient of torch.func, is asked for, which only backend="reference" has; or
            the seed is on the CPU while a CUDA graph is captured.
    """
    inputs = Inputs(x, up_weight, up_bias, down_weight, down_bias, None)
    saved = checks.saved(saved, recompute)
    return calls.ffn(inputs, Deal(seed), False, Options(activation, gated, dropout_p, backend, saved))


def grouped_ffn(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    permutation: Tensor,
    expert_offsets: Tensor,
    routing_weights: Tensor | None = None,
    seed: int | Tensor = 0,
    activation: str = "gelu",
    gated: bool = False,
    dropout_p: float = 0.0,
    backend: str = "auto",
    saved: str = "full",
    recompute: bool = False,
) -> Tensor:
    """y[t] = Σ_j routing_weights[t, j] · FFN_e(x[t]), j = 0…k−1, e the expert of choice t·k + j.

    `moe_ffn` with a partition that somebody else made, into groups of any size: a router, say (`route` and
    `partition_by_expert`). Without `routing_weights` k = 1 and nothing is multiplied.

    Args:
        permutation: int32 or int64 `[T·k]`, on x's device, a bijection: grouped row i holds choice
            `permutation[i]` = t·k + j, which is choice j of token t.
        expert_offsets: int32 or int64 `[E + 1]`, on x's device, from 0 to T·k: expert e owns grouped rows
            `expert_offsets[e]` … `expert_offsets[e+1]`−1, perhaps none.
        routing_weights: `[T, k]`, floating, on x's device. The sum over j is always made in one way.
        seed: of hidden dropout.

    Both are read where they are, and so on a GPU their values are not checked: wrong ones make wrong results, but no
    kernel leaves the memory it was given, or waits for ever. With EWA_KERNELS_DEBUG=1 in the environment, when
    ewa_kernels is imported, Triton kernels say what is wrong with them. The backends "torch" and "reference" read
    `expert_offsets` on the host.
    Other Args, Returns, Raises: see `moe_ffn`.
    """
    inputs = Inputs(x, up_weight, up_bias, down_weight, down_bias, routing_weights)
    deal = Deal(seed, permutation, expert_offsets)
    saved = checks.saved(saved, recompute)
    return calls.ffn(inputs, deal, True, Options(activation, gated, dropout_p, backend, saved))


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    permutation: Tensor,
    expert_offsets: Tensor,
    gather: bool = False,
    scatter: bool = False,
    backend: str = "auto",
) -> Tensor:
    """out[i] = weight[e] @ x[i] + bias[e], i a grouped row, e its expert; rows looked up and put back on the way.

    One product by expert, to replace a pair of linear layers in somebody else's block: the first with `gather`, which
    takes tokens and leaves grouped rows, the second with `scatter`, which takes these and gives tokens back. Between
    the two the block keeps its own code, which may do to each row what it likes. With both switches each token goes
    through its expert, in token order.

    Args:
        x: `[..., D_in]`, float16, bfloat16, float32 or float64; T is the product of the leading sizes. By grouped row,
            or if `gather` in the order of tokens: grouped row i is then x[permutation[i]].
        weight: `[E, D_out, D_in]`; dtype and device of x (any dtype under autocast).
        bias: `[E, D_out]` or None.
        permutation: int32 or int64 `[T]`, on x's device, a bijection: grouped row i is token `permutation[i]`, as
            `random_permutation` gives it. As in `grouped_ffn`, its values and those of `expert_offsets` are not checked
            on a GPU.
        expert_offsets: int32 or int64 `[E + 1]`, on x's device, from 0 to T: expert e owns grouped rows
            `expert_offsets[e]` … `expert_offsets[e+1]`−1, perhaps none.
        gather: whether x is in the order of tokens.
        scatter: whether the result is: out[i] is then put at place permutation[i].
        backend: auto, reference, triton, cpp or torch.

    Returns:
        out, `[..., D_out]`, of x's dtype; under autocast of autocast's.

    Raises:
        TypeError: an argument is of a wrong type, dtype or device.
        ValueError: an argument has a wrong shape or is out of range.
        BackendError: the backend cannot run here.
        RuntimeError: forward-mode AD, or a gradient of torch.func, is asked for, which only backend="reference" has.
    """
    return linear.expert_linear(x, weight, bias, Places(permutation, expert_offsets, gather, scatter), backend)


def route(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """The router's decision: the k experts with the highest logits, and softmax(logits) of them. Differentiable.

    Of equal logits the expert with the lower number comes first, on every device. No host sync.

    Args:
        logits: `[T, E]`, floating; float32 or wider is best.
        top_k: k, 1 ≤ k ≤ E.
        renormalize: divide the k weights of a token by their sum.

    Returns:
        routing_weights `[T, k]` of the dtype of logits, and choices, int64 `[T, k]`, the highest first.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype or shape, or out of range.
    """
    checks.floating("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [T, E] with E ≥ 1, got {list(logits.shape)}")
    checks.integer("top_k", top_k, minimum=1, below=logits.shape[1] + 1)
    checks.boolean("renormalize", renormalize)
    # Sorted, because topk says nothing of the order of equal logits.
    choices = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    routing_weights = logits.softmax(dim=-1).gather(1, choices)
    if renormalize:
        routing_weights = routing_weights / routing_weights.sum(dim=-1, keepdim=True)
    return routing_weights, choices


def partition_by_expert(choices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The partition that `grouped_ffn` takes, from the experts that were chosen. No host sync.

    Args:
        choices: `[T, k]`, int32 or int64, each in 0…E−1; not checked on a GPU.
        num_experts: E.

    Returns:
        permutation, int32 `[T·k]`: choices in the order of their experts, of one expert's in their own; and
        expert_offsets, int32 `[E + 1]`.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype or shape, or out of range.
    """
    checks.integer("num_experts", num_experts, minimum=1)
    checks.choices(choices, num_experts)
    expert, permutation = choices.flatten().sort(stable=True)
    numbers = torch.arange(num_experts + 1, dtype=expert.dtype, device=expert.device)
    return permutation.to(torch.int32), torch.searchsorted(expert, numbers, out_int32=True)


def average_experts_(
    tensors: Iterable[Tensor | Sequence[Tensor]],
    share_rate: float | Tensor,
    *,
    backend: str = "auto",
    rounding: str = "stochastic",
    seed: int | Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """W̄_i = (1−β)·W_i + β/(E−1)·Σ_{j≠i} W_j for all experts at once, in place.

    The mean over experts is kept and every expert's distance from it is scaled by 1 − βE/(E−1);
    β = (E−1)/E makes all experts equal, E = 1 is a no-op. Gradients are not recorded. With the extension it is one
    pass over memory, on a GPU one launch.

    Args:
        tensors: stacked experts, each `[E, ...]`, float16, bfloat16, float32 or float64; E may differ from one
            to the next. In place of a stacked tensor, a list of E tensors of one shape, dtype and device. DTensors,
            of all processes together, are averaged shard by shard; only where the expert dimension itself is
            sharded are shards exchanged, and then every process must make the call.
        share_rate: β in [0, 1]: a float, or a one-element floating tensor. One on a GPU is read there, without
            a host sync, and so its range is not checked.
        backend: auto, cuda, cpp or reference.
        rounding: of 16-bit tensors, which are computed in float32: "stochastic" keeps the mean on average over
            steps, however small the share rate; "nearest" loses what is less than half a unit in the last place.
        seed: of stochastic rounding: int in 0…2⁶³−1 or int64 tensor with one element. It must be another one at
            each step. None draws it from torch's default generator, if there are 16-bit tensors. Processes which
            hold the same numbers round them alike if they give the same seed.
        found_inf: one-element tensor: if it is not 0 nothing changes. One on a GPU is read there.

    While a CUDA graph is captured, tensors must be on the GPU: what is on the host every replay would repeat.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a tensor has no expert dimension, tensors or their elements share memory, a list of experts
            does not match, a DTensor is Partial, or share_rate or seed is out of range. Nothing has been changed
            then.
        BackendError: the backend cannot run here.

    Source: equation 6 of arXiv 2308.06093.
    """
    beta = checks.share_rate_tensor(share_rate)
    checks.choice("rounding", rounding, ROUNDINGS)
    if found_inf is not None:
        checks.one_element("found_inf", found_inf)
    with torch.no_grad():
        experts = shards.Experts(tensors, exchange=isinstance(share_rate, Tensor) or share_rate != 0)
    flat, group_sizes = checks.experts(experts.local)
    device = device_of(flat)
    seed = None if seed is None else graphs.replayable("seed", checks.seed_tensor(seed, device), device)
    found_inf = None if found_inf is None else graphs.replayable("found_inf", found_inf, device)
    if isinstance(share_rate, Tensor) or torch.compiler.is_compiling():  # a number is a constant, as the caller says
        beta = graphs.replayable("share_rate", beta, device)
    chosen = {resolve("average_experts_", backend, device) for device in {t.device for t in flat}}
    low_precision = [t for t in flat if t.element_size() == 2]
    if rounding == "nearest" or not low_precision:
        seed = None
    elif seed is None:
        seed = rounding_seed(low_precision[0])
    with torch.no_grad():
        # "cpp" and "cuda" are one implementation, which looks at each tensor's device.
        native = chosen and "reference" not in chosen
        chosen_backend = chosen.pop() if native else "reference"
        # Without random bits nothing depends on which shard this is, and all goes into one pass.
        keys = experts.keys if seed is not None else [0] * len(group_sizes)
        for key in sorted(set(keys)):
            groups = [group for group, of_group in zip(experts.local, keys, strict=True) if of_group == key]
            sizes = [size for size, of_group in zip(group_sizes, keys, strict=True) if of_group == key]
            members = [t for group in groups for t in ([group] if isinstance(group, Tensor) else group)]
            key_seed = None if seed is None else shards.seed_of(seed, key)
            ops.average_experts_(members, sizes, beta, found_inf, key_seed, chosen_backend)
        experts.write_back()


def device_of(tensors: Iterable[Tensor]) -> torch.device:
    """That of the first which is not on the CPU, if there is one."""
    return next((t.device for t in tensors if not t.is_cpu), torch.device("cpu"))


def merge_experts(tensor: Tensor) -> Tensor:
    """The mean over experts, accumulated in float64 and rounded once: `[E, ...]` → `[...]`. Differentiable.

    Raises:
        TypeError: `tensor` is not a floating-point tensor.
        ValueError: it has no expert dimension, or no expert.

    The mean of a DTensor is one, made without communication unless the expert dimension is sharded.
    """
    return merge_all([tensor])[0]


def merge_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`merge_experts` of each: on a GPU in one launch, where no gradient is wanted."""
    for tensor in tensors if not private_torch.is_jit_traced() else ():
        checks.stacked("tensor", tensor)
    is_constant = not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    if is_constant and not private_torch.is_watched(tensors) and merging.why_not(tensors[0].device) is None:
        return merging.merge_experts(tensors)
    return [reference.merge_experts(shards.whole_experts(tensor)) for tensor in tensors]


def draw_seed(x: Tensor) -> int | Tensor:
    """A seed from torch's default generator of x's device: a Python int, drawn without a launch or a wait.

    In a compiled or captured graph it is an int64 tensor on x's device. The value is the same, except in a captured
    graph.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if private_torch.is_watched((x,)) and (
        torch.compiler.is_compiling() or private_torch.is_batched(x) or not x.is_cuda
    ):
        if x.is_nested:
            raise TypeError(f"x must not be nested, or with layout torch.jagged and given to a layer, got {x.layout}")
        return ops.draw_seed(x)
    return seeds.of_deal(x)


def rounding_seed(like: Tensor) -> Tensor:
    """As `draw_seed`, but not of a deal: in backward too it may be one that was never drawn before."""
    return ops.draw_seed(like) if torch.compiler.is_compiling() else seeds.tensor(seeds.fresh(like), _CPU)


_CPU = torch.device("cpu")
