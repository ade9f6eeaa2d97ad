"""The CUDA kernel compiled for the host by `extension_variants.py`: it gives the bits of C++, and how it gets there."""

import ctypes
import sys

import pytest
import torch

import ewa_kernels as ewa
from ewa_kernels.kernels import copies

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
average_experts_ = ewa.functional.average_experts_


def count(function, *names):
    """How much counters of `cuda_on_host/cuda_runtime.h` grow by a call."""
    library = ctypes.CDLL(sys.modules["ewa_kernels._C"].__file__)
    counters = [ctypes.c_int64.in_dll(library, name) for name in names]
    before = [counter.value for counter in counters]
    function()
    return [counter.value - old for counter, old in zip(counters, before, strict=True)]


@pytest.fixture
def by_cpp(monkeypatch):
    """Runs a function with the pass for CPUs."""
    module = sys.modules["ewa_kernels._C"]

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(module, "parameter_pass_cpu", module.parameter_pass_by_cpp)
            function()

    return run


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def optimizer_of(params, groups):
    """After a step, with other gradients for the next, which are to be divided by 4."""
    optimizer = ewa.optim.AdamW(params, lr=0.01, averager=ewa.ExpertAverager(groups, 0.3), bf16_copies=True)
    for scale in (None, torch.tensor(4.0)):
        for i, p in enumerate(params):
            p.grad = normal(*p.shape, seed=100 + i, dtype=p.dtype)
        optimizer.grad_scale = scale
        if scale is None:
            optimizer.step()
    return optimizer


def changed(optimizer):
    """All that a step may change."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq", "step")]
    copied = [copies.find(p, torch.bfloat16) for p in params if p.dtype == torch.float32 and p.ndim == 3]
    return [*params, *(p.grad for p in params), *states, *copied]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


# A group of 4 experts takes 64 bytes of 7,680 there are in a launch that averages, and 256 of 31,744 in one that steps,
# with 56 for the options. What is too large goes to memory by 31,744 bytes a launch.
@pytest.mark.parametrize(("num_groups", "launches"), [(120, 1), (121, 2), (496, 2), (497, 3), (1500, 5)])
def test_averaging_by_tables_larger_than_a_launch(num_groups, launches, by_cpp):
    ours, theirs = ([normal(4, 5 + i % 7, seed=i) for i in range(num_groups)] for _ in range(2))
    assert count(lambda: average_experts_(ours, 0.3, backend="cpp"), "launches") == [launches]
    by_cpp(lambda: average_experts_(theirs, 0.3, backend="cpp"))
    assert_equal(ours, theirs)


@pytest.mark.parametrize(("num_groups", "launches"), [(123, 1), (124, 3), (247, 3), (248, 4)])
def test_adamw_by_tables_larger_than_a_launch(num_groups, launches, by_cpp):
    def optimizer():
        params = [torch.nn.Parameter(normal(4, 5 + i % 7, seed=i)) for i in range(num_groups)]
        return optimizer_of(params, params)

    ours, theirs = optimizer(), optimizer()
    assert count(ours.step, "launches") == [launches]
    by_cpp(theirs.step)
    assert_equal(changed(ours), changed(theirs))


def moved(tensor, elements=1):
    """The same values, that many elements after a boundary of 16 bytes."""
    memory = torch.zeros(tensor.numel() + elements, dtype=tensor.dtype)
    assert memory.data_ptr() % 16 == 0
    return memory[elements:].view(tensor.shape).copy_(tensor)


# Held in registers, and in shared memory.
@pytest.mark.parametrize("num_experts", [4, 6, 12])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", [None, "grad", "exp_avg", "exp_avg_sq", "copy"])
def test_what_is_not_aligned_goes_by_elements_and_nothing_else(which, dtype, num_experts, by_cpp):
    """By vectors a step reads and writes parameters, gradients, which are divided, and moments."""

    def optimizer():
        p = torch.nn.Parameter(normal(num_experts, 8, 125, dtype=dtype))
        result = optimizer_of([p], [p])
        if which == "grad":
            p.grad = moved(p.grad)
        elif which == "copy":
            copy = copies.find(p, torch.bfloat16)
            assert (copy is not None) == (dtype == torch.float32)
            if copy is not None:
                copies.register(p, moved(copy), result)
        elif which is not None:
            result.state[p][which] = moved(result.state[p][which])
        return result

    ours, theirs = optimizer(), optimizer()
    vectors = num_experts * 1000 * dtype.itemsize // 16 * (4 if which in (None, "copy") else 3)
    assert count(ours.step, "vector_loads", "vector_stores") == [vectors, vectors]
    by_cpp(theirs.step)
    assert_equal(changed(ours), changed(theirs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_that_is_not_aligned(dtype, by_cpp):
    """Its fellows are read and written by vectors; wherever the first one begins, the bits are the same."""
    for offsets in ((0, 1, 0, 0), (0, 0, 2, 3), (1, 0, 0, 0), (2, 2, 2, 0), (3, 3, 3, 3)):

        def optimizer(offsets=offsets):
            params = [torch.nn.Parameter(moved(normal(1000, seed=e, dtype=dtype), at)) for e, at in enumerate(offsets)]
            return optimizer_of(params, [params])

        ours, theirs = optimizer(), optimizer()
        (read,) = count(ours.step, "vector_loads")
        if offsets[0] == 0:
            misaligned = sum(at * dtype.itemsize % 16 != 0 for at in offsets)
            assert read == 1000 * dtype.itemsize // 16 * (16 - misaligned)
        by_cpp(theirs.step)
        assert_equal(changed(ours), changed(theirs))
