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

import ewa_kernels.private_torch as private_torch
from ewa_kernels.kernels import counters, extension

if extension.WHY_NOT is None:
    import ewa_kernels._C as _C

# More share no block of a GPU.
MAX_EXPERTS = 1024

# Of each row of `options`: beta1, beta2, eps, weight_decay, and 1 to maximize.
NUM_OPTIONS = 5

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def old_driver() -> str | None:
    """Why the driver cannot run the CUDA part; None if it can: what was built with its own major version, or older."""
    driver, built = _C.cuda_versions()
    # Built with 12.1 or newer, a launch has parameters of more than 4 KB, which drivers for 12.0 refuse.
    if driver // 1000 >= built // 1000 and not driver < 12010 <= built:
        return None
    names = [f"{version // 1000}.{version % 1000 // 10}" for version in (built, driver)]
    return f"the extension is built with CUDA {names[0]}, the driver is for {names[1]}: update it, or build with that"


# What torch.compiler.assume_constant_result does, without importing the compiler, which cannot look into the call.
old_driver._dynamo_marked_constant = True  # type: ignore[attr-defined]


def groups_of(tensors: Sequence[Any], group_sizes: Sequence[int]) -> Iterator[list[Any]]:
    """The tensors of each group: one that is stacked where the size is 0, else as many as it says."""
    remaining = iter(tensors)
    for size in group_sizes:
        yield list(itertools.islice(remaining, size or 1))


def _dense_strides(group: Sequence[Tensor], stacked: bool) -> tuple[int, ...] | None:
    """The strides of the first expert if it can be read as it is; None if it is contiguous, or has to be made so."""
    first = group[0]
    # The bits of two bytes' rounding are numbered by indices, not by places in memory.
    if first.is_contiguous() or first.element_size() == 2:
        # An expert of a stacked tensor may be contiguous where the whole is not.
        whole = first.is_contiguous() or not stacked or not first[0].is_contiguous()
        return None if whole else tuple(first.stride()[1:])
    shape, strides = (first.shape[1:], first.stride()[1:]) if stacked else (first.shape, first.stride())
    expected = 1
    for step, size in sorted(zip(strides, shape, strict=True)):
        if size != 1 and step != expected:
            return None
        expected *= size
    return tuple(strides)


class Numbers(NamedTuple):
    """What a pass takes besides tensors: see `ewa_kernels.ops.adamw_`. `seed` None rounds to nearest."""

    share_rate: float | Tensor
    seed: int | Tensor | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    lrs: Sequence[float | Tensor] = ()
    options: Sequence[tuple[float, ...]] = ()


class Plan:
    """The pass over certain tensors, as often as it is made: their table on every device, and what they have to be.

    It holds no tensor. A caller that keeps it calls `remember` first, and asks `addresses` before each `run`.

    Args:
        tensors: all that is read and written, in an order that stays.
        fields: for each parameter the places among them of its param, grad, exp_avg, exp_avg_sq, step and copy; -1 for
            none. In the order in which experts are numbered, for their random bits.
        group_sizes: see `groups_of`.
        options_of: for each parameter the row of its options.
        num_grads: how many of the last tensors are gradients, which change only if they are unscaled.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        fields: Sequence[Sequence[int]],
        group_sizes: Sequence[int],
        options_of: Sequence[int],
        num_grads: int = 0,
    ):
        self._guards: Any = None
        self.low_precision: list[int] = []  # which are experts of 16 bits
        self._num_changed = len(tensors) - num_grads
        self._dense: dict[int, tuple[int, ...] | None] = {}  # the strides of copies that stand in for tensors
        tables: dict[torch.device, tuple[list[Any], list[Any]]] = {}
        number = 0
        groups = zip(group_sizes, groups_of(fields, group_sizes), groups_of(options_of, group_sizes), strict=True)
        for size, of_group, options in groups:
            stacked, members = size == 0, [tensors[places[0]] for places in of_group]
            first, num_experts = members[0], size or members[0].shape[0]
            # An expert that has no fellow, no gradient and no copy is left alone, but counted.
            if num_experts > 1 or any(place >= 0 for places in of_group for place in places[1:]):
                strides = _dense_strides(members, stacked)
                numel = first.numel() // num_experts if stacked else first.numel()
                native_groups, rows = tables.setdefault(first.device, ([], []))
                native_groups.append((numel, num_experts, number, DTYPES[first.dtype], stacked))
                for places, row in zip(of_group, options, strict=True):
                    bytes_apart = [0 if i < 0 else self._bytes_apart(tensors[i], i, strides, stacked) for i in places]
                    rows.append((places, bytes_apart, row))
            if num_experts > 1 and first.element_size() == 2:
                self.low_precision += [places[0] for places in of_group]
            number += num_experts
        self._tables = {device: _C.Table(*table) for device, table in tables.items()}
        self._cuda_plans: dict[torch.device, Any] = {}

    def _bytes_apart(self, tensor: Tensor, i: int, strides: tuple[int, ...] | None, stacked: bool) -> int:
        """From one expert to the next; 0 if not stacked. Notes that a copy must stand in for the tensor, if so."""
        if tensor.numel() < 2:  # a number of steps too, which experts share
            return 0
        mine = tensor.stride()[1:] if stacked else tensor.stride()
        distance = tensor.stride(0) if stacked else 0
        if not (tensor.is_contiguous() if strides is None else mine == strides):
            distance = tensor[0].numel() if stacked else 0
            self._dense[i] = (distance, *strides) if stacked and strides is not None else strides
        return distance * tensor.element_size()

    @torch.no_grad()
    def remember(self, tensors: Sequence[Tensor], num_fixed: int) -> None:
        """What the tensors are, and where the first `num_fixed` of them."""
        self._guards = private_torch.tensor_guards(tensors)
        self._fixed = [*map(Tensor.data_ptr, tensors[:num_fixed])]

    def addresses(self, tensors: Sequence[Any]) -> list[int] | None:
        """Where they are now; None if they are not what is remembered. To be called without gradients."""
        if self._guards is None or not self._guards.check(*tensors):
            return None
        addresses = [*map(Tensor.data_ptr, tensors)]
        return addresses if addresses[: len(self._fixed)] == self._fixed else None

    def run(self, tensors: Sequence[Tensor], addresses: list[int], numbers: Numbers) -> None:
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


def average_plan(tensors: Sequence[Tensor], group_sizes: Sequence[int]) -> Plan:
    """Of `average`."""
    fields = [(i, -1, -1, -1, -1, -1) for i in range(len(tensors))]
    return Plan(tensors, fields, group_sizes, [0] * len(tensors))


def average(
    tensors: Sequence[Tensor],
    group_sizes: Sequence[int],
    share_rate: Tensor,
    found_inf: Tensor | None,
    seed: Tensor | None,
) -> None:
    """`ewa_kernels.reference.average_experts_`; `seed` None rounds to nearest."""
    plan = average_plan(tensors, group_sizes)
    plan.run(tensors, [*map(Tensor.data_ptr, tensors)], Numbers(share_rate, seed, None, found_inf))


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
    columns = (params, exp_avgs, exp_avg_sqs, steps, copies, grads)
    tensors = [t for column in columns for t in column]
    # In the order of `Group.fields`.
    fields = [
        [c * len(params) + r if c == 0 or columns[c][r].numel() > 0 else -1 for c in (0, 5, 1, 2, 3, 4)]
        for r in range(len(params))
    ]
    plan = Plan(tensors, fields, group_sizes, options_of, len(grads))
    rows = list(zip(*[iter(options)] * NUM_OPTIONS, strict=True))
    numbers = Numbers(share_rate, seed, grad_scale, found_inf, lrs, rows)
    plan.run(tensors, [*map(Tensor.data_ptr, tensors)], numbers)
