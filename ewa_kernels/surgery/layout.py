"""How the tensors of an FFN lie in the stacked tensors of its experts, and copies of modules around them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FFNLayout:
    """A plain token-wise FFN inside a module: y = output_dropout(down(dropout(act(up(x)))))."""

    up: tuple[str, ...]  # names of the nn.Linear modules; two for a GLU with separate projections
    down: str
    gated: bool = False
    gate_last: bool = False  # value before gate, in the rows of one projection or in the order of two
    activation: str = "gelu"
    dropout: float = 0.0
    output_dropout: float = 0.0

    def stack(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The FFN's tensors under the names and in the order of `RandomPartitionMoE`, without expert dimension."""
        stacked = {}
        for which in ("weight", "bias"):
            rows = [dense[f"{name}.{which}"] for name in self.up if f"{name}.{which}" in dense]
            if rows:
                stacked[f"up.{which}"] = self._swap(torch.cat(rows))
            if f"{self.down}.{which}" in dense:
                stacked[f"down.{which}"] = dense[f"{self.down}.{which}"]
        return stacked

    def unstack(self, stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `stack`."""
        dense = {}
        for which in ("weight", "bias"):
            if f"up.{which}" in stacked:
                rows = self._swap(stacked[f"up.{which}"]).chunk(len(self.up))
                dense.update({f"{name}.{which}": row for name, row in zip(self.up, rows, strict=True)})
            if f"down.{which}" in stacked:
                dense[f"{self.down}.{which}"] = stacked[f"down.{which}"]
        return dense

    def _swap(self, up: Tensor) -> Tensor:
        return torch.cat(up.chunk(2)[::-1]) if self.gate_last else up


def copy_with_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of `module` in which the named parameters are these; the old ones are not copied."""
    memo = {
        id(old): nn.Parameter(parameters[name], requires_grad=old.requires_grad)
        for name, old in module.named_parameters()
    }
    return copy.deepcopy(module, memo)


def swap_modules_(model: nn.Module, new_of: Mapping[nn.Module, nn.Module]) -> None:
    """Every place in a model that holds a key then holds its value; a shared module stays shared."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new_of:
                parent._modules[name] = new_of[child]
