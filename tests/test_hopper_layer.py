"""`backend="hopper"` as users call it: its kernels' own source, in the model of sm_90a on the host."""

import pytest
import torch
from hopper_model import build_module
from parity import check_ffn, check_grouped, random_ffn

import ewa_kernels as ewa
from ewa_kernels.kernels import devices, hopper
from ewa_kernels.problem import Deal, Inputs, Options, Problem

moe_ffn, grouped_ffn = ewa.functional.moe_ffn, ewa.functional.grouped_ffn


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    return build_module(tmp_path_factory.mktemp("hopper"))


@pytest.fixture
def calls(on_host, monkeypatch):
    """The backend runs on the host; the names of the products that it asks for."""
    on_host.set_machine(1, "random", 4)
    seen = []

    class Recorded:
        def __getattr__(self, name):
            return getattr(on_host, name)

        @staticmethod
        def hopper_product(call, *args, **operands):
            seen.append(call.name)
            on_host.hopper_product(call, *args, **operands)

    monkeypatch.setattr(hopper, "_C", Recorded(), raising=False)
    monkeypatch.setattr(devices, "why_not_hopper", lambda device: None)
    return seen


def tokens(*shape, dtype=torch.bfloat16, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "sizes", "options"),
    [
        (301, (2, 72, 136), {"dropout_p": 0.3}),
        (130, (3, 40, 72), {"activation": "silu", "gated": True}),
        (130, (1, 24, 72), {"activation": "relu2"}),
        (70, (2, 24, 40), {"activation": "gelu_tanh", "gated": True, "dropout_p": 0.2}),
        (3, (5, 16, 16), {}),
        (0, (2, 16, 16), {}),
    ],
    ids=str,
)
def test_random_partition(num_tokens, sizes, options, dtype, calls):
    for bias in (True, False):
        weights = random_ffn(*sizes, dtype=dtype, gated=options.get("gated", False), bias=bias)
        check_ffn(tokens(num_tokens, sizes[1], dtype=dtype), weights, backend="hopper", seed=11, **options)
    assert (len(calls) == 0) == (num_tokens == 0)


@pytest.mark.parametrize(
    ("sizes", "top_k", "options"),
    [
        ((0, 300, 1, 99), 2, {"activation": "silu", "gated": True}),
        ((65, 64, 71), 1, {}),
        ((120, 0, 10), 2, {"dropout_p": 0.2}),
    ],
    ids=str,
)
def test_given_partition(sizes, top_k, options, calls):
    num_rows, dtype = sum(sizes), torch.bfloat16
    weights = random_ffn(len(sizes), 40, 72, dtype=dtype, gated=options.get("gated", False))
    routing_weights = tokens(num_rows // top_k, top_k, dtype=torch.float32, seed=1).softmax(1)
    operands = (tokens(num_rows // top_k, 40), *weights, routing_weights)
    partition = {
        "permutation": torch.randperm(num_rows, generator=torch.Generator().manual_seed(3)).int(),
        "expert_offsets": torch.tensor([0, *sizes]).cumsum(0).int(),
    }
    options = {**options, **partition, **({"seed": 5} if "dropout_p" in options else {})}
    check_grouped(operands, tokens(num_rows // top_k, 40, seed=2), backend="hopper", **options)


def gradients(needed, weights, x, **options):
    """Of some of the operands, by name."""
    leaves = dict(zip(("x", "up_weight", "up_bias", "down_weight", "down_bias"), (x, *weights), strict=True))
    leaves = {name: leaf.clone().requires_grad_(name in needed) for name, leaf in leaves.items()}
    y = moe_ffn(*leaves.values(), seed=3, backend="hopper", **options)
    y.backward(tokens(*y.shape, seed=5).to(y.dtype))
    return {name: leaves[name].grad for name in needed}


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        (("x",), ["grad_pre", "grad_x"]),
        (("up_weight",), ["grad_pre", "grad_weight"]),
        (("up_bias",), ["grad_pre", "grad_weight"]),
        (("down_weight",), ["grad_pre", "grad_weight"]),
        (("down_bias",), ["grad_weight"]),
    ],
)
def test_no_more_than_is_needed(needed, expected, calls):
    weights, x = random_ffn(2, 40, 72, dtype=torch.bfloat16), tokens(150, 40)
    everything = gradients(("x", "up_weight", "up_bias", "down_weight", "down_bias"), weights, x)
    assert calls == ["up", "down", "grad_pre", "grad_weight", "grad_x", "grad_weight"]
    calls.clear()
    (name,) = needed
    assert torch.equal(gradients(needed, weights, x)[name], everything[name])
    assert calls == ["up", "down", *expected]


def test_bias_alone_gets_the_same_bits(calls):
    """Though its sums come with a narrower product, in as many parts."""
    weights, x = random_ffn(1, 1024, 64, dtype=torch.float32), tokens(640, 1024)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # more digits show
        both = gradients(("down_weight", "down_bias"), weights, x)
        assert torch.equal(gradients(("down_bias",), weights, x)["down_bias"], both["down_bias"])


@pytest.mark.parametrize("margin", [0, 2])
def test_launches_overlap_only_where_no_multiprocessor_is_left_free(margin, calls, on_host, monkeypatch):
    """One that waits for the one before it would wait on those."""
    seen = []
    monkeypatch.setattr(on_host, "hopper_gather", lambda layer, of_call, *args: seen.append(of_call[-3::2]))
    problem = Problem.of(
        Inputs(tokens(5, 8), *random_ffn(2, 8, 8, dtype=torch.bfloat16), None), False,
        Options("gelu", False, 0.0, "hopper", "full"), False,
    )  # fmt: skip
    ewa.set_sm_margin(margin)
    try:
        hopper._Call(problem, Inputs(tokens(5, 8), *random_ffn(2, 8, 8), None), Deal(1)).gather(True, None, None)
    finally:
        ewa.set_sm_margin(0)
    assert seen == [(4 - margin, margin == 0)]


@pytest.mark.parametrize(("activation", "products"), [("gelu", []), ("relu", ["up", "down"])])
def test_forward_in_one_launch(activation, products, calls, monkeypatch):
    """To the same bits; where rows of x are gathered before, there are two."""
    weights, x = random_ffn(3, 40, 72, dtype=torch.bfloat16), tokens(301, 40)
    options = {"seed": 3, "activation": activation, "dropout_p": 0.2, "backend": "hopper"}
    expected = moe_ffn(x, *weights, **options)
    calls.clear()
    monkeypatch.setattr(hopper, "ONE_LAUNCH", True)
    assert torch.equal(moe_ffn(x, *weights, **options), expected)
    assert calls == products


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_computed_again(activation, calls):
    """To the same bits: by a deal that backward makes once more."""
    weights, x = random_ffn(2, 40, 72, dtype=torch.float16), tokens(150, 40, dtype=torch.float16)
    of_kept, of_computed = (
        gradients(("x", "up_weight", "down_weight"), weights, x, activation=activation, recompute=recompute)
        for recompute in (False, True)
    )
    assert calls.count("up") == 3
    assert all(torch.equal(of_kept[name], of_computed[name]) for name in of_kept)


@pytest.mark.parametrize(("saved", "limit"), [("8bit", 0.02), ("4bit", 0.12), ("recompute-8bit", 0.02)])
def test_kept_in_8_and_4_bits(saved, limit, calls):
    """By slot, of which there is one more than rows."""
    weights, x = random_ffn(2, 40, 72, dtype=torch.float16), tokens(151, 40, dtype=torch.float16)
    full, kept = (gradients(("x", "up_weight", "down_weight"), weights, x, saved=how) for how in ("full", saved))
    for name, expected in full.items():
        error = (kept[name].double() - expected.double()).norm() / expected.double().norm()
        assert 1e-4 < error < limit, (name, error)


def test_under_autocast(calls):
    """Gradients of float32 parameters are rounded to nothing less."""
    weights, x = random_ffn(2, 40, 72, dtype=torch.float32), tokens(150, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = gradients(("up_weight", "up_bias", "down_weight"), weights, x)
    for grad in grads.values():
        assert grad.dtype == torch.float32
        assert not torch.equal(grad, grad.bfloat16().float())


@pytest.mark.parametrize(("dtype", "d_model"), [(torch.bfloat16, 20), (torch.float32, 40)])
def test_what_it_is_not_for_is_tritons(dtype, d_model, calls):
    weights, x = random_ffn(2, d_model, 72, dtype=dtype), tokens(50, d_model, dtype=dtype)
    ours = gradients(("x", "up_weight", "up_bias"), weights, x)
    assert calls == []
    y = moe_ffn(x, *weights, seed=3, backend="hopper")
    assert torch.equal(y, moe_ffn(x, *weights, seed=3, backend="triton"))
    assert all(grad.isfinite().all() and grad.any() for grad in ours.values())


def test_a_launch_that_fails_says_why(calls):
    weights = random_ffn(2, 40, 72, dtype=torch.bfloat16)
    many = [t[:1].expand(32769, *t.shape[1:]) for t in weights]
    with pytest.raises(ValueError, match="up_weight must hold at most 32768 experts"):
        moe_ffn(tokens(5, 40), *many, seed=0, backend="hopper")
    layer = hopper._C.HopperLayer(True, 5, 2, 12, 8, 1, False, hopper._C.HopperActivation.gelu, False, [1, 1, 0], 0, 1)
    with pytest.raises(RuntimeError, match=r'backend="hopper": sizes must be multiples of 8, got 12'):
        hopper._C.hopper_tabulate(layer, (0, 0, 0, 0, 4, 0, True), 0, 0)


def test_where_it_cannot_run():
    with pytest.raises(ewa.BackendError, match="cannot run moe_ffn on cpu: it is for CUDA devices"):
        moe_ffn(tokens(5, 8), *random_ffn(2, 8, 8, dtype=torch.bfloat16), seed=0, backend="hopper")
