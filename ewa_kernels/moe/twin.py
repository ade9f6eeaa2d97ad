"""Copies of modules that can be run without a trace in the original."""

from __future__ import annotations

from collections.abc import Collection
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ewa_kernels.moe.adapters import NotExpertsError
from ewa_kernels.surgery.layout import copy_modules

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class CannotRunError(NotExpertsError):
    """A module cannot be copied, does not run on tokens alone, or does not call the members of a list then."""


def private_copy(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy that shares parameters and buffers only, runs no hooks, and writes into nothing else of the original.

    Args:
        copies: is filled with all modules inside and their copies.

    Raises:
        CannotRunError: it would lead to the original.
    """
    twin = copy_modules(module, copies)
    for inner in copies.values():
        _own_attributes_(inner, copies)
    return twin


def _own_attributes_(twin: nn.Module, copies: dict[nn.Module, nn.Module]) -> None:
    for name, value in list(twin.__dict__.items()):
        if name in _HOOKS:
            twin.__dict__[name] = type(value)()
        elif name == "_compiled_call_impl":
            twin.__dict__[name] = None
        elif name not in ("_parameters", "_buffers", "_modules"):
            twin.__dict__[name] = _own(value, copies)
    forward = twin.__dict__.get("forward")
    if forward is not None and not (isinstance(forward, MethodType) and forward.__self__ in copies.values()):
        raise CannotRunError(f"{kind_of(twin)} holds a forward that leads to the original")


def _own(value: Any, copies: dict[nn.Module, nn.Module]) -> Any:
    if isinstance(value, Tensor):
        return _plain(value)
    if isinstance(value, nn.Module):
        if value not in copies:
            raise CannotRunError(f"{kind_of(value)} is held out of sight, by no registered name")
        return copies[value]
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module) and value.__self__ in copies:
        return MethodType(value.__func__, copies[value.__self__])
    if type(value) in (list, tuple, set):
        return type(value)(_own(item, copies) for item in value)
    if isinstance(value, dict):
        twin = value.copy()
        twin.update((key, _own(item, copies)) for key, item in value.items())
        return twin
    return value


def own_tensors_(module: nn.Module, twin: nn.Module, unread: Collection[Tensor]) -> None:
    """Gives a copy random parameters, and buffers of its own, in float32 on the CPU; `unread` parameters no memory."""
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if parameter in unread:
            new = torch.zeros(()).expand(parameter.shape)
        else:
            scale = 2 * max(parameter.shape) ** -0.5 if parameter.ndim > 1 and parameter.numel() > 0 else 1.0
            new = scale * torch.randn(parameter.shape)
        twin._parameters[name] = nn.Parameter(new, requires_grad=False)
    for name, buffer in module._buffers.items():
        twin._buffers[name] = None if buffer is None else _plain(buffer)


def _plain(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        tensor = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return tensor.detach().clone().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)


def kind_of(module: nn.Module) -> str:
    return type(module).__name__
