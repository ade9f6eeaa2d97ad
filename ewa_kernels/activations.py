"""The activations in PyTorch calls, differentiable by autograd: what a dense FFN computes between its projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def identity(x: Tensor) -> Tensor:
    return x


# Functions with names, which torch.jit.script and pickle take.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
    "identity": identity,
}


def activate(pre_activation: Tensor, activation: str, gated: bool) -> Tensor:
    """`act(pre)`, or `act(gate) * value` of `[..., 2F]` if gated, gate first."""
    if not gated:
        return ACTIVATIONS[activation](pre_activation)
    gate, value = pre_activation.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * value
