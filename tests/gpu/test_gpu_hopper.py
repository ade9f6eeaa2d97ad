"""`backend="hopper"` on such a GPU: real sizes, launches, bits, graphs. Run by `make gpu`."""

import subprocess
import sys

import pytest
import torch
from parity import check_ffn, check_grouped, random_ffn
from test_gpu import kernels, parameters, step, tokens
from test_gpu_routed import choices_of

import ewa_kernels as ewa
from ewa_kernels.kernels import devices, hopper

pytestmark = pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="it is for Hopper")


def test_they_are_there():
    assert devices.why_not_hopper(torch.device("cuda", 0)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("num_tokens", "d_model", "d_ff"),
    [
        pytest.param(50432, 384, 1536, id="ViT-S"),
        pytest.param(12608, 768, 3072, id="ViT-B, 64 images"),
        pytest.param(12607, 776, 3080, id="odd sizes"),
        pytest.param(777, 768, 3072, id="few tokens"),
        pytest.param(3, 768, 3072, id="experts without tokens"),
    ],
)
def test_parity_at_real_sizes(num_tokens, d_model, d_ff, dropout_p, gated, dtype):
    weights = parameters(4, d_model, d_ff, gated=gated, dtype=dtype)
    options = {"seed": 3, "gated": gated, "dropout_p": dropout_p, "activation": "silu" if gated else "gelu"}
    check_ffn(tokens(num_tokens, d_model, dtype=dtype), weights, backend="hopper", **options)


@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu", "relu", "relu2", "identity"])
def test_activations(activation):
    check_ffn(tokens(5000, 256), parameters(4, 256, 512), seed=3, activation=activation, backend="hopper")


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_given_partition(gated, top_k):
    weights = [t.cuda() for t in random_ffn(8, 384, 1536, gated=gated, dtype=torch.bfloat16)]
    routing_weights, partition = choices_of(9001, 8, top_k)
    operands = (tokens(9001, 384), *weights, routing_weights.bfloat16())
    check_grouped(operands, tokens(9001, 384), backend="hopper", exact_by="torch", gated=gated, **partition)


def test_number_of_launches(monkeypatch):
    """Of ViT-B: two forward; backward the gather, four products, and the sums of both weights' and biases' parts."""
    weights = [t.requires_grad_() for t in parameters(4, 768, 3072)]
    x, grad_y = tokens(50432, 768).requires_grad_(), tokens(50432, 768)
    y = ewa.functional.moe_ffn(x, *weights, seed=0, backend="hopper")
    forward = kernels(lambda: ewa.functional.moe_ffn(x, *weights, seed=0, backend="hopper"))
    assert len(forward) == 2, forward
    monkeypatch.setattr(hopper, "ONE_LAUNCH", True)
    forward = kernels(lambda: ewa.functional.moe_ffn(x, *weights, seed=0, backend="hopper"))
    assert len(forward) == 1, forward
    backward = kernels(lambda: torch.autograd.grad(y, [x, *weights], grad_y, retain_graph=True))
    assert len(backward) == 9, backward


def test_same_bits_whatever_else(monkeypatch):
    """A hundred times; also where launches do not overlap, are one, and on fewer multiprocessors."""
    weights = [t.requires_grad_() for t in parameters(4, 384, 1536)]
    x, grad_y = tokens(9001, 384).requires_grad_(), tokens(9001, 384)
    first = step(x, weights, grad_y, 1, "hopper")
    for i in range(100):
        monkeypatch.setattr(hopper, "OVERLAPS", i % 2 == 0)
        monkeypatch.setattr(hopper, "ONE_LAUNCH", i % 3 == 0)
        ewa.set_sm_margin(i % 5)
        try:
            again = step(x, weights, grad_y, 1, "hopper")
        finally:
            ewa.set_sm_margin(0)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_others_run_where_multiprocessors_are_left_free():
    """A kernel on another stream ends while the layer is at work."""
    weights, x, other = parameters(4, 1024, 4096), tokens(200_000, 1024), torch.cuda.Stream()
    small, done, end = torch.ones(1000, device="cuda"), torch.cuda.Event(), torch.cuda.Event()
    ewa.functional.moe_ffn(x, *weights, seed=0, backend="hopper")
    torch.cuda.synchronize()
    ewa.set_sm_margin(8)
    try:
        ewa.functional.moe_ffn(x, *weights, seed=0, backend="hopper")
        end.record()
    finally:
        ewa.set_sm_margin(0)
    with torch.cuda.stream(other):
        small.mul_(2)
        done.record()
    done.synchronize()
    assert not end.query()


def test_backward_may_be_what_first_uses_the_device_in_a_thread():
    """The tensors of a launch are described by the driver, which needs the device's context."""
    code = """if True:
        import torch, ewa_kernels as ewa
        options = {"device": "cuda", "dtype": torch.bfloat16, "backend": "hopper", "recompute": True}
        layer = ewa.RandomPartitionMoE(64, 128, 2, **options)
        x = torch.randn(100, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.isfinite().all()
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_streams_do_not_disturb_one_another():
    weights = [t.requires_grad_() for t in parameters(4, 384, 1536)]
    x, grad_y = tokens(9001, 384).requires_grad_(), tokens(9001, 384)
    expected = [step(x, weights, grad_y, seed, "hopper") for seed in range(4)]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for seed, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            results.append(step(x, weights, grad_y, seed, "hopper"))
    torch.cuda.synchronize()
    for ours, theirs in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("one_launch", [False, True])
def test_in_a_graph(one_launch, monkeypatch):
    """A replay reads the seed that is there then."""
    monkeypatch.setattr(hopper, "ONE_LAUNCH", one_launch)
    weights, x, seed = parameters(4, 384, 1536), tokens(5000, 384), torch.tensor(1, device="cuda")
    options = {"dropout_p": 0.1, "backend": "hopper"}
    ewa.functional.moe_ffn(x, *weights, seed=seed, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ewa.functional.moe_ffn(x, *weights, seed=seed, **options)
    for value in (1, 5, 2**62):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(y, ewa.functional.moe_ffn(x, *weights, seed=value, **options))


def test_a_row_without_a_number_stays_one():
    """A NaN in a token is in its row of y alone."""
    weights, x = parameters(4, 384, 1536), tokens(1001, 384)
    x[77] = torch.nan
    y = ewa.functional.moe_ffn(x, *weights, seed=3, backend="hopper")
    assert y.isnan().any(1).nonzero().tolist() == [[77]]
