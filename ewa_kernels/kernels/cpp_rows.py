"""What is done to a block of grouped rows between matrix products, in C++: float32 on the CPU. See `csrc/rows.h`."""

from __future__ import annotations

import torch
from torch import Tensor

from ewa_kernels.kernels import extension
from ewa_kernels.kernels.torch_rows import TorchRows

if extension.WHY_NOT is None:
    from ewa_kernels import _C


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def random_permutation(num_tokens: int, seed: Tensor) -> Tensor:
    """`ewa_kernels.reference.random_permutation` for a seed on the CPU."""
    out = torch.empty(num_tokens, dtype=torch.int32)
    _C.random_permutation(num_tokens, int(seed), out.data_ptr())
    return out


class CppRows(TorchRows):
    """Biases are added where a block is read anyway, and not by the matrix product, which would take a pass for it."""

    def gather(self, x: Tensor, tokens: Tensor, out: Tensor) -> None:
        _C.gather_rows(x.data_ptr(), tokens.data_ptr(), len(tokens), x.shape[1], out.data_ptr())

    def scatter(self, block: Tensor, tokens: Tensor, out: Tensor) -> None:
        self._scatter(block, None, tokens, out)

    def up_and_activate(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, pre: Tensor, hidden: Tensor
    ) -> None:
        torch.bmm(x, weight.mT, out=pre)
        self._activate(pre, bias, scale, hidden)

    def down_and_scatter(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        factor: Tensor | None,
        choices: Tensor,
        block_y: Tensor,
        y: Tensor,
    ) -> None:
        if factor is not None:
            return super().down_and_scatter(hidden, weight, bias, factor, choices, block_y, y)
        torch.bmm(hidden, weight.mT, out=block_y)
        self._scatter(block_y, bias, choices, y)

    def activate(self, pre: Tensor, scale: Tensor | None, hidden: Tensor) -> None:
        self._activate(pre, None, scale, hidden)

    def activate_backward(
        self,
        pre: Tensor,
        grad_hidden: Tensor,
        scale: Tensor | None,
        grad_pre: Tensor,
        hidden: Tensor,
        grad_bias: Tensor | None,
        beta: int,
    ) -> None:
        _C.activate_backward(
            *self._block(hidden, scale),
            pre.data_ptr(),
            grad_hidden.data_ptr(),
            grad_pre.data_ptr(),
            hidden.data_ptr(),
            _address(grad_bias),
            beta,
        )

    def _activate(self, pre: Tensor, bias: Tensor | None, scale: Tensor | None, hidden: Tensor) -> None:
        bias = None if bias is None else bias.contiguous()
        _C.activate(*self._block(hidden, scale), _address(bias), pre.data_ptr(), hidden.data_ptr())

    def _block(self, hidden: Tensor, scale: Tensor | None) -> tuple[_C.Activation, bool, int, int, int, int]:
        num_experts, n, d_ff = hidden.shape
        activation = getattr(_C.Activation, self.activation)
        return activation, self.gated, num_experts * n, n, d_ff, _address(scale)

    def _scatter(self, block: Tensor, bias: Tensor | None, tokens: Tensor, out: Tensor) -> None:
        bias = None if bias is None else bias.contiguous()
        _, n, width = block.shape
        _C.scatter_rows(block.data_ptr(), _address(bias), tokens.data_ptr(), len(tokens), n, width, out.data_ptr())
