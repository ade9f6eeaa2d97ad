"""Which tensors AdamW's pass over parameters and experts is made of: laid out once, for as long as it stays so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ewa_kernels.checks as checks
import ewa_kernels.functional as functional
import ewa_kernels.ops as ops
import ewa_kernels.train.shards as shards
from ewa_kernels.kernels.parameter_pass import Numbers, Plan


class State(NamedTuple):
    """What belongs to a parameter that has a gradient."""

    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    options: int  # index of its group


def local_states(states: dict[Tensor, State], found_inf: Tensor | None) -> dict[Tensor, State]:
    """What this process holds of them; of an empty shard only the number of steps, which is counted here."""
    held = {}
    for p, state in states.items():
        grad, exp_avg, exp_avg_sq, step = map(shards.local, state[:4])
        held[shards.local(p)] = State(grad, exp_avg, exp_avg_sq, step, state.options)
    for p in [p for p in held if p.numel() == 0]:
        held.pop(p).step.add_(1 if found_inf is None else found_inf.reshape(()) == 0)
    return held


class StepPlan:
    """The pass of a step, and of every later one that has tensors like these, gradients anywhere. Holds no tensor.

    Args:
        states: of each parameter that has a gradient.
        experts, group_sizes: as `ewa_kernels.ops.average_experts_` takes them.
        copied: which experts have a bfloat16 copy.

    Attributes:
        signature: what its owner compares, to tell whether the pass is of the same tensors.
    """

    def __init__(
        self,
        states: Mapping[Tensor, State],
        experts: Sequence[Tensor],
        group_sizes: Sequence[int],
        copied: Sequence[int],
    ):
        self.signature: list[Any] = []
        self.copied = copied
        self._others = [t not in states for t in experts]  # experts that have no gradient
        self._num_fixed, self._num_grads = sum(self._others) + len(states), len(states)
        self._plan: Plan | None = None
        # Where each parameter and what belongs to it are among `listed`.
        n, grads = len(states), self._num_fixed + 3 * len(states) + len(copied)
        place = {t: i for i, t in enumerate([*compress(experts, self._others), *states])}
        copy_of = {experts[i]: grads - len(copied) + c for c, i in enumerate(copied)}
        known = set(experts)
        order = [*experts, *(p for p in states if p not in known)]
        self._fields, self._options_of = [], []
        for t in order:
            i, state = place[t], states.get(t)
            others = (-1,) * 4 if state is None else (grads + i - self._num_fixed + n, i + n, i + 2 * n, i + 3 * n)
            self._fields.append((i, *others, copy_of.get(t, -1)))
            self._options_of.append(0 if state is None else state.options)
        self._group_sizes = [*group_sizes, *[1] * (len(order) - len(experts))]

    def listed(
        self,
        experts: Sequence[Tensor],
        params: Iterable[Tensor],
        moments: Iterable[Iterable[Tensor]],
        copies: Iterable[Tensor],
        grads: Iterable[Tensor],
    ) -> list[Tensor]:
        """All tensors of the pass. `moments`: exp_avg, exp_avg_sq and step of each parameter."""
        return [*compress(experts, self._others), *params, *chain.from_iterable(moments), *copies, *grads]

    def run(self, tensors: list[Tensor], numbers: Numbers) -> None:
        """The first time."""
        self._plan = Plan(tensors, self._fields, self._group_sizes, self._options_of, self._num_grads)
        self._plan.remember(tensors, self._num_fixed)
        self._plan.run(tensors, [*map(Tensor.data_ptr, tensors)], numbers)

    def run_again(self, tensors: list[Tensor], numbers: Numbers) -> bool:
        """Whether it could: the tensors are as they were, and parameters and experts, which might overlap, in place."""
        addresses = None if self._plan is None else self._plan.addresses(tensors)
        if self._plan is None or addresses is None:
            return False
        self._plan.run(tensors, addresses, numbers)
        return True

    def dispatch(self, tensors: list[Tensor], numbers: Numbers, lrs: list[Tensor]) -> None:
        """As an operation, for who wants to see one."""
        none = torch.empty(0)
        rows = [[none if i < 0 else tensors[i] for i in row] for row in self._fields]
        device = functional.device_of(tensors)
        ops.adamw_(
            *(zip(*rows, strict=True) if rows else ((),) * 6),
            self._group_sizes,
            self._options_of,
            lrs,
            [*chain.from_iterable(numbers.options)],
            torch.tensor(numbers.share_rate, dtype=torch.float64, device=device_of_numbers(device)),
            numbers.grad_scale,
            numbers.found_inf,
            None if numbers.seed is None else checks.seed_tensor(numbers.seed, device),
        )


def device_of_numbers(device: torch.device) -> torch.device:
    """Where numbers go that change from step to step: a compiler may make a CUDA graph, which keeps the host's."""
    return device if torch.compiler.is_compiling() else torch.device("cpu")
