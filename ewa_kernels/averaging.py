"""Experts Weights Averaging in a training loop: `ExpertAverager`.

Source: equation 6 of arXiv 2308.06093 ("at the end of each iteration").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ewa_kernels import checks, functional, shards
from ewa_kernels.attachment import Attachment
from ewa_kernels.modules import expert_tensors
from ewa_kernels.share_rate import ConstantShareRate, ShareRate

Experts = Tensor | Sequence[Tensor]


class ExpertAverager:
    """Pulls every expert towards the mean of its fellows after each optimizer step.

        averager = ewa.ExpertAverager(model, share_rate=ewa.LinearShareRate(end=0.3, num_steps=10_000))
        averager.attach(optimizer)      # or call averager.step() after optimizer.step()

    Args:
        experts: a model, whose `RandomPartitionMoE` layers are looked up at each step; or an iterable of stacked
            tensors `[E, ...]`, of lists of E same-shaped tensors, or of (name, either) pairs.
        share_rate: β, a float in [0, 1] or a schedule.
        rounding: of 16-bit parameters, "stochastic" or "nearest"; see `ewa_kernels.functional.average_experts_`.
        seed: of stochastic rounding, int in 0…2⁶³−1. With the number of the step it decides every rounding, so that
            ranks which hold the same parameters round them alike, and a resumed run as one that went on.

    Raises:
        TypeError, ValueError: `share_rate` is neither a number in [0, 1] nor a schedule; `experts` holds none;
            `rounding` or `seed` is none of those above.
    """

    def __init__(
        self,
        experts: nn.Module | Iterable[Any],
        share_rate: float | Callable[[int], float],
        *,
        rounding: str = "stochastic",
        seed: int = 0,
    ):
        if not callable(share_rate):
            checks.probability("share_rate", share_rate)
            share_rate = ConstantShareRate(float(share_rate))
        checks.choice("rounding", rounding, functional.ROUNDINGS)
        checks.integer("seed", seed, minimum=0, below=2**63)
        self.schedule = share_rate
        self.rounding, self.seed = rounding, seed
        self.num_steps = 0
        self._attachment: Attachment | None = None
        self._model: nn.Module | None = None
        self._given: Mapping[str, Experts] = {}
        if isinstance(experts, nn.Module) and not isinstance(experts, nn.ParameterList):
            self._model = experts
        else:
            self._given = _named(experts)
        self._experts()

    def _experts(self) -> Mapping[str, Experts]:
        """Looked up at each step: parameters may be replaced (load_state_dict(assign=True), to(), fold_)."""
        experts = self._given
        if self._model is not None:
            experts = dict(expert_tensors(self._model))
            _check_not_flattened(experts)
        if not experts:
            found = "an empty iterable"
            if self._model is not None:
                found = "a model without RandomPartitionMoE layers: call replace_ffn_(model) first"
            raise ValueError(f"experts must hold something to average, got {found}")
        return experts

    @property
    def share_rate(self) -> float:
        """β of the next step."""
        beta = self.schedule(self.num_steps)
        checks.probability("share_rate", beta)
        return float(beta)

    def step(self, found_inf: bool | float | Tensor | None = None) -> None:
        """Averages the experts once, with the current β, and moves on to the next.

        Args:
            found_inf: what GradScaler found: where it is true the optimizer skipped its step, and nothing is
                averaged. A tensor on a GPU is read there, without a host sync, and then the schedule moves on
                all the same; otherwise a skipped step leaves the schedule where it was.
        """
        if found_inf is not None and (not isinstance(found_inf, Tensor) or found_inf.device.type == "cpu"):
            if bool(found_inf):
                return
            found_inf = None
        beta, seed = self.next_step()
        functional.average_experts_(self.experts(), beta, rounding=self.rounding, seed=seed, found_inf=found_inf)
        self.num_steps += 1

    def next_step(self) -> tuple[float, int | None]:
        """β of the next step, and the seed of its rounding; no seed in a CUDA graph, which must draw its own.

        Raises:
            RuntimeError: a CUDA graph is being captured, which would repeat this step's β for ever, and β is not
                constant.
        """
        beta, seed = self.share_rate, (self.seed + self.num_steps) % 2**63
        if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
            return beta, seed
        if not (isinstance(self.schedule, ConstantShareRate) and self.schedule.is_endless):
            raise RuntimeError(
                f"share_rate must be constant in a CUDA graph, which would repeat β = {beta} in each replay, got "
                f"{self.schedule!r}: use functional.average_experts_ with a share_rate tensor that you fill"
            )
        return beta, None

    def experts(self) -> list[Experts]:
        """What is averaged: stacked tensors, and lists of separate ones."""
        return list(self._experts().values())

    @property
    def attached_to(self) -> Optimizer | None:
        """The optimizer whose steps end with averaging."""
        return None if self._attachment is None else self._attachment.optimizer

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Makes each real step of `optimizer` end with `step()`, until `remove()` is called on the result.

        A step that GradScaler skipped is no real step, nor is the one that
        torch.distributed.checkpoint.state_dict makes at learning rate 0 to create the optimizer's state. Copied or
        pickled together with the optimizer, the averager is attached to the copy of it.

        Raises:
            TypeError: not a torch.optim.Optimizer, or one without hooks, as wrappers are.
            ValueError: attached already, to this optimizer or another: each step would average twice.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not hasattr(optimizer, "_optimizer_step_post_hooks"):
            raise TypeError(
                f"optimizer must have step hooks, got {type(optimizer).__name__}: attach to the optimizer it wraps"
            )
        attachment = self.hand_over(optimizer)
        attachment.hook(optimizer)
        return attachment

    def hand_over(self, optimizer: Optimizer) -> Attachment:
        """For an optimizer that averages by itself, as `ewa_kernels.optim.AdamW` does: as if attached to it."""
        if self.attached_to is not None:
            raise ValueError(
                "optimizer must be the only one attached to, but the averager is attached already: "
                "call remove() on what attach returned, or delete the optimizer that has it"
            )
        self._attachment = Attachment(self.step, optimizer)
        return self._attachment

    @torch.no_grad()
    def spread(self) -> dict[str, float]:
        """Root mean square distance of the experts from their mean, per tensor, in float64.

        Of sharded experts it is that of all processes together, which must all make the call.
        """
        return {name: _rms_distance(experts) for name, experts in self._experts().items()}

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken, and the schedule in words, to tell a resumed run from another."""
        # The words of any other function hold its address, which is new in every run.
        words = repr(self.schedule) if isinstance(self.schedule, ShareRate) else None
        return {"num_steps": self.num_steps, "schedule": words}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes the schedule; warns if it is not the one that was saved. The experts are the model's."""
        missing = {"num_steps", "schedule"} - set(state_dict)
        if missing:
            raise ValueError(f"state_dict must have num_steps and schedule, lacks {', '.join(sorted(missing))}")
        checks.integer("state_dict['num_steps']", state_dict["num_steps"], minimum=0)
        self.num_steps = state_dict["num_steps"]
        if state_dict["schedule"] != self.state_dict()["schedule"]:
            warnings.warn(
                f"resuming with {self.schedule!r}, but {state_dict['schedule'] or 'another function'} was saved",
                stacklevel=2,
            )


def _named(experts: Any) -> dict[str, Experts]:
    if isinstance(experts, Tensor) or not isinstance(experts, Iterable):
        raise TypeError(
            "experts must be a model or an iterable of stacked tensors [E, ...] or of lists of E tensors, "
            f"got {type(experts).__name__}"
        )
    named: dict[str, Experts] = {}
    for i, item in enumerate(experts):
        is_pair = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        name, group = item if is_pair else (str(i), item)
        if name in named:
            raise ValueError(f"experts must have names of their own, got {name!r} twice")
        if not isinstance(group, Iterable):
            raise TypeError(
                f"experts[{repr(name) if is_pair else name}] must be a stacked tensor [E, ...] or a list of E "
                f"tensors, got {type(group).__name__}"
            )
        named[name] = group if isinstance(group, Tensor) else list(group)
    checks.experts(shards.Experts(named.values(), exchange=False).local)
    return named


def _check_not_flattened(experts: Mapping[str, Experts]) -> None:
    """A flat piece of experts would pass for experts of one number each."""
    for name, tensor in experts.items():
        ndim = {"weight": 3, "bias": 2}.get(name.rpartition(".")[2])
        if ndim is not None and isinstance(tensor, Tensor) and tensor.ndim != ndim:
            raise ValueError(
                f"{name} must have {ndim} dimensions, the first for the experts, got shape {list(tensor.shape)}: "
                "FullyShardedDataParallel and ZeRO-3 flatten parameters; use torch.distributed.fsdp.fully_shard"
            )


def _rms_distance(experts: Experts) -> float:
    if isinstance(experts, Tensor):
        whole = shards.whole_experts(experts)
        stacked, numel = shards.local(whole), experts.numel()
    else:
        whole = experts[0]
        stacked, numel = torch.stack([shards.local(expert) for expert in experts]), len(experts) * whole.numel()
    wide = stacked.to(torch.float64)
    total = (wide - wide.mean(dim=0)).square().sum()
    if shards.is_sharded(whole):
        total = shards.sum_over_shards(total, whole)
    return (total / numel).sqrt().item()
