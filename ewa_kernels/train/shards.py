"""Experts that are sharded over processes, as DTensors: what of them this process holds.

Averaging couples numbers of different experts at one place. Where no process holds a part of the experts only, each
averages its shard and nothing is sent; else shards are exchanged first, so that each process has all experts of some
places.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from .. import checks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_Seed = TypeVar("_Seed", int, Tensor)
# Odd, so that no two keys give the same offset, and far from what tells one step's seed from the next.
_SEED_STRIDE = 0x5851F42D4C957F2D


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. Its module is imported only for what is no common tensor: that takes a second."""
    if type(tensor) in (Tensor, nn.Parameter) or not isinstance(tensor, Tensor):
        return False
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it: the same object at each call, which the public `to_local` does not promise."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def storage_of(tensor: Tensor) -> int:
    """What tells memory from other memory, for as long as it is alive; of a DTensor that of this process."""
    return local(tensor).untyped_storage()._cdata


def sharding(tensor: Any) -> Any:
    """Shape, placements and mesh of a DTensor; None of any other tensor."""
    return (tuple(tensor.shape), tensor.placements, tensor.device_mesh) if is_sharded(tensor) else None


def unsharded_modules(model: nn.Module) -> list[Any]:
    """Those to which `fully_shard` was applied, and whose parameters are gathered at present, until `reshard()`."""
    if "torch.distributed.fsdp" not in sys.modules:  # importing it takes long
        return []
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return [module for module in modules if any(not group.is_sharded for group in _parameter_groups(module))]


def _parameter_groups(module: Any) -> list[Any]:
    """What FSDP2 keeps of a module's parameters: in older versions of torch one object, or None."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def check_not_gathered(model: nn.Module, experts: Mapping[str, Tensor | Sequence[Tensor]]) -> None:
    """Raises RuntimeError if FSDP2 has gathered any of the experts: it forgets what such copies become."""
    modules = unsharded_modules(model)
    if not modules:
        return
    gathered = {p for module in modules for p in module.parameters() if not is_sharded(p)}
    for name, group in experts.items():
        if not gathered.isdisjoint([group] if isinstance(group, Tensor) else group):
            raise RuntimeError(
                f"{name} must be sharded when the optimizer steps, but FSDP2 has gathered it, in a forward after the "
                "backward or by set_reshard_after_backward(False): call reshard() on each module that was fully_sharded"
            )


def splits_experts(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a process holds a part of the experts only."""
    return is_sharded(tensor) and any(
        getattr(placement, "dim", None) == 0 and tensor.device_mesh.size(i) > 1
        for i, placement in enumerate(tensor.placements)
    )


def whole_experts(tensor: Tensor) -> Tensor:
    """`tensor` `[E, ...]`, or a copy of it that is sharded by other dimensions than the experts'. Then collective."""
    return _exchange(tensor) if splits_experts(tensor) else tensor


def _exchange(tensor: DTensor) -> DTensor:
    from torch.distributed.tensor import Replicate, Shard

    taken = {getattr(placement, "dim", None) for placement in tensor.placements}
    free = [dim for dim in range(1, tensor.ndim) if dim not in taken]
    instead = Shard(max(free, key=lambda dim: tensor.shape[dim])) if free else Replicate()
    # Two dimensions of the mesh may share the experts; one takes the free dimension, which is enough to be right.
    placements = []
    for placement in tensor.placements:
        is_split = getattr(placement, "dim", None) == 0
        placements.append(instead if is_split else placement)
        instead = Replicate() if is_split else instead
    return tensor.redistribute(placements=placements)


class Experts:
    """Stacked tensors, and lists of experts, as this process can average them.

    Attributes:
        local: for each group what this process holds: all experts of some places.
        keys: for each group 0 if every process holds the same, else 1 + the number of this process's shard. Random
            bits must be equal where the key is, and should not be where it is not.
    """

    def __init__(self, groups: Any, *, exchange: bool = True):
        """Collective if `exchange`: then shards that split the experts are exchanged; else they are left out.

        Raises:
            TypeError, ValueError: a DTensor is no floating tensor `[E, ...]`; it is Partial, or split in an order
                that cannot be exchanged; the experts of a list are sharded in different ways.
        """
        self.local: Any = groups
        self.keys: list[int] = []
        self._exchanged: list[tuple[DTensor, DTensor]] = []
        if isinstance(groups, Tensor) or not isinstance(groups, Iterable):
            return  # an error that is not ours
        self.local = []
        for i, group in enumerate(groups):
            if isinstance(group, (list, tuple)):
                _check_alike(f"tensors[{i}]", group)
                self.local.append([local(expert) for expert in group])
                self.keys.append(_key(group[0]) if group else 0)
                continue
            whole = group
            if is_sharded(group):
                checks.stacked(f"tensors[{i}]", group)
                _check_placements(f"tensors[{i}]", group, is_stacked=True)
            if splits_experts(group):
                if not exchange:
                    continue
                whole = _exchange(group)
                self._exchanged.append((group, whole))
            self.local.append(local(whole))
            self.keys.append(_key(whole))

    def write_back(self) -> None:
        """Gives every process its part of what was exchanged. Collective if there is any."""
        for tensor, whole in self._exchanged:
            local(tensor).copy_(local(whole.redistribute(placements=tensor.placements)))


def seed_of(seed: _Seed, key: int) -> _Seed:
    """Another seed for each key, as those of `Experts.keys`; the same for key 0. One on a GPU is not read."""
    return seed if key == 0 else seed ^ (key * _SEED_STRIDE % 2**63)


def sum_over_shards(value: Tensor, tensor: DTensor) -> Tensor:
    """The sum of a number over all shards of a tensor, each once. Collective."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Replicate() if placement.is_replicate() else Partial() for placement in tensor.placements]
    return DTensor.from_local(value, tensor.device_mesh, placements, run_check=False).full_tensor()


def any_process(flag: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether it is true on any process that holds a shard of the tensors. Collective if there are DTensors."""
    from_mesh = {tensor.device_mesh: tensor for tensor in tensors if is_sharded(tensor)}
    for mesh, tensor in from_mesh.items():
        from torch.distributed.tensor import DTensor, Partial

        count = torch.tensor(float(flag), device=local(tensor).device)
        total = DTensor.from_local(count, mesh, [Partial()] * mesh.ndim, run_check=False).full_tensor()
        flag = bool(total > 0)
    return flag


def _key(tensor: Any) -> int:
    """See `Experts.keys`."""
    if not is_sharded(tensor):
        return 0
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this process is not in the mesh"
    number, num_shards = 0, 1
    for i, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            size = tensor.device_mesh.size(i)
            number, num_shards = number * size + coordinate[i], num_shards * size
    return 0 if num_shards == 1 else 1 + number


def _check_alike(name: str, group: Sequence[Any]) -> None:
    for e, expert in enumerate(group):
        if sharding(expert) != sharding(group[0]):
            raise ValueError(
                f"{name}[{e}] must have the shape and the sharding of {name}[0], {sharding(group[0])}, "
                f"got {sharding(expert)}"
            )
    if group and is_sharded(group[0]):
        _check_placements(f"{name}[0]", group[0], is_stacked=False)


def _check_placements(name: str, tensor: DTensor, is_stacked: bool) -> None:
    from torch.distributed.tensor import Shard

    for placement in tensor.placements:
        if placement.is_partial():
            raise ValueError(f"{name} must be sharded or replicated, got the placements {tensor.placements}")
    plain = all(type(placement) is Shard or placement.is_replicate() for placement in tensor.placements)
    if is_stacked and splits_experts(tensor) and not plain:
        raise ValueError(f"{name} must be split into plain shards over its experts, got {tensor.placements}")
