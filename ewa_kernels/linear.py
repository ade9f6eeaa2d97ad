"""`functional.expert_linear`: how a call is run, by an autograd function that is called straight, and the operation
that whoever watches sees in its place. What `calls` and `ops` are to the layer, for one product."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from . import checks, flops, ops, private_torch, reference
from .backends import resolve
from .calls import int32, refuse_transforms
from .kernels import linear as kernels
from .problem import Places, Problem


def expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, places: Places, backend: str) -> Tensor:
    """`[..., D_out]`; see `functional.expert_linear`."""
    checks.linear(x, weight, bias)
    checks.boolean("gather", places.gather)
    checks.boolean("scatter", places.scatter)
    checks.partition(places.permutation, places.expert_offsets, None, x, len(weight))
    dtype = checks.autocast_dtype(x) or x.dtype
    backend = resolve("expert_linear", backend, x.device, dtype)
    # A profiler sees ExpertLinear.
    is_watched = private_torch.is_watched((x, weight, bias, *places[:2]), profiler=False)
    permutation, expert_offsets = int32(places.permutation), int32(places.expert_offsets)
    if is_watched and backend == "reference" and x.device.type == "cpu":
        permutation = ops.checked_permutation(permutation, expert_offsets, None)
    elif not is_watched and x.is_cpu:
        checks.partition_values(permutation, expert_offsets, None)
    places = places._replace(permutation=permutation, expert_offsets=expert_offsets)
    if backend == "reference":
        return reference.expert_linear(x, weight, bias, **places._asdict())
    if is_watched:
        refuse_transforms("expert_linear", (x, weight, bias))
        out = expert_linear_operation(x.to(dtype).reshape(-1, x.shape[-1]), weight, bias, *places, backend)
        return out.reshape(*x.shape[:-1], weight.shape[1])
    input_dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
    problem = Problem.of_linear(x.numel() // x.shape[-1], weight, backend, dtype, input_dtypes)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return (_apply if needs_grad else _run)(problem, places, x, weight, bias)


def _rows(x: Tensor, problem: Problem) -> Tensor:
    """`[R, D_in]`, in the dtype that is computed in."""
    return x.to(problem.dtype).reshape(-1, x.shape[-1])


def _run(problem: Problem, places: Places, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[..., D_out]`, without a gradient."""
    return _forward(problem, places, x, weight, bias)[0]


def _forward(
    problem: Problem, places: Places, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and x and weight as the backward takes them."""
    rows, (weight, bias) = _rows(x, problem), kernels.prepared(problem, weight, bias)
    out = kernels.forward(problem, places, rows, weight, bias)
    # In place: a view that was made in an autograd function may not be changed in place by who gets it.
    return (out if x.ndim == 2 else out.resize_(*x.shape[:-1], out.shape[1])), rows, weight


class ExpertLinear(torch.autograd.Function):
    """`_run`, with gradients of x, weight and bias."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, places: Places, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out, rows, cast_weight = _forward(problem, places, x, weight, bias)
        # What was made of x is kept only if it cost something, and x only for the gradient of the weights.
        kept = (x if x.dtype == problem.dtype else rows) if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(kept, cast_weight, places.permutation, places.expert_offsets)
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.places, ctx.shape = problem, (places.gather, places.scatter), x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 5
        problem, needed = ctx.problem, ctx.needs_input_grad[2:]
        x, weight, *order = ctx.saved_tensors
        places, x = Places(*order, *ctx.places), None if x is None else _rows(x, problem)
        grad_out = grad_out.reshape(-1, problem.d_ff)
        if torch.is_grad_enabled() or private_torch.is_watched((grad_out,), profiler=False):
            # The operation says that it has no second derivative, or is seen.
            parameter_dtype = functools.reduce(torch.promote_types, filter(None, problem.input_dtypes[1:]))
            grads = expert_linear_backward(grad_out, x, weight, *places, list(needed), problem.backend, parameter_dtype)
            grads = problem.gradients(grad if need else None for grad, need in zip(grads, needed, strict=True))
        else:
            grads = kernels.backward(problem, places, grad_out, x, weight, needed)
        grad_x, *of_parameters = grads
        return (None, None, None if grad_x is None else grad_x.view(ctx.shape), *of_parameters)


_apply = private_torch.apply_straight(ExpertLinear)


# --- the operation ---


def _expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    places, backend = Places(*arguments[:4]), arguments[4]
    # Not in `expert_linear`: a compiled graph knows the values here only.
    if x.device.type == "cpu":
        checks.partition_values(places.permutation, places.expert_offsets, None)
    input_dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
    problem = Problem.of_linear(len(x), weight, backend, x.dtype, input_dtypes)
    return kernels.forward(problem, places, x, *kernels.prepared(problem, weight, bias))


# The weights may be of another dtype than x: it is x's that is computed in.
expert_linear_operation = ops.define(
    "expert_linear(Tensor x, Tensor weight, Tensor? bias, Tensor permutation, Tensor expert_offsets, bool gather, "
    "bool scatter, str backend) -> Tensor",
    _expert_linear,
    lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[1]),
)


def _expert_linear_backward(
    grad_out: Tensor, x: Tensor | None, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    places, (needed, backend, parameter_dtype) = Places(*arguments[:4]), arguments[4:]
    dtypes = (grad_out.dtype, parameter_dtype, parameter_dtype)
    problem = Problem.of_linear(len(grad_out), weight, backend, grad_out.dtype, dtypes)
    weight, _ = kernels.prepared(problem, weight, None)
    grads = kernels.backward(problem, places, grad_out, x, weight, needed)
    grad_x, grad_weight, grad_bias = (grad_out.new_empty(0) if grad is None else grad for grad in grads)
    return grad_x, grad_weight, grad_bias


def _expert_linear_backward_fake(
    grad_out: Tensor, x: Tensor | None, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    (need_x, need_weight, need_bias), _, dtype = arguments[4:]
    return (
        grad_out.new_empty((grad_out.shape[0], weight.shape[2]) if need_x else 0),
        grad_out.new_empty(weight.shape, dtype=dtype) if need_weight else grad_out.new_empty(0),
        grad_out.new_empty(weight.shape[:2], dtype=dtype) if need_bias else grad_out.new_empty(0),
    )


# x is there if the gradient of the weights is needed. parameter_dtype: of the gradients of weight and bias, which may
# have been cast already.
expert_linear_backward = ops.define(
    "expert_linear_backward(Tensor grad_out, Tensor? x, Tensor weight, Tensor permutation, Tensor expert_offsets, "
    "bool gather, bool scatter, bool[] output_mask, str backend, ScalarType parameter_dtype) "
    "-> (Tensor, Tensor, Tensor)",
    _expert_linear_backward,
    _expert_linear_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, permutation, expert_offsets, gather, scatter, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, permutation, expert_offsets)
    ctx.places, ctx.backend = (gather, scatter), backend
    ctx.parameter_dtype = weight.dtype if bias is None else torch.promote_types(weight.dtype, bias.dtype)


def _gradients(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 8
    needed = list(ctx.needs_input_grad[:3])
    of_call = (*ctx.places, needed, ctx.backend, ctx.parameter_dtype)
    grads = expert_linear_backward(grad_out, *ctx.saved_tensors, *of_call)
    return (*(grad if need else None for grad, need in zip(grads, needed, strict=True)), *itertools.repeat(None, 5))


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError('expert_linear has no second derivative: use backend="reference", which has, if you need one')


ops.complete(
    expert_linear_operation,
    backward=_gradients,
    setup_context=_setup_context,
    vmap=ops.loop_over_samples(expert_linear_operation),
    flop_formula=flops.expert_linear,
)
ops.complete(
    expert_linear_backward,
    backward=_no_second_derivative,
    vmap=ops.loop_over_samples(expert_linear_backward),
    flop_formula=flops.expert_linear_backward,
)
