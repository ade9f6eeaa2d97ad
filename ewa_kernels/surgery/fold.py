"""After training: every `RandomPartitionMoE` becomes one FFN again."""

from __future__ import annotations

from typing import Any

from torch import nn

from ewa_kernels import shards
from ewa_kernels.modules import RandomPartitionMoE, expert_tensors
from ewa_kernels.surgery.joined import forbid_nested_tensors_
from ewa_kernels.surgery.layout import swap_modules_
from ewa_kernels.surgery.pretrained import unguard_save_pretrained_
from ewa_kernels.surgery.replaced import ReplacedFFN, folded, fuse_all


def fold_(model: nn.Module) -> nn.Module:
    """Turns every `RandomPartitionMoE` into one FFN with the experts' mean, in place, and returns the model.

    A model that went through `replace_ffn_` gets its architecture back: the very classes, attribute names,
    parameter order and `state_dict` keys. A `RandomPartitionMoE` of your own becomes an `ewa_kernels.FFN`.
    The model's output in eval mode does not change. The new parameters are in no optimizer, and hooks on a
    `RandomPartitionMoE` go with it.

    Raises:
        TypeError: `model` is not an nn.Module.
        TypeError: a subclass of RandomPartitionMoE has a forward of its own and no `fuse`.
        ValueError: `model` itself is a RandomPartitionMoE, or its experts are sharded. After any error the model is
            as it was.
    """
    _check_model(model)
    if isinstance(model, RandomPartitionMoE):
        raise ValueError("model must hold the RandomPartitionMoE layers, got one itself: use model.fuse()")
    if any(shards.is_sharded(tensor) for _, tensor in expert_tensors(model)):
        raise ValueError(
            "model must not be sharded, whose other layers gather their parameters as they were: use "
            "ewa_kernels.integrations.fsdp.folded_state_dict(model), and load it into the original model"
        )
    fused = fuse_all(model.modules())  # all that can fail is done here
    parts: dict[nn.Module, nn.Module] = {}
    for layer, ffn in fused.items():
        if isinstance(layer, ReplacedFFN):
            layer.restore_attributes_(model)
            parts.update(layer.parts(layer.restore(ffn)))
        else:
            parts[layer] = ffn
    swap_modules_(model, parts)
    forbid_nested_tensors_(model)
    unguard_save_pretrained_(model)
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
    with folded(model, model.modules()):
        return model.state_dict()


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
