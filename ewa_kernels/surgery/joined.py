"""FFNs whose projections are parts of a larger block, with no module that is the FFN alone.

`nn.TransformerEncoderLayer` and BERT's layers are such blocks. The experts then stand where the up projection stood,
and nothing stands where the rest was: what else the block does (residual, LayerNorm, output dropout) stays its own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ewa_kernels.modules import RandomPartitionMoE
from ewa_kernels.surgery.layout import copy_modules
from ewa_kernels.surgery.probe import NotReplaceableError, close, generators_kept


class JoinedFFN(nn.Module):
    """y = down(dropout(act(up(x)))), of a block's own modules."""

    def __init__(self, up: nn.Module, act: Callable[[Tensor], Tensor], dropout: nn.Module | None, down: nn.Module):
        super().__init__()
        self.up, self.act, self.dropout, self.down = up, act, dropout, down

    def forward(self, input: Tensor) -> Tensor:  # named as in nn.Linear, in whose place it stands
        hidden = self.act(self.up(input))
        return self.down(hidden if self.dropout is None else self.dropout(hidden))


class Through(nn.Module):
    """Gives back its input, by whatever name, where a part of an FFN stood that became experts."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return through(*args, **kwargs)


def through(*args: Tensor, **kwargs: Tensor) -> Tensor:
    """As `Through`, for a function."""
    (x,) = (*args, *kwargs.values())
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
        flags: attributes of up's holder that tell a fast path of the block to keep off.
    """

    kind: str
    up: str
    act: str
    dropout: str
    down: str
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
        """Runs the block's own forward, before and after.

        Raises:
            NotReplaceableError: the block does something else than what `place_` takes for granted.
        """
        if "forward" in vars(block):
            raise NotReplaceableError("the forward of its block is not that of the block's class")
        with torch.device("cpu"), torch.autocast("cpu", enabled=False), generators_kept(), torch.enable_grad():
            torch.default_generator.manual_seed(0)
            twin = _random_twin(block)
            joined = self.join(twin)
            leaves: list[Tensor] = [twin.get_parameter(f"{path}.weight") for path in (self.up, self.down)]
            leaves.append(torch.randn(2, _SIDE**2, leaves[0].shape[1], dtype=torch.float64, requires_grad=True))
            run = _way_to_run(twin, leaves[-1], keep={path.partition(".")[0] for path in (self.up, self.down)})
            for training in (False, True):
                twin.train(training)
                joined.train(training)
                after = copy_modules(twin)
                self.place_(after, joined)
                for ours, its in zip(_results(run, after, leaves), _results(run, twin, leaves), strict=True):
                    if ours.shape != its.shape or not close(ours, its):
                        raise NotReplaceableError("its block does more with its projections than down(act(up(x)))")

    @staticmethod
    def _holder(block: nn.Module, path: str) -> tuple[nn.Module, str]:
        parent, _, name = path.rpartition(".")
        return block.get_submodule(parent), name


# --- running a block ---

# The tokens of a block are those of an image of this many rows and columns.
_SIDE = 4
_Run = Callable[[nn.Module, Tensor], Tensor]


def _random_twin(block: nn.Module) -> nn.Module:
    """A copy of a block with random parameters and all tensors in float64, on the CPU."""
    twin = copy_modules(block)
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.randn(parameter.shape, dtype=torch.float64))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind = torch.float64 if buffer.is_floating_point() else buffer.dtype
                on_cpu = torch.zeros(buffer.shape, dtype=kind) if buffer.is_meta else buffer.to("cpu", kind)
                module._buffers[name] = on_cpu
    return twin


class _Pair(nn.Module):
    """Stands for an attention that gives its weights too."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return x, None


class _First(nn.Module):
    """Stands for an attention that does not."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def _way_to_run(block: nn.Module, x: Tensor, keep: set[str]) -> _Run:
    """How a block's forward can be called with tokens alone: as it is, or without an attention that needs more.

    Raises:
        NotReplaceableError: it fails either way.
    """
    errors: list[Exception] = []
    for attention in (None, _Pair(), _First()):
        run = partial(_run, attention=attention, keep=keep)
        try:
            run(block, x)
        except Exception as error:
            errors.append(error)
        else:
            return run
    shape = f"[{', '.join(map(str, x.shape[:-1]))}, D]"
    raise NotReplaceableError(f"its block fails on {shape}: {type(errors[0]).__name__}: {errors[0]}")


def _run(block: nn.Module, x: Tensor, *, attention: nn.Module | None, keep: set[str]) -> Tensor:
    if attention is not None:
        block = copy_modules(block)
        block._modules.update(
            {name: attention for name in block._modules.keys() - keep if re.search("att", name, re.IGNORECASE)}
        )
    _, *others = inspect.signature(block.forward).parameters.values()
    required = [p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    # What the blocks of Swin and of torch's decoder need; a mask may be None where attention is left out.
    known: dict[str, Any] = {"input_dimensions": (_SIDE, _SIDE), "memory": x}
    torch.default_generator.manual_seed(1)
    y: Any = block.forward(x, *(known.get(name) for name in required))
    while isinstance(y, (tuple, list)):
        y = y[0]
    if not isinstance(y, Tensor):
        raise TypeError(f"it gives {type(y).__name__}")
    return y


def _results(run: _Run, block: nn.Module, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Output and gradients; the last leaf is the input."""
    y = run(block, leaves[-1])
    return y, *torch.autograd.grad(y.cos().sum(), leaves, materialize_grads=True)


# --- torch ---

_TORCH = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def _torch_block(module: nn.Module) -> Block | None:
    if not isinstance(module, _TORCH) or not isinstance(module.linear1, nn.Linear):
        return None
    (base,) = (c for c in _TORCH if isinstance(module, c))
    for name in ("forward", "_ff_block", "_sa_block", "_mha_block"):
        if getattr(type(module), name, None) is not getattr(base, name, None) or name in vars(module):
            raise NotReplaceableError(f"its {name} is not that of torch.nn.{base.__name__}")
    # 0: the fast path of eval mode, which knows weights alone, keeps off.
    flags = (("activation_relu_or_gelu", 0),)
    return Block("torch", "linear1", "activation", "dropout", "linear2", flags)


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
    return Block("intermediate_output", "intermediate.dense", "intermediate.intermediate_act_fn", "", "output.dense")


# --- research code: Sequential(LayerNorm, Linear, activation, [Dropout], Linear, [Dropout]) ---


def _after_norm(block: nn.Module) -> Block | None:
    if not isinstance(block, nn.Sequential):
        return None
    names, children = list(block._modules), list(block)
    linear = [i for i, child in enumerate(children) if isinstance(child, nn.Linear)]
    if len(linear) != 2 or linear[0] != 1 or not type(children[0]).__name__.endswith("Norm"):
        return None
    between = children[2 : linear[1]]
    if not (len(between) == 1 or (len(between) == 2 and isinstance(between[1], nn.Dropout))):
        return None
    return Block("norm_sequential", names[1], names[2], names[3] if len(between) == 2 else "", names[linear[1]])


def block_of(module: nn.Module) -> Block | None:
    """Where an FFN is in a block; None if the module is no block of a known kind.

    Raises:
        NotReplaceableError: it is one, but does something else with its projections.
    """
    return _torch_block(module) or _intermediate_and_output(module) or _after_norm(module)
