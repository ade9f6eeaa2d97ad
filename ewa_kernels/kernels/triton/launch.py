"""Launches of one kernel after the other without finding out again what cannot have changed."""

from __future__ import annotations

import inspect
from typing import Any


class Launch:
    """A kernel with all its arguments but the first, which are tensors and the seed.

    Triton asks in each launch of which type and how well aligned each argument is. Here that is known: a `Problem`
    fixes the types, tensors are aligned (`configs.aligned`), and numbers are fixed or not specialised on. So what the
    first launch compiled is launched again by itself. The interpreter compiles nothing.

    Args:
        arguments: by name: the other arguments of the kernel, and options of its compilation.
    """

    def __init__(self, kernel: Any, arguments: dict[str, Any]):
        self._kernel, self._arguments = kernel, arguments
        self._compiled: Any = None
        self._others: tuple[Any, ...] = ()

    def __call__(self, num_programs: int, *first: Any) -> None:
        if self._compiled is not None:
            return self._compiled[(num_programs, 1, 1)](*first, *self._others)
        self._compiled = self._kernel[(num_programs,)](*first, **self._arguments)
        if self._compiled is not None:
            names = list(inspect.signature(self._kernel.fn).parameters)[len(first) :]
            self._others = tuple(self._arguments[name] for name in names)
