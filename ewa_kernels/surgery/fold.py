"""After training: every `RandomPartitionMoE` becomes one FFN again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ewa_kernels.modules import RandomPartitionMoE
from ewa_kernels.surgery.layout import swap_modules_
from ewa_kernels.surgery.replace import ReplacedFFN


def _fused(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Each layer of experts with the FFN it becomes."""
    with torch.inference_mode(False):
        return {m: m.fuse() for m in model.modules() if isinstance(m, RandomPartitionMoE)}


def fold_(model: nn.Module) -> nn.Module:
    """Turns every `RandomPartitionMoE` into one FFN with the experts' mean, in place, and returns the model.

    A model that went through `replace_ffn_` gets its architecture back: the very classes, attribute names,
    parameter order and `state_dict` keys. A `RandomPartitionMoE` of your own becomes an `ewa_kernels.FFN`.
    The model's output in eval mode does not change. The new parameters are in no optimizer, and hooks on a
    `RandomPartitionMoE` go with it.

    Raises:
        TypeError: `model` is not an nn.Module.
        TypeError: a subclass of RandomPartitionMoE has a forward of its own and no `fuse`.
        ValueError: `model` itself is a RandomPartitionMoE. After any error the model is as it was.
    """
    _check_model(model)
    if isinstance(model, RandomPartitionMoE):
        raise ValueError("model must hold the RandomPartitionMoE layers, got one itself: use model.fuse()")
    fused = _fused(model)  # all that can fail is done here
    swap_modules_(model, {m: m.restore(ffn) if isinstance(m, ReplacedFFN) else ffn for m, ffn in fused.items()})
    return model


def folded_state_dict(model: nn.Module) -> dict[str, Any]:
    """`fold_(model).state_dict()`, but the model stays as it is.

    The layers are exchanged while the dict is made and put back then: do not run the model in another thread
    meanwhile.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    _check_model(model)
    if isinstance(model, RandomPartitionMoE):
        return model.fuse().state_dict()
    fused = _fused(model)
    swap_modules_(model, fused)
    try:
        return model.state_dict()
    finally:
        swap_modules_(model, {ffn: layer for layer, ffn in fused.items()})


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
