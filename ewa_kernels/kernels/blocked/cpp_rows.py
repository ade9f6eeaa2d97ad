"""What is done to a block of grouped rows between matrix products, in C++ on the CPU. See `csrc/rows.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from ..parameter_pass import DTYPES
from .blocks import Block
from .torch_rows import Dropout, TorchRows

if extension.WHY_NOT is None:
    from ... import _C


class CppRows(TorchRows):
    """In float32 biases are added where a block is read anyway, and not by the matrix product, which would take a pass
    for it. In 16 bits the product adds them, so that the sum is rounded once."""

    @property
    def cpp_activation(self) -> _C.Activation:
        return getattr(_C.Activation, self.activation)

    def look_up(self, block: Block, x: Tensor, name: str) -> Tensor:
        out = self.new(block, name, x.shape[1])
        _C.gather_rows(matrix(x), block.tokens.data_ptr(), len(block.tokens), x.shape[1], matrix(out))
        return out

    def linear(self, block: Block, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor | None:
        if self.dtype != torch.float32:
            return super().linear(block, x, weight, bias, out)
        torch.bmm(x, block.of(weight).mT, out=out)
        return None if bias is None else block.of(bias)

    def scatter(self, block: Tensor, bias: Tensor | None, factor: Tensor | None, tokens: Tensor, out: Tensor) -> None:
        bias, factor = floats(bias), floats(factor)
        _, n, width = block.shape
        _C.scatter_rows(
            matrix(block), address(bias), address(factor), tokens.data_ptr(), len(tokens), n, width, matrix(out)
        )

    def activate(
        self,
        product: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        dropout: Dropout | None,
        pre: Tensor | None,
        hidden: Tensor,
    ) -> None:
        bias = floats(bias)
        block = self.cpp_block(rows, hidden.shape[1], hidden.shape[2], dropout)
        _C.activate(self.cpp_activation, block, address(bias), matrix(product), matrix(pre), matrix(hidden))

    def activate_backward(
        self,
        pre: Tensor,
        grad_hidden: Tensor,
        rows: Tensor,
        dropout: Dropout | None,
        factor: Tensor | None,
        grad_pre: Tensor,
        hidden: Tensor,
        grad_factor: Tensor | None,
    ) -> None:
        factor, sums = floats(factor), floats(grad_factor)
        _C.activate_backward(
            self.cpp_activation,
            self.cpp_block(rows, hidden.shape[1], hidden.shape[2], dropout),
            matrix(pre),
            matrix(grad_hidden),
            address(factor),
            matrix(grad_pre),
            matrix(hidden),
            address(sums),
        )
        if grad_factor is not None and sums is not None and sums is not grad_factor:
            grad_factor.copy_(sums)

    def cpp_block(self, rows: Tensor, rows_per_expert: int, d_ff: int, dropout: Dropout | None) -> _C.Block:
        seed, p = (0, 0.0) if dropout is None else (int(dropout.seed), dropout.p)
        return _C.Block(rows.shape[0], rows_per_expert, d_ff, self.gated, address(rows), seed, p)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def matrix(tensor: Tensor | None) -> tuple[int, int]:
    """As csrc/bindings.cpp takes a `Matrix`."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype])


def floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()
