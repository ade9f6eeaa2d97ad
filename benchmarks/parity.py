"""No wrong result is timed: outputs and gradients against float64, by the error PyTorch makes in the same dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.problem import SEED, Problem, reference

Function = Callable[[Problem, int | None], Tensor]

# A peer may err so many times as much as PyTorch does, since it may round once more. What is wrong errs far more.
SLACK = 4
# And so many roundings of the result's scale: sums over thousands of rows, one row after the other, lose some dozens.
ROUNDINGS = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 64, torch.float64: 64}


class WrongResultError(Exception):
    """A peer that is refused a time; the message says what is wrong by how much."""


def outputs(function: Callable[[Problem], Tensor], problem: Problem) -> dict[str, Tensor]:
    """y and the gradient of every leaf."""
    y = function(problem)
    grads = torch.autograd.grad(y, list(problem.leaves.values()), problem.grad_y)
    named = {f"gradient of {name}": grad for name, grad in zip(problem.leaves, grads, strict=True)}
    return {"y": y.detach(), **named}


class Gate:
    """What is right for a problem: computed once, for all its peers."""

    def __init__(self, problem: Problem):
        self.exact = outputs(reference, problem.to(torch.float64))
        baseline = outputs(reference, problem)
        self.bounds = {name: _bounds(baseline[name], exact) for name, exact in self.exact.items()}

    def check(self, function: Function, problem: Problem) -> None:
        """Calls `function` once, forward and backward.

        Raises:
            WrongResultError: an output or gradient is not what it must be. A NaN is not.
        """
        for name, actual in outputs(lambda p: function(p, SEED), problem).items():
            exact = self.exact[name]
            if actual.shape != exact.shape:
                raise WrongResultError(f"wrong: {name} has the shape {list(actual.shape)}, not {list(exact.shape)}")
            for norm, scale, error, bound in _errors(actual, exact, self.bounds[name]):
                if not error <= bound:
                    raise WrongResultError(
                        f"wrong: {name} errs by {error / scale:.1e} of its {norm}, {bound / scale:.1e} is allowed"
                    )


_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest element": lambda t: t.abs().max(),
    "root mean square": lambda t: t.square().mean().sqrt(),
}


def _bounds(baseline: Tensor, exact: Tensor) -> list[float]:
    floor = ROUNDINGS[baseline.dtype] * torch.finfo(baseline.dtype).eps
    error = baseline.double() - exact
    return [float(SLACK * norm(error) + floor * norm(exact)) for norm in _NORMS.values()]


def _errors(actual: Tensor, exact: Tensor, bounds: list[float]) -> list[tuple[str, float, float, float]]:
    error = actual.double() - exact
    return [
        (name, float(norm(exact)), float(norm(error)), bound)
        for (name, norm), bound in zip(_NORMS.items(), bounds, strict=True)
    ]


def differs(ours: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error, in norm."""
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(ours, expected, strict=True))
