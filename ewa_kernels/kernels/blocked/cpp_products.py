"""A block of grouped rows in C++ on the CPU, matrix products too, of float32 or bfloat16. See `csrc/products.h`.

Tokens are looked up by the products themselves, and rows of a result are activated or scattered while they are in the
cache, so that neither is stored in between. Experts may have any number of rows each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ewa_kernels.kernels import extension
from ewa_kernels.kernels.blocked.blocks import Block
from ewa_kernels.kernels.blocked.cpp_rows import CppRows, address, floats, matrix
from ewa_kernels.kernels.blocked.torch_rows import Dropout

if extension.WHY_NOT is None:
    import ewa_kernels._C as _C


class LookedUp(NamedTuple):
    """x[tokens] · factor, of which each row is read where it is needed."""

    x: Tensor
    tokens: Tensor
    factor: Tensor | None = None


class CppProducts(CppRows):
    """Rows are `[rows, columns]`, or `LookedUp`."""

    any_counts = True

    @property
    def sums_in_16_bits(self) -> bool:
        return False

    def gradient_dtype(self, ndim: int, dtype: torch.dtype, num_blocks: int) -> torch.dtype:
        # A single block rounds a weight's gradient to 16 bits as it stores it; sums for a bias are in float32.
        return dtype if ndim == 3 and num_blocks == 1 and dtype.itemsize == 2 else torch.float32

    def parameter(self, parameter: Tensor) -> Tensor:
        # Where products are in float32, what has 16 bits is widened as it is read.
        widened = self.dtype == torch.float32 and parameter.dtype in (torch.float16, torch.bfloat16)
        return (parameter if widened else super().parameter(parameter)).contiguous()

    def look_up(self, block: Block, x: Tensor, name: str) -> LookedUp:
        return LookedUp(x, block.tokens)

    def scaled(self, block: Block, x: LookedUp, factor: Tensor) -> LookedUp:
        return x._replace(factor=floats(factor))

    def up(
        self,
        block: Block,
        x: LookedUp,
        weight: Tensor,
        bias: Tensor | None,
        dropout: Dropout | None,
        pre: Tensor | None,
    ) -> Tensor:
        hidden = self._new(block, "hidden", self._d_ff(weight.shape[1]))
        self._multiply_and_activate(block, x, weight, bias, dropout, pre, hidden)
        return hidden

    def pre_activation(self, block: Block, x: LookedUp, weight: Tensor, bias: Tensor | None) -> Tensor:
        pre = self._new(block, "pre", weight.shape[1])
        self._multiply_and_activate(block, x, weight, bias, None, pre, None)
        return pre

    def _multiply_and_activate(
        self,
        block: Block,
        x: LookedUp,
        weight: Tensor,
        bias: Tensor | None,
        dropout: Dropout | None,
        pre: Tensor | None,
        hidden: Tensor | None,
    ) -> None:
        bias = floats(bias)
        _C.multiply_and_activate(
            *self._product(block, x, weight, transposed=True),
            self.cpp_activation,
            self.cpp_block(block.rows, 1, self._d_ff(weight.shape[1]), dropout),
            address(bias),
            matrix(pre),
            matrix(hidden),
        )

    def down(
        self, block: Block, hidden: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor | None, y: Tensor
    ) -> None:
        self._multiply_and_scatter(block, hidden, weight, True, bias, factor, y)

    def up_backward(self, block: Block, grad_pre: Tensor, weight: Tensor, grad_x: Tensor) -> None:
        self._multiply_and_scatter(block, grad_pre, weight, False, None, None, grad_x)

    def _multiply_and_scatter(
        self,
        block: Block,
        rows: Tensor,
        weight: Tensor,
        transposed: bool,
        bias: Tensor | None,
        factor: Tensor | None,
        out: Tensor,
    ) -> None:
        bias, factor = floats(bias), floats(factor)
        product = self._product(block, rows, weight, transposed)
        _C.multiply_and_scatter(*product, address(bias), address(factor), block.choices.data_ptr(), matrix(out))

    def hidden_again(self, block: Block, pre: Tensor, dropout: Dropout | None) -> Tensor:
        hidden = self._new(block, "hidden", self._d_ff(pre.shape[1]))
        self.activate(pre[:, None], None, block.rows, dropout, None, hidden[:, None])
        return hidden

    def down_backward(
        self,
        block: Block,
        grad_y: LookedUp,
        weight: Tensor,
        pre: Tensor,
        dropout: Dropout | None,
        factor: Tensor | None,
        grad_factor: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        grad_pre = self._new(block, "grad_pre", pre.shape[1])
        hidden = self._new(block, "hidden", weight.shape[2])
        factor = floats(factor)
        _C.multiply_and_activate_backward(
            *self._product(block, grad_y, weight, transposed=False),
            self.cpp_activation,
            self.cpp_block(block.rows, 1, weight.shape[2], dropout),
            matrix(pre),
            address(factor),
            matrix(grad_pre),
            matrix(hidden),
            address(grad_factor),
        )
        return grad_pre, hidden

    def weight_gradient(
        self,
        block: Block,
        left: LookedUp | Tensor,
        right: LookedUp | Tensor | None,
        grad: Tensor | None,
        grad_bias: Tensor | None,
    ) -> None:
        columns = left.x.shape[1] if isinstance(left, LookedUp) else left.shape[1]
        n = 0 if grad is None else grad.shape[2]  # 0: for the sums alone
        product = _C.Outer(
            block.counts, columns, n, _tokens(left), _tokens(left if right is None else right), self._bfloat16
        )
        _C.multiply_outer(product, self._workspace(product), block.beta, matrix(grad), address(grad_bias))

    def _product(
        self, block: Block, rows: LookedUp | Tensor, weight: Tensor, transposed: bool
    ) -> tuple[_C.TimesWeights, int]:
        """rows @ weight, or weightᵀ of each expert, and memory to work in."""
        n, k = weight.shape[1:] if transposed else weight.mT.shape[1:]
        product = _C.TimesWeights(block.counts, k, n, _tokens(rows), matrix(weight), transposed, self._bfloat16)
        return product, self._workspace(product)

    def _workspace(self, product: _C.TimesWeights | _C.Outer) -> int:
        return self.scratch.address("workspace", product.workspace_floats() * 4)

    @property
    def _bfloat16(self) -> bool:
        return self.dtype == torch.bfloat16

    def _new(self, block: Block, name: str, columns: int) -> Tensor:
        return self.scratch(name, block.rows.shape[0], columns)


def _tokens(rows: LookedUp | Tensor) -> _C.Tokens:
    if isinstance(rows, LookedUp):
        return _C.Tokens(matrix(rows.x), address(rows.tokens), address(rows.factor))
    return _C.Tokens(matrix(rows), 0, 0)
