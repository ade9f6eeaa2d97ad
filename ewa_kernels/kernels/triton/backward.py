"""The backward: gradients of x, of both weights and of both biases, in three launches or in one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...problem import Problem
from .. import forms
from ..counters import give_back, zeroed_counters
from .backward_rows import grad_x_kernel, pre_kernel
from .backward_single import backward_kernel
from .backward_weights import weights_kernel
from .boxes import box_of_rows, box_of_weights
from .configs import BACKWARD_PHASES, RowsTile, Tile, ceil_div
from .launch import Launch
from .layer import Layer
from .queue import FIRST_COUNTER

_MAX_SPLITS = 8
_MIN_SPLIT_STEPS = 8  # steps of a product's loop that a split has at least


def split_is_faster(problem: Problem) -> bool:
    """Whether three launches take less time than one, as far as is known, or have registers for what is encoded."""
    entry = forms.nearest_to(problem)
    return problem.pre_format is not None or (
        entry is not None and entry.fastest("backward", ("single", "split")) == "split"
    )


def launch_backward(
    layer: Layer, grad_y: Tensor, pre_activation: Tensor, grads: Sequence[Tensor | None], need_routing: bool
) -> Tensor | None:
    """Fills those of `grads`, of x and the parameters, that are not None, x's by choice.

    Returns:
        If `need_routing`, the gradient of the routing weights by grouped row, without what the down bias adds to it,
        in pieces to be summed: float32 `[pieces, R]`.
    """
    num_rows, x, up_weight = layer.problem.num_rows, layer.tensors["x"], layer.tensors["up_weight"]
    plan = layer.kept(_plan, *(grad is not None for grad in grads), need_routing)
    scratch = {**_parts(plan.narrow, x.dtype, x.device), **_parts(plan.wide, torch.float32, x.device)}
    grad_x, grad_up_weight, grad_up_bias, grad_down_weight, grad_down_bias = grads
    counters, whose = zeroed_counters(plan.num_counters, x.device)
    # What no tile asks for is replaced by something of its type, or None.
    tensors: dict[str, Any] = {
        **layer.tensors,
        **dict.fromkeys(("grad_pre", "hidden", "grouped_grad_y", "grouped_x"), x),
        **dict.fromkeys(("partial_routing", "partial_up", "partial_down", "partial_weight")),
        **scratch,
        "grad_y": grad_y,
        "pre_activation": pre_activation,
        "grad_x": _first_of(grad_x, x),
        "grad_up_weight": _first_of(grad_up_weight, grad_down_weight, up_weight),
        "grad_up_bias": _first_of(grad_up_bias, up_weight),
        "grad_down_weight": _first_of(grad_down_weight, grad_up_weight, up_weight),
        "grad_down_bias": _first_of(grad_down_bias, up_weight),
    }
    for launch in plan.launches:
        launch(tensors | _boxes(launch, layer.problem, tensors), groups=layer.groups(launch.rows), counters=counters)
    give_back(counters, whose)
    return scratch["partial_routing"][: plan.num_pieces * num_rows].view(-1, num_rows) if need_routing else None


def _boxes(launch: Launch, problem: Problem, tensors: dict[str, Any]) -> dict[str, Any]:
    """Descriptors in place of tensors; see `configs.Tile`."""
    tile = launch.tile
    if isinstance(tile, RowsTile) or not tile.boxes or launch.kernel not in (pre_kernel, grad_x_kernel):
        return {}
    if launch.kernel is pre_kernel:
        return {"down_weight": box_of_weights(tensors["down_weight"], tile, False, False)}
    num_rows, num_up = problem.num_rows, problem.num_up
    grad_pre = tensors["grad_pre"][: num_rows * num_up].view(num_rows, num_up)
    return {
        "up_weight": box_of_weights(tensors["up_weight"], tile, False, False),
        "grad_pre": box_of_rows(grad_pre, tile),
    }


class _Plan(NamedTuple):
    """What all backwards of a kind of calls have in common that want the same gradients.

    Attributes:
        narrow, wide: elements of scratch memory of x's dtype and of float32, by the names of the kernels' arguments.
        launches: one after the other.
        num_pieces: of the routing weights' gradient.
    """

    narrow: dict[str, int]
    wide: dict[str, int]
    num_counters: int
    num_pieces: int
    launches: list[Launch]


def _plan(layer: Layer, *needed: bool) -> _Plan:
    need_x, need_up_weight, need_up_bias, need_down_weight, need_down_bias, need_routing = needed
    problem = layer.problem
    _, _, form = problem.backend.partition("-")
    single = form == "single" or (form != "split" and not split_is_faster(problem))
    phases = ("backward",) * 3 if single else BACKWARD_PHASES
    pre, weights, last = (layer.tile(phase) for phase in phases)
    num_rows, num_experts, d_model, d_ff = problem.num_rows, problem.num_experts, problem.d_model, problem.d_ff
    num_up, num_blocks = problem.num_up, layer.num_blocks(pre.block_m)

    # --- how many tiles of each kind ---
    need_pre = need_routing or need_x or need_up_weight or need_up_bias or need_down_weight
    need_group = need_up_weight or need_down_weight or need_down_bias
    up_bias_tiles = num_experts * ceil_div(num_up, weights.block_n)
    down_bias_tiles = num_experts * ceil_div(d_model, weights.block_n)
    down_tiles = num_experts * ceil_div(d_model, weights.block_m) * ceil_div(d_ff, weights.block_n)
    up_tiles = num_experts * ceil_div(num_up, weights.block_m) * ceil_div(d_model, weights.block_n)
    # Counted as if all were asked for.
    num_splits = splits(layer, weights, down_tiles + up_tiles)
    tiles = {
        "pre": need_pre * num_blocks * ceil_div(d_ff, pre.block_n),
        "group": need_group * num_blocks * ceil_div(d_model, pre.block_n),
        "biases": need_up_bias * up_bias_tiles + need_down_bias * down_bias_tiles,
        "down": need_down_weight * down_tiles * num_splits,
        "up": need_up_weight * up_tiles * num_splits,
        "x": need_x * layer.num_blocks(last.block_m) * ceil_div(d_model, last.block_n),
    }

    # --- memory ---
    parts = tiles["down"] + tiles["up"] if num_splits > 1 else 0
    num_pieces = ceil_div(d_ff, pre.block_n)
    narrow = {
        "grad_pre": need_pre * num_rows * num_up,
        "hidden": need_pre * num_rows * d_ff,
        "grouped_grad_y": need_group * num_rows * d_model,
        "grouped_x": need_group * num_rows * d_model,
    }
    wide = {
        "partial_routing": need_routing * num_pieces * num_rows,
        "partial_up": need_up_bias * num_blocks * num_up,
        "partial_down": need_down_bias * num_blocks * d_model,
        "partial_weight": parts * weights.block_m * weights.block_n,
    }

    # --- launches ---
    # ptxas would stop at 128 registers, for more programs at a time than there are, and spill (float16, sm_86).
    options = {} if single or layer.is_aligned else {"maxnreg": 255}
    is_ahead = pre.per_multiprocessor == 1 and not layer.is_tight

    def launches(kernel: Any, tile: Tile, rows: Tile, *kinds: str) -> list[Launch]:
        """A kernel on all tiles of these kinds, unless there are none; `rows` has its row blocks."""
        ends = list(itertools.accumulate(tiles[kind] for kind in kinds))
        arguments = {f"end_{kind}": end for kind, end in zip(kinds, ends, strict=True)}
        arguments |= {"num_splits": num_splits, "AHEAD": is_ahead}
        return [layer.launch(kernel, ends[-1], tile, rows.block_m, arguments, **options)] if ends[-1] > 0 else []

    if single:
        all_launches = launches(backward_kernel, pre, pre, *tiles)
    else:
        all_launches = [
            *launches(pre_kernel, pre, pre, "pre", "group"),
            *launches(weights_kernel, weights, pre, "biases", "down", "up"),
            *launches(grad_x_kernel, last, last, "x"),
        ]
    num_counters = FIRST_COUNTER.value + num_experts + parts // num_splits
    return _Plan(_padded(narrow), _padded(wide), num_counters, num_pieces, all_launches)


def splits(layer: Layer, tile: Tile, num_tiles: int) -> int:
    """Into how many parts of an expert's rows the sum of a weight's gradient is cut.

    These tiles are the longest: they are split until there are two for each program, all multiprocessors being there:
    how a sum is split decides about its last bits.
    """
    steps = ceil_div(layer.problem.num_rows, layer.problem.num_experts * tile.block_k)
    wanted = 2 * layer.programs(tile) // num_tiles
    return max(1, min(wanted, _MAX_SPLITS, steps // _MIN_SPLIT_STEPS))


def _parts(sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Memory by these names, in one allocation."""
    memory = torch.empty(sum(sizes.values()), dtype=dtype, device=device)
    return dict(zip(sizes, memory.split([*sizes.values()]), strict=True))


def _padded(sizes: dict[str, int]) -> dict[str, int]:
    """Those that are not 0, so that what follows each begins at 16 bytes."""
    return {name: ceil_div(size, 64) * 64 for name, size in sizes.items() if size > 0}


def _first_of(*tensors: Tensor | None) -> Tensor:
    return next(tensor for tensor in tensors if tensor is not None)
