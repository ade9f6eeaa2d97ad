"""What runs after each real step of an optimizer."""

from __future__ import annotations

import functools
import gc
import itertools
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import private_torch
from ..kernels import graphs
from . import shards
from .lookup import Experts, members_of
from .undone import Undone
from .watch import Watch

# In the first parameter group of an optimizer, so that it is saved and resumed by whatever saves the optimizer: also if
# that flattens the groups, or asks a wrapped optimizer, whose hooks are others. Several averagers, of different
# experts, have one each, in the order in which they were attached.
STEPS = "averaging_steps"

# Of an optimizer: what is attached to it.
_ATTACHMENTS = "_averaging_attachments"


class Averaging(Protocol):
    """What is attached: `ExpertAverager`."""

    num_steps: int

    @property
    def share_rate(self) -> float:
        """β of the next step."""

    @property
    def num_changes(self) -> int | None:
        """How often what is averaged may have become something else; None if it was given once and for all."""

    def named_experts(self) -> Mapping[str, Experts]:
        """What is averaged now."""

    def check(self) -> list[Experts]:
        """The same. Is called before each step, and raises what is wrong, so that nothing has changed then."""

    def average(self, found_inf: Any, experts: list[Experts]) -> None:
        """Is called after each real step with what GradScaler found, or None, and with what `check` returned."""

    def memory(self) -> dict[str, set[int]]:
        """Addresses of what is averaged, by name."""


_alive: weakref.WeakSet[Attachment] = weakref.WeakSet()


class Attachment:
    """That something runs after an optimizer's real steps, until `remove()`, or until the optimizer is gone.

    Of an optimizer whose state dict was loaded before, it goes on from the number of steps there. A copy of the
    optimizer, or one that was pickled, has a copy of it.

    Raises:
        ValueError: another that is attached averages some of the same; the optimizer steps inside backward, and has a
            part of what is averaged only.
    """

    def __init__(self, averaging: Averaging, optimizer: Optimizer):
        self._averaging = averaging
        self._optimizer: weakref.ref[Optimizer] | None = weakref.ref(optimizer)
        self._had_state = self._has_told = False
        self._num_steps = -1  # as written into the optimizer
        self._experts: list[Experts] = []  # while the optimizer steps
        self._watch, self._undone = Watch(), Undone(optimizer)
        self._handles: list[RemovableHandle] = []
        self._check_not_in_backward(optimizer)
        if self._others():
            gc.collect()  # an optimizer that nobody has any more may be part of a circle
        for other, name in self._others():
            raise ValueError(
                f"experts must have one averager, but that of a {type(other).__name__} averages {name} already: call "
                "remove() on what its attach returned"
            )
        used = {other._key for other in _alive if other.optimizer is optimizer}
        self._key: str = next(key for i in itertools.count() if (key := f"{STEPS}_{i}" if i else STEPS) not in used)
        _alive.add(self)
        self._take_steps(optimizer)
        self._state_handles = self._hook_state(optimizer)

    def _check_not_in_backward(self, optimizer: Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        members = [t for group in self._averaging.named_experts().values() for t in members_of(group)]
        if len(parameters) == 1 and private_torch.steps_in_backward(parameters[0]):
            held = [holds(optimizer, [member]) for member in members]
            if any(held) and not all(held):
                raise ValueError(_inside_backward(optimizer))

    def _others(self) -> list[tuple[Optimizer, str]]:
        """Optimizers that average some of the same, and what."""
        found, own = [], set().union(*self._averaging.memory().values())
        for other in [a for a in _alive if a is not self]:
            optimizer = other.optimizer
            if optimizer is None:
                continue
            try:
                of_other = other._averaging.memory()
            except (ValueError, RuntimeError, AttributeError):  # what it averaged is gone, or it was not copied whole
                continue
            found += [(optimizer, name) for name, memory in of_other.items() if not memory.isdisjoint(own)][:1]
        return found

    def _hook_state(self, optimizer: Optimizer) -> list[RemovableHandle]:
        # An optimizer that is being copied has none, nor has one that does not call Optimizer.__init__.
        for hooks in (
            *("_optimizer_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"),
            *("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"),
        ):
            optimizer.__dict__.setdefault(hooks, OrderedDict())
        attachments = optimizer.__dict__.setdefault(_ATTACHMENTS, [])
        if self not in attachments:
            attachments.append(self)
        # Of this optimizer alone, as learning rate schedulers of torch do with `step`.
        optimizer.__dict__["__getstate__"] = functools.partial(_state_of, weakref.ref(optimizer))
        return [
            optimizer.register_state_dict_pre_hook(self._give_steps),
            optimizer.register_load_state_dict_post_hook(self._take_steps),
        ]

    def _take_steps(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups[:1]:
            self._averaging.num_steps = group.get(self._key, self._averaging.num_steps)
        self._give_steps(optimizer)

    def _give_steps(self, optimizer: Optimizer) -> None:
        self._num_steps = self._averaging.num_steps
        first, *others = optimizer.param_groups
        first[self._key] = self._num_steps
        for group in others:  # somebody may have changed their order
            group.pop(self._key, None)

    @property
    def optimizer(self) -> Optimizer | None:
        return None if self._optimizer is None else self._optimizer()

    def hook(self, optimizer: Optimizer) -> None:
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        for handle in (*self._handles, *self._state_handles):
            handle.remove()
        if (optimizer := self.optimizer) is not None:
            optimizer.__dict__[_ATTACHMENTS].remove(self)
            for group in optimizer.param_groups:
                group.pop(self._key, None)
        self._optimizer = None

    def look(self, experts: Mapping[str, Experts]) -> None:
        """Warns of what of `experts` the optimizer does not train any more, or, where it is hooked, if it has none.

        Raises:
            RuntimeError: inside backward, of an optimizer that has a part of them only.
        """
        optimizer = self.optimizer
        if optimizer is None or torch.compiler.is_compiling():
            return
        self._watch.look(experts, optimizer, self._averaging.num_changes)
        if self._watch.has_none and self._handles and not self._has_told:
            self._has_told = True
            warnings.warn(
                f"the {type(optimizer).__name__} attached to has none of the experts: make the optimizer after "
                "replace_ffn_ (and fully_shard)",
                stacklevel=3,
            )
        if self._watch.is_partial and private_torch.is_in_backward():
            raise RuntimeError(_inside_backward(optimizer))

    def __getstate__(self) -> dict[str, Any]:
        here = {"_handles": bool(self._handles), "_state_handles": [], "_experts": []}
        return {**self.__dict__, **here, "_optimizer": self.optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """torch copies an optimizer without its hooks, so that they are registered with the copy here."""
        optimizer, hooked = state.pop("_optimizer"), state.pop("_handles")
        self.__dict__.update(state, _optimizer=None if optimizer is None else weakref.ref(optimizer), _handles=[])
        _alive.add(self)
        if optimizer is not None:
            self._state_handles = self._hook_state(optimizer)
            if hooked:
                self.hook(optimizer)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            group = optimizer.param_groups[0]
            if group.get(self._key, self._num_steps) != self._num_steps:  # a wrapper has loaded them, without hooks
                self._take_steps(optimizer)
        self._experts = self._averaging.check()
        self._had_state = len(optimizer.state) > 0
        if not _is_recorded(self._experts):
            self._undone.before_step(self._experts)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._average(optimizer)
        if not torch.compiler.is_compiling():
            self._give_steps(optimizer)

    def _average(self, optimizer: Optimizer) -> None:
        experts, self._experts = self._experts, []
        if is_dry_run(optimizer, self._had_state):
            return
        # GradScaler hands it to fused optimizers, which skip by themselves, as an attribute.
        found_inf = getattr(optimizer, "found_inf", None)
        if _is_recorded(experts) or not self._undone.is_due(self._averaging.share_rate):
            self._averaging.average(found_inf, experts)
            return
        self._undone.before_averaging(experts, type(optimizer).__name__)
        self._averaging.average(found_inf, experts)
        self._undone.after_averaging(experts)


def _state_of(optimizer_ref: weakref.ref[Optimizer]) -> Any:
    """What a copy of an optimizer, or a pickled one, is made of: that of its class, and what is attached to it."""
    optimizer = optimizer_ref()
    assert optimizer is not None
    state = type(optimizer).__getstate__(optimizer)
    attachments = optimizer.__dict__[_ATTACHMENTS]
    return {**state, _ATTACHMENTS: [*attachments]} if attachments and isinstance(state, dict) else state


def _is_recorded(experts: list[Experts]) -> bool:
    """Whether a compiler traces, or a CUDA graph records, what runs now."""
    if torch.compiler.is_compiling():
        return True
    return any(graphs.is_capturing(t.device) for group in experts[:1] for t in members_of(group)[:1])


def _inside_backward(optimizer: Optimizer) -> str:
    return (
        f"optimizer must step after backward, but this {type(optimizer).__name__} steps inside it, and has a part of "
        "the experts only: attach to none, and call averager.step() after each backward"
    )


def hooked(optimizer: object) -> Optimizer:
    """The optimizer itself, whose `step` runs hooks from now on if it did not.

    Raises:
        TypeError: it is no torch.optim.Optimizer, or has no hooks of its own.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if "_optimizer_step_post_hooks" not in optimizer.__dict__:
        raise TypeError(
            f"optimizer must have step hooks, got {type(optimizer).__name__}: attach to the optimizer it wraps"
        )
    if not getattr(type(optimizer).step, "hooked", False):
        # As Optimizer.__init__ does, which not all call (timm's Lookahead), and else the first zero_grad().
        optimizer._patch_step_function()
    return optimizer


def holds(optimizer: Optimizer, tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is a parameter of the optimizer, or lies in the memory of one."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    memory, held = ({*map(shards.storage_of, each)} for each in (tensors, parameters))
    return not memory.isdisjoint(held)


def is_dry_run(optimizer: Optimizer, had_state: bool) -> bool:
    """Whether a step only creates the optimizer's state: a first one, at learning rate 0, with gradients of 0."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    # That of a dry run is on the CPU, and one on a GPU may not be read here.
    if had_state or any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates):
        return False
    if any(lr is None or float(lr) != 0 for lr in rates):  # None: the optimizer finds its own
        return False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    has_grad = any(p.grad is not None and bool(shards.local(p.grad).any()) for p in parameters)
    # A process may hold nothing but empty shards, or zeros by chance: all must come to the same answer.
    return not shards.any_process(has_grad, parameters)
