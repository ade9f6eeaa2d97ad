"""Gradients in 8 bits, as ranks exchange them: in C++, by Triton, or in PyTorch calls, with the same bits.

Blocks of 128 elements have a scale s, the least bfloat16 that is no less than the largest |v| / 127 and 2⁻¹²⁰, and for
each element a code ⌊v/s + 1/2⌋. Something infinite, or no number, makes s NaN, and so all of its block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension
from . import triton as triton_kernels
from .codec import CPP_TYPES
from .parameter_pass import DTYPES

if extension.WHY_NOT is None:
    from .. import _C

BLOCK = 128
_LEAST_SCALE = 2.0**-120


def num_blocks(num_elements: int) -> int:
    return -(-num_elements // BLOCK)


def encode(values: Tensor, codes: Tensor, scales: Tensor, residual: Tensor | None = None) -> None:
    """Fills codes and scales.

    Args:
        values: `[n]`, contiguous, floating.
        codes: int8 `[128 ⌈n/128⌉]`, contiguous.
        scales: bfloat16 `[⌈n/128⌉]`, contiguous.
        residual: float32 `[n]`, contiguous, or None: is added before; becomes what was lost, but for blocks with
            something infinite or no number, where it stays.
    """
    if _by_cpp(values):
        addresses = codes.data_ptr(), scales.data_ptr(), 0 if residual is None else residual.data_ptr()
        return _C.encode_gradient((values.data_ptr(), DTYPES[values.dtype]), len(values), *addresses)
    if _by_triton(values):
        return triton_kernels.exchange.encode(values, codes, scales, residual)
    wide = values.float() if residual is None else values.float() + residual
    blocks = torch.nn.functional.pad(wide, (0, -len(wide) % BLOCK)).view(-1, BLOCK)
    finite = blocks.isfinite().all(1)
    blocks = blocks.masked_fill(~finite[:, None], 0)
    scale = _rounded_up((blocks.abs().amax(1) / 127).clamp(min=_LEAST_SCALE))
    codes.view(-1, BLOCK).copy_((blocks / scale[:, None] + 0.5).floor().clamp(-127, 127))
    scales.copy_(scale.masked_fill(~finite, torch.nan))
    if residual is not None:
        lost = (blocks - codes.view(-1, BLOCK).float() * scale[:, None]).view(-1)[: len(wide)]
        residual.copy_(torch.where(finite.repeat_interleave(BLOCK)[: len(wide)], lost, residual))


def decode(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Fills out `[n]`, contiguous, floating; what its type cannot hold is its largest number. Others: see `encode`."""
    if _by_cpp(out):
        return _C.decode_gradient(codes.data_ptr(), scales.data_ptr(), len(out), (out.data_ptr(), DTYPES[out.dtype]))
    if _by_triton(out):
        return triton_kernels.exchange.decode(codes, scales, out)
    most = min(torch.finfo(out.dtype).max, torch.finfo(torch.float32).max)
    out.copy_((codes.view(-1, BLOCK).float() * scales.float()[:, None]).view(-1)[: len(out)].clamp(-most, most))


def total(codes: Tensor, scales: Tensor, factor: float) -> Tensor:
    """factor · Σ over ranks, in their order: float32 `[m]`.

    Args:
        codes: int8 `[W, m]`, m a multiple of 128, each rank's contiguous.
        scales: bfloat16 `[W, m/128]`, likewise, as many bytes from one rank's to the next's.
    """
    out = torch.zeros(codes.shape[1], device=codes.device)
    if codes.shape[1] == 0:
        return out
    if _by_cpp(out):
        arguments = codes.data_ptr(), scales.data_ptr(), len(codes), codes.stride(0), len(out), factor, out.data_ptr()
        _C.sum_gradients(*arguments)
    elif _by_triton(out):
        triton_kernels.exchange.total(codes, scales, factor, out)
    else:
        for code, scale in zip(codes, scales, strict=True):
            out += (code.view(-1, BLOCK).float() * scale.float()[:, None]).view(-1)
        out *= factor
    return out


def _rounded_up(values: Tensor) -> Tensor:
    """To the least bfloat16 that is no less than a positive float32, as float32."""
    bits = values.view(torch.int32).to(torch.int64) + 0xFFFF
    return (bits >> 16 << 16).to(torch.int32).view(torch.float32)


def _by_cpp(tensor: Tensor) -> bool:
    return extension.WHY_NOT is None and tensor.is_cpu and tensor.dtype in CPP_TYPES


def _by_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and triton_kernels.WHY_NOT is None
