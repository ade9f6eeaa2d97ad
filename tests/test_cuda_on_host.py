"""The CUDA kernel compiled for the host by `extension_variants.py`: it gives the bits of C++, and how it gets there."""

import ctypes
import os
import sys

import pytest
import torch

import ewa_kernels as ewa

pytestmark = pytest.mark.skipif(os.environ.get("EWA_TEST_VARIANT") != "cuda-on-host", reason="has both kernels")
average_experts_ = ewa.functional.average_experts_


def count(name, function):
    """How much a counter of `cuda_on_host/cuda_runtime.h` grows."""
    counter = ctypes.c_int64.in_dll(ctypes.CDLL(sys.modules["ewa_kernels._C"].__file__), name)
    before = counter.value
    function()
    return counter.value - before


@pytest.fixture
def by_cpp(monkeypatch):
    """Runs a function with the pass for CPUs."""
    module = sys.modules["ewa_kernels._C"]

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(module, "experts_pass_cpu", module.experts_pass_by_cpp)
            function()

    return run


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def steps(params, number=2, **options):
    """An optimizer after some steps, and all that it has changed."""
    optimizer = ewa.optim.AdamW(params, lr=0.01, averager=ewa.ExpertAverager(params, 0.3), **options)
    for _ in range(number):
        optimizer.step()
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq", "step")]
    return [*params, *states]


# A group of 4 experts takes 64 bytes of 7,680 there are in a launch that averages, and 256 of 31,744 in one that steps,
# with 56 for the options. What is too large goes to memory by 31,744 bytes a launch.
@pytest.mark.parametrize(("num_groups", "launches"), [(120, 1), (121, 2), (496, 2), (497, 3), (1500, 5)])
def test_averaging_by_tables_larger_than_a_launch(num_groups, launches, by_cpp):
    ours, theirs = ([normal(4, 5 + i % 7, seed=i) for i in range(num_groups)] for _ in range(2))
    assert count("launches", lambda: average_experts_(ours, 0.3, backend="cpp")) == launches
    by_cpp(lambda: average_experts_(theirs, 0.3, backend="cpp"))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("num_groups", "launches"), [(123, 1), (124, 3), (247, 3), (248, 4)])
def test_adamw_by_tables_larger_than_a_launch(num_groups, launches, by_cpp):
    ours, theirs = ([torch.nn.Parameter(normal(4, 5 + i % 7, seed=i)) for i in range(num_groups)] for _ in range(2))
    for i, p in enumerate([*ours, *theirs]):
        p.grad = normal(*p.shape, seed=i % num_groups)
    results = []
    assert count("launches", lambda: results.append(steps(ours, 1))) == launches
    by_cpp(lambda: results.append(steps(theirs, 1)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
