"""AdamW that averages experts in the pass over memory which it makes anyway."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import adamw

import ewa_kernels.backends as backends
import ewa_kernels.checks as checks
import ewa_kernels.functional as functional
import ewa_kernels.private_torch as private_torch
import ewa_kernels.train.shards as shards
from ewa_kernels.kernels import copies, graphs
from ewa_kernels.kernels.parameter_pass import MAX_EXPERTS, Numbers
from ewa_kernels.train.attachment import is_dry_run
from ewa_kernels.train.averager import ExpertAverager
from ewa_kernels.train.lookup import flattened
from ewa_kernels.train.step_plan import State, StepPlan, device_of_numbers, local_states

__all__ = ["AdamW"]

_warned: set[str] = set()


class _Now(NamedTuple):
    """Of one step."""

    share_rate: float
    seed: int | None
    found_inf: Tensor | None


_grad_of = attrgetter("grad")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` and `ExpertAverager.step()` in one pass: each number is read once and written once.

        averager = ewa.ExpertAverager(model, share_rate=0.3)
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
            for models whose parameters are changed through `.data`, or by replays of a CUDA graph, which nobody can
            notice.
        amsgrad: must be False.
        foreach, fused: accepted so that calls are interchangeable, and ignored.

    Raises:
        ValueError, TypeError: an argument is out of range or of a wrong type; amsgrad; `averager` is attached
            already; `bf16_copies` without an averager, or (at a step) of sharded parameters.
    """

    _plan: StepPlan | None = None  # of the last step; in no copy and no pickle

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
        self._copies: dict[Tensor, Tensor] = {}
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
        self.__dict__.setdefault("_copies", {})
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
        self._check_copies()
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
        experts = [] if averager is None else averager.experts()
        now = _Now(*((0.0, None) if averager is None else averager.next_step()), found_inf)
        if not self._pass_again(params, experts, now):
            self._plan = None
            held = shards.Experts(experts, exchange=False)
            flat, group_sizes = checks.experts(held.local)
            self._check_parameters(flat)
            states = self._states()
            reason = self._why_not(states, experts, held)
            if reason is not None:
                _warn_once_of_slowness(reason)
                self._step_by_torch(states, found_inf)
                if averager is not None:
                    averager.average(found_inf)
                return loss
            numbers = self._numbers(flat, now, held.keys[0] if held.keys else 0)
            self._pass_anew(params, states, flat, group_sizes, numbers)
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
                if p.grad is not None:
                    checks.floating(f"param_groups[{i}]['params'][{j}]", p)
                    parameters.add(shards.local(p))
        others = [t for t in experts if t not in parameters]
        if others:
            named = [(f"an averager's tensor of shape {list(t.shape)}", t) for t in others]
            named += [(f"a parameter of shape {list(p.shape)}", p) for p in parameters]
            checks.own_memory(named)

    def _check_copies(self) -> None:
        if self.bf16_copies and any(shards.is_sharded(p) for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "bf16_copies must be False for sharded parameters, got True: fully_shard with "
                "MixedPrecisionPolicy(param_dtype=torch.bfloat16) gathers them in bfloat16"
            )

    def _states(self) -> dict[Tensor, State]:
        """Of every parameter with a gradient; a first step creates them."""
        states: dict[Tensor, State] = {}
        for i, group in enumerate(self.param_groups):
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
            self._init_group(group, *lists)
            params, grads, exp_avgs, exp_avg_sqs, _, steps = lists
            for p, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
                states[p] = State(grad, exp_avg, exp_avg_sq, step, i)
        for p, state in states.items():
            for name in ("grad", "exp_avg", "exp_avg_sq"):
                tensor = getattr(state, name)
                if (tensor.shape, tensor.device) != (p.shape, p.device):
                    raise ValueError(
                        f"{name} must be {list(p.shape)} on {p.device} like its parameter, got {list(tensor.shape)} on "
                        f"{tensor.device}: parameters must not change their size or place after the first step"
                    )
        return states

    def _why_not(self, states: dict[Tensor, State], experts: list[Any], held: shards.Experts) -> str | None:
        """Why torch must make the step; None if the extension can, "" where `backends` has warned of that already.

        `held`: of the experts, by this process.
        """
        if len(held.local) < len(experts):
            return "processes hold a part of the experts only"
        groups = [[group] if isinstance(group, Tensor) else group for group in held.local]
        members = [t for group in groups for t in group]
        if len(set(held.keys)) > 1 and self._rounds_stochastically(members):
            return "random bits differ from shard to shard, but not those of what every process holds"
        if not all(shards.is_alike(tensor, p) for p, state in states.items() for tensor in state[:3]):
            return "gradients or moments are sharded in another way"
        tensors = [*map(shards.local, states), *(shards.local(state.grad) for state in states.values()), *members]
        for device in {t.device for t in tensors}:
            if backends.resolve("adamw", "auto", device) == "torch":
                return ""
        if any(type(t) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) for t in tensors):
            return "subclasses of Tensor may keep their values elsewhere"
        if any(p.dtype != state.grad.dtype or p.dtype != state.exp_avg.dtype for p, state in states.items()):
            return "gradients or moments are of another dtype"
        if any(len(group) > MAX_EXPERTS for group in experts):
            return f"the extension averages at most {MAX_EXPERTS} experts"
        return None

    def _pass_again(self, params: list[Tensor], experts: list[Any], now: _Now) -> bool:
        """By the plan of the last step, if it is one for these tensors: all that depends on them was checked then."""
        if self._plan is None or private_torch.is_watched():
            return False
        grads: list[Any] = [*map(_grad_of, params)]
        flat, sizes = flattened(experts)
        if self._plan.signature != self._signature(params, grads, flat, sizes):
            return False
        if None in self._plan.signature[0]:
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        try:
            states: list[Any] = [*map(self.state.get, params)]
            moments = [[*map(itemgetter(name), states)] for name in _MOMENTS]
        except (KeyError, TypeError):
            return False
        fresh = [self._copy_of(flat[i]) for i in self._plan.copied]
        tensors = self._plan.listed(flat, params, moments, fresh, grads)
        if not self._plan.run_again(tensors, self._numbers(flat, now)):
            return False
        self._register([flat[i] for i in self._plan.copied])
        return True

    def _pass_anew(
        self,
        params: list[Tensor],
        states: dict[Tensor, State],
        flat: list[Tensor],
        group_sizes: list[int],
        numbers: Numbers,
    ) -> None:
        """`flat`, `group_sizes`: the experts, as `ewa_kernels.ops.average_experts_` takes them."""
        held = local_states(states, numbers.found_inf)
        copied = [i for i, t in enumerate(flat) if self.bf16_copies and _is_copied(t)]
        plan = StepPlan(held, flat, group_sizes, copied)
        grads = [state.grad for state in held.values()]
        moments = [[name(state) for state in held.values()] for name in map(attrgetter, _MOMENTS)]
        tensors = plan.listed(flat, held, moments, [self._copy_of(flat[i]) for i in copied], grads)
        if private_torch.is_watched(tensors):
            device = functional.device_of(tensors)
            plan.dispatch(tensors, numbers, [_learning_rate(group, device) for group in self.param_groups])
        else:
            plan.run(tensors, numbers)
            if [*map(id, held)] == [*map(id, states)]:  # neither shards, nor empty ones
                plan.signature = self._signature(params, [*map(_grad_of, params)], flat, group_sizes)
                self._plan = plan
        self._register([flat[i] for i in copied])

    def _signature(self, params: list[Tensor], grads: list[Any], flat: list[Tensor], sizes: list[int]) -> list[Any]:
        """Which tensors there are, by their ids, so that none is kept alive; what they are `Plan.addresses` tells."""
        missing = [None if grad is None else True for grad in grads]
        groups = [len(group["params"]) for group in self.param_groups]
        return [missing, [*map(id, params)], groups, [*map(id, flat)], sizes, self.bf16_copies]

    def _numbers(self, experts: list[Tensor], now: _Now, key: int = 0) -> Numbers:
        """Options may have changed in any way. `key`: of the shard."""
        lrs = [group["lr"] for group in self.param_groups]
        numbers = [
            (*group["betas"], group["eps"], group["weight_decay"], group["maximize"]) for group in self.param_groups
        ]
        options = [tuple(map(float, row)) for row in numbers]
        seed = self._seed(experts, now.seed, key)
        return Numbers(now.share_rate, seed, getattr(self, "grad_scale", None), now.found_inf, lrs, options)

    def _rounds_stochastically(self, experts: list[Tensor]) -> bool:
        stochastic = self.averager is not None and self.averager.rounding == "stochastic"
        return stochastic and any(t.element_size() == 2 for t in experts)

    def _seed(self, experts: list[Tensor], seed: int | None, key: int = 0) -> int | Tensor | None:
        """Of stochastic rounding, if there is any."""
        if not self._rounds_stochastically(experts):
            return None
        if seed is not None:
            return shards.seed_of(seed, key)
        return shards.seed_of(functional.rounding_seed(next(t for t in experts if t.element_size() == 2)), key)

    def _register(self, copied: list[Tensor]) -> None:
        for p in copied:
            # What is captured is written by replays, which nobody counts.
            if not graphs.is_capturing(p.device):
                copies.register(p, self._copies[p])

    def _copy_of(self, parameter: Tensor) -> Tensor:
        """The copy to be written, which holds the parameter's values already: the step may be skipped."""
        copy = self._copies.get(parameter)
        if copy is None or copy.shape != parameter.shape or copy.device != parameter.device:
            self._copies[parameter] = copy = torch.empty_like(parameter, dtype=torch.bfloat16)
        if copies.find(parameter, torch.bfloat16) is not copy:
            copy.copy_(parameter)
        return copy

    def _step_by_torch(self, states: dict[Tensor, State], found_inf: Tensor | None) -> None:
        for i, group in enumerate(self.param_groups):
            params = [p for p, state in states.items() if state.options == i]
            columns = [list(column) for column in zip(*(states[p][:4] for p in params), strict=True)]
            if not params:
                continue
            grads, exp_avgs, exp_avg_sqs, steps = columns
            beta1, beta2 = group["betas"]
            # torch's fused kernel takes it for granted that all lie in memory in the same order.
            ordered = zip(params, grads, strict=True)
            grads = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for p, g in ordered]
            triples = zip(params, grads, exp_avgs, strict=True)
            fused = all(p.stride() == g.stride() == m.stride() for p, g, m in triples)
            grad_scale = getattr(self, "grad_scale", None)
            if not fused:
                if found_inf is not None and bool(found_inf):
                    continue
                grads = grads if grad_scale is None else [g / grad_scale for g in grads]
            adamw.adamw(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                [],
                steps,
                fused=fused,
                foreach=False,
                capturable=group["capturable"],
                grad_scale=grad_scale if fused else None,
                found_inf=found_inf if fused else None,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )


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
        lr = torch.tensor(lr, dtype=torch.float64, device=device_of_numbers(device))
    return graphs.replayable("lr", lr, device) if may_change else lr


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
