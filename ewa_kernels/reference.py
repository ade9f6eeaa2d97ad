"""The specification: every operation in plain PyTorch, differentiable by autograd, on any device.

This file is the ground truth of every parity test, with `codec.py`. It is written to be read, not to be fast, and
imports only torch. Arguments are those of `ewa_kernels.functional`, which validates them; nothing is validated here.

Notation: `num_tokens` T, `d_model` D, `d_ff` F, `num_experts` E, share rate β.
Source: "Experts Weights Averaging", arXiv 2308.06093.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import codec

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "identity": lambda x: x,
}

_MAX_ROUNDS = 24
_LOW_32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, as int64


def _mix64(z: Tensor) -> Tensor:
    """splitmix64's output function on int64 bit patterns (wrapping products, logical shifts)."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - 2**64)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _mix32_(h: Tensor) -> Tensor:
    """murmur3's 32-bit finaliser, in place, on int64 values in [0, 2^32)."""
    h.bitwise_xor_(h >> 16).mul_(0x85EBCA6B).bitwise_and_(_LOW_32)
    h.bitwise_xor_(h >> 13).mul_(0xC2B2AE35).bitwise_and_(_LOW_32)
    return h.bitwise_xor_(h >> 16)


def _keys(seeds: Tensor) -> Tensor:
    """Everything that is derived from a seed: int64 `[S]` → int64 `[S, 28]`, values in [0, 2^32).

    Of a permutation's seed words 0…23 are the round keys, bit 0 of word 24 is the coin, words 26 and 27 key the
    dropout mask. Of the seed of stochastic rounding words 0 and 1 are used.
    """
    counter = torch.arange(1, _MAX_ROUNDS // 2 + 3, dtype=torch.int64, device=seeds.device)
    z = _mix64(seeds[:, None] + counter * _GOLDEN)
    return torch.stack((z & _LOW_32, z >> 32 & _LOW_32), dim=-1).flatten(1)


def _seed_tensor(seed: int | Tensor, device: torch.device | str | None) -> Tensor:
    if isinstance(seed, Tensor):
        return seed if device is None else seed.to(device)
    return torch.tensor(seed, dtype=torch.int64, device=device)


def num_rounds(num_tokens: int) -> int:
    """Feistel rounds for T tokens: the tinier T, the more it takes until nothing can be told from chance.

    At T = 5 and 6 all T! permutations are equally likely from 24 rounds on, not from 16. From T = 1,024 on 8
    rounds pass every test; 12 leave a margin and cost half of what 24 do (measured: benchmarks/NOTES.md).
    """
    return _MAX_ROUNDS if num_tokens < 1024 else 12


def random_permutation(num_tokens: int, seed: int | Tensor, *, device: torch.device | str | None = None) -> Tensor:
    """A pseudo-random bijection on 0…T−1: grouped row i holds token `permutation[i]`.

    Row i is split into (left, right) = (i mod a, i div a) with a = ⌈√T⌉, b = ⌈T/a⌉, and sent through a
    `num_rounds`-round Feistel network on Z_a × Z_b: left += ⌊a·h(right ^ key) / 2³²⌋ (mod a), then the mirror image.
    Images ≥ T are sent through again until they are < T (cycle-walking). Rows 0 and 1 are swapped if a
    key bit (the coin) is set; without it some T would reach even permutations only.

    The values are fixed for ever: same (T, seed), same permutation, on every device and version.

    What is tested (`tests/test_permutation.py`), and no more than that is claimed: a bijection for every
    T ≤ 300 and for some T up to 3,000,000; all T! permutations equally likely for T = 2…8; at T = 16, 64
    and 197 how often two positions share an expert, and where each token goes; the number of fixed points;
    permutations from consecutive seeds, from seeds that differ in one bit, and from seeds drawn one after
    the other from torch's generator are uncorrelated. It is not cryptographic.

    Args:
        num_tokens: T, 0 ≤ T < 2³¹.
        seed: int in 0…2⁶³−1, or int64 tensor with one element, which is read on its device only.
        device: where the result lives; the seed tensor's device, or torch's default, if None.

    Returns:
        int32 [T].
    """
    return random_permutations(num_tokens, _seed_tensor(seed, device).reshape(1))[0]


def random_permutations(num_tokens: int, seeds: Tensor) -> Tensor:
    """`random_permutation` for many seeds at once: int64 `[S]` → int32 `[S, T]`."""
    if num_tokens == 0:
        return torch.empty(len(seeds), 0, dtype=torch.int32, device=seeds.device)
    keys = _keys(seeds)
    a = math.isqrt(num_tokens - 1) + 1
    b = -(-num_tokens // a)

    # All a·b points are mapped, so that the walk below is a table look-up and needs no host sync.
    index = torch.arange(a * b, dtype=torch.int64, device=seeds.device).repeat(len(seeds), 1)
    if num_tokens > 1:
        index[:, :2] ^= keys[:, _MAX_ROUNDS, None] & 1
    right = index // a
    left = index - right * a
    # Only √T values can come in, so the round functions are small tables: [S, rounds / 2, b] and [S, rounds / 2, a].
    rounds = num_rounds(num_tokens)
    to_left = (_mix32_(torch.arange(b, device=seeds.device) ^ keys[:, 0:rounds:2, None]) * a >> 32).unbind(1)
    to_right = (_mix32_(torch.arange(a, device=seeds.device) ^ keys[:, 1:rounds:2, None]) * b >> 32).unbind(1)
    for add_left, add_right in zip(to_left, to_right, strict=True):
        left.add_(add_left.gather(1, right))
        left.add_(left >= a, alpha=-a)
        right.add_(add_right.gather(1, left))
        right.add_(right >= b, alpha=-b)
    image = right.mul_(a).add_(left)

    # Cycle-walking by pointer doubling: `walk[k]` is where point T + k leads, until all lead below T.
    permutation, walk = image[:, :num_tokens], image[:, num_tokens:]

    def follow(points: Tensor) -> Tensor:
        beyond = (points - num_tokens).clamp_(min=0)
        return torch.where(points < num_tokens, points, walk.gather(1, beyond))

    if walk.shape[1] > 0:
        for _ in range(walk.shape[1].bit_length()):
            walk = follow(walk)
        permutation = follow(permutation)
    return permutation.to(torch.int32)


def expert_offsets(num_tokens: int, num_experts: int) -> list[int]:
    """Expert e owns grouped rows `offsets[e]` … `offsets[e+1]`−1, with offsets[e] = ⌊e·T/E⌋; E + 1 entries."""
    return [e * num_tokens // num_experts for e in range(num_experts + 1)]


def dropout_scale(rows: Tensor, d_ff: int, seed: Tensor, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """What hidden dropout multiplies `hidden` by: 0 with probability p, else 1/(1−p); `[..., F]`.

    Element (row, column) is dropped where h(h(row ^ key₀) + h(column ^ key₁)) < p·2³². It depends on the seed
    and on the grouped row only, so every backend, and a recomputed forward, draws the same mask.

    Args:
        rows: int64 `[...]`, grouped rows.
    """
    keys = _keys(seed.reshape(1))[0]
    column = torch.arange(d_ff, dtype=torch.int64, device=seed.device)
    row, column = _mix32_(rows ^ keys[-2]), _mix32_(column ^ keys[-1])
    bits = _mix32_((row[..., None] + column).bitwise_and_(_LOW_32))
    scale = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    return (bits >= round(dropout_p * 2**32)).to(dtype).mul_(scale)


def activate(pre_activation: Tensor, activation: str, gated: bool) -> Tensor:
    """`act(pre)`, or `act(pre[:, :F]) * pre[:, F:]` if gated."""
    act = ACTIVATIONS[activation]
    if not gated:
        return act(pre_activation)
    gate, value = pre_activation.chunk(2, dim=-1)
    return act(gate) * value


class _WithValue(torch.autograd.Function):
    """A value, in place of that which the gradient is of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(of: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _kept(rows: Tensor, form: codec.Format) -> Tensor:
    """Rows that were encoded and decoded."""
    decoded = codec.decode(codec.encode(rows, form), len(rows), rows.shape[1], form)
    return decoded.clamp(-65504, 65504).half() if rows.dtype == torch.float16 else decoded.to(rows.dtype)


def moe_ffn(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    seed: int | Tensor,
    activation: str = "gelu",
    gated: bool = False,
    dropout_p: float = 0.0,
    backend: str = "reference",
    saved: str = "full",
) -> Tensor:
    """y[t] = down_weight[e] @ act(up_weight[e] @ x[t] + up_bias[e]) + down_bias[e], e the expert of token t.

    Args and Returns: see `ewa_kernels.functional.moe_ffn`. `backend` is accepted so that calls are
    interchangeable, and ignored.
    """
    seed = _seed_tensor(seed, x.device)
    num_tokens, num_experts = math.prod(x.shape[:-1]), down_weight.shape[0]
    return grouped_ffn(
        x,
        up_weight,
        up_bias,
        down_weight,
        down_bias,
        permutation=random_permutation(num_tokens, seed),
        expert_offsets=torch.tensor(expert_offsets(num_tokens, num_experts)),
        seed=seed,
        activation=activation,
        gated=gated,
        dropout_p=dropout_p,
        saved=saved,
    )


def grouped_ffn(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    permutation: Tensor,
    expert_offsets: Tensor,
    routing_weights: Tensor | None = None,
    seed: int | Tensor = 0,
    activation: str = "gelu",
    gated: bool = False,
    dropout_p: float = 0.0,
    backend: str = "reference",
    saved: str = "full",
) -> Tensor:
    """`moe_ffn` with a partition that is given. Args and Returns: see `ewa_kernels.functional.grouped_ffn`."""
    tokens = x.reshape(-1, x.shape[-1])
    num_experts, _, d_ff = down_weight.shape
    top_k = 1 if routing_weights is None else routing_weights.shape[1]
    seed = _seed_tensor(seed, x.device)
    offsets = expert_offsets.tolist()

    def by_expert(tokens: Tensor, kept: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and pre-activations; if they were kept, of these."""
        grouped, pre_activations, outputs = tokens[permutation // top_k], [], []
        for e in range(num_experts):
            rows = slice(offsets[e], offsets[e + 1])
            pre_activation = F.linear(grouped[rows], up_weight[e], None if up_bias is None else up_bias[e])
            if kept is not None:
                pre_activation = _WithValue.apply(pre_activation, kept[e])
            pre_activations.append(pre_activation)
            hidden = activate(pre_activation, activation, gated)
            if dropout_p > 0:
                row = torch.arange(rows.start, rows.stop, device=x.device)
                hidden = hidden * dropout_scale(row, d_ff, seed, dropout_p, hidden.dtype)
            outputs.append(F.linear(hidden, down_weight[e], None if down_bias is None else down_bias[e]))
        return outputs, pre_activations

    def combined(outputs: list[Tensor]) -> Tensor:
        y = torch.cat(outputs)[torch.argsort(permutation)]
        if routing_weights is not None:
            y = (y.view(-1, top_k, y.shape[-1]) * routing_weights[..., None].to(y.dtype)).sum(1)
        return y

    if saved in ("full", "recompute"):
        outputs, _ = by_expert(tokens)
        return combined(outputs).reshape(x.shape)
    # The output is that of x, gradients are of what is kept of it.
    with torch.no_grad():
        exact, pre_activations = by_expert(tokens)
        kept = None
        if saved != "recompute-8bit":
            form = codec.format_of(int(saved[0]), activation, gated)
            kept = [_kept(pre_activation, form) for pre_activation in pre_activations]
        y = combined(exact)
    of_kept, _ = by_expert(_WithValue.apply(tokens, _kept(tokens.detach(), codec.ROWS_8BIT)), kept)
    return _WithValue.apply(combined(of_kept), y).reshape(x.shape)


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    permutation: Tensor,
    expert_offsets: Tensor,
    gather: bool = False,
    scatter: bool = False,
    backend: str = "reference",
) -> Tensor:
    """One product by expert. Args and Returns: see `ewa_kernels.functional.expert_linear`."""
    rows, offsets = x.reshape(-1, x.shape[-1]), expert_offsets.tolist()
    if gather:
        rows = rows[permutation]
    outputs = [
        F.linear(rows[offsets[e] : offsets[e + 1]], weight[e], None if bias is None else bias[e])
        for e in range(len(weight))
    ]
    out = torch.cat(outputs)
    if scatter:
        out = out[torch.argsort(permutation)]
    return out.reshape(*x.shape[:-1], weight.shape[1])


def route(logits: Tensor, top_k: int, *, renormalize: bool = False) -> tuple[Tensor, Tensor]:
    """The k experts with the highest logits, of equal ones those that come first, and softmax(logits) of them.

    Args and Returns: see `ewa_kernels.functional.route`.
    """
    choices = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    routing_weights = logits.softmax(dim=-1).gather(1, choices)
    if renormalize:
        routing_weights = routing_weights / routing_weights.sum(dim=-1, keepdim=True)
    return routing_weights, choices


def partition_by_expert(choices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Choices in the order of their experts, of one expert's in their own. See `ewa_kernels.functional`."""
    expert, permutation = choices.flatten().sort(stable=True)
    numbers = torch.arange(num_experts + 1, dtype=expert.dtype, device=expert.device)
    return permutation.to(torch.int32), torch.searchsorted(expert, numbers, out_int32=True)


def _round_stochastically(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """float32 to one of the two nearest neighbours in a 16-bit dtype, up with probability (x − lower) / spacing.

    Args:
        random: int64, uniform in 0…2¹⁶−1: added to the bits that are cut off. float16 takes the 13 lowest of them.
    """
    bits = x.view(torch.int32).to(torch.int64) & _LOW_32
    sign, magnitude = bits >> 16 & 0x8000, bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = magnitude + random >> 16
        not_a_number = 0x7FC0
    else:
        random = random & 0x1FFF
        # Below 2⁻¹⁴ the spacing is 2⁻²⁴; it is counted in 2⁻³⁷, so that 13 bits are cut off there too.
        small = magnitude < 0x38800000
        steps = torch.where(small, x.abs() * 2.0**37, 0.0).to(torch.int64)
        rounded = torch.where(small, steps + random >> 13, magnitude - 0x38000000 + random >> 13)
        rounded = torch.where(magnitude >= 0x47800000, 0x7C00, rounded)
        not_a_number = 0x7E00
    rounded = torch.where(x.isnan(), not_a_number, rounded) | sign
    return (rounded - (rounded >> 15 << 16)).to(torch.int16).view(dtype)


def _random_bits(num_experts: int, shape: Sequence[int], seed: Tensor, first: int) -> Tensor:
    """What rounds element k of expert n: half k mod 2 of h(h(n ^ key₀) + h(⌊k/2⌋ ^ key₁)); int64 `[E, *shape]`."""
    keys = _keys(seed.reshape(1))[0]
    k = torch.arange(math.prod(shape), dtype=torch.int64, device=seed.device)
    of_expert = _mix32_(torch.arange(first, first + num_experts, device=seed.device) ^ keys[0])
    of_element = _mix32_((k >> 1 & _LOW_32) ^ keys[1])
    hashes = _mix32_((of_expert[:, None] + of_element).bitwise_and_(_LOW_32))
    return (hashes >> (k & 1) * 16 & 0xFFFF).view(num_experts, *shape)


@torch.no_grad()
def average_experts_(
    tensors: Iterable[Tensor | Sequence[Tensor]],
    share_rate: float | Tensor,
    *,
    backend: str = "reference",
    rounding: str = "stochastic",
    seed: int | Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """W̄_i = (1−β)·W_i + β/(E−1)·Σ_{j≠i} W_j for all experts at once, in place (equation 6).

    Computed as W_i + βE/(E−1)·(W̄ − W_i) with W̄ the mean over experts: the same function, in which it shows
    that the mean is kept and that every distance from it is scaled by 1 − βE/(E−1). 16-bit tensors are computed in
    float32 and rounded once. Their random bits depend on the seed, on the expert's place among all experts of the
    call, and on the element's place in the expert.

    Args and Raises: see `ewa_kernels.functional.average_experts_`.
    """
    if isinstance(share_rate, Tensor):
        on_host = share_rate.device.type == "cpu"
        share_rate = float(share_rate) if on_host else share_rate.reshape(()).to(torch.float64)
    if found_inf is not None and found_inf.device.type == "cpu":
        if found_inf != 0:
            return
    elif found_inf is not None:
        share_rate = share_rate * (found_inf.reshape(()) == 0).to(torch.float64)
    number = 0
    for experts in tensors:
        first, num_experts = number, len(experts)
        number += num_experts
        # A share rate of 0 must not move anything, not even next to an inf or a NaN.
        if num_experts == 1 or (not isinstance(share_rate, Tensor) and share_rate == 0):
            continue
        old = experts if isinstance(experts, Tensor) else torch.stack(tuple(experts))
        wide = old if old.dtype == torch.float64 else old.to(torch.float32)
        mean = wide.mean(dim=0, keepdim=True)
        pull = share_rate * num_experts / (num_experts - 1)
        if isinstance(pull, Tensor):
            new = torch.where(pull == 0, wide, torch.lerp(wide, mean, pull.to(device=wide.device, dtype=wide.dtype)))
        else:
            new = torch.lerp(wide, mean, pull)
        if rounding == "stochastic" and old.dtype in (torch.float16, torch.bfloat16):
            seed = torch.randint(2**63 - 1, (), device=old.device) if seed is None else _seed_tensor(seed, old.device)
            random = _random_bits(num_experts, old.shape[1:], seed, first)
            new = _round_stochastically(new.contiguous(), old.dtype, random)
        new = new.to(old.dtype)
        if isinstance(experts, Tensor):
            experts.copy_(new)
        else:
            for expert, value in zip(experts, new, strict=True):
                expert.copy_(value)


def merge_experts(tensor: Tensor) -> Tensor:
    """The mean over experts, accumulated in float64 and rounded once: `[E, ...]` → `[...]`."""
    total = tensor[0].to(torch.float64)
    for e in range(1, tensor.shape[0]):
        total = total + tensor[e]
    return (total / tensor.shape[0]).to(tensor.dtype)
