"""Projections of a block that is no FFN alone: experts in place of each nn.Linear, and the block's own code between.

The up projection's experts leave rows grouped by expert; whatever the block does row by row, an activation, a GLU,
dropout, a norm, is the same on rows that were dealt; the down projection's experts put them back.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import calls, functional
from ..modules import ExpertLinear
from .carries import CarriesDense, Kept
from .layout import copy_modules
from .replaced import parameter_like, release_


class Begun(NamedTuple):
    """A deal between the first up projection and the down projection."""

    num_rows: int
    permutation: Tensor
    expert_offsets: Tensor
    used: tuple[int, ...]  # numbers of the up projections that have gathered


class Deal:
    """How the rows between the projections of a pair are dealt, anew each time the first up projection is called.

    Attributes:
        seed_offset: see `RandomPartitionMoE`.
    """

    def __init__(self, name: str, num_ups: int, backend: str):
        self.name, self.num_ups, self.backend, self.seed_offset = name, num_ups, backend, 0
        self._begun: dict[int, Begun] = {}  # by thread: a model may be run by several at once

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_begun": {}}

    def begin(self, number: int, x: Tensor, num_experts: int) -> Begun:
        """A new one, unless another up projection has begun just now."""
        num_rows, begun = num_rows_of(x), self._begun.get(_thread())
        if begun is None or number in begun.used or num_rows != begun.num_rows:
            seed = functional.draw_seed(x)
            seed = seed if self.seed_offset == 0 else seed ^ self.seed_offset
            permutation = functional.random_permutation(num_rows, seed, device=x.device)
            begun = Begun(
                num_rows, permutation, torch.arange(num_experts + 1, device=x.device) * num_rows // num_experts, ()
            )
        self._begun[_thread()] = begun = begun._replace(used=(*begun.used, number))
        return begun

    def end(self, hidden: Tensor) -> Begun:
        """The one that has begun, for the last time.

        Raises:
            RuntimeError: the up projections have not been called since the last time, or for other rows.
        """
        begun, num_rows = self._begun.pop(_thread(), None), num_rows_of(hidden)
        if begun is None or len(begun.used) != self.num_ups or num_rows != begun.num_rows:
            got = "none" if begun is None else f"{len(begun.used)} with {begun.num_rows} rows"
            raise RuntimeError(
                f"the down projection of {self.name or 'the model'} must get the rows that its {self.num_ups} up "
                f"projections gave, all in training mode, got {num_rows} rows after up projections: {got}"
            )
        return begun


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def num_rows_of(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


class PairedExperts(CarriesDense):
    """Experts in place of an nn.Linear that is one of a pair. Eval mode: their mean, as an nn.Linear computes.

    Attributes:
        experts: weight `[E, out, in]` and bias `[E, out]`.
        weight, bias: the mean, computed when asked for; writing into it changes nothing.
    """

    def __init__(self, linear: nn.Linear, experts: Mapping[str, Tensor], deal: Deal, number: int | None):
        """`experts`: weight and bias, stacked. `number`: of an up projection; None for the down projection."""
        super().__init__()
        self.in_features, self.out_features, self.deal, self.number = *linear.weight.shape[::-1], deal, number
        self.experts = ExpertLinear(1, 1, 1, linear.bias is not None, device="meta")
        for which in ("weight", "bias"):
            stacked, own = experts.get(which), getattr(linear, which)
            setattr(self.experts, which, None if stacked is None else parameter_like(stacked, own))
        self._origin = Kept(linear)
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:  # named as nn.Linear's
        if type(input) not in calls.PLAIN and (y := calls.of_another_kind(self, input)) is not NotImplemented:
            return y
        if "_pending" in self.__dict__:
            self.take_pending()
        if not self.training:
            means = self.merged_dense()
            return F.linear(input, means["weight"], means.get("bias"))
        weight, bias = self.experts(input)
        is_up = self.number is not None
        begun = self.deal.end(input) if self.number is None else self.deal.begin(self.number, input, len(weight))
        options: dict[str, Any] = {"gather": is_up, "scatter": not is_up, "backend": self.deal.backend}
        options |= {"permutation": begun.permutation, "expert_offsets": begun.expert_offsets}
        return functional.expert_linear(input, weight, bias, **options)

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script calls it, and would put into the model what it gives: the experts would be lost."""
        raise TypeError("torch.jit.script takes no PairedExperts: call ewa_kernels.fold_(model) before")

    @property
    def weight(self) -> Tensor:
        return functional.merge_experts(self.experts(None)[0])

    @property
    def bias(self) -> Tensor | None:
        bias = self.experts(None)[1]
        return None if bias is None else functional.merge_experts(bias)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias") and isinstance(value, Tensor):
            self.set_dense(name, value.detach())
        else:
            super().__setattr__(name, value)

    def dense_names(self) -> list[str]:
        return [name for name, _ in self._origin.module.named_parameters()]

    def stack(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"experts.{name}": tensor for name, tensor in dense.items()}

    def merged_dense(self) -> dict[str, Tensor]:
        named = {n: t for n, t in zip(("weight", "bias"), self.experts(None), strict=True) if t is not None}
        return dict(zip(named, functional.merge_all(list(named.values())), strict=True))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The nn.Linear that was replaced, of its own class, with the experts' mean; a copy."""
        self.take_pending()
        linear = copy_modules(self._origin.module)
        for which, mean in self.merged_dense().items():
            stacked, own = getattr(self.experts, which), getattr(self._origin.module, which)
            linear._parameters[which] = parameter_like(mean.clone(), own, stacked.requires_grad)
        return linear.train(self.training)

    def release(self) -> None:
        """Takes the memory of the nn.Linear that was replaced."""
        release_(self._origin.module)

    def restore(self, fused: nn.Module) -> nn.Module:
        """The very module that was replaced, with the parameters of `fused`."""
        self._origin.module._parameters.update(fused._parameters)
        return self._origin.module.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, number={self.number}"
