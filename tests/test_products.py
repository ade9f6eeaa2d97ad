"""Matrix products in C++ (`csrc/products.h`): every edge of a tile, a task and a batch, and what is fused with them."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from parity import assert_parity, check_ffn, output_and_grads, random_ffn, weighted

import ewa_kernels as ewa
from ewa_kernels.kernels.blocked import moe_ffn as blocked_ffn
from ewa_kernels.kernels.blocked import products as products_module
from ewa_kernels.kernels.blocked.products import ENVIRONMENT, Products, candidates, have_cpp, products_of
from ewa_kernels.problem import Problem


@pytest.fixture(params=["ours", "PyTorch's"])
def products(request, products_by):
    products_by("cpp" if request.param == "ours" else "torch")
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


def tokens(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 31, 32, 33, 255, 257, 383, 385, 800])
@pytest.mark.parametrize("transposed", [False, True])
def test_columns_and_terms(products, dtype, width, transposed):
    """d_model and d_ff are columns of one product and terms of the next."""
    d_model, d_ff = (40, width) if transposed else (width, 40)
    check_ffn(tokens(61, d_model, dtype=dtype), random_ffn(2, d_model, d_ff, dtype=dtype), seed=4, backend="cpp")


@pytest.mark.parametrize("rows", [1, 2, 13, 14, 15, 28, 29, 111, 112, 113, 225, 384, 385, 769])
def test_rows(products, dtype, rows):
    check_ffn(tokens(3 * rows + 1, 20, dtype=dtype), random_ffn(3, 20, 36, dtype=dtype), seed=4, backend="cpp")


def test_experts_in_several_batches(products, dtype):
    """Some together, and the sums of one whose weights are large in parts: of both products, or of one."""
    for num_tokens, num_experts, d_model, d_ff in ((43, 9, 200, 1100), (8, 2, 1900, 1800), (5, 1, 900, 3700)):
        parameters = random_ffn(num_experts, d_model, d_ff, dtype=dtype)
        check_ffn(tokens(num_tokens, d_model, dtype=dtype), parameters, seed=4, backend="cpp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 37, 0], [1, 0, 300], [150, 149, 1]], ids=str)
@pytest.mark.parametrize("block_rows", [64, 2048])
def test_groups_of_any_size(monkeypatch, products, dtype, counts, block_rows):
    """With weights, biases and dropout, in one block or several; what has no rows has no gradient."""
    monkeypatch.setattr(blocked_ffn, "rows_in_a_block", lambda *_: block_rows)
    generator = torch.Generator().manual_seed(7)
    num_rows = sum(counts)
    x, grad_y = tokens(num_rows, 24, dtype=dtype), tokens(num_rows, 24, dtype=dtype)
    weights = torch.rand(num_rows, 1, generator=generator).to(dtype)
    options = {
        "permutation": torch.randperm(num_rows, generator=generator).int(),
        "expert_offsets": torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32),
        "seed": 5,
        "dropout_p": 0.25,
        "gated": True,
        "activation": "silu",
    }

    operands = (x, *random_ffn(3, 24, 40, gated=True, dtype=dtype), weights)
    wide = tuple(t.double() for t in operands)
    exact = output_and_grads(weighted, wide, grad_y.double(), backend="reference", **options)
    baseline = output_and_grads(weighted, operands, grad_y, backend="reference", **options)
    for name, value in output_and_grads(weighted, operands, grad_y, backend="cpp", **options).items():
        if exact[name].any():
            assert_parity(name, value, exact[name], baseline[name])
        else:
            assert torch.equal(value, torch.zeros_like(value))


def test_bias_gradients_of_many_rows(products, dtype):
    """As exact as PyTorch's, which adds up in a tree."""
    check_ffn(tokens(40_000, 4, dtype=dtype), random_ffn(1, 4, 6, dtype=dtype), seed=4, backend="cpp")


@pytest.mark.parametrize("parameter_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_any_dtype_under_autocast(products, parameter_dtype, autocast):
    """Gradients are in the parameters' dtype."""
    parameters = [t.requires_grad_() for t in random_ffn(2, 16, 24, dtype=parameter_dtype)]
    x, grads = tokens(60, 16, dtype=torch.float32), {}
    for backend in ("cpp", "torch"):
        with torch.autocast("cpu", autocast):
            y = ewa.functional.moe_ffn(x, *parameters, seed=3, backend=backend)
        grads[backend] = torch.autograd.grad(y.float().square().sum(), parameters)
    for ours, torchs in zip(grads["cpp"], grads["torch"], strict=True):
        assert ours.dtype == parameter_dtype
        torch.testing.assert_close(ours, torchs, rtol=0.05, atol=0.05 * float(torchs.abs().max()))


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=5)), ids=str)
def test_each_gradient_alone(products, dtype, wanted):
    """Only what is asked for, with the bits that it has among all."""
    operands = (tokens(50, 20, dtype=dtype), *random_ffn(3, 20, 36, dtype=dtype))

    def grads(wanted):
        leaves = [t.detach().requires_grad_(want) for t, want in zip(operands, wanted, strict=True)]
        y = ewa.functional.moe_ffn(*leaves, seed=4, backend="cpp")
        if any(wanted):
            y.square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for want, grad, among_all in zip(wanted, grads(wanted), grads([True] * 5), strict=True):
        assert (grad is not None) == want
        assert grad is None or torch.equal(grad, among_all)


# Of the last one a gradient is made by tasks that pack for themselves, in several batches and in one, as threads go.
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "d_model", "d_ff"), [(999, 3, 24, 40), (999, 3, 100, 400), (4500, 2, 64, 1024)]
)
def test_no_bit_depends_on_the_number_of_threads(products_by, dtype, num_tokens, num_experts, d_model, d_ff):
    if not have_cpp(dtype):
        pytest.skip("PyTorch's products may")
    products_by("cpp")
    x = tokens(num_tokens, d_model, dtype=dtype)
    operands = (x, *random_ffn(num_experts, d_model, d_ff, dtype=dtype))
    results, threads = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3, 8):
            torch.set_num_threads(num_threads)
            results.append(output_and_grads(ewa.functional.moe_ffn, operands, x, seed=4, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


GUARDED = """
import ctypes, mmap, torch
import ewa_kernels as ewa

libc, kept = ctypes.CDLL(None), []

def at_the_end_of_memory(tensor):
    num_bytes = tensor.numel() * tensor.element_size()
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    kept.append(mmap.mmap(-1, size + mmap.PAGESIZE))
    address = ctypes.addressof(ctypes.c_char.from_buffer(kept[-1]))
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    memory = torch.frombuffer(kept[-1], dtype=torch.uint8, count=num_bytes, offset=size - num_bytes)
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor).requires_grad_()

for d_model, d_ff in ((1, 1), (7, 33), (16, 31), (33, 14), (65, 129)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        shapes = (29, d_model), (2, d_ff, d_model), (2, d_ff), (2, d_model, d_ff), (2, d_model), (29, d_model)
        *operands, grad_y = (at_the_end_of_memory(torch.randn(shape).to(dtype)) for shape in shapes)
        y = ewa.functional.moe_ffn(*operands, seed=3, backend="cpp")
        torch.autograd.grad(y, operands, grad_y.detach())
"""


def test_reads_nothing_past_its_operands():
    """Each of them ends where memory does. Sanitizers do not see what AVX-512 loads under a mask."""
    subprocess.run([sys.executable, "-c", GUARDED], env={**os.environ, ENVIRONMENT: "cpp"}, check=True)


def test_what_is_not_a_number_stays_where_it_is(products, dtype):
    """Columns and rows that pad a tile are never seen.

    oneDNN's products by AMX read past the end of a row that no 64 bytes end: what the next one begins with, times 0.
    """
    by_amx = dtype == torch.bfloat16 and not have_cpp(dtype) and candidates(dtype)[-1].dtype == dtype
    d_model, d_ff = (32, 64) if by_amx else (21, 35)
    x, parameters = tokens(40, d_model, dtype=dtype), random_ffn(2, d_model, d_ff, dtype=dtype)
    clean = ewa.functional.moe_ffn(x, *parameters, seed=4, backend="cpp")
    for value in (torch.nan, torch.inf):
        x[3, 5] = value
        y = ewa.functional.moe_ffn(x, *parameters, seed=4, backend="cpp")
        same = torch.arange(40) != 3
        assert torch.equal(y[same], clean[same])
        assert not y[3].isfinite().any()


class TestWhoMakesThem:
    """By `products_of`, where C++ and PyTorch both can."""

    @pytest.fixture(autouse=True)
    def both(self, monkeypatch):
        monkeypatch.setattr(products_module, "have_cpp", lambda dtype: True)
        monkeypatch.delenv(ENVIRONMENT, raising=False)

    def found(self, dtype=torch.float32, num_rows=4 * 197):
        weight = torch.empty(4, 4096, 1024, device="meta")
        return products_of(Problem.of_linear(num_rows, weight, "cpp", dtype, (dtype, dtype, None)))

    @pytest.mark.parametrize(
        ("dtype", "rows", "by_cpp"),
        [
            (torch.float32, 1, True),
            (torch.float32, 4096, True),
            (torch.bfloat16, 256, True),
            (torch.bfloat16, 255, False),
        ],
    )
    def test_ours_but_for_few_rows_of_bfloat16(self, dtype, rows, by_cpp):
        assert self.found(dtype, 4 * rows).by_cpp == by_cpp

    @pytest.mark.parametrize("wanted", ["cpp", "torch"])
    def test_the_environment_decides(self, monkeypatch, wanted):
        monkeypatch.setenv(ENVIRONMENT, wanted)
        assert self.found().by_cpp == (wanted == "cpp")

    def test_once_for_forward_and_backward(self, monkeypatch):
        """The backward reads what the forward kept, in an order that depends on the choice."""
        weight = torch.empty(4, 64, 64, device="meta")
        problem = Problem.of_linear(64, weight, "cpp", torch.float32, (torch.float32, torch.float32, None))
        before = products_of(problem)
        monkeypatch.setenv(ENVIRONMENT, "torch")
        assert products_of(problem) == before

    def test_what_the_environment_may_say(self, monkeypatch):
        monkeypatch.setenv(ENVIRONMENT, "mkl")
        with pytest.raises(ValueError, match=f"{ENVIRONMENT} must be auto, cpp or torch, got 'mkl'"):
            self.found()


@pytest.mark.parametrize("fast", [True, False], ids=["fast 16 bits", "no fast 16 bits"])
@pytest.mark.parametrize("cpp", [(), (torch.float32,), (torch.float32, torch.bfloat16)], ids=str)
def test_candidates(monkeypatch, cpp, fast):
    """All at full speed: ours if we have any, and PyTorch's, in 16 bits where these are fast."""
    monkeypatch.setattr(products_module, "have_cpp", lambda dtype: dtype in cpp)
    monkeypatch.setattr(products_module, "_has_fast", lambda dtype: fast)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = candidates(dtype)
        narrow = dtype if fast else torch.float32
        assert found[-1] == Products(narrow, by_cpp=False)
        ours = [products.dtype for products in found if products.by_cpp]
        if dtype in cpp:
            assert ours == [dtype]
        else:
            wanted = torch.float32 in cpp and (dtype == torch.float16 or not fast)
            assert ours == [torch.float32] * wanted
