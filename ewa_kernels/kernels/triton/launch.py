"""Launches of one kernel after the other without finding out again what cannot have changed."""

from __future__ import annotations

import operator
from typing import Any

from .configs import RowsTile, Tile


class Launch:
    """A kernel with its grid and all its arguments but the first: tensors, or their descriptors, and the seed.

    Triton asks in each launch of which type and how well aligned each argument is. Here that is known: a `Problem`
    fixes the types, tensors are aligned (`configs.aligned`), and numbers are fixed or not specialised on. So what the
    first launch compiled is launched again by itself. The interpreter compiles nothing.

    Args:
        num_programs: the grid.
        arguments: the kernel's others, by name; and perhaps some that it has not.
        rows: of a row block in `groups`.
        options: of compilation, where the tile has none.
    """

    def __init__(
        self,
        kernel: Any,
        num_programs: int,
        arguments: dict[str, Any],
        tile: Tile | RowsTile,
        rows: int,
        **options: int,
    ):
        names, options = list(kernel.arg_names), {**options, **tile.launch_options()}
        arguments = {**arguments, **options}
        self.rows, self.tile = rows, tile
        first = [name for name in names if name not in arguments]
        assert names[: len(first)] == first, f"after {first} all arguments are fixed"
        self._pick = operator.itemgetter(*first)
        self._others = tuple(arguments[name] for name in names[len(first) :])
        self._options = {name: value for name, value in options.items() if name not in names}
        self.kernel, self._grid = kernel, (num_programs, 1, 1)
        self._compiled: Any = None

    def __call__(self, tensors: dict[str, Any], **others: Any) -> None:
        """The first arguments, by name; `tensors` may have some that the kernel has not."""
        arguments = self._pick(tensors | others)
        if self._compiled is not None:
            return self._compiled[self._grid](*arguments, *self._others)
        self._compiled = self.kernel[self._grid[:1]](*arguments, *self._others, **self._options)
