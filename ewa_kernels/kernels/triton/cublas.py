"""The layer by a library's matrix products, on a GPU cuBLAS', and one pass over memory between any two of them.

What is kept for backward is the up projection's product, without its bias, which is added wherever it is read: neither
costs a pass. What is encoded is pre_activation. It lies in slots, see `rows.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...problem import Deal, Inputs, Problem
from ..choices import grad_of_routing_weights, sum_of_choices
from ..devices import on_device
from . import rows
from .configs import ROWS, ROWS_TILES, UNALIGNED_ROWS_TILE, RowsTile, aligned, ceil_div
from .launch import Launch
from .layer import Layer, check_sizes
from .moe_ffn import prepared

__all__ = ["backward", "forward", "prepared"]


def forward(problem: Problem, inputs: Inputs, deal: Deal) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `kernels/moe_ffn.py`; pre_activation is by slot, and lacks its bias."""
    x, layer = inputs.x, Layer(problem, inputs, deal)
    layer.kept(_check)
    with on_device(x), _as_they_are(x):
        y = x.new_empty(problem.num_rows, problem.d_model)
        product, pre_activation = (
            x.new_empty(0, problem.num_up),
            None if problem.pre_format is None else problem.new_pre_activation(),
        )
        if problem.num_rows > 0:
            grouped_x, _ = gather(layer)
            product = _times(layer, grouped_x, inputs.up_weight.mT)
            del grouped_x
            product_y = _times(layer, activate(layer, product, pre_activation), inputs.down_weight.mT)
            scatter(layer, product_y, y, inputs.down_bias, inputs.routing_weights)
    kept = pre_activation if problem.pre_format is not None else product if problem.save else None
    return sum_of_choices(y, problem.top_k), kept, layer.tensors["permutation"]


def backward(
    problem: Problem, grad_y: Tensor, inputs: Inputs, deal: Deal, pre_activation: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """See `kernels/moe_ffn.py`."""
    x, up_weight, up_bias, down_weight, down_bias, _ = inputs
    layer = Layer(problem, inputs, deal)
    layer.kept(_check)
    if problem.num_rows == 0 or not any(needed):
        return problem.zero_gradients(inputs, needed)
    need_x, need_up_weight, need_up_bias, need_down_weight, need_down_bias, need_routing = needed
    need_pre = need_x or need_up_weight or need_up_bias or need_down_weight or need_routing
    is_computed_again = need_pre and pre_activation is None
    grad_x = grad_up_weight = grad_down_weight = grad_routing = partial_up = partial_routing = None
    with on_device(x), _as_they_are(x):
        grad_y = aligned(grad_y.contiguous())
        partial_down = sums(layer, down_bias) if need_down_bias else None
        grouped_x, grouped_grad_y = gather(layer, need_up_weight or is_computed_again, grad_y, partial_down)
        if need_pre:
            if pre_activation is None:
                pre_activation = _times(layer, grouped_x, up_weight.mT)
            partial_up = sums(layer, up_bias) if need_up_bias else None
            if need_routing:
                pieces = ceil_div(problem.d_ff, layer.kept(rows_tile, problem.d_ff).columns)
                partial_routing = torch.empty(pieces, problem.num_rows, dtype=torch.float32, device=x.device)
            grad_hidden = _times(layer, grouped_grad_y, down_weight)
            hidden = torch.empty_like(grad_hidden) if need_down_weight else None
            product = aligned(pre_activation)
            grad_pre = activate_backward(layer, grad_hidden, product, hidden, partial_up, partial_routing)
            del grad_hidden  # unless it is grad_pre
        if need_down_weight and hidden is not None:
            grad_down_weight = _by_expert(layer, grouped_grad_y, hidden)
        if need_up_weight:
            grad_up_weight = _by_expert(layer, grad_pre, grouped_x)
        if need_x:
            grad_x = x.new_empty(problem.num_rows, problem.d_model)
            scatter(layer, _times(layer, grad_pre, up_weight), grad_x)
            grad_x = sum_of_choices(grad_x, problem.top_k)
        grad_up_bias, grad_down_bias = _bias_gradients(layer, partial_up, partial_down)
        if partial_routing is not None:
            permutation, offsets = layer.tensors["permutation"], deal.expert_offsets
            by_row = partial_routing.sum(0)
            grad_routing = grad_of_routing_weights(by_row, problem, grad_y, down_bias, permutation, offsets)
    return problem.gradients((grad_x, grad_up_weight, grad_up_bias, grad_down_weight, grad_down_bias, grad_routing))


def _check(layer: Layer) -> bool:
    problem = layer.problem
    check_sizes(problem)
    if not problem.is_given:
        return True
    # What PyTorch's grouped product needs. On older GPUs it would read the offsets on the host.
    is_cuda = problem.device.type == "cuda"
    per_16_bytes = 16 // problem.dtype.itemsize
    is_supported = problem.dtype == torch.bfloat16 or not is_cuda
    if not is_supported or problem.d_model % per_16_bytes or problem.d_ff % per_16_bytes or problem.num_experts > 1023:
        raise ValueError(
            "backend='cublas' needs bfloat16, sizes that 8 divides and fewer than 1,024 experts where the partition is "
            f"given, got {problem.dtype}, d_model {problem.d_model}, d_ff {problem.d_ff} and {problem.num_experts} "
            "experts: use backend='triton'"
        )
    if is_cuda and torch.cuda.get_device_capability(problem.device) < (9, 0):
        raise ValueError("backend='cublas' needs compute capability 9.0 where the partition is given: use 'triton'")
    return True


def _as_they_are(x: Tensor) -> AbstractContextManager[object]:
    """In which autocast leaves products alone: a backward may be called within it, and its forward not."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def rows_tile(layer: Layer, num_columns: int) -> RowsTile:
    """The one that leaves the fewest columns empty."""
    tiles = ROWS_TILES if layer.is_aligned else (UNALIGNED_ROWS_TILE,)
    tile = min(tiles, key=lambda tile: ceil_div(num_columns, tile.columns) * tile.columns)
    return replace(tile, step=tile.step // 2) if layer.problem.gated else tile  # twice as much for each


# --- passes over rows ---


def gather(
    layer: Layer, need_x: bool = True, grad_y: Tensor | None = None, partial_down: Tensor | None = None
) -> tuple[Any, Any]:
    """x, if needed, and grad_y by slot `[slots, D]`, or None; deals the tokens, unless that was done."""
    problem, x = layer.problem, layer.tensors["x"] if need_x else None
    shape = (problem.num_kept, problem.d_model)
    grouped_x, grouped_grad_y = (None if t is None else t.new_empty(shape) for t in (x, grad_y))
    _launch(
        layer,
        rows.gather_kernel,
        problem.d_model,
        x=x,
        grad_y=grad_y,
        grouped_x=grouped_x,
        grouped_grad_y=grouped_grad_y,
        partial_down=partial_down,
    )
    return grouped_x, grouped_grad_y


def activate(layer: Layer, product: Tensor, pre_activation: Tensor | None) -> Tensor:
    """hidden `[slots, F]`; fills pre_activation, which is encoded, unless it is None."""
    hidden = product.new_empty(len(product), layer.problem.d_ff)
    _launch(
        layer,
        rows.activate_kernel,
        layer.problem.d_ff,
        product=product,
        hidden=hidden,
        pre_activation=pre_activation,
    )
    return hidden


def activate_backward(
    layer: Layer,
    grad_hidden: Tensor,
    product: Tensor,
    hidden: Tensor | None,
    partial_up: Tensor | None,
    partial_routing: Tensor | None,
) -> Tensor:
    """grad_pre `[slots, F or 2F]`, which not gated is grad_hidden's memory; fills the others that are not None."""
    shape = len(grad_hidden), layer.problem.num_up
    grad_pre = grad_hidden.new_empty(shape) if layer.problem.gated else grad_hidden
    _launch(
        layer,
        rows.activate_backward_kernel,
        layer.problem.d_ff,
        grad_hidden=grad_hidden,
        product=product,
        grad_pre=grad_pre,
        hidden=hidden,
        partial_up=partial_up,
        partial_routing=partial_routing,
    )
    return grad_pre


def scatter(
    layer: Layer, product: Tensor, out: Tensor, bias: Tensor | None = None, routing_weights: Tensor | None = None
) -> None:
    """out[choice] = (product + bias) · routing weight."""
    operands = {"product": product, "out": out, "bias": bias, "routing_weights": routing_weights}
    _launch(layer, rows.scatter_kernel, layer.problem.d_model, **operands)


def sums(layer: Layer, bias: Tensor | None) -> Tensor | None:
    """Memory for a bias's gradient summed up over row blocks, float32."""
    if bias is None:
        return None
    shape = (layer.num_blocks(ROWS), bias.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=bias.device)


def _bias_gradients(layer: Layer, partial_up: Tensor | None, partial_down: Tensor | None) -> list[Tensor | None]:
    """From the sums over row blocks, each None if not needed."""
    biases = (layer.tensors["up_bias"], layer.tensors["down_bias"])
    grads = [
        None if partial is None else torch.empty_like(bias)
        for bias, partial in zip(biases, (partial_up, partial_down), strict=True)
    ]
    if partial_up is not None or partial_down is not None:
        results = dict(zip(("grad_up_bias", "grad_down_bias"), grads, strict=True))
        launch = layer.kept(_sums, *(grad is not None for grad in grads))
        launch(layer.tensors, groups=layer.groups(ROWS), partial_up=partial_up, partial_down=partial_down, **results)
    return grads


def _sums(layer: Layer, need_up: bool, need_down: bool) -> Launch:
    problem, tile = layer.problem, ROWS_TILES[0]
    up_tiles, down_tiles = (ceil_div(width, tile.columns) for width in (problem.num_up, problem.d_model))
    num_programs = problem.num_experts * (need_up * up_tiles + need_down * down_tiles)
    return Launch(rows.sums_kernel, num_programs, {**layer.numbers(ROWS), **tile.constants}, tile, ROWS)


def _launch(layer: Layer, kernel: Any, num_columns: int, **tensors: Tensor | None) -> None:
    """A kernel on all row blocks and column tiles."""
    launch = layer.kept(_pass, kernel, num_columns, *(tensor is None for tensor in tensors.values()))
    launch(layer.tensors, groups=layer.groups(ROWS), **tensors)


def _pass(layer: Layer, kernel: Any, num_columns: int, *is_none: bool) -> Launch:
    """`is_none`: of tensors that may be; a kernel is compiled for some."""
    tile = rows_tile(layer, num_columns)
    num_programs = layer.num_blocks(ROWS) * ceil_div(num_columns, tile.columns)
    return Launch(kernel, num_programs, {**layer.numbers(ROWS), **tile.constants}, tile, ROWS)


# --- products ---


def _times(layer: Layer, a: Tensor, b: Tensor) -> Tensor:
    """a[slots of e] @ b[e]: `[slots, K]`, `[E, K, N]` → `[slots, N]`."""
    if not layer.problem.is_given:
        return torch.bmm(a.view(len(b), -1, a.shape[1]), b).flatten(0, 1)
    return F.grouped_mm(a, b, offs=_ends(layer))


def _by_expert(layer: Layer, a: Tensor, b: Tensor) -> Tensor:
    """aᵀ @ b over an expert's slots: `[slots, M]`, `[slots, N]` → `[E, M, N]`."""
    if not layer.problem.is_given:
        a, b = (t.view(layer.problem.num_experts, -1, t.shape[1]) for t in (a, b))
        return torch.bmm(a.mT, b)
    ends = _ends(layer)
    product = F.grouped_mm(a.mT, b, offs=ends)
    if product.is_cuda and torch.cuda.get_device_capability(product.device)[0] >= 10:
        # What belongs to an expert without rows is left as it was (pytorch/pytorch#172439).
        product.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)
    return product


def _ends(layer: Layer) -> Tensor:
    """Of the experts' rows, int32 `[E]`: they rise to R, whatever offsets were given."""
    groups = layer.groups(ROWS)
    assert groups is not None
    return groups[1 : layer.problem.num_experts + 1].clone()  # which begins at 16 bytes
