"""The operands of a case, and the truth about it in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import ewa_kernels as ewa
from benchmarks.cases import Case

SEED = 3  # of the deal that the parity gate compares


@dataclass(frozen=True)
class Problem:
    """`x` `[T, D]`, stacked parameters as `ewa_kernels.functional.moe_ffn` takes them; for a routed case `choices`
    `[T, k]` and `routing_weights` `[T, k]`. All but `choices` and `grad_y` are leaves that want a gradient."""

    case: Case
    x: Tensor
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    routing_weights: Tensor | None
    choices: Tensor | None
    grad_y: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        names = ("x", "up_weight", "up_bias", "down_weight", "down_bias", "routing_weights")
        operands = {name: getattr(self, name) for name in names}
        return {name: t for name, t in operands.items() if t is not None}

    @property
    def device(self) -> torch.device:
        return self.x.device

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype; leaves of its own."""
        leaves = {name: t.detach().to(dtype, copy=True).requires_grad_() for name, t in self.leaves.items()}
        return replace(self, case=replace(self.case, dtype=dtype), grad_y=self.grad_y.to(dtype), **leaves)

    def as_dense(self) -> Problem:
        """Expert 0 alone, for all tokens."""
        names = ("up_weight", "up_bias", "down_weight", "down_bias")
        leaves = {n: t.detach()[:1].clone().requires_grad_() for n, t in self.leaves.items() if n in names}
        return replace(self, case=replace(self.case, num_experts=1), **leaves)

    def with_transposed_down(self) -> Problem:
        """The same, `down_weight` `[E, D, F]` in memory as `[E, F, D]`, for a library that keeps it so."""
        return replace(self, down_weight=self.down_weight.detach().mT.contiguous().mT.requires_grad_())


def make(case: Case, device: str) -> Problem:
    """Random numbers of order 1, activations too; the same at each call."""
    generator = torch.Generator(device).manual_seed(0)
    kind: dict[str, Any] = {"generator": generator, "device": device}
    e, d, f, k = case.num_experts, case.d_model, case.d_ff, case.top_k

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, **kind) * scale).to(case.dtype).requires_grad_()

    weights = choices = None
    if k is not None:
        weights, choices = ewa.functional.route(torch.randn(case.num_tokens, e, **kind), k, renormalize=True)
        weights = weights.to(case.dtype).detach().requires_grad_()
    return Problem(
        case,
        x=random(case.num_tokens, d),
        up_weight=random(e, case.num_up, d, scale=d**-0.5),
        up_bias=random(e, case.num_up) if case.bias else None,
        down_weight=random(e, d, f, scale=f**-0.5),
        down_bias=random(e, d) if case.bias else None,
        routing_weights=weights,
        choices=choices,
        grad_y=random(case.num_tokens, d).detach(),
    )


def reference(problem: Problem) -> Tensor:
    """y by the package's specification, for the deal of `SEED`."""
    case, p = problem.case, problem
    operands = (p.x, p.up_weight, p.up_bias, p.down_weight, p.down_bias)
    if p.choices is None:
        return ewa.reference.moe_ffn(*operands, seed=SEED, activation=case.activation, gated=case.gated)
    permutation, offsets = ewa.reference.partition_by_expert(p.choices, case.num_experts)
    return ewa.reference.grouped_ffn(
        *operands,
        permutation=permutation,
        expert_offsets=offsets,
        routing_weights=p.routing_weights,
        seed=SEED,
        activation=case.activation,
        gated=case.gated,
    )
