"""torch.distributed: how FSDP2 shards experts, folding a sharded model, and a partition for each rank.

model = ...  # after ewa.replace_ffn_
for block in model.blocks:
    fully_shard(block, shard_placement_fn=expert_shard_placement)
fully_shard(model, shard_placement_fn=expert_shard_placement)
averager = ewa.ExpertAverager(model, share_rate=0.03)
averager.attach(optimizer)
...
state_dict = folded_state_dict(model)  # on every rank

Gradients in 8 bits, instead of reduce-scatter in their own type: `quantize_gradients(model)` after `fully_shard`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not dist.is_available():
    raise ImportError("ewa_kernels.integrations.fsdp needs torch.distributed: pip install a PyTorch built with it")

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard

from .. import checks, private_torch
from ..kernels.exchange import BLOCK
from ..models.pairs import PairedExperts
from ..models.replace import folded_state_dict as _folded_state_dict
from ..modules import StackedExperts, holds_experts
from ..train import shards
from . import payload

__all__ = [
    "QuantizedReduceScatter",
    "expert_shard_placement",
    "fold_rank_into_seed_",
    "folded_state_dict",
    "quantize_gradients",
]


def expert_shard_placement(param: nn.Parameter, *, num_shards: int | None = None) -> Shard | None:
    """What `fully_shard(…, shard_placement_fn=…)` takes: shards stacked experts so that averaging sends nothing.

    A stacked tensor `[E, ...]` of a `RandomPartitionMoE` is sharded by the first other dimension that `num_shards`
    divides, so that each rank holds all experts of some rows.

    Args:
        param: what `fully_shard` asks about, a parameter that is not sharded yet (or for tensor parallelism only).
        num_shards: how many ranks share a tensor; None for all of the default process group, which is right for
            hybrid sharding as well, whose shards are fewer. Where no dimension can be divided by all ranks, but by
            these: `functools.partial(expert_shard_placement, num_shards=…)`.

    Returns:
        None, which is `Shard(0)`, for any other parameter, and where no dimension can be divided: FSDP2 pads the
        first dimension only. Averaging then exchanges shards.

    Raises:
        TypeError: `param` is not a Tensor, or `num_shards` not an int.
        ValueError: `num_shards` is less than 1.
        RuntimeError: `num_shards` is None, and there is no process group.
    """
    if not isinstance(param, Tensor):
        raise TypeError(f"param must be a Parameter, got {type(param).__name__}")
    if num_shards is None:
        if not dist.is_initialized():
            raise RuntimeError("num_shards must be given where there is no process group: call init_process_group()")
        num_shards = dist.get_world_size()
    checks.integer("num_shards", num_shards, minimum=1)
    if not holds_experts(param):
        return None
    shape = shards.local(param).shape
    return next((Shard(dim) for dim in range(1, len(shape)) if shape[dim] > 0 and shape[dim] % num_shards == 0), None)


@torch.no_grad()
def folded_state_dict(model: nn.Module, *, keep_on: int | None = 0) -> dict[str, Any]:
    """`ewa_kernels.folded_state_dict` of a sharded model, with whole tensors on the CPU. Every rank must call it.

    `ewa_kernels.folded_state_dict` itself gives sharded tensors, which torch.distributed.checkpoint takes, and
    which `set_model_state_dict` loads into the dense model sharded as you like.

    Args:
        keep_on: the rank that gets the result, the others get an empty dict; None for all.

    Raises:
        TypeError: `model` is not an nn.Module, or `keep_on` not an int.
    """
    if keep_on is not None:
        checks.integer("keep_on", keep_on, minimum=0)
    keep = keep_on is None or not dist.is_initialized() or dist.get_rank() == keep_on
    whole = {}
    for name, value in _folded_state_dict(model).items():
        if shards.is_sharded(value):
            value = value.full_tensor()
        if keep:
            whole[name] = value.cpu() if isinstance(value, Tensor) else value
    return whole


def fold_rank_into_seed_(model: nn.Module, rank: int | None = None) -> None:
    """Lets every rank deal its tokens in another way, although all call `torch.manual_seed` with the same number.

    Without it the rank's generator decides alone. Nothing is communicated, and no number is drawn. A seed that is
    given to a layer is left as it is.

    Args:
        model: with random-partition experts, wrapped or not.
        rank: int in 0…2³²−1; None for this process's in the default group. Ranks that work on the same tokens (tensor
            parallelism) must get the same; rank 0 deals as if this had not been called.

    Raises:
        TypeError, ValueError: `model` is not an nn.Module with such a layer, or `rank` none of those above.
        RuntimeError: `rank` is None, and there is no process group.
    """
    checks.module("model", model)
    if rank is None:
        if not dist.is_initialized():
            raise RuntimeError("rank must be given where there is no process group: call init_process_group()")
        rank = dist.get_rank()
    checks.integer("rank", rank, minimum=0, below=2**32)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, StackedExperts)]
    layers += {module.deal for module in model.modules() if isinstance(module, PairedExperts)}
    if not layers:
        raise ValueError("model must have RandomPartitionMoE layers: call replace_ffn_(model) first")
    for layer in layers:
        layer.seed_offset = shards.seed_of(0, rank)


class QuantizedReduceScatter:
    """Sums gradients over ranks in 8 bits: what `FSDPModule.set_custom_reduce_scatter` takes.

    Each rank gets from all others its shard in 8 bits, and sums it up in float32; nothing is rounded after. With
    hybrid sharding the second reduction, between replicas, is FSDP2's own. FSDP2 must be asked for sums:
    `set_force_sum_reduction_for_comms(True)`. `quantize_gradients` does both for all of a model.

    Gradients of one dimension, and of biases of experts, are sent as they are; no block of 128 elements crosses a
    parameter. Of which parameters they are FSDP2 does not say: it is found in the frame of its function, and where that
    is another in some version of PyTorch, all is sent as it is.

    Args:
        min_bytes: of all gradients that are exchanged at once; fewer are reduced as they are.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of range.
    """

    def __init__(self, *, min_bytes: int = payload.MIN_BYTES):
        checks.integer("min_bytes", min_bytes, minimum=0)
        self.min_bytes = min_bytes

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for FSDP2."""
        return torch.empty(*size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """
        Raises:
            ValueError: `op` is neither a sum nor a mean.
        """
        world_size = group.size()
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(f"op must be SUM, got {op}: call set_force_sum_reduction_for_comms(True) on the module")
        can_be_coded = payload.can_be_coded(input_tensor, self.min_bytes, group)
        parts = private_torch.parameters_being_reduced() if can_be_coded else None
        if parts is None or sum(size for _, size in parts) != len(output_tensor):
            payload.reduce_scatter(output_tensor, input_tensor, op, group)
            return
        sizes, exact = tuple(size for _, size in parts), tuple(payload.is_exact(p) for p, _ in parts)
        layout = payload.layout(sizes, exact, input_tensor.dtype.itemsize, 1)  # of one rank's shard
        sent = payload.new_payloads(world_size, layout.num_bytes, input_tensor)
        for rank, shard in enumerate(input_tensor.view(world_size, -1)):
            layout.encode(shard.split(sizes), sent[rank : rank + 1], [None] * len(sizes))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        factor = 1 / world_size if op == dist.ReduceOp.AVG else 1.0
        total, of_exact = layout.total(received, input_tensor.dtype, factor)
        outputs = output_tensor.split(sizes)
        for i, _, size, _, block in layout.pieces:
            start = block * BLOCK
            outputs[i].copy_(total[start : start + size])
        for i, value in zip(layout.exact, of_exact.split([sizes[i] for i in layout.exact]), strict=True):
            outputs[i].copy_(value)


def quantize_gradients(model: nn.Module, *, min_bytes: int = payload.MIN_BYTES) -> None:
    """Exchanges the gradients of all FSDP2 modules of a model in 8 bits: `QuantizedReduceScatter` for each.

    Args:
        model: after `fully_shard`.
        min_bytes: see `QuantizedReduceScatter`.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: it has no FSDPModule.
    """
    checks.module("model", model)
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        raise ValueError("model must have FSDP2 modules: call fully_shard on it first")
    for module in sharded:
        comm: Any = QuantizedReduceScatter(min_bytes=min_bytes)
        module.set_force_sum_reduction_for_comms(True)
        module.set_custom_reduce_scatter(comm)
