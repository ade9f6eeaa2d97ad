"""Where the experts of a model are, looked up once for as long as nothing about the model changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

Experts = Tensor | Sequence[Tensor]

_parameters_of = attrgetter("_parameters")
_kind = attrgetter("requires_grad", "ndim")


class Lookup:
    """Calls `find(model)`, unless it would find what it found the last time. Holds no tensor and no module.

    What it finds is to depend on the classes of modules, on names, and on which parameters are trained and how many
    dimensions they have.

    Attributes:
        num_changes: how often the model had changed.
    """

    def __init__(self) -> None:
        self.num_changes = 0
        self._tree: list[Any] = []
        self._places: dict[str, int | list[int]] = {}

    def __call__(self, model: nn.Module, find: Callable[[nn.Module], Mapping[str, Experts]]) -> Mapping[str, Experts]:
        tree, parameters = _tree(model)
        if tree == self._tree:
            return {
                name: parameters[i] if isinstance(i, int) else [parameters[j] for j in i]
                for name, i in self._places.items()
            }
        self.num_changes += 1
        found = find(model)
        place = {id(p): i for i, p in enumerate(parameters)}
        self._tree = []
        try:
            self._places = {
                name: place[id(group)] if isinstance(group, Tensor) else [place[id(p)] for p in group]
                for name, group in found.items()
            }
        except KeyError:  # a module's own methods may give something else than its parameters
            return found
        self._tree = tree
        return found


def _tree(model: nn.Module) -> tuple[list[Any], list[Tensor]]:
    """All modules and parameters, as what is equal while they are named and placed alike; and the parameters.

    By ids: what is gone may have left its own to something new, but that is then of the same class at the same place.
    """
    modules, seen = [model], {model}
    children: list[Any] = []
    for module in modules:
        if len(module._modules) > 0:
            children += module._modules.keys()
            for child in module._modules.values():
                children.append(id(child))
                if child is not None and child not in seen:
                    seen.add(child)
                    modules.append(child)
    of_modules = [*map(_parameters_of, modules)]
    slots = [*chain.from_iterable(parameters.values() for parameters in of_modules)]
    parameters = [p for p in slots if p is not None]
    names = [*map(len, of_modules), *chain.from_iterable(parameters.keys() for parameters in of_modules)]
    return [children, [*map(type, modules)], names, [*map(id, slots)], [*map(_kind, parameters)]], parameters


def flattened(experts: Iterable[Experts]) -> tuple[list[Tensor], list[int]]:
    """All tensors, and for each group 0 if it is one stacked tensor, else how many it has."""
    groups = list(experts)
    flat = [tensor for group in groups for tensor in members_of(group)]
    return flat, [0 if isinstance(group, Tensor) else len(group) for group in groups]


def without_frozen(experts: Mapping[str, Experts]) -> dict[str, Experts]:
    """Each tensor once, and none of a group of which a part is frozen."""
    trained: dict[str, Experts] = {}
    seen: set[Tensor] = set()
    for name, group in experts.items():
        members = members_of(group)
        if all(tensor.requires_grad and tensor not in seen for tensor in members):
            trained[name] = group
            seen.update(members)
    return trained


def members_of(group: Experts) -> Sequence[Tensor]:
    return [group] if isinstance(group, Tensor) else group
