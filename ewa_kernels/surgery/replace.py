"""`replace_ffn_`: FFNs become `RandomPartitionMoE` layers, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewa_kernels import backends, checks
from ewa_kernels.modules import RandomPartitionMoE
from ewa_kernels.surgery.layout import FFNLayout, copy_modules, copy_with_parameters, swap_modules_
from ewa_kernels.surgery.sites import FFNSite, find_ffns

INITS = ("copy", "independent")


@dataclass
class _Origin:
    """Not the module itself, because a module in an attribute would become part of the module tree."""

    ffn: nn.Module
    layout: FFNLayout


class ReplacedFFN(RandomPartitionMoE):
    """The experts in place of an FFN, which they can become again.

    The FFN is kept, outside the module tree, and `release` takes its memory.
    """

    def __init__(self, ffn: nn.Module, layout: FFNLayout, experts: Mapping[str, Tensor], backend: str):
        """`experts`: up.weight, up.bias, down.weight, down.bias, stacked; absent where the FFN has none."""
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
                    stacked = nn.Parameter(stacked, requires_grad=getattr(linear, which).requires_grad)
                setattr(getattr(self, name), which, stacked)
        self._origin = _Origin(ffn, layout)
        self.train(ffn.training)

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> Tensor:
        y = super().forward(x, seed=seed)
        return F.dropout(y, self.output_dropout, self.training) if self.output_dropout else y

    def _merged(self) -> dict[str, Tensor]:
        """The mean expert under the names of the FFN."""
        stacked = {}
        for name, experts in (("up", self.up), ("down", self.down)):
            weight, bias = experts.merge()
            stacked[f"{name}.weight"] = weight
            if bias is not None:
                stacked[f"{name}.bias"] = bias
        return self._origin.layout.unstack(stacked)

    def _forward_merged(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._origin.layout.forward(self._merged(), x, training=False)
        # The FFN's own code, so that folding changes no bit of the output; in a copy, which other threads and a
        # forward that writes into its module cannot disturb.
        ffn = copy_modules(self._origin.ffn).eval()
        return torch.func.functional_call(ffn, self._merged(), (x,), strict=True)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The FFN that was replaced, of its own class, with the experts' mean; a copy that shares no parameter."""
        layout = self._origin.layout
        ffn = copy_with_parameters(self._origin.ffn, {name: mean.clone() for name, mean in self._merged().items()})
        for experts, projections in ((self.up, layout.up), (self.down, (layout.down,))):
            for which in ("weight", "bias"):
                stacked = getattr(experts, which)
                for projection in projections if stacked is not None else ():
                    getattr(ffn.get_submodule(projection), which).requires_grad_(stacked.requires_grad)
        return ffn.train(self.training)

    def release(self) -> None:
        """Takes the memory of the FFN that was replaced: nothing in the model needs it."""
        for _, linear in self._projections_of(self._origin.ffn):
            for which, parameter in linear._parameters.items():
                if parameter is not None:
                    empty = torch.empty_like(parameter, device="meta")
                    linear._parameters[which] = nn.Parameter(empty, requires_grad=parameter.requires_grad)

    def restore(self, fused: nn.Module) -> nn.Module:
        """The very module that was replaced, with the parameters of `fused`."""
        for name, linear in self._projections_of(self._origin.ffn):
            linear._parameters.update(fused.get_submodule(name)._parameters)
        return self._origin.ffn.train(self.training)

    def _projections_of(self, ffn: nn.Module) -> list[tuple[str, nn.Module]]:
        layout = self._origin.layout
        return [(name, ffn.get_submodule(name)) for name in (*layout.up, layout.down)]


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
    plain Python list of yours stays there, without its parameters, and fails when it is called.

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
    layers = {site.module: _experts_of(site, num_experts, init, backend) for site in chosen}
    swap_modules_(model, layers)
    for layer in layers.values():
        layer.release()
    report = ReplacementReport(
        replaced=tuple(site.name for site in chosen),
        kept=tuple(site.name for site in replaceable if site not in chosen),
        skipped={site.name: site.skip_reason for site in sites if site.skip_reason is not None},
    )
    if not chosen:
        warnings.warn(f"replace_ffn_ replaced nothing:\n{report}", stacklevel=2)
    return report


@torch.inference_mode(False)
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
