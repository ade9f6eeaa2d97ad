"""The codebooks of `ewa_kernels.codec`: how they were found, and their errors beside those of published formats.

    python -m benchmarks.codebooks            errors of the gradients by format, from random pre-activations
    python -m benchmarks.codebooks --search   finds the codebooks once more, and prints them

An error is that of a gradient whose upstream gradients are independent of the pre-activation p: of W_down's, which is
made of hidden h = act(p), ‖h(p̂) − h(p)‖ / ‖h(p)‖, and of W_up's and x's, made of act'(p), likewise.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ewa_kernels import codec
from ewa_kernels.codec import NEVER, Codebook, Format, above
from ewa_kernels.reference import ACTIVATIONS

NF4 = (
    *(-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0),
)
E2M1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ROWS, COLUMNS = 512, 256

Quantize = Callable[[Tensor], Tensor]


def distributions(scale: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    """Pre-activations `[ROWS, COLUMNS]`: normal, columns of lognormal scale, shifted columns, Student's t₄."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    chi_squared = normal(4, ROWS, COLUMNS).square().sum(0)
    found = {
        "normal": normal(ROWS, COLUMNS),
        "lognormal": normal(ROWS, COLUMNS) * (normal(COLUMNS) / 2).exp(),
        "shifted": normal(ROWS, COLUMNS) + 0.7 * normal(COLUMNS) - 0.3,
        "t4": normal(ROWS, COLUMNS) / chi_squared.div(4).sqrt() / 2**0.5,
    }
    return {name: scale * values for name, values in found.items()}


def hidden_and_slope(pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    pre = pre.detach().requires_grad_()
    hidden = ACTIVATIONS[activation](pre)
    return hidden.detach(), torch.autograd.grad(hidden.sum(), pre)[0]


def errors(pre: Tensor, quantized: Tensor, activation: str) -> tuple[float, float]:
    """Of W_down's gradient, and of W_up's and x's."""
    pairs = zip(hidden_and_slope(pre, activation), hidden_and_slope(quantized, activation), strict=True)
    return tuple(float((q - t).norm() / t.norm()) if t.any() else 0.0 for t, q in pairs)  # type: ignore[return-value]


def by_levels(levels: Iterable[float], block: int) -> Quantize:
    """Nearest multiples of a block's largest |v|, which is stored in bfloat16."""
    values = torch.tensor(tuple(levels))
    values = values / values.abs().max()
    edges = (values[1:] + values[:-1]) / 2

    def quantize(pre: Tensor) -> Tensor:
        blocks = pre.unflatten(-1, (-1, block))
        scale = blocks.abs().amax(-1, keepdim=True).bfloat16().float()
        return (values[torch.bucketize(blocks / scale, edges)] * scale).flatten(-2)

    return quantize


def e4m3(pre: Tensor, block: int = 128) -> Tensor:
    blocks = pre.unflatten(-1, (-1, block))
    scale = (blocks.abs().amax(-1, keepdim=True) / 448).bfloat16().float()
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def ours(bits: int, *codebooks: Codebook) -> Quantize:
    form = Format(bits, codebooks)

    def quantize(pre: Tensor) -> Tensor:
        return codec.decode(codec.encode(pre, form), len(pre), pre.shape[1], form)

    return quantize


# --- the search ---


def objective(codebook: Codebook, activation: str, samples: list[Tensor]) -> float:
    """Mean square error of the three gradients: W_down's, and those of W_up and of x, which are alike."""
    if codebook.first_scale == NEVER:
        codec.CODEBOOKS["symmetric"] = codebook
    total, quantize = 0.0, ours(4, codebook)
    for pre in samples:
        of_hidden, of_slope = errors(pre, quantize(pre), activation)
        total += (of_hidden**2 + 2 * of_slope**2) / 3
    return total / len(samples)


def start(activation: str) -> Codebook:
    """A guess: levels at even distances, edges in the middle."""
    if activation == "identity":
        levels = [(2 * c - 15) / 16 for c in range(16)]
        return Codebook(NEVER, 0, tuple(levels), _between(levels))
    if activation.startswith("relu"):
        levels = [0.0, *((c + 0.5) / 15 for c in range(15))]
        return Codebook(0, 1, tuple(levels), (0.0, *_between(levels[1:])))
    fixed, levels = [-2.35, -1.5, -0.9, -0.44, -0.12], [(c + 0.5) / 10.5 for c in range(11)]
    return Codebook(above(3), 5, (*fixed, *levels), (*_between(fixed), -0.03, *_between(levels)))


def _between(levels: list[float]) -> tuple[float, ...]:
    return tuple((a + b) / 2 for a, b in itertools.pairwise(levels))


def search(activation: str, rounds: int = 12) -> Codebook:
    """Moves one level or edge at a time, by steps that shrink, as long as the objective falls; and then the threshold
    below which blocks have the symmetric codebook."""
    knows_scale = activation not in ("identity", "relu", "relu2")
    scales = (0.25, 0.5, 1.0, 2.0) if knows_scale else (1.0,)
    samples = [pre for scale in scales for pre in distributions(scale, seed=7).values()]
    best = start(activation)
    least, steps = objective(best, activation, samples), [0.03] * 31
    for _ in range(rounds):
        for i in range(31):
            if activation.startswith("relu") and i in (0, 16):
                continue  # what is 0 stays 0: the mask is exact
            for step in (steps[i], -steps[i]):
                numbers = [*best.levels, *best.edges]
                numbers[i] += step
                moved = best._replace(levels=tuple(numbers[:16]), edges=tuple(numbers[16:]))
                if list(moved.levels) != sorted(moved.levels) or list(moved.edges) != sorted(moved.edges):
                    continue
                if (found := objective(moved, activation, samples)) < least:
                    best, least, steps[i] = moved, found, 1.3 * steps[i]
                    break
            else:
                steps[i] /= 2
    if knows_scale:
        thresholds = (best._replace(first_scale=above(eighths)) for eighths in range(-8, 17))
        best = min(thresholds, key=lambda book: objective(book, activation, samples))
    return best._replace(levels=tuple(round(v, 4) for v in best.levels), edges=tuple(round(v, 4) for v in best.edges))


def print_codebooks() -> None:
    names = {"symmetric": "identity", **{name: name for name in ("gelu", "silu", "quick_gelu", "relu", "relu2")}}
    for name, activation in names.items():
        found = search(activation)
        if name == "symmetric":  # which all others have for small blocks
            both = zip((*found.levels, *found.edges), (*found.levels[::-1], *found.edges[::-1]), strict=True)
            numbers = tuple(round((a - b) / 2, 4) for a, b in both)
            codec.CODEBOOKS[name] = found = found._replace(levels=numbers[:16], edges=numbers[16:])
        print(f'    "{name}": {found!r},', flush=True)


def print_errors() -> None:
    formats: dict[str, Quantize | None] = {"8 bits": None, "4 bits": None}
    formats |= {"nf4, 64": by_levels(NF4, 64), "e2m1, 32": by_levels(E2M1, 32), "e4m3, 128": e4m3}
    print(f"{'':12}{'':12}" + "".join(f"{name:>18}" for name in distributions()))
    for activation in ("gelu", "silu", "quick_gelu", "relu", "relu2", "identity"):
        book = codec.CODEBOOKS["symmetric" if activation == "identity" else activation]
        for name, quantize in formats.items():
            quantize = quantize or ours(int(name[0]), book)
            cells = [errors(pre, quantize(pre), activation) for pre in distributions().values()]
            print(f"{activation:12}{name:12}" + "".join(f"{a:>10.4f} {b:.4f} " for a, b in cells))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codebooks", description=__doc__)
    parser.add_argument("--search", action="store_true")
    (print_codebooks if parser.parse_args().search else print_errors)()


if __name__ == "__main__":
    main()
