"""Launches of one kernel after the other without finding out again what cannot have changed."""

from __future__ import annotations

from typing import Any

from ewa_kernels.kernels.triton.configs import Tile


class Launch:
    """A kernel with all its arguments but the first, which are tensors and the seed.

    Triton asks in each launch of which type and how well aligned each argument is. Here that is known: a `Problem`
    fixes the types, tensors are aligned (`configs.aligned`), and numbers are fixed or not specialised on. So what the
    first launch compiled is launched again by itself. The interpreter compiles nothing.

    Args:
        arguments: the kernel's others, by name; and perhaps some that it has not.
        options: of compilation, where the tile has none.

    Attributes:
        first: names of the first arguments.
    """

    def __init__(self, kernel: Any, arguments: dict[str, Any], tile: Tile, **options: int):
        names, options = list(kernel.arg_names), {**options, **tile.launch_options()}
        arguments = {**arguments, **options}
        self.first = [name for name in names if name not in arguments]
        assert names[: len(self.first)] == self.first, f"after {self.first} all arguments are fixed"
        self._others = tuple(arguments[name] for name in names[len(self.first) :])
        self._options = {name: value for name, value in options.items() if name not in names}
        self._kernel: Any = kernel
        self._compiled: Any = None

    def __call__(self, num_programs: int, *first: Any) -> None:
        if self._compiled is not None:
            return self._compiled[(num_programs, 1, 1)](*first, *self._others)
        self._compiled = self._kernel[(num_programs,)](*first, *self._others, **self._options)
