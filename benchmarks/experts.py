"""Averaging, and AdamW with it, at the sizes of ViT-B's FFNs, against PyTorch and against a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ewa_kernels as ewa
from benchmarks.timing import Stopwatch, Variant, interleaved, timed

D_MODEL, D_FF, NUM_EXPERTS, SHARE_RATE = 768, 3072, 4, 0.3
SHAPES = ((D_FF, D_MODEL), (D_FF,), (D_MODEL, D_FF), (D_MODEL,))


@dataclass(frozen=True)
class Target:
    """`variant` is to take at most `ratio` times what `baseline` takes."""

    variant: str
    baseline: str
    ratio: float


# On a GPU averaging moves the bytes of a copy, at 95 % of its speed.
TARGETS = {
    "cpu": (
        Target("one pass", "copy_", 0.70),
        Target("one pass", "mean, lerp_", 1 / 2.5),
        Target("one pass", "loop over experts", 1 / 8),
        Target("AdamW and averaging, one pass", "torch's fused AdamW", 1.05),
    ),
    "cuda": (
        Target("one pass", "copy_", 1 / 0.95),
        Target("AdamW and averaging, one pass", "torch's fused AdamW", 1.02),
    ),
}


def _experts(num_layers: int, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(NUM_EXPERTS, *shape, generator=generator, device=device)
        for _ in range(num_layers)
        for shape in SHAPES
    ]


def _mean_lerp(tensors: list[Tensor]) -> None:
    pull = SHARE_RATE * NUM_EXPERTS / (NUM_EXPERTS - 1)
    for experts in tensors:
        experts.lerp_(experts.mean(dim=0, keepdim=True), pull)


def _loop(tensors: list[Tensor]) -> None:
    """Equation 6 as it is written."""
    for experts in tensors:
        old = experts.clone()
        for i in range(NUM_EXPERTS):
            others = sum(old[j] for j in range(NUM_EXPERTS) if j != i)
            experts[i] = (1 - SHARE_RATE) * old[i] + SHARE_RATE / (NUM_EXPERTS - 1) * others


def _foreach(tensors: list[Tensor]) -> None:
    """As one would for experts that are separate modules: a list of tensors for each expert."""
    experts = [[t[i] for t in tensors] for i in range(NUM_EXPERTS)]
    means = torch._foreach_add(experts[0], experts[1])
    for others in experts[2:]:
        torch._foreach_add_(means, others)
    torch._foreach_div_(means, NUM_EXPERTS)
    for own in experts:
        torch._foreach_lerp_(own, means, SHARE_RATE * NUM_EXPERTS / (NUM_EXPERTS - 1))


def _one_pass(tensors: list[Tensor]) -> None:
    ewa.functional.average_experts_(tensors, SHARE_RATE)


AVERAGING: dict[str, Callable[[list[Tensor]], None]] = {
    "one pass": _one_pass,
    "mean, lerp_": _mean_lerp,
    "_foreach_*": _foreach,
    "loop over experts": _loop,
}


def check(name: str, average: Callable[[list[Tensor]], None], device: str) -> None:
    """No wrong result is timed.

    Raises:
        AssertionError: `average` is not equation 6.
    """
    (experts, *_) = tensors = [t[..., :37].contiguous() for t in _experts(1, device)]
    old = experts.double()
    exact = (1 - SHARE_RATE) * old + SHARE_RATE / (NUM_EXPERTS - 1) * (old.sum(0) - old)
    average(tensors)
    error = float((experts.double() - exact).norm() / exact.norm())
    if not error < 1e-6:
        raise AssertionError(f"{name} is wrong by {error:.1e}: not timed")


def _optimizer_steps(tensors: list[Tensor]) -> dict[str, Callable[[], object]]:
    steps: dict[str, Callable[[], object]] = {}
    for name in (
        "torch's fused AdamW",
        "torch's fused AdamW, then averaging",
        "AdamW and averaging, one pass",
        "AdamW, averaging, bfloat16 copies, one pass",
    ):
        parameters = [nn.Parameter(t.clone()) for t in tensors]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        averager = ewa.ExpertAverager(parameters, SHARE_RATE)
        optimizer: torch.optim.Optimizer
        if "one pass" in name:
            optimizer = ewa.optim.AdamW(parameters, averager=averager, bf16_copies="copies" in name)
        else:
            optimizer = torch.optim.AdamW(parameters, fused=True)
            if "then" in name:
                averager.attach(optimizer)
        steps[name] = optimizer.step
    return steps


def subject(operation: str, device: str) -> Callable[[], object]:
    """What this package makes of "averaging" or "AdamW and averaging", as a call; one layer on a CPU."""
    tensors = _experts(12 if device == "cuda" else 1, device)
    if operation == "averaging":
        return lambda: _one_pass(tensors)
    parameters = [nn.Parameter(t) for t in tensors]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    averager = ewa.ExpertAverager(parameters, SHARE_RATE)
    return ewa.optim.AdamW(parameters, averager=averager).step


def run(device: str, seconds: float, num_layers: int | None = None) -> list[dict[str, Any]]:
    """One result per variant. By default 3 layers on a CPU (227 MB), 12 on a GPU (907 MB)."""
    tensors = _experts(num_layers or (12 if device == "cuda" else 3), device)
    others = [torch.empty_like(t) for t in tensors]
    for name, average in AVERAGING.items():
        check(name, average, device)

    def copy() -> None:
        for t, other in zip(tensors, others, strict=True):
            other.copy_(t)

    num_bytes = sum(t.numel() * t.element_size() for t in tensors)
    averaging: dict[str, Callable[[], object]] = {"copy_": copy}
    for name, average in AVERAGING.items():
        averaging[name] = lambda average=average: average(tensors)  # type: ignore[misc]
    results = []
    watch = Stopwatch(device)
    # Reading and writing parameters; with AdamW gradients are read too, and moments read and written.
    for operation, passes, calls in (
        ("averaging", 2, averaging),
        ("AdamW and averaging", 7, _optimizer_steps(tensors)),
    ):
        variants: dict[str, Variant] = {name: timed(call, watch) for name, call in calls.items()}
        for name, (timing,) in interleaved(variants, seconds / 2).items():
            results.append(
                {
                    "operation": operation,
                    "case": f"{len(tensors) // len(SHAPES)} layers of ViT-B, E = {NUM_EXPERTS}, float32",
                    "variant": name,
                    **timing.as_dict(),
                    "gigabytes_per_second": round(passes * num_bytes / timing.median / 1e6, 3),
                }
            )
    return results


def against_targets(results: list[dict[str, Any]], device: str) -> list[tuple[Target, float]]:
    """Each target, and the ratio of medians that was measured."""
    medians = {r["variant"]: r["median"] for r in results}
    return [(t, medians[t.variant] / medians[t.baseline]) for t in TARGETS[device]]
