"""The layer in training, forward and backward, against a dense FFN of the same size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

import ewa_kernels as ewa
from benchmarks.timing import interleaved


@dataclass(frozen=True)
class Case:
    num_tokens: int
    d_model: int
    d_ff: int
    num_experts: int = 4
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"T={self.num_tokens} D={self.d_model} F={self.d_ff} E={self.num_experts}"

    @property
    def flops(self) -> int:
        """Of forward and backward: three products of the size of each projection."""
        return 3 * 2 * (2 * self.num_tokens * self.d_model * self.d_ff)


CASES = (Case(4096, 384, 1536), Case(4096, 192, 768))


def _step(module: nn.Module, x: Tensor, grad_y: Tensor) -> Callable[[], None]:
    def step() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).backward(grad_y)

    return step


def _variants(case: Case) -> dict[str, nn.Module]:
    dense = nn.Sequential(nn.Linear(case.d_model, case.d_ff), nn.GELU(), nn.Linear(case.d_ff, case.d_model)).to(
        case.dtype
    )
    return {
        "dense": dense,
        "experts": ewa.RandomPartitionMoE(case.d_model, case.d_ff, case.num_experts, dtype=case.dtype),
        "experts, reference": ewa.RandomPartitionMoE(
            case.d_model, case.d_ff, case.num_experts, dtype=case.dtype, backend="reference"
        ),
    }


def check(name: str, module: nn.Module, x: Tensor) -> None:
    """No wrong result is timed: output and all gradients of a layer, against the specification in float64.

    Raises:
        AssertionError: the module is wrong.
    """
    if not isinstance(module, ewa.RandomPartitionMoE):
        return
    x = x.detach()[:511].requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, *module.parameters())]
    y, exact = module(x, seed=1), ewa.reference.moe_ffn(*wide, seed=1)
    grad_y = torch.randn_like(exact)
    ours = torch.autograd.grad(y, [x, *module.parameters()], grad_y.to(y.dtype))
    for a, e in zip((y, *ours), (exact, *torch.autograd.grad(exact, wide, grad_y)), strict=True):
        error = float(((a.double() - e).norm() / e.norm()).detach())
        if not error < 1e-5:
            raise AssertionError(f"{name} is wrong by {error:.1e}: not timed")


def run(rounds: int) -> list[dict[str, object]]:
    """One result per case and variant."""
    results: list[dict[str, object]] = []
    for case in CASES:
        torch.manual_seed(0)
        x = torch.randn(case.num_tokens, case.d_model, dtype=case.dtype, requires_grad=True)
        grad_y = torch.randn_like(x)
        modules = _variants(case)
        for name, module in modules.items():
            check(name, module, x)
        timings = interleaved({name: _step(module, x, grad_y) for name, module in modules.items()}, rounds)
        for name, timing in timings.items():
            results.append(
                {
                    "operation": "ffn forward+backward",
                    "case": str(case),
                    "variant": name,
                    **asdict(timing),
                    "gflops": case.flops / timing.median / 1e6,
                    "ratio_to_dense": timing.median / timings["dense"].median,
                }
            )
    return results
