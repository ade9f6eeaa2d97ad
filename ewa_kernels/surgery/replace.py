"""`replace_ffn_`: FFNs become `RandomPartitionMoE` layers, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewa_kernels import backends, functional
from ewa_kernels.modules import RandomPartitionMoE
from ewa_kernels.surgery.layout import FFNLayout, copy_with_parameters, swap_modules_
from ewa_kernels.surgery.sites import FFNSite, find_ffns

INITS = ("copy", "independent")


@dataclass
class _Origin:
    """Not the module itself, because a module in an attribute would become part of the module tree."""

    ffn: nn.Module  # in eval mode, parameters on the meta device: it takes no memory
    layout: FFNLayout


class ReplacedFFN(RandomPartitionMoE):
    """The experts in place of an FFN, which they can become again."""

    def __init__(self, ffn: nn.Module, layout: FFNLayout, experts: Mapping[str, Tensor], backend: str):
        """`experts`: "up.weight", "up.bias", "down.weight" and "down.bias", stacked; absent if the FFN has none."""
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
        self.output_dropout = layout.output_dropout
        for name, projection in (("up", layout.up[0]), ("down", layout.down)):
            linear = ffn.get_submodule(projection)
            for which in ("weight", "bias"):
                stacked = experts.get(f"{name}.{which}")
                if stacked is not None:
                    requires_grad = getattr(linear, which).requires_grad
                    stacked = nn.Parameter(stacked, requires_grad=requires_grad)
                setattr(getattr(self, name), which, stacked)
        without_memory = {name: torch.empty_like(p, device="meta") for name, p in ffn.named_parameters()}
        self._origin = _Origin(copy_with_parameters(ffn, without_memory).eval(), layout)
        self.train(ffn.training)

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> Tensor:
        y = super().forward(x, seed=seed)
        return F.dropout(y, self.output_dropout, self.training) if self.output_dropout else y

    def _merged(self) -> dict[str, Tensor]:
        """The mean expert under the names of the FFN."""
        stacked = {name: functional.merge_experts(p) for name, p in self.named_parameters()}
        return self._origin.layout.unstack(stacked)

    def _forward_merged(self, x: Tensor) -> Tensor:
        # The FFN's own code, so that folding changes no bit of the output.
        return torch.func.functional_call(self._origin.ffn, self._merged(), (x,))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The FFN that was replaced, of its own class, with the experts' mean."""
        ffn = copy_with_parameters(self._origin.ffn, {name: mean.clone() for name, mean in self._merged().items()})
        for name, projections in (("up", self._origin.layout.up), ("down", (self._origin.layout.down,))):
            for which, stacked in getattr(self, name).named_parameters():
                for projection in projections:
                    parameter = getattr(ffn.get_submodule(projection), which)
                    parameter.requires_grad_(stacked.requires_grad)
        return ffn.train(self.training)


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
    the model is replaced in all of them by one layer.

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
    functional.check_size("num_experts", num_experts)
    functional.check_choice("init", init, INITS)
    functional.check_choice("backend", backend, backends.BACKENDS)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a callable (name, module) -> bool, got {type(filter_fn).__name__}")
    sites = find_ffns(model)
    replaceable = [site for site in sites if site.skip_reason is None]
    if filter_fn is None:
        chosen = replaceable[1::2]
    else:
        chosen = [site for site in replaceable if filter_fn(site.name, site.module)]
    swap_modules_(model, {site.module: _experts_of(site, num_experts, init, backend) for site in chosen})
    report = ReplacementReport(
        replaced=tuple(site.name for site in chosen),
        kept=tuple(site.name for site in replaceable if site not in chosen),
        skipped={site.name: site.skip_reason for site in sites if site.skip_reason is not None},
    )
    if not chosen:
        warnings.warn(f"replace_ffn_ replaced nothing:\n{report}", stacklevel=2)
    return report


@torch.no_grad()
def _experts_of(site: FFNSite, num_experts: int, init: str, backend: str) -> ReplacedFFN:
    assert site.layout is not None
    ffn = site.module
    first = site.layout.stack(dict(ffn.named_parameters()))
    if init == "copy":
        experts = [first] * num_experts
    else:
        fresh = (dict(_drawn_afresh(ffn).named_parameters()) for _ in range(1, num_experts))
        experts = [first, *(site.layout.stack(parameters) for parameters in fresh)]
    stacked = {name: torch.stack([expert[name] for expert in experts]) for name in first}
    return ReplacedFFN(ffn, site.layout, stacked, backend)


def _drawn_afresh(ffn: nn.Module) -> nn.Module:
    twin = copy_with_parameters(ffn, {name: torch.empty_like(p) for name, p in ffn.named_parameters()})
    for module in [twin] if hasattr(twin, "reset_parameters") else twin.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return twin
