"""What is kept for backward in 8 and 4 bits: the codec, and gradients of layers that keep it."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import check_ffn, check_grouped
from torch import nn
from torch.utils.checkpoint import checkpoint

import ewa_kernels as ewa
from benchmarks import codebooks
from ewa_kernels import codec
from ewa_kernels.codec import CODEBOOKS, ROWS_8BIT, SCALES, format_of
from ewa_kernels.kernels import codec as kernels
from ewa_kernels.problem import SAVED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "cpp", "triton"] if DEVICE == "cpu" else ["torch", "triton"]
FORMATS = [format_of(bits, *how) for bits in (8, 4) for how in (("gelu", False), ("silu", True), ("relu", False))]
# On a GPU the last two are for 16 bits.
FORMS = ["triton-single", "triton-split", *(["triton-onchip", "cublas"] if DEVICE == "cpu" else [])]
LAYERS = [*BACKENDS[:-1], *FORMS]
CODED = ["8bit", "4bit", "recompute-8bit"]


def roundtrip(values, form):
    return codec.decode(codec.encode(values, form), len(values), values.shape[1], form)


def wild(rows=37, columns=72):
    """Every size that float32 has, zeros, denormals, rows of one value, and what is no number."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-44, 37, rows)[:, None]
    x[3, 5], x[4, 6], x[5, 70], x[6], x[7, :40], x[8] = torch.nan, torch.inf, -torch.inf, 0, 1e-42, -3.0
    x[9, ::2], x[10] = 65504, torch.tensor(SCALES[1 : 1 + columns]) * 1.0000001
    return x.to(DEVICE)


class TestCodec:
    @pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.bits} bits, {len(form.codebooks)}")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_same_bits_everywhere(self, form, dtype):
        """Codes and scales, and what is read from them, in all of memory and in a part."""
        x = wild().to(dtype)
        if dtype == torch.bfloat16:  # whose denormals Triton's interpreter reads as others
            x[x.abs() < 2**-126] = 0
        encoded = codec.encode(x, form)
        num_codes, _ = form.num_bytes(*x.shape)
        values = codec.decode(encoded, *x.shape, form)
        assert values.isnan().any()
        for backend in BACKENDS:
            whole, parts = kernels.encode(x, form, backend), torch.zeros_like(encoded)
            assert torch.equal(whole[num_codes:], encoded[num_codes:])
            lost = (encoded[num_codes:] == codec.NOT_A_NUMBER)[:, None]  # whose codes are anything
            assert torch.equal(*(t[:num_codes].view(len(lost), -1).masked_fill(lost, 0) for t in (whole, encoded)))
            for start, stop in itertools.pairwise((0, 5, 6, 37)):
                kernels.encode_into(parts, 37, start, x[start:stop], form, backend)
            assert torch.equal(parts, whole)
            read = kernels.decode(encoded, x.shape, form, torch.float32, backend)
            assert torch.equal(read.view(torch.int32), values.view(torch.int32)) or torch.equal(
                read.nan_to_num(0.5), values.nan_to_num(0.5)
            )
            half = kernels.decode(encoded, x.shape, form, torch.float16, backend)
            assert torch.equal(half.isnan(), values.isnan())
            assert not half.isinf().any()
            some = torch.empty(4, 72, device=DEVICE)
            kernels.decode_from(encoded, 37, 9, some, form, backend)
            assert torch.equal(some, values[9:13])

    def test_a_block_with_no_number_is_none(self):
        """And none other."""
        for form in FORMATS:
            x = wild()
            blocks = nn.functional.pad(x.unflatten(1, (len(form.codebooks), -1)), (0, -72 // len(form.codebooks) % 32))
            lost = ~blocks.unflatten(2, (-1, 32)).isfinite().all(-1, keepdim=True).expand(-1, -1, -1, 32)
            lost = lost.flatten(2)[..., : 72 // len(form.codebooks)].flatten(1)
            assert torch.equal(roundtrip(x, form).isnan(), lost)

    @given(
        st.integers(1, 70),
        st.integers(1, 5),
        st.floats(-15, 15),
        st.integers(0, 2**31 - 1),
        st.sampled_from(["gelu", "silu", "quick_gelu", "relu", "relu2", "identity"]),
    )
    @settings(max_examples=150, deadline=None)
    def test_errors_are_bounded(self, columns, rows, log_scale, seed, activation):
        """8 bits: by M/127. 4 bits: of levels that are multiples of M by a part of it; all others are small."""
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**log_scale
        largest = nn.functional.pad(x.abs(), (0, -columns % 32)).unflatten(1, (-1, 32)).amax(-1, keepdim=True)
        fine = (largest >= 2**-9) & (largest <= 2**9)
        scale = (largest * torch.where(fine, 2 ** (1 / 8), 4)).clamp(min=2**-101)
        scale = scale.expand(-1, -1, 32).flatten(1)[:, :columns]
        eight = roundtrip(x, format_of(8, activation, False))
        assert ((eight - x).abs() <= scale / 127 * 1.001).all()
        assert ((eight > 0) == (x > 0)).all()
        four = roundtrip(x, format_of(4, activation, False))
        if activation == "identity":
            assert ((four - x).abs() <= 0.081 * scale).all()
        else:
            hidden, slope = codebooks.hidden_and_slope(x, activation)
            approximate, slope_of_it = codebooks.hidden_and_slope(four, activation)
            power = 2 if activation == "relu2" else 1
            assert ((approximate - hidden).abs() <= 0.08 * power * scale**power + 0.15).all()
            assert ((slope_of_it - slope).abs() <= (0.2 * scale if power == 2 else 0.0) + 0.7).all()
        if activation in ("relu", "relu2"):
            assert torch.equal(four > 0, x > 0)

    def test_zeros_and_rows_of_one_value(self):
        for form in FORMATS:
            zeros = roundtrip(torch.zeros(3, 66), form)
            assert (zeros.abs() < 1e-30).all()
            for value in (65504.0, -65504.0, 3.0, 1e-3, 2.0**-100):
                ones = roundtrip(torch.full((2, 66), value), form)
                if form.bits == 8:
                    assert (ones / value - 1).abs().max() < (0.01 if 2**-9 <= abs(value) <= 2**9 else 0.02)
                assert (ones == ones[0, 0]).all() or len(form.codebooks) == 2
        assert roundtrip(torch.full((2, 66), 1e-45), ROWS_8BIT).abs().max() < 2**-100

    def test_scales(self):
        assert len(SCALES) < codec.NOT_A_NUMBER
        assert list(SCALES) == sorted(set(SCALES))
        assert (SCALES[0], SCALES[-1]) == (2.0**-101, 2.0**127)

    @pytest.mark.parametrize("activation", ["gelu", "silu", "quick_gelu"])
    def test_less_error_than_published_formats(self, activation):
        """rms of the errors of W_down's gradient and of W_up's: at least 15 % below nf4's in blocks of 64."""
        pre = codebooks.distributions()["normal"]
        eight, four, nf4 = (
            codebooks.errors(pre, quantize(pre), activation)
            for quantize in (
                codebooks.ours(8, CODEBOOKS[activation]),
                codebooks.ours(4, CODEBOOKS[activation]),
                codebooks.by_levels(codebooks.NF4, 64),
            )
        )
        assert max(eight) < 0.01
        assert max(four) < 0.075
        assert sum(e * e for e in four) < 0.85**2 * sum(e * e for e in nf4)

    def test_codebooks_are_what_the_search_found(self):
        """No level or edge of GELU's can move much, whichever way, without more error."""
        samples = [pre for scale in (0.25, 0.5, 1.0, 2.0) for pre in codebooks.distributions(scale, seed=7).values()]
        book, numbers = CODEBOOKS["gelu"], [*CODEBOOKS["gelu"].levels, *CODEBOOKS["gelu"].edges]
        least = codebooks.objective(book, "gelu", samples)
        for i in (1, 4, 7, 12, 18, 20, 24):
            for step in (-0.04, 0.04):
                moved = [number + step * (j == i) for j, number in enumerate(numbers)]
                other = book._replace(levels=tuple(moved[:16]), edges=tuple(moved[16:]))
                assert codebooks.objective(other, "gelu", samples) > least


def exact_ffn(num_tokens, d_model, d_ff, num_experts=3, gated=False, dtype=torch.float32, seed=0):
    """x and parameters whose pre-activations are exact in any type, however they are summed up: the codes are equal."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, low=-4, high=5, step=0.25):
        return (torch.randint(low, high, shape, generator=generator) * step).to(dtype)

    num_up = 2 * d_ff if gated else d_ff
    x = random(num_tokens, d_model, low=-2, high=3, step=0.5)
    up = random(num_experts, num_up, d_model) * (torch.rand(num_up, d_model, generator=generator) < 8 / d_model)
    down = (torch.randn(num_experts, d_model, d_ff, generator=generator) * d_ff**-0.5).to(dtype)
    parameters = (up.to(dtype), random(num_experts, num_up), down, random(num_experts, d_model))
    return x.to(DEVICE), tuple(t.to(DEVICE) for t in parameters)


class TestLayer:
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize(
        ("backend", "saved"),
        # x alone is encoded outside of the backend: that one is enough.
        [(b, s) for b in LAYERS for s in CODED if s != "recompute-8bit" or b in (*BACKENDS[:-1], "triton-split")],
    )
    def test_parity(self, saved, gated, backend):
        x, parameters = exact_ffn(37, 24, 72, gated=gated)
        check_ffn(x, parameters, backend=backend, saved=saved, seed=5, gated=gated)

    @pytest.mark.parametrize(
        ("backend", "saved", "num_tokens"),
        [
            *itertools.product([*BACKENDS[:-1], "reference"], CODED, [0, 1, 2]),
            *itertools.product(FORMS, ["4bit"], [0, 2]),
        ],
    )
    def test_experts_without_tokens(self, saved, backend, num_tokens):
        x, parameters = exact_ffn(num_tokens, 16, 40, num_experts=5)
        check_ffn(x, parameters, backend=backend, saved=saved, seed=5)

    @pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu", "relu", "relu2", "silu", "identity"])
    @pytest.mark.parametrize("backend", [*BACKENDS[:-1], "triton-split"])
    def test_every_activation(self, activation, backend):
        x, parameters = exact_ffn(30, 16, 40)
        check_ffn(x, parameters, backend=backend, saved="4bit", seed=5, activation=activation, dropout_p=0.25)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("saved", CODED)
    def test_dtypes(self, dtype, saved):
        x, parameters = exact_ffn(900, 64, 96, dtype=dtype)
        check_ffn(x, parameters, saved=saved, seed=5, slack=1.5)
        x, parameters = exact_ffn(40, 64, 96, dtype=dtype, gated=True)
        check_ffn(x, parameters, saved=saved, seed=5, gated=True, slack=1.5)

    @pytest.mark.parametrize("backend", LAYERS)
    def test_given_groups_and_routing_weights(self, backend):
        x, parameters = exact_ffn(30, 16, 40)
        routing_weights = torch.rand(30, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        choices = torch.arange(60, device=DEVICE).view(30, 2) % 7 % 3
        permutation, offsets = ewa.functional.partition_by_expert(choices, 3)
        options = {"permutation": permutation, "expert_offsets": offsets, "saved": "4bit"}
        check_grouped((x, *parameters, routing_weights), torch.randn(30, 16, device=DEVICE), backend=backend, **options)

    @pytest.mark.parametrize(("saved", "limits"), [("8bit", 0.01), ("4bit", 0.075), ("recompute-8bit", 0.01)])
    def test_errors_of_gradients(self, saved, limits):
        """Against float64, at pre-activations of variance 1."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2048, 192, generator=generator)
        up, down = (torch.randn(2, *shape, generator=generator) for shape in ((768, 192), (192, 768)))
        operands = [x, up / 192**0.5, torch.zeros(2, 768), down / 768**0.5, torch.zeros(2, 192)]
        grad_y, grads = torch.randn(2048, 192, generator=generator), {}
        for dtype, how in ((torch.float64, "full"), (torch.float32, saved)):
            leaves = [t.to(dtype).requires_grad_() for t in operands]
            y = ewa.functional.moe_ffn(*leaves, seed=1, saved=how)
            grads[how] = [y, *torch.autograd.grad(y, leaves, grad_y.to(DEVICE, dtype))]
        y, *errors = ((a - b).norm() / b.norm() for a, b in zip(grads[saved], grads["full"], strict=True))
        assert y < 1e-5
        assert max(errors) <= limits

    @pytest.mark.parametrize(
        ("saved", "most"),
        [("full", 7680), ("8bit", 4000), ("4bit", 2450), ("recompute", 1536), ("recompute-8bit", 800)],
    )
    def test_bytes_that_are_kept(self, saved, most):
        """Of a token at D = 768, F = 3,072 in bfloat16, the permutation's four aside."""
        layer = ewa.RandomPartitionMoE(768, 3072, 2, saved=saved, dtype=torch.bfloat16)
        kept, parameters = [], {p.data_ptr() for p in layer.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            layer(torch.randn(64, 768, dtype=torch.bfloat16))
        sizes = [t.nbytes for t in kept if t.data_ptr() not in parameters and t.dtype != torch.int32]
        assert most - 70 < sum(sizes) / 64 <= most

    @pytest.mark.parametrize("saved", CODED)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_nan_reaches_the_gradients(self, saved, backend):
        """Those of its own expert and of its own row, no others."""
        x, parameters = exact_ffn(20, 32, 32, num_experts=2)
        x[7, 3] = torch.nan
        leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
        ewa.functional.moe_ffn(*leaves, seed=5, saved=saved, backend=backend).sum().backward()
        lost = leaves[0].grad.isnan()
        assert lost[7].all()
        assert lost.sum() == 32
        of_expert = [leaf.grad.isnan().flatten(1).any(1) for leaf in leaves[1:4]]
        assert all(lost.sum() == 1 and torch.equal(lost, of_expert[0]) for lost in of_expert)

    @pytest.mark.parametrize("saved", CODED)
    def test_only_some_gradients(self, saved):
        """Whichever are asked for, they have the same bits."""
        x, parameters = exact_ffn(61, 32, 40)

        def grads(*wanted):
            leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, *parameters))]
            ewa.functional.moe_ffn(*leaves, seed=5, saved=saved).square().sum().backward()
            return [leaf.grad for leaf in leaves]

        everything = grads(*range(5))
        for wanted in range(5):
            assert torch.equal(grads(wanted)[wanted], everything[wanted])

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_output_is_the_same(self, backend):
        x, parameters = exact_ffn(37, 24, 72, gated=True)
        with torch.no_grad():
            expected = ewa.functional.moe_ffn(x, *parameters, seed=5, gated=True, backend=backend)
        for saved in SAVED:
            leaf = x.clone().requires_grad_()
            y = ewa.functional.moe_ffn(leaf, *parameters, seed=5, gated=True, backend=backend, saved=saved)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(y, expected) or backend == "triton"


class TestUse:
    @pytest.mark.parametrize("saved", CODED)
    def test_compiled_checkpointed_autocast(self, saved):
        layer, x = ewa.RandomPartitionMoE(16, 40, 3, saved=saved, gated=True, activation="silu"), torch.randn(4, 9, 16)

        def grads(function, **autocast):
            torch.manual_seed(3)
            leaf = x.clone().requires_grad_()
            layer.zero_grad()
            with torch.autocast("cpu", **autocast):
                function(leaf).square().sum().backward()
            return [leaf.grad, *(p.grad for p in layer.parameters())]

        for autocast in ({"enabled": False}, {"dtype": torch.bfloat16}):
            eager = grads(layer, **autocast)
            compiled = grads(torch.compile(layer, backend="aot_eager", fullgraph=True), **autocast)
            again = grads(lambda leaf: checkpoint(layer, leaf, use_reentrant=False), **autocast)
            for a, b, c in zip(eager, compiled, again, strict=True):
                torch.testing.assert_close(a, b)
                assert torch.equal(a, c)

    def test_a_layers_attribute(self):
        layer = ewa.RandomPartitionMoE(8, 12, 2, saved="4bit")
        assert "saved=4bit" in repr(layer)
        assert not layer.recompute
        layer.recompute = True
        assert copy.deepcopy(layer).saved == "recompute"
        assert ewa.RandomPartitionMoE(8, 12, 2, recompute=True).saved == "recompute"
        routed = ewa.RoutedMoE(8, 12, 2, saved="8bit")
        routed(torch.randn(5, 8)).sum().backward()
        assert routed.up.weight.grad.isfinite().all()

    def test_layers_that_were_pickled_before(self):
        for recompute, saved in ((True, "recompute"), (False, "full")):
            layer = ewa.RandomPartitionMoE(8, 12, 2)
            state = {k: v for k, v in layer.__dict__.items() if k != "saved"} | {"recompute": recompute}
            old = ewa.RandomPartitionMoE.__new__(ewa.RandomPartitionMoE)
            old.__setstate__(state)
            assert old.saved == saved
            assert old(torch.randn(3, 8)).shape == (3, 8)

    @pytest.mark.parametrize("saved", CODED)
    def test_transforms_of_the_reference(self, saved):
        x, parameters = exact_ffn(9, 8, 12)

        def loss(x):
            options = {"seed": 5, "saved": saved, "backend": "reference"}
            return ewa.functional.moe_ffn(x, *parameters, **options).square().sum()

        leaf = x.clone().requires_grad_()
        loss(leaf).backward()
        torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad)

    def test_whole_models(self):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)))
        ewa.replace_ffn_(model, saved="4bit")
        assert model[1].saved == "4bit"

    @pytest.mark.parametrize("word", ["4bits", None, 4])
    def test_bad_input(self, word):
        x, parameters = exact_ffn(6, 4, 4)
        message = f"saved must be one of {', '.join(SAVED)}, got {word!r}"
        with pytest.raises(ValueError, match=message):
            ewa.functional.moe_ffn(x, *parameters, seed=1, saved=word)
        with pytest.raises(ValueError, match=message):
            ewa.RandomPartitionMoE(4, 4, 2, saved=word)
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        with pytest.raises(ValueError, match=message):
            ewa.replace_ffn_(model, saved=word)
        with pytest.raises(ValueError, match=r"saved must be 'recompute', or not given, with recompute=True, got"):
            ewa.functional.moe_ffn(x, *parameters, seed=1, saved="8bit", recompute=True)
