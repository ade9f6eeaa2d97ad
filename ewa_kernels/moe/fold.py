"""After `replace_moe_`: experts in random partition become their mean, or lists of experts what they were."""

from __future__ import annotations

from typing import Any

from torch import nn

import ewa_kernels.checks as checks
import ewa_kernels.train.shards as shards
from ewa_kernels.moe import stacked
from ewa_kernels.moe.replaced import ExpertStack, MeanExpert, formula_of_block, place_, restore_, switched
from ewa_kernels.surgery.layout import swap_modules_
from ewa_kernels.surgery.pretrained import guard_save_pretrained


def fold_moe_(model: nn.Module) -> nn.Module:
    """Turns the experts of every layer in random partition into one FFN with their mean, in place; returns the model.

    Such layers are those of `replace_moe_(model, to="random_partition")`, and all of a transformers model whose experts
    implementation is "ewa_random_partition". The model's output in eval mode does not change, and what a block returns
    has the same form: its router is still called. In place of the experts stands a dense `ewa_kernels.FFN`, with new
    parameters that are in no optimizer. Layers whose router chooses are left alone. No class of a library has such an
    FFN, so that `save_pretrained` raises from then on: save the `state_dict`, which a model made in the same way loads.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: it has no such layer, or is one itself, or its experts are sharded. After any error the model is
            as it was.
    """
    checks.module("model", model)
    dense: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        experts: tuple[Any, ...] = ()
        options: Any
        if isinstance(module, ExpertStack) and not module.routed:
            experts, options = module.experts, module
        elif _is_dealt(module):
            formula = stacked.formula_of(module)
            if formula.reason is None:
                experts, options = formula.experts(module), formula
        if not experts:
            continue
        if any(tensor is not None and shards.is_sharded(tensor) for tensor in experts):
            raise ValueError("model must not be sharded, whose other layers gather their parameters as they were")
        dense[module] = MeanExpert.of(experts, options).train(module.training)
    if not dense:
        raise ValueError('model must have experts in random partition: replace_moe_(model, to="random_partition")')
    if model in dense:
        raise ValueError(f"model must hold the experts, got them themselves: {type(model).__name__}")
    guard_save_pretrained(model)
    swap_modules_(model, dense)
    return model


def restore_moe_(model: nn.Module) -> nn.Module:
    """Undoes `replace_moe_`, in place, with the experts as they are now; returns the model.

    Lists of experts stand where they stood, so that the `state_dict` has the keys it had and the library's own
    checkpoints can be written; their parameters are in no optimizer, and have no gradients yet. Every block has its own
    forward again. What `fold_moe_` made of experts that were stacked by transformers stays.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: its experts are sharded, or a list of them was folded by `fold_moe_`. The model is as it was then.
    """
    checks.module("model", model)
    blocks = [module for module in model.modules() if switched(module) == "block"]
    lists: dict[nn.Module, nn.Module] = {}
    for block in blocks:
        experts = block.get_submodule(formula_of_block(block).experts)
        if not isinstance(experts, ExpertStack):
            raise ValueError(f"model must have the experts of each {type(block).__name__}, got one that was folded")
        if any(shards.is_sharded(parameter) for parameter in experts.parameters()):
            raise ValueError("model must not be sharded, whose other layers gather their parameters as they were")
        lists[block] = experts.restored()
    for block, members in lists.items():
        place_(block, formula_of_block(block).experts, members)
    for module in list(model.modules()):
        if switched(module) is not None:
            module.__dict__.pop(stacked.BACKEND, None)
            restore_(module)
    return model


def _is_dealt(module: nn.Module) -> bool:
    if not stacked.is_stacked(module):
        return False
    setting = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return (switched(module) or setting) in ("random_partition", "ewa_random_partition")
