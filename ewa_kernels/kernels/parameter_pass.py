"""One pass over parameters, in C++ or CUDA: the AdamW step and Experts Weights Averaging. See `csrc/parameter_pass`.

What the kernels need is made here: a table of addresses, anew in each call, so that it cannot be stale. Tensors
that are not dense, or lie in memory in another order than the parameter they belong to, go through dense copies; so
do 16-bit experts that are not contiguous, because random bits are numbered by an element's indices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

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


class _Dense:
    """Stands in for tensors that the kernels cannot read as they are, and writes back to them in the end."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._alive: list[Tensor] = []

    def __call__(self, tensor: Tensor, strides: tuple[int, ...] | None, *, stacked: bool, changes: bool) -> Tensor:
        """`tensor`, or a copy of it whose experts have these strides; None for contiguous."""
        if strides is None:
            if tensor.is_contiguous():
                return tensor
            copy = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        elif (tensor.stride()[1:] if stacked else tensor.stride()) == strides:
            return tensor
        else:
            strides = (tensor[0].numel(), *strides) if stacked else strides
            copy = tensor.new_empty_strided(tensor.shape, strides)
        copy.copy_(tensor)
        if changes:
            self._copies.append((tensor, copy))
        else:
            self._alive.append(copy)
        return copy

    def write_back(self) -> None:
        for tensor, copy in self._copies:
            tensor.copy_(copy)


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


class _Table:
    """Rows of numbers in the order of the fields of `Group` and `Member` in `csrc/parameter_pass`, for one device."""

    def __init__(self) -> None:
        self.groups: list[tuple[int, ...]] = []
        self.members: list[tuple[int, ...]] = []
        self.dense = _Dense()

    def add(
        self,
        group: Sequence[Tensor],
        stacked: bool,
        number: int,
        others: Sequence[Sequence[Tensor]] = (),
        options: Sequence[int] = (),
        grads_change: bool = False,
    ) -> None:
        """Adds experts that are averaged with one another.

        Args:
            number: of the first, among all experts of the call.
            others: for each tensor of the group its grad, exp_avg, exp_avg_sq, step and copy, [0] for none.
            options: for each tensor of the group the row of its options.
            grads_change: whether gradients are unscaled.
        """
        strides = _dense_strides(group, stacked)
        num_experts = group[0].shape[0] if stacked else len(group)
        first_member = len(self.members)
        numel = group[0].numel() // num_experts if stacked else group[0].numel()
        rows = range(num_experts if stacked else 1)
        for i, tensor in enumerate(group):
            if not others:
                param, distance = self._place(tensor, strides, stacked)
                self.members += [(param + e * distance, 0, 0, 0, 0, 0, 0, 0) for e in rows]
                continue
            grad, exp_avg, exp_avg_sq, step, copy = others[i]
            places = (
                self._place(tensor, strides, stacked),
                self._place(grad, strides, stacked, changes=grads_change),
                self._place(exp_avg, strides, stacked),
                self._place(exp_avg_sq, strides, stacked),
                self._place(copy, strides, stacked),
            )
            counter = 0 if step.numel() == 0 else step.data_ptr()
            for e in rows:
                param, *states, low = [address + e * distance for address, distance in places]
                self.members.append((param, *states, counter, low, options[i], e == 0))
        self.groups.append((numel, first_member, num_experts, number, DTYPES[group[0].dtype]))

    def _place(
        self, tensor: Tensor, strides: tuple[int, ...] | None, stacked: bool, changes: bool = True
    ) -> tuple[int, int]:
        """(address, bytes from one expert to the next); 0 for none."""
        if tensor.numel() == 0:
            return 0, 0
        tensor = self.dense(tensor, strides, stacked=stacked, changes=changes)
        return tensor.data_ptr(), tensor.stride(0) * tensor.element_size() if stacked else 0


class _Scalars:
    """Values that are read where they are: on the host now, on a GPU by the kernel; for a CPU always now."""

    def __init__(self, device: torch.device):
        self._device = device
        self._alive: list[Tensor] = []

    def real(self, value: Tensor | None) -> tuple[float, int, bool]:
        """(value, address or 0, whether it is a double there)."""
        if value is None or "cpu" in (value.device.type, self._device.type):
            return (0.0 if value is None else float(value)), 0, False
        value = self._here(value, (torch.float32, torch.float64))
        return 0.0, value.data_ptr(), value.dtype == torch.float64

    def integer(self, value: Tensor | None) -> tuple[int, int]:
        """(value, address or 0)."""
        if value is None or "cpu" in (value.device.type, self._device.type):
            return (0 if value is None else int(value)), 0
        return 0, self._here(value, (torch.int64,)).data_ptr()

    def float32_at(self, value: Tensor | None) -> int:
        """Address of a float32 on the device, or 0."""
        return 0 if value is None else self._here(value, (torch.float32,)).data_ptr()

    def _here(self, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        value = value.detach().to(device=self._device, dtype=value.dtype if value.dtype in dtypes else dtypes[-1])
        self._alive.append(value)  # until the kernel is launched: memory is freed in the order of the stream
        return value


class _Pass:
    """Tables for every device that there are tensors on, and their launches."""

    def __init__(self) -> None:
        self._tables: dict[torch.device, _Table] = {}
        self._number = 0

    def add(self, group: Sequence[Tensor], stacked: bool, *states: Any) -> None:
        """See `_Table.add`."""
        device = group[0].device
        if device not in self._tables:
            self._tables[device] = _Table()
        self._tables[device].add(group, stacked, self._number, *states)
        self._number += group[0].shape[0] if stacked else len(group)

    def skip(self) -> None:
        """Counts one expert that has no fellow, and is left alone."""
        self._number += 1

    def run(
        self,
        share_rate: Tensor,
        seed: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        lrs: Sequence[Tensor] = (),
        options: Sequence[tuple[float, ...]] = (),
    ) -> None:
        for device, table in self._tables.items():
            scalars = _Scalars(device)
            rows = [(*scalars.real(lr), *row) for lr, row in zip(lrs, options, strict=True)]
            native = _C.Scalars(
                *scalars.real(share_rate),
                seed is not None,
                *scalars.integer(seed),
                scalars.float32_at(grad_scale),
                scalars.float32_at(found_inf),
            )
            native_table = _C.Table(table.groups, table.members, rows)
            if device.type == "cpu":
                _C.parameter_pass_cpu(native_table, native)
            else:
                with torch.cuda.device(device), counters.zeroed_counters(1, device) as counter:
                    stream = torch.cuda.current_stream(device).cuda_stream
                    plan = _C.CudaPlan(native_table)
                    memory = torch.empty(plan.memory_bytes, dtype=torch.uint8, device=device)
                    _C.parameter_pass_cuda(plan, native, memory.data_ptr(), counter.data_ptr(), device.index, stream)
            table.dense.write_back()


def average(
    tensors: Sequence[Tensor],
    group_sizes: Sequence[int],
    share_rate: Tensor,
    found_inf: Tensor | None,
    seed: Tensor | None,
) -> None:
    """`ewa_kernels.reference.average_experts_`; `seed` None rounds to nearest."""
    whole = _Pass()
    for group, size in zip(groups_of(tensors, group_sizes), group_sizes, strict=True):
        if (size or group[0].shape[0]) > 1:
            whole.add(group, size == 0)
        else:
            whole.skip()
    whole.run(share_rate, seed, None, found_inf)
    increment_versions(tensors)


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
    whole = _Pass()
    states = zip(grads, exp_avgs, exp_avg_sqs, steps, copies, strict=True)
    grouped = zip(*(groups_of(items, group_sizes) for items in (params, list(states), options_of)), strict=True)
    for size, (group, others, rows) in zip(group_sizes, grouped, strict=True):
        whole.add(group, size == 0, others, rows, grad_scale is not None)
    whole.run(share_rate, seed, grad_scale, found_inf, lrs, list(zip(*[iter(options)] * NUM_OPTIONS, strict=True)))
    changed = itertools.chain(params, exp_avgs, exp_avg_sqs, steps, copies, grads if grad_scale is not None else ())
    increment_versions([t for t in changed if t.numel() > 0])


def increment_versions(tensors: Sequence[Tensor]) -> None:
    """Tells autograd that they were changed, behind its back."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
