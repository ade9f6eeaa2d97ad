"""Rows in 8 and 4 bits, see `ewa_kernels.codec`: by C++, by Triton, or by the specification; the bits are the same.

For backends that do not read and write them where they compute.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import codec as specification
from ..codec import CODEBOOKS, SCALES, Format
from . import extension
from . import triton as triton_kernels
from .parameter_pass import DTYPES

# Of rows that C++ reads and writes.
CPP_TYPES = DTYPES.keys() - {torch.float64}

if extension.WHY_NOT is None:
    from .. import _C


def encode(rows: Tensor, form: Format, backend: str) -> Tensor:
    """rows `[R, n]` → uint8, flat."""
    encoded = form.new(len(rows), rows.shape[1], rows.device)
    encode_into(encoded, len(rows), 0, rows, form, backend)
    return encoded


def decode(encoded: Tensor, shape: tuple[int, int], form: Format, dtype: torch.dtype, backend: str) -> Tensor:
    """uint8, flat → rows of a shape. What float16 cannot hold is its largest number."""
    rows = torch.empty(shape, dtype=dtype, device=encoded.device)
    decode_from(encoded, shape[0], 0, rows, form, backend)
    return rows


def encode_into(encoded: Tensor, num_rows: int, first: int, rows: Tensor, form: Format, backend: str) -> None:
    """Of memory for `num_rows` it fills that of rows first, first + 1, …"""
    rows, (count, num_columns) = rows.contiguous(), rows.shape
    if triton_kernels.runs(backend):
        triton_kernels.codec.encode(encoded, num_rows, first, rows, form)
    elif backend == "cpp" and rows.dtype in CPP_TYPES:
        matrix = rows.data_ptr(), DTYPES[rows.dtype]
        addresses = _addresses(encoded, num_rows, first, num_columns, form)
        _C.encode_rows(of_cpp(form), matrix, count, num_columns, *addresses)
    else:
        for whole, part in _slices(encoded, num_rows, first, rows, form, specification.encode(rows, form)):
            whole.copy_(part)


def decode_from(encoded: Tensor, num_rows: int, first: int, rows: Tensor, form: Format, backend: str) -> None:
    """Fills `rows`, contiguous."""
    count, num_columns = rows.shape
    if triton_kernels.runs(backend):
        triton_kernels.codec.decode(encoded, num_rows, first, rows, form)
    elif backend == "cpp" and rows.dtype in CPP_TYPES:
        matrix = rows.data_ptr(), DTYPES[rows.dtype]
        addresses = _addresses(encoded, num_rows, first, num_columns, form)
        _C.decode_rows(of_cpp(form), *addresses, count, num_columns, matrix)
    else:
        own = form.new(count, num_columns, rows.device)
        for whole, part in _slices(encoded, num_rows, first, rows, form, own):
            part.copy_(whole)
        values = specification.decode(own, count, num_columns, form)
        rows.copy_(values.clamp_(-65504, 65504) if rows.dtype == torch.float16 else values)


def _slices(
    encoded: Tensor, num_rows: int, first: int, rows: Tensor, form: Format, own: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of some rows: in memory for all, and in their own."""
    if len(rows) == 0:
        return []
    num_codes, _ = form.num_bytes(num_rows, rows.shape[1])
    num_own, _ = form.num_bytes(len(rows), rows.shape[1])
    last = first + len(rows)
    return [
        (encoded[:num_codes].view(num_rows, -1)[first:last], own[:num_own].view(len(rows), -1)),
        (encoded[num_codes:].view(num_rows, -1)[first:last], own[num_own:].view(len(rows), -1)),
    ]


def _addresses(encoded: Tensor, num_rows: int, first: int, num_columns: int, form: Format) -> tuple[int, int]:
    """Of the codes and of the scales of row `first`."""
    codes, scales = form.num_bytes(first, num_columns)
    end, _ = form.num_bytes(num_rows, num_columns)
    start = encoded.data_ptr()
    return start + codes, start + end + scales


@functools.cache
def of_cpp(form: Format) -> Any:
    return _C.Format(form.bits, SCALES, CODEBOOKS["symmetric"], form.codebooks)
