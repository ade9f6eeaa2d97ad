"""Experts Weights Averaging in a training loop: `ExpertAverager`.

Source: equation 6 of arXiv 2308.06093 ("at the end of each iteration").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import checks, functional, private_torch
from ..backends import resolve
from ..kernels.parameter_pass import Numbers, Plan, averaging
from . import shards
from .attachment import Attachment, holds, hooked
from .found import FoundExperts
from .lookup import Experts, flattened, members_of
from .share_rate import ConstantShareRate, ShareRate, as_schedule


class ExpertAverager:
    """Pulls every expert towards the mean of its fellows after each optimizer step.

        averager = ewa.ExpertAverager(model, share_rate=0.03)
        averager.attach(optimizer)      # or call averager.step() after optimizer.step()

    Args:
        experts: a model, whose experts `ewa_kernels.find_experts` finds, of whatever class they are: which layers
            have some is found out now (of this package's layers: at each step), which tensors are theirs is looked up
            at each step. Routers, shared experts and tensors without `requires_grad` are left alone. Or an iterable of
            stacked tensors `[E, ...]`, of lists of E same-shaped tensors, or of (name, either) pairs.
        share_rate: β, a float in [0, 1] or a schedule.
        filter_fn: (name, module) → whether this layer of a model is averaged; the name and the module are those of
            `find_experts`, without the names of wrappers (torch.compile, activation checkpointing, DDP, FSDP). Asked
            once, now. None averages all.
        rounding: of 16-bit parameters, "stochastic" or "nearest"; see `ewa_kernels.functional.average_experts_`.
        seed: of stochastic rounding, int in 0…2⁶³−1. With the number of the step it decides every rounding, so that
            ranks which hold the same parameters round them alike, and a resumed run as one that went on.

    Raises:
        TypeError, ValueError: `share_rate` is neither a number in [0, 1] nor a schedule that begins with one; `experts`
            holds none, or `filter_fn` chooses none, or all are frozen; `filter_fn` without a model; `rounding` or
            `seed` is none of those above.
    """

    def __init__(
        self,
        experts: nn.Module | Iterable[Any],
        share_rate: float | Callable[[int], float],
        *,
        filter_fn: Callable[[str, nn.Module], bool] | None = None,
        rounding: str = "stochastic",
        seed: int = 0,
    ):
        self.schedule = as_schedule(share_rate)
        checks.choice("rounding", rounding, functional.ROUNDINGS)
        checks.integer("seed", seed, minimum=0, below=2**63)
        self.rounding, self.seed = rounding, seed
        self.num_steps = 0
        self._attachment: Attachment | None = None
        self._plan: Plan | None = None  # of the last step, for as long as it is true
        self._found: FoundExperts | None = None
        self._given: Mapping[str, Experts] = {}
        if filter_fn is not None and not callable(filter_fn):
            raise TypeError(f"filter_fn must be a callable (name, module) -> bool, got {type(filter_fn).__name__}")
        if isinstance(experts, nn.Module) and not isinstance(experts, nn.ParameterList):
            self._found = FoundExperts(experts, filter_fn)
        else:
            if filter_fn is not None:
                raise TypeError(f"filter_fn needs experts that are a model, got {type(experts).__name__}")
            self._given = _named(experts)
        if not self._experts():
            self._refuse_frozen()

    def _refuse_frozen(self) -> None:
        raise ValueError("experts must hold something to average, got a model whose experts are all frozen")

    def __getstate__(self) -> dict[str, Any]:
        """Without what is true of these tensors only."""
        return {**self.__dict__, "_plan": None}

    def _experts(self) -> Mapping[str, Experts]:
        if self._found is not None:
            return self._found()
        if not self._given:
            raise ValueError("experts must hold something to average, got an empty iterable")
        return self._given

    @property
    def share_rate(self) -> float:
        """β of the next step."""
        beta = self.schedule(self.num_steps)
        checks.probability("share_rate", beta)
        return float(beta)

    def step(self, found_inf: bool | float | Tensor | None = None) -> None:
        """Averages the experts once, with the current β, and moves on to the next. An attached averager does it itself.

        Args:
            found_inf: what GradScaler found: where it is true the optimizer skipped its step, and nothing is
                averaged. A tensor on a GPU is read there, without a host sync, and then the schedule moves on
                all the same; otherwise a skipped step leaves the schedule where it was.

        Warns if the averager is attached: each step of its optimizer averages already.
        """
        if self.attached_to is not None and not torch.compiler.is_compiling():
            warnings.warn(
                "step() averages once more than the optimizer, which the averager is attached to, does at each of its "
                "steps: leave it out, or call remove() on what attach returned",
                stacklevel=2,
            )
        self.average(found_inf)

    def average(self, found_inf: bool | float | Tensor | None = None, experts: list[Experts] | None = None) -> None:
        """`step`, for the optimizer attached to; `experts`: what `check` returned before its step."""
        checks.found_inf(found_inf)
        if found_inf is not None and (not isinstance(found_inf, Tensor) or found_inf.device.type == "cpu"):
            if _is_capturing():
                raise RuntimeError(
                    "found_inf must be a tensor on the GPU while a CUDA graph is captured, which would repeat in each "
                    f"replay what is decided now, got {found_inf!r}"
                )
            if bool(found_inf):
                return
            found_inf = None
        beta, seed = self.next_step()
        experts = self.experts() if experts is None else experts
        if not self._average_again(experts, beta, seed, found_inf):
            functional.average_experts_(experts, beta, rounding=self.rounding, seed=seed, found_inf=found_inf)
            flat, group_sizes = flattened(experts)
            by_extension = all(resolve("average_experts_", "auto", t.device) in ("cpp", "cuda") for t in flat)
            is_planned = by_extension and not private_torch.is_watched(flat)
            self._plan = Plan(averaging(flat, group_sizes), kept=True) if is_planned else None
        self.num_steps += 1

    @torch.no_grad()
    def _average_again(self, experts: list[Experts], beta: float, seed: int | None, found_inf: Tensor | None) -> bool:
        """By the plan of the last step, if it is one for these tensors: they were checked then."""
        if self._plan is None or seed is None or private_torch.is_watched():  # no seed: a graph is captured
            return False
        numbers = Numbers(beta, seed if self.rounding == "stochastic" else None, None, found_inf)
        return self._plan.run_again(averaging(*flattened(experts)), numbers)

    def check(self) -> list[Experts]:
        """Raises what `average` would, except for what its tensors are: before an optimizer's step, not after it.

        Returns: what is averaged.
        """
        experts = self.named_experts()
        if self._attachment is not None:
            self._attachment.look(experts)
        self.next_step()
        return list(experts.values())

    def next_step(self) -> tuple[float, int | None]:
        """β of the next step, and the seed of its rounding; no seed in a CUDA graph, which must draw its own.

        Raises:
            RuntimeError: a CUDA graph is being captured, which would repeat this step's β for ever, and β is not
                constant.
        """
        beta, seed = self.share_rate, (self.seed + self.num_steps) % 2**63
        if not _is_capturing():
            return beta, seed
        if not (isinstance(self.schedule, ConstantShareRate) and self.schedule.is_endless):
            raise RuntimeError(
                f"share_rate must be constant in a CUDA graph, which would repeat β = {beta} in each replay, got "
                f"{self.schedule!r}: use functional.average_experts_ with a share_rate tensor that you fill"
            )
        return beta, None

    def experts(self) -> list[Experts]:
        """What is averaged: stacked tensors, and lists of separate ones.

        Raises:
            RuntimeError: FSDP2 has gathered them, so that it would forget what averaging makes of them.
        """
        return list(self.named_experts().values())

    @property
    def num_changes(self) -> int | None:
        """How often the model had changed when the experts were looked up; None of tensors that were given."""
        return None if self._found is None else self._found.num_changes

    def named_experts(self) -> Mapping[str, Experts]:
        """`experts`, by name."""
        experts = self._experts()
        if self._found is not None:
            shards.check_not_gathered(self._found.model, experts)
        return experts

    @property
    def attached_to(self) -> Optimizer | None:
        """The optimizer whose steps end with averaging."""
        return None if self._attachment is None else self._attachment.optimizer

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Makes each real step of `optimizer` end with `step()`, until `remove()` is called on the result.

        A step that GradScaler skipped is no real step, nor is the one that
        torch.distributed.checkpoint.state_dict makes at learning rate 0 to create the optimizer's state. Of an
        optimizer that is driven by other methods than `step`, as SAM is, attach to the one which it steps
        (`sam.base_optimizer`). Of one that keeps master weights, from which it writes the parameters anew, give these
        to `ExpertAverager` too, beside the parameters.

        An optimizer that is copied or pickled takes its averager along: the copy averages as the original does. (Pickle
        takes no lambda, and so no optimizer then whose share rate is one.)

        The optimizer's state dict has the number of steps, too: a run that is resumed from the state dicts of model and
        optimizer goes on with the schedule where it was.

        Raises:
            TypeError: not a torch.optim.Optimizer, or one without hooks, as wrappers are.
            ValueError: attached already, to this optimizer or another, or another averager is that has some of the same
                experts: each step would average twice. Or the optimizer is one of many that step inside backward, each
                for a parameter: call `step()` after backward. (Where that cannot be seen yet, its first step raises.)

        Warns, now or before a step, if the optimizer has none of the experts, as one that was made before them, or not
        any more what it had, because parameters were replaced or moved; and if it undoes averaging (master weights).
        """
        attachment = self.hand_over(hooked(optimizer))
        attachment.hook(optimizer)
        attachment.look(self.named_experts())
        return attachment

    def hand_over(self, optimizer: Optimizer) -> Attachment:
        """For an optimizer that averages by itself, as `ewa_kernels.optim.AdamW` does: as if attached to it."""
        if self.attached_to is not None:
            raise ValueError(
                "optimizer must be the only one attached to, but the averager is attached already: "
                "call remove() on what attach returned, or delete the optimizer that has it"
            )
        self._attachment = Attachment(self, optimizer)
        return self._attachment

    def memory(self) -> dict[str, set[int]]:
        """Where the experts are, by name."""
        tensors = {name: map(shards.local, members_of(group)) for name, group in self._experts().items()}
        return {name: {t.data_ptr() for t in members if t.numel() > 0} for name, members in tensors.items()}

    def is_trained_by(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer has any of the experts."""
        groups = self.experts()
        return holds(optimizer, [tensor for group in groups for tensor in members_of(group)])

    @torch.no_grad()
    def spread(self) -> dict[str, float]:
        """Root mean square distance of the experts from their mean, per tensor, in float64.

        Of sharded experts it is that of all processes together, which must all make the call.
        """
        return {name: _rms_distance(experts) for name, experts in self._experts().items()}

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken, the seed, and the schedule in words, to tell a resumed run from another."""
        # The words of any other function hold its address, which is new in every run.
        words = repr(self.schedule) if isinstance(self.schedule, ShareRate) else None
        return {"num_steps": self.num_steps, "seed": self.seed, "schedule": words}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes the schedule and its seed; warns if it is not the one that was saved. The experts are the model's."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be what state_dict() returned, got {type(state_dict).__name__}")
        missing = {"num_steps", "schedule"} - set(state_dict)
        if missing:
            raise ValueError(f"state_dict must have num_steps and schedule, lacks {', '.join(sorted(missing))}")
        checks.integer("state_dict['num_steps']", state_dict["num_steps"], minimum=0)
        seed = state_dict.get("seed", self.seed)
        checks.integer("state_dict['seed']", seed, minimum=0, below=2**63)
        self.num_steps, self.seed = state_dict["num_steps"], seed
        if state_dict["schedule"] != self.state_dict()["schedule"]:
            warnings.warn(
                f"resuming with {self.schedule!r}, but {state_dict['schedule'] or 'another function'} was saved",
                stacklevel=2,
            )


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _named(experts: Any) -> dict[str, Experts]:
    if isinstance(experts, Tensor) or not isinstance(experts, Iterable):
        raise TypeError(
            "experts must be a model or an iterable of stacked tensors [E, ...] or of lists of E tensors, "
            f"got {type(experts).__name__}"
        )
    named: dict[str, Experts] = {}
    for i, item in enumerate(experts.items() if isinstance(experts, Mapping) else experts):
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
    checks.experts(shards.Experts(named.values(), exchange=False).local, "experts")
    return named


def _rms_distance(experts: Experts) -> float:
    if isinstance(experts, Tensor):
        whole = shards.whole_experts(experts)
        wide = shards.local(whole).to(torch.float64)
    else:
        whole = experts[0]
        wide = torch.stack([shards.local(expert) for expert in experts]).to(torch.float64)
    numel = sum(tensor.numel() for tensor in members_of(experts))
    total = (wide - wide.mean(dim=0)).square().sum()
    if shards.is_sharded(whole):
        total = shards.sum_over_shards(total, whole)
    return (total / max(numel, 1)).sqrt().item()
