"""`expert_linear` against its specification in float64, and the specification against the formula written out."""

import itertools
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, check_frozen, output_and_grads, random_ffn
from test_fused import BFLOAT16_SLACK, DEVICE
from test_launches import BAD_OFFSETS
from test_ops import opcheck
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import ewa_kernels as ewa
from ewa_kernels import linear
from ewa_kernels.kernels import extension, multiprocessors
from ewa_kernels.kernels import linear as kernels
from ewa_kernels.kernels.triton import linear as triton_linear
from ewa_kernels.kernels.triton.layer import check_sizes
from ewa_kernels.problem import Places, Problem

# Triton's kernels run where there is a GPU, else in its interpreter; the others are tested on the CPU.
BACKENDS = ["cpp", "torch", "reference", "triton"]
SIDES = [(False, False), (True, False), (False, True), (True, True)]
SIDE_NAMES = ["in order", "gather", "scatter", "gather and scatter"]
by_sides = pytest.mark.parametrize(("gather", "scatter"), SIDES, ids=SIDE_NAMES)
by_backends = pytest.mark.parametrize("backend", BACKENDS)


def operands(*shape, d_out=20, num_experts=4, bias=True, dtype=torch.float32, device="cpu"):
    """x, weight and bias, of such a size that the result is of order 1."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
    weight, offset, _, _ = random_ffn(num_experts, shape[-1], d_out, dtype=dtype)
    return x, weight.to(device), offset.to(device) if bias else None


def partition(*offsets, gather=True, scatter=False, device="cpu"):
    """Into groups that begin at these rows, and end at the last."""
    permutation = torch.randperm(offsets[-1], generator=torch.Generator().manual_seed(3))
    return {
        "permutation": permutation.to(device),
        "expert_offsets": torch.tensor(offsets, device=device),
        "gather": gather,
        "scatter": scatter,
    }


def device_of(backend):
    return DEVICE if backend == "triton" else "cpu"


def check(given, backend, slack=1.0, **options):
    """Output and all gradients against the specification in float64."""
    x, weight, _ = given
    grad = torch.randn(*x.shape[:-1], weight.shape[1], generator=torch.Generator().manual_seed(1)).to(x)
    wide = tuple(None if t is None else t.double() for t in given)
    exact = output_and_grads(ewa.reference.expert_linear, wide, grad.double(), **options)
    baseline = output_and_grads(ewa.reference.expert_linear, given, grad, **options)
    actual = output_and_grads(ewa.functional.expert_linear, given, grad, backend=backend, **options)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        if exact[name].any() or exact[name].numel() == 0:
            assert_parity(name, value, exact[name], baseline[name], slack)
        else:  # of no rows
            assert torch.equal(value, torch.zeros_like(value)), f"{name} must be zero"


@by_sides
def test_specification_is_the_formula(gather, scatter):
    """Row by row."""
    x, weight, bias = operands(11, 6, num_experts=3, dtype=torch.float64)
    options = partition(0, 4, 4, 11, gather=gather, scatter=scatter)
    out = ewa.reference.expert_linear(x, weight, bias, **options)
    for row, token in enumerate(options["permutation"].tolist()):
        e = 0 if row < 4 else 2
        expected = weight[e] @ x[token if gather else row] + bias[e]
        torch.testing.assert_close(out[token if scatter else row], expected)


@by_sides
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *itertools.product(["cpp", "torch"], [torch.float32, torch.float16, torch.bfloat16]),
        ("torch", torch.float64),
        ("triton", torch.float32),
        ("triton", torch.float16),
    ],
)
def test_every_dtype(backend, dtype, bias, gather, scatter):
    device = device_of(backend)
    options = partition(0, 9, 9, 40, 41, gather=gather, scatter=scatter, device=device)
    check(operands(41, 24, bias=bias, dtype=dtype, device=device), backend, **options)


@pytest.mark.parametrize(("gather", "scatter"), SIDES[1:3], ids=SIDE_NAMES[1:3])
def test_bfloat16_by_triton(gather, scatter):
    options = partition(0, 9, 9, 40, 41, gather=gather, scatter=scatter, device=DEVICE)
    check(operands(41, 24, dtype=torch.bfloat16, device=DEVICE), "triton", BFLOAT16_SLACK, **options)


@pytest.mark.parametrize(("gather", "scatter"), SIDES[1:3], ids=SIDE_NAMES[1:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_of_our_own_on_a_cpu(dtype, gather, scatter):
    """In bfloat16 they are for many rows; what has odd sizes is padded by them."""
    offsets = (0, 300, 301, 301, 1100)
    check(operands(1100, 33, d_out=47, dtype=dtype), "cpp", **partition(*offsets, gather=gather, scatter=scatter))


@pytest.mark.skipif(extension.WHY_NOT is not None, reason="the extension is not built")
def test_a_processor_without_products_of_ours(products_by):
    products_by("torch")
    for dtype in (torch.float32, torch.bfloat16):
        check(operands(41, 24, dtype=dtype), "cpp", **partition(0, 9, 9, 40, 41, scatter=True))


@by_backends
@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        pytest.param((64, 16), (0, 16, 32, 48, 64), id="aligned"),
        pytest.param((67, 17), (0, 1, 30, 31, 67), id="ragged, odd D_in"),
        pytest.param((3, 16), (0, 1, 1, 2, 2, 3), id="R < E"),
        pytest.param((0, 16), (0, 0, 0), id="R = 0"),
        pytest.param((1, 16), (0, 0, 1), id="R = 1"),
        pytest.param((16,), (0, 1, 1), id="one row without leading sizes"),
        pytest.param((50, 16), (0, 50), id="E = 1: a linear layer"),
        pytest.param((40, 16), (0, 0, 0, 40, 40), id="all to one expert"),
        pytest.param((2, 3, 5, 16), (0, 7, 30), id="4-D: channels-last images"),
        pytest.param((7, 0, 16), (0, 0, 0), id="an empty batch"),
        pytest.param((40, 1), (0, 11, 40), id="D_in = 1"),
    ],
)
def test_every_shape(shape, offsets, backend):
    device = device_of(backend)
    given = operands(*shape, d_out=21, num_experts=len(offsets) - 1, device=device)
    check(given, backend, **partition(*offsets, device=device))


def test_sums_in_parts(monkeypatch):
    """Of rows enough for the gradient of a weight to be split, and of several column tiles."""
    seen, splits = [], triton_linear.splits
    monkeypatch.setattr(triton_linear, "splits", lambda *args: seen.append(splits(*args)) or seen[-1])
    monkeypatch.setattr(multiprocessors, "count", lambda device: 50)
    given = operands(600, 40, d_out=72, num_experts=2, device=DEVICE)
    check(given, "triton", **partition(0, 270, 600, scatter=True, device=DEVICE))
    assert seen[0] > 1


@by_backends
def test_non_contiguous_inputs(backend):
    device = device_of(backend)
    x, weight, bias = operands(40, 24, device=device)
    x = x.t().contiguous().t()
    weight, bias = weight.mT.contiguous().mT, bias.repeat_interleave(2, dim=1)[:, ::2]
    options = partition(0, 9, 9, 30, 40, device=device)
    options["permutation"] = options["permutation"].repeat_interleave(2)[::2]
    assert not any(t.is_contiguous() for t in (x, weight, bias, options["permutation"]))
    check((x, weight, bias), backend, **options)


@by_backends
def test_indices_of_both_types(backend):
    device = device_of(backend)
    given, options = operands(41, 8, device=device), partition(0, 9, 9, 40, 41, device=device)
    narrow = {n: v.int() if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    out = ewa.functional.expert_linear(*given, **options, backend=backend)
    assert torch.equal(out, ewa.functional.expert_linear(*given, **narrow, backend=backend))


@by_backends
@pytest.mark.parametrize("activation", [F.gelu, F.relu])
def test_a_pair_is_the_layer(activation, backend):
    """What is between the two is anybody's."""
    device = device_of(backend)
    x = operands(2, 37, 16, device=device)[0]
    parameters = [t.to(device) for t in random_ffn(4, 16, 24, dtype=torch.float32)]
    offsets = torch.tensor(ewa.functional.expert_offsets(74, 4), device=device)
    order = {"permutation": ewa.functional.random_permutation(74, 5, device=device), "expert_offsets": offsets}

    def pair(x, up_weight, up_bias, down_weight, down_bias):
        hidden = ewa.functional.expert_linear(x, up_weight, up_bias, **order, gather=True, backend=backend)
        assert hidden.shape == (2, 37, 24)
        return ewa.functional.expert_linear(
            activation(hidden), down_weight, down_bias, **order, scatter=True, backend=backend
        )

    options = {"seed": 5, "activation": activation.__name__}
    wide = tuple(t.double() for t in (x, *parameters))
    exact = output_and_grads(ewa.reference.moe_ffn, wide, x.double(), **options)
    baseline = output_and_grads(ewa.reference.moe_ffn, (x, *parameters), x, **options)
    for name, ours in output_and_grads(pair, (x, *parameters), x).items():
        assert_parity(name, ours, exact[name], baseline[name])


@by_backends
@by_sides
def test_nan_stays_in_its_row(gather, scatter, backend):
    device = device_of(backend)
    (x, weight, bias), options = operands(40, 16, device=device), partition(0, 9, 9, 30, 40, device=device)
    options |= {"gather": gather, "scatter": scatter, "backend": backend}
    clean = ewa.functional.expert_linear(x, weight, bias, **options)
    x[13, 5] = torch.nan
    out = ewa.functional.expert_linear(x, weight, bias, **options)
    places = options["permutation"].tolist()
    row = places.index(13) if gather else 13
    place = places[row] if scatter else row
    assert out[place].isnan().all()
    others = torch.arange(40) != place
    assert torch.equal(out[others], clean[others])


@by_backends
@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "all but x", "all but weight", "all but bias"])
def test_frozen_operands_get_no_gradient_and_change_no_other(frozen, backend):
    names, device = ["x", "weight", "bias"], device_of(backend)
    values = dict(zip(names, operands(30, 8, d_out=12, device=device), strict=True))
    options = partition(0, 9, 9, 29, 30, gather=True, scatter=True, device=device)
    check_frozen(partial(ewa.functional.expert_linear, **options, backend=backend), values, frozen)


def test_x_is_kept_for_the_gradient_of_the_weight_alone():
    x, weight, bias = operands(30, 8)
    for frozen in (False, True):
        kept = []
        leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen), bias.clone().requires_grad_())
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):  # noqa: B023
            ewa.functional.expert_linear(*leaves, **partition(0, 9, 9, 29, 30))
        assert (x.shape in kept) == (not frozen)
        assert all(shape.numel() <= weight.numel() for shape in kept if shape != x.shape)


@pytest.mark.parametrize("backend", ["cpp", "torch", "triton"])
def test_unwritten_memory_is_never_read(monkeypatch, backend):
    """With every fresh tensor full of NaN, results are the same."""
    device = device_of(backend)

    def poisoned(make):
        def fresh(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(2**30)

        return fresh

    given, options = (
        operands(41, 24, device=device),
        partition(0, 9, 9, 40, 41, gather=True, scatter=True, device=device),
    )
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    check(given, backend, **options)


@by_backends
@pytest.mark.parametrize("shape", [(40, 16), (2, 5, 4, 16), (16,)], ids=str)
def test_result_may_be_changed_in_place(shape, backend):
    device = device_of(backend)
    x, weight, bias = operands(*shape, d_out=16, num_experts=1, device=device)
    options = partition(0, x.numel() // 16, scatter=True, device=device)
    x.requires_grad_()
    out = ewa.functional.expert_linear(x, weight, bias, **options, backend=backend)
    (expected,) = torch.autograd.grad((out + x).sum(), x)
    out = ewa.functional.expert_linear(x, weight, bias, **options, backend=backend)
    out += x
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)


@by_backends
@pytest.mark.parametrize("shape", [(40, 16), (2, 5, 4, 16)], ids=str)
def test_autocast(shape, backend):
    """As F.linear: 16-bit output, float32 gradients; float64 is left alone."""
    device = device_of(backend)
    leaves = [t.requires_grad_() for t in operands(*shape, device=device)]
    options = partition(0, 9, 9, 30, 40, device=device)
    with torch.autocast(device, torch.float16):
        out = ewa.functional.expert_linear(*leaves, **options, backend=backend)
        baseline = ewa.functional.expert_linear(*leaves, **options, backend="reference")
        wide = ewa.functional.expert_linear(*(t.double() for t in leaves), **options)
    assert (out.dtype, baseline.dtype, wide.dtype) == (torch.float16, torch.float16, torch.float64)
    assert_parity("out", out, wide, baseline)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    baselines = torch.autograd.grad(baseline.float().square().sum(), leaves)
    exact = torch.autograd.grad(wide.square().sum(), leaves)
    for ours, theirs, value in zip(grads, baselines, exact, strict=True):
        assert ours.dtype == torch.float32
        assert_parity("gradient", ours, value.double(), theirs)


# --- what it says to what it cannot take ---

X, WEIGHT, BIAS = operands(5, 6, d_out=3, num_experts=2)
ORDER = partition(0, 2, 5)


def call(x=X, weight=WEIGHT, bias=BIAS, **changes):
    return ewa.functional.expert_linear(x, weight, bias, **{**ORDER, **changes})


CASES = [
    (lambda: call([1.0]), TypeError, "x must be a Tensor, got list"),
    (lambda: call(X.int()), TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int32"),
    (lambda: call(weight=None), TypeError, "weight must be a Tensor, got NoneType"),
    (lambda: call(weight=WEIGHT.double()), TypeError, "weight must be torch.float32 like x, got torch.float64"),
    (lambda: call(bias=BIAS.half()), TypeError, "bias must be torch.float32 like x, got torch.float16"),
    (lambda: call(bias=BIAS.to("meta")), TypeError, "bias must be on cpu like x, got meta"),
    (lambda: call(weight=WEIGHT[0]), ValueError, "weight must be [E, D_out, D_in] with no size 0, got [3, 6]"),
    (lambda: call(weight=WEIGHT[:, :0]), ValueError, "weight must be [E, D_out, D_in] with no size 0, got [2, 0, 6]"),
    (lambda: call(bias=BIAS[0]), ValueError, "bias must be [E, D_out] = [2, 3], got [3]"),
    (lambda: call(X[:, :4]), ValueError, "x must be [..., D_in] with D_in = 6, got [5, 4]"),
    (lambda: call(X[0, 0]), ValueError, "x must be [..., D_in] with D_in = 6, got []"),
    (lambda: call(permutation=[0]), TypeError, "permutation must be a Tensor, got list [0]"),
    (lambda: call(permutation=X), TypeError, "permutation must be int32 or int64, got torch.float32"),
    (lambda: call(permutation=torch.arange(4)), ValueError, "permutation must be [T] = [5], got [4]"),
    (lambda: call(expert_offsets=[0, 2, 5]), TypeError, "expert_offsets must be a Tensor, got list [0, 2, 5]"),
    (lambda: call(expert_offsets=torch.tensor([0, 5])), ValueError, "expert_offsets must be [E + 1] = [3], got [2]"),
    (
        lambda: call(expert_offsets=torch.tensor([0, 6, 5])),
        ValueError,
        "expert_offsets must rise from 0 to T = 5, got [0, 6, 5]",
    ),
    (lambda: call(permutation=torch.ones(5).int()), ValueError, "permutation must hold each of 0…4 once"),
    (lambda: call(permutation=torch.arange(5) + 2**32), ValueError, "permutation must hold each of 0…4 once"),
    (lambda: call(gather=1), TypeError, "gather must be a bool, got int 1"),
    (lambda: call(scatter=None), TypeError, "scatter must be a bool, got None"),
    (
        lambda: call(backend="hopper"),
        ewa.BackendError,
        f"backend='hopper' cannot run expert_linear on cpu: ewa_kernels {ewa.__version__} has triton, cpp, torch and "
        "reference only",
    ),
    (
        lambda: call(X.double(), WEIGHT.double(), BIAS.double(), backend="cpp"),
        ewa.BackendError,
        "backend='cpp' cannot run expert_linear on cpu: it is for torch.float16, torch.bfloat16 and torch.float32, not "
        "torch.float64",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), CASES, ids=range(len(CASES)))
def test_message(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message


def test_too_many_experts_for_triton():
    problem = Problem.of_linear(5, torch.empty(2**15 + 1, 1, 1), "triton", torch.float32, (torch.float32,) * 3)
    with pytest.raises(ValueError, match="weight must hold at most 32768 experts"):
        check_sizes(problem, "weight")


@pytest.mark.parametrize("offsets", BAD_OFFSETS)
def test_triton_stays_within_the_tensors(offsets):
    """Of a wrong partition, which on a GPU nobody looks at: what is read and written lies between walls of NaN."""

    def walled(*shape):
        memory = torch.full((3, *shape), torch.nan, device=DEVICE)
        memory[1] = torch.randn(shape)
        return memory[1]

    x, weight, bias, grad = (walled(*shape) for shape in ((70, 24), (4, 20, 24), (4, 20), (70, 20)))
    permutation = torch.arange(70, dtype=torch.int32, device=DEVICE)
    permutation[[0, 9, 50]] = torch.tensor([-5, 2**31 - 1, 70], dtype=torch.int32, device=DEVICE)
    places = Places(permutation, torch.tensor(offsets, dtype=torch.int32, device=DEVICE), True, True)
    problem = Problem.of_linear(70, weight, "triton", x.dtype, (x.dtype,) * 3)
    existing = permutation.clamp(0, 69).long()
    out = kernels.forward(problem, places, x, weight, bias)
    grad_x, *of_parameters = kernels.backward(problem, places, grad, x, weight, (True, True, True))
    for value in (out[existing], grad_x[existing], *of_parameters):
        assert value.isfinite().all()


# --- who watches ---


def arguments(backend, requires_grad=True, dtype=torch.float32, bias=True):
    device = device_of(backend)
    leaves = operands(21, 6, d_out=10, bias=bias, dtype=dtype, device=device)
    leaves = [None if t is None else t.requires_grad_(requires_grad) for t in leaves]
    options = partition(0, 4, 4, 20, 21, device=device)
    return (*leaves, options["permutation"].int(), options["expert_offsets"].int(), True, False, backend)


@pytest.mark.parametrize("backend", ["cpp", "torch", "triton"])
def test_opcheck(backend):
    opcheck(linear.expert_linear_operation, arguments(backend))
    opcheck(linear.expert_linear_operation, arguments(backend, requires_grad=False, bias=False))


@pytest.mark.parametrize("mask", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "torch", "triton"])
def test_opcheck_backward(backend, mask):
    x, weight, _, *places, _ = arguments(backend, requires_grad=False)
    kept = x if mask[1] else None
    for dtype in (torch.float32, torch.float64) if backend == "cpp" else (torch.float32,):
        grad = torch.randn(21, 10, device=weight.device)
        opcheck(linear.expert_linear_backward, (grad, kept, weight, *places, mask, backend, dtype))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradcheck(bias):
    leaves = arguments("torch", dtype=torch.float64, bias=bias)[:3]
    options = partition(0, 4, 4, 20, 21, scatter=True)
    given = [t for t in leaves if t is not None]

    def function(*given):
        return ewa.functional.expert_linear(*given[:2], given[2] if bias else None, **options)

    assert torch.autograd.gradcheck(function, given)


def test_compiled_for_any_number_of_tokens():
    """Once for the first, and once for all others."""
    torch.compiler.reset()
    weight, counter = WEIGHT.clone().requires_grad_(), CompileCounterWithBackend("aot_eager")

    def function(x, **order):
        return ewa.functional.expert_linear(x, weight, BIAS, **order)

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for num_tokens in (4, 9, 17, 6, 33):
        x, order = torch.randn(num_tokens, 6), partition(0, 3, num_tokens)
        results = [f(x, **order) for f in (function, compiled)]
        assert torch.equal(*results)
        grads = [torch.autograd.grad(out.square().sum(), weight)[0] for out in results]
        assert torch.equal(*grads)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiled_without_a_break(backend):
    """With the same bits as eager, gradients too, under autocast as without."""
    torch.compiler.reset()
    leaves, options = arguments("cpp")[:3], partition(0, 4, 4, 20, 21)

    def function(x, weight, bias):
        return F.silu(ewa.functional.expert_linear(x, weight, bias, **options, backend=backend)).square().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            losses = [f(*leaves) for f in (function, compiled)]
        grads = [torch.autograd.grad(loss, leaves) for loss in losses]
        assert all(map(torch.equal, *grads))


def test_values_are_checked_in_what_is_compiled():
    torch.compiler.reset()
    compiled = torch.compile(call, backend="aot_eager")
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=re.escape("permutation must hold each of 0…4 once")):
            compiled(permutation=torch.tensor([0, 1, 2, 3, 9]), backend=backend)


def test_who_sees_the_operation():
    x = X.clone()
    traced = make_fx(lambda x: call(x))(x)
    assert linear.expert_linear_operation in [node.target for node in traced.graph.nodes]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = call(mode.from_tensor(x))
    assert (type(out).__name__, out.shape) == ("FakeTensor", (5, 3))


def test_eager_goes_straight(monkeypatch):
    for name in ("expert_linear_operation", "expert_linear_backward"):
        monkeypatch.setattr(linear, name, lambda *_: pytest.fail("an operation was called"))
    call(X.clone().requires_grad_()).sum().backward()


def test_flops():
    """The matrix products that are made."""
    weight = WEIGHT.clone().requires_grad_()
    for x, products in ((X.clone().requires_grad_(), 3), (X, 2)):
        with FlopCounterMode(display=False) as counter:
            call(x, weight).sum().backward()
        assert counter.get_total_flops() == products * 2 * 5 * 6 * 3


def test_second_derivative_raises_and_the_reference_has_one():
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='expert_linear has no second derivative: use backend="reference"'):
        grad.sum().backward()
    leaves = [t.double().requires_grad_() for t in (X, WEIGHT, BIAS)]
    assert torch.autograd.gradgradcheck(lambda *t: call(*t, backend="reference").square(), leaves)


def test_forward_mode_raises_and_the_reference_has_it():
    with pytest.raises(RuntimeError, match="expert_linear does not support forward-mode AD"):
        torch.func.jvp(call, (X,), (X,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="expert_linear does not support forward-mode AD"):
        call(forward_ad.make_dual(X, X))
    _, tangent = torch.func.jvp(lambda x: call(x, backend="reference"), (X,), (X,))
    torch.testing.assert_close(tangent, call(X, bias=None))


def test_func_grad_raises_rather_than_being_wrong():
    with pytest.raises(RuntimeError, match=r'expert_linear does not support torch.func.grad.*"reference"'):
        torch.func.grad(lambda x: call(x).sum())(X)


def test_vmap_is_the_loop():
    batch = torch.randn(3, 5, 6, requires_grad=True)
    together, one_by_one = torch.func.vmap(call)(batch), torch.stack([call(x) for x in batch])
    torch.testing.assert_close(together, one_by_one)
    grads = [torch.autograd.grad(out.square().sum(), batch) for out in (together, one_by_one)]
    torch.testing.assert_close(*grads)
