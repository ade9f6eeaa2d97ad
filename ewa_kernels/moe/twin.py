"""Copies of modules that can be run without a trace in the original."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ewa_kernels.moe.adapters import NotExpertsError
from ewa_kernels.surgery.layout import copy_modules

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


_MAX_DEPTH = 3  # of plain objects inside others: one may lead to the whole training


class CannotRunError(NotExpertsError):
    """A module cannot be copied, does not run on tokens alone, or does not call the members of a list then."""


def private_copy(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy that shares parameters and buffers only, runs no hooks, and writes into nothing else of the original.

    Plain objects are copied with all they hold, if they can be. Globals and attributes of classes are not.

    Args:
        copies: is filled with all modules inside and their copies.

    Raises:
        CannotRunError: it would lead to the original.
    """
    twin = copy_modules(module, copies)
    own = _Owned(copies)
    for inner in copies.values():
        _own_attributes_(inner, own)
    return twin


def _own_attributes_(twin: nn.Module, own: _Owned) -> None:
    for name, value in list(twin.__dict__.items()):
        if name in _HOOKS:
            twin.__dict__[name] = type(value)()
        elif name == "_compiled_call_impl":
            twin.__dict__[name] = None
        elif name not in ("_parameters", "_buffers", "_modules"):
            twin.__dict__[name] = own.copy(value)
    forward = twin.__dict__.get("forward")
    if forward is not None and not (isinstance(forward, MethodType) and forward.__self__ in own.copies.values()):
        raise CannotRunError(f"{kind_of(twin)} holds a forward that leads to the original")


class _Owned:
    """Copies of what the modules of a twin hold. What they hold together stays one thing."""

    def __init__(self, copies: dict[nn.Module, nn.Module]):
        self.copies = copies
        self._done: dict[int, tuple[Any, Any]] = {}  # id → (value, its copy)

    def copy(self, value: Any, depth: int = 0) -> Any:
        """`depth`: of how many plain objects it is inside, where modules that are not copied stay what they are."""
        if id(value) in self._done:
            return self._done[id(value)][1]
        if isinstance(value, Tensor):
            return self._keep(value, _plain(value))
        if isinstance(value, nn.Module):
            if value not in self.copies and depth == 0:
                raise CannotRunError(f"{kind_of(value)} is held out of sight, by no registered name")
            return self.copies.get(value, value)
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.copy(value.__self__, depth + 1))
        if type(value) in (tuple, set, frozenset):
            return type(value)(self.copy(item, depth) for item in value)
        if isinstance(value, (list, dict, deque)) or (depth < _MAX_DEPTH and _is_plain_object(value)):
            return self._copy_mutable(value, depth)
        return value

    def _copy_mutable(self, value: Any, depth: int) -> Any:
        try:
            twin = self._keep(value, copy.copy(value))
        except Exception:  # of foreign code, as of what holds a lock
            return value
        if isinstance(value, dict):
            twin.update((key, self.copy(item, depth)) for key, item in value.items())
        elif isinstance(value, (list, deque)):
            for i, item in enumerate(value):
                twin[i] = self.copy(item, depth)
        elif twin is not value:
            vars(twin).update({name: self.copy(item, depth + 1) for name, item in vars(value).items()})
        return twin

    def _keep(self, value: Any, twin: Any) -> Any:
        self._done[id(value)] = value, twin
        return twin


def _is_plain_object(value: Any) -> bool:
    library = type(value).__module__.partition(".")[0] in ("torch", "builtins", "functools", "logging", "weakref")
    return hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType)) and not library


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
