"""What is done to a block of grouped rows between matrix products, in C++ on the CPU. See `csrc/rows.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from ewa_kernels.kernels import extension
from ewa_kernels.kernels.experts import DTYPES
from ewa_kernels.kernels.torch_rows import Dropout, TorchRows

if extension.WHY_NOT is None:
    from ewa_kernels import _C


def random_permutation(num_tokens: int, seed: Tensor) -> Tensor:
    """`ewa_kernels.reference.random_permutation` for a seed on the CPU."""
    out = torch.empty(num_tokens, dtype=torch.int32, device="cpu")
    _C.random_permutation(num_tokens, int(seed), out.data_ptr())
    return out


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What matrix products are made in: float32 where the processor has no fast ones in 16 bits.

    There PyTorch's take some twenty times as long as in float32.
    """
    return dtype if dtype == torch.float32 or _has_products(dtype) else torch.float32


def _has_products(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return bool(getattr(torch.ops.mkldnn, name)())


class CppRows(TorchRows):
    """In float32 biases are added where a block is read anyway, and not by the matrix product, which would take a pass
    for it. In 16 bits the product adds them, so that the sum is rounded once."""

    def __init__(self, activation: str, gated: bool, dtype: torch.dtype):
        super().__init__(activation, gated, product_dtype(dtype))
        self._activation = getattr(_C.Activation, activation)

    def gather(self, x: Tensor, tokens: Tensor, out: Tensor) -> None:
        _C.gather_rows(_matrix(x), tokens.data_ptr(), len(tokens), x.shape[1], _matrix(out))

    def scatter(self, block: Tensor, tokens: Tensor, out: Tensor) -> None:
        self._scatter(block, None, None, tokens, out)

    def up_and_activate(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dropout: Dropout | None,
        product: Tensor,
        pre: Tensor | None,
        hidden: Tensor,
    ) -> None:
        bias = self._product(x, weight, bias, product)
        self._activate(product, bias, dropout, pre, hidden)

    def down_and_scatter(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factor: Tensor | None,
        choices: Tensor,
        product: Tensor,
        y: Tensor,
    ) -> None:
        bias = self._product(hidden, weight, bias, product)
        self._scatter(product, bias, factor, choices, y)

    def activate(self, pre: Tensor, dropout: Dropout | None, hidden: Tensor) -> None:
        self._activate(pre, None, dropout, None, hidden)

    def activate_backward(
        self,
        pre: Tensor,
        grad_hidden: Tensor,
        dropout: Dropout | None,
        factor: Tensor | None,
        grad_pre: Tensor,
        hidden: Tensor,
        grad_factor: Tensor | None,
        grad_bias: Tensor | None,
        beta: int,
    ) -> None:
        factor, sums, total = _floats(factor), _floats(grad_factor), _floats(grad_bias)
        _C.activate_backward(
            self._activation,
            self._block(hidden, dropout),
            _matrix(pre),
            _matrix(grad_hidden),
            _address(factor),
            _matrix(grad_pre),
            _matrix(hidden),
            _address(sums),
            _address(total),
            beta,
        )
        for narrow, wide in ((grad_factor, sums), (grad_bias, total)):
            if narrow is not None and wide is not None and narrow is not wide:
                narrow.copy_(wide)

    def _product(self, a: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor | None:
        """out = a @ weightᵀ; returns the bias that is left to add."""
        if self.dtype == torch.float32:
            torch.bmm(a, weight.mT, out=out)
            return bias
        self.linear(a, weight, bias, out)
        return None

    def _activate(
        self, product: Tensor, bias: Tensor | None, dropout: Dropout | None, pre: Tensor | None, hidden: Tensor
    ) -> None:
        bias = _floats(bias)
        block = self._block(hidden, dropout)
        _C.activate(self._activation, block, _address(bias), _matrix(product), _matrix(pre), _matrix(hidden))

    def _block(self, hidden: Tensor, dropout: Dropout | None) -> _C.Block:
        num_experts, n, d_ff = hidden.shape
        rows, seed, p = (0, 0, 0.0) if dropout is None else (_address(dropout.rows), int(dropout.seed), dropout.p)
        return _C.Block(num_experts * n, n, d_ff, self.gated, rows, seed, p)

    def _scatter(self, block: Tensor, bias: Tensor | None, factor: Tensor | None, tokens: Tensor, out: Tensor) -> None:
        bias, factor = _floats(bias), _floats(factor)
        _, n, width = block.shape
        _C.scatter_rows(
            _matrix(block), _address(bias), _address(factor), tokens.data_ptr(), len(tokens), n, width, _matrix(out)
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None) -> _C.Matrix:
    return (0, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype])


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()
