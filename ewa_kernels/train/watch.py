"""Whether the optimizer that averaging follows trains what is averaged, from step to step."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from . import shards
from .lookup import Experts, members_of

_Member = tuple[str, int]  # name of experts, and which of separate ones


class Watch:
    """Warns, once of each, of experts that the optimizer trained and does not any more.

    A parameter that is replaced, or given other memory, is found by comparing what the optimizer has with what is
    averaged. Where tensors are given instead of a model, they may be what the optimizer has and yet in no model any
    more: then they get no gradient, and no module has them.

    Attributes:
        is_partial, has_none: whether the optimizer has a part of what is averaged only, and whether it has, and ever
            had, nothing of it; as of the last look.
    """

    def __init__(self) -> None:
        self.is_partial = self.has_none = False
        self._held: set[_Member] = set()
        self._had_any = False
        self._seen: list[int | None] = []
        self._views: list[Tensor] = []  # experts in the memory of parameters, each with its parameter
        self._parameters: dict[str, list[Tensor]] = {}  # of given experts
        self._in_modules: set[str] | None = None  # which of these were in a module at the first look
        self._num_idle = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without what is true of these tensors only."""
        return {**self.__dict__, "_seen": [], "_views": [], "_parameters": {}}

    def look(self, experts: Mapping[str, Experts], optimizer: Optimizer, num_changes: int | None) -> None:
        """`num_changes`: how often experts may have become others; None if they were given."""
        # Parameters are alive as long as the optimizer has them, so that no other has their ids.
        seen = [num_changes, *map(id, chain.from_iterable(group["params"] for group in optimizer.param_groups))]
        if self._seen != [*seen, *map(Tensor.data_ptr, self._views)]:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._compare(experts, parameters, type(optimizer).__name__, are_given=num_changes is None)
            self._seen = [*seen, *map(Tensor.data_ptr, self._views)]
        if self._parameters:
            self._look_for_gradients(experts, type(optimizer).__name__)

    def _compare(self, experts: Mapping[str, Experts], parameters: list[Tensor], kind: str, *, are_given: bool) -> None:
        own, at = {*map(id, parameters)}, {shards.storage_of(p): p for p in parameters}
        members = {(name, e): t for name, group in experts.items() for e, t in enumerate(members_of(group))}
        homes = {key: t if id(t) in own else at.get(shards.storage_of(t)) for key, t in members.items()}
        held = {key for key, home in homes.items() if home is not None}
        lost = [key for key in members if key in self._held and key not in held]
        if lost:
            _warn_of_lost(lost, experts, kind)
        self._held = self._held.difference(lost) | held
        self.is_partial = 0 < len(held) < len(members)
        self._had_any = self._had_any or len(held) > 0
        self.has_none = len(members) > 0 and not self._had_any
        self._views = [
            shards.local(t)
            for key, home in homes.items()
            if home is not None and home is not members[key]
            for t in (members[key], home)
        ]
        self._parameters = {}
        for (name, _), home in homes.items() if are_given else ():
            if home is not None:
                self._parameters.setdefault(name, []).append(home)
        if self._parameters and self._in_modules is None:
            self._in_modules = _in_modules(self._parameters, experts)

    def _look_for_gradients(self, experts: Mapping[str, Experts], kind: str) -> None:
        if not any(ps[0].grad is None for ps in self._parameters.values()):
            return
        idle = {name: ps for name, ps in self._parameters.items() if all(p.grad is None for p in ps)}
        if not idle:
            return
        self._num_idle += 1
        # Experts may have no gradient for other reasons, and who has them takes long to find out.
        if self._num_idle & (self._num_idle - 1) == 0:
            gone = (idle.keys() & (self._in_modules or ())) - _in_modules(idle, experts)
            if gone:
                _warn_of_lost([(name, 0) for name in idle if name in gone], experts, kind)
                self._in_modules = (self._in_modules or set()) - gone


def _in_modules(parameters: Mapping[str, Iterable[Tensor]], experts: Mapping[str, Experts]) -> set[str]:
    """Those of which a module, or another dictionary of names than `experts`, has a parameter."""
    wanted = [p for ps in parameters.values() for p in ps]
    holders = [h for h in gc.get_referrers(*wanted) if isinstance(h, dict) and h is not experts]
    held = {id(value) for holder in holders for key, value in holder.items() if isinstance(key, str)}
    return {name for name, ps in parameters.items() if any(id(p) in held for p in ps)}


def _warn_of_lost(lost: Iterable[_Member], experts: Mapping[str, Experts], kind: str) -> None:
    names = [*dict.fromkeys(name for name, _ in lost)]
    shown = ", ".join(f"{name} {list(members_of(experts[name])[0].shape)}" for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    warnings.warn(
        f"experts {shown}{more} are averaged, but the {kind} attached to does not train them any more: their "
        "parameters were replaced or moved, as by to() or load_state_dict(assign=True). Make the optimizer of the "
        "parameters that the model has now; then make the averager, and attach it",
        stacklevel=2,
    )
