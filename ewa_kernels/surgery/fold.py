"""After training: every `RandomPartitionMoE` becomes one FFN again."""

from __future__ import annotations

from typing import Any

from torch import nn

import ewa_kernels.checks as checks
import ewa_kernels.train.shards as shards
from ewa_kernels.modules import RandomPartitionMoE
from ewa_kernels.surgery.replaced import ReplacedFFN, folded, fuse_all, put_back_


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
    checks.module("model", model)
    if isinstance(model, RandomPartitionMoE):
        raise ValueError("model must hold the RandomPartitionMoE layers, got one itself: use model.fuse()")
    layers = [module for module in model.modules() if isinstance(module, RandomPartitionMoE)]
    if any(shards.is_sharded(tensor) for layer in layers for tensor in layer.parameters()):
        raise ValueError(
            "model must not be sharded, whose other layers gather their parameters as they were: use "
            "ewa_kernels.integrations.fsdp.folded_state_dict(model), and load it into the original model"
        )
    fused = fuse_all(layers)  # all that can fail is done here
    put_back_(
        model,
        {layer: layer.restore(ffn) if isinstance(layer, ReplacedFFN) else ffn for layer, ffn in fused.items()},
    )
    return model


def folded_state_dict(model: nn.Module) -> dict[str, Any]:
    """`fold_(model).state_dict()`, but the model stays as it is.

    The layers are exchanged while the dict is made and put back then: do not run the model in another thread
    meanwhile.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    checks.module("model", model)
    if isinstance(model, RandomPartitionMoE):
        return model.fuse().state_dict()
    with folded(model, model.modules()):
        return model.state_dict()
