"""What all launches for one call of the layer have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...codec import BLOCK
from ...problem import Deal, Inputs, Problem
from .. import multiprocessors
from . import codec, configs
from .configs import Tile, aligned, ceil_div
from .groups import tabulate
from .launch import Launch
from .permutation import int32_bits, radices, seed_arguments
from .tiles import INTERPRETED

_MAX_ROWS = 2**31 - 1024  # so that a row past the end of a tile is an int32
_MAX_EXPERTS = 2**15  # so that the product of two experts' numbers is one


class Layer:
    """One call: its `Problem`, and what all launches for it take.

    Whoever tries tiles puts a `Table` into `problem.kept["table"]`, in place of that for the device, and into
    `problem.kept["num_programs"]` how many programs work on a launch, in place of as many as run at once.

    Attributes:
        is_dealt: whether the permutation is not given: the forward fills it.
        tensors: inputs, permutation and seed, by the names of the kernels' arguments.
    """

    def __init__(self, problem: Problem, inputs: Inputs, deal: Deal):
        self.problem, self._expert_offsets = problem, deal.expert_offsets
        self._groups: dict[int, Tensor] = {}
        self._left_free = multiprocessors.left_free(problem.device)
        self.is_dealt = deal.permutation is None
        if deal.permutation is None:
            permutation = inputs.x.new_empty(problem.num_rows, dtype=torch.int32)
        else:
            permutation = aligned(deal.permutation)
        seed, low, high = seed_arguments(deal.seed)
        self.tensors: dict[str, Any] = inputs._asdict()
        self.tensors.update(permutation=permutation, seed=seed, seed_low=low, seed_high=high)
        form = problem.pre_format
        self.tensors["tables"] = None if form is None else codec.tables(form, problem.device)
        # What a launch depends on beside the problem.
        self._kind = (self.is_dealt, seed is None, self._left_free, self._precision)

    def kept(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """make(layer, *arguments), made once for all calls of the kind: nothing of it may be a tensor."""
        key = (make, arguments, self._kind)
        found = self.problem.kept.get(key)
        if found is None:
            found = self.problem.kept[key] = make(self, *arguments)
        return found

    def _tiles_of(self, kernel: str) -> tuple[Tile, ...]:
        problem, tiles = self.problem, self.problem.kept.get("table")
        if tiles is None and INTERPRETED:
            tiles = configs.INTERPRETER
        elif tiles is None:
            tiles = configs.table(_capability(problem.device), problem.dtype, self._precision)
        sizes = problem.d_model, problem.d_ff
        return configs.tiles_of(tiles, kernel, *sizes, self.is_tight, self._is_coded(kernel))

    def tile(self, kernel: str) -> Tile:
        """The tile for "forward", "backward" or a phase of one."""
        problem = self.problem
        widths: tuple[int, ...] = (problem.d_ff, problem.d_model)
        if kernel in configs.FORWARD_PHASES:
            widths = (problem.num_up if kernel == "forward up" else problem.d_model,)
        tile = configs.choose(self._tiles_of(kernel), problem.num_rows, problem.num_experts, widths)
        if not self._is_coded(kernel):
            return tile
        # A part of a tile has whole blocks of columns, and no more, for want of registers.
        least = BLOCK * 2 if problem.gated and kernel.startswith("forward") else BLOCK
        block_n = max(tile.block_n, least)
        return replace(tile, block_n=block_n, parts=block_n // least)

    def _is_coded(self, kernel: str) -> bool:
        """Whether it writes or reads what is kept in 8 or 4 bits."""
        return self.problem.pre_format is not None and kernel in ("forward", "forward up", "backward", "backward pre")

    def onchip_tile(self) -> Tile | None:
        """The tile for "onchip", or None if D is too large."""
        return configs.choose_onchip(self._tiles_of("onchip"), self.problem.d_model)

    @property
    def is_tight(self) -> bool:
        """Whether registers are scarce."""
        return self.problem.dropout_p > 0 or self.tensors["routing_weights"] is not None

    @property
    def is_aligned(self) -> bool:
        """Whether rows can be loaded 16 bytes at a time."""
        return self.problem.d_model % 8 == 0 and self.problem.d_ff % 8 == 0

    def num_blocks(self, block_m: int) -> int:
        """Row blocks, empty ones included: how the rows are dealt may be known on the device only."""
        num_rows, num_experts = self.problem.num_rows, self.problem.num_experts
        if self.problem.is_given:
            return num_rows // block_m + num_experts
        return num_experts * ceil_div(ceil_div(num_rows, num_experts), block_m)

    def groups(self, block_m: int) -> Tensor | None:
        """The table of the groups that are given, see `groups.py`; None: equal groups."""
        if self._expert_offsets is None:
            return None
        if block_m not in self._groups:
            num_rows, num_blocks = self.problem.num_rows, self.num_blocks(block_m)
            self._groups[block_m] = tabulate(self._expert_offsets, num_rows, num_blocks, block_m)
        return self._groups[block_m]

    def programs(self, tile: Tile) -> int:
        """As many as run at once on the whole device."""
        count = self.problem.kept.get("num_programs")
        return count or multiprocessors.count(self.problem.device) * tile.per_multiprocessor

    def grid(self, num_tiles: int, tile: Tile) -> int:
        """The number of programs of a persistent launch."""
        return max(1, min(num_tiles, self.programs(tile) - self._left_free * tile.per_multiprocessor))

    def launch(
        self, kernel: Any, num_tiles: int, tile: Tile, rows: int, arguments: dict[str, Any], **options: int
    ) -> Launch:
        """`arguments`: those that not all kernels have in common, and calls of one kind do. For others see `Launch`."""
        problem = self.problem
        even_k = problem.d_model % tile.block_k == 0 and problem.d_ff % tile.block_k == 0
        switches = {"EARLY": tile.early, "BACKOFF": tile.backoff, "FLAT": tile.flat, "BOXES": tile.boxes}
        of_tile = {"EVEN_K": even_k, **switches}
        arguments = {**self.numbers(rows), **of_tile, **arguments}
        return Launch(kernel, self.grid(num_tiles, tile), arguments, tile, rows, **options)

    def numbers(self, rows: int) -> dict[str, Any]:
        """Arguments that kernels have in common, by name; `rows`: of a row block."""
        problem = self.problem
        gelu = "gelu_16bit" if problem.dtype.itemsize == 2 else "gelu"
        radix_a, radix_b, rounds = radices(problem.num_rows)
        threshold, scale = problem.dropout
        form = problem.pre_format
        own = None if form is None else form.codebooks[0]
        return {
            "radix_a": radix_a,
            "radix_b": radix_b,
            "rounds": rounds,
            "threshold": int32_bits(threshold),
            "scale": scale,
            "num_rows": problem.num_rows,
            "num_kept": problem.num_kept,
            "num_experts": problem.num_experts,
            "num_blocks": self.num_blocks(rows),
            "d_model": problem.d_model,
            "d_ff": problem.d_ff,
            "DEAL": self.is_dealt,
            "TOP_K": problem.top_k,
            "ACTIVATION": gelu if problem.activation == "gelu" else problem.activation,
            "GATED": problem.gated,
            "DROPOUT": problem.dropout_p > 0,
            "ALIGNED": self.is_aligned,
            "PRECISION": self._precision,
            "ROWS": rows,
            "BITS": 0 if form is None else form.bits,
            "FIRST": 0 if own is None else own.first_scale,
            "FIXED": 0 if own is None else own.num_fixed,
            "LARGEST": codec.largest_of(problem.dtype),
        }

    @property
    def _precision(self) -> str:
        """How float32 matrix products are computed, as PyTorch's are; others can be in one way only."""
        is_tf32 = self.problem.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        return "tf32" if is_tf32 else "ieee"


def check_sizes(problem: Problem, weight: str = "up_weight") -> None:
    """Raises ValueError if numbers of rows would not fit an int32."""
    # Blocks that do not exist may begin behind all rows, by a block for each expert.
    max_rows = _MAX_ROWS - (256 if problem.is_given else 1) * problem.num_experts
    if problem.num_rows > max_rows:
        raise ValueError(f"x must hold at most {max_rows} tokens for this backend, got {problem.num_rows}")
    if problem.num_experts > _MAX_EXPERTS:
        raise ValueError(
            f"{weight} must hold at most {_MAX_EXPERTS} experts for this backend, got {problem.num_experts}"
        )


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
