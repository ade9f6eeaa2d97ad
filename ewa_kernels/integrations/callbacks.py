"""What the callbacks of the trainers share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from ewa_kernels import checks
from ewa_kernels.attachment import Attachment
from ewa_kernels.averaging import ExpertAverager
from ewa_kernels.modules import expert_tensors


class Averaging:
    """An averager that is given, or made when training begins, and attached while training lasts.

    Args:
        averager: or None, and `share_rate` instead.
        share_rate: β, as `ewa_kernels.ExpertAverager` takes it.

    Raises:
        TypeError, ValueError: not exactly one of the two is given, or it is not what it must be.
    """

    def __init__(self, averager: ExpertAverager | None, share_rate: object):
        if (averager is None) == (share_rate is None):
            got = "neither" if averager is None else "both"
            raise ValueError(f"averager or share_rate must be given, got {got}")
        if averager is not None and not isinstance(averager, ExpertAverager):
            raise TypeError(f"averager must be an ExpertAverager, got {type(averager).__name__}")
        if share_rate is not None and not callable(share_rate):
            checks.probability("share_rate", share_rate)
        self._share_rate = share_rate
        self._averager = averager
        self._attachment: Attachment | None = None

    @property
    def is_ready(self) -> bool:
        """Whether there is an averager."""
        return self._averager is not None

    @property
    def averager(self) -> ExpertAverager:
        """Raises RuntimeError where it is yet to be made."""
        if self._averager is None:
            raise RuntimeError("the averager is made when training begins")
        return self._averager

    def begin(self, model: nn.Module) -> None:
        """Makes the averager, of this model, if none was given.

        Raises:
            ValueError: the model has no experts.
        """
        self.detach()
        if self._share_rate is not None:
            self._averager = ExpertAverager(model, self._share_rate)  # type: ignore[arg-type]

    def attach(self, model: nn.Module, optimizers: Sequence[object]) -> None:
        """To the optimizer that has the model's experts; if the averager is attached already it stays where it is.

        Raises:
            ValueError: none, or more than one of them, has experts; or the averager is attached to another.
            TypeError: it has no hooks.
        """
        plain = [plain_optimizer(optimizer) for optimizer in optimizers]
        other = self.averager.attached_to
        if other is not None:
            if not any(other is optimizer for optimizer in plain):
                raise ValueError(f"averager must be attached to the trainer's optimizer, is to another {_kind(other)}")
            return
        experts = {id(parameter) for _, parameter in expert_tensors(model)}
        holding = [
            optimizer
            for optimizer in plain
            if any(id(p) in experts for group in optimizer.param_groups for p in group["params"])
        ]
        if len(holding) != 1:
            raise ValueError(
                f"one optimizer must have the experts, got {len(holding)} of {len(plain)}: make it after replace_ffn_; "
                "of several, attach the averager yourself"
            )
        self._attachment = self.averager.attach(holding[0])

    def detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def metrics(self) -> dict[str, float]:
        """`share_rate`: β of the last step; `expert_spread`: mean over all tensors of `ExpertAverager.spread`."""
        spreads = list(self.averager.spread().values())
        last = max(self.averager.num_steps - 1, 0)
        return {
            "share_rate": float(self.averager.schedule(last)),
            "expert_spread": sum(spreads) / len(spreads),
        }


def plain_optimizer(optimizer: object) -> Optimizer:
    """Looks through wrappers, as Accelerate's, which are called more often than they make a step.

    Raises:
        TypeError: no torch.optim.Optimizer with hooks inside.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer) or "_optimizer_step_post_hooks" not in optimizer.__dict__:
        raise TypeError(f"optimizer must be a torch.optim.Optimizer with step hooks, got {_kind(optimizer)}")
    return optimizer


def _kind(optimizer: object) -> str:
    return type(optimizer).__name__
