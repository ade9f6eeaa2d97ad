"""What runs after each real step of an optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import ewa_kernels.train.shards as shards


class Attachment:
    """That something runs after an optimizer's real steps, until `remove()`, or until the optimizer is gone.

    Args:
        check: is called before each step, and raises what is wrong, so that nothing has changed then.
        run: is called after each real step with what GradScaler found, or None.
    """

    def __init__(self, check: Callable[[], None], run: Callable[[Any], None], optimizer: Optimizer):
        self._check, self._run = check, run
        self._optimizer: weakref.ref[Optimizer] | None = weakref.ref(optimizer)
        self._had_state = False
        self._handles: list[RemovableHandle] = []

    @property
    def optimizer(self) -> Optimizer | None:
        return None if self._optimizer is None else self._optimizer()

    def hook(self, optimizer: Optimizer) -> None:
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._optimizer = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizer": self.optimizer, "_handles": bool(self._handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """torch copies an optimizer without its hooks, so that they are registered with the copy here."""
        optimizer, hooked = state.pop("_optimizer"), state.pop("_handles")
        self.__dict__.update(state, _optimizer=None if optimizer is None else weakref.ref(optimizer), _handles=[])
        if optimizer is not None and hooked:
            self.hook(optimizer)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._check()
        self._had_state = len(optimizer.state) > 0

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not is_dry_run(optimizer, self._had_state):
            # GradScaler hands it to fused optimizers, which skip by themselves, as an attribute.
            self._run(getattr(optimizer, "found_inf", None))


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
    memory, held = ({shards.local(t).untyped_storage()._cdata for t in each} for each in (tensors, parameters))
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
