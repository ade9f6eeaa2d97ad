"""The kernels of csrc/hopper, their own source, in the model of sm_90a on the host, whatever comes first there."""

import ctypes
import itertools
import subprocess

import pytest
import torch
from host_model import MODEL, MODES, ROOT, compiler, flags

from benchmarks import hopper, model
from ewa_kernels import reference
from ewa_kernels.kernels.triton.permutation import radices

DTYPES = [torch.bfloat16, torch.float16]
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2", "identity")
EACH_ACTIVATION = [*((name, torch.bfloat16) for name in ACTIVATIONS), ("gelu", torch.float16), ("silu", torch.float16)]
BIAS_TYPES = [None, torch.float32, torch.bfloat16, torch.float16]


CALLS = ("up", "down", "grad_pre", "grad_x", "grad_weight")
POINTER, INT, UINT32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32


class Layer(ctypes.Structure):
    """`ewa::hopper::Layer`, and likewise those that follow."""

    _fields_ = (
        ("is_bfloat16", ctypes.c_bool),
        *((name, INT) for name in ("num_rows", "num_experts", "d_model", "d_ff", "activation")),
        ("gated", ctypes.c_bool),
        ("seed", ctypes.c_uint64),
        ("threshold", UINT32),
        ("scale", ctypes.c_float),
        ("multiprocessors", INT),
        ("stream", POINTER),
    )

    @property
    def num_up(self):
        return self.d_ff * (2 if self.gated else 1)

    @property
    def sizes(self):
        """Rows of each expert."""
        starts = [e * self.num_rows // self.num_experts for e in range(self.num_experts + 1)]
        return [b - a for a, b in itertools.pairwise(starts)]

    def by_slot(self, rows):
        """`[E, slots, …]` of `[R, …]`, zeros where a smaller group has no row."""
        slots = torch.zeros(self.num_experts, -(-self.num_rows // self.num_experts), rows.shape[-1], dtype=rows.dtype)
        for expert, of_expert in enumerate(rows.split(self.sizes)):
            slots[expert, : len(of_expert)] = of_expert
        return slots

    def by_row(self, slots):
        return torch.cat([rows[:size] for rows, size in zip(slots, self.sizes, strict=True)])

    def empty(self, columns, dtype):
        return self.by_slot(torch.zeros(self.num_rows, columns, dtype=dtype)).fill_(torch.nan)


class Rows(ctypes.Structure):
    _fields_ = (
        ("data", POINTER),
        ("by_token", ctypes.c_bool),
        ("permutation", POINTER),
        ("top_k", INT),
        ("seed", ctypes.c_uint64),
        *((name, UINT32) for name in ("radix_a", "radix_b", "rounds")),
        ("dealt", POINTER),
    )


class Bias(ctypes.Structure):
    _fields_ = (("data", POINTER), ("type", INT))


class Operands(ctypes.Structure):
    _fields_ = (
        ("rows", Rows),
        ("a", POINTER),
        ("b", POINTER),
        ("bias", Bias),
        *((name, POINTER) for name in ("permutation", "pre_activation", "hidden", "out")),
        ("size_m", INT),
        ("size_n", INT),
        ("parts", POINTER),
        ("part_sums", POINTER),
        ("sums", Bias),
    )


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hopper")
    sources = [*sorted((ROOT / "csrc/hopper").glob("*.cu")), MODEL / "hopper_layer.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [
        [compiler(), *flags(), "-fPIC", "-x", "c++", "-c", source, "-o", target]
        for source, target in zip(sources, objects, strict=True)
    ]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait() == 0
    subprocess.run([compiler(), "-shared", *objects, "-o", folder / "hopper.so"], check=True)
    library = ctypes.CDLL(str(folder / "hopper.so"))
    library.run.restype = ctypes.c_char_p
    return library


@pytest.fixture
def machine(kernels):
    """Sets up the machine for the launches that follow: a seed, what is late, and the number of multiprocessors."""

    def set_up(seed=1, mode="late", multiprocessors=4):
        kernels.set_machine(seed, mode.encode(), multiprocessors)

    set_up()
    return set_up


def run(kernels, call, layer, *, rows=None, bias=None, sums=None, size_m=0, size_n=0, **tensors):
    pointers = {name: None if t is None else t.data_ptr() for name, t in tensors.items()}
    vectors = {
        name: Bias() if vector is None else Bias(vector.data_ptr(), BIAS_TYPES.index(vector.dtype))
        for name, vector in (("bias", bias), ("sums", sums))
    }
    operands = Operands(rows=rows or Rows(), size_m=size_m, size_n=size_n, **vectors, **pointers)
    assert kernels.run(CALLS.index(call), ctypes.byref(layer), ctypes.byref(operands)) == b""


def normal(*shape, dtype=torch.float32, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def layer_of(dtype, num_rows, num_experts, d_model, d_ff, activation="gelu", gated=False, seed=0, dropout_p=0.0):
    return Layer(
        dtype == torch.bfloat16, num_rows, num_experts, d_model, d_ff, ACTIVATIONS.index(activation), gated, seed,
        round(dropout_p * 2**32), 1 / (1 - dropout_p), 132, None,
    )  # fmt: skip


def dtype_of(layer):
    return torch.bfloat16 if layer.is_bfloat16 else torch.float16


def is_near(ours, exact, dtype):
    """Within what rounding the result to its type, and sums in float32, explain."""
    eps = torch.finfo(dtype).eps
    bound = eps * exact.abs() + 1e-5 * exact.abs().max() + torch.finfo(dtype).tiny
    return bool(((ours.double() - exact).abs() <= bound).all())


def hidden_of(layer, pre):
    """Exactly, in the type of pre_activation."""
    gate, value = pre.chunk(2, -1) if layer.gated else (pre, None)
    hidden = reference.ACTIVATIONS[ACTIVATIONS[layer.activation]](gate)
    if value is not None:
        hidden = hidden * value
    if layer.threshold > 0:
        rows, seed = torch.arange(layer.num_rows), torch.tensor(layer.seed)
        hidden = hidden * reference.dropout_scale(rows, layer.d_ff, seed, layer.threshold / 2**32, torch.float64)
    return hidden


def product(layer, rows, weight, bias=None):
    """rows @ weightᵀ of each row's expert, in float64."""
    out = layer.by_slot(rows.double()) @ weight.double().mT
    return layer.by_row(out if bias is None else out + bias.double()[:, None])


def check_up(kernels, layer, bias_dtype=torch.float32, saved=True, by_token=None):
    """Returns hidden. `by_token`: "dealt" or "given", else rows are by slot."""
    dtype, (r, e, d) = dtype_of(layer), (layer.num_rows, layer.num_experts, layer.d_model)
    top_k = 2 if by_token == "given" and r % 2 == 0 else 1
    x, weight = normal(r // top_k, d, dtype=dtype), normal(e, layer.num_up, d, dtype=dtype, scale=d**-0.5, seed=1)
    bias = None if bias_dtype is None else normal(e, layer.num_up, dtype=bias_dtype, seed=2)
    hidden = layer.empty(layer.d_ff, dtype)
    pre = layer.empty(layer.num_up, dtype) if saved else None
    if by_token is None:
        by_row, slots = x, layer.by_slot(x)
        rows = Rows(slots.data_ptr())
    else:
        permutation, dealt = torch.randperm(r, generator=torch.Generator().manual_seed(3)).int(), torch.zeros(r).int()
        rows = Rows(x.data_ptr(), True, permutation.data_ptr(), top_k)
        if by_token == "dealt":
            permutation = reference.random_permutation(r, torch.tensor(5)).int()
            rows = Rows(x.data_ptr(), True, None, 1, 5, *radices(r), dealt.data_ptr())
        by_row = x[permutation.long() // top_k]
    run(kernels, "up", layer, rows=rows, b=weight, bias=bias, hidden=hidden, pre_activation=pre)
    exact = product(layer, by_row, weight, bias)
    if by_token == "dealt":
        assert torch.equal(dealt, permutation)
    if pre is not None:
        assert is_near(layer.by_row(pre), exact, dtype)
    assert is_near(layer.by_row(hidden), hidden_of(layer, exact), dtype)
    return hidden


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
        check_up(kernels, layer_of(torch.bfloat16, *sizes, gated=gated))

    @pytest.mark.parametrize(("activation", "dtype"), EACH_ACTIVATION)
    @pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
    def test_activations(self, activation, gated, dtype, kernels, machine):
        check_up(kernels, layer_of(dtype, 130, 1, 64, 72, activation, gated))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
    def test_dropout(self, gated, dtype, kernels, machine):
        check_up(kernels, layer_of(dtype, 301, 2, 72, 136, gated=gated, seed=7, dropout_p=0.3))

    @pytest.mark.parametrize("bias_dtype", BIAS_TYPES, ids=str)
    def test_biases(self, bias_dtype, kernels, machine):
        for gated in (False, True):
            check_up(kernels, layer_of(torch.float16, 40, 3, 24, 40, gated=gated), bias_dtype)

    @pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
    def test_nothing_is_kept(self, gated, kernels, machine):
        check_up(kernels, layer_of(torch.bfloat16, 140, 1, 72, 136, gated=gated), saved=False)

    @pytest.mark.parametrize("by_token", ["dealt", "given"])
    @pytest.mark.parametrize("sizes", UP_SIZES.values(), ids=UP_SIZES)
    def test_rows_that_it_finds_by_itself(self, sizes, by_token, kernels, machine):
        check_up(kernels, layer_of(torch.bfloat16, *sizes), by_token=by_token)
        check_up(kernels, layer_of(torch.float16, *sizes, "silu", True, 3, 0.3), by_token=by_token)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("by_token", [None, "dealt"], ids=["by slot", "by token"])
    def test_whatever_comes_first(self, by_token, mode, kernels, machine):
        layer, results = layer_of(torch.bfloat16, 700, 1, 136, 200), []
        for seed, multiprocessors in ((1, 2), (2, 4), (3, 6)):
            machine(seed, mode, multiprocessors)
            results.append(check_up(kernels, layer, by_token=by_token))
        assert all(torch.equal(result, results[0]) for result in results)


# 256 columns in a tile.
DOWN_SIZES = {
    "one row": (1, 1, 8, 8),
    "fewer rows than experts": (2, 3, 16, 8),
    "a step and a tile": (256, 1, 256, 64),
    "more steps than stages": (200, 1, 264, 328),
    "ragged everywhere": (301, 2, 72, 136),
    "more tiles than clusters": (700, 2, 520, 128),
}


def check_scattered(kernels, layer, call, bias_dtype=None):
    """The down projection, or the gradient of x."""
    dtype, (r, e, d) = dtype_of(layer), (layer.num_rows, layer.num_experts, layer.d_model)
    k = layer.d_ff if call == "down" else layer.num_up
    rows, weight = normal(r, k, dtype=dtype), normal(e, d, k, dtype=dtype, scale=k**-0.5, seed=1)
    bias = None if bias_dtype is None else normal(e, d, dtype=bias_dtype, seed=2)
    permutation = torch.randperm(r, generator=torch.Generator().manual_seed(3)).int()
    out = torch.full((r, d), torch.nan, dtype=dtype)
    b = weight if call == "down" else weight.mT.contiguous()
    run(kernels, call, layer, a=layer.by_slot(rows), b=b, bias=bias, permutation=permutation, out=out)
    exact = torch.empty(r, d, dtype=torch.float64)
    exact[permutation.long()] = product(layer, rows, weight, bias)
    assert is_near(out, exact, dtype)
    return out


class TestScattered:
    @pytest.mark.parametrize("call", ["down", "grad_x"])
    @pytest.mark.parametrize("sizes", DOWN_SIZES.values(), ids=DOWN_SIZES)
    def test_sizes(self, sizes, call, kernels, machine):
        check_scattered(kernels, layer_of(torch.bfloat16, *sizes), call, torch.float32 if call == "down" else None)
        check_scattered(kernels, layer_of(torch.float16, *sizes, gated=True), call)

    @pytest.mark.parametrize("bias_dtype", BIAS_TYPES, ids=str)
    def test_biases(self, bias_dtype, kernels, machine):
        check_scattered(kernels, layer_of(torch.bfloat16, 40, 3, 24, 40), "down", bias_dtype)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("call", ["down", "grad_x"])
    def test_whatever_comes_first(self, call, mode, kernels, machine):
        layer, results = layer_of(torch.bfloat16, 600, 1, 264, 328), []
        for seed in range(1, 4):
            machine(seed, mode)
            results.append(check_scattered(kernels, layer, call))
        assert all(torch.equal(result, results[0]) for result in results)


def check_grad_pre(kernels, layer):
    """Returns grad_pre."""
    dtype, (r, e, d, f) = dtype_of(layer), (layer.num_rows, layer.num_experts, layer.d_model, layer.d_ff)
    grad_y, weight = normal(r, d, dtype=dtype), normal(e, d, f, dtype=dtype, scale=d**-0.5, seed=1)
    pre = normal(r, layer.num_up, dtype=dtype, seed=2)
    grad, hidden = layer.empty(layer.num_up, dtype), layer.empty(f, dtype)
    slots = layer.by_slot(grad_y)
    run(kernels, "grad_pre", layer, a=slots, b=weight, pre_activation=layer.by_slot(pre), out=grad, hidden=hidden)
    exact_pre = pre.double().requires_grad_()
    exact = hidden_of(layer, exact_pre)
    (exact_grad,) = torch.autograd.grad(exact, exact_pre, product(layer, grad_y, weight.mT))
    assert is_near(layer.by_row(hidden), exact.detach(), dtype)
    # Derivatives of the activations are less exact, see kernels/triton/activations.py; 16 bits hide it.
    assert is_near(layer.by_row(grad), exact_grad, dtype)
    return grad


# 128 columns in a tile.
GRAD_PRE_SIZES = {**UP_SIZES, "more tiles than turns": (300, 1, 72, 648)}


class TestGradPre:
    @pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
    @pytest.mark.parametrize("sizes", GRAD_PRE_SIZES.values(), ids=GRAD_PRE_SIZES)
    def test_sizes(self, sizes, gated, kernels, machine):
        check_grad_pre(kernels, layer_of(torch.bfloat16, *sizes, gated=gated))

    @pytest.mark.parametrize(("activation", "dtype"), EACH_ACTIVATION)
    @pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
    def test_activations(self, activation, gated, dtype, kernels, machine):
        check_grad_pre(kernels, layer_of(dtype, 130, 1, 64, 72, activation, gated))

    @pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
    def test_dropout(self, gated, kernels, machine):
        check_grad_pre(kernels, layer_of(torch.bfloat16, 301, 2, 72, 136, gated=gated, seed=7, dropout_p=0.3))

    @pytest.mark.parametrize("mode", MODES)
    def test_whatever_comes_first(self, mode, kernels, machine):
        layer, results = layer_of(torch.bfloat16, 500, 1, 136, 264), []
        for seed, multiprocessors in ((1, 2), (2, 4), (3, 6)):
            machine(seed, mode, multiprocessors)
            results.append(check_grad_pre(kernels, layer))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("dtype", "sums_dtype"), [*((torch.bfloat16, sums) for sums in BIAS_TYPES), (torch.float16, torch.float16)]
)
@pytest.mark.parametrize(
    ("num_rows", "num_experts", "size_m", "size_n", "splits"),
    [(1, 1, 8, 8, 1), (2, 3, 16, 8, 1), (64, 1, 256, 256, 1), (301, 2, 264, 72, 3), (1100, 2, 72, 520, 5)],
)
def test_grad_of_weights(num_rows, num_experts, size_m, size_n, splits, sums_dtype, dtype, kernels, machine):
    layer = layer_of(dtype, num_rows, num_experts, 8, 8)
    assert kernels.splits_of(ctypes.byref(layer), size_m, size_n) == splits
    a, b = normal(num_rows, size_m, dtype=dtype), normal(num_rows, size_n, dtype=dtype, seed=1)
    out = torch.full((num_experts, size_m, size_n), torch.nan, dtype=dtype)
    parts = torch.full((num_experts, splits, size_m, size_n), torch.nan)
    sums = None if sums_dtype is None else torch.full((num_experts, size_m), torch.nan, dtype=sums_dtype)
    part_sums = None if sums is None else torch.full((num_experts, splits, size_m), torch.nan)
    slots = layer.by_slot(a), layer.by_slot(b)
    for seed, mode in enumerate(MODES, 1):
        machine(seed, mode)
        run(
            kernels, "grad_weight", layer, a=slots[0], b=slots[1], out=out, size_m=size_m, size_n=size_n, parts=parts,
            part_sums=part_sums, sums=sums,
        )  # fmt: skip
        assert is_near(out, slots[0].double().mT @ slots[1].double(), dtype)
        if sums is not None:
            assert is_near(sums, slots[0].double().sum(1), sums_dtype)


def test_splits(kernels):
    """As many as fill the last round of tiles, and as the prediction has it."""
    of_models = {}
    for case in model.CASES:
        slots, f, d = -(-case.num_rows // case.num_experts), case.num_up, case.d_model
        layer = layer_of(torch.bfloat16, case.num_rows, case.num_experts, d, case.d_ff)
        of_models[case.name] = kernels.splits_of(ctypes.byref(layer), f, d)
        gradient = hopper.Product(case.num_experts, f, d, slots, 256, False, 0, 0)
        assert hopper.splits_of(gradient) == of_models[case.name]
    assert {name: of_models[name] for name in ("ViT-S", "ViT-B", "ViT-L", "Swin stage 1")} == {
        "ViT-S": 4, "ViT-B": 3, "ViT-L": 1, "Swin stage 1": 8,
    }  # fmt: skip


def test_comparisons_can_fail():
    exact = normal(50, 40).double()
    assert is_near(exact.bfloat16(), exact, torch.bfloat16)
    for wrong in (torch.zeros(50, 40), exact.bfloat16() * 1.02, torch.full((50, 40), torch.nan), exact.roll(1, 0)):
        assert not is_near(wrong.bfloat16(), exact, torch.bfloat16)


class TestRefused:
    """Before anything is launched."""

    @pytest.mark.parametrize(
        ("sizes", "call", "changes", "expected"),
        [
            ((0, 1, 8, 8), "up", {}, "num_rows must be 1 to"),
            ((2**31 - 1, 1, 8, 8), "up", {}, "num_rows must be 1 to"),
            ((8, 1, 12, 8), "down", {}, "sizes must be multiples of 8, got 12"),
            ((8, 1, 8, 8), "grad_weight", {"size_m": 8, "size_n": 4}, "sizes must be multiples of 8, got 4"),
            ((8, 1, 8, 8), "down", {"out": 8}, "operands must begin at 16 bytes"),
            ((8, 1, 8, 8), "up", {"rows": Rows(16, True, None, 2)}, "top_k must be 1"),
            ((2**30, 1, 64, 8), "up", {"rows": Rows(16, True, None, 1)}, "x by token must be smaller"),
            ((8, 1, 8, 8), "up", {"rows": Rows(16, True, None, 1), "activation": "relu"}, "are for gelu and silu"),
        ],
    )
    def test_what(self, sizes, call, changes, expected, kernels, machine):
        changes = dict(changes)
        layer = layer_of(torch.bfloat16, *sizes, changes.pop("activation", "gelu"))
        operands = Operands(**changes)
        said = kernels.run(CALLS.index(call), ctypes.byref(layer), ctypes.byref(operands)).decode()
        assert expected in said

    def test_too_few_multiprocessors(self, kernels, machine):
        layer = layer_of(torch.bfloat16, 8, 1, 8, 8)
        layer.multiprocessors = 1
        assert b"two multiprocessors" in kernels.run(0, ctypes.byref(layer), ctypes.byref(Operands()))


def test_what_is_infinite_where_no_row_is(kernels, machine):
    """The last slot of a smaller group is multiplied with zeros."""
    layer = layer_of(torch.float16, 3, 2, 8, 8, "relu2")
    pre, grad_y = torch.full((2, 2, 8), 300.0).half(), layer.by_slot(normal(3, 8, dtype=torch.float16))
    pre[0, 0] = pre[1] = 1.0
    weight, grad, hidden = (
        normal(2, 8, 8, dtype=torch.float16),
        layer.empty(8, torch.float16),
        layer.empty(8, torch.float16),
    )
    run(kernels, "grad_pre", layer, a=grad_y, b=weight, pre_activation=pre, out=grad, hidden=hidden)
    assert grad.isfinite().all()
    assert torch.equal(hidden[0, 1], torch.zeros(8).half())
