"""State dicts of what stands for dense modules: they carry the dense weights and the experts, and load from either."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..train import shards

# Of norms: how far a mean that is stored may be from the mean of what is stored (a running average of both, a cast).
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-5}
_OF_16_BITS = 4e-3


@dataclass
class Kept:
    """What was replaced: not an attribute of the layer itself, where a module would become part of the module tree."""

    module: nn.Module


class CarriesDense(nn.Module):
    """A module of experts, in whose state dict their mean stands too, by the names of the dense module.

    Whoever saves the model saves a dense checkpoint beside the experts. A state dict is loaded by one rule: its experts
    are taken, unless the dense weights in it are not their mean; then the dense weights go to all experts. So a dense
    checkpoint is taken, also one that was written over a part of `model.state_dict()`.
    """

    _origin: Kept

    def original(self) -> nn.Module:
        """The module that was replaced, as it is."""
        return self._origin.module

    def dense_names(self) -> list[str]:
        """Of the tensors that the dense module has."""
        raise NotImplementedError

    def stack(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of tensors of the dense module: what the parameters of one expert are, by the names of those here."""
        raise NotImplementedError

    def merged_dense(self) -> dict[str, Tensor]:
        """The mean expert, by the names of the dense module; differentiable."""
        raise NotImplementedError

    # --- saving ---

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.take_pending()
        own = dict(self.named_parameters())
        self.__dict__["_versions"] = _versions(own.values())
        with torch.no_grad():
            for name, mean in self.merged_dense().items():
                if name not in own:  # such a dense module cannot load the state dict: another shape has its name
                    destination[prefix + name] = mean

    # --- loading ---

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.take_pending()
        self.__dict__.pop("_pending", None)  # there was no room for it, and here is what comes instead
        named = dict(self.named_parameters())
        own = {_unwrapped(name): parameter for name, parameter in named.items()}
        keys = {_unwrapped(name): prefix + _in_state_dicts(name) for name in named}
        found = {n: t for n in self.dense_names() if isinstance(t := state_dict.get(prefix + n), Tensor)}
        dense = {n: t for n, t in found.items() if n not in own or t.ndim < own[n].ndim}
        stacked = {n: state_dict[key] for n, key in keys.items() if key in state_dict and n not in dense}
        of_expert = on_all_ranks(self.stack(self._completed(dense, prefix, missing_keys)), own)
        for name in dense:
            del state_dict[prefix + name]
        # An entry that is the parameter itself is none: set_model_state_dict hands it on.
        given = {n: t for n, t in stacked.items() if t is not own[n] and not t.is_meta}
        if given.keys() == own.keys() or not of_expert.keys() <= own.keys():
            taken = self._counts(of_expert, stacked, own)
            of_expert = of_expert if taken else {}
        elif given:  # some of the experts: what is missing is missed, and filled
            of_expert = {n: t for n, t in of_expert.items() if n not in given}
            missing_keys += [prefix + name for name in of_expert]
        for name, value in of_expert.items():
            if name in own:
                state_dict[keys[name]] = repeated(value, own[name])
            else:
                error_msgs.append(f"{prefix}{name} is computed from others: the dense weights cannot be loaded into it")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _completed(self, dense: Mapping[str, Tensor], prefix: str, missing_keys: list[str]) -> dict[str, Tensor]:
        """With the mean in place of the other projection of a GLU, where one is missing."""
        completed = dict(dense)
        for which in ("weight", "bias"):
            of_kind = [name for name in self.dense_names() if name.endswith(which)]
            missing = [name for name in of_kind[:-1] if name not in dense]  # but for the down projection
            if missing and len(missing) < len(of_kind) - 1:
                merged = self.merged_dense()
                completed |= {name: merged[name].detach() for name in missing}
                missing_keys += [prefix + name for name in missing]
        return completed

    def _counts(
        self, of_expert: Mapping[str, Tensor], stacked: Mapping[str, Tensor], own: Mapping[str, Tensor]
    ) -> bool:
        """Whether dense weights are to be taken, and not the experts beside them, which are all there."""
        if not of_expert.keys() <= own.keys():
            return stacked.keys() != own.keys()  # what some are computed from may be there
        is_own = all(_shares_memory(t, own[n]) for n, t in stacked.items())
        is_edited = self.__dict__.get("_versions") != _versions(own.values())
        if all(_is_mean(t, stacked[n].detach(), exactly=is_own and not is_edited) for n, t in of_expert.items()):
            return False
        if is_own and not is_edited:
            return True  # they were written over a part of `state_dict()`
        kept, lost = ("experts", "dense weights") if is_own else ("dense weights", "experts")
        warnings.warn(
            f"a state dict has experts of a {type(self).__name__} whose mean is not what it has for the dense weights: "
            f"the {kept} are taken; leave out the {kept} to have the {lost}",
            stacklevel=2,
        )
        return not is_own

    # --- what loaders set by name, as transformers' does ---

    _pending: dict[str, Tensor]
    _is_being_made = False  # on the meta device: a loader is yet to give memory and values

    def set_dense(self, name: str, value: Tensor) -> None:
        """One tensor of the dense module. When the last has come, all experts get them.

        Of a module that was made on the meta device a loader may give the experts, too, before or after: it is decided
        at the end, by the rule for state dicts.
        """
        pending = self.__dict__.setdefault("_pending", {})
        pending[name] = value
        if pending.keys() >= set(self.dense_names()) and not self._is_being_made:
            self.take_pending()

    def train(self, mode: bool = True) -> Any:
        self.take_pending()  # loaders end with eval()
        return super().train(mode)

    def take_pending(self) -> None:
        """Gives all experts the dense weights that were set."""
        dense, own = self.__dict__.get("_pending"), dict(self.named_parameters())
        if any(parameter.is_meta for parameter in own.values()):
            self._is_being_made = True
            return
        if dense:
            del self._pending
            of_expert = self.stack(dense)
            # Values may have been cast on the way, and their mean is that of others then.
            is_mean = all(_is_mean(t, own[n].detach(), tolerance=_OF_16_BITS) for n, t in of_expert.items())
            with torch.no_grad():
                for name, value in of_expert.items() if not (self._is_being_made and is_mean) else ():
                    own[name].copy_(repeated(value, own[name]))
        self._is_being_made = False


class WeightsOfExperts(Tensor):
    """Shape and type of a weight that experts have in its place: whoever reads or writes values gets an error."""

    @staticmethod
    def __new__(cls, like: Tensor, where: str) -> WeightsOfExperts:
        made: Any = torch.empty_like(like, device="meta").as_subclass(cls)
        made.where = where
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of_shape = ("size", "dim", "numel", "element_size", "is_floating_point", "__repr__")
        is_attribute = func.__name__ == "__get__" and func.__self__.__name__ not in ("data", "grad")
        if is_attribute or func.__name__ in of_shape:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(_in_its_place(getattr(args[0], "where", "a weight")))  # a TypeError tries the other operand


def _in_its_place(where: str) -> str:
    return f"{where} has experts in its place: load a state dict, or fold the model before"


class DenseProjection(nn.Module):
    """What is found under the name of a dense module's projection: its shapes, and a way for loaders to set them.

    Paths of the keys of a state dict are walked, attribute by attribute, by torch.distributed.checkpoint too.
    """

    def __init__(self, layer: CarriesDense | None, path: str, tensors: Mapping[str, Tensor]):
        """`tensors`: of the dense module, by their names below `path`; without a layer they cannot be set."""
        super().__init__()
        self.__dict__["_of"] = layer, path, tensors

    def __getattr__(self, name: str) -> Any:
        layer, path, tensors = self.__dict__["_of"]
        if name in tensors:
            return WeightsOfExperts(tensors[name], f"{path}.{name}")
        below = {inner.removeprefix(f"{name}."): t for inner, t in tensors.items() if inner.startswith(f"{name}.")}
        return DenseProjection(layer, f"{path}.{name}", below) if below else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            layer, path, _ = self.__dict__["_of"]
            if layer is None:
                raise RuntimeError(_in_its_place(f"{path}.{name}"))
            layer.set_dense(f"{path}.{name}", value.detach())
        else:
            super().__setattr__(name, value)


def repeated(value: Tensor, parameter: Tensor) -> Tensor:
    """An expert's tensor for all experts of a parameter, in memory of its own, sharded as the parameter is."""
    stacked = _whole(value).detach().unsqueeze(0).repeat(len(parameter), *(1,) * value.ndim)
    if not shards.is_sharded(parameter):
        return stacked
    from torch.distributed.tensor import distribute_tensor

    placed: Any = parameter
    return distribute_tensor(stacked.to(placed.device), placed.device_mesh, placed.placements, src_data_rank=None)


def on_all_ranks(of_expert: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What any of the processes has that share the parameters: loaders may give a whole state dict to one of them."""
    placed: Any = next((p for p in own.values() if shards.is_sharded(p)), None)
    if placed is None:
        return of_expert
    import torch.distributed as dist

    for dim in range(placed.device_mesh.ndim):
        group = placed.device_mesh.get_group(dim)
        numbers: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(numbers, len(of_expert), group)
        if len(set(numbers)) > 1:
            source = dist.get_global_rank(group, numbers.index(max(numbers)))
            box = [{name: _whole(t).cpu() for name, t in of_expert.items()}]
            dist.broadcast_object_list(box, source, group)
            (of_expert,) = box
    return of_expert


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if shards.is_sharded(tensor) else tensor


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    if shards.storage_of(a) == shards.storage_of(b):
        return True
    a, b = shards.local(a), shards.local(b)
    return a.numel() > 0 and a.data_ptr() == b.data_ptr()


def _is_mean(a: Tensor, experts: Tensor, *, exactly: bool = False, tolerance: float | None = None) -> bool:
    """Whether `a` is the experts' mean; of norms, or but for the last bits."""
    a, mean = _whole(a), _whole(functional.merge_experts(experts))
    if a.shape != mean.shape:
        return False
    a, mean = a.detach().to(mean.device), mean.detach()
    if exactly:
        return torch.allclose(a.to(mean.dtype), mean, rtol=2 * torch.finfo(mean.dtype).eps, atol=0)
    if tolerance is None:
        tolerance = max(_TOLERANCES.get(t.dtype, _OF_16_BITS) for t in (a, mean))
    return bool((a.double() - mean.double()).norm() <= tolerance * mean.double().norm())


def _versions(parameters: Iterable[Tensor]) -> list[int]:
    """How often each was written into."""
    return [-1 if p.is_inference() else shards.local(p)._version for p in parameters]


# What wrappers put into the names of parameters, and what of it into those of a state dict.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _in_state_dicts(name: str) -> str:
    return name.replace(_WRAPPERS[0], "")
