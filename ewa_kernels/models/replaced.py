"""`ReplacedFFN`: the experts in place of an FFN of a model, which they can become again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import calls, checks, private_torch
from ..modules import RandomPartitionMoE, mean_of
from .carries import CarriesDense, DenseProjection, Kept
from .layout import FFNLayout, Rate, copy_modules, copy_with_parameters, is_default, rate_in


class ReplacedFFN(CarriesDense, RandomPartitionMoE):
    """The experts in place of an FFN, which they can become again.

    The FFN is kept, outside the module tree; `release` takes its memory. Its nn.Dropout modules are this layer's, so
    that whoever sets their rates in a loop over the model sets them here.
    """

    def __init__(self, ffn: nn.Module, layout: FFNLayout, experts: Mapping[str, Tensor], backend: str):
        """`experts`: up.weight, up.bias, down.weight, down.bias, stacked; absent where the FFN has none."""
        num_experts, d_model, d_ff = experts["down.weight"].shape
        options: dict[str, Any] = {"activation": layout.activation, "gated": layout.gated, "backend": backend}
        super().__init__(d_model, d_ff, num_experts, device="meta", **options)
        self.layout = layout
        self._origin = Kept(ffn)
        self._arguments = [(p.name, p.default) for p in inspect.signature(ffn.forward).parameters.values()]
        for name, projection in (("up", layout.up[0]), ("down", layout.down)):
            linear = ffn.get_submodule(projection)
            for which in ("weight", "bias"):
                stacked = experts.get(f"{name}.{which}")
                own = getattr(linear, which)
                setattr(getattr(self, name), which, None if stacked is None else parameter_like(stacked, own))
        for name, rate in (("drop", layout.dropout), ("output_drop", layout.output_dropout)):
            if rate is not None and isinstance(module := ffn.get_submodule(rate[0]), nn.Dropout):
                self.add_module(name, module)
        self.train(ffn.training)

    @property
    def dropout(self) -> float:
        """The rate with which the FFN drops hidden, as it is now."""
        return self._rate("drop", self.layout.dropout)

    @dropout.setter
    def dropout(self, rate: float) -> None:
        checks.probability("dropout", rate)
        if self.layout.dropout is None:
            raise ValueError(f"dropout must be 0 where the FFN has none, got {rate}")
        module, attribute = self.layout.dropout
        setattr(self._origin.module.get_submodule(module), attribute, rate)

    @property
    def output_dropout(self) -> float:
        """The rate with which it drops its output."""
        return self._rate("output_drop", self.layout.output_dropout)

    def _rate(self, name: str, rate: Rate | None) -> float:
        if name in self._modules:  # or what somebody has put in its place
            return getattr(self._modules[name], "p", 0.0)
        return rate_in(self._origin.module, rate)

    def forward(self, x: Tensor | None = None, *more: Any, seed: int | Tensor | None = None, **named: Any) -> Tensor:
        """As `RandomPartitionMoE`; x may have the name that it has in the FFN's own forward.

        What else the FFN's forward takes may be given as long as it says nothing: its default.
        """
        if x is None or more or named:
            x = self._only_x(x, more, named)
        if type(x) not in calls.PLAIN and (y := calls.of_another_kind(self, x, seed=seed)) is not NotImplemented:
            return y
        if "_pending" in self.__dict__:
            self.take_pending()
        y = super().forward(x, seed=seed)
        if self.training and (rate := self.output_dropout):
            return F.dropout(y, rate)
        return y

    def _only_x(self, x: Tensor | None, more: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        (first, _), *others = self._arguments
        if x is None:
            x = named.pop(first, None)
        named |= {name: value for (name, _), value in zip(others, more, strict=False) if name not in named}
        defaults = dict(others)
        told = [name for name, value in named.items() if name not in defaults or not is_default(value, defaults[name])]
        if x is None or told or len(more) > len(others):
            got = ", ".join(told) or ("none" if x is None else "more arguments than its forward has")
            raise TypeError(f"x must be given, or {first}, and but for seed nothing else, got {got}")
        return x

    def __getattr__(self, name: str) -> Any:
        layout = self.__dict__.get("layout")
        names = () if layout is None else (*layout.up, layout.down)
        if name not in self.__dict__["_modules"] and any(path.partition(".")[0] == name for path in names):
            named = self._origin.module.get_submodule(name).named_parameters()
            return DenseProjection(self, name, dict(named))
        return super().__getattr__(name)

    def dense_names(self) -> list[str]:
        had = self.layout.dense_names
        of_origin = dict(self._origin.module.named_parameters())
        return [name for name in had if name in of_origin]

    def stack(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.layout.stack(dense)

    def merged_dense(self) -> dict[str, Tensor]:
        """The mean expert under the names of the FFN; differentiable."""
        names = ("up.weight", "up.bias", "down.weight", "down.bias")
        means = zip(names, mean_of(self.experts), strict=True)
        return self.layout.unstack({name: mean for name, mean in means if mean is not None})

    def forward_mean(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or private_torch.is_jit_traced():
            return self.layout.forward(self.merged_dense(), x)
        # The FFN's own code, so that folding changes no bit of the output; in a copy, which other threads and a
        # forward that writes into its module cannot disturb.
        ffn = copy_modules(self._origin.module).eval()
        return torch.func.functional_call(ffn, self.merged_dense(), (x,), strict=True)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The FFN that was replaced, of its own class, with the experts' mean; a copy that shares no parameter."""
        self.take_pending()
        origin = self._origin.module
        ffn = copy_with_parameters(origin, {name: mean.clone() for name, mean in self.merged_dense().items()})
        for experts, projections in ((self.up, self.layout.up), (self.down, (self.layout.down,))):
            for which in ("weight", "bias"):
                stacked = getattr(experts, which)
                for projection in projections if stacked is not None else ():
                    parameter = getattr(ffn.get_submodule(projection), which)
                    parameter.requires_grad_(stacked.requires_grad)
                    vars(parameter).update(vars(getattr(origin.get_submodule(projection), which)))
        return ffn.train(self.training)

    def release(self) -> None:
        """Takes the memory of the FFN that was replaced: nothing in the model needs it."""
        for projection in (*self.layout.up, self.layout.down):
            release_(self._origin.module.get_submodule(projection))

    def restore(self, fused: nn.Module) -> nn.Module:
        """The very module that was replaced, with the parameters of `fused`."""
        for name in (*self.layout.up, self.layout.down):
            self._origin.module.get_submodule(name)._parameters.update(fused.get_submodule(name)._parameters)
        return self._origin.module.train(self.training)


def parameter_like(tensor: Tensor, own: nn.Parameter, requires_grad: bool | None = None) -> nn.Parameter:
    """With the attributes of the one in whose place it comes, and its `requires_grad` unless that is given."""
    parameter = nn.Parameter(tensor, own.requires_grad if requires_grad is None else requires_grad)
    vars(parameter).update(vars(own))
    return parameter


def release_(linear: nn.Module) -> None:
    """Takes the memory of its parameters."""
    for which, parameter in linear._parameters.items():
        if parameter is not None:
            linear._parameters[which] = parameter_like(torch.empty_like(parameter, device="meta"), parameter)
