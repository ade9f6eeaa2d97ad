"""Experts Weights Averaging in the `Trainer` of transformers."""

from __future__ import annotations

import json
import os
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        f"ewa_kernels.integrations.transformers needs transformers and accelerate: "
        f"pip install transformers accelerate ({error})"
    ) from error

from ..models.checkpoints import load_unfolded_, save_unfolded
from ..models.replace import replaced_in
from ..train.averager import ExpertAverager
from .callbacks import AveragingCallback

__all__ = ["EWACallback"]

EXPERTS_FILE = "ewa_experts.pt"
AVERAGER_FILE = "ewa_averager.json"
_RECORD = "ewa_kernels"  # among the stateful_callbacks that the trainer saves in trainer_state.json


class EWACallback(AveragingCallback, TrainerCallback):
    """Averages after each real optimizer step of a `Trainer`, and folds the model when training ends.

        ewa.replace_ffn_(model)
        trainer = Trainer(model, args, train_dataset=…, callbacks=[EWACallback(share_rate=0.03)])
        trainer.train()
        trainer.save_model()    # a dense model

    Steps that a gradient scaler skipped, and batches that only accumulate gradients, average nothing. Where the
    trainer logs its loss, `share_rate` (β of the last step) and `expert_spread` (mean over all tensors) stand beside
    it. Each checkpoint has the dense weights beside the experts in the trainer's own files, and in two more all weights
    and the averager: `train(resume_from_checkpoint=…)`, with a model that went through the same `replace_ffn_`, goes on
    as if it had never stopped, and `load_best_model_at_end` gets the best experts too. What the trainer loads itself
    does not count: of models whose weights have other names in a file (ViT, in transformers 5) it finds none.

    Args:
        averager: may be attached already, or belong to `ewa_kernels.optim.AdamW`; then it is left so. None: give
            `share_rate`.
        share_rate: β, a float or a schedule, of an averager that is made each time training begins: it starts anew.
        fold_at_end: whether to fold the model at the end of training, if any step was made. Must be False for a sharded
            model, of which `ewa_kernels.integrations.fsdp` gets the dense weights.
        quantized_gradients: whether several processes exchange gradients in 8 bits, see
            `ewa_kernels.integrations.ddp`. Needs `add_to`: only the trainer knows what its model is wrapped in.
        resume_from_checkpoint: needed only to resume from a checkpoint that is not in the trainer's `output_dir`.

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
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
    ):
        super().__init__(averager, share_rate, fold_at_end, quantized_gradients)
        self._trainer: Trainer | None = None
        if resume_from_checkpoint is not None and not isinstance(resume_from_checkpoint, (str, os.PathLike)):
            kind = type(resume_from_checkpoint).__name__
            raise TypeError(f"resume_from_checkpoint must be the checkpoint's folder or None, got {kind}")
        self.resume_from_checkpoint = resume_from_checkpoint
        self._run = ""

    def add_to(self, trainer: Trainer) -> EWACallback:
        """Puts it before the trainer's other callbacks, so that loggers see `share_rate` and `expert_spread` too.

        Given in `Trainer(callbacks=…)` it comes after them: then the two are in `trainer.state.log_history` alone.
        """
        self._trainer = trainer
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if self._quantized_gradients and self._trainer is None:
            raise ValueError("quantized_gradients needs the trainer: call add_to(trainer) on the callback")
        self._begin(model)
        if state.global_step > 0:
            self._resume(args, state, model)
        # Saved by the trainer, it tells which of all folders called checkpoint-5 is meant.
        self._run = uuid.uuid4().hex
        state.stateful_callbacks[_RECORD] = {"run": self._run}
        self._attach([kwargs["optimizer"]])
        if self._trainer is not None:
            self._quantize(self._trainer.model_wrapped)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            metrics = self._metrics()
            kwargs["logs"].update(metrics)
            state.log_history[-1].update(metrics)  # a copy of the logs, made before

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folders = [folder for folder in _checkpoints(args, state) if folder.is_dir()]
        if not folders:
            warnings.warn(f"no experts saved: the trainer's checkpoint is not in {args.output_dir}", stacklevel=2)
            return
        folder = max(folders, key=lambda folder: folder.stat().st_mtime_ns)
        if replaced_in(kwargs["model"]):  # other experts are in the trainer's own file
            save_unfolded(kwargs["model"], folder / EXPERTS_FILE, is_main_process=args.should_save)
        if args.should_save:
            record = {"run": self._run, "global_step": state.global_step, "averager": self.averager.state_dict()}
            (folder / AVERAGER_FILE).write_text(json.dumps(record))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model: nn.Module = kwargs["model"]
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and replaced_in(model):
            # The trainer has loaded its own file, which has no experts.
            load_unfolded_(model, Path(state.best_model_checkpoint) / EXPERTS_FILE)
        self._end(model, is_trained=state.global_step > 0)

    def _resume(self, args: Any, state: Any, model: nn.Module) -> None:
        record = state.stateful_callbacks.get(_RECORD)
        if not isinstance(record, dict):
            warnings.warn(
                "the checkpoint was saved without EWACallback: its experts are what the trainer loaded, and averaging "
                "begins anew",
                stacklevel=2,
            )
            return
        given = (self.resume_from_checkpoint, args.resume_from_checkpoint)
        folders = [Path(folder) for folder in given if isinstance(folder, (str, os.PathLike))]
        folders += _checkpoints(args, state)
        for folder in folders:
            if (folder / AVERAGER_FILE).is_file():
                saved = json.loads((folder / AVERAGER_FILE).read_text())
                if (saved["run"], saved["global_step"]) == (record["run"], state.global_step):
                    if (folder / EXPERTS_FILE).is_file():
                        load_unfolded_(model, folder / EXPERTS_FILE)
                    self.averager.load_state_dict(saved["averager"])
                    return
        raise ValueError(
            f"the experts of the checkpoint are not in {', '.join(map(str, folders))}: give its folder as "
            "EWACallback(resume_from_checkpoint=…) too"
        )


def _checkpoints(args: Any, state: Any) -> list[Path]:
    """Where the trainer's checkpoint of this step may be: in its folder, or in that of a trial of a search."""
    name, folder = f"checkpoint-{state.global_step}", Path(args.output_dir)
    return [folder / name, *folder.glob(f"run-*/{name}")]
