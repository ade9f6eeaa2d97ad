"""Experts Weights Averaging in Lightning's `Trainer`, of the package lightning or of pytorch_lightning."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..train.averager import ExpertAverager
from .callbacks import AveragingCallback

__all__ = ["EWACallback"]


def _callback_class() -> Any:
    """Of the package in use; both may be installed, and they are large."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    names.sort(key=lambda name: name not in sys.modules)
    for name in names:
        try:
            return importlib.import_module(name).Callback
        except ImportError as error:
            reason = error
    raise ImportError(f"ewa_kernels.integrations.lightning needs Lightning: pip install lightning ({reason})")


class EWACallback(AveragingCallback, _callback_class()):  # type: ignore[misc]
    """Averages after each real optimizer step, and folds the model when `fit` ends.

        class MyModule(LightningModule):
            def __init__(self):
                ...
                ewa.replace_ffn_(self.model)

        Trainer(callbacks=[EWACallback(share_rate=0.03)]).fit(MyModule(), …)

    Replace the FFNs before `fit`, or in `configure_model`. Experts that are frozen at first, as by BackboneFinetuning,
    are averaged from the step on in which they are trained. Steps that a gradient scaler skipped, and batches that only
    accumulate gradients, average nothing. `share_rate` (β of the last step) and `expert_spread` (mean over all
    tensors) are logged every `log_every_n_steps` steps.

    A checkpoint of Lightning's has all experts; this callback adds the averager and, because Lightning does not, the
    state of the random generators: `fit(ckpt_path=…)` goes on as if it had never stopped, with one process and from
    the end of an epoch, or wherever the data loader gives the next batch. After folding, a checkpoint of the training
    no longer fits the module: with `test(ckpt_path="best")` use `fold_at_end=False`, and fold after it.

    Args:
        averager: may be attached already, or belong to `ewa_kernels.optim.AdamW`; then it is left so. None: give
            `share_rate`.
        share_rate: β, a float or a schedule, of an averager that is made each time training begins: it starts anew.
        fold_at_end: whether to fold the model at the end of a `fit` that made any step; not after `fast_dev_run`. Must
            be False for a sharded model, of which `ewa_kernels.integrations.fsdp` gets the dense weights.
        quantized_gradients: whether several processes exchange gradients in 8 bits, see `ewa_kernels.integrations.ddp`.

    Raises:
        TypeError, ValueError: not exactly one of `averager` and `share_rate`, or out of range.
    """

    def __init__(
        self,
        averager: ExpertAverager | None = None,
        *,
        share_rate: float | Callable[[int], float] | None = None,
        fold_at_end: bool = True,
        quantized_gradients: bool = False,
    ):
        super().__init__(averager, share_rate, fold_at_end, quantized_gradients)
        self._loaded: dict[str, Any] | None = None
        self._restorable = False
        self._inside_epoch = False
        self._logged_step = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # The file has the generators of one process, and each must have its own.
        self._restorable = self._loaded is not None and trainer.world_size == 1
        # Starting a data loader draws a number: at the end of an epoch that was still to come.
        if self._loaded is not None and not self._loaded["inside_epoch"]:
            self._restore_generators()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(pl_module)
        if self._loaded is not None:
            self.averager.load_state_dict(self._loaded["averager"])
        self._inside_epoch = False
        self._logged_step = trainer.global_step
        self._attach(trainer.optimizers)
        self._quantize(trainer.strategy.model)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._restore_generators()
        self._loaded = None
        if self.averager.attached_to is None:  # of several optimizers none had experts that were all frozen
            self._attach(trainer.optimizers)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._inside_epoch = not trainer.is_last_batch
        every, step = trainer.log_every_n_steps, trainer.global_step
        if every > 0 and step // every > self._logged_step // every:
            self._logged_step = step
            for name, value in self._metrics().items():
                pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        # Not in on_train_end, after which a last checkpoint may be saved.
        self._end(pl_module, is_trained=trainer.global_step > 0 and not trainer.fast_dev_run)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        if self._averager is None:
            return {}
        return {
            "averager": self.averager.state_dict(),
            "inside_epoch": self._inside_epoch,
            "cpu_generator": torch.get_rng_state(),
            "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None

    def _restore_generators(self) -> None:
        """Once."""
        if self._loaded is not None and self._restorable:
            torch.set_rng_state(self._loaded["cpu_generator"])
            if len(self._loaded["cuda_generators"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(self._loaded["cuda_generators"])
        self._restorable = False
