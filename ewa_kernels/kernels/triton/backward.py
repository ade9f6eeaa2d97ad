"""The backward: gradients of x, of both weights and of both biases, in three launches or in one."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ewa_kernels.kernels.counters import zeroed_counters
from ewa_kernels.kernels.triton.backward_rows import grad_x_kernel, pre_kernel
from ewa_kernels.kernels.triton.backward_single import backward_kernel
from ewa_kernels.kernels.triton.backward_weights import weights_kernel
from ewa_kernels.kernels.triton.configs import Tile, ceil_div
from ewa_kernels.kernels.triton.layer import Layer
from ewa_kernels.kernels.triton.queue import FIRST_COUNTER

_MAX_SPLITS = 8
_MIN_SPLIT_STEPS = 8  # steps of a product's loop that a split has at least
# What each kernel takes of all that there is in a backward.
_SINGLE, _PRE, _WEIGHTS, _X = (
    frozenset(kernel.arg_names) for kernel in (backward_kernel, pre_kernel, weights_kernel, grad_x_kernel)
)


def split_is_faster(layer: Layer) -> bool:
    """Whether three launches take less time than one, as measured on an H200 (benchmarks/results/nvidia-h200.json).

    Gated, D = 1,536: 2.94 ms in place of 3.23. Not gated, no more than the spread: D = 1,024, 4.07 and 4.18;
    D = 768, 2.73 and 2.77; D = 384, 1.35 and 1.32; D = 96, 3.15 and 3.05.
    """
    return layer.gated and layer.d_model >= 1024


def launch_backward(
    layer: Layer,
    grad_y: Tensor,
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    pre_activation: Tensor,
    permutation: Tensor,
    grad_x: Tensor | None,
    grad_up_weight: Tensor | None,
    grad_up_bias: Tensor | None,
    grad_down_weight: Tensor | None,
    grad_down_bias: Tensor | None,
    *,
    need_routing: bool,
    single: bool,
) -> Tensor | None:
    """Fills the gradients that are not None, x's by choice; in one launch if `single`, else in three.

    Returns:
        If `need_routing`, the gradient of the routing weights by grouped row, without what the down bias adds to it,
        in pieces to be summed: float32 `[pieces, R]`.
    """
    if single:
        pre = weights = last = layer.tile("backward")
    else:
        pre, weights, last = (layer.tile(f"backward {phase}") for phase in ("pre", "weights", "x"))
    num_rows, num_experts, d_model, d_ff = layer.num_rows, layer.num_experts, layer.d_model, layer.d_ff
    num_up = up_weight.shape[1]
    num_blocks = layer.num_blocks(pre.block_m)

    # --- how many tiles of each kind ---
    need_pre = need_routing or any(
        grad is not None for grad in (grad_x, grad_up_weight, grad_up_bias, grad_down_weight)
    )
    need_group = any(grad is not None for grad in (grad_up_weight, grad_down_weight, grad_down_bias))
    pre_tiles = num_blocks * ceil_div(d_ff, pre.block_n)
    group_tiles = num_blocks * ceil_div(d_model, pre.block_n)
    bias_tiles = num_experts * sum(
        ceil_div(width, weights.block_n)
        for width, grad in ((num_up, grad_up_bias), (d_model, grad_down_bias))
        if grad is not None
    )
    down_tiles = num_experts * ceil_div(d_model, weights.block_m) * ceil_div(d_ff, weights.block_n)
    up_tiles = num_experts * ceil_div(num_up, weights.block_m) * ceil_div(d_model, weights.block_n)
    # Tiles of the weights are the longest: split them until there are two for each program. Counted as if all were
    # asked for, and all multiprocessors were there: how a sum is split decides about its last bits.
    steps = ceil_div(num_rows, num_experts * weights.block_k)
    wanted = 2 * layer.programs(weights) // (down_tiles + up_tiles)
    num_splits = max(1, min(wanted, _MAX_SPLITS, steps // _MIN_SPLIT_STEPS))
    tiles = {
        "pre": pre_tiles if need_pre else 0,
        "group": group_tiles if need_group else 0,
        "biases": bias_tiles,
        "down": down_tiles * num_splits if grad_down_weight is not None else 0,
        "up": up_tiles * num_splits if grad_up_weight is not None else 0,
        "x": layer.num_blocks(last.block_m) * ceil_div(d_model, last.block_n) if grad_x is not None else 0,
    }

    # --- what the kernels take, by name; what no tile asks for is replaced by something of its type ---
    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    partial_routing = scratch(ceil_div(d_ff, pre.block_n), num_rows) if need_routing else None
    partial_weight, num_counters = None, FIRST_COUNTER.value + num_experts
    if num_splits > 1:
        parts = tiles["down"] + tiles["up"]
        partial_weight = scratch(parts, weights.block_m, weights.block_n)
        num_counters += parts // num_splits
    arguments = {
        **layer.arguments,
        "grad_y": grad_y,
        "x": x,
        "up_weight": up_weight,
        "down_weight": down_weight,
        "pre_activation": pre_activation,
        "permutation": permutation,
        "groups": layer.groups(pre.block_m),
        "grad_pre": scratch(num_rows, num_up, dtype=x.dtype) if need_pre else x,
        "hidden": scratch(num_rows, d_ff, dtype=x.dtype) if need_pre else x,
        "grouped_grad_y": scratch(num_rows, d_model, dtype=x.dtype) if need_group else x,
        "grouped_x": scratch(num_rows, d_model, dtype=x.dtype) if need_group else x,
        "partial_routing": partial_routing,
        "partial_up": None if grad_up_bias is None else scratch(num_blocks, num_up),
        "partial_down": None if grad_down_bias is None else scratch(num_blocks, d_model),
        "partial_weight": partial_weight,
        "grad_x": _first_of(grad_x, x),
        "grad_up_weight": _first_of(grad_up_weight, grad_down_weight, up_weight),
        "grad_up_bias": _first_of(grad_up_bias, up_weight),
        "grad_down_weight": _first_of(grad_down_weight, grad_up_weight, up_weight),
        "grad_down_bias": _first_of(grad_down_bias, up_weight),
        "num_blocks": num_blocks,
        "num_splits": num_splits,
        "ALIGNED": layer.aligned,
        "AHEAD": pre.per_multiprocessor == 1 and not layer.tight,
        "ROWS": pre.block_m,
    }

    def launch(kernel: Any, takes: frozenset[str], tile: Tile, *kinds: str, **others: Any) -> None:
        """A kernel on all tiles of these kinds, unless there are none; `others`: arguments that are its own."""
        ends = list(itertools.accumulate(tiles[kind] for kind in kinds))
        if ends[-1] > 0:
            others.update(zip((f"end_{kind}" for kind in kinds), ends, strict=True))
            others["EVEN_K"] = d_model % tile.block_k == 0 and d_ff % tile.block_k == 0
            taken = {name: value for name, value in {**arguments, **others}.items() if name in takes}
            options = tile.launch_options()
            if not (single or layer.aligned):
                # ptxas would stop at 128, for more programs at a time than there are, and spill (float16, sm_86).
                options.setdefault("maxnreg", 255)
            kernel[layer.grid(ends[-1], tile)](**taken, **options)

    with zeroed_counters(num_counters, x.device) as counters:
        arguments["counters"] = counters
        if single:
            launch(backward_kernel, _SINGLE, pre, *tiles)
        else:
            launch(pre_kernel, _PRE, pre, "pre", "group")
            launch(weights_kernel, _WEIGHTS, weights, "biases", "down", "up")
            x_blocks = {"groups": layer.groups(last.block_m), "num_blocks": layer.num_blocks(last.block_m)}
            launch(grad_x_kernel, _X, last, "x", **x_blocks)
    return partial_routing


def _first_of(*tensors: Tensor | None) -> Tensor:
    return next(tensor for tensor in tensors if tensor is not None)
