"""The kernels of csrc/hopper, their own source, in the model of sm_90a on the host, whatever comes first there."""

import ctypes
import itertools

import pytest
import torch
from hopper_model import (
    ACTIVATIONS,
    CALLS,
    NUMBER_TYPES,
    Gathered,
    Number,
    Operands,
    Rows,
    build,
    layer_of,
    operands_of,
    pointers,
    run,
    tabulate,
)
from host_model import MODES

from benchmarks import hopper, model
from ewa_kernels import reference

DTYPES = [torch.bfloat16, torch.float16]
EACH_ACTIVATION = [*((name, torch.bfloat16) for name in ACTIVATIONS), ("gelu", torch.float16), ("silu", torch.float16)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return build(tmp_path_factory.mktemp("hopper"))


@pytest.fixture
def machine(kernels):
    """Sets up the machine for the launches that follow: a seed, what is late, and the number of multiprocessors."""

    def set_up(seed=1, mode="late", multiprocessors=4):
        kernels.set_machine(seed, mode.encode(), multiprocessors)

    set_up()
    return set_up


def normal(*shape, dtype=torch.float32, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


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
    if layer.dropout_threshold > 0:
        rows, seed, p = torch.arange(layer.num_rows), torch.tensor(layer.seed.value), layer.dropout_threshold / 2**32
        hidden = hidden * reference.dropout_scale(rows, layer.d_ff, seed, p, torch.float64)
    return hidden


def product(layer, rows, weight, bias=None):
    """rows @ weightᵀ of each row's expert, in float64."""
    of_experts = zip(rows.double().split(layer.sizes), weight.double(), strict=True)
    out = torch.cat([of_expert @ w.mT for of_expert, w in of_experts])
    return out if bias is None else out + bias.double().repeat_interleave(torch.tensor(layer.sizes), 0)


def check_up(kernels, layer, bias_dtype=torch.float32, saved=True, by_token=None):
    """Returns hidden. `by_token`: "dealt" or "given", else rows are by slot."""
    dtype, (r, e, d), top_k = dtype_of(layer), (layer.num_rows, layer.num_experts, layer.d_model), layer.top_k
    x, weight = normal(r // top_k, d, dtype=dtype), normal(e, layer.num_up, d, dtype=dtype, scale=d**-0.5, seed=1)
    bias = None if bias_dtype is None else normal(e, layer.num_up, dtype=bias_dtype, seed=2)
    hidden = layer.empty(layer.d_ff, dtype)
    pre = layer.empty(layer.num_up, dtype) if saved else None
    if by_token is None:
        by_row, slots = x, layer.by_slot(x)
        rows = Rows(slots.data_ptr())
    else:
        permutation, dealt = torch.randperm(r, generator=torch.Generator().manual_seed(3)).int(), torch.zeros(r).int()
        rows = Rows(x.data_ptr(), True, permutation.data_ptr(), None)
        if by_token == "dealt":
            permutation = reference.random_permutation(r, torch.tensor(layer.seed.value)).int()
            rows = Rows(x.data_ptr(), True, None, dealt.data_ptr())
        by_row = x[permutation.long() // top_k]
    run(kernels, "up", layer, rows=rows, b=weight, bias=bias, hidden=hidden, pre_activation=pre)
    exact = product(layer, by_row, weight, bias)
    if by_token == "dealt":
        assert torch.equal(dealt, permutation)
    if pre is not None:
        assert is_near(layer.by_row(pre), exact, dtype)
    assert is_near(layer.by_row(hidden), hidden_of(layer, exact), dtype)
    return hidden


# Groups that are given: none, whole tiles, a row more than such, an empty one in between.
GIVEN = [(0, 5, 0), (64, 1, 0, 257), (256, 300, 130)]

# A tile has 128 rows, a cluster two of them; 192 columns, 128 with dropout, 64 of hidden if gated; a step has 64 of D.
UP_SIZES = {
    "one row": (1, 1, 8, 8),
    "fewer rows than experts": (2, 3, 8, 16),
    "a step and a tile": (256, 1, 64, 192),
    "more steps than stages": (200, 1, 328, 200),
    "ragged everywhere": (301, 2, 72, 136),
    "more tiles than clusters": (700, 2, 128, 392),
    **{f"groups of {sizes}": (sum(sizes), sizes, 72, 200) for sizes in GIVEN},
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

    @pytest.mark.parametrize("bias_dtype", NUMBER_TYPES, ids=str)
    def test_biases(self, bias_dtype, kernels, machine):
        for gated in (False, True):
            check_up(kernels, layer_of(torch.float16, 40, 3, 24, 40, gated=gated), bias_dtype)

    @pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
    def test_nothing_is_kept(self, gated, kernels, machine):
        check_up(kernels, layer_of(torch.bfloat16, 140, 1, 72, 136, gated=gated), saved=False)

    @pytest.mark.parametrize("by_token", ["dealt", "given"])
    @pytest.mark.parametrize("sizes", UP_SIZES.values(), ids=UP_SIZES)
    def test_rows_that_it_finds_by_itself(self, sizes, by_token, kernels, machine):
        top_k = 2 if by_token == "given" and sizes[0] % 2 == 0 else 1
        check_up(kernels, layer_of(torch.bfloat16, *sizes, seed=5, top_k=top_k), by_token=by_token)
        check_up(kernels, layer_of(torch.float16, *sizes, "silu", True, 3, 0.3, top_k), by_token=by_token)

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
    **{f"groups of {sizes}": (sum(sizes), sizes, 72, 200) for sizes in GIVEN},
}


def check_scattered(kernels, layer, call, bias_dtype=None, routed=False):
    """The down projection, or the gradient of x."""
    dtype, (r, e, d) = dtype_of(layer), (layer.num_rows, layer.num_experts, layer.d_model)
    k = layer.d_ff if call == "down" else layer.num_up
    rows, weight = normal(r, k, dtype=dtype), normal(e, d, k, dtype=dtype, scale=k**-0.5, seed=1)
    bias = None if bias_dtype is None else normal(e, d, dtype=bias_dtype, seed=2)
    permutation = torch.randperm(r, generator=torch.Generator().manual_seed(3)).int()
    routing_weights = normal(r, seed=4) if routed else None
    out = torch.full((r, d), torch.nan, dtype=dtype)
    operands = {"b": weight if call == "down" else weight.mT.contiguous(), "permutation": permutation, "bias": bias}
    run(kernels, call, layer, a=layer.by_slot(rows), out=out, routing_weights=routing_weights, **operands)
    exact = torch.empty(r, d, dtype=torch.float64)
    exact[permutation.long()] = product(layer, rows, weight, bias)
    if routed:
        exact *= routing_weights[:, None].double()
    assert is_near(out, exact, dtype)
    return out


class TestScattered:
    @pytest.mark.parametrize("call", ["down", "grad_x"])
    @pytest.mark.parametrize("sizes", DOWN_SIZES.values(), ids=DOWN_SIZES)
    def test_sizes(self, sizes, call, kernels, machine):
        bias_dtype = torch.float32 if call == "down" else None
        check_scattered(kernels, layer_of(torch.bfloat16, *sizes), call, bias_dtype, routed=call == "down")
        check_scattered(kernels, layer_of(torch.float16, *sizes, gated=True), call)

    @pytest.mark.parametrize("bias_dtype", NUMBER_TYPES, ids=str)
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


def check_forward(kernels, layer, by_token="dealt"):
    """Both projections in one launch: the bits of two, and no flag is left."""
    dtype, (r, e, d, f) = dtype_of(layer), (layer.num_rows, layer.num_experts, layer.d_model, layer.d_ff)
    x = normal(r // layer.top_k, d, dtype=dtype)
    up_weight = normal(e, layer.num_up, d, dtype=dtype, scale=d**-0.5, seed=1)
    down_weight = normal(e, d, f, dtype=dtype, scale=f**-0.5, seed=2)
    up_bias, down_bias, routing_weights = normal(e, layer.num_up), normal(e, d), normal(r)
    flags = torch.zeros(kernels.num_flags(ctypes.byref(layer)), dtype=torch.int32)
    tabulate(kernels, layer)
    results = []
    for together in (True, False):
        permutation = torch.randperm(r, generator=torch.Generator().manual_seed(3)).int()
        rows = Rows(x.data_ptr(), True, permutation.data_ptr(), None)
        if by_token == "dealt":
            permutation = torch.full((r,), -1).int()
            rows = Rows(x.data_ptr(), True, None, permutation.data_ptr())
        hidden, pre = layer.empty(f, dtype), layer.empty(layer.num_up, dtype)
        y = torch.full((r, d), torch.nan, dtype=dtype)
        up = operands_of(rows=rows, b=up_weight, bias=up_bias, hidden=hidden, pre_activation=pre)
        down = operands_of(
            a=hidden, b=down_weight, bias=down_bias, permutation=permutation, routing_weights=routing_weights, out=y
        )
        if together:
            assert kernels.forward(*map(ctypes.byref, (layer, up, down)), ctypes.c_void_p(flags.data_ptr())) == b""
        else:
            assert kernels.run(CALLS.index("up"), ctypes.byref(layer), ctypes.byref(up)) == b""
            assert kernels.run(CALLS.index("down"), ctypes.byref(layer), ctypes.byref(down)) == b""
        results.append((permutation, layer.by_row(hidden), layer.by_row(pre), y))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert not flags.any()
    assert y.isfinite().all()


class TestOneLaunch:
    @pytest.mark.parametrize("sizes", [(1, 1, 8, 8), (301, 2, 72, 136), (700, 1, 264, 200), (5, 8, 16, 72)], ids=str)
    def test_dealt(self, sizes, kernels, machine):
        check_forward(kernels, layer_of(torch.bfloat16, *sizes, seed=5))
        check_forward(kernels, layer_of(torch.float16, *sizes, "silu", True, 3, 0.3))

    @pytest.mark.parametrize("sizes", GIVEN, ids=str)
    def test_given(self, sizes, kernels, machine):
        check_forward(kernels, layer_of(torch.bfloat16, sum(sizes), sizes, 72, 200), "given")

    @pytest.mark.parametrize("mode", MODES)
    def test_whatever_comes_first(self, mode, kernels, machine):
        for seed, multiprocessors in ((1, 2), (2, 4), (3, 6)):
            machine(seed, mode, multiprocessors)
            check_forward(kernels, layer_of(torch.bfloat16, 600, 1, 136, 200))


def check_grad_pre(kernels, layer, routed=False):
    """Returns grad_pre."""
    dtype, (r, e, d, f) = dtype_of(layer), (layer.num_rows, layer.num_experts, layer.d_model, layer.d_ff)
    grad_y, weight = normal(r, d, dtype=dtype), normal(e, d, f, dtype=dtype, scale=d**-0.5, seed=1)
    pre = normal(r, layer.num_up, dtype=dtype, seed=2)
    grad, hidden = layer.empty(layer.num_up, dtype), layer.empty(f, dtype)
    routing = {}
    if routed:
        permutation = torch.randperm(r, generator=torch.Generator().manual_seed(3)).int()
        pieces = torch.full((-(-f // 64), r), torch.nan)
        routing = {"routing_weights": normal(r, seed=4), "permutation": permutation, "partial_routing": pieces}
    operands = {"a": layer.by_slot(grad_y), "b": weight, "pre_activation": layer.by_slot(pre), **routing}
    run(kernels, "grad_pre", layer, out=grad, hidden=hidden, **operands)
    exact_pre = pre.double().requires_grad_()
    exact, grad_hidden = hidden_of(layer, exact_pre), product(layer, grad_y, weight.mT)
    if routed:
        of_weights = (exact.detach() * grad_hidden).sum(1)
        assert is_near(pieces.sum(0), of_weights, torch.bfloat16)
        grad_hidden = grad_hidden * routing["routing_weights"][permutation.long(), None].double()
    (exact_grad,) = torch.autograd.grad(exact, exact_pre, grad_hidden)
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
        for routed in (False, True):
            layer = layer_of(torch.bfloat16, 301, 2, 72, 136, gated=gated, seed=7, dropout_p=0.3)
            check_grad_pre(kernels, layer, routed)

    @pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
    @pytest.mark.parametrize("sizes", [(301, 2, 72, 136), (321, (0, 64, 257), 72, 136)], ids=["equal", "given"])
    def test_routing_weights(self, sizes, gated, kernels, machine):
        check_grad_pre(kernels, layer_of(torch.bfloat16, *sizes, gated=gated), routed=True)

    @pytest.mark.parametrize("mode", MODES)
    def test_whatever_comes_first(self, mode, kernels, machine):
        layer, results = layer_of(torch.bfloat16, 500, 1, 136, 264), []
        for seed, multiprocessors in ((1, 2), (2, 4), (3, 6)):
            machine(seed, mode, multiprocessors)
            results.append(check_grad_pre(kernels, layer))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("dtype", "sums_dtype"), [*((torch.bfloat16, sums) for sums in NUMBER_TYPES), (torch.float16, torch.float16)]
)
@pytest.mark.parametrize(
    ("groups", "size_m", "size_n", "splits"),
    [
        *[((1,), 8, 8, 1), ((1, 0, 1), 16, 8, 1), ((64,), 256, 256, 1), ((150, 151), 264, 72, 3)],
        *[((550, 550), 72, 520, 5), ((0, 650, 257, 193), 72, 136, 5)],
    ],
)
def test_grad_of_weights(groups, size_m, size_n, splits, sums_dtype, dtype, kernels, machine):
    num_rows, num_experts = sum(groups), len(groups)
    is_equal = max(groups) - min(groups) <= 1 and num_experts != 3
    layer = layer_of(dtype, num_rows, num_experts if is_equal else groups, 8, 8)
    assert kernels.splits_of(ctypes.byref(layer), size_m, size_n) == splits
    a, b = normal(num_rows, size_m, dtype=dtype), normal(num_rows, size_n, dtype=dtype, seed=1)
    sums = None if sums_dtype is None else torch.full((num_experts, size_m), torch.nan, dtype=sums_dtype)
    of_parts = {"parts": torch.empty(num_experts, splits, size_m, size_n)}
    if sums is not None:
        of_parts["part_sums"] = torch.empty(num_experts, splits, size_m)
    slots = layer.by_slot(a), layer.by_slot(b)
    of_experts = list(zip(a.double().split(layer.sizes), b.double().split(layer.sizes), strict=True))
    exact, exact_sums = (torch.stack(t) for t in zip(*((a.mT @ b, a.sum(0)) for a, b in of_experts), strict=True))
    for seed, mode in enumerate(MODES, 1):
        out_dtype = torch.float32 if mode == "random" else dtype
        out = torch.full((num_experts, size_m, size_n), torch.nan, dtype=out_dtype)
        for part in of_parts.values():
            part.fill_(torch.nan)
        machine(seed, mode)
        run(
            kernels, "grad_weight", layer, a=slots[0], b=slots[1], out=out, size_m=size_m, size_n=size_n,
            splits=splits, sums=sums, **of_parts,
        )  # fmt: skip
        assert is_near(out, exact, out_dtype)
        if sums is not None:
            assert is_near(sums, exact_sums, sums_dtype)


class TestRowsBySlot:
    @pytest.mark.parametrize("sizes", [(2, 3), (301, 2), (700, 2), (5, (0, 5, 0)), (322, (64, 1, 0, 257))], ids=str)
    def test_gather(self, sizes, kernels, machine):
        num_rows, groups = sizes
        layer = layer_of(torch.bfloat16, num_rows, groups, 264, 8, top_k=2 - num_rows % 2)
        tabulate(kernels, layer)
        x, grad_y = (normal(num_rows // layer.top_k, 264, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
        permutation = torch.randperm(num_rows, generator=torch.Generator().manual_seed(3)).int()
        weights, tokens = normal(num_rows, seed=4), permutation.long() // layer.top_k
        out = {name: layer.empty(264, torch.bfloat16) for name in ("x", "of_grad_y", "weighted")}
        rows = Rows(x.data_ptr(), False, permutation.data_ptr(), None)
        to = Gathered(**pointers({**out, "grad_y": grad_y, "routing_weights": weights}))
        assert kernels.gather(ctypes.byref(layer), ctypes.byref(rows), ctypes.byref(to)) == b""
        used = layer.first_slots[-1]
        scaled = (grad_y[tokens].float() * weights[permutation.long(), None]).bfloat16()
        for ours, expected in zip(out.values(), (x[tokens], grad_y[tokens], scaled), strict=True):
            assert torch.equal(ours[:used], layer.by_slot(expected)[:used])
            assert ours[used:].isnan().all()

    def test_deals(self, kernels, machine):
        layer, x = layer_of(torch.float16, 301, 2, 8, 8, seed=9), normal(301, 8, dtype=torch.float16)
        seed = torch.tensor(9)
        layer.seed.value, layer.seed.at = 0, seed.data_ptr()
        out, dealt = layer.empty(8, torch.float16), torch.zeros(301).int()
        rows, to = Rows(x.data_ptr(), False, None, dealt.data_ptr()), Gathered(x=out.data_ptr())
        assert kernels.gather(ctypes.byref(layer), ctypes.byref(rows), ctypes.byref(to)) == b""
        assert torch.equal(dealt, reference.random_permutation(301, seed))
        assert torch.equal(out, layer.by_slot(x[dealt.long()]))


@pytest.mark.parametrize(
    ("offsets", "num_rows", "expected"),
    [
        ([0, 3, 3, 600], 600, [0, 3, 3, 600]),
        # Whatever they are, each row has an expert.
        ([5, 3, 900, -1], 600, [0, 3, 600, 600]),
        ([0] * 40 + [1] * 40, 600, [0] * 40 + [1] * 39 + [600]),
        (list(range(0, 300 * 71, 300)), 300 * 70, list(range(0, 300 * 71, 300))),
    ],
    ids=["given", "wrong", "many", "more than a warp"],
)
def test_table_of_groups(offsets, num_rows, expected, kernels, machine):
    layer = layer_of(torch.bfloat16, num_rows, [num_rows] + [0] * (len(offsets) - 2), 8, 8)
    table = tabulate(kernels, layer, torch.tensor(offsets).int()).tolist()
    sizes = [b - a for a, b in itertools.pairwise(expected)]
    layer.given = sizes
    pairs = [[e, row] for e, size in enumerate(sizes) for row in range(0, size, 256)]
    of_experts = [list(of) for of in zip(expected, sizes, layer.first_slots, strict=False)]
    assert table[0] == len(pairs)
    rest = [number for numbers in of_experts + pairs for number in numbers]
    assert table[1 : 1 + len(rest)] == rest
    assert set(table[1 + len(rest) :]) <= {-1}


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
            (
                (8, 1, 8, 8),
                "grad_weight",
                {"size_m": 8, "size_n": 4, "splits": 1},
                "sizes must be multiples of 8, got 4",
            ),
            ((8, 1, 8, 8), "down", {"out": Number(8)}, "operands must begin at 16 bytes"),
            ((8, 1, 8, 8), "up", {"rows": Rows(16, True), "top_k": 2}, "top_k must be 1"),
            ((2**30, 1, 64, 8), "up", {"rows": Rows(16, True)}, "x by token must be smaller"),
            ((8, 1, 8, 8), "up", {"rows": Rows(16, True), "activation": "relu"}, "are for gelu and silu"),
            ((8, (8,), 8, 8), "up", {}, "need a table"),
        ],
    )
    def test_what(self, sizes, call, changes, expected, kernels, machine):
        changes = dict(changes)
        of_layer = {name: changes.pop(name) for name in ("activation", "top_k") if name in changes}
        layer = layer_of(torch.bfloat16, *sizes, **of_layer)
        operands = Operands(**changes)
        said = kernels.run(CALLS.index(call), ctypes.byref(layer), ctypes.byref(operands)).decode()
        assert expected in said

    def test_too_few_multiprocessors(self, kernels, machine):
        layer = layer_of(torch.bfloat16, 8, 1, 8, 8)
        layer.where.multiprocessors = 1
        assert b"two multiprocessors" in kernels.run(0, ctypes.byref(layer), ctypes.byref(Operands()))


def test_what_is_infinite_where_no_row_is(kernels, machine):
    """The last slot of a smaller group is multiplied with zeros."""
    layer = layer_of(torch.float16, 3, 2, 8, 8, "relu2")
    pre, grad_y = torch.full((4, 8), 300.0).half(), layer.by_slot(normal(3, 8, dtype=torch.float16))
    pre[0] = pre[2:] = 1.0
    weight, grad, hidden = (
        normal(2, 8, 8, dtype=torch.float16),
        layer.empty(8, torch.float16),
        layer.empty(8, torch.float16),
    )
    run(kernels, "grad_pre", layer, a=grad_y, b=weight, pre_activation=pre, out=grad, hidden=hidden)
    assert grad.isfinite().all()
    assert torch.equal(hidden[1], torch.zeros(8).half())
