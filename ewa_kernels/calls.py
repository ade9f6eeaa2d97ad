"""How a call of the layer is run: described once for all of its kind, then by an autograd function, called straight.

Who watches eager code, a compiler or a mode, sees the operation `ops.moe_ffn` in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import ewa_kernels.checks as checks
import ewa_kernels.ops as ops
import ewa_kernels.private_torch as private_torch
import ewa_kernels.reference as reference
import ewa_kernels.seeds as seeds
from ewa_kernels.backends import resolve
from ewa_kernels.kernels import graphs
from ewa_kernels.kernels import moe_ffn as kernels
from ewa_kernels.problem import Problem, keep


def _rows(x: Tensor, problem: Problem) -> Tensor:
    """x `[T, D]`, in the dtype that is computed in."""
    if x.dtype != problem.dtype:
        x = x.to(problem.dtype)
    return x if x.ndim == 2 else x.reshape(-1, problem.d_model)


def run(
    problem: Problem,
    seed: int | Tensor | None,
    permutation: Tensor | None,
    expert_offsets: Tensor | None,
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    routing_weights: Tensor | None,
) -> Tensor:
    """y `[..., D]`, without a gradient."""
    of_backend = kernels.of(problem)
    parameters = of_backend.parameters(problem, up_weight, up_bias, down_weight, down_bias)
    y: Tensor = of_backend.forward(
        problem, _rows(x, problem), *parameters, routing_weights, seed, permutation, expert_offsets
    )[0]
    return y if y.ndim == x.ndim else y.view(x.shape)


class MoeFFN(torch.autograd.Function):
    """`run`, with gradients of x, the parameters and the routing weights; its arguments are those of `run`."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        seed: int | Tensor | None,
        permutation: Tensor | None,
        expert_offsets: Tensor | None,
        x: Tensor,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        routing_weights: Tensor | None,
    ) -> Tensor:
        of_backend = kernels.of(problem)
        rows = _rows(x, problem)
        parameters = of_backend.parameters(problem, up_weight, up_bias, down_weight, down_bias)
        y, pre_activation, order = of_backend.forward(
            problem, rows, *parameters, routing_weights, seed, permutation, expert_offsets
        )
        # What was made of x is kept only if it cost something.
        kept = x if x.dtype == problem.dtype else rows
        order = order if problem.save or problem.is_given else None
        ctx.save_for_backward(kept, *parameters, routing_weights, order, expert_offsets, pre_activation)
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.seed = problem, seed
        return y if y.ndim == x.ndim else y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 10
        problem, seed, needed = ctx.problem, ctx.seed, ctx.needs_input_grad[4:]
        x, *operands, permutation, expert_offsets, pre_activation = ctx.saved_tensors
        rows, grad_rows = (t if t.ndim == 2 else t.reshape(-1, problem.d_model) for t in (x, grad_y))
        if torch.is_grad_enabled() or private_torch.is_watched((grad_y,)):
            # The operation says that it has no second derivative, or is seen.
            no_indices, nothing = rows.new_empty(0, dtype=torch.int32), rows.new_empty(0)
            grads = ops.moe_ffn_backward(
                grad_rows,
                rows,
                *operands,
                None if seed is None else seeds.tensor(seed, rows.device),
                no_indices if permutation is None else permutation,
                expert_offsets,
                nothing if pre_activation is None else pre_activation,
                problem.activation,
                problem.gated,
                problem.dropout_p,
                list(needed),
                problem.backend,
            )
            grads = [
                grad.to(dtype) if need else None
                for grad, dtype, need in zip(grads, problem.input_dtypes, needed, strict=True)
            ]
        else:
            grads = kernels.of(problem).backward(
                problem, grad_rows, rows, *operands, seed, permutation, expert_offsets, pre_activation, needed
            )
        grad_x, *others = grads
        if grad_x is not None and grad_x.ndim != x.ndim:
            grad_x = grad_x.view(x.shape)
        return (None, None, None, None, grad_x, *others)


def _int32(indices: Tensor) -> Tensor:
    """Contiguous; what is out of range stays so."""
    if indices.dtype == torch.int64:
        indices = indices.clamp(-(2**31), 2**31 - 1)
    return indices.to(torch.int32).contiguous()


_apply = private_torch.apply_straight(MoeFFN)

# Of calls that were checked, by all that was.
_problems: dict[Any, Problem] = {}


def problem_of(
    inputs: tuple[Any, ...],
    permutation: Tensor | None,
    expert_offsets: Tensor | None,
    is_given: bool,
    activation: str,
    gated: bool,
    dropout_p: float,
    backend: str,
    recompute: bool,
    needs_grad: bool,
) -> Problem:
    """What describes a call in eager mode. The first of its kind is checked, but for its seed.

    Args:
        inputs: x, the parameters and the routing weights: plain tensors, which differ in what the key has, and else in
            nothing that counts.
    """
    x, up_weight, up_bias, down_weight, down_bias, routing_weights = inputs
    key: tuple[Any, ...] | None
    try:
        key = _key(inputs, (is_given, activation, gated, dropout_p, backend, recompute), needs_grad)
        problem = _problems.get(key)
    except (AttributeError, TypeError):  # None, or something unhashable, which is about to be refused
        key = problem = None
    if problem is None:
        _check(inputs, permutation, expert_offsets, is_given, activation, gated, dropout_p, recompute)
        backend, dtype = _resolved(x, backend)
        save = needs_grad and not recompute
        problem = Problem.of(
            x, up_weight, up_bias, down_weight, down_bias, routing_weights, is_given, activation, gated, dropout_p,
            save, backend, dtype,
        )  # fmt: skip
        keep(_problems, key, problem)
    return problem


def _key(inputs: tuple[Any, ...], options: tuple[Any, ...], needs_grad: bool) -> tuple[Any, ...]:
    """All that checks and backends look at."""
    x, up_weight, up_bias, down_weight, down_bias, routing_weights = inputs
    return (
        (x.shape, x.dtype, x.device, up_weight.shape, up_weight.dtype, up_weight.device),
        None if up_bias is None else (up_bias.shape, up_bias.dtype, up_bias.device),
        (down_weight.shape, down_weight.dtype, down_weight.device),
        None if down_bias is None else (down_bias.shape, down_bias.dtype, down_bias.device),
        None if routing_weights is None else (routing_weights.shape, routing_weights.dtype, routing_weights.device),
        options,
        tuple(map(type, options)),  # 1 is equal to True, and is refused
        (needs_grad, checks.autocast_dtype(x)),
    )


def _check(
    inputs: tuple[Any, ...],
    permutation: Tensor | None,
    expert_offsets: Tensor | None,
    is_given: bool,
    activation: str,
    gated: bool,
    dropout_p: float,
    recompute: bool,
) -> None:
    x, up_weight, up_bias, down_weight, down_bias, routing_weights = inputs
    checks.ffn(x, up_weight, up_bias, down_weight, down_bias, activation, gated, dropout_p)
    checks.boolean("recompute", recompute)
    if is_given:
        checks.partition(permutation, expert_offsets, routing_weights, x, num_experts=up_weight.shape[0])


def _resolved(x: Tensor, backend: str) -> tuple[str, torch.dtype]:
    """The backend, and what it computes in."""
    dtype = checks.autocast_dtype(x) or x.dtype
    return resolve("moe_ffn", backend, x.device, dtype), dtype


def check_ffn(*arguments: Any) -> None:
    """Raises what `checks.ffn` does; looks once at calls of the same kind."""
    *inputs, activation, gated, dropout_p = arguments
    if private_torch.is_watched(inputs):
        checks.ffn(*arguments)
    else:
        problem_of((*inputs, None), None, None, False, activation, gated, dropout_p, "reference", False, False)


def _needs_grad(inputs: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for tensor in inputs:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def ffn(
    inputs: tuple[Any, ...],
    seed: int | Tensor,
    permutation: Tensor | None,
    expert_offsets: Tensor | None,
    is_given: bool,
    activation: str,
    gated: bool,
    dropout_p: float,
    backend: str,
    recompute: bool,
) -> Tensor:
    if private_torch.is_watched((*inputs, permutation, expert_offsets)):
        return _watched_ffn(
            inputs, seed, permutation, expert_offsets, is_given, activation, gated, dropout_p, backend, recompute
        )
    needs_grad = _needs_grad(inputs)
    options = (activation, gated, dropout_p, backend, recompute, needs_grad)
    problem = problem_of(inputs, permutation, expert_offsets, is_given, *options)
    x, *_, routing_weights = inputs
    if permutation is not None and expert_offsets is not None:
        checks.partition(permutation, expert_offsets, routing_weights, x, problem.num_experts)
        permutation, expert_offsets = _int32(permutation), _int32(expert_offsets)
        if x.is_cpu:
            checks.partition_values(permutation, expert_offsets, routing_weights)
    of_call: int | Tensor | None = checks.seed(seed, x.device)
    if is_given and dropout_p == 0:
        of_call = None  # nothing is random
    elif x.is_cuda:
        graphs.check_replayable("seed", of_call, x.device)
    if problem.backend == "reference":
        return _by_reference(inputs, of_call, permutation, expert_offsets, activation, gated, dropout_p)
    call = _apply if needs_grad else run
    return call(problem, of_call, permutation, expert_offsets, *inputs)


def _watched_ffn(
    inputs: tuple[Any, ...],
    seed: int | Tensor,
    permutation: Tensor | None,
    expert_offsets: Tensor | None,
    is_given: bool,
    activation: str,
    gated: bool,
    dropout_p: float,
    backend: str,
    recompute: bool,
) -> Tensor:
    """`ffn` by the operation, where somebody has to see it."""
    x, *parameters, routing_weights = inputs
    _check(inputs, permutation, expert_offsets, is_given, activation, gated, dropout_p, recompute)
    if permutation is not None and expert_offsets is not None:
        permutation, expert_offsets = _int32(permutation), _int32(expert_offsets)
    checked_seed = checks.seed_tensor(seed, x.device)
    # Without dropout nothing is random in groups that are given, and no seed is put into a graph.
    of_call = None if is_given and dropout_p == 0 else graphs.replayable("seed", checked_seed, x.device)
    backend, dtype = _resolved(x, backend)
    if backend == "reference":
        return _by_reference(inputs, of_call, permutation, expert_offsets, activation, gated, dropout_p)
    _refuse_transforms(inputs)
    y, _, _ = ops.moe_ffn(
        x.to(dtype).reshape(-1, x.shape[-1]),
        *parameters,
        routing_weights,
        of_call,
        permutation,
        expert_offsets,
        activation,
        gated,
        float(dropout_p),
        _needs_grad(inputs) and not recompute,
        backend,
    )
    return y.reshape(x.shape)


def _by_reference(
    inputs: tuple[Any, ...],
    seed: int | Tensor | None,
    permutation: Tensor | None,
    expert_offsets: Tensor | None,
    activation: str,
    gated: bool,
    dropout_p: float,
) -> Tensor:
    x, *parameters, routing_weights = inputs
    options: dict[str, Any] = {"activation": activation, "gated": gated, "dropout_p": dropout_p}
    if seed is not None:
        options["seed"] = seed
    if permutation is None or expert_offsets is None:
        return reference.moe_ffn(x, *parameters, **options)
    if x.device.type == "cpu" and private_torch.is_watched((x,)):  # else they are checked
        permutation = ops.checked_permutation(permutation, expert_offsets, routing_weights)
    options |= {"permutation": permutation, "expert_offsets": expert_offsets, "routing_weights": routing_weights}
    return reference.grouped_ffn(x, *parameters, **options)


def _refuse_transforms(tensors: Iterable[Tensor | None]) -> None:
    """Through a custom operation torch answers forward-mode AD with zeros, silently, and torch.func.grad with a
    message that does not say what to do."""
    for tensor in tensors:
        if tensor is None:
            continue
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError('moe_ffn does not support forward-mode AD (torch.func.jvp): use backend="reference"')
        if not torch.compiler.is_compiling() and private_torch.is_differentiated(tensor):
            raise RuntimeError('moe_ffn does not support torch.func.grad, vjp or jacrev: use backend="reference"')
