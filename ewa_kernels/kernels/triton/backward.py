"""The backward: gradients of x, of both weights and of both biases, in three launches or in one."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ewa_kernels.kernels import multiprocessors
from ewa_kernels.kernels.counters import zeroed_counters
from ewa_kernels.kernels.triton.backward_rows import grad_x_kernel, pre_kernel
from ewa_kernels.kernels.triton.backward_single import backward_kernel
from ewa_kernels.kernels.triton.backward_weights import weights_kernel
from ewa_kernels.kernels.triton.configs import Tile, ceil_div
from ewa_kernels.kernels.triton.launch import Launch
from ewa_kernels.kernels.triton.layer import Layer
from ewa_kernels.kernels.triton.permutation import seed_arguments
from ewa_kernels.kernels.triton.queue import FIRST_COUNTER

_MAX_SPLITS = 8
_MIN_SPLIT_STEPS = 8  # steps of a product's loop that a split has at least


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
    grads = (grad_x, grad_up_weight, grad_up_bias, grad_down_weight, grad_down_bias)
    needed = (*(grad is not None for grad in grads), need_routing)
    key = (
        *("backward", single, needed, isinstance(layer.seed, Tensor)),
        *(multiprocessors.left_free(layer.device), layer.precision),
    )
    plan = layer.kept(key, lambda: _Plan(layer, single, *needed))
    scratch = {**_parts(plan.narrow, x.dtype, x.device), **_parts(plan.wide, torch.float32, x.device)}
    seed, seed_low, seed_high = seed_arguments(layer.seed)
    # By name. What no tile asks for is replaced by something of its type, or None.
    tensors: dict[str, Any] = {
        **dict.fromkeys(("grad_pre", "hidden", "grouped_grad_y", "grouped_x"), x),
        **dict.fromkeys(("partial_routing", "partial_up", "partial_down", "partial_weight")),
        **scratch,
        "grad_y": grad_y,
        "x": x,
        "up_weight": up_weight,
        "down_weight": down_weight,
        "pre_activation": pre_activation,
        "permutation": permutation,
        "routing_weights": layer.routing_weights,
        "grad_x": _first_of(grad_x, x),
        "grad_up_weight": _first_of(grad_up_weight, grad_down_weight, up_weight),
        "grad_up_bias": _first_of(grad_up_bias, up_weight),
        "grad_down_weight": _first_of(grad_down_weight, grad_up_weight, up_weight),
        "grad_down_bias": _first_of(grad_down_bias, up_weight),
        "seed": seed,
        "seed_low": seed_low,
        "seed_high": seed_high,
    }
    with zeroed_counters(plan.num_counters, x.device) as tensors["counters"]:
        for num_programs, block_m, launch in plan.launches:
            tensors["groups"] = layer.groups(block_m)
            launch(num_programs, *(tensors[name] for name in launch.first))
    if not need_routing:
        return None
    return scratch["partial_routing"][: plan.num_pieces * layer.num_rows].view(-1, layer.num_rows)


class _Plan:
    """What all backwards of a kind of calls have in common that want the same gradients.

    Attributes:
        narrow, wide: elements of scratch memory of x's dtype and of float32, by the names of the kernels' arguments.
        launches: (programs, rows of a row block, launch), one after the other.
        num_pieces: of the routing weights' gradient.
    """

    def __init__(
        self,
        layer: Layer,
        single: bool,
        need_x: bool,
        need_up_weight: bool,
        need_up_bias: bool,
        need_down_weight: bool,
        need_down_bias: bool,
        need_routing: bool,
    ):
        if single:
            pre = weights = last = layer.tile("backward")
        else:
            pre, weights, last = (layer.tile(f"backward {phase}") for phase in ("pre", "weights", "x"))
        num_rows, num_experts, d_model, d_ff = layer.num_rows, layer.num_experts, layer.d_model, layer.d_ff
        num_up, num_blocks = layer.problem.num_up, layer.num_blocks(pre.block_m)

        # --- how many tiles of each kind ---
        need_pre = need_routing or need_x or need_up_weight or need_up_bias or need_down_weight
        need_group = need_up_weight or need_down_weight or need_down_bias
        bias_tiles = num_experts * sum(
            ceil_div(width, weights.block_n)
            for width, need in ((num_up, need_up_bias), (d_model, need_down_bias))
            if need
        )
        down_tiles = num_experts * ceil_div(d_model, weights.block_m) * ceil_div(d_ff, weights.block_n)
        up_tiles = num_experts * ceil_div(num_up, weights.block_m) * ceil_div(d_model, weights.block_n)
        # Tiles of the weights are the longest: split them until there are two for each program. Counted as if all were
        # asked for, and all multiprocessors were there: how a sum is split decides about its last bits.
        steps = ceil_div(num_rows, num_experts * weights.block_k)
        wanted = 2 * layer.programs(weights) // (down_tiles + up_tiles)
        num_splits = max(1, min(wanted, _MAX_SPLITS, steps // _MIN_SPLIT_STEPS))
        self._tiles = {
            "pre": num_blocks * ceil_div(d_ff, pre.block_n) if need_pre else 0,
            "group": num_blocks * ceil_div(d_model, pre.block_n) if need_group else 0,
            "biases": bias_tiles,
            "down": down_tiles * num_splits if need_down_weight else 0,
            "up": up_tiles * num_splits if need_up_weight else 0,
            "x": layer.num_blocks(last.block_m) * ceil_div(d_model, last.block_n) if need_x else 0,
        }

        # --- memory ---
        parts = self._tiles["down"] + self._tiles["up"] if num_splits > 1 else 0
        self.num_counters = FIRST_COUNTER.value + num_experts + parts // num_splits
        self.num_pieces = ceil_div(d_ff, pre.block_n)
        rows = {"grad_pre": num_up * need_pre, "hidden": d_ff * need_pre}
        rows |= {"grouped_grad_y": d_model * need_group, "grouped_x": d_model * need_group}
        self.narrow = {name: _padded(num_rows * columns) for name, columns in rows.items() if columns}
        sums = {
            "partial_routing": self.num_pieces * num_rows * need_routing,
            "partial_up": num_blocks * num_up * need_up_bias,
            "partial_down": num_blocks * d_model * need_down_bias,
            "partial_weight": parts * weights.block_m * weights.block_n,
        }
        self.wide = {name: _padded(size) for name, size in sums.items() if size}

        # --- launches ---
        self._layer = layer
        # ptxas would stop at 128 registers, for more programs at a time than there are, and spill (float16, sm_86).
        self._options = {} if single or layer.aligned else {"maxnreg": 255}
        self._constants = {
            **layer.constants,
            "num_blocks": num_blocks,
            "num_splits": num_splits,
            "ALIGNED": layer.aligned,
            "AHEAD": pre.per_multiprocessor == 1 and not layer.tight,
            "ROWS": pre.block_m,
        }
        self.launches: list[tuple[int, int, Launch]] = []
        if single:
            self._add(backward_kernel, pre, pre, *self._tiles)
        else:
            self._add(pre_kernel, pre, pre, "pre", "group")
            self._add(weights_kernel, weights, pre, "biases", "down", "up")
            self._add(grad_x_kernel, last, last, "x", num_blocks=layer.num_blocks(last.block_m))
        del self._layer  # it has tensors of one call

    def _add(self, kernel: Any, tile: Tile, rows: Tile, *kinds: str, **others: int) -> None:
        """A kernel on all tiles of these kinds, unless there are none; `rows` has its row blocks."""
        layer, ends = self._layer, list(itertools.accumulate(self._tiles[kind] for kind in kinds))
        if ends[-1] == 0:
            return
        others |= zip((f"end_{kind}" for kind in kinds), ends, strict=True)
        even_k = layer.d_model % tile.block_k == 0 and layer.d_ff % tile.block_k == 0
        arguments = {**self._constants, **others, "EVEN_K": even_k}
        self.launches.append(
            (*layer.grid(ends[-1], tile), rows.block_m, Launch(kernel, arguments, tile, **self._options))
        )


def _parts(sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Memory by these names, in one allocation."""
    memory = torch.empty(sum(sizes.values()), dtype=dtype, device=device)
    return dict(zip(sizes, memory.split([*sizes.values()]), strict=True))


def _padded(size: int) -> int:
    """So that what follows begins at 16 bytes."""
    return ceil_div(size, 64) * 64


def _first_of(*tensors: Tensor | None) -> Tensor:
    return next(tensor for tensor in tensors if tensor is not None)
