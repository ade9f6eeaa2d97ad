"""What ranks send one another of gradients in 8 bits: one payload for each rank, and what of which parameter is in it.

A payload has codes `[128 · blocks]`, scales `[blocks]` and, behind them, what is sent as it is. Blocks never cross a
parameter, each of which is cut into equal parts, one for each rank; a payload ends with as many empty blocks as make it
as long as the longest.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import exchange as kernels
from ..kernels.exchange import BLOCK, num_blocks
from ..modules import holds_experts

# Of gradients that are exchanged at once. Smaller ones gain nothing, and go as they are, by one collective.
MIN_BYTES = 2**23


def is_exact(parameter: Tensor) -> bool:
    """Whether its gradient is sent as it is: it has one dimension, or is a bias of experts, which has two."""
    return parameter.ndim <= 1 or (parameter.ndim == 2 and holds_experts(parameter))


def can_be_coded(gradients: Tensor, min_bytes: int, group: dist.ProcessGroup) -> bool:
    """Whether it is worth it, and they are dense, of a type that float32 can hold."""
    if gradients.layout != torch.strided or gradients.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return gradients.nbytes >= min_bytes and group.size() > 1


def all_gather(received: Tensor, sent: Tensor, group: dist.ProcessGroup) -> Any:
    """Begins it, and returns the work. Its name in PyTorch has changed."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(received, sent, group=group, async_op=True)


def reduce_scatter(reduced: Tensor, given: Tensor, op: Any, group: dist.ProcessGroup) -> None:
    """Likewise; waits for it, on a GPU by the stream."""
    (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(reduced, given, op=op, group=group)


class Piece(NamedTuple):
    """Some elements of a tensor, in the payload of one rank, from a block on."""

    tensor: int
    first: int
    size: int
    rank: int
    block: int


class Layout:
    """Of payloads for `world_size` ranks. All are the same size.

    Attributes:
        pieces: of tensors in 8 bits.
        exact: numbers of the tensors that are sent as they are.
        num_exact: their elements for each rank, all of them together cut into equal parts.
    """

    def __init__(self, sizes: Sequence[int], exact: Sequence[bool], itemsize: int, world_size: int):
        self.exact = [i for i, is_exact in enumerate(exact) if is_exact]
        self.pieces: list[Piece] = []
        filled = [0] * world_size
        for i in [i for i, is_exact in enumerate(exact) if not is_exact]:
            # By the tensor alone, whatever lies beside it: DDP makes its buckets anew after the first step.
            count, turn = num_blocks(sizes[i]), sizes[i] * 0x9E3779B1 >> 8
            starts = [count * part // world_size for part in range(world_size + 1)]
            for part, (start, stop) in enumerate(itertools.pairwise(starts)):
                rank, first = (part + turn) % world_size, start * BLOCK
                if start < stop:
                    self.pieces.append(Piece(i, first, min(stop * BLOCK, sizes[i]) - first, rank, filled[rank]))
                    filled[rank] += stop - start
        self.blocks = max(filled) + max(filled) % 2  # so that all begins at 4 bytes
        self.num_exact = -(-sum(sizes[i] for i in self.exact) // world_size)
        self._start_of_exact = -(-self.blocks * (BLOCK + 2) // 8) * 8
        self.num_bytes = self._start_of_exact + -(-self.num_exact * itemsize // 8) * 8

    def codes(self, payloads: Tensor) -> Tensor:
        """int8 `[W, 128 · blocks]` of uint8 `[W, bytes]`."""
        return payloads[:, : self.blocks * BLOCK].view(torch.int8)

    def scales(self, payloads: Tensor) -> Tensor:
        start = self.blocks * BLOCK
        return payloads[:, start : start + 2 * self.blocks].view(torch.bfloat16)

    def as_they_are(self, payloads: Tensor, dtype: torch.dtype) -> Tensor:
        """`[W, num_exact]`."""
        start = self._start_of_exact
        return payloads[:, start : start + self.num_exact * dtype.itemsize].view(dtype)

    def encode(self, tensors: Sequence[Tensor], payloads: Tensor, residuals: Sequence[Tensor | None]) -> None:
        """Fills payloads for all ranks; tensors are flat. Residuals are added, and become what is lost."""
        codes, scales = self.codes(payloads), self.scales(payloads)
        for i, first, size, rank, block in self.pieces:
            stop, own = block + num_blocks(size), residuals[i]
            rest = None if own is None else own[first : first + size]
            code = codes[rank, block * BLOCK : stop * BLOCK]
            kernels.encode(tensors[i][first : first + size], code, scales[rank, block:stop], rest)
        if self.exact:
            whole = torch.cat([tensors[i] for i in self.exact])
            whole = torch.nn.functional.pad(whole, (0, len(payloads) * self.num_exact - len(whole)))
            self.as_they_are(payloads, whole.dtype).copy_(whole.view(len(payloads), -1))

    def decode(self, payloads: Tensor, tensors: Sequence[Tensor]) -> None:
        """Fills tensors, flat, from what all ranks have made of them."""
        codes, scales = self.codes(payloads), self.scales(payloads)
        for i, first, size, rank, block in self.pieces:
            stop = block + num_blocks(size)
            code = codes[rank, block * BLOCK : stop * BLOCK]
            kernels.decode(code, scales[rank, block:stop], tensors[i][first : first + size])
        if self.exact:
            sizes = [len(tensors[i]) for i in self.exact]
            whole = self.as_they_are(payloads, tensors[0].dtype).flatten()[: sum(sizes)]
            for i, value in zip(self.exact, whole.split(sizes), strict=True):
                tensors[i].copy_(value)

    def total(self, payloads: Tensor, dtype: torch.dtype, factor: float) -> tuple[Tensor, Tensor]:
        """factor · Σ over ranks of what they sent: of codes, float32 `[128 · blocks]`, and of the rest, in float32."""
        exact = self.as_they_are(payloads, dtype).to(torch.float32 if dtype.itemsize < 4 else dtype)
        of_exact = torch.zeros_like(exact[0])
        for values in exact:
            of_exact += values
        return kernels.total(self.codes(payloads), self.scales(payloads), factor), of_exact * factor


@functools.lru_cache(maxsize=1024)
def layout(sizes: tuple[int, ...], exact: tuple[bool, ...], itemsize: int, world_size: int) -> Layout:
    return Layout(sizes, exact, itemsize, world_size)


def new_payloads(count: int, num_bytes: int, like: Tensor) -> Tensor:
    """Zeros: nobody computes from what was in memory before."""
    return torch.zeros(count, num_bytes, dtype=torch.uint8, device=like.device)
