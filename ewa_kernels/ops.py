"""The operations as `torch.library` sees them: schema, implementation, fake tensors, autograd.

Arguments are validated in `ewa_kernels.functional`, once; shapes and dtypes are taken for granted here.
A seed is always an int64 tensor with one element, on the CPU or on the device of the tokens, or None where nothing is
random: a partition is given, and there is no dropout.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import register_flop_formula

from . import checks, flops, private_torch, reference, seeds
from .kernels import codec, forms, parameter_pass, permutation
from .kernels import moe_ffn as kernels
from .kernels import triton as triton_kernels
from .problem import SAVED, Deal, Inputs, Options, Problem, format_of_pre, format_of_x, num_kept

# PyTorch takes an operation once. A package that is imported anew, as in notebooks, goes on with those that are there;
# one that is loaded under another name, as by Hugging Face's `kernels`, has its own.
_NAMESPACE = __name__.partition(".")[0]
_OPERATIONS: Any = getattr(torch.ops, _NAMESPACE)
_IS_NEW = not hasattr(_OPERATIONS, "library")
if _IS_NEW:
    _OPERATIONS.library = torch.library.Library(_NAMESPACE, "DEF")
_LIBRARY = _OPERATIONS.library


def define(schema: str, implementation: Any, fake: Any, tags: tuple[torch.Tag, ...] = ()) -> Any:
    name = schema.partition("(")[0]
    if _IS_NEW:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(_OPERATIONS, name).default


def complete(
    operation: Any, *, backward: Any = None, setup_context: Any = None, vmap: Any = None, flop_formula: Any = None
) -> None:
    """What an operation that was defined has for autograd, torch.func.vmap and FlopCounterMode."""
    if not _IS_NEW:
        return
    if backward is not None:
        torch.library.register_autograd(operation.name(), backward, setup_context=setup_context, lib=_LIBRARY)
    if vmap is not None:
        torch.library.register_vmap(operation.name(), vmap, lib=_LIBRARY)
    if flop_formula is not None:
        register_flop_formula(operation.overloadpacket)(flop_formula)


# --- the deal ---


random_permutation = define(
    "random_permutation(SymInt num_tokens, Tensor seed) -> Tensor",
    lambda num_tokens, seed: permutation.random_permutation(num_tokens, seed, seed.device),
    lambda num_tokens, seed: seed.new_empty(num_tokens, dtype=torch.int32),
)


def _draw_seed(like: Tensor) -> Tensor:
    return seeds.tensor(seeds.of_deal(like), like.device)


# An operation of its own, so that a compiled model draws the very seed that the eager model draws.
draw_seed = define(
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
    if private_torch.is_traced() and torch.is_grad_enabled() and private_torch.activation_memory_budget() == 0:
        raise RuntimeError(
            "RandomPartitionMoE needs an activation_memory_budget above 0, however small: with 0 torch.compile "
            "would deal the tokens anew in backward, and gradients would be wrong. Or give the layer its seed"
        )
    meta = private_torch.traced_meta()
    before = meta.get("recompute")
    meta["recompute"] = CheckpointPolicy.MUST_SAVE
    try:
        with private_torch.below_autograd():
            return draw_seed(like)
    finally:
        del meta["recompute"]
        if before is not None:
            meta["recompute"] = before


if _IS_NEW:
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


complete(draw_seed, vmap=_draw_seeds)


# --- moe_ffn ---


def _checked_permutation(permutation: Tensor, expert_offsets: Tensor, routing_weights: Tensor | None) -> Tensor:
    checks.partition_values(permutation, expert_offsets, routing_weights)
    return permutation.clone()


# An operation, because a compiled graph knows the values only when it runs.
checked_permutation = define(
    "checked_permutation(Tensor permutation, Tensor expert_offsets, Tensor? routing_weights) -> Tensor",
    _checked_permutation,
    lambda permutation, expert_offsets, routing_weights: torch.empty_like(permutation),
)


def _problem(inputs: Inputs, is_given: bool, options: Options, *parameter_dtype: torch.dtype) -> Problem:
    """Of a call by an operation, which knows the sizes on which "auto" depends."""
    if options.backend == "auto":
        options = options._replace(backend=forms.backend_for(inputs, is_given, inputs.x.dtype))
    return Problem.of(inputs, is_given, options, options.saved, None, *parameter_dtype)


def _moe_ffn(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, (seed, *partition) = Inputs(*arguments[:6]), arguments[6:9]
    deal = Deal(seeds.on_host(seed), *partition)
    activation, gated, dropout_p, saved, backend = arguments[9:]
    is_given = False
    if deal.permutation is not None and deal.expert_offsets is not None:
        is_given = True
        # Not in `functional`: a compiled graph knows the values here only.
        if inputs.x.device.type == "cpu":
            checks.partition_values(deal.permutation, deal.expert_offsets, inputs.routing_weights)
    problem = _problem(inputs, is_given, Options(activation, gated, dropout_p, backend, saved))
    of_backend = kernels.of(problem)
    y, pre_activation, permutation = of_backend.forward(problem, of_backend.prepared(problem, inputs), deal)
    if problem.save and problem.num_kept > problem.num_rows and problem.backend.startswith("triton"):
        _clear_unused_rows(problem, pre_activation)
    # What is not kept is [0].
    pre_activation = inputs.x.new_empty(0) if pre_activation is None else pre_activation
    kept_x = inputs.x.new_empty(0, dtype=torch.uint8)
    if problem.x_format is not None:
        kept_x = codec.encode(inputs.x, problem.x_format, problem.backend)
    return y, pre_activation, kept_x, permutation if problem.save and not is_given else permutation.new_empty(0)


def _clear_unused_rows(problem: Problem, pre_activation: Tensor) -> None:
    """Of what Triton's forms keep, who have a row for each grouped row only."""
    form, parts = problem.pre_format, [pre_activation]
    if form is not None:
        parts = list(pre_activation.split(form.num_bytes(problem.num_kept, problem.num_up)))
    for part in parts:
        part.view(problem.num_kept, -1)[problem.num_rows :].zero_()


def _moe_ffn_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, deal, (activation, gated, _, saved, backend) = Inputs(*arguments[:6]), Deal(*arguments[6:9]), arguments[9:]
    x, (num_experts, num_up, d_model) = inputs.x, inputs.up_weight.shape
    num_tokens, is_dealt = x.shape[0], deal.permutation is None
    num_rows = num_tokens if deal.permutation is None else deal.permutation.shape[0]
    kept, save = num_kept(backend, not is_dealt, num_rows, num_experts), SAVED[saved][1] is not None
    x_format, pre_format = format_of_x(saved), format_of_pre(saved, activation, gated)
    pre_activation = x.new_empty((kept, num_up) if save else 0)
    if pre_format is not None:
        pre_activation = x.new_empty(sum(pre_format.num_bytes(kept, num_up)), dtype=torch.uint8)
    num_bytes = 0 if x_format is None else sum(x_format.num_bytes(num_tokens, d_model))
    return (
        x.new_empty(num_tokens, d_model),
        pre_activation,
        x.new_empty(num_bytes, dtype=torch.uint8),
        x.new_empty(num_tokens if save and is_dealt else 0, dtype=torch.int32),
    )


# The weights may be of another dtype than x: it is x's that is computed in.
moe_ffn = define(
    "moe_ffn(Tensor x, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, "
    "Tensor? routing_weights, Tensor? seed, Tensor? permutation, Tensor? expert_offsets, str activation, bool gated, "
    "float dropout_p, str saved, str backend) "
    "-> (Tensor y, Tensor pre_activation, Tensor kept_x, Tensor drawn_permutation)",
    _moe_ffn,
    _moe_ffn_fake,
)


def _moe_ffn_backward(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, (seed, permutation, expert_offsets, pre_activation) = Inputs(*arguments[:6]), arguments[6:10]
    activation, gated, dropout_p, output_mask, saved, backend, *parameter_dtype = arguments[10:]
    is_given, x_format = expert_offsets is not None, format_of_x(saved)
    if x_format is not None:
        shape = grad_y.shape[0], inputs.up_weight.shape[2]
        inputs = inputs._replace(x=codec.decode(inputs.x, shape, x_format, grad_y.dtype, backend))
    problem = _problem(inputs, is_given, Options(activation, gated, dropout_p, backend, saved), *parameter_dtype)
    of_backend = kernels.of(problem)
    grads = of_backend.backward(
        problem,
        grad_y,
        of_backend.prepared(problem, inputs),
        Deal(seeds.on_host(seed), permutation if is_given or permutation.shape[0] > 0 else None, expert_offsets),
        pre_activation if problem.save else None,
        output_mask,
    )
    return tuple(
        (inputs.x if t is None else t).new_empty(0) if grad is None else grad
        for t, grad in zip(inputs, grads, strict=True)
    )


def _moe_ffn_backward_fake(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, output_mask = Inputs(*arguments[:6]), arguments[13]
    inputs = inputs._replace(x=torch.empty_like(grad_y))  # it may be encoded
    parameter_dtype = arguments[16] if len(arguments) > 16 else None  # what is left out is not there
    dtypes = (None, *[parameter_dtype] * 4, None)
    return tuple(
        inputs.x.new_empty(0) if t is None else t.new_empty(t.shape if needed else 0, dtype=dtype or t.dtype)
        for t, needed, dtype in zip(inputs, output_mask, dtypes, strict=True)
    )


# x: as it is kept. parameter_dtype: of the gradients of parameters, if not theirs: they may have been cast already.
moe_ffn_backward = define(
    "moe_ffn_backward(Tensor grad_y, Tensor x, Tensor up_weight, Tensor? up_bias, Tensor down_weight, "
    "Tensor? down_bias, Tensor? routing_weights, Tensor? seed, Tensor permutation, Tensor? expert_offsets, "
    "Tensor pre_activation, str activation, bool gated, float dropout_p, bool[] output_mask, str saved, str backend, "
    "ScalarType? parameter_dtype=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _moe_ffn_backward,
    _moe_ffn_backward_fake,
)


def backward_by_operation(
    problem: Problem, grad_y: Tensor, inputs: Inputs, deal: Deal, pre_activation: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """A backend's `backward`, seen by whoever watches; x as it is kept."""
    seed = None if deal.seed is None else seeds.tensor(deal.seed, inputs.x.device)
    permutation = inputs.x.new_empty(0, dtype=torch.int32) if deal.permutation is None else deal.permutation
    pre_activation = inputs.x.new_empty(0) if pre_activation is None else pre_activation
    kept = (seed, permutation, deal.expert_offsets, pre_activation)
    parameter_dtype = functools.reduce(torch.promote_types, [dtype for dtype in problem.input_dtypes[1:5] if dtype])
    options = (problem.activation, problem.gated, problem.dropout_p, list(needed))
    grads = moe_ffn_backward(grad_y, *inputs, *kept, *options, problem.saved, problem.backend, parameter_dtype)
    return problem.gradients(grad if need else None for grad, need in zip(grads, needed, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *operands, seed, permutation, expert_offsets, activation, gated, dropout_p, saved, backend = inputs
    _, pre_activation, kept_x, drawn = output
    ctx.mark_non_differentiable(pre_activation, kept_x, drawn)
    ctx.set_materialize_grads(False)
    permutation = drawn if permutation is None else permutation
    kept_x = x if format_of_x(saved) is None else kept_x
    ctx.save_for_backward(kept_x, *operands, seed, permutation, expert_offsets, pre_activation)
    ctx.options = (activation, gated, dropout_p)
    ctx.how = (saved, backend)


def _gradients(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 14
    needed = list(ctx.needs_input_grad[:6])
    grads = moe_ffn_backward(grad_y, *ctx.saved_tensors, *ctx.options, needed, *ctx.how)
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *itertools.repeat(None, 8))


complete(moe_ffn, backward=_gradients, setup_context=_setup_context, flop_formula=flops.moe_ffn)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError('moe_ffn has no second derivative: use backend="reference", which has, if you need one')


complete(moe_ffn_backward, backward=_no_second_derivative, flop_formula=flops.moe_ffn_backward)


# --- torch.func.vmap ---


def loop_over_samples(operation: Any) -> Any:
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
    complete(_operation, vmap=loop_over_samples(_operation))


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
average_experts_ = define(
    "average_experts_(Tensor(a!)[] tensors, int[] group_sizes, Tensor share_rate, Tensor? found_inf, Tensor? seed, "
    "str backend) -> ()",
    _average_experts_,
    lambda *arguments: None,
)

# The AdamW step of every parameter that has a gradient, and the averaging of experts, which are grouped as in
# average_experts_; a group of one is a parameter that has no fellows. What a parameter lacks is a tensor [0]: grad
# (then it has no state either), copy (in bfloat16, of a float32 parameter). `steps` hold how many were taken,
# float32. `options` has five numbers a row: beta1, beta2, eps, weight_decay, and 1 to maximize.
adamw_ = define(
    "adamw_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    "Tensor(e!)[] steps, Tensor(f!)[] copies, int[] group_sizes, int[] options_of, Tensor[] lrs, float[] options, "
    "Tensor share_rate, Tensor? grad_scale, Tensor? found_inf, Tensor? seed) -> ()",
    parameter_pass.adamw,
    lambda *arguments: None,
)
