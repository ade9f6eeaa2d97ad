"""`moe_ffn` against the specification in float64, and the specification against the formula written out."""

import concurrent.futures
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, check_ffn, check_frozen, random_ffn

import ewa_kernels as ewa
from ewa_kernels.kernels.blocked import moe_ffn as blocked_ffn
from ewa_kernels.kernels.blocked.torch_rows import TorchRows
from ewa_kernels.kernels.scratch import Scratch

ACTIVATIONS = ["gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu", "identity"]
BACKENDS = ["cpp", "torch", "reference"]


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_specification_is_the_formula(activation, gated):
    """Token by token, with nothing shared with the specification but the permutation."""
    act = {
        "gelu": lambda v: v * 0.5 * (1 + torch.erf(v / 2**0.5)),
        "gelu_tanh": lambda v: v * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))),
        "quick_gelu": lambda v: v / (1 + torch.exp(-1.702 * v)),
        "relu": lambda v: v * (v > 0),
        "relu2": lambda v: v * v * (v > 0),
        "silu": lambda v: v / (1 + torch.exp(-v)),
        "identity": lambda v: v,
    }[activation]
    x, (up_weight, up_bias, down_weight, down_bias) = tokens(11, 6), random_ffn(3, 6, 5, gated=gated)
    y = ewa.reference.moe_ffn(x, up_weight, up_bias, down_weight, down_bias, seed=5, activation=activation, gated=gated)
    permutation = ewa.functional.random_permutation(11, 5).tolist()
    for row, token in enumerate(permutation):
        e = next(e for e in range(3) if 11 * e // 3 <= row < 11 * (e + 1) // 3)
        pre = up_weight[e] @ x[token] + up_bias[e]
        hidden = act(pre[:5]) * pre[5:] if gated else act(pre)
        torch.testing.assert_close(y[token], down_weight[e] @ hidden + down_bias[e])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("cpp", torch.float32),
        ("cpp", torch.float16),
        ("cpp", torch.bfloat16),
        ("torch", torch.float64),
        ("torch", torch.float32),
        ("torch", torch.float16),
        ("torch", torch.bfloat16),
    ],
)
def test_every_activation_in_every_dtype(backend, dtype, activation, gated, bias):
    check_ffn(
        tokens(75, 24, dtype=dtype),
        random_ffn(4, 24, 40, gated=gated, bias=bias, dtype=dtype),
        seed=3,
        activation=activation,
        gated=gated,
        backend=backend,
    )


def test_quick_gelu_near_the_largest_float16():
    """1.702 · pre is none any more."""
    pre = torch.tensor([[[6e4, -6e4]]], dtype=torch.float16)
    hidden, grad_pre = torch.full_like(pre, torch.nan), torch.full_like(pre, torch.nan)
    rows = TorchRows("quick_gelu", False, torch.float16, Scratch(pre.device, pre.dtype))
    rows.activate_backward(
        pre, torch.ones_like(pre), torch.zeros(1, dtype=torch.int64), None, None, grad_pre, hidden, None
    )
    assert hidden.flatten().tolist() == [6e4, 0]
    assert grad_pre.flatten().tolist() == [1, 0]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("cpp", torch.float32),
        ("torch", torch.float32),
        ("torch", torch.float64),
        ("reference", torch.float32),
        ("auto", torch.float32),
        ("auto", torch.bfloat16),
    ],
)
@pytest.mark.parametrize(
    ("shape", "num_experts"),
    [
        pytest.param((64, 16), 4, id="aligned"),
        pytest.param((67, 17), 4, id="ragged: groups of two sizes, odd D"),
        pytest.param((3, 16), 5, id="T < E: experts without a token"),
        pytest.param((0, 16), 4, id="T = 0"),
        pytest.param((1, 16), 4, id="T = 1"),
        pytest.param((16,), 4, id="one token without leading sizes"),
        pytest.param((50, 16), 1, id="E = 1: a dense FFN"),
        pytest.param((3, 21, 16), 4, id="3-D"),
        pytest.param((2, 3, 5, 16), 4, id="4-D: channels-last images"),
        pytest.param((7, 0, 16), 4, id="an empty batch"),
        pytest.param((40, 1), 4, id="D = 1"),
    ],
)
def test_every_shape(shape, num_experts, backend, dtype):
    parameters = random_ffn(num_experts, shape[-1], 20, dtype=dtype)
    check_ffn(tokens(*shape, dtype=dtype), parameters, seed=11, backend=backend)


@pytest.mark.parametrize("one_bias", ["up", "down"])
def test_one_bias_of_two(one_bias):
    up_weight, up_bias, down_weight, down_bias = random_ffn(3, 8, 12)
    parameters = (
        (up_weight, up_bias, down_weight, None) if one_bias == "up" else (up_weight, None, down_weight, down_bias)
    )
    check_ffn(tokens(20, 8), parameters, seed=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend):
    x = tokens(16, 50, dtype=torch.float32).t()[::2]
    up_weight, up_bias, down_weight, down_bias = random_ffn(4, 16, 24, dtype=torch.float32)
    parameters = (
        up_weight.mT.contiguous().mT,
        up_bias.repeat_interleave(2, dim=1)[:, ::2],
        down_weight.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        down_bias[:, :1].expand(-1, 16),
    )
    assert not any(t.is_contiguous() for t in (x, *parameters))
    check_ffn(x, parameters, seed=4, backend=backend)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_tokens", [200, 203])
def test_more_than_one_block(monkeypatch, num_tokens, gated):
    """Blocks end inside a group, and 16-bit gradients are not summed up over them."""
    monkeypatch.setattr(blocked_ffn, "rows_in_a_block", lambda *_: 64)
    for backend, dtype in itertools.product(("cpp", "torch"), (torch.float32, torch.bfloat16)):
        parameters = random_ffn(4, 16, 24, gated=gated, dtype=dtype)
        check_ffn(tokens(num_tokens, 16, dtype=dtype), parameters, seed=4, gated=gated, backend=backend)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dropout_p", [0.25, 1 - 2**-33, 1.0])
def test_dropout(dropout_p, gated):
    """Every backend draws the same mask; what is dropped entirely leaves the down bias."""
    x, parameters = tokens(90, 16, dtype=torch.float32), random_ffn(4, 16, 24, gated=gated, dtype=torch.float32)
    for backend in BACKENDS:
        options = {"seed": 2, "gated": gated, "dropout_p": dropout_p, "backend": backend}
        if dropout_p < 0.5:
            check_ffn(x, parameters, **options)
        else:
            y = ewa.functional.moe_ffn(x, *parameters, **options)
            assert all(any(torch.equal(row, bias) for bias in parameters[3]) for row in y)


def test_dropout_mask_is_as_random_as_claimed():
    """Rate, and independence of neighbours in both directions and across seeds, within 5 sigma."""
    rows, d_ff, p = torch.arange(2048), 512, 0.3
    masks = [
        (ewa.reference.dropout_scale(rows, d_ff, torch.tensor(seed), p, torch.float64) == 0).double() - p
        for seed in (0, 1)
    ]
    n, variance = masks[0].numel(), p * (1 - p)
    first, second = masks
    assert abs(first.sum()) < 5 * (n * variance) ** 0.5
    for other in (first.roll(1, 0), first.roll(1, 1), first.roll((1, 1), (0, 1)), first.roll(64, 0), second):
        assert abs((first * other).sum()) < 5 * n**0.5 * variance
    kept = ewa.reference.dropout_scale(rows, d_ff, torch.tensor(0), p, torch.float64)
    assert set(kept.unique().tolist()) == {0.0, 1 / (1 - p)}


def test_dropout_rate_zero_is_no_dropout():
    x, parameters = tokens(30, 8), random_ffn(2, 8, 12)
    plain = ewa.functional.moe_ffn(x, *parameters, seed=1)
    assert torch.equal(plain, ewa.functional.moe_ffn(x, *parameters, seed=1, dropout_p=0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend):
    x, parameters = tokens(40, 16, dtype=torch.float32), random_ffn(4, 16, 24, dtype=torch.float32)
    clean = ewa.functional.moe_ffn(x, *parameters, seed=1, backend=backend)
    x[13, 5] = torch.nan
    y = ewa.functional.moe_ffn(x, *parameters, seed=1, backend=backend)
    assert y[13].isnan().all()
    others = torch.arange(40) != 13
    assert torch.equal(y[others], clean[others])


def test_seed_tensor_and_int_agree():
    x, parameters = tokens(40, 16), random_ffn(4, 16, 24)
    for seed in (torch.tensor(9), torch.tensor([9]), torch.tensor([[9]])):
        y = ewa.functional.moe_ffn(x, *parameters, seed=seed)
        assert torch.equal(y, ewa.functional.moe_ffn(x, *parameters, seed=9))
    assert not torch.equal(y, ewa.functional.moe_ffn(x, *parameters, seed=10))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_unwritten_memory_is_never_read(monkeypatch, backend):
    """With every fresh tensor full of NaN, results are the same."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        fresh = new_empty(self, *args, **kwargs)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh.fill_(2**30)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for num_tokens, gated in [(41, False), (41, True), (3, False)]:
        x = tokens(num_tokens, 16, dtype=torch.float32)
        parameters = random_ffn(4, 16, 24, gated=gated, dtype=torch.float32)
        check_ffn(x, parameters, seed=1, gated=gated, backend=backend)


@pytest.mark.parametrize(
    "frozen", ["x", "up_weight", "up_bias", "down_weight", "down_bias", "all but x", "all but down_bias"]
)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frozen_inputs_get_no_gradient_and_change_no_other(dtype, frozen, gated):
    names = ["x", "up_weight", "up_bias", "down_weight", "down_bias"]
    values = (tokens(30, 8, dtype=dtype), *random_ffn(3, 8, 12, gated=gated, dtype=dtype))
    run = partial(ewa.functional.moe_ffn, seed=1, gated=gated)
    check_frozen(run, dict(zip(names, values, strict=True)), frozen)


def test_one_expert_is_a_dense_ffn():
    x, (up_weight, up_bias, down_weight, down_bias) = tokens(33, 8), random_ffn(1, 8, 12)
    dense = F.linear(F.gelu(F.linear(x, up_weight[0], up_bias[0])), down_weight[0], down_bias[0])
    torch.testing.assert_close(ewa.functional.moe_ffn(x, up_weight, up_bias, down_weight, down_bias, seed=0), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """As F.linear: 16-bit output, float32 gradients; float64 is left alone."""
    parameters = random_ffn(4, 16, 24, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (tokens(40, 16, dtype=torch.float32), *parameters)]
    with torch.autocast("cpu", dtype):
        y = ewa.functional.moe_ffn(*leaves, seed=1)
        reference = ewa.functional.moe_ffn(*leaves, seed=1, backend="reference")
        wide = ewa.functional.moe_ffn(*(t.double() for t in leaves), seed=1)
    assert (y.dtype, reference.dtype, wide.dtype) == (dtype, dtype, torch.float64)
    assert_parity("y", y, wide, reference)
    y.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.any() for t in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(40, 16), (2, 5, 4, 16), (16,)], ids=str)
def test_autocast_of_any_shape(shape, backend):
    leaves = [tokens(*shape, dtype=torch.float32), *random_ffn(4, 16, 24, dtype=torch.float32)]
    for t in leaves:
        t.requires_grad_()
    flat = leaves[0].detach().view(-1, 16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ewa.functional.moe_ffn(*leaves, seed=1, backend=backend)
        expected = ewa.functional.moe_ffn(flat, *leaves[1:], seed=1, backend=backend)
    assert torch.equal(y.flatten(), expected.flatten())
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert torch.equal(leaves[0].grad, flat.grad.view(shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(40, 16), (2, 5, 4, 16), (16,)], ids=str)
def test_y_may_be_changed_in_place(shape, backend):
    """As a block does that adds its residual so."""
    x, parameters = tokens(*shape, dtype=torch.float32).requires_grad_(), random_ffn(4, 16, 24, dtype=torch.float32)
    y = ewa.functional.moe_ffn(x, *parameters, seed=1, backend=backend)
    (expected,) = torch.autograd.grad((y + x).sum(), x)
    y = ewa.functional.moe_ffn(x, *parameters, seed=1, backend=backend)
    y += x
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


class TestScratchMemory:
    """What a call leaves to the next one on a CPU."""

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, monkeypatch):
        monkeypatch.setattr(Scratch, "_left", [])

    def left(self):
        return sum(map(len, itertools.chain.from_iterable(memory.values() for memory in Scratch._left)))

    def test_calls_of_other_sizes_and_dtypes(self):
        for num_tokens, dtype in ((40, torch.float32), (400, torch.bfloat16), (7, torch.float16), (90, torch.float32)):
            check_ffn(tokens(num_tokens, 16, dtype=dtype), random_ffn(4, 16, 24, dtype=dtype), seed=4)
        assert self.left() > 0

    def test_training_after_inference_mode(self):
        parameters = random_ffn(4, 16, 24, dtype=torch.float32)
        with torch.inference_mode():
            ewa.functional.moe_ffn(tokens(50, 16, dtype=torch.float32), *parameters, seed=4)
        check_ffn(tokens(50, 16, dtype=torch.float32), parameters, seed=4)

    def test_much_is_not_left(self, monkeypatch):
        x, parameters = tokens(50, 16, dtype=torch.float32), random_ffn(4, 16, 24, dtype=torch.float32)
        ewa.functional.moe_ffn(x, *parameters, seed=4)
        needed = self.left()
        assert needed > 50 * 24 * 4
        for limit, left in ((needed, needed), (needed - 1, 0)):
            monkeypatch.setattr(Scratch, "LEFT_BYTES", limit)
            Scratch.clear()
            ewa.functional.moe_ffn(x, *parameters, seed=4)
            assert self.left() == left

    def test_threads_do_not_share(self):
        parameters = random_ffn(4, 32, 64, dtype=torch.float32)
        xs = torch.randn(8, 500, 32, generator=torch.Generator().manual_seed(0))
        expected = [ewa.functional.moe_ffn(x, *parameters, seed=4) for x in xs]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for _ in range(20):
                found = list(pool.map(lambda x: ewa.functional.moe_ffn(x, *parameters, seed=4), xs))
                assert all(map(torch.equal, found, expected))
        assert len(Scratch._left) == 1
