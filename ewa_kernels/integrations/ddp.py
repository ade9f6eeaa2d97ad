"""DistributedDataParallel: gradients exchanged in 8 bits, a quarter of float32's bytes.

ddp = DistributedDataParallel(model)
ddp.register_comm_hook(QuantizedAllReduce(), quantized_all_reduce)

Each rank gets from all others, in 8 bits, its part of the gradients, sums it up in float32, and sends the mean to all,
in 8 bits again. All read the same bytes, so that replicas stay equal, bit for bit. Parameters of one dimension, and
biases of experts, are sent as they are, and so is a bucket that is small.
"""

# Without `from __future__ import annotations`: DDP compares the hook's annotations with types.
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..kernels import exchange as kernels
from . import payload

if not dist.is_available():
    raise ImportError("ewa_kernels.integrations.ddp needs torch.distributed: pip install a PyTorch built with it")

from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from . import fsdp

__all__ = ["QuantizedAllReduce", "quantize_gradients", "quantized_all_reduce"]


class QuantizedAllReduce:
    """The state of `quantized_all_reduce`: what `register_comm_hook` takes first.

    With `error_feedback` what 8 bits lose of a gradient is added to the next one, in float32, and so is lost to none:
    four bytes for each parameter's element; but for a parameter that no rank has used, whose mean DDP drops. It is a
    part of the training's state, on each rank its own:

        torch.save({..., "exchange": state.state_dict(ddp.module)}, f"rank{rank}.pt")

    Args:
        error_feedback: whether it is kept.
        min_bytes: of a bucket; a smaller one is reduced as it is.
        process_group: None for the default group.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of range.
    """

    def __init__(
        self,
        error_feedback: bool = False,
        *,
        min_bytes: int = payload.MIN_BYTES,
        process_group: dist.ProcessGroup | None = None,
    ):
        checks.boolean("error_feedback", error_feedback)
        checks.integer("min_bytes", min_bytes, minimum=0)
        self.error_feedback, self.min_bytes, self.process_group = error_feedback, min_bytes, process_group
        self._residuals: dict[Tensor, Tensor] = {}

    def residuals(self, parameters: list[Tensor]) -> list[Tensor | None]:
        """Of each, flat; None of those that are sent as they are, and without error feedback."""
        coded = [p for p in parameters if self.error_feedback and not payload.is_exact(p)]
        for p in coded:
            if p not in self._residuals:
                self._residuals[p] = torch.zeros(p.numel(), dtype=torch.float32, device=p.device)
        return [self._residuals.get(p) for p in parameters]

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """What was lost and is to be added, float32 `[n]`, by the names of the parameters. Of this rank alone."""
        checks.module("model", model)
        return {name: self._residuals[p] for name, p in model.named_parameters() if p in self._residuals}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], model: nn.Module) -> None:
        """
        Raises:
            TypeError: `model` is not an nn.Module, or a value not a Tensor.
            ValueError: a name is none of the model's, or its size is another, or there is no error feedback. Nothing
                has been changed then.
        """
        checks.module("model", model)
        if state_dict and not self.error_feedback:
            raise ValueError(f"error_feedback must be True to load what was lost, got {len(state_dict)} tensors of it")
        named = dict(model.named_parameters())
        loaded: dict[Tensor, Tensor] = {}
        for name, value in state_dict.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"state_dict must have Tensors, got {name}: {type(value).__name__}")
            if name not in named or value.shape != (named[name].numel(),):
                size = f"{named[name].numel()} elements" if name in named else "no such parameter"
                raise ValueError(f"state_dict must be the model's, got {name} {list(value.shape)}, and it has {size}")
            loaded[named[name]] = value.detach().to(named[name].device, torch.float32, copy=True)
        self._residuals = loaded


@torch.no_grad()
def quantized_all_reduce(state: QuantizedAllReduce, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook: the mean over ranks of a bucket of gradients; see `QuantizedAllReduce`."""
    group = state.process_group or dist.group.WORLD
    assert group is not None
    buffer, world_size = bucket.buffer(), group.size()
    if not payload.can_be_coded(buffer, state.min_bytes, group):
        work: Any = dist.all_reduce(buffer.div_(world_size), group=group, async_op=True)
        return work.get_future().then(_first)
    grads, parameters = [grad.view(-1) for grad in bucket.gradients()], bucket.parameters()
    exact = tuple(map(payload.is_exact, parameters))
    layout = payload.layout(tuple(map(len, grads)), exact, buffer.dtype.itemsize, world_size)
    residuals = state.residuals(parameters)
    sent = payload.new_payloads(world_size, layout.num_bytes, buffer)
    layout.encode(grads, sent, residuals)
    received = torch.empty_like(sent)
    # It is waited for here, on a GPU by the stream: a collective must not be begun by what a future calls.
    dist.all_to_all_single(received, sent, group=group)
    mean, of_exact = layout.total(received, buffer.dtype, 1 / world_size)
    own = payload.new_payloads(1, layout.num_bytes, buffer)
    lost = torch.zeros_like(mean) if state.error_feedback else None
    kernels.encode(mean, layout.codes(own)[0], layout.scales(own)[0], lost)
    layout.as_they_are(own, buffer.dtype).copy_(of_exact)
    if lost is not None:
        # This rank alone makes up for what the mean has lost here, of which each has a part of 1 / W.
        for i, first, size, rank, block in layout.pieces:
            residual = residuals[i]
            if rank == dist.get_rank(group) and residual is not None:
                start = block * kernels.BLOCK
                residual[first : first + size].add_(lost[start : start + size], alpha=world_size)
    work = payload.all_gather(sent.view(-1), own.view(-1), group)

    def read(future: Any) -> Tensor:
        future.value()
        layout.decode(sent, grads)
        return buffer

    return work.get_future().then(read)


def _first(future: Any) -> Tensor:
    return future.value()[0]


# Of models that `quantize_gradients` was called with: a trainer may wrap a model once, and train it twice.
_states: weakref.WeakKeyDictionary[DistributedDataParallel, QuantizedAllReduce] = weakref.WeakKeyDictionary()


def quantize_gradients(
    model: nn.Module, *, error_feedback: bool = False, min_bytes: int = payload.MIN_BYTES
) -> QuantizedAllReduce | None:
    """Exchanges the gradients of a model in 8 bits, whether DDP or FSDP2 shares it among ranks.

    For loops that wrap the model themselves: of Accelerate what `prepare` returns, of Lightning's strategy its `model`.

    Args:
        model: or a module that holds it.
        error_feedback, min_bytes: see `QuantizedAllReduce`; FSDP2 has no error feedback.

    Returns:
        The state of the hook that DDP got, or has from an earlier call; None for FSDP2.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: nobody shares it, or FSDP2 does, with error feedback.
        RuntimeError: DDP has another hook already.
    """
    checks.module("model", model)
    wrapped = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    state = QuantizedAllReduce(error_feedback, min_bytes=min_bytes)
    for parallel in wrapped:
        if parallel in _states:
            state = _states[parallel]
            continue
        _states[parallel] = state
        state.process_group = parallel.process_group
        parallel.register_comm_hook(state, quantized_all_reduce)
    if wrapped:
        return state
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("model must be wrapped by DDP or sharded by FSDP2: call it with what is trained")
    if error_feedback:
        raise ValueError("error_feedback must be False for FSDP2, got True: it would be as large as the whole model")
    fsdp.quantize_gradients(model, min_bytes=min_bytes)
    return None
