"""`find_ffns`: every FFN of a model, with the reason where it cannot be replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .. import checks
from ..modules import RandomPartitionMoE
from .carries import CarriesDense
from .execution import layout_of
from .experts import held_by, members_of_lists
from .ffn_adapters import (
    NotReplaceableError,
    Projections,
    at,
    check_place,
    holder_of,
    linears_in,
    projections_of,
)
from .layout import FFNLayout
from .pair_execution import check_pair

_REPLACED = (CarriesDense, RandomPartitionMoE)


@dataclass(frozen=True)
class FFNSite:
    """One FFN of a model.

    Attributes:
        name: where `model.named_modules()` meets it first.
        module: itself, or the block that holds its projections.
        kind: which adapter or rule knows it.
        skip_reason: why it is not replaceable, None if it is.
        layout: what it computes, of an FFN that the fused layer replaces; None of all others.
        projections: where its projections are, in `holder`.
        holder: of a pair: name of the module whose forward was run.
    """

    name: str
    module: nn.Module
    kind: str
    skip_reason: str | None = None
    layout: FFNLayout | None = None
    projections: Projections | None = None
    holder: str = ""

    @property
    def form(self) -> str:
        """What stands in its place: one layer, "fused", or experts for each projection, a "pair"."""
        return "fused" if self.layout is not None else "pair"


def find_ffns(model: nn.Module) -> list[FFNSite]:
    """All FFNs of a model in module order, replaceable or not; the model is not touched.

    What adapters and rules take for an FFN is run, as a copy with random parameters: it is replaceable only if output
    and gradients are the same before and after.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    checks.module("model", model)
    return list(_Search(model).sites())


class _Search:
    def __init__(self, model: nn.Module):
        self.model = model
        self.holders = held_by(model)
        self.members = members_of_lists(model)

    def sites(self) -> Iterator[FFNSite]:
        inside: tuple[str, ...] = ()
        used: set[nn.Module] = set()  # projections of sites
        for name, module in self.model.named_modules():
            if name.startswith(inside):
                continue
            if isinstance(module, _REPLACED):
                inside += (f"{name}.",)
                if getattr(module, "number", 0) == 0:
                    yield FFNSite(name, module, type(module).__name__, "has experts already")
                continue
            if isinstance(module, torch.jit.ScriptModule):
                inside += (f"{name}.",)
                yield FFNSite(
                    name, module, type(module).__name__, "is a script: call replace_ffn_ before torch.jit.script"
                )
                continue
            projections = projections_of(module)
            if projections is None:
                continue
            linears = {at(module, path) for path in (*projections.up, projections.down)}
            if linears & used or any(isinstance(linear, _REPLACED) for linear in linears):
                continue
            site = self._site(name, module, projections)
            if site.skip_reason is None:
                used |= {linear for linear in linears if linear is not None}
            if site.layout is not None:
                inside += (f"{site.name}.",)  # nothing inside an FFN is one
            yield site

    def _site(self, name: str, module: nn.Module, projections: Projections) -> FFNSite:
        """The fused layer's if it can be, else a pair."""
        holder = holder_of(self.model, name)
        inner = name.removeprefix(holder).removeprefix(".")
        dot = f"{inner}." if inner else ""
        of_holder = Projections(projections.kind, tuple(dot + up for up in projections.up), dot + projections.down)
        site = partial(FFNSite, name, module, projections.kind, projections=of_holder, holder=holder)
        block = self.model.get_submodule(holder)
        try:
            if module in self.members:
                raise NotReplaceableError(self.members[module])
            check_place(self.model, name)
            self._check_projections(name, block, of_holder)
        except NotReplaceableError as error:
            return site(skip_reason=str(error))
        refusals = []
        try:
            self._check_whole(holder, block, of_holder)
            layout = layout_of(block, of_holder.up, of_holder.down)
            return FFNSite(holder, block, projections.kind, layout=layout, projections=of_holder)
        except NotReplaceableError as error:
            refusals.append(str(error))
        except Exception as error:  # of foreign code: one odd module must not hide all others
            refusals.append(f"cannot be examined: {type(error).__name__}: {error}")
        try:
            check_pair(block, of_holder)
            return site()
        except NotReplaceableError as error:
            refusals.append(f"as a pair of projections it {error}")
        except Exception as error:
            refusals.append(f"cannot be examined: {type(error).__name__}: {error}")
        return site(skip_reason="; ".join(refusals))

    def _check_projections(self, name: str, block: nn.Module, projections: Projections) -> None:
        """What must be so of projections that experts are to stand for, whatever is between them."""
        if name.rpartition(".")[2] == "_orig_mod":
            raise NotReplaceableError("is compiled: call replace_ffn_ before torch.compile")
        names = (*projections.up, projections.down)
        self._check_not_shared(block, names)
        linears = [_linear(block, name) for name in names]
        if block._compiled_call_impl is not None or any(linear._compiled_call_impl is not None for linear in linears):
            raise NotReplaceableError("is compiled: call replace_ffn_ before compile()")
        *ups, down = linears
        d_model, rows = ups[0].in_features, sum(linear.out_features for linear in ups)
        if down.out_features != d_model:
            raise NotReplaceableError(f"maps {d_model} to {down.out_features} features, not to as many")
        if rows not in (down.in_features, 2 * down.in_features) or len({up.weight.shape for up in ups}) > 1:
            raise NotReplaceableError(
                f"its up projection gives {rows} features, its down projection takes {down.in_features}"
            )
        parameters = [p for linear in linears for p in linear.parameters()]
        for what in ("dtype", "device"):
            values = {str(getattr(p, what)) for p in parameters}
            if len(values) > 1:
                raise NotReplaceableError(f"has parameters of more than one {what}: {', '.join(sorted(values))}")
        if not parameters[0].is_floating_point():
            raise NotReplaceableError(f"has {parameters[0].dtype} parameters")
        for which in ("weight", "bias"):
            if len({None if (p := getattr(up, which)) is None else p.requires_grad for up in ups}) > 1:
                raise NotReplaceableError(f"its up projections differ in {which}: frozen, or missing")
        if len({linear.training for linear in linears}) > 1:
            raise NotReplaceableError("is in training mode in part only")
        if (reason := why_hooked(dict(zip(names, linears, strict=True)))) is not None:
            raise NotReplaceableError(reason)

    def _check_not_shared(self, block: nn.Module, names: tuple[str, ...]) -> None:
        """Neither the projections of these names, nor the modules that hold them inside the block, nor parameters."""
        for name in names:
            parts = name.split(".")
            for i in range(1, len(parts) + 1):
                held = at(block, path := ".".join(parts[:i]))
                if held is not None and self.holders[id(held)] > 1:
                    raise NotReplaceableError(f"shares with another module: {path}")
            for which, parameter in () if held is None else held._parameters.items():
                if parameter is not None and self.holders[id(parameter)] > 1:
                    raise NotReplaceableError(f"shares with another module: {name}.{which}")

    def _check_whole(self, holder: str, module: nn.Module, projections: Projections) -> None:
        """What must be so of a module that one layer is to stand for, before it is even run."""
        if holder == "":
            raise NotReplaceableError("is the model itself: nothing holds it that could hold another")
        known = {f"{name}.{which}" for name in (*projections.up, projections.down) for which in ("weight", "bias")}
        others = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name not in known]
        if others or len(linears_in(module)) != len(projections.up) + 1:
            raise NotReplaceableError(f"has other parameters or buffers: {', '.join(others) or 'of an nn.Linear'}")
        if len({child.training for child in module.modules()}) > 1:
            raise NotReplaceableError("is in training mode in part only")
        if any(child._compiled_call_impl is not None for child in module.modules()):
            raise NotReplaceableError("is compiled: call replace_ffn_ before compile()")
        if (reason := why_hooked(dict(module.named_modules()))) is not None:
            raise NotReplaceableError(reason)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = at(module, name)
    if linear is None:
        raise NotReplaceableError(f"has no module {name!r}")
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        own = type(linear).__name__
        named = f"{type(linear).__module__}.{own}" if own == "Linear" else own
        raise NotReplaceableError(f"{name} is a {named}, not an nn.Linear")
    for which, parameter in linear._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            kind = type(parameter).__name__
            raise NotReplaceableError(f"{name}.{which} is a {kind}, not a plain Parameter")
    if linear._parameters.get("weight") is None:
        raise NotReplaceableError(f"{name}.weight is no Parameter: it is computed from others")
    return linear


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def _has_hooks(held: nn.Module | nn.Parameter, kinds: tuple[str, ...]) -> bool:
    return any(getattr(held, hooks, None) for hooks in kinds)


def why_hooked(modules: Mapping[str, nn.Module]) -> str | None:
    """The reason not to take these modules away, or their parameters; None if nobody has registered a hook there."""
    hooked = [name or "it" for name, module in modules.items() if _has_hooks(module, _HOOKS)]
    for name, module in modules.items():
        dot = f"{name}." if name else ""
        own = module._parameters.items()
        hooked += [f"{dot}{which}" for which, p in own if p is not None and _has_hooks(p, _PARAMETER_HOOKS)]
    return f"has hooks that would be lost, on {', '.join(hooked)}" if hooked else None
