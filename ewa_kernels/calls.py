"""How a call of the layer is run: described once for all of its kind, then by an autograd function, called straight.

Who watches eager code, a compiler or a mode, sees the operation `ops.moe_ffn` in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, fx, nn

from . import checks, ops, private_torch, reference
from .backends import resolve
from .kernels import codec, forms, graphs
from .kernels import moe_ffn as kernels
from .problem import SAVED, Deal, Inputs, Options, Problem, keep

# What layers are given as a rule; anything else may be a tensor that knows of its structure, or no tensor at all.
PLAIN = {Tensor, nn.Parameter}


def of_another_kind(layer: nn.Module, x: Any, **options: Any) -> Any:
    """What a layer gives for an x that is not plain, or NotImplemented: then it is treated as any other tensor.

    A call of a layer is one node of what torch.fx traces: what is inside is no graph. Of a jagged nested tensor
    `[B, *, D]` all tokens are taken together, and the result has the same structure.
    """
    if isinstance(x, fx.Proxy):
        tracer: Any = x.tracer
        given = {name: value for name, value in options.items() if value is not None}
        return tracer.create_proxy("call_module", tracer.path_of_module(layer), (x,), given)
    if isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged:
        nested: Any = x
        return torch.nested.nested_tensor_from_jagged(
            layer(nested.values(), **options), nested.offsets(), nested.lengths()
        )
    return NotImplemented


def _rows(x: Tensor, problem: Problem) -> Tensor:
    """x `[T, D]`, in the dtype that is computed in."""
    if x.dtype != problem.dtype:
        x = x.to(problem.dtype)
    return x if x.ndim == 2 else x.reshape(-1, problem.d_model)


def run(problem: Problem, deal: Deal, *inputs: Any) -> Tensor:
    """y `[..., D]`, without a gradient; `inputs`: those of `Inputs`."""
    return _forward(problem, deal, Inputs(*inputs))[0]


def _forward(problem: Problem, deal: Deal, inputs: Inputs) -> tuple[Tensor, Inputs, Tensor | None, Tensor]:
    """y, inputs as the backend takes them, pre_activation and the permutation."""
    of_backend, x = kernels.of(problem), inputs.x
    rows = _rows(x, problem)
    inputs = of_backend.prepared(problem, inputs if rows is x else inputs._replace(x=rows))
    y, pre_activation, permutation = of_backend.forward(problem, inputs, deal)
    # In place: a view that was made in an autograd function may not be changed in place by who gets it.
    return (y if y.ndim == x.ndim else y.resize_(x.shape)), inputs, pre_activation, permutation


class MoeFFN(torch.autograd.Function):
    """`run`, with gradients of the inputs."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, deal: Deal, *inputs: Any) -> Tensor:
        x = inputs[0]
        y, (rows, *others), pre_activation, permutation = _forward(problem, deal, Inputs(*inputs))
        if problem.x_format is not None:
            kept = codec.encode(rows, problem.x_format, problem.backend)
        else:  # what was made of x is kept only if it cost something
            kept = x if x.dtype == problem.dtype else rows
        order = permutation if problem.save or problem.is_given else None
        # A seed on a GPU is saved too: autograd notices if it changes before backward.
        seed = deal.seed if isinstance(deal.seed, Tensor) else None
        ctx.save_for_backward(kept, *others, order, deal.expert_offsets, pre_activation, seed)
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.shape, ctx.seed = problem, x.shape, deal.seed if seed is None else None
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 8
        problem, needed = ctx.problem, ctx.needs_input_grad[2:]
        x, *others, permutation, expert_offsets, pre_activation, seed = ctx.saved_tensors
        deal = Deal(ctx.seed if seed is None else seed, permutation, expert_offsets)
        grad_rows = grad_y if grad_y.ndim == 2 else grad_y.reshape(-1, problem.d_model)
        if torch.is_grad_enabled() or private_torch.is_watched((grad_y,), profiler=False):
            # The operation says that it has no second derivative, or is seen.
            x = x if problem.x_format is not None else _rows(x, problem)
            grads = ops.backward_by_operation(problem, grad_rows, Inputs(x, *others), deal, pre_activation, needed)
        else:
            of_backend = kernels.of(problem)
            if problem.x_format is not None:
                shape = problem.num_tokens, problem.d_model
                x = codec.decode(x, shape, problem.x_format, problem.dtype, problem.backend)
            inputs = of_backend.prepared(problem, Inputs(_rows(x, problem), *others))
            grads = of_backend.backward(problem, grad_rows, inputs, deal, pre_activation, needed)
        grad_x, *of_others = grads
        if grad_x is not None and grad_x.ndim != len(ctx.shape):
            grad_x = grad_x.view(ctx.shape)
        return (None, None, grad_x, *of_others)


_apply = private_torch.apply_straight(MoeFFN)

# Of calls that were checked, by all that was.
_problems: dict[Any, Problem] = {}


def problem_of(inputs: Inputs, deal: Deal, is_given: bool, options: Options, needs_grad: bool) -> Problem:
    """What describes a call in eager mode. The first of its kind is checked, but for its seed.

    Args:
        inputs: plain tensors, which differ in what the key has, and else in nothing that counts.
    """
    key: tuple[Any, ...] | None
    try:
        key = _key(inputs, is_given, options, needs_grad)
        problem = _problems.get(key)
    except (AttributeError, TypeError):  # None, or something unhashable, which is about to be refused
        key = problem = None
    if problem is None:
        _check(inputs, deal, is_given, options)
        backend, dtype = _resolved(inputs, options)
        if backend == "auto":
            backend = forms.backend_for(inputs, is_given, dtype)
        saved = options.saved if needs_grad else "recompute"
        problem = Problem.of(inputs, is_given, options._replace(backend=backend), saved, dtype)
        keep(_problems, key, problem)
    return problem


def _key(inputs: Inputs, is_given: bool, options: Options, needs_grad: bool) -> tuple[Any, ...]:
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
        (is_given, needs_grad, checks.autocast_enabled(x.device) and torch.get_autocast_dtype(x.device.type)),
    )


def _check(inputs: Inputs, deal: Deal, is_given: bool, options: Options) -> None:
    checks.ffn(inputs.x, *inputs.parameters, options.activation, options.gated, options.dropout_p)
    checks.num_tokens(inputs.x)
    checks.choice("saved", options.saved, SAVED)
    if is_given:
        num_experts = inputs.up_weight.shape[0]
        checks.partition(deal.permutation, deal.expert_offsets, inputs.routing_weights, inputs.x, num_experts)


def _resolved(inputs: Inputs, options: Options) -> tuple[str, torch.dtype]:
    """The backend, and what it computes in. "auto" stays where it depends on sizes, which a compiler may not know."""
    x = inputs.x
    dtype = checks.autocast_dtype(x) or x.dtype
    backend = resolve("moe_ffn", options.backend, x.device, dtype)
    return ("auto" if options.backend == "auto" and backend == "triton" else backend), dtype


def check_ffn(
    x: Tensor,
    parameters: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    activation: str,
    gated: bool,
    dropout_p: float,
) -> None:
    """Raises what `checks.ffn` does; looks once at calls of the same kind."""
    if private_torch.is_jit_traced():
        return  # sizes are tensors then, and what is decided by them would be in the trace
    if private_torch.is_watched((x, *parameters)):
        checks.ffn(x, *parameters, activation, gated, dropout_p)
    else:
        options = Options(activation, gated, dropout_p, "reference", "full")
        problem_of(Inputs(x, *parameters, None), Deal(None), False, options, needs_grad=False)


def _needs_grad(inputs: Inputs) -> bool:
    if torch.is_grad_enabled():
        for tensor in inputs:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def int32(indices: Tensor) -> Tensor:
    """Contiguous; what is out of range stays so."""
    if indices.dtype == torch.int64:
        indices = indices.clamp(-(2**31), 2**31 - 1)
    return indices.to(torch.int32).contiguous()


def ffn(inputs: Inputs, deal: Deal, is_given: bool, options: Options) -> Tensor:
    """y `[..., D]`. `is_given`: whether the partition is, right or wrong."""
    # A profiler sees MoeFFN, which keeps for backward what it keeps without one: activations may be checkpointed.
    if private_torch.is_watched((*inputs, *deal[1:]), profiler=False):
        return _watched_ffn(inputs, deal, is_given, options)
    x, needs_grad = inputs.x, _needs_grad(inputs)
    problem = problem_of(inputs, deal, is_given, options, needs_grad)
    seed, permutation, expert_offsets = deal
    if is_given:
        checks.partition(permutation, expert_offsets, inputs.routing_weights, x, problem.num_experts)
        assert permutation is not None
        assert expert_offsets is not None
        permutation, expert_offsets = int32(permutation), int32(expert_offsets)
        if x.is_cpu:
            checks.partition_values(permutation, expert_offsets, inputs.routing_weights)
    seed = checks.seed(seed, x.device)
    if is_given and options.dropout_p == 0:
        seed = None  # nothing is random
    elif x.is_cuda:
        graphs.check_replayable("seed", seed, x.device)
    deal = Deal(seed, permutation, expert_offsets)
    if problem.backend == "reference":
        return _by_reference(inputs, deal, options)
    return (_apply if needs_grad else run)(problem, deal, *inputs)


def _watched_ffn(inputs: Inputs, deal: Deal, is_given: bool, options: Options) -> Tensor:
    """`ffn` by the operation, where somebody has to see it."""
    x = inputs.x
    _check(inputs, deal, is_given, options)
    seed, permutation, expert_offsets = deal
    if permutation is not None and expert_offsets is not None:
        permutation, expert_offsets = int32(permutation), int32(expert_offsets)
    seed = checks.seed_tensor(seed, x.device)
    # Without dropout nothing is random in groups that are given, and no seed is put into a graph.
    seed = None if is_given and options.dropout_p == 0 else graphs.replayable("seed", seed, x.device)
    backend, dtype = _resolved(inputs, options)
    if backend == "reference":
        if permutation is not None and expert_offsets is not None and x.device.type == "cpu":
            permutation = ops.checked_permutation(permutation, expert_offsets, inputs.routing_weights)
        return _by_reference(inputs, Deal(seed, permutation, expert_offsets), options)
    refuse_transforms("moe_ffn", inputs)
    saved = options.saved if _needs_grad(inputs) else "recompute"
    of_call = (seed, permutation, expert_offsets, options.activation, options.gated, float(options.dropout_p))
    y, *_ = ops.moe_ffn(x.to(dtype).reshape(-1, x.shape[-1]), *inputs[1:], *of_call, saved, backend)
    return y.reshape(x.shape)


def _by_reference(inputs: Inputs, deal: Deal, options: Options) -> Tensor:
    operands = (inputs.x, *inputs.parameters)
    given: dict[str, Any] = {"activation": options.activation, "gated": options.gated, "dropout_p": options.dropout_p}
    given["saved"] = options.saved if _needs_grad(inputs) else "full"
    if deal.seed is not None:
        given["seed"] = deal.seed
    if deal.permutation is None or deal.expert_offsets is None:
        return reference.moe_ffn(*operands, **given)
    given |= {"permutation": deal.permutation, "expert_offsets": deal.expert_offsets}
    return reference.grouped_ffn(*operands, routing_weights=inputs.routing_weights, **given)


def refuse_transforms(operation: str, tensors: Iterable[Tensor | None]) -> None:
    """Through a custom operation torch answers forward-mode AD with zeros, silently, and torch.func.grad with a
    message that does not say what to do."""
    for tensor in tensors:
        if tensor is None:
            continue
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f'{operation} does not support forward-mode AD (torch.func.jvp): use backend="reference"'
            )
        if not torch.compiler.is_compiling() and private_torch.is_differentiated(tensor):
            raise RuntimeError(f'{operation} does not support torch.func.grad, vjp or jacrev: use backend="reference"')
