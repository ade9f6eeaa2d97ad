"""Which experts a model has: found once, and looked up at each step by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..models.experts import find_experts
from ..modules import ExpertLinear, RandomPartitionMoE, StackedExperts, expert_tensors
from .lookup import Experts, Lookup, members_of, without_frozen

# Children that are no part of a model: what torch.compile, activation checkpointing and FullyShardedDataParallel wrap.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

_NONE = "experts must hold something to average, got a model without experts: call replace_ffn_(model) first"


class FoundExperts:
    """The experts of a model, as they are now, at each call. Names are those without wrappers, which may come and go.

    Args:
        model, filter_fn: see `ExpertAverager`.

    Raises:
        ValueError: the model has no experts, or `filter_fn` chooses none.
    """

    def __init__(self, model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None):
        self.model = model
        self._lookup = Lookup()  # from step to step, as long as it is true
        self._paths: dict[str, tuple[str, ...]] = {}  # of others' layers
        self._ndims: dict[str, int] = {}
        self._stacked: list[str] = []  # of this package's layers that must not go
        self._prefixes: tuple[str, ...] = ("",)  # of this package's layers, as far as they are chosen
        sites = find_experts(model)
        found = [site for site in sites if site.skip_reason is None]
        if not found:
            reasons = "".join(f"; its {site.name or 'model'} {site.skip_reason}" for site in sites)
            advice = "; register_experts_adapter tells where a class has its experts" if sites else ""
            raise ValueError(f"{_NONE}{reasons}{advice}")
        names = unwrapped_names(model)
        if filter_fn is not None:
            chosen = [site for site in found if filter_fn(names[site.name], site.module)]
            if not chosen:
                every = ", ".join(names[site.name] for site in found)
                raise ValueError(f"filter_fn must choose some of {every}, chose none")
            found, self._prefixes = chosen, tuple(_joined(names[site.name], "") for site in chosen)
        ours = dict(expert_tensors(model))  # each once
        for site in found:
            if isinstance(site.module, StackedExperts | ExpertLinear):
                # Those of replace_ffn_ go when fold_ ends a training; no others are to go unnoticed.
                of_layer = () if isinstance(site.module, RandomPartitionMoE | ExpertLinear) else site.tensors
                self._stacked += [_unwrapped(name, names) for name in of_layer if name in ours]
                continue
            for name, group in site.tensors.items():
                label = names[site.name] + re.sub(rf"\.({'|'.join(_WRAPPED)})\b", "", name[len(site.name) :])
                self._paths[label] = tuple(_unwrapped(path, names) for path in site.paths[name])
                self._ndims[label] = members_of(group)[0].ndim

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lookup": Lookup()}

    @property
    def num_changes(self) -> int:
        """How often others had been found than before, among whichever modules."""
        return self._lookup.num_changes

    def __call__(self) -> Mapping[str, Experts]:
        """Parameters may have been replaced (load_state_dict(assign=True), to(), fold_), and frozen ones are left out.

        Raises:
            ValueError: experts are gone, or flattened.
        """
        return self._find(self.model) if torch.compiler.is_compiling() else self._lookup(self.model, self._find)

    def _find(self, model: nn.Module) -> dict[str, Experts]:
        names = unwrapped_names(model)
        experts: dict[str, Experts] = {}
        for path, tensor in expert_tensors(model):
            name = _unwrapped(path, names)
            if name.startswith(self._prefixes):
                experts[name] = tensor
        for name in self._stacked:
            if name not in experts:
                raise _gone(name)
        if self._paths:
            parameters = _parameters(model, names)
            for name, paths in self._paths.items():
                for path in paths:
                    if path not in parameters:
                        raise _gone(path)
                members = [parameters[path] for path in paths]
                experts[name] = members[0] if len(members) == 1 else members
        if not experts:
            raise ValueError(f"{_NONE}, or remove() on what attach returned")
        _check_not_flattened(experts, self._ndims)
        return without_frozen(experts)


def unwrapped_names(model: nn.Module) -> dict[str, str]:
    """Of every module: its name in the model → its name there without the wrappers around it."""
    modules = dict(model.named_modules())
    names = {"": ""}
    for path in modules:
        if path:
            holder, _, own = path.rpartition(".")
            is_data_parallel = isinstance(modules[holder], (DataParallel, DistributedDataParallel))
            is_wrapped = own in _WRAPPED or (own == "module" and is_data_parallel)
            names[path] = names[holder] if is_wrapped else _joined(names[holder], own)
    return names


def _parameters(model: nn.Module, names: Mapping[str, str]) -> dict[str, Tensor]:
    """By their names without wrappers."""
    return {
        _joined(names[prefix], name): parameter
        for prefix, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _unwrapped(path: str, names: Mapping[str, str]) -> str:
    """Of a parameter."""
    holder, _, own = path.rpartition(".")
    return _joined(names[holder], own)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _gone(name: str) -> ValueError:
    return ValueError(
        f"experts must be the model that the averager was made for, but it has no {name} any more: "
        "make a new one after a change of the architecture"
    )


def _check_not_flattened(experts: Mapping[str, Experts], ndims: Mapping[str, int]) -> None:
    """A flat piece of experts would pass for experts of one number each.

    Args:
        ndims: of the tensors that are not of this package's layers.
    """
    for name, group in experts.items():
        ndim = ndims.get(name, {"weight": 3, "bias": 2}.get(name.rpartition(".")[2]))
        tensor = members_of(group)[0]
        if ndim is not None and tensor.ndim != ndim:
            stacked = ", the first for the experts" if tensor is group else ""
            raise ValueError(
                f"{name} must have {ndim} dimensions{stacked}, got shape {list(tensor.shape)}: "
                "FullyShardedDataParallel and ZeRO-3 flatten parameters; use torch.distributed.fsdp.fully_shard"
            )
