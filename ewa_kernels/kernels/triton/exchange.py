"""Gradients in 8 bits on a GPU; specified in `kernels/exchange.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..devices import on_device
from .codec import largest_of, saturated
from .configs import ASSERTS, ceil_div

_BLOCK = tl.constexpr(128)  # elements that share a scale
_BLOCKS = 16  # of a program


@triton.jit
def _encode_kernel(
    values,  # [n]
    codes,  # int8 [128 ⌈n/128⌉]
    scales,  # bfloat16 [⌈n/128⌉]
    residual,  # float32 [n], or None
    n, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid: ⌈blocks / BLOCKS⌉."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    v = tl.load(values + element, mask=element < n, other=0.0).to(tl.float32)
    if residual is not None:
        before = tl.load(residual + element, mask=element < n, other=0.0)
        v += before
    largest = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    finite = largest < 0x7F800000
    most = tl.where(finite, largest, 0).to(tl.float32, bitcast=True)
    least = tl.maximum(tl.div_rn(most, 127.0), 7.52316384526264e-37)  # 2⁻¹²⁰
    scale = ((least.to(tl.int32, bitcast=True) + 0xFFFF) >> 16 << 16).to(tl.float32, bitcast=True)
    divisor = tl.broadcast_to(scale[:, None], (BLOCKS, _BLOCK))
    code = tl.floor(tl.div_rn(tl.where(finite[:, None], v, 0.0), divisor) + 0.5)
    code = tl.minimum(tl.maximum(code, -127.0), 127.0)
    exists = block < tl.cdiv(n, _BLOCK)
    tl.store(codes + element, code.to(tl.int8), mask=exists[:, None])
    tl.store(scales + block, tl.where(finite, scale, float("nan")).to(tl.bfloat16), mask=exists)
    if residual is not None:
        lost = tl.where(finite[:, None], v - code * scale[:, None], before)
        tl.store(residual + element, lost, mask=element < n)


@triton.jit
def _decode_kernel(codes, scales, out, n, LARGEST: tl.constexpr, BLOCKS: tl.constexpr):
    """Grid: ⌈blocks / BLOCKS⌉."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    scale = tl.load(scales + block, mask=block < tl.cdiv(n, _BLOCK), other=0.0).to(tl.float32)
    code = tl.load(codes + element, mask=element < n, other=0).to(tl.float32)
    tl.store(out + element, saturated(code * scale[:, None], LARGEST), mask=element < n)


@triton.jit
def _total_kernel(codes, scales, out, count, stride, num_blocks, factor, BLOCKS: tl.constexpr):
    """Grid: ⌈blocks / BLOCKS⌉. `stride`: bytes from one rank's to the next's."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    exists = block < num_blocks
    total = tl.zeros((BLOCKS, _BLOCK), tl.float32)
    for _ in range(count):
        scale = tl.load(scales + block, mask=exists, other=0.0).to(tl.float32)
        total += tl.load(codes + element, mask=exists[:, None], other=0).to(tl.float32) * scale[:, None]
        codes += stride
        scales += stride // 2
    tl.store(out + element, total * factor, mask=exists[:, None])


def encode(values: Tensor, codes: Tensor, scales: Tensor, residual: Tensor | None) -> None:
    """See `kernels/exchange.py`."""
    _launch(_encode_kernel, len(scales), values, codes, scales, residual, len(values))


def decode(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """See `kernels/exchange.py`."""
    _launch(_decode_kernel, len(scales), codes, scales, out, len(out), largest_of(out.dtype))


def total(codes: Tensor, scales: Tensor, factor: float, out: Tensor) -> None:
    """Fills out, see `kernels/exchange.py`."""
    num_blocks = scales.shape[1]
    _launch(_total_kernel, num_blocks, codes, scales, out, len(codes), codes.stride(0), num_blocks, factor)


def _launch(kernel: Any, num_blocks: int, *arguments: Any) -> None:
    """Without multiplications and additions in one rounding: so bits are those of the other implementations."""
    if num_blocks == 0:
        return
    tensor: torch.Tensor = arguments[0]
    with on_device(tensor):
        kernel[ceil_div(num_blocks, _BLOCKS),](*arguments, _BLOCKS, num_warps=4, enable_fp_fusion=False, **ASSERTS)
