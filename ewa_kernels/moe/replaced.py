"""What stands in a model after `replace_moe_`: stacked experts, and blocks whose forward goes through the kernels."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ewa_kernels.functional as functional
from ewa_kernels.modules import FFN, StackedExperts
from ewa_kernels.moe.blocks import BlockFormula
from ewa_kernels.moe.stacked import random_partition_forward, routed_forward
from ewa_kernels.surgery.layout import FFNLayout
from ewa_kernels.surgery.pretrained import guard_save_pretrained

_FORMULA = "_ewa_formula"


@dataclass
class _Origin:
    """Not the list itself, because a module in an attribute would become part of the module tree."""

    members: nn.Module
    layout: FFNLayout


class ExpertStack(StackedExperts):
    """The experts of a block, stacked, in place of its list of them.

    Attributes:
        routed: whether the router's choices count, or the tokens are dealt at random; may be changed at any time.
        output_dropout: probability with which an element of what an expert gives is dropped in training.
        up.weight, up.bias, down.weight, down.bias: see `RandomPartitionMoE`.
    """

    def __init__(
        self, origin: nn.Module, layout: FFNLayout, experts: Mapping[str, nn.Parameter], *, routed: bool, backend: str
    ):
        """`experts`: up.weight, up.bias, down.weight, down.bias, stacked; absent where there are none."""
        num_experts, d_model, d_ff = experts["down.weight"].shape
        super().__init__(
            d_model,
            d_ff,
            num_experts,
            activation=layout.activation,
            gated=layout.gated,
            dropout=layout.dropout,
            device="meta",
            backend=backend,
        )
        self.routed, self.output_dropout = routed, layout.output_dropout
        self._origin = _Origin(_without_memory(origin), layout)
        for name in ("up", "down"):
            for which in ("weight", "bias"):
                setattr(self.get_submodule(name), which, experts.get(f"{name}.{which}"))
        self.train(origin.training)

    def forward(self, x: Tensor, choices: Tensor, routing_weights: Tensor) -> Tensor:
        """`[T, D]` → `[T, D]`. choices and routing_weights, `[T, k]`, count only if `routed`."""
        if not (self.routed or self.training):
            return self.forward_mean(x)
        dropout_p = self.dropout if self.training else 0.0
        options: dict[str, Any] = {
            "activation": self.activation,
            "gated": self.gated,
            "dropout_p": dropout_p,
            "backend": self.backend,
        }
        if not self.routed:
            y = functional.moe_ffn(x, *self.experts, seed=self.draw_seed(x), **options)
            return F.dropout(y, self.output_dropout, self.training)
        options["seed"] = self.draw_seed(x) if dropout_p > 0 else 0
        permutation, expert_offsets = functional.partition_by_expert(choices, self.num_experts)
        options |= {"permutation": permutation, "expert_offsets": expert_offsets}
        if not (self.output_dropout and self.training):
            return functional.grouped_ffn(x, *self.experts, routing_weights=routing_weights, **options)
        # Each choice's output has a dropout of its own.
        top_k = choices.shape[1]
        y = functional.grouped_ffn(x.repeat_interleave(top_k, dim=0), *self.experts, **options)
        y = F.dropout(y, self.output_dropout).reshape(-1, top_k, self.d_model)
        return (y * routing_weights.unsqueeze(-1)).sum(dim=1)

    @torch.no_grad()
    def restored(self) -> nn.Module:
        """A list like the one that was replaced, with these parameters; shares no memory."""
        members, layout = self._origin.members, self._origin.layout
        named = dict(self.named_parameters())
        for e, member in enumerate(members.children()):
            for name, value in layout.unstack({name: stacked[e] for name, stacked in named.items()}).items():
                which = "up" if name.rpartition(".")[0] in layout.up else "down"
                requires_grad = named[f"{which}.{name.rpartition('.')[2]}"].requires_grad
                _set_parameter(member, name, nn.Parameter(value.clone(), requires_grad=requires_grad))
        return members.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, routed={self.routed}, output_dropout={self.output_dropout}"


def _without_memory(members: nn.Module) -> nn.Module:
    """A copy on the meta device: the list itself may be held by others, too."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in members.parameters()
    }
    return copy.deepcopy(members, cast(dict[int, Any], empty))


class MeanExpert(FFN):
    """The one expert that is left after `fold_moe_`. It is called as the experts were, whatever the router says."""

    output_dropout = 0.0
    _ewa_not_loadable = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        guard_save_pretrained()  # in another process, too

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        experts: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
        options: Any,
    ) -> MeanExpert:
        """`experts` stacked as in `ewa_kernels.functional`; `options` has activation, gated and perhaps dropouts."""
        _, d_model, d_ff = experts[2].shape
        ffn = cls(d_model, d_ff, activation=options.activation, gated=options.gated, device="meta")
        ffn.dropout = getattr(options, "dropout", 0.0)
        ffn.output_dropout = getattr(options, "output_dropout", 0.0)
        for linear, (weight, bias) in ((ffn.up, experts[:2]), (ffn.down, experts[2:])):
            for name, stacked in (("weight", weight), ("bias", bias)):
                dense = None
                if stacked is not None:
                    mean = functional.merge_experts(stacked).contiguous()
                    dense = nn.Parameter(mean, requires_grad=stacked.requires_grad)
                linear.register_parameter(name, dense)
        return ffn

    def forward(self, x: Tensor, choices: Tensor | None = None, routing_weights: Tensor | None = None) -> Tensor:
        return F.dropout(super().forward(x), self.output_dropout, self.training).to(x.dtype)


def _same(value: Any, default: Any) -> bool:
    return value is default or (
        isinstance(value, (bool, int, float, str)) and (type(value), value) == (type(default), default)
    )


def _block_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # What the block's own code would be given anyway says nothing.
    names, defaults = type(block)._ewa_optional  # type: ignore[attr-defined]
    named = [*kwargs.items(), *zip(names, args[1:], strict=False)]
    given = [*args[:1], *(value for name, value in named if name not in defaults or not _same(value, defaults[name]))]
    given += args[1 + len(names) :]
    if len(given) != 1 or not isinstance(given[0], Tensor):
        kinds = ", ".join(type(value).__name__ for value in given)
        raise TypeError(f"{type(block).__name__} must get one Tensor after replace_moe_, got {kinds or 'nothing'}")
    formula = formula_of_block(block)
    formula.check_settings(block)
    return formula.forward(block, given[0], block.get_submodule(formula.experts))


_FORWARDS: dict[str, Callable[..., Any]] = {
    "routed": routed_forward,
    "random_partition": random_partition_forward,
    "block": _block_forward,
}


_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def _switched_class(base: type[nn.Module], to: str) -> type[nn.Module]:
    """A subclass of `base`, by whose name it goes, with another forward; the same one at each call."""
    if (base, to) in _classes:
        return _classes[base, to]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _FORWARDS[to](self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        plain = tuple(base.__reduce_ex__(self, protocol))
        return (_new, (base, to), *plain[2:])

    original = getattr(base.forward, "__wrapped__", None)
    if original is not None:
        forward.__wrapped__ = original  # type: ignore[attr-defined]
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    ours = {"forward": forward, "__reduce_ex__": reduce, "_ewa_switched": (base, to), "_ewa_optional": _optional(base)}
    _classes[base, to] = type(base.__name__, (base,), {**names, **ours})
    return _classes[base, to]


def _optional(base: type[nn.Module]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of what a forward takes after the tokens, in order, and the defaults of these."""
    parameters = list(inspect.signature(base.forward).parameters.values())[2:]
    by_place = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    return by_place, {p.name: p.default for p in parameters if p.default is not p.empty}


def _new(base: type[nn.Module], to: str) -> nn.Module:
    cls = _switched_class(base, to)
    return cls.__new__(cls)


def switched(module: nn.Module) -> str | None:
    """What `switch_` made of it: "routed", "random_partition", "block", or None."""
    of_class: tuple[Any, str | None] = getattr(type(module), "_ewa_switched", (None, None))
    return of_class[1]


def has_forward_of_its_own(module: nn.Module) -> bool:
    """Whether a forward in its attributes hides that of its class.

    transformers 4 leaves the class's own there after a call, as an attribute; that one may go.
    """
    forward = vars(module).get("forward")
    func, owner = getattr(forward, "__func__", None), getattr(forward, "__self__", None)
    return forward is not None and not (owner is module and func is type(module).forward)


def _drop_forward(module: nn.Module) -> None:
    if not has_forward_of_its_own(module):
        vars(module).pop("forward", None)


def switch_(module: nn.Module, to: str) -> None:
    """Gives a module another forward, "routed" or "random_partition", and leaves all else, isinstance included."""
    base = getattr(type(module), "_ewa_switched", (type(module), None))[0]
    _drop_forward(module)
    module.__class__ = _switched_class(base, to)


def switch_block_(block: nn.Module, formula: BlockFormula, experts: nn.Module) -> None:
    """Gives a block our forward, and these experts in place of its list of them."""
    place_(block, formula.experts, experts)
    setattr(block, _FORMULA, formula)
    switch_(block, "block")


def restore_(module: nn.Module) -> None:
    """Gives a module that was switched its own forward again."""
    _drop_forward(module)
    module.__class__ = type(module)._ewa_switched[0]  # type: ignore[attr-defined]
    module.__dict__.pop(_FORMULA, None)


def formula_of_block(block: nn.Module) -> BlockFormula:
    return getattr(block, _FORMULA)


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent)._parameters[leaf] = parameter


def place_(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent)._modules[leaf] = child
