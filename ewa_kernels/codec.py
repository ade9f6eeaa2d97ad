"""How activations are kept in 8 and in 4 bits: the specification, in plain PyTorch, and its tables.

A row of n columns is cut into ⌈n/32⌉ blocks of 32 columns; the last may have fewer, and is filled up with zeros. A
block has a scale M, kept as one byte k, and a code for each column:

- 8 bits: the code is v·(127/M), between −127 and 127, rounded to the nearest whole number, of two to the even one; but
  at least 1 for v > 0, so that the sign that a ReLU asks for is kept. Its value is code·(M/127). M is the smallest that
  is no less than the largest |v|.
- 4 bits: the code is how many of 15 edges are less than t, its value one of 16 levels. Two codebooks have both. The
  symmetric one, all of whose levels are multiples of M, is for blocks whose largest |v| is below the activation's
  threshold; t = v·(1/M). The activation's own, where it is known that the left side of a GELU is nearly flat, has some
  fixed levels; the others are multiples of an M that is no less than the largest v. Above the last fixed edge
  t = max(v·(1/M), 0), else t = v. k says which codebook it is.

Scales are 2^(j/8) for 2⁻⁹ ≤ M ≤ 2⁹, and outside of that four times as large from one to the next, from 2⁻¹⁰¹ to 2¹²⁷.
k = 255: something in the block is infinite or not a number, and all of it is read as NaN. All is computed in float32,
and reading makes one product of an element: its bits are the same everywhere.

Levels and edges were found by `python -m benchmarks.codebooks`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Empty = Callable[[Sequence[int], torch.dtype, torch.device], Tensor]

BLOCK = 32
NOT_A_NUMBER = 255
_FINE = 72  # so many scales on either side of 1 are an eighth of a power of 2 apart
_LOWEST = -118


def _scale(j: int) -> float:
    power = j / 8 if abs(j) <= _FINE else (9 + 2 * (abs(j) - _FINE)) * (1 if j > 0 else -1)
    return float(torch.tensor(2.0 ** min(power, 127), dtype=torch.float64).to(torch.float32))


SCALES = tuple(_scale(j) for j in range(_LOWEST, 132))  # of k = 0, 1, …


class Codebook(NamedTuple):
    """Levels and edges, rising. The first `num_fixed` of either are values, the others multiples of M; these are
    positive where any is fixed.

    Attributes:
        first_scale: the least k of blocks that have this codebook; those of less have the symmetric one.
    """

    first_scale: int
    num_fixed: int
    levels: tuple[float, ...]
    edges: tuple[float, ...]


NEVER = 256


def above(eighths: int) -> int:
    """The least k of blocks whose largest |v| is more than 2^(eighths / 8)."""
    return eighths - _LOWEST + 1


# fmt: off
CODEBOOKS: dict[str, Codebook] = {
    "symmetric": Codebook(
        NEVER, 0,
        (
            -0.9483, -0.7883, -0.6488, -0.5176, -0.3886, -0.2629, -0.1501, -0.0461,
            0.0461, 0.1501, 0.2629, 0.3886, 0.5176, 0.6488, 0.7883, 0.9483,
        ),
        (
            -0.8686, -0.7186, -0.5846, -0.4534, -0.3254, -0.2051, -0.0990, 0.0000,
            0.0990, 0.2051, 0.3254, 0.4534, 0.5846, 0.7186, 0.8686,
        ),
    ),
    "gelu": Codebook(
        above(6), 5,
        (
            -2.6603, -1.1565, -0.7013, -0.3713, -0.0989, 0.0432, 0.1208, 0.2088,
            0.3056, 0.4017, 0.4991, 0.5990, 0.7019, 0.8083, 0.9250, 0.9742,
        ),
        (
            -2.0109, -0.8840, -0.5242, -0.2317, 0.0096, 0.0794, 0.1657, 0.2580,
            0.3544, 0.4514, 0.5494, 0.6508, 0.7547, 0.8660, 0.9488,
        ),
    ),
    "silu": Codebook(
        above(6), 5,
        (
            -2.6910, -1.3066, -0.7782, -0.4320, -0.1531, 0.0313, 0.1176, 0.2088,
            0.3067, 0.4080, 0.5054, 0.6025, 0.7035, 0.8098, 0.9267, 0.9745,
        ),
        (
            -1.7178, -1.0026, -0.5867, -0.2869, -0.0361, 0.0732, 0.1607, 0.2564,
            0.3604, 0.4566, 0.5549, 0.6527, 0.7575, 0.8677, 0.9506,
        ),
    ),
    "quick_gelu": Codebook(
        above(4), 5,
        (
            -2.8234, -1.1804, -0.6540, -0.3481, -0.0927, 0.0441, 0.1228, 0.2088,
            0.3056, 0.4017, 0.4991, 0.5990, 0.7019, 0.8083, 0.9267, 0.9742,
        ),
        (
            -2.0404, -0.8411, -0.4800, -0.2087, 0.0106, 0.0808, 0.1657, 0.2580,
            0.3544, 0.4514, 0.5494, 0.6508, 0.7547, 0.8660, 0.9505,
        ),
    ),
    "relu": Codebook(
        0, 1,
        (
            0.0000, 0.0298, 0.0924, 0.1575, 0.2223, 0.2906, 0.3567, 0.4249,
            0.4920, 0.5599, 0.6270, 0.6958, 0.7676, 0.8447, 0.9316, 0.9758,
        ),
        (
            0.0000, 0.0608, 0.1251, 0.1907, 0.2556, 0.3233, 0.3902, 0.4578,
            0.5253, 0.5932, 0.6617, 0.7315, 0.8059, 0.8883, 0.9538,
        ),
    ),
    "relu2": Codebook(
        0, 1,
        (
            0.0000, 0.0298, 0.0924, 0.1580, 0.2251, 0.2926, 0.3603, 0.4284,
            0.4953, 0.5638, 0.6332, 0.7046, 0.7767, 0.8526, 0.9332, 0.9759,
        ),
        (
            0.0000, 0.0615, 0.1257, 0.1917, 0.2593, 0.3270, 0.3951, 0.4625,
            0.5302, 0.5992, 0.6694, 0.7412, 0.8152, 0.8935, 0.9550,
        ),
    ),
}
# fmt: on


def new_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that is torch's."""
    return torch.empty(shape, dtype=dtype, device=device)


class Format(NamedTuple):
    """Of rows that consist of one part, or of two of as many columns: a gate, and what it multiplies.

    Attributes:
        bits: 8 or 4.
        codebooks: of each part; with 8 bits it does not matter which.
    """

    bits: int
    codebooks: tuple[Codebook, ...]

    def num_bytes(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """Of all codes, which come first, and of the scales behind them."""
        num_blocks = num_rows * len(self.codebooks) * -(-num_columns // (len(self.codebooks) * BLOCK))
        return num_blocks * BLOCK * self.bits // 8, num_blocks

    def new(self, num_rows: int, num_columns: int, device: torch.device, empty: Empty = new_tensor) -> Tensor:
        """Memory for so many encoded rows."""
        return empty((sum(self.num_bytes(num_rows, num_columns)),), torch.uint8, device)


# Of x: what it is made of is not known.
ROWS_8BIT = Format(8, (CODEBOOKS["symmetric"],))


@functools.cache
def format_of(bits: int, activation: str, gated: bool) -> Format:
    """Of pre-activations. A gate's codebook is its activation's, that of what it multiplies the symmetric one."""
    symmetric = CODEBOOKS["symmetric"]
    if activation == "identity":
        return Format(bits, (symmetric,) * (1 + gated))
    own = CODEBOOKS["gelu" if activation == "gelu_tanh" else activation]
    return Format(bits, (own, symmetric) if gated else (own,))


def encode(values: Tensor, form: Format) -> Tensor:
    """values `[R, n]`, floating → uint8, flat: codes `[R, parts, blocks, 32 or 16]` and scales `[R, parts, blocks]`.

    With 4 bits columns j and j + 16 of a block share a byte, whose lower half is j's.
    """
    parts = len(form.codebooks)
    blocks = values.to(torch.float32).unflatten(1, (parts, -1))
    blocks = torch.nn.functional.pad(blocks, (0, -blocks.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK))
    finite = blocks.isfinite().all(-1)
    blocks = blocks.masked_fill(~finite[..., None], 0)
    scale = _number(blocks.abs().amax(-1))
    if form.bits == 8:
        factor = 127 / _scales(blocks.device)
        codes = (blocks * factor[scale][..., None]).clamp(-127, 127).round()
        codes = torch.where(blocks > 0, codes.clamp(min=1), codes).to(torch.int8).view(torch.uint8)
    else:
        columns = []
        for part, codebook in enumerate(form.codebooks):
            is_own = scale[:, part] >= codebook.first_scale
            own_scale = _number(blocks[:, part].amax(-1).clamp(min=0)).clamp(min=codebook.first_scale)
            scale[:, part] = torch.where(is_own, own_scale, scale[:, part])
            inverse = (1 / _scales(blocks.device))[scale[:, part]]
            columns.append(_count_edges(blocks[:, part], inverse[..., None], is_own[..., None], codebook))
        codes = torch.stack(columns, 1).masked_fill(~finite[..., None], 0)
        low, high = codes.unflatten(-1, (2, -1)).unbind(-2)
        codes = low | high << 4
    scale = torch.where(finite, scale, NOT_A_NUMBER).to(torch.uint8)
    return torch.cat((codes.flatten(), scale.flatten()))


def decode(encoded: Tensor, num_rows: int, num_columns: int, form: Format) -> Tensor:
    """float32 `[R, n]`."""
    parts, per_byte = len(form.codebooks), 8 // form.bits
    num_codes, _ = form.num_bytes(num_rows, num_columns)
    num_blocks = -(-num_columns // (parts * BLOCK))
    scale = encoded[num_codes:].view(num_rows, parts, num_blocks).to(torch.int64)
    codes = encoded[:num_codes].view(num_rows, parts, num_blocks, BLOCK // per_byte)
    largest = _scales(encoded.device)[scale.clamp(max=len(SCALES) - 1)][..., None]
    if form.bits == 8:
        values = codes.view(torch.int8).to(torch.float32) * (largest / 127)
    else:
        codes = torch.cat((codes & 15, codes >> 4), -1).to(torch.int64)
        values = torch.stack(
            [
                _levels(codes[:, part], largest[:, part], scale[:, part] >= codebook.first_scale, codebook)
                for part, codebook in enumerate(form.codebooks)
            ],
            1,
        )
    values = values.masked_fill((scale == NOT_A_NUMBER)[..., None], torch.nan)
    return values.flatten(2)[:, :, : num_columns // parts].flatten(1)


def _scales(device: torch.device) -> Tensor:
    return torch.tensor(SCALES, dtype=torch.float32, device=device)


def _number(largest: Tensor) -> Tensor:
    """k of the smallest scale that is no less, or the highest."""
    return torch.searchsorted(_scales(largest.device), largest).clamp(max=len(SCALES) - 1)


def _count_edges(blocks: Tensor, inverse: Tensor, is_own: Tensor, codebook: Codebook) -> Tensor:
    """blocks `[R, blocks, 32]`; inverse (1/M) and is_own `[R, blocks, 1]`."""
    own_edges, edges = (torch.tensor(book.edges, device=blocks.device) for book in (codebook, CODEBOOKS["symmetric"]))
    multiples = blocks * inverse
    own = multiples
    if codebook.num_fixed > 0:
        own = torch.where(blocks > own_edges[codebook.num_fixed - 1], multiples.clamp(min=0), blocks)
    codes = torch.where(is_own, torch.searchsorted(own_edges, own), torch.searchsorted(edges, multiples))
    return codes.to(torch.uint8)


def _levels(codes: Tensor, scale: Tensor, is_own: Tensor, codebook: Codebook) -> Tensor:
    symmetric, own = (
        torch.tensor(book.levels, device=codes.device)[codes] for book in (CODEBOOKS["symmetric"], codebook)
    )
    own = torch.where(codes < codebook.num_fixed, own, own * scale)
    return torch.where(is_own[..., None], own, symmetric * scale)
