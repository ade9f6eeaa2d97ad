"""What an FFN computes with its projections, and copies of modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import ACTIVATIONS

Rate = tuple[str, str]  # where the rate of a dropout is: name of a module inside the FFN, and of its attribute


@dataclass(frozen=True)
class FFNLayout:
    """Of y = output_dropout(down(dropout(hidden))) with hidden = act(up(x)), or act(gate) * value if gated."""

    up: tuple[str, ...]  # names of the nn.Linear modules; two for a GLU with separate projections
    down: str
    gated: bool = False
    gate_last: bool = False  # value before gate, in the rows of one projection or in the order of two
    activation: str = "gelu"
    dropout: Rate | None = None
    output_dropout: Rate | None = None

    @property
    def dense_names(self) -> list[str]:
        """Of all tensors that the FFN may have."""
        return [f"{name}.{which}" for name in (*self.up, self.down) for which in ("weight", "bias")]

    def stack(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The FFN's tensors under the names and in the order of `RandomPartitionMoE`, without expert dimension.

        Of a tensor of which a part is missing, nothing.
        """
        stacked = {}
        for which in ("weight", "bias"):
            rows = [dense[f"{name}.{which}"] for name in self.up if f"{name}.{which}" in dense]
            if len(rows) == len(self.up):
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

    def forward(
        self, dense: Mapping[str, Tensor], x: Tensor, *, dropout: float = 0.0, output_dropout: float = 0.0
    ) -> Tensor:
        """What the FFN with these tensors, by its own names, computes; projection by projection, as it does."""

        def project(name: str, x: Tensor) -> Tensor:
            return F.linear(x, dense[f"{name}.weight"], dense.get(f"{name}.bias"))

        pre = [project(name, x) for name in self.up]
        act = ACTIVATIONS[self.activation]
        if self.gated:
            first, last = pre if len(pre) == 2 else pre[0].chunk(2, dim=-1)
            hidden = act(last) * first if self.gate_last else act(first) * last
        else:
            hidden = act(pre[0])
        return F.dropout(project(self.down, F.dropout(hidden, dropout)), output_dropout)


def rate_in(ffn: nn.Module, rate: Rate | None) -> float:
    """What it is now; 0 where there is no dropout."""
    return 0.0 if rate is None else getattr(ffn.get_submodule(rate[0]), rate[1])


def copy_with_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """`copy_modules`, with these in place of the named parameters, and with their `requires_grad`."""
    twin = copy_modules(module)
    for name, old in module.named_parameters():
        parent, _, leaf = name.rpartition(".")
        new = nn.Parameter(parameters[name], requires_grad=old.requires_grad)
        twin.get_submodule(parent)._parameters[leaf] = new
    return twin


def copy_modules(module: nn.Module, copies: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A module made of copies of all its modules; what else they hold (parameters, a lock, a config) is shared, but
    for lists and the like, which may be written into.

    `copies` are those made already.
    """
    copies = {} if copies is None else copies
    if module not in copies:
        twin = copies[module] = module.__class__.__new__(module.__class__)
        containers = (dict, list, set)  # into which a forward may write; what is in them is shared
        own = {k: copy.copy(v) if isinstance(v, containers) else v for k, v in vars(module).items()}
        twin.__dict__.update(own)
        twin.__dict__.pop("_compiled_call_impl", None)  # which calls the original
        if not has_forward_of_its_own(module):
            twin.__dict__.pop("forward", None)  # likewise
        twin.__dict__["_parameters"] = dict(module._parameters)
        twin.__dict__["_buffers"] = dict(module._buffers)
        twin.__dict__["_modules"] = {
            name: None if child is None else copy_modules(child, copies) for name, child in module._modules.items()
        }
    return copies[module]


def has_forward_of_its_own(module: nn.Module) -> bool:
    """Whether somebody has set a forward on the module itself, which is not that of its class.

    Hooks that came and went, as accelerate's, leave the class's own there.
    """
    forward = vars(module).get("forward")
    is_of_class = isinstance(forward, MethodType) and (forward.__self__, forward.__func__) == (
        module,
        type(module).forward,
    )
    return forward is not None and not is_of_class


def is_default(value: object, default: object) -> bool:
    """Whether an argument says nothing: its default is given."""
    return value is default or (
        isinstance(value, (bool, int, float, str)) and (type(value), value) == (type(default), default)
    )


def swap_modules_(model: nn.Module, new_of: Mapping[nn.Module, nn.Module]) -> None:
    """Every place in a model that holds a key then holds its value; a shared module stays shared."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new_of:
                parent._modules[name] = new_of[child]
