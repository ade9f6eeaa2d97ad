"""`replace_ffn_`: FFNs become `RandomPartitionMoE` layers, in place."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ewa_kernels.backends as backends
import ewa_kernels.checks as checks
from ewa_kernels.surgery.joined import forbid_nested_tensors_
from ewa_kernels.surgery.layout import copy_with_parameters, swap_modules_
from ewa_kernels.surgery.pretrained import guard_save_pretrained
from ewa_kernels.surgery.replaced import ReplacedFFN
from ewa_kernels.surgery.sites import FFNSite, find_ffns

INITS = ("copy", "independent")


@dataclass(frozen=True)
class ReplacementReport:
    """What `replace_ffn_` did; `print(report)` shows it as a table.

    Attributes:
        replaced: names of the FFNs that were replaced.
        kept: names of replaceable FFNs that the filter left alone.
        skipped: name → reason, of what looks like an FFN and is not replaceable.
    """

    replaced: tuple[str, ...]
    kept: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        rows = [(name, "replaced") for name in self.replaced]
        rows += [(name, "kept by the filter") for name in self.kept]
        rows += [(name or "(model)", f"skipped: {reason}") for name, reason in self.skipped.items()]
        if not rows:
            return "no FFN found"
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {what}" for name, what in rows)


def replace_ffn_(
    model: nn.Module,
    num_experts: int = 4,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    init: str = "copy",
    backend: str = "auto",
) -> ReplacementReport:
    """Replaces FFNs of a model by `RandomPartitionMoE` layers, in place.

    Make the optimizer after this call: the parameters are new ones. A module that stands in several places of
    the model is replaced in all of them by one layer. Only places that PyTorch knows are found: the FFN in a
    plain Python list of yours, or in another model too, stays there, without its parameters, and fails when it is
    called. What rate its dropouts have is read now: later it is `layer.dropout` that counts.

    Args:
        model: any module; `find_ffns` tells what is replaceable.
        num_experts: E.
        filter_fn: which of the replaceable FFNs; by default every other one, the second, fourth, … in module
            order.
        init: "copy": every expert starts as the FFN, so the model's eval output does not change.
            "independent": expert 0 is the FFN, the others are drawn afresh by the module's `reset_parameters`
            if it has one, else by those of its nn.Linear modules.
        backend: see `ewa_kernels.functional.moe_ffn`.

    Returns:
        What was replaced, and what was not, and why. Warns if nothing was replaced.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of range. The model is as it was then, and so
            it is after any other error.
    """
    checks.size("num_experts", num_experts)
    checks.choice("init", init, INITS)
    checks.choice("backend", backend, backends.BACKENDS)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a callable (name, module) -> bool, got {type(filter_fn).__name__}")
    sites = find_ffns(model)
    replaceable = [site for site in sites if site.skip_reason is None]
    if filter_fn is None:
        chosen = replaceable[1::2]
    else:
        chosen = [site for site in replaceable if filter_fn(site.name, site.module)]
    for layer in stand_in_(model, [(site, num_experts) for site in chosen], init, backend):
        layer.release()
    report = ReplacementReport(
        replaced=tuple(site.name for site in chosen),
        kept=tuple(site.name for site in replaceable if site not in chosen),
        skipped={site.name: site.skip_reason for site in sites if site.skip_reason is not None},
    )
    if not chosen:
        warnings.warn(f"replace_ffn_ replaced nothing:\n{report}", stacklevel=2)
    return report


def stand_in_(model: nn.Module, chosen: Sequence[tuple[FFNSite, int]], init: str, backend: str) -> list[ReplacedFFN]:
    """So many experts each in place of these FFNs, which keep their parameters until `release`."""
    pairs = [(site, _experts_of(model, site, num_experts, init, backend)) for site, num_experts in chosen]
    swap_modules_(model, {site.module: layer for site, layer in pairs if site.block is None})
    for site, layer in pairs:
        if site.block is not None:
            layer.place_in_(site)
    forbid_nested_tensors_(model)
    guard_save_pretrained(model)
    return [layer for _, layer in pairs]


@torch.inference_mode(False)
@torch.no_grad()
def _experts_of(model: nn.Module, site: FFNSite, num_experts: int, init: str, backend: str) -> ReplacedFFN:
    assert site.layout is not None
    ffn = site.ffn
    first = site.layout.stack(dict(ffn.named_parameters()))
    if init == "copy":
        experts = [first] * num_experts
    else:
        initialise = _initialiser_around(model, site.name)
        fresh = (dict(_drawn_afresh(ffn, initialise).named_parameters()) for _ in range(1, num_experts))
        experts = [first, *(site.layout.stack(parameters) for parameters in fresh)]
    stacked = {name: torch.stack([expert[name] for expert in experts]) for name in first}
    return ReplacedFFN(ffn, site.layout, stacked, backend)


def _initialiser_around(model: nn.Module, name: str) -> Callable[[nn.Module], None] | None:
    """The nearest `_init_weights` that takes a module, as transformers and timm have it."""
    parts = name.split(".") if name else []
    for length in range(len(parts), -1, -1):
        method = getattr(model.get_submodule(".".join(parts[:length])), "_init_weights", None)
        if inspect.ismethod(method) and list(inspect.signature(method).parameters) in (["module"], ["m"]):
            return method
    return None


def _drawn_afresh(ffn: nn.Module, initialise: Callable[[nn.Module], None] | None) -> nn.Module:
    twin = copy_with_parameters(ffn, {name: torch.empty_like(p) for name, p in ffn.named_parameters()})
    reset = getattr(twin, "reset_parameters", None)
    if callable(reset):
        reset()
        return twin
    for name, linear in twin.named_modules():
        if isinstance(linear, nn.Linear):
            linear.reset_parameters()
            for which, parameter in linear.named_parameters():
                own = ffn.get_submodule(name).get_parameter(which)
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
