"""Seeds of the deal, drawn from torch's default generators: on the host, so that nobody waits for a GPU.

A seed is a Python int, unless it lives on a GPU: there it is an int64 tensor with one element.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from . import private_torch
from .kernels import graphs


def fresh(like: Tensor) -> int | Tensor:
    """A seed from torch's default generator of the tensor's device."""
    if like.is_cuda and not graphs.is_capturing(like.device):
        return _draw_on_host(like.device)
    # In a CUDA graph the seed must be drawn by the graph, in each replay.
    # `high` is exclusive and at most the largest int64, so 2^63 − 1 alone is never drawn.
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=like.device)
    return int(seed) if like.device.type == "cpu" else seed


def _draw_on_host(device: torch.device) -> int:
    """A seed from torch's default generator of a GPU, drawn without asking the GPU for anything.

    The generator's state is on the host: a seed and an offset, which every random kernel advances when it is
    launched. So does this, as if it had launched one; `torch.manual_seed` and checkpointing reproduce it.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # it must be a multiple of four
    return from_state(generator.initial_seed(), offset)


def from_state(initial_seed: int, offset: int) -> int:
    """A seed in 0…2⁶³−1 from the state of a generator."""
    return _mix64(_mix64(initial_seed) + offset) >> 1


def _mix64(z: int) -> int:
    """splitmix64's step on a Python int."""
    mask = 2**64 - 1
    z = (z + 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


# The seeds last drawn, more than there can be layers times batches between a forward and its backward.
_drawn: OrderedDict[int, None] = OrderedDict()
_MAX_DRAWN = 65536


def of_deal(like: Tensor) -> int | Tensor:
    """A fresh seed of a deal, which in backward must be one that forward drew: there a deal is only ever made again."""
    seed = fresh(like)
    if isinstance(seed, Tensor):
        return seed
    if not private_torch.is_in_backward():
        _drawn[seed] = None
        _drawn.move_to_end(seed)
        if len(_drawn) > _MAX_DRAWN:
            _drawn.popitem(last=False)
    elif seed not in _drawn:
        raise RuntimeError(
            "RandomPartitionMoE was computed again in backward with another deal of the tokens than in forward, so "
            "that gradients would be wrong: use checkpointing with preserve_rng_state=True, or give the layer its seed"
        )
    return seed


def tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """As operations take it."""
    return seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def on_host(seed: Tensor | None) -> int | Tensor | None:
    """As backends take what operations got: an int, unless it is on a GPU."""
    return int(seed) if seed is not None and seed.device.type == "cpu" else seed
