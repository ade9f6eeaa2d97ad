"""The layer by a library's matrix products, on a GPU cuBLAS', and one pass over memory between any two of them.

What is kept for backward is the up projection's product, without its bias, which is added wherever it is read: neither
costs a pass. It lies in slots, see `rows.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ewa_kernels.kernels.choices import grad_of_routing_weights, sum_of_choices
from ewa_kernels.kernels.triton import rows
from ewa_kernels.kernels.triton.configs import ROWS_TILE, aligned, ceil_div
from ewa_kernels.kernels.triton.launch import Launch
from ewa_kernels.kernels.triton.layer import Layer, check_sizes
from ewa_kernels.kernels.triton.moe_ffn import on_device, prepared
from ewa_kernels.kernels.triton.permutation import radices, seed_arguments
from ewa_kernels.problem import Deal, Inputs, Problem

__all__ = ["backward", "forward", "prepared"]


def forward(problem: Problem, inputs: Inputs, deal: Deal) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `kernels/moe_ffn.py`; pre_activation is by slot, and lacks its bias."""
    x, up_weight, up_bias, down_weight, down_bias, routing_weights = inputs
    layer = _layer(problem, deal, routing_weights)
    with on_device(x):
        permutation, is_dealt = _permutation(layer, deal)
        y = x.new_empty(layer.num_rows, layer.d_model)
        product = x.new_empty(0, problem.num_up)
        if layer.num_rows > 0:
            grouped_x, _ = _gather(layer, permutation, is_dealt, x=x)
            product = _times(layer, grouped_x, up_weight.mT)
            hidden = x.new_empty(len(product), layer.d_ff)
            seed = seed_arguments(layer.seed)
            _launch(layer, rows.activate_kernel, layer.d_ff, product, up_bias, _groups(layer), hidden, *seed)
            _scatter(layer, _times(layer, hidden, down_weight.mT), down_bias, permutation, layer.routing_weights, y)
    return sum_of_choices(y, layer.top_k), product if problem.save else None, permutation


def backward(
    problem: Problem, grad_y: Tensor, inputs: Inputs, deal: Deal, pre_activation: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """See `kernels/moe_ffn.py`."""
    x, up_weight, up_bias, down_weight, down_bias, routing_weights = inputs
    layer = _layer(problem, deal, routing_weights)
    if layer.num_rows == 0 or not any(needed):
        grads = [None if t is None or not need else torch.zeros_like(t) for t, need in zip(inputs, needed, strict=True)]
        return problem.gradients(grads)
    need_x, need_up_weight, need_up_bias, need_down_weight, need_down_bias, need_routing = needed
    need_pre = need_x or need_up_weight or need_up_bias or need_down_weight or need_routing
    is_computed_again = need_pre and pre_activation is None
    grad_x = grad_up_weight = grad_down_weight = grad_routing = partial_up = partial_routing = None
    with on_device(x):
        grad_y, (permutation, is_dealt) = aligned(grad_y.contiguous()), _permutation(layer, deal)
        num_blocks = layer.num_blocks(ROWS_TILE.rows)

        def sums(need: bool, bias: Tensor | None, columns: int) -> Tensor | None:
            return x.new_empty(num_blocks, columns, dtype=torch.float32) if need and bias is not None else None

        partial_down = sums(need_down_bias, down_bias, layer.d_model)
        grouped_x, grouped_grad_y = _gather(
            layer,
            permutation,
            is_dealt,
            x=x if need_up_weight or is_computed_again else None,
            grad_y=grad_y,
            partial_down=partial_down,
        )
        if is_computed_again:
            pre_activation = _times(layer, grouped_x, up_weight.mT)
        if need_pre:
            partial_up = sums(need_up_bias, up_bias, problem.num_up)
            if need_routing:
                partial_routing = x.new_empty(
                    ceil_div(layer.d_ff, ROWS_TILE.columns), layer.num_rows, dtype=torch.float32
                )
            grad_hidden = _times(layer, grouped_grad_y, down_weight)
            hidden = torch.empty_like(grad_hidden)
            grad_pre = x.new_empty(len(hidden), problem.num_up) if layer.gated else grad_hidden
            operands = (grad_hidden, pre_activation, up_bias, permutation, _groups(layer), layer.routing_weights)
            results = (grad_pre, hidden, partial_up, partial_routing)
            seed = seed_arguments(layer.seed)
            _launch(layer, rows.activate_backward_kernel, layer.d_ff, *operands, *results, *seed)
            del grad_hidden
        if need_down_weight:
            grad_down_weight = _by_expert(layer, grouped_grad_y, hidden)
        if need_up_weight:
            grad_up_weight = _by_expert(layer, grad_pre, grouped_x)
        if need_x:
            grad_x = x.new_empty(layer.num_rows, layer.d_model)
            _scatter(layer, _times(layer, grad_pre, up_weight), None, permutation, None, grad_x)
            grad_x = sum_of_choices(grad_x, layer.top_k)
        grad_up_bias, grad_down_bias = _bias_gradients(layer, (up_bias, partial_up), (down_bias, partial_down))
        if partial_routing is not None and routing_weights is not None:
            of_rows = partial_routing.sum(0)
            grad_routing = grad_of_routing_weights(
                of_rows, problem, grad_y, down_bias, permutation, deal.expert_offsets
            )
    return problem.gradients((grad_x, grad_up_weight, grad_up_bias, grad_down_weight, grad_down_bias, grad_routing))


def _layer(problem: Problem, deal: Deal, routing_weights: Tensor | None) -> Layer:
    layer = Layer(problem, deal.seed, deal.expert_offsets, routing_weights)
    layer.kept("checked", lambda: _check(layer))
    return layer


def _check(layer: Layer) -> bool:
    check_sizes(layer.problem)
    per_16_bytes = 16 // layer.dtype.itemsize
    if layer.problem.is_given and (layer.d_model % per_16_bytes or layer.d_ff % per_16_bytes):
        raise ValueError(
            f"backend='cublas' needs d_model and d_ff to be multiples of {per_16_bytes} where the partition is given, "
            f"got {layer.d_model} and {layer.d_ff}: use backend='triton'"
        )
    return True


def _permutation(layer: Layer, deal: Deal) -> tuple[Tensor, bool]:
    """The permutation, and whether it is yet to be dealt."""
    if deal.permutation is not None:
        return aligned(deal.permutation), False
    return torch.empty(layer.num_rows, dtype=torch.int32, device=layer.device), True


# --- passes over rows ---


def _gather(
    layer: Layer,
    permutation: Tensor,
    is_dealt: bool,
    x: Tensor | None = None,
    grad_y: Tensor | None = None,
    partial_down: Tensor | None = None,
) -> tuple[Any, Any]:
    """x and grad_y by slot; see `rows.gather_kernel`."""
    slots = layer.num_rows
    if layer.expert_offsets is None:
        slots = layer.num_experts * ceil_div(layer.num_rows, layer.num_experts)
    grouped = [None if t is None else t.new_empty(slots, layer.d_model) for t in (x, grad_y)]
    operands = (x, grad_y, permutation, _groups(layer), layer.routing_weights)
    seed = seed_arguments(layer.seed if is_dealt else None)
    _launch(layer, rows.gather_kernel, layer.d_model, *operands, *grouped, partial_down, *seed, DEAL=is_dealt)
    return tuple(grouped)


def _scatter(
    layer: Layer,
    product: Tensor,
    bias: Tensor | None,
    permutation: Tensor,
    routing_weights: Tensor | None,
    out: Tensor,
) -> None:
    """See `rows.scatter_kernel`."""
    _launch(layer, rows.scatter_kernel, layer.d_model, product, bias, permutation, _groups(layer), routing_weights, out)


def _bias_gradients(layer: Layer, *biases: tuple[Tensor | None, Tensor | None]) -> list[Tensor | None]:
    """From (bias, sums over row blocks) of both projections; None without sums."""
    grads = [None if bias is None or partial is None else torch.empty_like(bias) for bias, partial in biases]
    columns = [0 if grad is None else ceil_div(grad.shape[1], ROWS_TILE.columns) for grad in grads]
    if any(columns):
        launch = _kept_launch(layer, rows.sums_kernel, *(grad is None for grad in grads))
        partials = [partial for _, partial in biases]
        launch(layer.num_experts * sum(columns), *partials, _groups(layer), *grads)
    return grads


def _groups(layer: Layer) -> Tensor | None:
    return layer.groups(ROWS_TILE.rows)


def _launch(layer: Layer, kernel: Any, num_columns: int, *first: Any, **constants: Any) -> None:
    """A kernel on all row blocks and column tiles."""
    launch = _kept_launch(layer, kernel, *(argument is None for argument in first), **constants)
    launch(layer.num_blocks(ROWS_TILE.rows) * ceil_div(num_columns, ROWS_TILE.columns), *first)


def _kept_launch(layer: Layer, kernel: Any, *is_none: bool, **constants: Any) -> Launch:
    def make() -> Launch:
        radix_a, radix_b, rounds = radices(layer.num_rows)
        arguments = {
            **layer.constants,
            **ROWS_TILE.constants,
            **constants,
            "radix_a": radix_a,
            "radix_b": radix_b,
            "rounds": rounds,
            "num_blocks": layer.num_blocks(ROWS_TILE.rows),
            "ALIGNED": layer.aligned,
        }
        return Launch(kernel, arguments, ROWS_TILE)

    launch: Launch = layer.kept((kernel.fn.__name__, is_none, *constants.values()), make)
    return launch


# --- products ---


def _times(layer: Layer, a: Tensor, b: Tensor) -> Tensor:
    """a[slots of e] @ b[e]: `[slots, K]`, `[E, K, N]` → `[slots, N]`."""
    if layer.expert_offsets is None:
        return torch.bmm(a.view(len(b), -1, a.shape[1]), b).flatten(0, 1)
    return F.grouped_mm(a, b, offs=_ends(layer))


def _by_expert(layer: Layer, a: Tensor, b: Tensor) -> Tensor:
    """aᵀ @ b over an expert's slots: `[slots, M]`, `[slots, N]` → `[E, M, N]`."""
    if layer.expert_offsets is None:
        a, b = (t.view(layer.num_experts, -1, t.shape[1]) for t in (a, b))
        return torch.bmm(a.mT, b)
    ends = _ends(layer)
    product = F.grouped_mm(a.mT, b, offs=ends)
    # On some GPUs what belongs to an expert without rows is left as it was (pytorch/pytorch#172439).
    is_empty = ends.diff(prepend=ends.new_zeros(1)) == 0
    return product.masked_fill_(is_empty[:, None, None], 0)


def _ends(layer: Layer) -> Tensor:
    """Of the experts' rows, int32 `[E]`: they rise to R, whatever offsets were given."""
    groups = _groups(layer)
    assert groups is not None
    return groups[1 : layer.num_experts + 1].clone()  # which begins at 16 bytes
