"""What all launches for one call of the layer have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ewa_kernels.kernels import multiprocessors
from ewa_kernels.kernels.triton.configs import INTERPRETER, Table, Tile, aligned, ceil_div, choose, choose_onchip, table
from ewa_kernels.kernels.triton.groups import tabulate
from ewa_kernels.kernels.triton.permutation import int32_bits
from ewa_kernels.kernels.triton.tiles import INTERPRETED
from ewa_kernels.problem import Problem

_MAX_ROWS = 2**31 - 1024  # so that a row past the end of a tile is an int32
_MAX_EXPERTS = 2**15  # so that the product of two experts' numbers is one


class Layer:
    """A `Problem`, and the partition, seed and routing weights of one call.

    Attributes:
        seed: an int, int64 with one element on the CPU or on the device, or None where nothing is random.
        expert_offsets: int32 `[E + 1]` on the device, or None: equal groups.
        routing_weights: `[T, k]`, contiguous, on the device, or None: k = 1.
        table: the tiles to choose from; None: those for the device.
        num_programs: how many programs work on a launch; None: as many as run at once.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int | Tensor | None = None,
        expert_offsets: Tensor | None = None,
        routing_weights: Tensor | None = None,
        table: Table | None = None,
        num_programs: int | None = None,
    ):
        self.problem, self.seed, self.expert_offsets = problem, seed, expert_offsets
        self.routing_weights = None if routing_weights is None else aligned(routing_weights.contiguous())
        self.table, self.num_programs = table, num_programs
        self.num_rows, self.num_experts, self.top_k = problem.num_rows, problem.num_experts, problem.top_k
        self.d_model, self.d_ff, self.gated = problem.d_model, problem.d_ff, problem.gated
        self.dtype, self.device = problem.dtype, problem.device
        self._groups: dict[int, Tensor] = {}

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` made of the problem alone the first time, by a key."""
        if self.table is not None or self.num_programs is not None:  # others than the device's
            return make()
        found = self.problem.kept.get(key)
        if found is None:
            found = self.problem.kept[key] = make()
        return found

    def _tiles_of(self, kernel: str) -> tuple[Tile, ...]:
        tiles = self.table
        if tiles is None:
            tiles = INTERPRETER if INTERPRETED else table(_capability(self.device), self.dtype, precision())
        if not self.aligned:
            return tiles.get(f"{kernel} unaligned", tiles[kernel])
        # A masked loop takes registers too, of which the forward has the fewest left.
        is_ragged = self.d_model % 64 != 0 or self.d_ff % 64 != 0
        is_tight = self.tight or (kernel == "forward" and is_ragged)
        return tiles.get(f"{kernel} tight", tiles[kernel]) if is_tight else tiles[kernel]

    def tile(self, kernel: str) -> Tile:
        """The tile for "forward" or "backward"."""
        widths = (self.d_ff, self.d_model)
        key = (kernel, "tile", self.precision)
        return self.kept(key, lambda: choose(self._tiles_of(kernel), self.num_rows, self.num_experts, widths))

    def onchip_tile(self) -> Tile | None:
        """The tile for "onchip", or None if D is too large."""
        return self.kept("onchip tile", lambda: (choose_onchip(self._tiles_of("onchip"), self.d_model),))[0]

    @property
    def tight(self) -> bool:
        """Whether registers are scarce."""
        return self.problem.dropout_p > 0 or self.routing_weights is not None

    @property
    def aligned(self) -> bool:
        """Whether rows can be loaded 16 bytes at a time."""
        return self.d_model % 8 == 0 and self.d_ff % 8 == 0

    def num_blocks(self, block_m: int) -> int:
        """Row blocks, empty ones included: how the rows are dealt may be known on the device only."""
        if self.expert_offsets is not None:
            return self.num_rows // block_m + self.num_experts
        return self.num_experts * ceil_div(ceil_div(self.num_rows, self.num_experts), block_m)

    def groups(self, block_m: int) -> Tensor | None:
        """The table of the groups that are given, see `groups.py`; None: equal groups."""
        if self.expert_offsets is not None and block_m not in self._groups:
            num_blocks = self.num_blocks(block_m)
            self._groups[block_m] = tabulate(self.expert_offsets, self.num_rows, num_blocks, block_m)
        return self._groups.get(block_m)

    def programs(self, tile: Tile) -> int:
        """As many as run at once on the whole device."""
        return self.num_programs or multiprocessors.count(self.device) * tile.per_multiprocessor

    def grid(self, num_tickets: int, tile: Tile) -> tuple[int]:
        """Of a persistent launch."""
        left_free = 0 if self.num_programs else multiprocessors.left_free(self.device) * tile.per_multiprocessor
        return (max(1, min(num_tickets, self.programs(tile) - left_free)),)

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments that the kernels have in common, and that calls of one problem do too."""
        problem, itemsize = self.problem, self.dtype.itemsize
        return {
            "threshold": int32_bits(min(round(problem.dropout_p * 2**32), 2**32 - 1)),
            "scale": 1 / (1 - problem.dropout_p) if problem.dropout_p < 1 else 0.0,
            "num_rows": self.num_rows,
            "num_experts": self.num_experts,
            "d_model": self.d_model,
            "d_ff": self.d_ff,
            "ACTIVATION": "gelu_16bit" if problem.activation == "gelu" and itemsize == 2 else problem.activation,
            "TOP_K": self.top_k,
            "GATED": self.gated,
            "DROPOUT": problem.dropout_p > 0,
            "PRECISION": self.precision,
        }

    @property
    def precision(self) -> str:
        """How float32 matrix products are computed; others can be in one way only."""
        return precision() if self.dtype == torch.float32 else "ieee"


def check_sizes(problem: Problem) -> None:
    """Raises ValueError if numbers of rows would not fit an int32."""
    # Blocks that do not exist may begin behind all rows, by a block for each expert.
    max_rows = _MAX_ROWS - 256 * problem.num_experts if problem.is_given else _MAX_ROWS
    if problem.num_rows > max_rows:
        raise ValueError(f"x must hold at most {max_rows} tokens for this backend, got {problem.num_rows}")
    if problem.num_experts > _MAX_EXPERTS:
        raise ValueError(
            f"up_weight must hold at most {_MAX_EXPERTS} experts for this backend, got {problem.num_experts}"
        )


def precision() -> str:
    """How float32 matrix products are computed: as PyTorch's are."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
