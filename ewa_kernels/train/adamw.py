"""AdamW that averages experts in the pass over memory which it makes anyway."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks, functional, ops, private_torch
from ..kernels import copies, graphs
from ..kernels.parameter_pass import MAX_EXPERTS, Numbers, Pass, Plan
from . import adamw_by_torch, shards
from .adamw_by_torch import State
from .attachment import is_dry_run
from .averager import ExpertAverager
from .lookup import flattened

__all__ = ["AdamW"]

_warned: set[str] = set()

_of_state = itemgetter("exp_avg", "exp_avg_sq", "step")
_NO_STATE = (None, None, None, None, 0)


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` and `ExpertAverager.step()` in one pass: each number is read once and written once.

        averager = ewa.ExpertAverager(model, share_rate=0.03)
        optimizer = ewa.optim.AdamW(model.parameters(), lr=1e-3, averager=averager)

    Results, options, parameter groups and `state_dict` are those of `torch.optim.AdamW(fused=True)`; so is what
    GradScaler does with it: gradients are unscaled in the pass, and a skipped step averages nothing. On a GPU a step
    is one launch. Without the extension it is torch's fused AdamW, followed by `averager.step()`.

    Args:
        params, lr, betas, eps, weight_decay, maximize, capturable: as in torch.
        averager: what to average after each step, or None. It must not be attached or stepped as well. Experts that
            have no gradient, or are not among `params`, are averaged too. Each process makes the pass over its own
            shards of DTensors.
        bf16_copies: write a bfloat16 copy of every float32 weight of `RandomPartitionMoE` that the averager has, in
            the same pass: under bfloat16 autocast the layer then casts no weights, for 2 bytes more per element. Not
            for models whose parameters are changed through `.data`, by replays of a CUDA graph, or by one of torch's
            fused optimizers as well, which nobody can notice.
        amsgrad: must be False.
        foreach, fused: accepted so that calls are interchangeable, and ignored.

    Raises:
        ValueError, TypeError: an argument is out of range or of a wrong type; amsgrad; `averager` is attached
            already; `bf16_copies` without an averager, or (at a step) of sharded parameters.
    """

    _plan: Plan | None = None  # of the last step; in no copy and no pickle

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        averager: ExpertAverager | None = None,
        bf16_copies: bool = False,
    ):
        if averager is not None and not isinstance(averager, ExpertAverager):
            raise TypeError(f"averager must be an ExpertAverager or None, got {type(averager).__name__}")
        checks.boolean("bf16_copies", bf16_copies)
        if bf16_copies and averager is None:
            raise ValueError("bf16_copies needs an averager, whose experts it copies, got None")
        self.averager, self.bf16_copies = averager, bf16_copies
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable, fused=True
        )
        self._check_groups()
        if averager is not None:
            averager.hand_over(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "averager": self.averager, "bf16_copies": self.bf16_copies}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # A state of torch's may say otherwise.
            group["fused"], group["foreach"] = True, None
            for p in group["params"]:
                if "step" in self.state.get(p, ()):
                    self.state[p]["step"] = self.state[p]["step"].to(device=p.device, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, and one of the averager. Args and Returns: as in torch."""
        self._check_groups()
        _health_check(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        params = [p for group in self.param_groups for p in group["params"]]
        self._check_graph(found_inf, functional.device_of(params))
        if found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf):
            return loss
        # What can be wrong with the averager is found out before anything changes.
        averager = None if is_dry_run(self, had_state=len(self.state) > 0) else self.averager
        experts = [] if averager is None else averager.check()
        numbers = self._numbers(*((0.0, None) if averager is None else averager.next_step()), found_inf)
        if not self._pass_again(experts, numbers):
            held = shards.Experts(experts, exchange=False)
            flat, group_sizes = checks.experts(held.local)
            self._check_parameters(flat)
            states = self._states()
            reason = self._why_not(states, flat, held, experts)
            if reason is not None:
                _warn_once_of_slowness(reason)
                self._step_by_torch(states, found_inf)
                if averager is not None:
                    averager.average(found_inf)
                return loss
            numbers = self._seeded(numbers, flat, held.keys[0] if held.keys else 0)
            self._pass_anew(_local_states(states, found_inf), flat, group_sizes, numbers)
        if averager is not None:
            averager.num_steps += 1
        return loss

    def _check_groups(self) -> None:
        if any(group["amsgrad"] for group in self.param_groups):
            raise ValueError("amsgrad must be False, got True: use torch.optim.AdamW and averager.attach(optimizer)")

    def _check_graph(self, found_inf: Tensor | None, device: torch.device) -> None:
        """While a CUDA graph is captured, what each replay would repeat raises."""
        if graphs.is_capturing(device):
            for group in self.param_groups:
                _learning_rate(group, device)
                if any(isinstance(beta, Tensor) for beta in group["betas"]):
                    raise RuntimeError(
                        "betas must be numbers while a CUDA graph is captured, which would repeat in each replay what "
                        f"tensors hold now, got {group['betas']}"
                    )
            if found_inf is not None:
                graphs.replayable("found_inf", found_inf, device)

    def _check_parameters(self, experts: list[Tensor]) -> None:
        """An expert that is no parameter itself may not be in a parameter's memory: two steps would race there."""
        parameters = set()
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if self.bf16_copies and shards.is_sharded(p):
                    raise ValueError(
                        "bf16_copies must be False for sharded parameters, got True: fully_shard with "
                        "MixedPrecisionPolicy(param_dtype=torch.bfloat16) gathers them in bfloat16"
                    )
                if p.grad is not None:
                    checks.floating(f"param_groups[{i}]['params'][{j}]", p)
                    parameters.add(shards.local(p))
        others = [t for t in experts if t not in parameters]
        if others:
            named = [(f"an averager's tensor of shape {list(t.shape)}", t) for t in others]
            named += [(f"a parameter of shape {list(p.shape)}", p) for p in parameters]
            checks.own_memory(named)

    def _states(self) -> dict[Tensor, State]:
        """Of every parameter with a gradient; a first step creates them."""
        states: dict[Tensor, State] = {}
        for i, group in enumerate(self.param_groups):
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
            self._init_group(group, *lists)  # a compiler follows what it puts into lists, not self.state
            params, grads, exp_avgs, exp_avg_sqs, _, steps = lists
            for p, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
                states[p] = (grad, exp_avg, exp_avg_sq, step, i)
        for p, state in states.items():
            for name, tensor in zip(("grad", "exp_avg", "exp_avg_sq"), state[:3], strict=True):
                if (tensor.shape, tensor.device) != (p.shape, p.device):
                    raise ValueError(
                        f"{name} must be {list(p.shape)} on {p.device} like its parameter, got {list(tensor.shape)} on "
                        f"{tensor.device}: parameters must not change their size or place after the first step"
                    )
        return states

    def _known_states(self) -> dict[Tensor, State]:
        """The same; raises KeyError if a first step is yet to create one."""
        return {
            p: (grad, *_of_state(self.state.get(p, {})), i)
            for i, group in enumerate(self.param_groups)
            for p in group["params"]
            if (grad := p.grad) is not None
        }

    def _why_not(
        self, states: dict[Tensor, State], flat: list[Tensor], held: shards.Experts, experts: list[Any]
    ) -> str | None:
        """Why torch must make the step; None if the extension can, "" where `backends` has warned of that already.

        `flat`, `held`: of the experts, by this process.
        """
        if len(held.local) < len(experts):
            return "processes hold a part of the experts only"
        if len(set(held.keys)) > 1 and self._rounds_stochastically(flat):
            return "random bits differ from shard to shard, but not those of what every process holds"
        if any(shards.sharding(t) != shards.sharding(p) for p, state in states.items() for t in state[:3]):
            return "gradients or moments are sharded in another way"
        tensors = [*map(shards.local, states), *(shards.local(grad) for grad, *_ in states.values()), *flat]
        for device in {t.device for t in tensors}:
            if backends.resolve("adamw", "auto", device) == "torch":
                return ""
        if any(type(t) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) for t in tensors):
            return "subclasses of Tensor may keep their values elsewhere"
        if any(len({p.dtype, *(t.dtype for t in state[:3])}) > 1 for p, state in states.items()):
            return "gradients or moments are of another dtype"
        if any(len(group) > MAX_EXPERTS for group in experts):
            return f"the extension averages at most {MAX_EXPERTS} experts"
        return None

    def _pass_again(self, experts: list[Any], numbers: Numbers) -> bool:
        """By the plan of the last step, if it is one for these tensors: all that depends on them was checked then."""
        if (plan := self._plan) is None or private_torch.is_watched():
            return False
        self._plan = None
        try:
            states = self._known_states()
        except KeyError:
            return False
        flat, group_sizes = flattened(experts)
        work = self._pass(states, flat, group_sizes)
        if not plan.run_again(work, self._seeded(numbers, flat)):
            return False
        self._plan = plan
        self._register(work)
        return True

    def _pass_anew(
        self, states: dict[Tensor, State], flat: list[Tensor], group_sizes: list[int], numbers: Numbers
    ) -> None:
        work = self._pass(states, flat, group_sizes)
        if private_torch.is_watched(work.tensors()):
            self._dispatch(work, numbers)
        else:
            plan = Plan(work, kept=True)
            plan.run(work, numbers)
            self._plan = plan
        self._register(work)

    def _pass(self, states: dict[Tensor, State], flat: list[Tensor], group_sizes: list[int]) -> Pass:
        """`flat`, `group_sizes`: the experts, as `ewa_kernels.ops.average_experts_` takes them."""
        experts = set(flat)
        others = [p for p in states if p not in experts]
        params = [*flat, *others]
        of_states = zip(*(states.get(t, _NO_STATE) for t in params), strict=True) if params else ((),) * 5
        grads, exp_avgs, exp_avg_sqs, steps, options_of = of_states
        # A copy holds the parameter's values already, since the step may be skipped.
        copied = [copies.in_dtype(t, torch.bfloat16) if self.bf16_copies and _is_copied(t) else None for t in flat]
        copied += [None] * len(others)
        sizes = [*group_sizes, *[1] * len(others)]
        return Pass(params, grads, exp_avgs, exp_avg_sqs, steps, copied, sizes, options_of)

    def _dispatch(self, work: Pass, numbers: Numbers) -> None:
        """As an operation, for who wants to see one."""
        none = torch.empty(0)
        device = functional.device_of(work.tensors())
        ops.adamw_(
            *([none if t is None else t for t in column] for column in work.columns()),
            work.group_sizes,
            work.options_of,
            [_learning_rate(group, device) for group in self.param_groups],
            [*chain.from_iterable(numbers.options)],
            torch.tensor(numbers.share_rate, dtype=torch.float64, device=_device_of_numbers(device)),
            numbers.grad_scale,
            numbers.found_inf,
            None if numbers.seed is None else checks.seed_tensor(numbers.seed, device),
        )

    def _numbers(self, share_rate: float, seed: int | None, found_inf: Tensor | None) -> Numbers:
        """Options may have changed in any way."""
        lrs = [group["lr"] for group in self.param_groups]
        options = [
            tuple(map(float, (*group["betas"], group["eps"], group["weight_decay"], group["maximize"])))
            for group in self.param_groups
        ]
        return Numbers(share_rate, seed, getattr(self, "grad_scale", None), found_inf, lrs, options)

    def _seeded(self, numbers: Numbers, experts: list[Tensor], key: int = 0) -> Numbers:
        """With the seed of stochastic rounding, if there is any. `key`: of the shard."""
        seed: Any = numbers.seed
        if not self._rounds_stochastically(experts):
            return numbers._replace(seed=None)
        if seed is None:  # a graph is captured
            seed = functional.rounding_seed(next(t for t in experts if t.element_size() == 2))
        return numbers._replace(seed=shards.seed_of(seed, key))

    def _rounds_stochastically(self, experts: list[Tensor]) -> bool:
        stochastic = self.averager is not None and self.averager.rounding == "stochastic"
        return stochastic and any(t.element_size() == 2 for t in experts)

    def _register(self, work: Pass) -> None:
        for p, copy in zip(work.params, work.copies, strict=True):
            # What is captured is written by replays, which nobody counts.
            if copy is not None and not graphs.is_capturing(p.device):
                copies.register(p, copy, self)

    def _step_by_torch(self, states: dict[Tensor, State], found_inf: Tensor | None) -> None:
        adamw_by_torch.step(self.param_groups, states, getattr(self, "grad_scale", None), found_inf)


def _local_states(states: dict[Tensor, State], found_inf: Tensor | None) -> dict[Tensor, State]:
    """What this process holds of them; of an empty shard only the number of steps, which is counted here."""
    held: dict[Tensor, State] = {}
    local = shards.local
    for p, (grad, exp_avg, exp_avg_sq, step, i) in states.items():
        if local(p).numel() == 0:
            local(step).add_(1 if found_inf is None else found_inf.reshape(()) == 0)
        else:
            held[local(p)] = (local(grad), local(exp_avg), local(exp_avg_sq), local(step), i)
    return held


def _is_copied(expert: Tensor) -> bool:
    return expert.dtype == torch.float32 and expert.ndim == 3 and expert.is_contiguous()


def _learning_rate(group: dict[str, Any], device: torch.device) -> Tensor:
    """That of a parameter group, as the kernel takes it.

    Raises:
        RuntimeError: it is on the CPU, and may change, while a CUDA graph is captured.
    """
    lr = group["lr"]
    # A schedule leaves its first rate there; without one, a number stays as it is.
    may_change = isinstance(lr, Tensor) or "initial_lr" in group
    if not isinstance(lr, Tensor):
        lr = torch.tensor(lr, dtype=torch.float64, device=_device_of_numbers(device))
    return graphs.replayable("lr", lr, device) if may_change else lr


def _device_of_numbers(device: torch.device) -> torch.device:
    """Where numbers go that change from step to step: a compiler may make a CUDA graph, which keeps the host's."""
    return device if torch.compiler.is_compiling() else torch.device("cpu")


def _warn_once_of_slowness(reason: str) -> None:
    if reason and reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"AdamW steps by torch's kernels and then averages, which is right but slower: {reason}", stacklevel=2
        )


def _health_check(optimizer: torch.optim.Optimizer) -> None:
    """torch's complaint about a CUDA graph without `capturable`, by its name in this version."""
    names = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))()
