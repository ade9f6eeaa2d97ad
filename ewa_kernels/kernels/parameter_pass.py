"""One pass over parameters, in C++ or CUDA: the AdamW step and Experts Weights Averaging. See `csrc/parameter_pass`.

What the kernels need is made here: a table of addresses for each device. A plan keeps it from call to call, and tells
whether it may, so that it cannot be stale. Tensors that are not dense, or lie in memory in another order than the
parameter they belong to, go through dense copies; so do 16-bit experts that are not contiguous, because random bits
are numbered by an element's indices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import private_torch
from . import counters, extension

if extension.WHY_NOT is None:
    from .. import _C

# More share no block of a GPU.
MAX_EXPERTS = 1024

# Of each row of `options`: beta1, beta2, eps, weight_decay, and 1 to maximize.
NUM_OPTIONS = 5

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def groups_of(tensors: Sequence[Any], group_sizes: Sequence[int]) -> Iterator[list[Any]]:
    """The tensors of each group: one that is stacked where the size is 0, else as many as it says."""
    remaining = iter(tensors)
    for size in group_sizes:
        yield list(itertools.islice(remaining, size or 1))


class Pass(NamedTuple):
    """What a pass reads and writes: see `ewa_kernels.ops.adamw_`. What a parameter lacks is None.

    The order of parameters numbers the experts, for their random bits.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    exp_avgs: Sequence[Tensor | None]
    exp_avg_sqs: Sequence[Tensor | None]
    steps: Sequence[Tensor | None]
    copies: Sequence[Tensor | None]
    group_sizes: Sequence[int]
    options_of: Sequence[int]

    def columns(self) -> tuple[Sequence[Tensor | None], ...]:
        """In the order in which the kernels take what belongs to a parameter."""
        return self[:6]

    def tensors(self) -> list[Tensor]:
        """All of them: parameters first, gradients last."""
        params, grads, *others = self.columns()
        return [t for column in (params, *others, grads) for t in column if t is not None]

    def layout(self) -> tuple[list[bool], Sequence[int], Sequence[int]]:
        """What tells, together with the list of `tensors`, which pass this is."""
        return [t is None for column in (self.grads, self.copies) for t in column], self.group_sizes, self.options_of


def averaging(tensors: Sequence[Tensor], group_sizes: Sequence[int]) -> Pass:
    """The pass that averages experts and does nothing else."""
    nothing = [None] * len(tensors)
    return Pass(tensors, nothing, nothing, nothing, nothing, nothing, group_sizes, [0] * len(tensors))


class Numbers(NamedTuple):
    """What a pass takes besides tensors: see `ewa_kernels.ops.adamw_`. `seed` None rounds to nearest."""

    share_rate: float | Tensor
    seed: int | Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    lrs: Sequence[float | Tensor] = ()
    options: Sequence[tuple[float, ...]] = ()


class Plan:
    """How a pass is made, as often as it is: its table on every device, and what its tensors must be. Holds none.

    Args:
        kept: whether `run_again` is to be called.
    """

    @torch.no_grad()
    def __init__(self, work: Pass, *, kept: bool = False):
        tensors = work.tensors()
        place = {id(t): i for i, t in enumerate(tensors)}
        self._layout = work.layout()
        self._num_changed = len(tensors) - sum(grad is not None for grad in work.grads)
        self._guards = private_torch.tensor_guards(tensors) if kept else None
        # Gradients may be anywhere; parameters and experts might come to overlap where they move.
        self._fixed = [*map(Tensor.data_ptr, work.params)]
        self._dense: dict[int, tuple[int, ...] | None] = {}  # the strides of copies that stand in for tensors
        tables: dict[torch.device, tuple[list[Any], list[Any]]] = {}
        number = 0
        sizes, members = work.group_sizes, [*zip(*work.columns(), strict=True)]
        groups = zip(sizes, groups_of(members, sizes), groups_of(work.options_of, sizes), strict=True)
        for size, rows, options in groups:
            first, stacked = rows[0][0], size == 0
            num_experts = size or len(first)
            # An expert that has no fellow, no gradient and no copy is left alone, but counted.
            if num_experts > 1 or any(t is not None for row in rows for t in row[1:]):
                numel = first.numel() // num_experts if stacked else first.numel()
                native_groups, native_rows = tables.setdefault(first.device, ([], []))
                native_groups.append((numel, num_experts, number, DTYPES[first.dtype], stacked))
                strides = _dense_strides(first[0] if stacked else first)
                for row, options_row in zip(rows, options, strict=True):
                    places = [-1 if t is None else place[id(t)] for t in row]
                    bytes_apart = [0 if i < 0 else self._bytes_apart(tensors[i], i, strides, stacked) for i in places]
                    native_rows.append((places, bytes_apart, options_row))
            number += num_experts
        self._tables = {device: _C.Table(*table) for device, table in tables.items()}
        self._cuda_plans: dict[torch.device, Any] = {}

    def _bytes_apart(self, tensor: Tensor, i: int, strides: tuple[int, ...] | None, stacked: bool) -> int:
        """From one expert to the next; 0 if not stacked. Notes that a copy must stand in for the tensor, if so."""
        if tensor.numel() < 2:  # a number of steps too, which experts share
            return 0
        expert = tensor[0] if stacked else tensor
        distance = tensor.stride(0)
        if not (expert.is_contiguous() if strides is None else expert.stride() == strides):
            distance = expert.numel()
            self._dense[i] = (distance, *strides) if stacked and strides is not None else strides
        return distance * tensor.element_size() if stacked else 0

    @torch.no_grad()
    def run_again(self, work: Pass, numbers: Numbers) -> bool:
        """Runs if the pass is the one that the plan was made for; whether it did."""
        if self._guards is None or self._layout != work.layout():
            return False
        tensors: list[Any] = work.tensors()
        if not self._guards.check(*tensors):
            return False
        addresses = [*map(Tensor.data_ptr, tensors)]
        if addresses[: len(self._fixed)] != self._fixed:
            return False
        self._run(tensors, addresses, numbers)
        return True

    def run(self, work: Pass, numbers: Numbers) -> None:
        tensors = work.tensors()
        self._run(tensors, [*map(Tensor.data_ptr, tensors)], numbers)

    def _run(self, tensors: Sequence[Tensor], addresses: list[int], numbers: Numbers) -> None:
        dense = {i: _dense_copy(tensors[i], strides) for i, strides in self._dense.items()}
        for i, copy in dense.items():
            addresses[i] = copy.data_ptr()
        for device, table in self._tables.items():
            scalars = _Scalars(device)
            rows = [(*scalars.real(lr), *row) for lr, row in zip(numbers.lrs, numbers.options, strict=True)]
            native = _C.Scalars(
                *scalars.real(numbers.share_rate),
                numbers.seed is not None,
                *scalars.integer(numbers.seed),
                scalars.float32_at(numbers.grad_scale),
                scalars.float32_at(numbers.found_inf),
            )
            changed = table.set(addresses, rows)
            if device.type == "cpu":
                _C.parameter_pass_cpu(table, native)
                continue
            if changed:
                self._cuda_plans.pop(device, None)
            if device not in self._cuda_plans:
                self._cuda_plans[device] = _C.CudaPlan(table)
            plan = self._cuda_plans[device]
            with torch.cuda.device(device):
                counter, whose = counters.zeroed_counters(1, device)
                stream = torch.cuda.current_stream(device).cuda_stream
                memory = torch.empty(plan.memory_bytes, dtype=torch.uint8, device=device)
                _C.parameter_pass_cuda(plan, native, memory.data_ptr(), counter.data_ptr(), device.index, stream)
                counters.give_back(counter, whose)
        num_changed = len(tensors) if numbers.grad_scale is not None else self._num_changed
        for i, copy in dense.items():
            if i < num_changed:
                tensors[i].copy_(copy)
        # Autograd is told, behind whose back it was.
        torch.autograd.graph.increment_version(tensors[:num_changed])


def _dense_strides(expert: Tensor) -> tuple[int, ...] | None:
    """In which an expert and all that belongs to it are read: its own if it is dense; None for contiguous."""
    # The bits of two bytes' rounding are numbered by indices, not by places in memory.
    if expert.is_contiguous() or expert.element_size() == 2:
        return None
    own = expert.stride()
    return own if torch.empty_like(expert, device="meta").stride() == own else None


def _dense_copy(tensor: Tensor, strides: tuple[int, ...] | None) -> Tensor:
    """With these strides; None for contiguous."""
    if strides is None:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


class _Scalars:
    """Values that are read where they are: on the host now, on a GPU by the kernel; for a CPU always now."""

    def __init__(self, device: torch.device):
        self._device = device
        self._alive: list[Tensor] = []

    def real(self, value: float | Tensor) -> tuple[float, int, bool]:
        """(value, address or 0, whether it is a double there)."""
        if not isinstance(value, Tensor) or "cpu" in (value.device.type, self._device.type):
            return float(value), 0, False
        value = self._here(value, (torch.float32, torch.float64))
        return 0.0, value.data_ptr(), value.dtype == torch.float64

    def integer(self, value: int | Tensor | None) -> tuple[int, int]:
        """(value, address or 0)."""
        if not isinstance(value, Tensor) or "cpu" in (value.device.type, self._device.type):
            return int(value or 0), 0
        return 0, self._here(value, (torch.int64,)).data_ptr()

    def float32_at(self, value: Tensor | None) -> int:
        """Address of a float32 on the device, or 0."""
        return 0 if value is None else self._here(value, (torch.float32,)).data_ptr()

    def _here(self, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        value = value.detach().to(device=self._device, dtype=value.dtype if value.dtype in dtypes else dtypes[-1])
        self._alive.append(value)  # until the kernel is launched: memory is freed in the order of the stream
        return value


def average(
    tensors: Sequence[Tensor],
    group_sizes: Sequence[int],
    share_rate: Tensor,
    found_inf: Tensor | None,
    seed: Tensor | None,
) -> None:
    """`ewa_kernels.reference.average_experts_`; `seed` None rounds to nearest."""
    work = averaging(tensors, group_sizes)
    Plan(work).run(work, Numbers(share_rate, seed, None, found_inf))


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    copies: Sequence[Tensor],
    group_sizes: Sequence[int],
    options_of: Sequence[int],
    lrs: Sequence[Tensor],
    options: Sequence[float],
    share_rate: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seed: Tensor | None,
) -> None:
    """See `ewa_kernels.ops.adamw_`."""
    of_params = (_given(grads), _given(exp_avgs), _given(exp_avg_sqs), _given(steps), _given(copies))
    work = Pass(params, *of_params, group_sizes, options_of)
    rows = list(zip(*[iter(options)] * NUM_OPTIONS, strict=True))
    Plan(work).run(work, Numbers(share_rate, seed, grad_scale, found_inf, lrs, rows))


def _given(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [t if t.numel() > 0 else None for t in tensors]
