"""Fixtures that several test files use."""

import os

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the processes share the cores; read when torch is imported
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined, at the import below
if "EWA_TEST_EXTENSION" in os.environ:
    import extension_stand_in  # noqa: F401
import vision  # noqa: F401
from models import SwiGLU

import ewa_kernels as ewa
from ewa_kernels import calls, problem
from ewa_kernels.kernels import triton as triton_kernels
from ewa_kernels.kernels.blocked import products
from ewa_kernels.kernels.blocked.products import Products
from ewa_kernels.models import ffn_adapters

if triton_kernels.INTERPRETED:
    import interpreter

    interpreter.patch_once_a_launch()

# Those that need a GPU, which `make gpu` runs, and the CUDA kernel on the host, which `extension_variants.py` does.
collect_ignore = [] if torch.cuda.is_available() else ["gpu"]
if os.environ.get("EWA_TEST_VARIANT") != "cuda-on-host":
    collect_ignore.append("test_cuda_on_host.py")


@pytest.fixture(autouse=True)
def _calls_are_described_anew(monkeypatch):
    """What one test patches, the next does not find described by it."""
    monkeypatch.setattr(calls, "_problems", {})
    monkeypatch.setattr(problem, "_made", {})


@pytest.fixture
def products_by(monkeypatch):
    """Says who makes a CPU's matrix products: "cpp", where the processor can, or "torch"; and in which type, if not in
    the one that is computed in."""

    def set_up(who, dtype=None):
        def choose(problem):
            of = problem.dtype if dtype is None else dtype
            among = products.candidates(of) if dtype is None else [Products(of, True), Products(of, False)]
            return among[0 if who == "cpp" else -1]

        monkeypatch.setattr(products, "_choose", choose)

    return set_up


@pytest.fixture
def registered(monkeypatch):
    """SwiGLU is known, for one test."""
    monkeypatch.setattr(ffn_adapters, "_registered", [])
    ewa.register_ffn_adapter(SwiGLU, up=("w_gate", "w_value"), down="w_out")


@pytest.fixture
def averagings(monkeypatch):
    """β of each averaging, whoever makes it."""
    seen = []
    average, again = ewa.functional.average_experts_, ewa.ExpertAverager._average_again

    def record(tensors, share_rate, **options):
        seen.append(float(share_rate))
        average(tensors, share_rate, **options)

    def record_again(self, experts, share_rate, *others):
        done = again(self, experts, share_rate, *others)
        seen.extend([float(share_rate)] if done else [])
        return done

    monkeypatch.setattr(ewa.functional, "average_experts_", record)
    monkeypatch.setattr(ewa.ExpertAverager, "_average_again", record_again)
    return seen
