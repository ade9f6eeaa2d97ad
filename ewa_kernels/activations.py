"""The activations in PyTorch calls, differentiable by autograd: what a dense FFN computes between its projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "identity": lambda x: x,
}


def activate(pre_activation: Tensor, activation: str, gated: bool) -> Tensor:
    """`act(pre)`, or `act(gate) * value` of `[..., 2F]` if gated, gate first."""
    if not gated:
        return ACTIVATIONS[activation](pre_activation)
    gate, value = pre_activation.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * value
