"""FFNs whose projections are parts of a larger block, with no module that is the FFN alone.

`nn.TransformerEncoderLayer` and BERT's layers are such blocks. The experts then stand where the up projection stood,
and nothing stands where the rest was: what else the block does (residual, LayerNorm, output dropout) stays its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ewa_kernels.modules import RandomPartitionMoE
from ewa_kernels.surgery.layout import copy_modules
from ewa_kernels.surgery.probe import NotReplaceableError, generators_kept


class JoinedFFN(nn.Module):
    """y = down(dropout(act(up(x)))), of a block's own modules."""

    def __init__(self, up: nn.Module, act: Callable[[Tensor], Tensor], dropout: nn.Module | None, down: nn.Module):
        super().__init__()
        self.up, self.act, self.dropout, self.down = up, act, dropout, down

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.up(x))
        return self.down(hidden if self.dropout is None else self.dropout(hidden))


class Through(nn.Module):
    """Gives back its input, where a part of an FFN stood that became experts."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def through(x: Tensor) -> Tensor:
    """As `Through`, for a function."""
    return x


@dataclass
class Places:
    """What was put where the parts of a `JoinedFFN` stood, and what an undo needs.

    Attributes:
        modules: part's name → what stands in its place; "up" → the experts.
        attributes: name → value, of the module that holds the experts.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """Where the parts of an FFN are inside a block: dotted names, "" for none.

    Attributes:
        region: what the block computes with them, for [N, D].
        flags: attributes of up's holder that tell a fast path of the block to keep off.
    """

    kind: str
    up: str
    act: str
    dropout: str
    down: str
    region: Callable[[nn.Module, Tensor], Tensor]
    flags: tuple[tuple[str, Any], ...] = ()

    def join(self, block: nn.Module) -> JoinedFFN:
        dropout = block.get_submodule(self.dropout) if self.dropout else None
        holder, name = self._holder(block, self.act)
        ffn = JoinedFFN(block.get_submodule(self.up), getattr(holder, name), dropout, block.get_submodule(self.down))
        ffn.training = block.training
        return ffn

    def place_(self, block: nn.Module, layer: nn.Module) -> Places:
        """Puts `layer` into the block, in place of the FFN."""
        places = Places()
        for part in ("up", "act", "dropout", "down"):
            path = getattr(self, part)
            if not path:
                continue
            holder, name = self._holder(block, path)
            if name in holder._modules:
                places.modules[part] = holder._modules[name] = layer if part == "up" else Through()
            else:
                places.attributes[name] = getattr(holder, name)
                setattr(holder, name, through)
        holder, _ = self._holder(block, self.up)
        for name, value in self.flags:
            if hasattr(holder, name):
                places.attributes[name] = getattr(holder, name)
                setattr(holder, name, value)
        return places

    def check(self, block: nn.Module) -> None:
        """Runs the block's own code, before and after.

        Raises:
            NotReplaceableError: the block does something else than what `place_` takes for granted.
        """
        with torch.device("cpu"), torch.autocast("cpu", enabled=False), generators_kept():
            torch.manual_seed(0)
            twin = _random_twin(block, {path.partition(".")[0] for path in (self.up, self.down)})
            x = torch.randn(3, twin.get_parameter(f"{self.up}.weight").shape[1], dtype=torch.float64)
            joined = self.join(twin)
            for training in (False, True):
                twin.train(training)
                joined.train(training)
                before = self._run(twin, x)
                after_twin = copy_modules(twin)
                self.place_(after_twin, joined)
                after = self._run(after_twin, x)
                if before.shape != after.shape or not torch.allclose(before, after, rtol=1e-10, atol=1e-10):
                    raise NotReplaceableError("its block does more with its projections than down(act(up(x)))")

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(1)
        try:
            return self.region(block, x)
        except Exception as error:
            raise NotReplaceableError(f"its block fails on [3, D]: {type(error).__name__}: {error}") from error

    @staticmethod
    def _holder(block: nn.Module, path: str) -> tuple[nn.Module, str]:
        parent, _, name = path.rpartition(".")
        return block.get_submodule(parent), name


def _random_twin(block: nn.Module, children: set[str]) -> nn.Module:
    """A copy of a block with random parameters in float64 in these children; all else is shared with it."""
    twin = copy_modules(block)
    for name in children:
        for module in twin.get_submodule(name).modules():
            for which, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[which] = nn.Parameter(torch.randn(parameter.shape, dtype=torch.float64))
    return twin


# --- torch ---

_TORCH = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def _ff_block(block: Any, x: Tensor) -> Tensor:
    return block._ff_block(x)


def _torch_block(module: nn.Module) -> Block | None:
    if not isinstance(module, _TORCH) or not isinstance(module.linear1, nn.Linear):
        return None
    (base,) = (c for c in _TORCH if isinstance(module, c))
    for name in ("forward", "_ff_block"):
        if getattr(type(module), name) is not getattr(base, name) or name in module.__dict__:
            raise NotReplaceableError(f"its {name} is not that of torch.nn.{base.__name__}")
    # 0: the fast path of eval mode, which knows weights alone, keeps off.
    flags = (("activation_relu_or_gelu", 0),)
    return Block("torch", "linear1", "activation", "dropout", "linear2", _ff_block, flags)


def forbid_nested_tensors_(model: nn.Module) -> None:
    """Where its first layer has a fast path, `nn.TransformerEncoder` makes nested tensors, which experts do not take.

    Called after folding, it allows them again.
    """
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            if any(isinstance(m, RandomPartitionMoE) for m in encoder.modules()):
                encoder.__dict__.setdefault("_nested_tensors_before_experts", encoder.use_nested_tensor)
                encoder.use_nested_tensor = False
            elif "_nested_tensors_before_experts" in encoder.__dict__:
                encoder.use_nested_tensor = encoder.__dict__.pop("_nested_tensors_before_experts")


# --- transformers: BERT and its kin; ViT and its kin before 5.0 ---


def _intermediate_and_output(block: nn.Module) -> Block | None:
    children = block._modules
    intermediate, output = children.get("intermediate"), children.get("output")
    if intermediate is None or output is None or not hasattr(intermediate, "intermediate_act_fn"):
        return None
    if not all(isinstance(m._modules.get("dense"), nn.Linear) for m in (intermediate, output)):
        return None
    num_arguments = len(inspect.signature(output.forward).parameters)
    if num_arguments > 2:
        raise NotReplaceableError("its output takes more than hidden and a residual")

    def region(block: nn.Module, x: Tensor) -> Tensor:
        hidden = block.get_submodule("intermediate")(x)
        residual = (torch.cos(x),) if num_arguments == 2 else ()
        return block.get_submodule("output")(hidden, *residual)

    paths = ("intermediate.dense", "intermediate.intermediate_act_fn", "", "output.dense")
    return Block("intermediate_output", *paths, region)


def block_of(module: nn.Module) -> Block | None:
    """Where an FFN is in a block; None if the module is no block of a known kind.

    Raises:
        NotReplaceableError: it is one, but does something else with its projections.
    """
    return _torch_block(module) or _intermediate_and_output(module)
