"""What the callbacks of the trainers share."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from .. import checks
from ..models.replace import fold_, foldable
from ..modules import expert_tensors
from ..train import shards
from ..train.attachment import Attachment, hooked
from ..train.averager import ExpertAverager
from ..train.share_rate import as_schedule


class _Averager(ExpertAverager):
    """Of a model whose experts may all be frozen when training begins."""

    def _refuse_frozen(self) -> None:
        pass


class AveragingCallback:
    """An averager that is given, or made when training begins, and attached while training lasts.

    Arguments, and what they raise: see `lightning.EWACallback` and `transformers.EWACallback`.
    """

    def __init__(
        self, averager: ExpertAverager | None, share_rate: object, fold_at_end: bool, quantized_gradients: bool
    ):
        if (averager is None) == (share_rate is None):
            got = "neither" if averager is None else "both"
            raise ValueError(f"averager or share_rate must be given, got {got}")
        if averager is not None and not isinstance(averager, ExpertAverager):
            raise TypeError(f"averager must be an ExpertAverager, got {type(averager).__name__}")
        checks.boolean("fold_at_end", fold_at_end)
        checks.boolean("quantized_gradients", quantized_gradients)
        self._quantized_gradients = quantized_gradients
        self._share_rate = None if share_rate is None else as_schedule(share_rate)
        self._fold_at_end = fold_at_end
        self._averager = averager
        self._attachment: Attachment | None = None
        self._model: nn.Module | None = None  # while it is trained

    @property
    def averager(self) -> ExpertAverager:
        """The one given, or made when training began.

        Raises:
            RuntimeError: it is yet to be made.
        """
        if self._averager is None:
            raise RuntimeError("the averager is made when training begins")
        return self._averager

    def _begin(self, model: nn.Module) -> None:
        """Makes the averager, of this model, if none was given.

        Raises:
            ValueError: the model has no experts, or it is to be folded in the end but is sharded.
        """
        self._detach()
        self._model = model
        for module in shards.unsharded_modules(model):  # by a validation before training
            module.reshard()
        if self._fold_at_end and any(shards.is_sharded(p) for layer in foldable(model) for p in layer.parameters()):
            raise ValueError(
                "fold_at_end must be False for a sharded model, got True: after training get the dense weights by "
                "ewa_kernels.integrations.fsdp.folded_state_dict(model)"
            )
        if self._share_rate is not None:
            self._averager = _Averager(model, self._share_rate)

    def _quantize(self, wrapped: nn.Module) -> None:
        """If asked for, and there are several processes: exchanges gradients in 8 bits. `wrapped`: by DDP, say."""
        if self._quantized_gradients and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            from .ddp import quantize_gradients

            quantize_gradients(wrapped)

    def _attach(self, optimizers: Sequence[object]) -> None:
        """To the optimizer that has the experts; if the averager is attached already it stays where it is.

        As long as experts are frozen, and so in none, a single one is taken to be theirs later; of several none is:
        call it again then.

        Raises:
            ValueError: more than one of them has experts, or none has although they are trained; or the averager is
                attached to another.
            TypeError: it has no hooks.
        """
        plain = [plain_optimizer(optimizer) for optimizer in optimizers]
        other = self.averager.attached_to
        if other is not None:
            if not any(other is optimizer for optimizer in plain):
                kind = type(other).__name__
                raise ValueError(f"averager must be attached to the trainer's optimizer, is to another {kind}")
            return
        holding = [optimizer for optimizer in plain if self.averager.is_trained_by(optimizer)]
        if not holding and (not self.averager.experts() or self._has_frozen_experts()):
            if len(plain) > 1:
                return
            holding = plain
        if len(holding) != 1:
            raise ValueError(
                f"one optimizer must have the experts, got {len(holding)} of {len(plain)}: make it after replace_ffn_, "
                "and the averager of the model that is trained; of several, attach the averager yourself"
            )
        self._attachment = self.averager.attach(holding[0])

    def _has_frozen_experts(self) -> bool:
        return self._model is not None and any(not p.requires_grad for _, p in expert_tensors(self._model))

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = self._model = None

    def _end(self, model: nn.Module, *, is_trained: bool) -> None:
        """Detaches, and folds the model, unless it made no step. Experts among which a router chooses stay."""
        self._detach()
        if self._fold_at_end and is_trained and foldable(model):
            fold_(model)

    def _metrics(self) -> dict[str, float]:
        """`share_rate`: β of the last step; `expert_spread`: mean over all tensors of `ExpertAverager.spread`."""
        spreads = list(self.averager.spread().values())
        last = max(self.averager.num_steps - 1, 0)
        return {
            "share_rate": float(self.averager.schedule(last)),
            "expert_spread": sum(spreads) / max(len(spreads), 1),  # none while all experts are frozen
        }


def plain_optimizer(optimizer: object) -> Optimizer:
    """Looks through wrappers, as Accelerate's, which are called more often than they make a step.

    Raises:
        TypeError: no torch.optim.Optimizer with hooks inside.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return hooked(optimizer)
