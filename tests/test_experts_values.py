"""What averaging and AdamW are given on another device than the experts; a driver that is too old; no elements."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ewa_kernels as ewa
from ewa_kernels import backends
from ewa_kernels.kernels import extension, parameter_pass
from ewa_kernels.kernels import triton as triton_kernels


class Calls(TorchDispatchMode):
    """Which operations are called within."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        self.seen.add(call)
        return call(*args, **(kwargs or {}))


class OnAGpu(torch.Tensor):
    """Says so."""

    device = torch.device("cuda", 0)


def test_values_on_a_gpu_for_experts_on_the_cpu():
    """The kernel for CPUs reads values, and no addresses."""
    scalars = parameter_pass._Scalars(torch.device("cpu"))
    for dtype in (torch.float32, torch.float64):
        assert scalars.real(torch.tensor(0.25, dtype=dtype).as_subclass(OnAGpu)) == (0.25, 0, False)
    assert scalars.integer(torch.tensor(2**40 + 1).as_subclass(OnAGpu)) == (2**40 + 1, 0)


@pytest.mark.skipif(not triton_kernels.INTERPRETED, reason="on the CPU")
def test_values_on_the_cpu_are_not_copied_to_a_gpu():
    """A copy waits for the GPU and cannot be captured in a graph; "meta" stands for one."""
    meta = torch.device("meta")
    values = {torch.float64: torch.tensor(0.3), torch.int64: torch.tensor(2**62 + 1)}
    with Calls() as calls:
        assert [triton_kernels.averaging._on(meta, value, dtype).dtype for dtype, value in values.items()] == list(
            values
        )
    assert torch.ops.aten.full.default in calls.seen
    assert not {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default} & calls.seen


def test_a_driver_older_than_the_build(monkeypatch):
    """Else the first launch fails."""
    device = torch.device("cuda")
    monkeypatch.setattr(extension, "WHY_NOT_CUDA", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    module = sys.modules["ewa_kernels._C"]
    for driver, built, fine in (
        *((driver, 12060, fine) for driver, fine in ((11080, False), (0, False), (12020, True), (12080, True))),
        *((13000, 12060, True), (12090, 13000, False)),
        # Since 12.1 there is room for 32 KB in a launch.
        *((12000, 12060, False), (12000, 12010, False), (12010, 12060, True), (12000, 12000, True)),
    ):
        monkeypatch.setattr(module, "cuda_versions", lambda versions=(driver, built): versions, raising=False)
        reason = backends.why_not("adamw", "cuda", device)
        assert (reason is None) == fine
        names = [f"{version // 1000}.{version % 1000 // 10}" for version in (built, driver)]
        assert fine or f"built with CUDA {names[0]}, the driver is for {names[1]}: update it, or build with" in reason


def test_a_compiler_need_not_look_into_the_driver(monkeypatch):
    """Which backend is slower than need be is looked up in every call, in a compiled model too."""
    monkeypatch.setattr(extension, "WHY_NOT_CUDA", None)
    module = sys.modules["ewa_kernels._C"]
    # It asks a function of the extension, into which no compiler can look.
    monkeypatch.setattr(module, "cuda_versions", lambda: (13000 + module.have_products(0), 12060), raising=False)
    monkeypatch.setattr(backends, "_warned", set())

    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        backends._warn_once_of_slowness("moe_ffn", "triton", torch.device("cuda"))
        return x + 1

    assert function(torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_parameters_with_no_elements_count_their_steps(found_inf):
    """As torch's fused AdamW does."""
    steps = []
    for kind in (ewa.optim.AdamW, torch.optim.AdamW):
        params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((0, 3), (4, 0), (2, 3))]
        optimizer = kind(params, fused=True)
        if found_inf is not None:
            optimizer.found_inf = torch.tensor(found_inf)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        # A step that is skipped need not make a state.
        steps.append([float(optimizer.state[p].get("step", 0.0)) for p in params])
    assert steps[0] == steps[1]
    assert steps[0] == [0.0 if found_inf else 1.0] * 3
