"""AdamW that averages experts in the pass over memory which it makes anyway."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import chain, compress
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import adamw

import ewa_kernels.backends as backends
import ewa_kernels.checks as checks
import ewa_kernels.functional as functional
import ewa_kernels.ops as ops
import ewa_kernels.train.shards as shards
from ewa_kernels.kernels import copies, graphs
from ewa_kernels.kernels.parameter_pass import MAX_EXPERTS, Plan, groups_of_fields, is_plain, watched
from ewa_kernels.train.attachment import is_dry_run
from ewa_kernels.train.averager import ExpertAverager, flattened

__all__ = ["AdamW"]

_warned: set[str] = set()


class _State(NamedTuple):
    """What belongs to a parameter; all [0] for one without a gradient."""

    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    options: int  # index of its group


class _Kept(NamedTuple):
    """The plan of a step, for the next ones, whose tensors are `AdamW._signature`'s.

    It has, in this order: experts that have no gradient, parameters that have one, the exp_avg, exp_avg_sq and step of
    those, copies, gradients.
    """

    plan: Plan
    signature: list[Any]
    others: list[bool]  # for each expert whether it has no gradient
    copied: list[int]  # which of the experts


_grad_of = attrgetter("grad")
_MOMENTS = [itemgetter(name) for name in ("exp_avg", "exp_avg_sq", "step")]


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

    _kept: _Kept | None = None  # in no copy and no pickle

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
        share_rate, seed = (0.0, None) if averager is None else averager.next_step()
        if not self._pass_again(params, experts, share_rate, seed, found_inf):
            self._kept = None
            held = shards.Experts(experts, exchange=False)
            checked = checks.experts(held.local)
            self._check_parameters(checked[0])
            states = self._states()
            reason = self._why_not(states, experts, held)
            if reason is not None:
                _warn_once_of_slowness(reason)
                self._step_by_torch(states, found_inf)
                if averager is not None:
                    averager.average(found_inf)
                return loss
            self._pass_anew(params, states, *checked, share_rate, seed, held.keys[0] if held.keys else 0, found_inf)
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

    def _states(self) -> dict[Tensor, _State]:
        """Of every parameter with a gradient; a first step creates them."""
        states: dict[Tensor, _State] = {}
        for i, group in enumerate(self.param_groups):
            lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
            self._init_group(group, *lists)
            params, grads, exp_avgs, exp_avg_sqs, _, steps = lists
            for p, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
                states[p] = _State(grad, exp_avg, exp_avg_sq, step, i)
        for p, state in states.items():
            for name in ("grad", "exp_avg", "exp_avg_sq"):
                tensor = getattr(state, name)
                if (tensor.shape, tensor.device) != (p.shape, p.device):
                    raise ValueError(
                        f"{name} must be {list(p.shape)} on {p.device} like its parameter, got {list(tensor.shape)} on "
                        f"{tensor.device}: parameters must not change their size or place after the first step"
                    )
        return states

    def _why_not(self, states: dict[Tensor, _State], experts: list[Any], held: shards.Experts) -> str | None:
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

    def _pass_again(
        self,
        params: list[Tensor],
        experts: list[Any],
        share_rate: float,
        seed: int | None,
        found_inf: Tensor | None,
    ) -> bool:
        """By the plan of the last step, if it is one for these tensors: all that depends on them was checked then."""
        kept = self._kept
        if kept is None or watched():
            return False
        flat, sizes = flattened(experts)
        grads: list[Any] = [*map(_grad_of, params)]
        if kept.signature != self._signature(params, grads, flat, sizes):
            return False
        if None in kept.signature[1]:
            params, grads = (
                [t for t, grad in zip(ts, grads, strict=True) if grad is not None] for ts in (params, grads)
            )
        try:
            states: list[Any] = [*map(self.state.get, params)]
            moments = [[*map(name, states)] for name in _MOMENTS]
        except (KeyError, TypeError):
            return False
        tensors = [*compress(flat, kept.others), *params, *chain.from_iterable(moments)]
        tensors += [self._copy_of(flat[i]) for i in kept.copied]
        tensors += grads
        addresses = kept.plan.addresses(tensors)
        if addresses is None:
            return False
        rounded = [tensors[i] for i in kept.plan.low_precision]
        self._run(kept.plan, tensors, addresses, share_rate, self._seed(rounded, seed), found_inf)
        self._register([flat[i] for i in kept.copied])
        return True

    def _pass_anew(
        self,
        params: list[Tensor],
        states: dict[Tensor, _State],
        flat: list[Tensor],
        group_sizes: list[int],
        share_rate: float,
        seed: int | None,
        key: int,
        found_inf: Tensor | None,
    ) -> None:
        """`flat`, `group_sizes`: the experts, as `ewa_kernels.ops.average_experts_` takes them; `key`: of the shard."""
        held = _local_states(states, found_inf)
        experts = set(flat)
        others = [t not in held for t in flat]
        copied = [i for i, t in enumerate(flat) if self.bf16_copies and _is_copied(t)]
        columns = [list(column) for column in zip(*(state[:4] for state in held.values()), strict=True)] or [[]] * 4
        tensors = [*compress(flat, others), *held, *columns[1], *columns[2], *columns[3]]
        tensors += [self._copy_of(flat[i]) for i in copied]
        tensors += columns[0]
        # Which of them is what of each parameter.
        num_others, n = sum(others), len(held)
        place = {t: i for i, t in enumerate(tensors[: num_others + n])}
        copy_of = {flat[i]: num_others + 4 * n + c for c, i in enumerate(copied)}
        fields, options_of = [], []
        for t in [*flat, *(p for p in held if p not in experts)]:
            i = place[t]
            of_state = [len(tensors) - n - num_others + i, i + n, i + 2 * n, i + 3 * n] if t in held else [-1] * 4
            fields.append((i, *of_state, copy_of.get(t, -1)))
            options_of.append(held[t].options if t in held else 0)
        sizes = [*group_sizes, *(1 for p in held if p not in experts)]
        drawn = self._seed(flat, seed, key)
        if watched() or not all(map(is_plain, tensors)):
            self._dispatch(tensors, fields, sizes, options_of, share_rate, drawn, found_inf)
        else:
            plan = Plan(tensors, groups_of_fields(fields, sizes, options_of), num_grads=n)
            if [*map(id, held)] == [*map(id, states)]:
                plan.remember(tensors, num_others + n)
                signature = self._signature(params, [p.grad for p in params], flat, group_sizes)
                self._kept = _Kept(plan, signature, others, copied)
            self._run(plan, tensors, [*map(Tensor.data_ptr, tensors)], share_rate, drawn, found_inf)
        self._register([flat[i] for i in copied])

    def _signature(self, params: list[Tensor], grads: list[Any], flat: list[Tensor], sizes: list[int]) -> list[Any]:
        """Which tensors there are, by their ids: a plan keeps none alive, and what it is for says `Plan.remember`."""
        groups = [len(group["params"]) for group in self.param_groups]
        missing = [None if grad is None else True for grad in grads]
        return [[*map(id, params)], missing, [*map(id, flat)], sizes, groups, self.bf16_copies]

    def _run(
        self,
        plan: Plan,
        tensors: list[Tensor],
        addresses: list[int],
        share_rate: float,
        seed: int | Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        lrs = [group["lr"] for group in self.param_groups]
        grad_scale = getattr(self, "grad_scale", None)
        plan.run(tensors, addresses, share_rate, seed, grad_scale, found_inf, lrs, self._options())

    def _dispatch(
        self,
        tensors: list[Tensor],
        fields: list[tuple[int, ...]],
        group_sizes: list[int],
        options_of: list[int],
        share_rate: float,
        seed: int | Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """To who wants to see an operation."""
        none = torch.empty(0)
        rows = [[none if i < 0 else tensors[i] for i in row] for row in fields]
        columns = zip(*rows, strict=True) if rows else ((),) * 6
        device = functional.device_of(tensors)
        ops.adamw_(
            *columns,
            group_sizes,
            options_of,
            [_learning_rate(group, device) for group in self.param_groups],
            [*chain.from_iterable(self._options())],
            torch.tensor(share_rate, dtype=torch.float64, device=_device_of_numbers(device)),
            getattr(self, "grad_scale", None),
            found_inf,
            None if seed is None else checks.seed_tensor(seed, device),
        )

    def _options(self) -> list[tuple[float, ...]]:
        """Of each group, as `ewa_kernels.ops.adamw_` takes them."""
        return [
            (*map(float, (*group["betas"], group["eps"], group["weight_decay"], group["maximize"])),)
            for group in self.param_groups
        ]

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

    def _step_by_torch(self, states: dict[Tensor, _State], found_inf: Tensor | None) -> None:
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


def _device_of_numbers(device: torch.device) -> torch.device:
    """Where numbers go that change from step to step: a compiler may make a CUDA graph, which keeps the host's."""
    return device if torch.compiler.is_compiling() else torch.device("cpu")


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


def _local_states(states: dict[Tensor, _State], found_inf: Tensor | None) -> dict[Tensor, _State]:
    """What this process holds of them; of an empty shard only the number of steps, which is counted here."""
    held = {}
    for p, state in states.items():
        grad, exp_avg, exp_avg_sq, step = map(shards.local, state[:4])
        held[shards.local(p)] = _State(grad, exp_avg, exp_avg_sq, step, state.options)
    for p in [p for p in held if p.numel() == 0]:
        held.pop(p).step.add_(1 if found_inf is None else found_inf.reshape(()) == 0)
    return held


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
