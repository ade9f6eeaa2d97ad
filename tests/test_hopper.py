"""The kernels of csrc/hopper, their own source, in the model of sm_90a on the host, whatever comes first there."""

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ewa_kernels import reference

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests/cuda_on_host"
DTYPES = [torch.bfloat16, torch.float16]
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2", "identity")
BIAS_TYPES = [None, torch.float32, torch.bfloat16, torch.float16]
MODES = {"late": (0, 0), "random": (1, 1), "at once": (2, 2), "late products": (2, 0)}  # copies, products


class Layer(ctypes.Structure):
    """`ewa::hopper::Layer`."""

    _fields_ = (
        ("is_bfloat16", ctypes.c_bool),
        *((name, ctypes.c_int) for name in ("num_rows", "num_experts", "d_model", "d_ff", "activation")),
        ("gated", ctypes.c_bool),
        ("seed", ctypes.c_uint64),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        ("multiprocessors", ctypes.c_int),
        ("stream", ctypes.c_void_p),
    )


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("hopper")
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/hopper'}", f"-I{MODEL / 'machine'}"]
    sources = [*sorted((ROOT / "csrc/hopper").glob("*.cu")), MODEL / "hopper_layer.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [
        [compiler, *flags, *include, "-x", "c++", "-c", source, "-o", target]
        for source, target in zip(sources, objects, strict=True)
    ]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait() == 0
    subprocess.run([compiler, "-shared", *objects, "-o", folder / "hopper.so"], check=True)
    library = ctypes.CDLL(str(folder / "hopper.so"))
    for name in ("up_projection", "down_projection"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


@pytest.fixture
def machine(kernels):
    """Sets up the machine for the launches that follow: a seed, what is late, and the number of multiprocessors."""

    def set_up(seed=1, mode="late", multiprocessors=4):
        kernels.set_machine(seed, *MODES[mode], multiprocessors)

    set_up()
    return set_up


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def normal(*shape, dtype=torch.float32, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def poisoned(*shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype)


def layer_of(dtype, num_rows, num_experts, d_model, d_ff, activation="gelu", gated=False, seed=0, dropout_p=0.0):
    return Layer(
        dtype == torch.bfloat16, num_rows, num_experts, d_model, d_ff, ACTIVATIONS.index(activation), gated, seed,
        round(dropout_p * 2**32), 1 / (1 - dropout_p), 132, None,
    )  # fmt: skip


def sizes_of(layer):
    """Rows of each expert, and the slots that each has."""
    starts = [e * layer.num_rows // layer.num_experts for e in range(layer.num_experts + 1)]
    return [b - a for a, b in itertools.pairwise(starts)], -(-layer.num_rows // layer.num_experts)


def is_near(ours, exact, dtype):
    """Within what rounding the result to its type, and sums in float32, explain."""
    eps = torch.finfo(dtype).eps
    bound = eps * exact.abs() + 1e-5 * exact.abs().max() + torch.finfo(dtype).tiny
    return bool(((ours.double() - exact).abs() <= bound).all())


def by_row(layer, by_slot):
    """Rows of all experts, of `[E, slots, …]`."""
    sizes, _ = sizes_of(layer)
    return torch.cat([rows[:size] for rows, size in zip(by_slot, sizes, strict=True)])


def run_up(kernels, layer, dtype, bias_dtype=torch.float32, saved=True):
    e, f, (_, slots) = layer.num_experts, layer.d_ff, sizes_of(layer)
    num_up = 2 * f if layer.gated else f
    x, weight = (
        normal(e, slots, layer.d_model, dtype=dtype),
        normal(e, num_up, layer.d_model, dtype=dtype, scale=layer.d_model**-0.5, seed=1),
    )
    bias = None if bias_dtype is None else normal(e, num_up, dtype=bias_dtype, seed=2)
    hidden = poisoned(e, slots, f, dtype=dtype)
    pre = poisoned(e, slots, num_up, dtype=dtype) if saved else None
    said = kernels.up_projection(
        ctypes.byref(layer),
        *map(pointer, (x, weight, bias)),
        BIAS_TYPES.index(bias_dtype),
        pointer(hidden),
        pointer(pre),
    )
    assert said == b""
    exact = x.double() @ weight.double().mT
    if bias is not None:
        exact += bias.double()[:, None]
    return by_row(layer, exact), by_row(layer, hidden), None if pre is None else by_row(layer, pre)


def hidden_of(layer, exact, dropout_p=0.0):
    name = ACTIVATIONS[layer.activation]
    gate, value = exact.chunk(2, -1) if layer.gated else (exact, None)
    hidden = reference.ACTIVATIONS[name](gate)
    if value is not None:
        hidden = hidden * value
    if dropout_p > 0:
        rows, seed = torch.arange(layer.num_rows), torch.tensor(layer.seed)
        hidden = hidden * reference.dropout_scale(rows, layer.d_ff, seed, dropout_p, torch.float64)
    return hidden


def check_up(kernels, layer, dtype, dropout_p=0.0, **options):
    exact, hidden, pre = run_up(kernels, layer, dtype, **options)
    if pre is not None:
        assert is_near(pre, exact, dtype)
    assert is_near(hidden, hidden_of(layer, exact, dropout_p), dtype)


# A tile has 128 rows, a cluster two of them; 192 columns, 128 with dropout, 64 of hidden if gated; a step has 64 of D.
UP_SIZES = {
    "one row": (1, 1, 8, 8),
    "fewer rows than experts": (2, 3, 8, 16),
    "a step and a tile": (256, 1, 64, 192),
    "more steps than stages": (200, 1, 328, 200),
    "ragged everywhere": (301, 2, 72, 136),
    "more tiles than clusters": (700, 2, 128, 392),
}


class TestUp:
    @pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
    @pytest.mark.parametrize("sizes", UP_SIZES.values(), ids=UP_SIZES)
    def test_sizes(self, sizes, gated, kernels, machine):
        check_up(kernels, layer_of(torch.bfloat16, *sizes, gated=gated), torch.bfloat16)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations(self, activation, gated, dtype, kernels, machine):
        check_up(kernels, layer_of(dtype, 130, 1, 64, 72, activation, gated), dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
    def test_dropout(self, gated, dtype, kernels, machine):
        layer = layer_of(dtype, 301, 2, 72, 136, gated=gated, seed=7, dropout_p=0.3)
        check_up(kernels, layer, dtype, dropout_p=0.3)

    @pytest.mark.parametrize("bias_dtype", BIAS_TYPES, ids=str)
    def test_biases(self, bias_dtype, kernels, machine):
        for gated in (False, True):
            check_up(kernels, layer_of(torch.float16, 40, 3, 24, 40, gated=gated), torch.float16, bias_dtype=bias_dtype)

    @pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
    def test_nothing_is_kept(self, gated, kernels, machine):
        check_up(kernels, layer_of(torch.bfloat16, 140, 1, 72, 136, gated=gated), torch.bfloat16, saved=False)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("multiprocessors", [2, 6])
    def test_whatever_comes_first(self, mode, multiprocessors, kernels, machine):
        layer, results = layer_of(torch.bfloat16, 700, 1, 136, 200), []
        for seed in range(1, 4):
            machine(seed, mode, multiprocessors)
            results.append(run_up(kernels, layer, torch.bfloat16)[1])
        assert all(torch.equal(result, results[0]) for result in results)
        assert is_near(results[0], hidden_of(layer, run_up(kernels, layer, torch.bfloat16)[0]), torch.bfloat16)


# 256 columns in a tile.
DOWN_SIZES = {
    "one row": (1, 1, 8, 8),
    "fewer rows than experts": (2, 3, 16, 8),
    "a step and a tile": (256, 1, 256, 64),
    "more steps than stages": (200, 1, 264, 328),
    "ragged everywhere": (301, 2, 72, 136),
    "more tiles than clusters": (700, 2, 520, 128),
}


class TestDown:
    @staticmethod
    def run(kernels, layer, dtype, bias_dtype=torch.float32):
        """Ours, and the exact result."""
        e, d, (_, slots) = layer.num_experts, layer.d_model, sizes_of(layer)
        hidden = normal(e, slots, layer.d_ff, dtype=dtype)
        weight = normal(e, d, layer.d_ff, dtype=dtype, scale=layer.d_ff**-0.5, seed=1)
        bias = None if bias_dtype is None else normal(e, d, dtype=bias_dtype, seed=2)
        permutation = torch.randperm(layer.num_rows, generator=torch.Generator().manual_seed(3)).int()
        y = poisoned(layer.num_rows, d, dtype=dtype)
        said = kernels.down_projection(
            ctypes.byref(layer), *map(pointer, (hidden, weight, bias)), BIAS_TYPES.index(bias_dtype),
            *map(pointer, (permutation, y)),
        )  # fmt: skip
        assert said == b""
        exact = hidden.double() @ weight.double().mT
        if bias is not None:
            exact += bias.double()[:, None]
        return y, torch.empty(y.shape, dtype=torch.float64).index_copy(0, permutation.long(), by_row(layer, exact))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("sizes", DOWN_SIZES.values(), ids=DOWN_SIZES)
    def test_sizes(self, sizes, dtype, kernels, machine):
        y, exact = self.run(kernels, layer_of(dtype, *sizes), dtype)
        assert is_near(y, exact, dtype)

    @pytest.mark.parametrize("bias_dtype", BIAS_TYPES, ids=str)
    def test_biases(self, bias_dtype, kernels, machine):
        y, exact = self.run(kernels, layer_of(torch.bfloat16, 40, 3, 24, 40), torch.bfloat16, bias_dtype)
        assert is_near(y, exact, torch.bfloat16)

    @pytest.mark.parametrize("mode", MODES)
    def test_whatever_comes_first(self, mode, kernels, machine):
        results = []
        for seed in range(1, 4):
            machine(seed, mode)
            results.append(self.run(kernels, layer_of(torch.bfloat16, 600, 1, 264, 328), torch.bfloat16))
        assert all(torch.equal(y, results[0][0]) for y, _ in results)
        assert is_near(*results[0], torch.bfloat16)


def test_comparisons_can_fail():
    exact = normal(50, 40).double()
    assert is_near(exact.bfloat16(), exact, torch.bfloat16)
    for wrong in (torch.zeros(50, 40), exact.bfloat16() * 1.02, torch.full((50, 40), torch.nan), exact.roll(1, 0)):
        assert not is_near(wrong.bfloat16(), exact, torch.bfloat16)
