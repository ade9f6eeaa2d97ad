"""`replace_ffn_`: FFNs become experts, in place; `fold_`: the experts become FFNs again."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, checks
from ..modules import RandomPartitionMoE
from ..problem import SAVED
from ..train import shards
from .ffns import FFNSite, find_ffns
from .layout import copy_with_parameters, swap_modules_
from .pairs import Deal, PairedExperts
from .replaced import ReplacedFFN

INITS = ("copy", "independent")

Replaced = ReplacedFFN | PairedExperts


@dataclass(frozen=True)
class ReplacementReport:
    """What `replace_ffn_` did; `print(report)` shows it as a table.

    Attributes:
        replaced: names of the FFNs that were replaced.
        kept: names of replaceable FFNs that the filter left alone.
        skipped: name → reason, of what looks like an FFN and is not replaceable.
        forms: name → "fused", one layer in its place, or "pair", experts for each projection; of what was replaced.
    """

    replaced: tuple[str, ...]
    kept: tuple[str, ...]
    skipped: dict[str, str]
    forms: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [(name, " ".join(filter(None, ("replaced", self.forms.get(name))))) for name in self.replaced]
        rows += [(name, "kept by the filter") for name in self.kept]
        rows += [(name or "(model)", f"skipped: {reason}") for name, reason in self.skipped.items()]
        if not rows:
            return "no FFN found: ewa_kernels.register_ffn_adapter(…) teaches a class"
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {what}" for name, what in rows)


def replace_ffn_(
    model: nn.Module,
    num_experts: int = 4,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    init: str = "copy",
    backend: str = "auto",
    saved: str = "full",
) -> ReplacementReport:
    """Replaces FFNs of a model by random-partition experts, in place.

    An FFN that is a module of its own becomes a `RandomPartitionMoE`, "fused". Of a larger block, or with an activation
    that the kernels have not, each projection becomes experts, a "pair": two products with gather and scatter, and the
    block's own code between them.

    Make the optimizer after this call: the parameters are new ones. A module that stands in several places of
    the model is replaced in all of them by one layer. Only places that PyTorch knows are found: the FFN in a
    plain Python list of yours, or in another model too, stays there, without its parameters, and fails when it is
    called. A state dict of the model then has the dense weights, which are the mean, beside the experts; of a dense
    checkpoint all experts get the FFN's weights.

    Args:
        model: any module; `find_ffns` tells what is replaceable.
        num_experts: E.
        filter_fn: which of the replaceable FFNs; by default every other one, the second, fourth, … in module
            order, and of a model that has experts already, none.
        init: "copy": every expert starts as the FFN, so the model's eval output does not change.
            "independent": expert 0 is the FFN, the others are drawn afresh by the module's `reset_parameters`
            if it has one, else by those of its nn.Linear modules.
        backend: see `ewa_kernels.functional.moe_ffn`; a pair takes "auto" where it does not have the backend.
        saved: see there. What is between the two linear layers of a pair is kept by its block, as without experts.

    Returns:
        What was replaced, and what was not, and why. Warns if nothing was replaced.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of range. The model is as it was then, and so
            it is after any other error.
    """
    checks.size("num_experts", num_experts)
    checks.choice("init", init, INITS)
    checks.choice("backend", backend, backends.BACKENDS)
    checks.choice("saved", saved, SAVED)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a callable (name, module) -> bool, got {type(filter_fn).__name__}")
    sites = find_ffns(model)
    replaceable = [site for site in sites if site.skip_reason is None]
    if filter_fn is not None:
        chosen = [site for site in replaceable if filter_fn(site.name, site.module)]
    else:
        chosen = [] if replaced_in(model) else replaceable[1::2]
    for layer in stand_in_(model, [(site, num_experts) for site in chosen], init, backend):
        layer.release()
        if isinstance(layer, ReplacedFFN):
            layer.saved = saved
    report = ReplacementReport(
        replaced=tuple(site.name for site in chosen),
        kept=tuple(site.name for site in replaceable if site not in chosen),
        skipped={site.name: site.skip_reason for site in sites if site.skip_reason is not None},
        forms={site.name: site.form for site in chosen},
    )
    if not chosen:
        again = " more: it has experts already; fold_ it, or give a filter_fn" if replaced_in(model) else ""
        warnings.warn(f"replace_ffn_ replaced nothing{again}:\n{report}", stacklevel=2)
    return report


def replaced_in(model: nn.Module) -> dict[str, Replaced]:
    """What `replace_ffn_` put into a model, under each of its names."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, Replaced)}


def stand_in_(model: nn.Module, chosen: Sequence[tuple[FFNSite, int]], init: str, backend: str) -> list[Replaced]:
    """So many experts each in place of these FFNs, which keep their parameters until `release`."""
    new_of: dict[nn.Module, Replaced] = {}
    for site, num_experts in chosen:
        new_of.update(_experts_of(model, site, num_experts, init, backend))
    swap_modules_(model, new_of)
    return list(new_of.values())


@torch.inference_mode(False)
@torch.no_grad()
def _experts_of(
    model: nn.Module, site: FFNSite, num_experts: int, init: str, backend: str
) -> dict[nn.Module, Replaced]:
    """Of one site: each module that goes → what comes in its place."""
    assert site.projections is not None
    names = (*site.projections.up, site.projections.down)
    if site.layout is not None:
        layout = site.layout
        drawn = [layout.stack(dense) for dense in _drawn(model, site.name, site.module, num_experts, init)]
        return {site.module: ReplacedFFN(site.module, layout, _stacked(drawn), backend)}
    block = model.get_submodule(site.holder)
    deal = Deal(site.name, len(names) - 1, backend if backend in backends.IMPLEMENTED["expert_linear"] else "auto")
    experts: dict[nn.Module, Replaced] = {}
    for number, name in enumerate(names):
        linear = block.get_submodule(name)
        path = f"{site.holder}.{name}" if site.holder else name
        stacked = _stacked(list(_drawn(model, path, linear, num_experts, init)))
        experts[linear] = PairedExperts(linear, stacked, deal, number if number < len(names) - 1 else None)  # type: ignore[arg-type]
    return experts


def _stacked(drawn: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([expert[name] for expert in drawn]) for name in drawn[0]}


def _drawn(model: nn.Module, name: str, module: nn.Module, num_experts: int, init: str) -> Iterator[dict[str, Tensor]]:
    """The parameters of each expert, by the names of the module that they stand for."""
    first: dict[str, Tensor] = dict(module.named_parameters())
    initialise = _initialiser_around(model, name) if init == "independent" else None
    for e in range(num_experts):
        yield first if init == "copy" or e == 0 else dict(_drawn_afresh(module, initialise).named_parameters())


def _initialiser_around(model: nn.Module, name: str) -> Callable[[nn.Module], None] | None:
    """The nearest `_init_weights` that takes a module, as transformers and timm have it."""
    parts = name.split(".") if name else []
    for length in range(len(parts), -1, -1):
        method = getattr(model.get_submodule(".".join(parts[:length])), "_init_weights", None)
        if inspect.ismethod(method) and list(inspect.signature(method).parameters) in (["module"], ["m"]):
            return method
    return None


def _drawn_afresh(module: nn.Module, initialise: Callable[[nn.Module], None] | None) -> nn.Module:
    twin = copy_with_parameters(module, {name: torch.empty_like(p) for name, p in module.named_parameters()})
    reset = getattr(twin, "reset_parameters", None)
    if callable(reset) and not isinstance(module, nn.Linear):
        reset()
        return twin
    for name, linear in twin.named_modules():
        if isinstance(linear, nn.Linear):
            linear.reset_parameters()
            for which, parameter in linear.named_parameters():
                own = module.get_submodule(name).get_parameter(which)
                if not own.is_meta and not _as_linear_draws(own, linear.in_features):
                    std, mean = torch.std_mean(own.double(), correction=0)
                    parameter.normal_(mean.item(), std.item())
    if initialise is not None:
        twin.apply(initialise)
    return twin


def _as_linear_draws(parameter: Tensor, in_features: int) -> bool:
    """Whether it may be uniform in ±1/√in_features: of a normal tensor some of the numbers would be too large."""
    bound = in_features**-0.5
    return bool(parameter.abs().max() <= 1.001 * bound and parameter.double().std(correction=0) >= bound / 3)


# --- and back ---


def fold_(model: nn.Module) -> nn.Module:
    """Turns all random-partition experts into FFNs with their mean, in place, and returns the model.

    A model that went through `replace_ffn_` gets its architecture back: the very classes, attribute names,
    parameter order and `state_dict` keys. A `RandomPartitionMoE` of your own becomes an `ewa_kernels.FFN`.
    The model's output in eval mode does not change. The new parameters are in no optimizer, and hooks on a
    `RandomPartitionMoE` go with it.

    Raises:
        TypeError: `model` is not an nn.Module.
        TypeError: a subclass of RandomPartitionMoE has a forward of its own and no `fuse`.
        ValueError: `model` itself is a RandomPartitionMoE, or its experts are sharded. After any error the model is
            as it was.
    """
    checks.module("model", model)
    if isinstance(model, RandomPartitionMoE):
        raise ValueError("model must hold the RandomPartitionMoE layers, got one itself: use model.fuse()")
    layers = foldable(model)
    if any(shards.is_sharded(tensor) for layer in layers for tensor in layer.parameters()):
        raise ValueError(
            "model must not be sharded, whose other layers gather their parameters as they were: use "
            "ewa_kernels.integrations.fsdp.folded_state_dict(model), and load it into the original model"
        )
    fused = fuse_all(layers)  # all that can fail is done here
    swap_modules_(model, {m: m.restore(dense) if isinstance(m, Replaced) else dense for m, dense in fused.items()})
    return model


def folded_state_dict(model: nn.Module) -> dict[str, Any]:
    """`fold_(model).state_dict()`, but the model stays as it is.

    The layers are exchanged while the dict is made and put back then: do not run the model in another thread
    meanwhile.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    checks.module("model", model)
    if isinstance(model, RandomPartitionMoE):
        return model.fuse().state_dict()
    with folded(model):
        return model.state_dict()


def foldable(model: nn.Module) -> list[RandomPartitionMoE | PairedExperts]:
    """What `fold_` replaces."""
    return [module for module in model.modules() if isinstance(module, RandomPartitionMoE | PairedExperts)]


def fuse_all(layers: Iterable[RandomPartitionMoE | PairedExperts]) -> dict[Any, nn.Module]:
    """Each layer, and the dense module that it becomes."""
    with torch.inference_mode(False):
        return {layer: layer.fuse() for layer in layers}


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Dense modules stand in the places of the model's experts meanwhile."""
    fused = fuse_all(foldable(model))
    swap_modules_(model, fused)
    try:
        yield
    finally:
        swap_modules_(model, {dense: experts for experts, dense in fused.items()})
