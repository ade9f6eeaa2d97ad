"""The routed layer on a GPU: real sizes, launches, no host sync, graphs. Run by `make gpu`."""

import pytest
import torch
from parity import check_grouped, random_ffn
from test_expert_linear import check, operands
from test_gpu import kernels, tokens

import ewa_kernels as ewa


def layer_of(num_experts, top_k, **options):
    torch.manual_seed(0)
    return ewa.RoutedMoE(384, 1536, num_experts, top_k, device="cuda", dtype=torch.bfloat16, **options)


def choices_of(num_tokens, num_experts, top_k):
    logits = torch.randn(num_tokens, num_experts, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    routing_weights, choices = ewa.functional.route(logits, top_k)
    permutation, offsets = ewa.functional.partition_by_expert(choices, num_experts)
    return routing_weights, {"permutation": permutation, "expert_offsets": offsets}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("form", ["triton-single", "triton-split", "cublas"])
def test_parity_at_real_sizes(form, top_k, gated, dtype):
    if form == "cublas" and dtype != torch.bfloat16:
        pytest.skip("PyTorch's products of given groups are for bfloat16")
    weights = [t.cuda() for t in random_ffn(8, 384, 1536, gated=gated, dtype=dtype)]
    routing_weights, partition = choices_of(9001, 8, top_k)
    operands = (tokens(9001, 384, dtype=dtype), *weights, routing_weights.to(dtype))
    grad_y = tokens(9001, 384, dtype=dtype)
    check_grouped(operands, grad_y, backend=form, exact_by="torch", gated=gated, **partition)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("gather", "scatter"), [(True, False), (False, True)], ids=["gather", "scatter"])
def test_one_product_at_real_sizes(gather, scatter, dtype):
    _, partition = choices_of(9001, 8, 1)
    given = operands(9001, 384, d_out=1536, num_experts=8, dtype=dtype, device="cuda")
    check(given, "triton", gather=gather, scatter=scatter, **partition)


def step(layer, x, grad_y):
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad_y)


def test_same_bits_a_hundred_times():
    layer, x, grad_y = layer_of(8, 2), tokens(9001, 384).requires_grad_(), tokens(9001, 384)
    first = step(layer, x, grad_y)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(step(layer, x, grad_y), first, strict=True))


def test_nothing_waits_for_the_gpu():
    layer, x = layer_of(8, 2), tokens(5000, 384).requires_grad_()
    (layer(x).sum() + layer.load_balance_loss + layer.z_loss).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (layer(x).sum() + layer.load_balance_loss + layer.z_loss).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_experts_are_one_launch(top_k):
    """Besides the router's: forward one kernel, and with k > 1 a sum."""
    layer, x = layer_of(8, top_k).eval(), tokens(5000, 384)
    with torch.no_grad():
        launched = kernels(lambda: layer(x))
    assert sum("forward_kernel" in name for name in launched) == 1, launched


def test_in_a_graph():
    """A replay routes what is in x then, in groups of other sizes."""
    layer, x = layer_of(8, 2).eval(), tokens(5000, 384)
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for scale in (1.0, -3.0, 0.1):
            x.mul_(scale)
            graph.replay()
            assert torch.equal(y, layer(x))


def test_compiled_as_eager():
    torch.compiler.reset()
    layer, x = layer_of(8, 2), tokens(5000, 384)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=2e-2, atol=2e-2)
