"""The Triton kernels: in every form against the specification, by the interpreter where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from parity import assert_parity, check_ffn, output_and_grads, random_ffn

import ewa_kernels as ewa
from ewa_kernels import ops, seeds
from ewa_kernels.kernels import counters, multiprocessors
from ewa_kernels.kernels.triton import permutation
from ewa_kernels.kernels.triton.activations import activate, activate_with_slope
from ewa_kernels.kernels.triton.launch import Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ["triton-single", "triton-split", "triton-onchip", "cublas"]
# On a GPU the last one is for 16 bits, and for rows that begin at 16 bytes.
FLOAT32_FORMS = FORMS if DEVICE == "cpu" else FORMS[:2]
# On a GPU PyTorch's products of given groups are for bfloat16: tests/gpu has those.
GIVEN_FORMS = FORMS if DEVICE == "cpu" else FORMS[:3]
# The dtypes in which every case runs. bfloat16 has cases of its own: the interpreter rounds it towards zero, and so
# each rounding errs by up to a unit in the last place in place of half a one.
DTYPES = [torch.float32, torch.float16]
BFLOAT16_SLACK = 1.0 if DEVICE == "cuda" else 2.0


def dtype_for(form):
    return torch.float32 if form in FLOAT32_FORMS else torch.float16


def odd_widths(form):
    """D and F, which 8 does not divide where that is supported."""
    return (17, 33) if form in FLOAT32_FORMS else (24, 40)


def tokens(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def parameters(*sizes, dtype=torch.float32, **options):
    return tuple(t if t is None else t.to(DEVICE) for t in random_ffn(*sizes, dtype=dtype, **options))


@pytest.fixture(params=[1, 3, 50], ids=lambda n: f"{n} programs")
def num_programs(request, monkeypatch):
    """How many programs share the work; the interpreter runs one after the other."""
    monkeypatch.setattr(multiprocessors, "count", lambda device: request.param)
    return request.param


@pytest.mark.parametrize(
    ("form", "dtype"), [(f, d) for f in FORMS for d in DTYPES if d == torch.float16 or f in FLOAT32_FORMS]
)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "d_model", "d_ff"),
    [
        pytest.param(128, 2, 32, 64, id="aligned: whole tiles"),
        pytest.param(75, 4, 24, 40, id="ragged: tiles with empty rows and columns"),
        pytest.param(67, 3, 17, 33, id="odd D and F, where supported"),
        pytest.param(3, 5, 16, 16, id="T < E: experts without a token"),
        pytest.param(1, 1, 16, 16, id="one token, one expert"),
    ],
)
def test_every_shape(num_tokens, num_experts, d_model, d_ff, form, dtype, num_programs):
    if d_model % 8 != 0:
        d_model, d_ff = odd_widths(form)
    weights = parameters(num_experts, d_model, d_ff, dtype=dtype)
    check_ffn(tokens(num_tokens, d_model, dtype=dtype), weights, seed=11, backend=form)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("form", FORMS)
def test_every_option(form, gated, bias, dropout_p):
    dtype = dtype_for(form)
    weights = parameters(3, 24, 40, gated=gated, bias=bias, dtype=dtype)
    check_ffn(tokens(70, 24, dtype=dtype), weights, seed=3, gated=gated, dropout_p=dropout_p, backend=form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu", "identity"])
def test_every_activation(activation, dtype):
    weights = parameters(2, 16, 48, gated=activation != "gelu", dtype=dtype)
    options = {"seed": 3, "activation": activation, "gated": activation != "gelu"}
    slack = BFLOAT16_SLACK if dtype == torch.bfloat16 else 1.0
    check_ffn(tokens(40, 16, dtype=dtype), weights, backend="triton-single", slack=slack, **options)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form):
    weights = parameters(3, 24, 40, gated=True, dtype=torch.bfloat16)
    x = tokens(70, 24, dtype=torch.bfloat16)
    check_ffn(x, weights, seed=3, gated=True, backend=form, slack=BFLOAT16_SLACK)


@pytest.mark.parametrize("form", FLOAT32_FORMS)
def test_float32_to_a_millionth(form):
    x, weights = tokens(75, 24), parameters(4, 24, 40)
    grad_y = torch.randn_like(x)
    wide = tuple(t.double() for t in (x, *weights))
    exact = output_and_grads(ewa.reference.moe_ffn, wide, grad_y.double(), seed=2)
    ours = output_and_grads(ewa.functional.moe_ffn, (x, *weights), grad_y, seed=2, backend=form)
    for name, value in ours.items():
        assert (value - exact[name]).norm() <= 1e-6 * exact[name].norm(), name


@triton.jit
def _apply(v, act, act_too, slope, ACTIVATION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(v + i)
    tl.store(act + i, activate(value, ACTIVATION))
    both = activate_with_slope(value, ACTIVATION)
    tl.store(act_too + i, both[0])
    tl.store(slope + i, both[1])


def apply(v, activation):
    """act(v) by the forward's function, and act(v) and act'(v) by the backward's."""
    outputs = [torch.full_like(v, torch.nan) for _ in range(3)]
    _apply[(1,)](v, *outputs, ACTIVATION=activation, N=len(v), enable_fp_fusion=True)
    return outputs


@pytest.mark.parametrize(("name", "tolerance"), [("gelu", 2e-7), ("gelu_16bit", 1e-5), ("quick_gelu", 2e-7)])
def test_gelu_everywhere(name, tolerance):
    """The polynomial that 16-bit tensors get, and the accurate ones."""
    v = torch.linspace(-12, 12, 4096, dtype=torch.float64, device=DEVICE).requires_grad_()
    exact = ewa.reference.ACTIVATIONS[name.removesuffix("_16bit")](v)
    (slope,) = torch.autograd.grad(exact.sum(), v)
    act, act_too, our_slope = apply(v.detach().float(), name)
    assert torch.equal(act, act_too)
    assert (act - exact).abs().max() <= tolerance * 5
    assert (our_slope - slope).abs().max() <= tolerance * 5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("name", ["gelu", "gelu_16bit", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu", "identity"])
def test_activations_of_what_is_not_finite(name):
    """A NaN stays one, and +inf too (torch's GELU has a NaN there on some CPUs)."""
    v = torch.tensor([torch.nan, torch.inf, 1e4, -1e4], device=DEVICE)
    act, act_too, slope = apply(v, name)
    expected = ewa.reference.ACTIVATIONS[name.removesuffix("_16bit")](v)
    expected[1] = torch.inf
    for ours in (act, act_too):
        torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    assert slope[0].isnan() or name == "identity"
    assert slope[2:].isfinite().all()


@pytest.mark.parametrize("form", GIVEN_FORMS)
class TestGivenPartition:
    @pytest.mark.parametrize("offsets", [[0, 50, 50, 51, 70], [0, 0, 0, 0, 70], [0, 32, 64, 70, 70]])
    def test_ragged(self, offsets, form, num_programs):
        x, weights = tokens(70, 24, dtype=dtype_for(form)), parameters(4, 24, 40, dtype=dtype_for(form))
        options = {
            "permutation": torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(DEVICE),
            "expert_offsets": torch.tensor(offsets, device=DEVICE),
        }
        grad_y = torch.randn_like(x)
        wide = tuple(t.double() for t in (x, *weights))
        exact = output_and_grads(ewa.reference.grouped_ffn, wide, grad_y.double(), **options)
        torch_ = output_and_grads(ewa.reference.grouped_ffn, (x, *weights), grad_y, **options)
        for backend in (form, "torch"):
            ours = output_and_grads(ewa.functional.grouped_ffn, (x, *weights), grad_y, backend=backend, **options)
            for name, value in ours.items():
                assert_parity(name, value, exact[name], torch_[name])

    def test_strided(self, form):
        """A column of a router's [T, k] table is not contiguous."""
        x, weights = tokens(67, 16, dtype=dtype_for(form)), parameters(4, 16, 24, dtype=dtype_for(form))
        permutation = torch.randperm(67, device=DEVICE).int()
        offsets = torch.tensor([0, 3, 40, 41, 67], dtype=torch.int32, device=DEVICE)
        y = ewa.functional.grouped_ffn(x, *weights, permutation=permutation, expert_offsets=offsets, backend=form)
        strided = (torch.stack((t, torch.zeros_like(t)), dim=1)[:, 0] for t in (permutation, offsets))
        options = dict(zip(("permutation", "expert_offsets"), strided, strict=True))
        assert torch.equal(ewa.functional.grouped_ffn(x, *weights, backend=form, **options), y)

    def test_the_random_one_given_is_the_random_one(self, form):
        x, weights = tokens(67, 16, dtype=dtype_for(form)), parameters(4, 16, 24, dtype=dtype_for(form))
        options = {
            "permutation": ewa.functional.random_permutation(67, 5, device=DEVICE),
            "expert_offsets": torch.tensor(ewa.functional.expert_offsets(67, 4), device=DEVICE),
        }
        given = ewa.functional.grouped_ffn(x, *weights, seed=5, dropout_p=0.2, backend=form, **options)
        drawn = ewa.functional.moe_ffn(x, *weights, seed=5, dropout_p=0.2, backend=form)
        assert torch.equal(given, drawn)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 64, 65, 197, 1023, 1024, 3000])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**63 - 1, 12345678901234567])
def test_permutation_is_the_specified_one(num_tokens, seed):
    expected = ewa.reference.random_permutation(num_tokens, seed)
    on_device = torch.tensor(seed, device=DEVICE)
    assert torch.equal(permutation.random_permutation(num_tokens, on_device, on_device.device).cpu(), expected)


@pytest.mark.parametrize("form", FORMS)
def test_permutation_saved_by_the_forward(form):
    x, weights = tokens(77, 16, dtype=dtype_for(form)), parameters(2, 16, 16, dtype=dtype_for(form))
    *_, drawn = ops.moe_ffn(x, *weights, None, torch.tensor(9), None, None, "gelu", False, 0.0, "full", form)
    assert torch.equal(drawn.cpu(), ewa.reference.random_permutation(77, 9))


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form):
    dtype = dtype_for(form)
    check_ffn(tokens(0, 16, dtype=dtype), parameters(3, 16, 24, dtype=dtype), seed=0, backend=form)


def test_split_k_adds_up(monkeypatch):
    """Weight tiles shared by several programs, summed by the last."""
    monkeypatch.setattr(multiprocessors, "count", lambda device: 64)
    check_ffn(tokens(900, 24), parameters(2, 24, 40), seed=1, backend="triton-single")


def test_same_bits_whatever_is_asked_for(monkeypatch):
    """How many programs share the rows of a weight's gradient does not depend on which gradients are needed."""
    monkeypatch.setattr(multiprocessors, "count", lambda device: 64)
    x, weights = tokens(600, 16), parameters(2, 16, 16)

    def grad(frozen):
        leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate((x, *weights))]
        y = ewa.functional.moe_ffn(*leaves, seed=1, backend="triton-single")
        return torch.autograd.grad(y, leaves[1], x)[0]

    assert torch.equal(grad(()), grad((0, 2, 3, 4)))


@pytest.mark.parametrize(
    "needed", [["x"], ["up_weight"], ["up_bias"], ["down_weight"], ["down_bias"], ["x", "down_bias"], []], ids=str
)
@pytest.mark.parametrize("form", ["triton-single", "triton-split"])
def test_frozen_inputs_get_no_gradient_and_change_no_other(form, needed):
    names = ["x", "up_weight", "up_bias", "down_weight", "down_bias"]
    operands = dict(zip(names, (tokens(70, 16), *parameters(3, 16, 24)), strict=True))

    def grads(needed):
        leaves = {n: t.clone().requires_grad_(n in needed) for n, t in operands.items()}
        y = ewa.functional.moe_ffn(*leaves.values(), seed=1, backend=form)
        if needed:
            (y * y.detach()).sum().backward()
        return {n: t.grad for n, t in leaves.items()}

    everything = grads(names)
    for name, grad in grads(needed).items():
        assert (grad is None) == (name not in needed)
        assert grad is None or torch.equal(grad, everything[name])


@pytest.mark.parametrize("form", FORMS)
def test_unwritten_memory_is_never_read(monkeypatch, form):
    """With every fresh tensor full of NaN, results are the same."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(fresh):
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh.fill_(2**30)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))
    (d_model, d_ff), dtype = odd_widths(form), dtype_for(form)
    for num_tokens, gated in [(41, True), (3, False)]:
        weights = parameters(4, d_model, d_ff, gated=gated, dtype=dtype)
        check_ffn(tokens(num_tokens, d_model, dtype=dtype), weights, seed=1, gated=gated, backend=form)


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_in_its_row(form):
    (d_model, d_ff), dtype = odd_widths(form), dtype_for(form)
    x, weights = tokens(70, d_model, dtype=dtype), parameters(3, d_model, d_ff, dtype=dtype)
    clean = ewa.functional.moe_ffn(x, *weights, seed=1, backend=form)
    x[13, 5] = torch.nan
    y = ewa.functional.moe_ffn(x, *weights, seed=1, backend=form)
    assert y[13].isnan().all()
    others = torch.arange(70) != 13
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("form", FORMS)
def test_autocast_reads_float32_parameters(form):
    """Weights are computed with in 16 bits; gradients come in the parameters' float32."""
    leaves = [t.requires_grad_() for t in (tokens(70, 16), *parameters(3, 16, 24))]
    with torch.autocast(DEVICE, torch.float16):
        y = ewa.functional.moe_ffn(*leaves, seed=1, backend=form)
        reference = ewa.functional.moe_ffn(*leaves, seed=1, backend="reference")
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, reference, rtol=2e-3, atol=2e-3)
    grad_y = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves, grad_y)
    theirs = torch.autograd.grad(reference, leaves, grad_y)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 3e-3 * b.norm()


def test_recompute_saves_x_alone():
    x, weights = tokens(70, 16), parameters(3, 16, 24)
    expected = output_and_grads(ewa.functional.moe_ffn, (x, *weights), x, seed=4, backend="triton-single")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        recomputed = output_and_grads(
            ewa.functional.moe_ffn, (x, *weights), x, seed=4, backend="triton-single", recompute=True
        )
    per_token = [t for t in saved if t.numel() > 1 and t.shape[0] == 70]
    assert [tuple(t.shape) for t in per_token] == [(70, 16)]
    for name, value in recomputed.items():
        assert torch.equal(value, expected[name])


class TestWorkspace:
    def test_left_clean(self):
        check_ffn(tokens(70, 16), parameters(3, 16, 24), seed=1, backend="triton-single")
        assert counters._counters
        assert not any(counters.any() for counters in counters._counters.values())

    def test_not_used_again_after_an_error(self, monkeypatch):
        def fail(launch, tensors, counters, **others):
            counters.fill_(7)
            raise KeyboardInterrupt

        x, weights = tokens(70, 16), parameters(3, 16, 24)
        options = {"seed": 1, "backend": "triton-single"}
        y = ewa.functional.moe_ffn(x.requires_grad_(), *weights, **options)
        monkeypatch.setattr(Launch, "__call__", fail)
        for run in (lambda: y.sum().backward(), lambda: ewa.functional.moe_ffn(x, *weights, **options)):
            with pytest.raises(KeyboardInterrupt):
                run()
            assert not any(counters.any() for counters in counters._counters.values())
            zeros, _ = counters.zeroed_counters(10, x.device)
            assert not zeros.any()

    def test_grows(self):
        zeros, whose = counters.zeroed_counters(5000, torch.device(DEVICE, 0))
        assert len(zeros) >= 5000
        assert not zeros.any()
        counters.give_back(zeros, whose)

    def test_two_at_once_are_two(self):
        device = torch.device(DEVICE, 0)
        first, whose = counters.zeroed_counters(10, device)
        second, whose_second = counters.zeroed_counters(10, device)
        assert first.data_ptr() != second.data_ptr()
        counters.give_back(second, whose_second)
        counters.give_back(first, whose)


def test_module_uses_the_backend_and_compiles():
    module = ewa.RandomPartitionMoE(16, 24, 3, backend="triton", device=DEVICE)
    x = tokens(50, 16)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = module(x)
    torch.manual_seed(0)
    assert torch.equal(compiled(x), expected)


def test_seed_from_state():
    """Values of the generator's state that follow one another give seeds that do not."""
    found = {seeds.from_state(state, offset) for state in range(50) for offset in range(0, 400, 4)}
    assert len(found) == 5000
    assert all(0 <= seed < 2**63 for seed in found)
    bits = torch.tensor([[seed >> k & 1 for k in range(63)] for seed in sorted(found)], dtype=torch.float64)
    assert (bits.mean(0) - 0.5).abs().max() < 5 * 0.5 / 5000**0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has tests at real sizes: gpu/test_gpu.py")
def test_offsets_beyond_an_int32():
    script = Path(__file__).parent / "big_indices.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "same results at offset 2147483648" in result.stdout


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("", "on the CPU it needs Triton's interpreter: set TRITON_INTERPRET=1 before ewa_kernels is imported"),
        ("import sys; sys.modules['triton'] = None", "Triton is not installed: pip install triton"),
    ],
    ids=["no interpreter", "no Triton"],
)
def test_says_why_it_cannot_run(before, reason):
    """And the package works without."""
    code = f"""{before}
import torch, ewa_kernels as ewa
layer = ewa.RandomPartitionMoE(4, 8, 2)
assert layer(torch.zeros(3, 4)).shape == (3, 4)
layer.backend = "triton"
try:
    layer(torch.zeros(3, 4))
except ewa.BackendError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == f"backend='triton' cannot run moe_ffn on cpu: {reason}", result.stderr


def test_amd_gets_what_is_sure():
    """gfx942 would pass for a Hopper, whose tiles do not fit it."""
    code = """
import torch
torch.version.hip = "6.4"
torch.cuda.get_device_capability = lambda device: (9, 4)
from ewa_kernels import backends
device = torch.device("cuda", 0)
for operation in ("moe_ffn", "random_permutation", "average_experts_", "adamw"):
    print(operation, backends.resolve(operation, "auto", device))
try:
    backends.resolve("moe_ffn", "triton-split", device)
except backends.BackendError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    *picked, reason = result.stdout.splitlines()
    expected = ["moe_ffn torch", "random_permutation reference", "average_experts_ reference", "adamw torch"]
    assert picked == expected, result.stderr
    assert "proven on NVIDIA's GPUs only" in reason
