"""`ReplacedFFN`: the experts in place of an FFN of a model, which they can become again."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewa_kernels.modules import RandomPartitionMoE
from ewa_kernels.surgery.joined import JoinedFFN, Places, forbid_nested_tensors_
from ewa_kernels.surgery.layout import FFNLayout, copy_modules, copy_with_parameters, swap_modules_
from ewa_kernels.surgery.sites import FFNSite


@dataclass
class _Origin:
    """Not the module itself, because a module in an attribute would become part of the module tree."""

    ffn: nn.Module
    layout: FFNLayout
    argument: str  # name of the input, where the layer is called
    places: Places = field(default_factory=Places)  # of a block's parts


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
                    own = getattr(linear, which)
                    stacked = nn.Parameter(stacked, requires_grad=own.requires_grad)
                    vars(stacked).update(vars(own))
                setattr(getattr(self, name), which, stacked)
        self._origin = _Origin(ffn, layout, next(iter(inspect.signature(ffn.forward).parameters)))
        self.train(ffn.training)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, perhaps in another process
        from ewa_kernels.surgery.pretrained import guard_save_pretrained  # which needs this file

        super().__setstate__(state)
        guard_save_pretrained()

    @property
    def layout(self) -> FFNLayout:
        return self._origin.layout

    def forward(self, x: Tensor | None = None, *, seed: int | Tensor | None = None, **named: Tensor) -> Tensor:
        """As `RandomPartitionMoE`; x may have the name that it has in the FFN's own forward."""
        if x is None:
            x = named.pop(self._origin.argument, None)
        if x is None or named:
            got = ", ".join(named) or "none"
            raise TypeError(f"x must be given, or {self._origin.argument}, and but for seed nothing else, got {got}")
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

    def forward_mean(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._origin.layout.forward(self._merged(), x, training=False)
        # The FFN's own code, so that folding changes no bit of the output; in a copy, which other threads and a
        # forward that writes into its module cannot disturb.
        ffn = copy_modules(self._origin.ffn).eval()
        return torch.func.functional_call(ffn, self._merged(), (x,), strict=True)

    def fuse(self) -> nn.Module:
        """The FFN that was replaced, of its own class, with the experts' mean; a copy that shares no parameter.

        Raises:
            ValueError: its projections are parts of a block, which would keep what stands in for the others.
        """
        if isinstance(self._origin.ffn, JoinedFFN):
            raise ValueError("this layer stands for parts of a block: use ewa_kernels.fold_(model)")
        return self.dense()

    @torch.no_grad()
    def dense(self) -> nn.Module:
        """As `fuse`; of a block's parts a `JoinedFFN`."""
        layout = self._origin.layout
        ffn = copy_with_parameters(self._origin.ffn, {name: mean.clone() for name, mean in self._merged().items()})
        for experts, projections in ((self.up, layout.up), (self.down, (layout.down,))):
            for which in ("weight", "bias"):
                stacked = getattr(experts, which)
                for projection in projections if stacked is not None else ():
                    parameter = getattr(ffn.get_submodule(projection), which)
                    parameter.requires_grad_(stacked.requires_grad)
                    vars(parameter).update(vars(getattr(self._origin.ffn.get_submodule(projection), which)))
        return ffn.train(self.training)

    def release(self) -> None:
        """Takes the memory of the FFN that was replaced: nothing in the model needs it."""
        for _, linear in self._projections_of(self._origin.ffn):
            for which, parameter in linear._parameters.items():
                if parameter is not None:
                    empty = torch.empty_like(parameter, device="meta")
                    linear._parameters[which] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    vars(linear._parameters[which]).update(vars(parameter))

    @property
    def ffn(self) -> nn.Module:
        """The module that was replaced."""
        return self._origin.ffn

    def restore(self, fused: nn.Module) -> nn.Module:
        """The very module that was replaced, with the parameters of `fused`."""
        for name, linear in self._projections_of(self._origin.ffn):
            linear._parameters.update(fused.get_submodule(name)._parameters)
        return self._origin.ffn.train(self.training)

    def place_in_(self, site: FFNSite) -> None:
        """Stands in a block, in place of the FFN that is made of the block's parts."""
        assert site.block is not None
        self._origin.places = site.block.place_(site.module, self)

    def parts(self, ffn: nn.Module) -> dict[nn.Module, nn.Module]:
        """What stands in the model for the FFN → what belongs there, of an FFN like the one that was replaced."""
        placed = self._origin.places.modules
        if not placed:
            return {self: ffn}
        return {module: ffn.get_submodule(part) for part, module in placed.items()}

    def place_of(self, tensor: str) -> tuple[nn.Module, str]:
        """The module in whose place a tensor of the FFN is found after folding, and its name there."""
        placed = self._origin.places.modules
        if not placed:
            return self, tensor
        part, _, name = tensor.partition(".")
        return placed[part], name

    def restore_attributes_(self, model: nn.Module) -> None:
        """Of whatever holds this layer in a block."""
        attributes = self._origin.places.attributes
        for holder in model.modules() if attributes else ():
            if any(child is self for child in holder._modules.values()):
                holder.__dict__.update(attributes)

    def _projections_of(self, ffn: nn.Module) -> list[tuple[str, nn.Module]]:
        layout = self._origin.layout
        return [(name, ffn.get_submodule(name)) for name in (*layout.up, layout.down)]


def replaced_ffns(model: nn.Module) -> dict[str, ReplacedFFN]:
    """Every layer that `replace_ffn_` made, under each of its names."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, ReplacedFFN)}


def fuse_all(layers: Iterable[nn.Module]) -> dict[RandomPartitionMoE, nn.Module]:
    """Each layer of experts among these modules, with the FFN it becomes."""
    with torch.inference_mode(False):
        return {
            m: m.dense() if isinstance(m, ReplacedFFN) else m.fuse()
            for m in layers
            if isinstance(m, RandomPartitionMoE)
        }


def put_back_(model: nn.Module, ffns: Mapping[RandomPartitionMoE, nn.Module]) -> None:
    """Each FFN takes the place of its layer in the model, and all around it is as it was before the layer came."""
    parts: dict[nn.Module, nn.Module] = {}
    for layer, ffn in ffns.items():
        if isinstance(layer, ReplacedFFN):
            layer.restore_attributes_(model)
            parts.update(layer.parts(ffn))
        else:
            parts[layer] = ffn
    swap_modules_(model, parts)
    forbid_nested_tensors_(model)


@contextmanager
def folded(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """The FFNs that these layers of the model become stand in their places meanwhile."""
    parts: dict[nn.Module, nn.Module] = {}
    for layer, ffn in fuse_all(layers).items():
        parts.update(layer.parts(ffn) if isinstance(layer, ReplacedFFN) else {layer: ffn})
    swap_modules_(model, parts)
    try:
        yield
    finally:
        swap_modules_(model, {dense: experts for experts, dense in parts.items()})
