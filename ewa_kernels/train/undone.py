"""Whether an optimizer undoes averaging, as one does that writes parameters anew from copies of its own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import shards
from .lookup import Experts, flattened

_NUM_TENSORS, _NUM_VALUES = 4, 64  # of a sample
_NEAR = 0.2  # of the way that averaging moved a sample: as near as that it has come back to where it was
_ALIKE = 0.7  # share of a way whose sign is that of the gradient, or of its opposite


class Undone:
    """Compares a sample of the experts before averaging, after it, and after the optimizer's next step.

    Such an optimizer brings it back to where it was before averaging. Another does so only where training is in
    balance with averaging, and then by steps along the gradient. At few steps: the second, fourth, eighth, … It is seen
    as soon as averaging moves experts five times as far as the optimizer does: of experts that start as copies of one
    another that takes a while.
    """

    def __init__(self, optimizer: Optimizer):
        # Those of torch keep no copies.
        self._is_over = type(optimizer).__module__.startswith("torch.optim")
        self._num_steps = 0
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []
        self._grads: list[Tensor] = []

    def is_due(self, share_rate: float) -> bool:
        """Whether the two below are to be called around this averaging."""
        if share_rate == 0:
            self._after = []
            return False
        self._num_steps += 1
        return not self._is_over and (len(self._after) > 0 or self._is_sampled())

    def _is_sampled(self) -> bool:
        return self._num_steps & (self._num_steps + 1) == 0  # the next number is a power of two

    def before_step(self, experts: Sequence[Experts]) -> None:
        if self._after:
            self._grads = [*map(_gradient, _chosen(experts))]

    def before_averaging(self, experts: Sequence[Experts], kind: str) -> None:
        chosen = _chosen(experts)
        now, grads = [*map(_sample, chosen)], [*map(_gradient, chosen)]
        if self._after and [*map(len, now)] == [*map(len, self._before)] == [*map(len, self._grads)]:
            # It may have been computed, or cleared, by the step.
            grad = torch.where(torch.cat(grads) != 0, torch.cat(grads), torch.cat(self._grads))
            eps = torch.cat([torch.full_like(v, torch.finfo(t.dtype).eps) for v, t in zip(now, chosen, strict=True)])
            self._judge(torch.cat(now), grad, eps, kind)
        self._before, self._after, self._grads = now, [], []

    def after_averaging(self, experts: Sequence[Experts]) -> None:
        if self._is_sampled():
            self._after = [*map(_sample, _chosen(experts))]

    def _judge(self, now: Tensor, grad: Tensor, eps: Tensor, kind: str) -> None:
        before, way = torch.cat(self._before), torch.cat(self._before) - torch.cat(self._after)
        moved = way.abs() > 8 * eps * before.abs()  # by more than what rounding does
        if moved.sum() < 16 or not (now - before)[moved].norm() <= _NEAR * way[moved].norm():
            return
        lengths = way[moved].abs() / way[moved].abs().sum()
        along = [float(lengths[(sign * grad * way)[moved] > 0].sum()) for sign in (1, -1)]
        if max(along) < _ALIKE:
            self._is_over = True
            warnings.warn(
                f"the {kind} attached to undoes averaging: after its step experts are where they were before they were "
                "averaged, as if it wrote them from copies of its own (master weights). Give ExpertAverager these "
                "copies too, beside the parameters: an iterable of both, stacked or as lists of experts",
                stacklevel=2,
            )


def _chosen(experts: Sequence[Experts]) -> list[Tensor]:
    """Parameters, whose gradients are known."""
    tensors = [t for t in flattened(experts)[0] if t.is_leaf and t.requires_grad and t.numel() > 0]
    return tensors[:: max(len(tensors) // _NUM_TENSORS, 1)][:_NUM_TENSORS]


def _sample(tensor: Tensor) -> Tensor:
    values = shards.local(tensor).detach().reshape(-1)
    return values[:: max(len(values) // _NUM_VALUES, 1)][:_NUM_VALUES].to("cpu", torch.float64)


def _gradient(parameter: Tensor) -> Tensor:
    """A sample at the same places; 0 where there is none."""
    none = torch.zeros_like(_sample(parameter))
    if parameter.grad is None or parameter.grad.is_sparse:
        return none
    grad = _sample(parameter.grad)
    return grad if grad.shape == none.shape else none
