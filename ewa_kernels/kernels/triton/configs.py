"""Tile tables, one per architecture: made offline, looked up at run time, never searched.

`python -m ewa_kernels.aot` compiles every entry and reports registers, spills and tensor-core use.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

# Asserts in kernels: one that fails stops the kernel with its message, and the process must begin anew. Not those of
# Triton's own against overflow: hashes wrap around on purpose.
DEBUG = os.environ.get("EWA_KERNELS_DEBUG", "0") not in ("", "0")
ASSERTS = {"debug": DEBUG, "sanitize_overflow": False}


def ceil_div(a: int, b: int) -> int:
    """⌈a/b⌉; Triton's own takes microseconds on the host."""
    return -(-a // b)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that begins at 16 bytes: for any other address Triton compiles a kernel anew, which loads
    element by element and spills registers."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@dataclass(frozen=True)
class Tile:
    """Sizes of the tiles of a kernel, and how Triton compiles it.

    Attributes:
        block_m, block_n, block_k: rows, columns and depth of a tile's matrix product; powers of two, at least 16.
        parts: the accumulator is stored in so many pieces, one after the other, to save registers.
        num_warps, num_stages: as Triton understands them.
        per_multiprocessor: programs that run on one at once, among which its registers are divided.
        early: whether a program draws its next ticket before it works on the one it has, so as not to wait for it.
        backoff: whether a program that waits for another reads the counter more seldom.
        flat: whether the loop over tiles and that of their products are one, so that a tile's first loads run while
            the one before is stored. For "forward up", "forward down" and "backward x".
        boxes: whether weights, and rows that lie side by side, are loaded by the tensor memory accelerator: Hopper or
            newer, and rows that begin at multiples of 16 bytes. For all phases but "backward weights".

    The last four were never measured on a GPU: no table has one, but `CANDIDATES`.
    """

    block_m: int
    block_n: int
    block_k: int
    parts: int
    num_warps: int
    num_stages: int
    per_multiprocessor: int = 1
    early: bool = False
    backoff: bool = False
    flat: bool = False
    boxes: bool = False

    def __post_init__(self) -> None:
        sizes = (self.block_m, self.block_n, self.block_k, self.parts, self.num_warps)
        assert all(size > 0 and size & (size - 1) == 0 for size in sizes), f"{self}: not all powers of two"
        assert min(sizes[:3]) >= 16, f"{self}: a side below 16"

    def __str__(self) -> str:
        words = [f"{self.block_m}x{self.block_n}x{self.block_k}", f"{self.parts} parts", f"{self.num_warps} warps"]
        words += [f"{self.num_stages} stages"] + [f"{self.per_multiprocessor} at once"] * (self.per_multiprocessor > 1)
        return ", ".join(words + [name for name in ("early", "backoff", "flat", "boxes") if getattr(self, name)])

    def launch_options(self) -> dict[str, int | bool]:
        """Keyword arguments of a kernel launch."""
        registers = 2**16 // (32 * self.num_warps * self.per_multiprocessor)
        return {
            **({"maxnreg": registers} if registers < 255 else {}),
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "PARTS": self.parts,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # Triton's default changes with its version
            **ASSERTS,
        }


@dataclass(frozen=True)
class RowsTile:
    """What a program has of a pass over rows, and how Triton compiles it.

    Attributes:
        columns: of a program.
        step: rows at a time.
    """

    columns: int
    step: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.step} rows at a time, {self.columns} columns, {self.num_warps} warps"

    @property
    def constants(self) -> dict[str, int]:
        """Arguments of the kernels."""
        return {"COLUMNS": self.columns, "STEP": self.step}

    def launch_options(self) -> dict[str, int | bool]:
        """Keyword arguments of a kernel launch."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True, **ASSERTS}


# {kernel: its tiles, best first}. If 8 does not divide D and F, those under "… unaligned"; with dropout, routing
# weights or, in the forward, sizes that 64 does not divide, all of which take registers, those under "… tight"; if
# there are any. Of several, `choose` takes the one that leaves fewest of its cells empty: for small D that of two
# programs a multiprocessor, one of which works while the other waits. For "onchip", block_n columns of hidden are
# worked on at a time, and block_k is the largest D. On Hopper they were chosen by measurement, as far as they spill no
# registers: see benchmarks/NOTES.md.
Table = dict[str, tuple[Tile, ...]]
FORWARD_PHASES = ("forward up", "forward down")
BACKWARD_PHASES = ("backward pre", "backward weights", "backward x")
PHASES = (*FORWARD_PHASES, *BACKWARD_PHASES)

_UNALIGNED: Table = {  # each element is loaded by itself, into registers
    "forward unaligned": (Tile(64, 64, 32, 2, 8, 2),),
    "backward unaligned": (Tile(64, 64, 32, 2, 8, 2),),
    "onchip unaligned": (),
}
_HOPPER: Table = {
    "forward": (Tile(128, 256, 64, 4, 8, 3), Tile(128, 128, 64, 4, 4, 3, 2)),
    "forward tight": (Tile(128, 256, 64, 8, 8, 3), Tile(128, 128, 64, 8, 4, 3, 2)),
    "backward": (Tile(128, 256, 64, 16, 8, 3), Tile(128, 128, 64, 8, 4, 3, 2)),
    "backward tight": (Tile(128, 256, 64, 16, 8, 3), Tile(128, 128, 64, 16, 4, 3, 2)),
    **dict.fromkeys(BACKWARD_PHASES[1:], (Tile(128, 256, 64, 8, 8, 3), Tile(128, 128, 64, 8, 4, 3, 2))),
    "forward coded": (Tile(128, 128, 64, 4, 8, 3),),
    "backward coded": (Tile(128, 128, 64, 4, 8, 3),),
    "onchip": (Tile(128, 64, 128, 2, 8, 2),),
    "onchip tight": (Tile(128, 32, 128, 2, 8, 2),),
    **_UNALIGNED,
}
_BLACKWELL: Table = {
    "forward": (Tile(128, 128, 64, 2, 8, 3),),
    "forward up": (Tile(128, 128, 64, 4, 8, 3),),
    "backward": (Tile(128, 128, 64, 4, 8, 3),),
    "onchip": (Tile(64, 32, 128, 2, 8, 2),),
    **_UNALIGNED,
}
_AMPERE: Table = {  # and all others
    "forward": (Tile(128, 128, 32, 2, 8, 4),),
    "backward": (Tile(128, 128, 32, 4, 8, 4),),
    "onchip": (Tile(128, 32, 128, 2, 8, 2),),
    **_UNALIGNED,
}
_BLACKWELL_120: Table = {**_AMPERE, "onchip": _BLACKWELL["onchip"], "onchip tight": ()}
_TF32: Table = {
    "forward": (Tile(128, 128, 32, 4, 8, 2),),
    "backward": (Tile(128, 64, 32, 4, 8, 2),),
    "backward unaligned": (Tile(64, 64, 32, 4, 8, 2),),
    "onchip": (),
}
_FLOAT32: Table = {
    "forward": (Tile(64, 64, 32, 2, 8, 2),),
    "backward": (Tile(64, 64, 16, 2, 8, 2),),
    "onchip": (),
}
# In the interpreter an operation on a tile costs the same whatever its size; small tiles are many tiles.
INTERPRETER: Table = {
    "forward": (Tile(32, 32, 16, 2, 4, 1),),
    "backward": (Tile(32, 32, 16, 2, 4, 1),),
    "onchip": (Tile(32, 32, 64, 2, 4, 1),),
}
# Each launch of several has the tiles of that in one, where it has none of its own.
for _tiles in (_HOPPER, _BLACKWELL, _AMPERE, _BLACKWELL_120, _TF32, _FLOAT32, INTERPRETER):
    for _phase in PHASES:
        _whole, _, _ = _phase.partition(" ")
        for _variant in (" unaligned",) if _phase in _tiles else ("", " tight", " unaligned"):
            if f"{_whole}{_variant}" in _tiles:
                _tiles[f"{_phase}{_variant}"] = _tiles[f"{_whole}{_variant}"]

# Switches that wait for a measurement (`benchmarks.tiles`), with tiles that spill nothing on Hopper in bfloat16. What
# is missing does: 128×256 with both loops made one for "forward up", plain, and without boxes for "forward down".
_SMALL = Tile(128, 128, 64, 8, 4, 3, 2, flat=True, boxes=True)
CANDIDATES: Table = {
    **{
        kernel: tuple(
            replace(_HOPPER[kernel][0], early=early, backoff=backoff)
            for early, backoff in ((True, False), (False, True), (True, True))
        )
        for kernel in ("forward", "backward")
    },
    "forward up": (
        Tile(128, 256, 64, 4, 8, 3, boxes=True),
        Tile(128, 128, 64, 4, 8, 4, flat=True),
        Tile(128, 128, 64, 4, 8, 4, flat=True, boxes=True),
        _SMALL,
    ),
    "forward down": (
        Tile(128, 256, 64, 4, 8, 3, boxes=True),
        Tile(128, 256, 64, 8, 8, 3, flat=True, boxes=True),
        Tile(128, 128, 64, 4, 8, 4, flat=True),
        _SMALL,
    ),
    "backward pre": (Tile(128, 256, 64, 16, 8, 3, boxes=True),),
    "backward x": (
        Tile(128, 256, 64, 8, 8, 3, boxes=True),
        Tile(128, 256, 64, 8, 8, 3, flat=True),
        Tile(128, 256, 64, 8, 8, 3, flat=True, boxes=True),
        _SMALL,
    ),
}

# For passes over rows. Not measured: 16 bytes a thread and load, and enough programs at a time to keep memory busy.
ROWS_TILES = (RowsTile(columns=256, step=16, num_warps=4), RowsTile(columns=128, step=32, num_warps=4))
UNALIGNED_ROWS_TILE = RowsTile(columns=128, step=16, num_warps=4)  # each element is loaded by itself, into registers
ROWS = 128  # of a row block, over which biases' gradients are summed up before they are written
if triton.knobs.runtime.interpret:
    ROWS_TILES = (RowsTile(columns=64, step=8, num_warps=1), RowsTile(columns=32, step=8, num_warps=1))
    UNALIGNED_ROWS_TILE, ROWS = ROWS_TILES[1], 16


def table(capability: int, dtype: torch.dtype, precision: str) -> Table:
    """The tiles for a compute capability (90: 9.0); precision "ieee" or "tf32" matters to float32 only."""
    if dtype == torch.float32:
        return _TF32 if precision == "tf32" else _FLOAT32
    return {9: _HOPPER, 10: _BLACKWELL, 12: _BLACKWELL_120}.get(capability // 10, _AMPERE)


def tiles_of(
    tiles: Table, kernel: str, d_model: int, d_ff: int, is_tight: bool, is_coded: bool = False
) -> tuple[Tile, ...]:
    """A kernel's, best first. `is_tight`: with dropout or routing weights; `is_coded`: it writes or reads what is kept
    in 8 or 4 bits."""
    is_aligned = d_model % 8 == 0 and d_ff % 8 == 0
    if is_coded and is_aligned and (coded := f"{kernel.partition(' ')[0]} coded") in tiles:
        return tiles[coded]
    # A masked loop takes registers too, of which the forward has the fewest left.
    is_tight = is_tight or (kernel.startswith("forward") and (d_model % 64 != 0 or d_ff % 64 != 0))
    variant = "unaligned" if d_model % 8 != 0 or d_ff % 8 != 0 else "tight" if is_tight else ""
    return tiles.get(f"{kernel} {variant}", tiles[kernel])


def choose(tiles: tuple[Tile, ...], num_tokens: int, num_experts: int, widths: tuple[int, ...]) -> Tile:
    """The tile with the least work, empty cells included; `widths`: the columns of the products. Ties to the first."""

    def work(tile: Tile) -> int:
        rows = ceil_div(num_tokens, num_experts * tile.block_m) * tile.block_m
        return rows * sum(ceil_div(width, tile.block_n) * tile.block_n for width in widths)

    return min(tiles, key=work)


def choose_onchip(tiles: tuple[Tile, ...], d_model: int) -> Tile | None:
    """The tile that holds a row of x, as narrow as D allows; None if D is too large for all."""
    width = max(16, 1 << (d_model - 1).bit_length())
    fitting = (tile for tile in tiles if width <= tile.block_k)
    return next((replace(tile, block_k=width) for tile in fitting), None)
