"""What a peer is, and the steps that several peers share: dealing, choosing, the activation.

A peer's function takes the problem and a seed. With a seed tokens are dealt as the parity gate expects; with None
they are dealt anew, by the peer's own means, as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import ewa_kernels as ewa
from benchmarks.cases import Case
from benchmarks.parity import Function
from benchmarks.problem import Problem


@dataclass(frozen=True)
class Peer:
    """
    Attributes:
        build: gives the function to be timed, for one case.
        why_not: why it cannot do a case on a device; None if it can.
        prepare: gives the problem as this peer wants to have it.
        compiled: by torch.compile, which takes long.
    """

    name: str
    build: Callable[[Case], Function]
    why_not: Callable[[Case, str], str | None] = lambda case, device: None
    prepare: Callable[[Problem], Problem] = lambda problem: problem
    compiled: bool = False


def activate(pre: Tensor, case: Case) -> Tensor:
    gate, value = pre.chunk(2, dim=-1) if case.gated else (pre, None)
    match case.activation:
        case "gelu" | "gelu_tanh":
            hidden = F.gelu(gate, approximate="none" if case.activation == "gelu" else "tanh")
        case "silu":
            hidden = F.silu(gate)
        case _:
            raise ValueError(f"no peer knows {case.activation!r}")
    return hidden if value is None else hidden * value


def deal(problem: Problem, seed: int | None) -> Tensor:
    """A permutation, grouped row → token: torch's own, or the one of a seed."""
    num_tokens, device = len(problem.x), problem.device
    if seed is None:
        return torch.randperm(num_tokens, device=device)
    return ewa.functional.random_permutation(num_tokens, seed, device=device).long()


def choices_of(problem: Problem, seed: int | None) -> Tensor:
    """The expert of each token, `[T, k]`, for a library that knows routed layers alone."""
    if problem.choices is not None:
        return problem.choices
    num_tokens, num_experts = len(problem.x), problem.case.num_experts
    row = torch.arange(num_tokens, device=problem.device)
    ends = torch.tensor(ewa.functional.expert_offsets(num_tokens, num_experts)[1:], device=problem.device)
    expert = torch.empty_like(row)
    expert[deal(problem, seed)] = torch.bucketize(row, ends, right=True)
    return expert[:, None]
