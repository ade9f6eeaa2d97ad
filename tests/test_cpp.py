"""The C++ extension: that it is there, agrees with the specification, and can be done without."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from parity import assert_parity, check_ffn, output_and_grads, random_ffn, weighted

import ewa_kernels as ewa
from ewa_kernels import backends
from ewa_kernels.kernels import extension, permutation
from ewa_kernels.kernels.blocked import cpp_rows, products
from ewa_kernels.kernels.blocked import moe_ffn as blocked_ffn
from ewa_kernels.kernels.blocked.products import Products
from ewa_kernels.kernels.blocked.torch_rows import TorchRows
from ewa_kernels.kernels.scratch import Scratch

CPU = torch.device("cpu")
ACTIVATIONS = list(ewa.reference.ACTIVATIONS)


def test_is_built_and_used():
    assert extension.WHY_NOT is None
    assert backends.resolve("moe_ffn", "auto", CPU) == "cpp"
    assert backends.resolve("moe_ffn", "auto", CPU, torch.bfloat16) == "cpp"
    assert backends.resolve("moe_ffn", "auto", CPU, torch.float64) == "torch"
    assert backends.resolve("random_permutation", "auto", CPU) == "cpp"


def test_permutation_is_that_of_the_specification():
    seeds = [0, 1, 2**31, 2**32, 2**63 - 1, 123_456_789_012_345]
    for num_tokens, seed in itertools.product([*range(70), 1023, 1024, 1025, 4095, 4097, 50_432], seeds):
        ours = permutation.random_permutation(num_tokens, seed, CPU)
        assert torch.equal(ours, ewa.reference.random_permutation(num_tokens, seed)), (num_tokens, seed)


def wide_range():
    """From far in one tail to far in the other, both zeros and the smallest numbers."""
    near = torch.linspace(-12, 12, 4097)
    far = torch.logspace(-40, 4, 512)
    return torch.cat((near, far, -far, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 88.0, -88.0, 1e9, -1e9])))


def make_rows(rows_class, activation="gelu", gated=False):
    return rows_class(activation, gated, torch.float32, Scratch(torch.device("cpu"), torch.float32))


class TestGeluOfBFloat16:
    def slope_and_hidden(self, pre):
        rows = cpp_rows.CppRows("gelu", False, torch.bfloat16, Scratch(CPU, torch.bfloat16))
        slope, hidden = torch.empty(2, 1, 1, len(pre), dtype=torch.bfloat16)
        pre = pre.view(1, 1, -1)
        number = torch.zeros(1, dtype=torch.int64)
        rows.activate_backward(pre, torch.ones_like(pre), number, None, None, slope, hidden, None)
        return torch.stack((slope.flatten(), hidden.flatten()))

    def test_is_exact_but_for_the_last_rounding(self):
        """Of slope and hidden there is nothing to see of what shorter polynomials leave out."""
        pre = torch.linspace(-8, 8, 100_001).bfloat16()
        ours, v = self.slope_and_hidden(pre), pre.double()
        tail, density = torch.special.log_ndtr(-v.abs()).exp(), (-v * v / 2).exp() / math.sqrt(2 * math.pi)
        cdf = torch.where(v < 0, tail, 1 - tail)
        exact = torch.stack((cdf + v * density, v * cdf))
        left_out = 5e-5 * torch.stack((tail + v.abs() * density, v.abs() * tail))
        assert ((exact - left_out).bfloat16() <= ours).all()
        assert (ours <= (exact + left_out).bfloat16()).all()

    def test_far_out(self):
        pre = torch.tensor([9.0, 1e30, -9.0, -1e30, math.inf, -math.inf, math.nan]).bfloat16()
        slope, hidden = self.slope_and_hidden(pre)
        assert torch.equal(hidden[:5], torch.stack((*pre[:2], *torch.zeros(2).bfloat16(), pre[4])))
        assert torch.equal(slope[:4], torch.tensor([1, 1, 0, 0]).bfloat16())
        assert hidden[5:].isnan().all()  # as in PyTorch, whose checks for overflow look for them
        assert slope[4:].isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
class TestActivations:
    def run(self, rows_class, activation, pre, grad):
        hidden, grad_pre = torch.full_like(pre, torch.nan), torch.full_like(pre, torch.nan)
        rows, number = make_rows(rows_class, activation), torch.zeros(1, dtype=torch.int64)
        rows.activate_backward(pre, grad.clone(), number, None, None, grad_pre, hidden, None)
        again = torch.full_like(pre, torch.nan)
        rows.activate(pre, None, number, None, None, again)
        assert torch.equal(hidden.nan_to_num(), again.nan_to_num())
        return hidden, grad_pre

    def exact(self, activation, pre, grad):
        pre = pre.double().requires_grad_()
        hidden = ewa.reference.ACTIVATIONS[activation](pre)
        return hidden.detach(), torch.autograd.grad(hidden, pre, grad.double())[0]

    def test_parity_over_the_whole_range(self, activation):
        pre = wide_range()
        pre = pre[pre.abs() <= 12].view(1, 1, -1)
        grad = torch.randn(pre.shape, generator=torch.Generator().manual_seed(0))
        ours = self.run(cpp_rows.CppRows, activation, pre, grad)
        torchs = self.run(TorchRows, activation, pre, grad)
        for name, a, e, b in zip(("hidden", "grad"), ours, self.exact(activation, pre, grad), torchs, strict=True):
            assert_parity(name, a, e, b)

    def test_far_tails(self, activation):
        pre = wide_range()
        pre = pre[pre.abs() > 12].view(1, 1, -1)
        ours = self.run(cpp_rows.CppRows, activation, pre, torch.ones_like(pre))
        exact = self.exact(activation, pre, torch.ones_like(pre))
        for a, e in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, e.float(), rtol=2e-6, atol=1e-6)

    def test_nan_passes(self, activation):
        pre = torch.full((1, 1, 33), torch.nan)
        hidden, grad_pre = self.run(cpp_rows.CppRows, activation, pre, torch.ones_like(pre))
        assert hidden.isnan().all()
        assert activation in ("relu", "identity") or grad_pre.isnan().all()


@pytest.mark.parametrize("products", ["in 16 bits", "in float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
class TestNarrow:
    """Whether the processor has products in 16 bits or not."""

    @pytest.fixture(autouse=True)
    def _products(self, products_by, products, dtype):
        products_by("torch", dtype if products == "in 16 bits" else torch.float32)

    @pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("options", [{}, {"dropout_p": 0.25}, {"activation": "relu2"}], ids=str)
    def test_parity(self, products, dtype, gated, bias, options):
        """Columns end inside a chunk."""
        x = torch.randn(75, 24, generator=torch.Generator().manual_seed(7)).to(dtype)
        parameters = random_ffn(4, 24, 530, gated=gated, bias=bias, dtype=dtype)
        check_ffn(x, parameters, seed=3, gated=gated, backend="cpp", **options)

    def test_more_than_one_block(self, monkeypatch, products, dtype):
        monkeypatch.setattr(blocked_ffn, "rows_in_a_block", lambda *_: 64)
        x = torch.randn(203, 16, generator=torch.Generator().manual_seed(7)).to(dtype)
        check_ffn(x, random_ffn(4, 16, 24, dtype=dtype), seed=4, backend="cpp")

    def test_computed_again_in_backward(self, products, dtype):
        torch.manual_seed(0)
        layer = ewa.RandomPartitionMoE(16, 24, 4, dtype=dtype)
        x = torch.randn(50, 16, dtype=dtype)
        grads = [
            torch.autograd.grad(
                ewa.functional.moe_ffn(x, *layer.parameters(), seed=1, recompute=recompute).float().square().sum(),
                list(layer.parameters()),
            )
            for recompute in (False, True)
        ]
        for kept, again in zip(*grads, strict=True):  # pre_activation is rounded when it is kept
            torch.testing.assert_close(kept, again, rtol=0.03, atol=0.03 * float(kept.abs().max()))

    def test_routed(self, products, dtype):
        """Weighted choices in groups of any size, one of them empty."""
        generator = torch.Generator().manual_seed(7)
        routing_weights, choices = ewa.functional.route(torch.randn(41, 4, generator=generator), 2)
        permutation, offsets = ewa.functional.partition_by_expert(choices, 5)
        options = {"permutation": permutation, "expert_offsets": offsets, "gated": True, "activation": "silu"}
        x, grad_y = torch.randn(2, 41, 16, generator=generator).to(dtype)
        operands = (x, *random_ffn(5, 16, 24, gated=True, dtype=dtype), routing_weights.to(dtype))
        wide = tuple(t.double() for t in operands)
        exact = output_and_grads(weighted, wide, grad_y.double(), backend="reference", **options)
        baseline = output_and_grads(weighted, operands, grad_y, backend="reference", **options)
        for name, value in output_and_grads(weighted, operands, grad_y, backend="cpp", **options).items():
            assert_parity(name, value, exact[name], baseline[name])

    def test_autocast_needs_no_rounded_weights(self, products, dtype):
        """Gradients come in the parameters' own dtype."""
        layer = ewa.RandomPartitionMoE(16, 24, 4)
        with torch.autocast("cpu", dtype=dtype):
            y = layer(torch.randn(50, 16))
        assert y.dtype == dtype
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())


def test_what_float16_cannot_hold_between_products_has_finite_gradients(products_by):
    """Products in float32 have no such limit, the pre-activation that is kept for backward has."""
    products_by("cpp", torch.float32)
    x = torch.full((4, 2), 3e4, dtype=torch.float16, requires_grad=True)
    weights = torch.full((1, 3, 2), 2.0, dtype=torch.float16), torch.full((1, 2, 3), 2.0**-8, dtype=torch.float16)
    y = ewa.functional.moe_ffn(x, weights[0], None, weights[1], None, seed=0, activation="relu", backend="cpp")
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert grad.flatten().tolist() == [2 * 3 * 2 * 2.0**-8] * 8


def test_products_are_made_where_they_are_fast(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(products, "have_cpp", lambda _: False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert products.candidates(dtype) == [Products(torch.float32, by_cpp=False)]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_result_does_not_depend_on_the_number_of_threads(num_threads):
    torch.manual_seed(0)
    layer = ewa.RandomPartitionMoE(24, 40, 4)
    x = torch.randn(1500, 24)
    before = torch.get_num_threads()
    expected = layer(x, seed=1)
    try:
        torch.set_num_threads(num_threads)
        torch.testing.assert_close(layer(x, seed=1), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(layer(x, seed=1), layer(x, seed=1))
    finally:
        torch.set_num_threads(before)


def test_brings_no_second_openmp_runtime():
    """Its threads would fight with torch's for the cores."""
    code = (
        "import ewa_kernels; maps = open('/proc/self/maps').read(); "
        "print(len({line.split()[-1] for line in maps.splitlines() if 'gomp' in line or 'iomp' in line}))"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"


def test_without_it_everything_still_works():
    code = """
import sys
sys.modules["ewa_kernels._C"] = None
import torch, ewa_kernels as ewa
from ewa_kernels.__main__ import report
layer = ewa.RandomPartitionMoE(8, 12, 4)
layer(torch.randn(9, 8)).sum().backward()
print(ewa.functional.random_permutation(8, 123).tolist())
try:
    ewa.functional.moe_ffn(torch.randn(9, 8), *layer.parameters(), seed=0, backend="cpp")
except ewa.BackendError as error:
    print(error)
print(report())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert lines[0] == "[7, 5, 0, 1, 2, 3, 6, 4]"
    assert lines[1].startswith("backend='cpp' cannot run moe_ffn on cpu: the C++ extension is not built (")
    assert "with a C++ compiler at hand" in lines[1]
    assert any("moe_ffn" in line and "torch" in line for line in lines[2:])
    assert any("not cpp" in line for line in lines[2:])


class TestTable:
    """Of addresses: it says when a copy of it, as a GPU's plan is one, is stale."""

    OPTIONS = (0.1, 0, False, 0.9, 0.99, 1e-8, 0.01, False)

    def table(self):
        """Two experts in one tensor, 8 bytes apart; tensor 1 is their gradient."""
        module = sys.modules["ewa_kernels._C"]
        return module.Table([(2, 2, 0, 0, True)], [((0, 1, 2, 3, 4, -1), (8, 8, 8, 8, 0, 0), 0)])

    def test_says_what_changed(self):
        table = self.table()
        addresses = [4096, 8192, 12288, 16384, 20480]
        assert table.set(addresses, [self.OPTIONS])
        assert not table.set(addresses, [self.OPTIONS])
        for i in range(5):
            addresses[i] += 16
            assert table.set(addresses, [self.OPTIONS])
            assert not table.set(addresses, [self.OPTIONS])
        for i, value in enumerate((0.2, 64, True, 0.8, 0.9, 1e-7, 0.02, True)):
            options = (*self.OPTIONS[:i], value, *self.OPTIONS[i + 1 :])
            assert table.set(addresses, [options])
            assert not table.set(addresses, [options])
            assert table.set(addresses, [self.OPTIONS])
        assert table.set(addresses, [self.OPTIONS] * 2)

    def test_refuses_what_it_lacks(self):
        with pytest.raises(IndexError):
            self.table().set([4096] * 4, [self.OPTIONS])
        with pytest.raises(IndexError):
            self.table().set([4096] * 5, [])
        with pytest.raises(IndexError):
            sys.modules["ewa_kernels._C"].Table([(2, 2, 0, 0, False)], [])
