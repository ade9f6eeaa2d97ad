"""What a forward leaves behind outside of its output: in attributes, buffers, lists, classes and globals."""

from __future__ import annotations

import collections
import logging
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

Place = tuple[str, ...]  # path of what may be written, as ("gate", "last_probs")

_CONTAINERS = (list, tuple, dict, set, collections.deque)
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.MethodType, logging.Logger, nn.Module)
_MAX_DEPTH = 6


class Trace(NamedTuple):
    """Of one place: what is there, and how often or how far it was written."""

    value: Any
    version: int

    def differs(self, other: Trace) -> bool:
        return self.value is not other.value or self.version != other.version


def traces(module: nn.Module) -> dict[Place, Trace]:
    """All that the forward of a module could write: later ones tell what it did write.

    Seen are the attributes and buffers of every module inside, and of their classes; the globals and closures that the
    functions of these classes name, and that functions named there name; and in all of them, lists, dicts, sets and
    plain objects. Not seen is what is written through objects of C code, files, or the attributes of other modules.
    """
    found: dict[Place, Trace] = {}
    seen: set[int] = set()
    classes: set[type] = set()
    for name, inner in module.named_modules():
        classes |= {cls for cls in type(inner).__mro__ if not is_library(cls.__module__)}
        for attribute, value in (*vars(inner).items(), *inner._buffers.items()):
            if attribute not in ("training", "_parameters", "_modules", "_buffers"):
                _add(found, seen, (*filter(None, [name]), attribute), value)
    for cls in classes:
        for attribute, value in vars(cls).items():
            if not (attribute.startswith("__") and attribute.endswith("__")):
                _add(found, seen, (cls.__qualname__, attribute), value)
    for names, value in _outside(classes):
        _add(found, seen, names, value)
    return found


def written(before: Mapping[Place, Trace], after: Mapping[Place, Trace]) -> set[Place]:
    """The places that are new, gone, or changed."""
    return {
        place
        for place in before.keys() | after.keys()
        if place not in before or place not in after or before[place].differs(after[place])
    }


def _add(found: dict[Place, Trace], seen: set[int], place: Place, value: Any) -> None:
    found[place] = Trace(value, _version(value))
    if id(value) in seen or len(place) > _MAX_DEPTH or isinstance(value, (*_OPAQUE, Tensor)):
        return
    seen.add(id(value))
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, dict):
        items = iter(list(value.items()))
    elif isinstance(value, (list, tuple, collections.deque)):
        items = enumerate(list(value))
    elif hasattr(value, "__dict__") and not is_library(type(value).__module__):
        items = iter(list(vars(value).items()))
    for key, item in items:
        _add(found, seen, (*place, str(key)), item)


def _version(value: Any) -> int:
    if isinstance(value, Tensor):
        return 0 if value.is_inference() else value._version
    return len(value) if isinstance(value, _CONTAINERS) else 0


def _outside(classes: set[type]) -> Iterator[tuple[Place, Any]]:
    """(names, value) of globals and closures."""
    functions = [getattr(value, "__func__", value) for cls in classes for value in vars(cls).values()]
    known: set[types.CodeType] = set()
    while functions:
        function = functions.pop()
        code = _code_of(function)
        if code is None or code in known or is_library(function.__module__ or ""):
            continue
        known.add(code)
        held = [(name, function.__globals__[name]) for name in _names(code) if name in function.__globals__]
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                held.append((name, cell.cell_contents))
            except ValueError:  # empty as yet
                continue
        for name, value in held:
            yield (function.__module__ or "", name), value
            if _code_of(value) is not None:
                functions.append(value)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:  # of functions and comprehensions inside
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _code_of(function: Any) -> types.CodeType | None:
    return function.__code__ if isinstance(function, types.FunctionType) else None


def is_library(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "builtins", "typing", "ewa_kernels", "collections", "functools")
