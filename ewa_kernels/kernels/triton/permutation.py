"""The random uniform partition, evaluated in registers: the same bijection as `ewa_kernels.reference`, to the bit."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import num_rounds
from .configs import ASSERTS, aligned, ceil_div

BLOCK = 1024


def radices(num_tokens: int) -> tuple[int, int, int]:
    """a = ⌈√T⌉, b = ⌈T/a⌉ and the number of rounds: what `tokens_of_rows` needs to know of T ≥ 1."""
    a = math.isqrt(num_tokens - 1) + 1
    return a, ceil_div(num_tokens, a), num_rounds(num_tokens)


def seed_arguments(seed: int | Tensor | None) -> tuple[Tensor | None, int, int]:
    """(seed in device memory or None, low and high half as int32).

    A seed on the host travels in the launch; one on the device is read there, so that nobody waits for it.
    """
    if seed is None:
        return None, 0, 0
    if isinstance(seed, Tensor) and seed.device.type != "cpu":
        return aligned(seed), 0, 0
    value = int(seed)
    return None, int32_bits(value), int32_bits(value >> 32)


def int32_bits(bits: int) -> int:
    """The int32 with the lowest 32 bits of an int."""
    bits &= 0xFFFFFFFF
    return bits - (bits >> 31 << 32)


@triton.jit
def mix32(h):
    """murmur3's 32-bit finaliser; uint32."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def key_pair(seed, index):
    """Words 2·index (low half) and 2·index + 1 (high half) of what is derived from a uint64 seed; uint64."""
    z = seed + tl.cast(index + 1, tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def load_seed(seed, seed_low, seed_high):
    """The seed as uint64: from memory, where a CUDA graph may change it, or from two int32 halves if `seed` is None."""
    if seed is not None:
        return tl.load(seed).to(tl.uint64, bitcast=True)
    # Not one 64-bit argument: its type would change with its value, and with it the compiled kernel.
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = seed_high.to(tl.uint32, bitcast=True).to(tl.uint64)
    return (high << 32) | low


@triton.jit
def _feistel(index, a, b, rounds, seed):
    right = index // a
    left = index - right * a
    # The keys are derived anew in each round: kept, they would cost 24 registers of a kernel that has none left.
    for pair in range(rounds // 2):
        keys = key_pair(seed, pair)
        left += tl.umulhi(mix32(right ^ keys.to(tl.uint32)), a)
        left = tl.where(left >= a, left - a, left)
        right += tl.umulhi(mix32(left ^ (keys >> 32).to(tl.uint32)), b)
        right = tl.where(right >= b, right - b, right)
    return right * a + left


@triton.jit
def tokens_of_rows(row, num_tokens, a, b, rounds, seed):
    """`permutation[row]`, int32 `[n]`, for rows in 0…T−1; see `ewa_kernels.reference.random_permutation`."""
    a = a.to(tl.uint32)
    b = b.to(tl.uint32)
    num_tokens = num_tokens.to(tl.uint32)
    row = row.to(tl.uint32)
    coin = key_pair(seed, 12).to(tl.uint32) & 1
    row = tl.where((row < 2) & (num_tokens > 1), row ^ coin, row)
    token = _feistel(row, a, b, rounds, seed)
    while tl.max(token, axis=0) >= num_tokens:
        token = tl.where(token >= num_tokens, _feistel(token, a, b, rounds, seed), token)
    return token.to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens", "a", "b", "rounds", "seed_low", "seed_high"])
def permutation_kernel(permutation, seed, seed_low, seed_high, num_tokens, a, b, rounds, BLOCK: tl.constexpr):
    """permutation[i] for BLOCK rows i per program. Grid: ⌈T / BLOCK⌉."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = load_seed(seed, seed_low, seed_high)
    token = tokens_of_rows(tl.minimum(row, num_tokens - 1), num_tokens, a, b, rounds, seed)
    tl.store(permutation + row, token, mask=row < num_tokens)


def random_permutation(num_tokens: int, seed: int | Tensor, device: torch.device) -> Tensor:
    """See `ewa_kernels.reference.random_permutation`; int32 `[T]`."""
    permutation = torch.empty(num_tokens, dtype=torch.int32, device=device)
    fill(permutation, *seed_arguments(seed))
    return permutation


def fill(permutation: Tensor, seed: Tensor | None, seed_low: int, seed_high: int) -> None:
    """permutation = the random one of a seed, see `seed_arguments`."""
    num_tokens = len(permutation)
    if num_tokens > 0:
        grid, arguments = (ceil_div(num_tokens, BLOCK),), (seed, seed_low, seed_high, num_tokens, *radices(num_tokens))
        with torch.cuda.device_of(permutation):
            permutation_kernel[grid](permutation, *arguments, BLOCK=BLOCK, enable_fp_fusion=True, **ASSERTS)
