"""A linear layer by experts with PyTorch's products, or those of the C++ extension: there rows are looked up while they
are packed, and put in their places while they are in the cache. See `kernels/linear.py`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...problem import Places, Problem
from .. import extension
from ..choices import existing
from ..reused import Reused
from ..scratch import Scratch
from .cpp_rows import address, floats, matrix
from .moe_ffn import caster
from .products import products_of

if extension.WHY_NOT is None:
    from ... import _C


def prepared(problem: Problem, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """See `kernels/linear.py`."""
    cast = caster(problem)
    return cast(weight), None if bias is None else cast(bias)


def forward(problem: Problem, places: Places, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `kernels/linear.py`."""
    times = _times_by_cpp if products_of(problem).by_cpp else _times_by_torch
    return times(problem, places, x.contiguous(), places.gather, weight, True, bias, places.scatter)


def backward(
    problem: Problem, places: Places, grad_out: Tensor, x: Tensor | None, weight: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """See `kernels/linear.py`."""
    need_x, need_weight, need_bias = needed
    times, outer = (_times_by_cpp, _outer_by_cpp) if products_of(problem).by_cpp else (_times_by_torch, _outer_by_torch)
    grad_out = grad_out.contiguous()
    grads: list[Tensor | None] = [None, None, None]
    if need_x:
        grads[0] = times(problem, places, grad_out, places.scatter, weight, False, None, places.gather)
    if need_weight or need_bias:
        x = x.contiguous() if need_weight and x is not None else None
        grads[1:] = outer(problem, places, grad_out, x, need_bias)
    return grads


# Each comes twice, as `times` and `outer`:
# times(…): rows @ weight[e]ᵀ, or @ weight[e] unless `transposed`, + bias[e]. `gathered`: rows are by token, else by
# grouped row; `scattered`: those of the result are.
# outer(…): gradients of the weight, if there is x, and of the bias.


def _times_by_cpp(
    problem: Problem,
    places: Places,
    rows: Tensor,
    gathered: bool,
    weight: Tensor,
    transposed: bool,
    bias: Tensor | None,
    scattered: bool,
) -> Tensor:
    dtype, order = products_of(problem).dtype, existing(places.permutation)
    size_k, size_n = (problem.d_model, problem.d_ff) if transposed else (problem.d_ff, problem.d_model)
    out, bias = rows.new_empty(problem.num_rows, size_n), floats(bias)
    counts = places.expert_offsets.diff().tolist()
    operands = (matrix(rows), address(order if gathered else None), matrix(weight))
    product = _C.TimesWeights(counts, size_k, size_n, *operands, transposed, dtype == torch.bfloat16)
    scratch = Scratch(rows.device, dtype)
    memory = scratch.address("layer", product.workspace_bytes)
    product.multiply(memory, address(bias), address(order if scattered else None), matrix(out))
    scratch.leave()
    return out


def _outer_by_cpp(
    problem: Problem, places: Places, grad_out: Tensor, x: Tensor | None, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    dtype, order = products_of(problem).dtype, existing(places.permutation)
    _, weight_dtype, _ = problem.input_dtypes
    sizes = (problem.num_experts, problem.d_ff, problem.d_model)
    # It is stored once, and so rounded once.
    of_weight = weight_dtype if weight_dtype is not None and weight_dtype.itemsize == 2 else torch.float32
    grad_weight = None if x is None else Reused.empty(sizes, of_weight, grad_out.device)
    grad_bias = grad_out.new_empty(sizes[:2], dtype=torch.float32) if need_bias else None
    left = (matrix(grad_out), address(order if places.scatter else None))
    # Without columns, what is on the right is not read.
    right = left if x is None else (matrix(x), address(order if places.gather else None))
    size_n = 0 if x is None else problem.d_model
    counts = places.expert_offsets.diff().tolist()
    product = _C.Outer(counts, problem.d_ff, size_n, *left, *right, dtype == torch.bfloat16)
    scratch = Scratch(grad_out.device, dtype)
    product.multiply(scratch.address("layer", product.workspace_bytes), matrix(grad_weight), address(grad_bias))
    scratch.leave()
    return grad_weight, grad_bias


def _times_by_torch(
    problem: Problem,
    places: Places,
    rows: Tensor,
    gathered: bool,
    weight: Tensor,
    transposed: bool,
    bias: Tensor | None,
    scattered: bool,
) -> Tensor:
    dtype, order = products_of(problem).dtype, existing(places.permutation)
    rows = (rows[order] if gathered else rows).to(dtype)
    weight = weight.mT if transposed else weight
    product = rows.new_empty(problem.num_rows, weight.shape[2])
    for e, group in enumerate(_groups(places)):
        if bias is None:
            torch.mm(rows[group], weight[e], out=product[group])
        else:
            torch.addmm(bias[e], rows[group], weight[e], out=product[group])
    product = product.to(problem.dtype)
    if not scattered:
        return product
    out = torch.empty_like(product)
    out[order] = product
    return out


def _outer_by_torch(
    problem: Problem, places: Places, grad_out: Tensor, x: Tensor | None, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    dtype, order = products_of(problem).dtype, existing(places.permutation)
    sizes = (problem.num_experts, problem.d_ff, problem.d_model)
    left = (grad_out[order] if places.scatter else grad_out).to(dtype)
    right = None if x is None else (x[order] if places.gather else x).to(dtype)
    grad_weight = None if x is None else Reused.empty(sizes, left.dtype, left.device)
    grad_bias = left.new_empty(sizes[:2]) if need_bias else None
    for e, group in enumerate(_groups(places)):
        if grad_weight is not None and right is not None:
            torch.mm(left[group].mT, right[group], out=grad_weight[e])
        if grad_bias is not None:
            torch.sum(left[group], 0, out=grad_bias[e])
    return grad_weight, grad_bias


def _groups(places: Places) -> list[slice]:
    """Rows of each expert."""
    return [slice(start, end) for start, end in itertools.pairwise(places.expert_offsets.tolist())]
