"""Experts Weights Averaging as a Triton kernel: for a GPU where the extension was built without CUDA.

One launch for each stacked tensor. Experts are read twice, the second time mostly from a cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import ASSERTS, Tile, aligned, ceil_div
from .permutation import key_pair, mix32

# Its columns: nothing is multiplied.
TILE = Tile(16, 1024, 16, parts=1, num_warps=4, num_stages=1)


@triton.jit
def load_expert(experts, e, numel, column, mask, BF16: tl.constexpr):
    """Elements of expert e, in what is computed in. bfloat16 comes as its bits, with which the interpreter errs."""
    value = tl.load(experts + tl.cast(e, tl.int64) * numel + column, mask=mask, other=0)
    if BF16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value if value.dtype == tl.float64 else value.to(tl.float32)


@triton.jit
def _round_half(value, random):
    """float32 to the bits of one of two neighbours in float16: see `ewa_kernels.reference`."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    random &= 0x1FFF
    small = magnitude < 0x38800000
    steps = tl.where(small, tl.abs(value) * 137438953472.0, 0.0).to(tl.int32).to(tl.uint32)
    rounded = tl.where(small, (steps + random) >> 13, (magnitude - 0x38000000 + random) >> 13)
    rounded = tl.where(magnitude >= 0x47800000, 0x7C00, rounded)
    rounded = tl.where(magnitude > 0x7F800000, 0x7E00, rounded)
    return (rounded | ((bits >> 16) & 0x8000)).to(tl.uint16)


@triton.jit
def _round_bfloat16(value, random):
    """float32 to the bits of one of two neighbours in bfloat16."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where(value != value, 0x7FC0, (bits + random) >> 16).to(tl.uint16)


@triton.jit
def round_to_bfloat16(value):
    """float32 to the bits of the nearest bfloat16; of two that are equally near, of the even one."""
    return _round_bfloat16(value, 0x7FFF + ((value.to(tl.uint32, bitcast=True) >> 16) & 1))


@triton.jit
def average_kernel(
    experts,  # [E, numel], contiguous; bfloat16 as int16
    numel, num_experts,
    first_expert,  # its number among all experts of the call
    share_rate,  # [1] float64
    found_inf,  # [1] or None
    seed,  # [1] int64 or None
    BF16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Averages BLOCK columns. Grid: blocks of columns."""
    pull = tl.load(share_rate) * num_experts / (num_experts - 1)
    if found_inf is not None:
        pull = tl.where(tl.load(found_inf) == 0, pull, 0.0)
    if pull == 0:
        return
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < numel
    first = load_expert(experts, 0, numel, column, mask, BF16)
    distances = tl.zeros_like(first)
    for e in range(1, num_experts):
        distances += load_expert(experts, e, numel, column, mask, BF16) - first
    mean = first + distances / num_experts
    amount, rest = pull.to(first.dtype), (1 - pull).to(first.dtype)
    if seed is not None:
        keys = key_pair(tl.load(seed).to(tl.uint64), 0)
        of_element = mix32((column >> 1).to(tl.uint32) ^ (keys >> 32).to(tl.uint32))
    for e in range(num_experts):
        old = load_expert(experts, e, numel, column, mask, BF16)
        way = mean - old
        new = tl.where(pull < 0.5, old + way * amount, mean - way * rest)
        at = experts + tl.cast(e, tl.int64) * numel + column
        if seed is not None:
            of_expert = mix32((first_expert + e).to(tl.uint32) ^ keys.to(tl.uint32))
            random = (mix32(of_expert + of_element) >> ((column & 1) * 16).to(tl.uint32)) & 0xFFFF
            if BF16:
                tl.store(at, _round_bfloat16(new, random).to(tl.int16, bitcast=True), mask=mask)
            else:
                tl.store(at, _round_half(new, random).to(tl.float16, bitcast=True), mask=mask)
        elif BF16:
            tl.store(at, round_to_bfloat16(new).to(tl.int16, bitcast=True), mask=mask)
        else:
            tl.store(at, new.to(experts.dtype.element_ty), mask=mask)


def _on(device: torch.device, value: Tensor, dtype: torch.dtype) -> Tensor:
    """[1]; one from the CPU by a kernel that fills it in: a copy would wait for the GPU, and no graph may hold it."""
    if value.device.type == "cpu" and device.type != "cpu":
        return torch.full((1,), value.item(), dtype=dtype, device=device)
    return aligned(value.to(device, dtype).reshape(1))


def average(
    groups: Sequence[Tensor | list[Tensor]], share_rate: Tensor, found_inf: Tensor | None, seed: Tensor | None
) -> None:
    """`ewa_kernels.reference.average_experts_`; `seed` None rounds to nearest."""
    number = 0
    for group in groups:
        stacked = group if isinstance(group, Tensor) else torch.stack(group)
        num_experts, first_expert = len(stacked), number
        number += num_experts
        if num_experts == 1 or stacked.numel() == 0:
            continue
        dense, device = stacked.contiguous(), stacked.device
        numel = dense[0].numel()
        bf16, random = dense.dtype == torch.bfloat16, seed is not None and dense.element_size() == 2
        with torch.cuda.device_of(dense):
            average_kernel[(ceil_div(numel, TILE.block_n),)](
                dense.view(torch.int16) if bf16 else dense,
                numel,
                num_experts,
                first_expert,
                _on(device, share_rate, torch.float64),
                None if found_inf is None else _on(device, found_inf, torch.float32),
                _on(device, seed, torch.int64) if random and seed is not None else None,
                BF16=bf16,
                BLOCK=TILE.block_n,
                num_warps=TILE.num_warps,
                **ASSERTS,
            )
        if dense is not group:
            for expert, value in zip(group, dense, strict=True):
                expert.copy_(value)
