"""Rows in 8 and 4 bits, as `ewa_kernels.codec` specifies them: what tiles of other kernels do, and passes over rows.

Tables, one tensor for a format: scales M `[256]`, 127/M `[256]`, M/127 `[256]`, 1/M `[256]`, and then for each part 64
numbers: levels of the symmetric codebook `[16]` and of its own `[16]`, edges alike, of which there are 15.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...codec import BLOCK, CODEBOOKS, NOT_A_NUMBER, SCALES, Format
from ..devices import on_device
from .configs import ASSERTS, ceil_div

_BLOCK = tl.constexpr(BLOCK)
_NAN = tl.constexpr(NOT_A_NUMBER)
_LAST = tl.constexpr(len(SCALES) - 1)
_TO_WHOLE = tl.constexpr(12582912.0)  # 1.5·2²³: adding it rounds to a whole number, in the low bits
_TO_WHOLE_BITS = tl.constexpr(0x4B400000)
_OF_ONE = tl.constexpr(SCALES.index(1.0))
_PARTS = tl.constexpr(1024)  # where the parts' tables begin


@functools.cache
def tables(form: Format, device: torch.device) -> Tensor:
    scales = torch.full((256,), SCALES[-1])
    scales[: len(SCALES)] = torch.tensor(SCALES)
    symmetric, numbers = CODEBOOKS["symmetric"], [scales, 127 / scales, scales / 127, 1 / scales]
    for own in form.codebooks:
        for rows in ((symmetric.levels, own.levels), (symmetric.edges, own.edges)):
            numbers += [torch.tensor([*row, 0.0][:16]) for row in rows]
    return torch.cat(numbers).to(device)


@triton.jit
def _number(largest):
    """k of the smallest scale that is no less than `largest` ≥ 0, finite, or the highest."""
    bits = largest.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    eighths = (mantissa > 1.0).to(tl.int32) + (mantissa > 1.0905077457427979).to(tl.int32)
    eighths += (mantissa > 1.1892070770263672).to(tl.int32) + (mantissa > 1.2968395948410034).to(tl.int32)
    eighths += (mantissa > 1.4142135381698608).to(tl.int32) + (mantissa > 1.5422108173370361).to(tl.int32)
    eighths += (mantissa > 1.6817928552627563).to(tl.int32) + (mantissa > 1.834008092880249).to(tl.int32)
    power = exponent + (mantissa > 1.0).to(tl.int32)  # of 2 that is no less
    number = tl.where(power > 9, 72 + (power - 8) // 2, exponent * 8 + eighths)
    number = tl.where(power < -8, -72 - tl.maximum(-9 - power, 0) // 2, number)
    return tl.minimum(tl.maximum(number + _OF_ONE, 0), _LAST)


@triton.jit
def encode_tile(tile, tables, PART: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr, FIXED: tl.constexpr,
                M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """float32 `[M, N]`, whole blocks → codes uint8 `[M, N]` or `[M, N / 2]`, scales uint8 `[M, N / 32]`.

    FIRST, FIXED: first_scale and num_fixed of the part's codebook.
    """
    blocks = tl.reshape(tile, (M, N // _BLOCK, _BLOCK))
    bits = blocks.to(tl.int32, bitcast=True)
    of_all = tl.max(bits & 0x7FFFFFFF, 2)
    finite = of_all < 0x7F800000
    number = _number(tl.where(finite, of_all, 0).to(tl.float32, bitcast=True))
    if BITS == 8:
        factor = tl.load(tables + 256 + number)
        multiple = tl.minimum(tl.maximum(blocks * factor[:, :, None], -127.0), 127.0)
        code = (multiple + _TO_WHOLE).to(tl.int32, bitcast=True) - _TO_WHOLE_BITS
        code = tl.where(blocks > 0, tl.maximum(code, 1), code)
        codes = tl.reshape(code, (M, N)).to(tl.uint8)
    else:
        is_own = number >= FIRST
        of_positive = tl.maximum(tl.max(bits, 2), 0)
        own = _number(tl.where(finite, of_positive, 0).to(tl.float32, bitcast=True))
        number = tl.where(is_own, tl.maximum(own, FIRST), number)
        edges = tables + _PARTS + PART * 64 + 32
        t = blocks * tl.load(tables + 768 + number)[:, :, None]
        if FIXED > 0:
            fixed = tl.where(is_own, tl.load(edges + 16 + FIXED - 1), float("-inf"))[:, :, None]
            t = tl.where(blocks > fixed, tl.where(is_own[:, :, None], tl.maximum(t, 0.0), t), blocks)
        # How many of 15 are less: by halves.
        of_book = tl.where(is_own, 16, 0)[:, :, None] - 1
        count = tl.zeros((M, N // _BLOCK, _BLOCK), tl.int32)
        for step in range(4):  # a loop: unrolled, all its loads would be in registers at a time
            edge = tl.load(edges + (of_book + count + (8 >> step)))
            count += tl.where(t > edge, 8 >> step, 0)
        halves = tl.permute(tl.reshape(count, (M, N // _BLOCK, 2, _BLOCK // 2)), (0, 1, 3, 2))
        low, high = tl.split(halves)
        codes = tl.reshape(low | high << 4, (M, N // 2)).to(tl.uint8)
    return codes, tl.where(finite, number, _NAN).to(tl.uint8)


@triton.jit
def decode_tile(codes, scales, tables, PART: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr,
                FIXED: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """The reverse: float32 `[M, N]`."""
    number = scales.to(tl.int32)
    if BITS == 8:
        step = tl.where(number == _NAN, float("nan"), tl.load(tables + 512 + number))
        code = codes.to(tl.int8, bitcast=True).to(tl.float32)
        blocks = tl.reshape(code, (M, N // _BLOCK, _BLOCK)) * step[:, :, None]
    else:
        halves = tl.reshape(codes, (M, N // _BLOCK, _BLOCK // 2)).to(tl.int32)
        code = tl.permute(tl.join(halves & 15, halves >> 4), (0, 1, 3, 2))
        code = tl.reshape(code, (M, N // _BLOCK, _BLOCK))
        scale = tl.where(number == _NAN, float("nan"), tl.load(tables + number))
        is_own = (number >= FIRST)[:, :, None]
        level = tl.load(tables + _PARTS + PART * 64 + tl.where(is_own, 16, 0) + code)
        is_fixed = is_own & (code < FIXED) & (number != _NAN)[:, :, None]
        blocks = level * tl.where(is_fixed, 1.0, scale[:, :, None])
    return tl.reshape(blocks, (M, N))


@triton.jit
def _places(kept, row, first_column, num_kept, d_ff, PART: tl.constexpr, GATED: tl.constexpr, BITS: tl.constexpr,
            N: tl.constexpr):  # fmt: skip
    """Where codes and scales of a tile's rows lie, and which of them there are: pointers and masks."""
    parts: tl.constexpr = 2 if GATED else 1
    bytes_of_block: tl.constexpr = _BLOCK * BITS // 8
    num_blocks = tl.cdiv(d_ff, _BLOCK)
    part_row = row.to(tl.int64)[:, None] * parts + PART
    block = first_column // _BLOCK + tl.arange(0, N // _BLOCK)
    byte = first_column // _BLOCK * bytes_of_block + tl.arange(0, N * BITS // 8)
    codes = kept + part_row * (num_blocks * bytes_of_block) + byte[None, :]
    scales = kept + num_kept.to(tl.int64) * (parts * num_blocks * bytes_of_block)
    scales += part_row * num_blocks + block[None, :]
    return codes, (byte < num_blocks * bytes_of_block)[None, :], scales, (block < num_blocks)[None, :]


@triton.jit
def store_encoded(
    kept, tile, row, exists, first_column, tables, num_kept, d_ff, PART: tl.constexpr, GATED: tl.constexpr,
    BITS: tl.constexpr, FIRST: tl.constexpr, FIXED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Of a part of rows `row` `[M]`, where they exist, N columns from `first_column` on, which 32 divides.

    tile: float32 `[M, N]`. FIRST, FIXED: of the first part's codebook; the second has the symmetric one.
    """
    codes, has_codes, scales, has_scales = _places(kept, row, first_column, num_kept, d_ff, PART, GATED, BITS, N)
    column = first_column + tl.arange(0, N)
    tile = tl.where((column < d_ff)[None, :], tile, 0.0)
    if PART == 0:
        code, scale = encode_tile(tile, tables, 0, BITS, FIRST, FIXED, M, N)
    else:
        code, scale = encode_tile(tile, tables, 1, BITS, 256, 0, M, N)
    tl.store(codes, code, mask=exists[:, None] & has_codes)
    tl.store(scales, scale, mask=exists[:, None] & has_scales)


@triton.jit
def load_encoded(
    kept, row, exists, first_column, tables, num_kept, d_ff, PART: tl.constexpr, GATED: tl.constexpr,
    BITS: tl.constexpr, FIRST: tl.constexpr, FIXED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The reverse: float32 `[M, N]`, of columns that do not exist anything."""
    codes, has_codes, scales, has_scales = _places(kept, row, first_column, num_kept, d_ff, PART, GATED, BITS, N)
    code = tl.load(codes, mask=exists[:, None] & has_codes, other=0)
    scale = tl.load(scales, mask=exists[:, None] & has_scales, other=0)
    if PART == 0:
        tile = decode_tile(code, scale, tables, 0, BITS, FIRST, FIXED, M, N)
    else:
        tile = decode_tile(code, scale, tables, 1, BITS, 256, 0, M, N)
    return tile


@triton.jit
def saturated(tile, LARGEST: tl.constexpr):
    """What is finite stays so in a type that ends at LARGEST; a NaN stays one."""
    return tl.where(tile > LARGEST, LARGEST, tl.where(tile < -LARGEST, -LARGEST, tile))


@triton.jit(do_not_specialize=["num_rows", "num_kept", "first"])
def _rows_kernel(
    rows,  # [R, n]
    encoded,  # uint8: num_kept rows, of which this is row `first` and those that follow
    tables, num_rows, num_kept, first, n,
    ENCODE: tl.constexpr,  # else the rows are written
    GATED: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr, FIXED: tl.constexpr, LARGEST: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Grid: ⌈R / M⌉ × ⌈n / N⌉; n the columns of a part."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    exists = row < num_rows
    first_column = tl.program_id(1) * N
    column = first_column + tl.arange(0, N)
    inside = exists[:, None] & (column < n)[None, :]
    for part in tl.static_range(2 if GATED else 1):
        of_rows = rows + (row.to(tl.int64)[:, None] * (2 if GATED else 1) + part) * n + column[None, :]
        if ENCODE:
            tile = tl.load(of_rows, mask=inside, other=0.0).to(tl.float32)
            store_encoded(
                encoded, tile, row + first, exists, first_column, tables, num_kept, n, part, GATED, BITS, FIRST,
                FIXED, M, N,
            )  # fmt: skip
        else:
            tile = load_encoded(
                encoded, row + first, exists, first_column, tables, num_kept, n, part, GATED, BITS, FIRST, FIXED, M, N
            )  # fmt: skip
            tl.store(of_rows, saturated(tile, LARGEST), mask=inside)


def encode(encoded: Tensor, num_rows: int, first: int, rows: Tensor, form: Format) -> None:
    """Of memory for `num_rows` encoded rows it fills that of rows first, first + 1, …"""
    _launch(encoded, num_rows, first, rows, form, True)


def decode(encoded: Tensor, num_rows: int, first: int, rows: Tensor, form: Format) -> None:
    """Fills `rows`, contiguous."""
    _launch(encoded, num_rows, first, rows, form, False)


def _launch(encoded: Tensor, num_rows: int, first: int, rows: Tensor, form: Format, is_encoding: bool) -> None:
    count, num_columns = rows.shape
    if count == 0:
        return
    gated, own = len(form.codebooks) == 2, form.codebooks[0]
    n, block_m, block_n = num_columns // len(form.codebooks), 16, 128
    with on_device(rows):
        _rows_kernel[ceil_div(count, block_m), ceil_div(n, block_n)](
            rows, encoded, tables(form, rows.device), count, num_rows, first, n, is_encoding, gated, form.bits,
            own.first_scale, own.num_fixed, largest_of(rows.dtype), block_m, block_n,
            num_warps=4, enable_fp_fusion=False, **ASSERTS,
        )  # fmt: skip


def largest_of(dtype: torch.dtype) -> float:
    """What float32 and a dtype can both hold."""
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
