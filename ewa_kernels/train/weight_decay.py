"""Weight decay: which parameters take part."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import checks
from ..models.experts import find_experts


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: what decays, and what does not (biases, scales of norms).

        optimizer = torch.optim.AdamW(ewa.weight_decay_groups(model, 0.05), lr=1e-3)

    A parameter of fewer than two dimensions does not decay, nor does an experts' bias `[E, F]`, of whatever class its
    layer is (`find_experts`), which a rule that goes by `ndim` alone takes for a weight. (Rules that go by names, as
    timm's and transformers' do, know it: its name ends in "bias".) Nor does what a module's own `no_weight_decay()`
    names, as timm's models have it.

    Args:
        weight_decay: ≥ 0, of the first group; the second has 0.

    Raises:
        TypeError: `model` is not an nn.Module, or `weight_decay` not a number.
        ValueError: `weight_decay` is negative or not finite.
    """
    checks.module("model", model)
    checks.nonnegative("weight_decay", weight_decay)
    named = dict(model.named_parameters())
    of_experts = [group for site in find_experts(model) for group in site.tensors.values()]
    spared: set[Tensor | None] = {group for group in of_experts if isinstance(group, Tensor) and group.ndim == 2}
    for prefix, module in model.named_modules():
        if callable(rule := getattr(module, "no_weight_decay", None)):
            spared |= {named.get(f"{prefix}.{name}" if prefix else name) for name in rule()}
    trained = [p for p in named.values() if p.requires_grad]
    decays = [p for p in trained if p.ndim >= 2 and p not in spared]
    rest = [p for p in trained if p.ndim < 2 or p in spared]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
