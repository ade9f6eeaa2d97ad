"""The operations as `torch.library` sees them: schema, implementation, fake tensors, autograd.

Arguments are validated in `ewa_kernels.functional`, once; shapes and dtypes are taken for granted here.
A seed is always an int64 tensor with one element, on the CPU or on the device of the tokens, or None where nothing is
random: a partition is given, and there is no dropout.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import register_flop_formula

import ewa_kernels.checks as checks
import ewa_kernels.flops as flops
import ewa_kernels.reference as reference
from ewa_kernels.kernels import graphs, parameter_pass, permutation
from ewa_kernels.kernels import triton as triton_kernels
from ewa_kernels.kernels.blocked import moe_ffn as blocked_ffn

_LIBRARY = torch.library.Library("ewa_kernels", "DEF")


def _define(schema: str, implementation: Any, fake: Any, tags: tuple[torch.Tag, ...] = ()) -> Any:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ewa_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ewa_kernels, name).default


# --- the deal ---


random_permutation = _define(
    "random_permutation(SymInt num_tokens, Tensor seed) -> Tensor",
    permutation.random_permutation,
    lambda num_tokens, seed: seed.new_empty(num_tokens, dtype=torch.int32),
)


def fresh_seed(like: Tensor) -> Tensor:
    """A seed from torch's default generator of the tensor's device, on the CPU unless a graph is being captured."""
    if like.is_cuda and not graphs.is_capturing(like.device):
        return torch.tensor(_draw_seed_on_host(like.device), dtype=torch.int64, device="cpu")
    # In a CUDA graph the seed must be drawn by the graph, in each replay.
    # `high` is exclusive and at most the largest int64, so 2^63 − 1 alone is never drawn.
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=like.device)


def _draw_seed_on_host(device: torch.device) -> int:
    """A seed from torch's default generator of a GPU, drawn without asking the GPU for anything.

    The generator's state is on the host: a seed and an offset, which every random kernel advances when it is
    launched. So does this, as if it had launched one; `torch.manual_seed` and checkpointing reproduce it.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # it must be a multiple of four
    return seed_from_state(generator.initial_seed(), offset)


def seed_from_state(initial_seed: int, offset: int) -> int:
    """A seed in 0…2⁶³−1 from the state of a generator."""
    return _mix64(_mix64(initial_seed) + offset) >> 1


def _mix64(z: int) -> int:
    """splitmix64's step on a Python int."""
    mask = 2**64 - 1
    z = (z + 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


# The seeds last drawn, more than there can be layers times batches between a forward and its backward.
_drawn: OrderedDict[int, None] = OrderedDict()
_MAX_DRAWN = 65536


def checked_seed(seed: Tensor) -> Tensor:
    """The seed of a deal, which in backward must be one that forward drew: there a deal is only ever made again."""
    if seed.device.type != "cpu":
        return seed
    value = int(seed)
    if torch._C._current_graph_task_id() == -1:
        _drawn[value] = None
        _drawn.move_to_end(value)
        if len(_drawn) > _MAX_DRAWN:
            _drawn.popitem(last=False)
    elif value not in _drawn:
        raise RuntimeError(
            "RandomPartitionMoE was computed again in backward with another deal of the tokens than in forward, so "
            "that gradients would be wrong: use checkpointing with preserve_rng_state=True, or give the layer its seed"
        )
    return seed


def _draw_seed(like: Tensor) -> Tensor:
    seed = checked_seed(fresh_seed(like))
    return seed if seed.device == like.device else torch.full_like(seed, int(seed), device=like.device)


# An operation of its own, so that a compiled model draws the very seed that the eager model draws.
draw_seed = _define(
    "draw_seed(Tensor like) -> Tensor",
    _draw_seed,
    lambda like: like.new_empty((), dtype=torch.int64),
    tags=(torch.Tag.nondeterministic_seeded,),
)


def _draw_seed_to_be_saved(like: Tensor) -> Tensor:
    """The compiler may compute in backward again what is cheaper to compute than to keep, random numbers too.

    What it traces is marked as selective checkpointing marks what a policy says must be saved. With a memory budget
    of 0 the compiler heeds no mark.
    """
    meta = fx_traceback.current_meta
    is_traced = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    if is_traced and torch.is_grad_enabled():
        region = meta.get("custom", {}).get("_region_activation_memory_budget")
        if (functorch_config.activation_memory_budget if region is None else region) == 0:
            raise RuntimeError(
                "RandomPartitionMoE needs an activation_memory_budget above 0, however small: with 0 torch.compile "
                "would deal the tokens anew in backward, and gradients would be wrong. Or give the layer its seed"
            )
    before = meta.get("recompute")
    meta["recompute"] = CheckpointPolicy.MUST_SAVE
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return draw_seed(like)
    finally:
        del meta["recompute"]
        if before is not None:
            meta["recompute"] = before


_LIBRARY.impl("draw_seed", _draw_seed_to_be_saved, "Autograd")


def _draw_seeds(info: Any, in_dims: tuple[int, ...], like: Tensor) -> tuple[Tensor, int | None]:
    """Under torch.func.vmap, whose `randomness` says whether all of the batch are dealt alike."""
    if info.randomness == "error":
        raise RuntimeError(
            "RandomPartitionMoE deals the tokens at random, which vmap must be told to allow: vmap(…, "
            'randomness="same") or "different", or give the layer its seed'
        )
    if info.randomness == "same":
        return draw_seed(like), None
    return torch.stack([draw_seed(like) for _ in range(info.batch_size)]), 0


torch.library.register_vmap("ewa_kernels::draw_seed", _draw_seeds, lib=_LIBRARY)


# --- moe_ffn ---


def _checked_permutation(permutation: Tensor, expert_offsets: Tensor, routing_weights: Tensor | None) -> Tensor:
    checks.partition_values(permutation, expert_offsets, routing_weights)
    return permutation.clone()


# An operation, because a compiled graph knows the values only when it runs.
checked_permutation = _define(
    "checked_permutation(Tensor permutation, Tensor expert_offsets, Tensor? routing_weights) -> Tensor",
    _checked_permutation,
    lambda permutation, expert_offsets, routing_weights: torch.empty_like(permutation),
)


def _kernels(backend: str) -> Any:
    return triton_kernels.moe_ffn if backend.startswith("triton") else blocked_ffn


def _moe_ffn(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    routing_weights, _, permutation, expert_offsets = arguments[4:8]
    if permutation is not None and x.device.type == "cpu":
        # Not in `functional`: a compiled graph knows the values here only.
        checks.partition_values(permutation, expert_offsets, routing_weights)
    return _kernels(arguments[-1]).moe_ffn_forward(x, *arguments)


def _moe_ffn_fake(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    routing_weights: Tensor | None,
    seed: Tensor | None,
    permutation: Tensor | None,
    expert_offsets: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens = x.shape[0]
    num_rows = num_tokens if permutation is None else permutation.shape[0]
    return (
        x.new_empty(num_tokens, down_weight.shape[1]),
        x.new_empty((num_rows, up_weight.shape[1]) if save else 0),
        x.new_empty(num_tokens if save and permutation is None else 0, dtype=torch.int32),
    )


# The weights may be of another dtype than x: it is x's that is computed in.
moe_ffn = _define(
    "moe_ffn(Tensor x, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, "
    "Tensor? routing_weights, Tensor? seed, Tensor? permutation, Tensor? expert_offsets, str activation, bool gated, "
    "float dropout_p, bool save, str backend) "
    "-> (Tensor y, Tensor pre_activation, Tensor drawn_permutation)",
    _moe_ffn,
    _moe_ffn_fake,
)


def _moe_ffn_backward(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _kernels(arguments[-1]).moe_ffn_backward(grad_y, *arguments)


def _moe_ffn_backward_fake(
    grad_y: Tensor,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    routing_weights: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *_, output_mask, _ = arguments
    inputs = (x, up_weight, up_bias, down_weight, down_bias, routing_weights)
    return tuple(
        x.new_empty(0) if t is None else t.new_empty(t.shape if needed else 0)
        for t, needed in zip(inputs, output_mask, strict=True)
    )


moe_ffn_backward = _define(
    "moe_ffn_backward(Tensor grad_y, Tensor x, Tensor up_weight, Tensor? up_bias, Tensor down_weight, "
    "Tensor? down_bias, Tensor? routing_weights, Tensor? seed, Tensor permutation, Tensor? expert_offsets, "
    "Tensor pre_activation, str activation, bool gated, float dropout_p, bool[] output_mask, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _moe_ffn_backward,
    _moe_ffn_backward_fake,
)


class _MoeFFN(torch.autograd.Function):
    """What `torch.library.register_autograd` would make, less a tenth of a millisecond a call: torch reads the list of
    a schema's arguments once for each of them there, in search of defaults, of which this schema has none.
    """

    @staticmethod
    def forward(ctx: Any, keys: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        _, pre_activation, drawn = output = _below_autograd(keys, *inputs)
        *operands, seed, permutation, expert_offsets, activation, gated, dropout_p, _, backend = inputs
        ctx.mark_non_differentiable(pre_activation, drawn)
        ctx.set_materialize_grads(False)
        permutation = drawn if permutation is None else permutation
        ctx.save_for_backward(*operands, seed, permutation, expert_offsets, pre_activation)
        ctx.options = (activation, gated, dropout_p)
        ctx.backend = backend
        return output

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        mask = list(ctx.needs_input_grad[1:7])
        if grad_y is None:
            return (None,) * 15
        grads = moe_ffn_backward(grad_y, *ctx.saved_tensors, *ctx.options, mask, ctx.backend)
        needed = (grad if need else None for grad, need in zip(grads, mask, strict=True))
        return (None, *needed, *itertools.repeat(None, 8))


def _below_autograd(keys: Any, *inputs: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return moe_ffn.redispatch(keys & torch._C._after_autograd_keyset, *inputs)


def _moe_ffn_autograd(keys: Any, *inputs: Any) -> Any:
    tracked = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
    return _MoeFFN.apply(keys, *inputs) if tracked else _below_autograd(keys, *inputs)


_LIBRARY.impl("moe_ffn", _moe_ffn_autograd, "Autograd", with_keyset=True)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError('moe_ffn has no second derivative: use backend="reference", which has, if you need one')


torch.library.register_autograd("ewa_kernels::moe_ffn_backward", _no_second_derivative, lib=_LIBRARY)
register_flop_formula(moe_ffn.overloadpacket)(flops.moe_ffn)
register_flop_formula(moe_ffn_backward.overloadpacket)(flops.moe_ffn_backward)


# --- torch.func.vmap ---


def _loop_over_samples(operation: Any) -> Any:
    """The batching rule of an operation that cannot join samples into one call: each has a deal of its own."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, int]:
        results = [
            # What is no tensor, a list for instance, has no int here.
            operation(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True)), 0

    return rule


# PyTorch would loop too, but with a warning that a rule is missing.
for _operation in (random_permutation, checked_permutation, moe_ffn, moe_ffn_backward):
    torch.library.register_vmap(_operation.name(), _loop_over_samples(_operation), lib=_LIBRARY)


# --- experts ---


def _average_experts_(
    tensors: Sequence[Tensor],
    group_sizes: Sequence[int],
    share_rate: Tensor,
    found_inf: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> None:
    if backend in ("cpp", "cuda"):
        return parameter_pass.average(tensors, group_sizes, share_rate, found_inf, seed)
    groups = [
        group if size else group[0]
        for group, size in zip(parameter_pass.groups_of(tensors, group_sizes), group_sizes, strict=True)
    ]
    if backend == "triton":
        triton_kernels.averaging.average(groups, share_rate, found_inf, seed)
        return torch.autograd.graph.increment_version(tensors)
    rounding = "nearest" if seed is None else "stochastic"
    reference.average_experts_(groups, share_rate, rounding=rounding, seed=seed, found_inf=found_inf)


# Group g is one stacked tensor [E, ...] if group_sizes[g] is 0, else the next group_sizes[g] tensors. 16-bit tensors
# are rounded to nearest without a seed.
average_experts_ = _define(
    "average_experts_(Tensor(a!)[] tensors, int[] group_sizes, Tensor share_rate, Tensor? found_inf, Tensor? seed, "
    "str backend) -> ()",
    _average_experts_,
    lambda *arguments: None,
)

# The AdamW step of every parameter that has a gradient, and the averaging of experts, which are grouped as in
# average_experts_; a group of one is a parameter that has no fellows. What a parameter lacks is a tensor [0]: grad
# (then it has no state either), copy (in bfloat16, of a float32 parameter). `steps` hold how many were taken,
# float32. `options` has five numbers a row: beta1, beta2, eps, weight_decay, and 1 to maximize.
adamw_ = _define(
    "adamw_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    "Tensor(e!)[] steps, Tensor(f!)[] copies, int[] group_sizes, int[] options_of, Tensor[] lrs, float[] options, "
    "Tensor share_rate, Tensor? grad_scale, Tensor? found_inf, Tensor? seed) -> ()",
    parameter_pass.adamw,
    lambda *arguments: None,
)
