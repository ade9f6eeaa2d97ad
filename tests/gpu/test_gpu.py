"""What only a GPU can show: real sizes, numbers of launches, streams, graphs, the compiler. Run by `make gpu`."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from parity import assert_parity, check_ffn, random_ffn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import ewa_kernels as ewa
from ewa_kernels import calls, problem
from ewa_kernels.kernels import counters
from ewa_kernels.kernels.triton import configs
from ewa_kernels.kernels.triton.backward import backward_kernel, grad_x_kernel, pre_kernel, weights_kernel
from ewa_kernels.kernels.triton.forward import forward_kernel
from ewa_kernels.kernels.triton.launch import Launch
from ewa_kernels.kernels.triton.split import half_kernel

HALF = [torch.bfloat16, torch.float16]


def tokens(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(7))


def parameters(*sizes, dtype=torch.bfloat16, **options):
    return tuple(t if t is None else t.cuda() for t in random_ffn(*sizes, dtype=dtype, **options))


def kernels(function):
    """Names of all kernels, copies and fills that a function launches, after a first call that does not count."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        function()
        torch.cuda.synchronize()
    return [event.name for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("form", ["triton-single", "triton-split", "cublas"])
@pytest.mark.parametrize(
    ("num_tokens", "d_model", "d_ff"),
    [
        pytest.param(50432, 384, 1536, id="ViT-S"),
        pytest.param(12608, 768, 3072, id="ViT-B, 64 images"),
        pytest.param(12607, 770, 3075, id="odd sizes"),
        pytest.param(777, 768, 3072, id="few tokens"),
    ],
)
def test_parity_at_real_sizes(num_tokens, d_model, d_ff, form, gated, dtype):
    weights = parameters(4, d_model, d_ff, gated=gated, dtype=dtype)
    check_ffn(tokens(num_tokens, d_model, dtype=dtype), weights, seed=3, gated=gated, backend=form)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("d_model", [96, 128])
def test_onchip_at_real_sizes(d_model, dtype):
    weights = parameters(4, d_model, 4 * d_model, dtype=dtype)
    check_ffn(tokens(200705, d_model, dtype=dtype), weights, seed=3, backend="triton-onchip")


@pytest.mark.parametrize("dtype", HALF)
def test_recompute_gives_the_same_bits(dtype):
    weights = [t.requires_grad_() for t in parameters(4, 384, 1536, dtype=dtype)]
    x, grad_y = tokens(9001, 384, dtype=dtype).requires_grad_(), tokens(9001, 384, dtype=dtype)

    def grads(recompute):
        y = ewa.functional.moe_ffn(x, *weights, seed=1, recompute=recompute, backend="triton-single")
        return torch.autograd.grad(y, [x, *weights], grad_y)

    for kept, computed in zip(grads(False), grads(True), strict=True):
        assert torch.equal(kept, computed)


@pytest.mark.parametrize("form", ["triton-single", "triton-split"])
def test_ragged_groups(form):
    """Against the random partition, given as one: the same bits; and against torch with groups of all sizes."""
    x, weights = tokens(9001, 384), parameters(4, 384, 1536)
    permutation = ewa.functional.random_permutation(9001, 3, device="cuda")
    equal = torch.tensor(ewa.functional.expert_offsets(9001, 4), device="cuda")
    given = {"permutation": permutation, "expert_offsets": equal, "backend": form}
    drawn = ewa.functional.moe_ffn(x, *weights, seed=3, backend=form)
    assert torch.equal(ewa.functional.grouped_ffn(x, *weights, **given), drawn)
    given["expert_offsets"] = torch.tensor([0, 5000, 5000, 5001, 9001], device="cuda")
    ours = ewa.functional.grouped_ffn(x, *weights, **given)
    given["backend"] = "torch"
    exact = ewa.functional.grouped_ffn(x.double(), *(t.double() for t in weights), **given)
    assert_parity("y", ours, exact, ewa.functional.grouped_ffn(x, *weights, **given))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_follows_torch(precision):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        weights = parameters(4, 384, 1536, dtype=torch.float32)
        # Tensor cores read of a float32 what tf32 has of it, where PyTorch's products round to it first.
        slack = 4.0 if precision == "tf32" else 1.0
        check_ffn(tokens(4099, 384, dtype=torch.float32), weights, seed=3, backend="triton", slack=slack)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_more_than_an_int32_of_hidden():
    """T·F > 2³¹: output and grad_x of rows here and there, and the weights' gradients in pieces."""
    num_tokens, d_model, d_ff = 2**21 + 5, 64, 1024
    weights = [t.requires_grad_() for t in parameters(2, d_model, d_ff)]
    x = tokens(num_tokens, d_model).requires_grad_()
    y = ewa.functional.moe_ffn(x, *weights, seed=3, backend="triton-single")
    grad_y = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *weights], grad_y)

    permutation = ewa.functional.random_permutation(num_tokens, 3, device="cuda").long()
    offsets = ewa.functional.expert_offsets(num_tokens, 2)
    wide = [t.detach().double().requires_grad_() for t in weights]
    narrow = [t.detach().requires_grad_() for t in weights]
    totals = [[torch.zeros_like(t, dtype=torch.float64) for t in weights] for _ in range(2)]
    for e in range(2):
        rows = permutation[offsets[e] : offsets[e + 1]]
        for piece in rows.split(2**17):
            results = []
            for total, group in zip(totals, (wide, narrow), strict=True):
                leaf = x.detach()[piece].to(group[0].dtype).requires_grad_()
                up_weight, up_bias, down_weight, down_bias = (t[e : e + 1] for t in group)
                out = ewa.reference.moe_ffn(leaf, up_weight, up_bias, down_weight, down_bias, seed=0)
                pieces = torch.autograd.grad(out, [leaf, *group], grad_y[piece].to(out.dtype))
                for sum_, part in zip(total, pieces[1:], strict=True):
                    sum_ += part
                results.append((out, pieces[0]))
            (exact, exact_grad), (torch_, torch_grad) = results
            assert_parity("y", y[piece].detach(), exact.detach(), torch_.detach())
            assert_parity("grad_x", grads[0][piece], exact_grad, torch_grad)
    for grad, exact, torch_ in zip(grads[1:], *totals, strict=True):
        assert_parity("gradient of a parameter", grad, exact, torch_.to(grad.dtype))


class TestLaunches:
    @pytest.mark.parametrize("d_model", [96, 384])
    @pytest.mark.parametrize("gated", [False, True])
    def test_one_forward_one_backward(self, gated, d_model):
        kind = {"device": "cuda", "dtype": torch.bfloat16, "backend": "triton-single"}
        layer = ewa.RandomPartitionMoE(d_model, 4 * d_model, 4, gated=gated, **kind)
        x = tokens(5000, d_model).requires_grad_()
        with torch.no_grad():
            assert len(kernels(lambda: layer(x))) == 1
        assert len(kernels(lambda: layer(x))) == 1, "a forward in training"
        inputs = [x, *layer.parameters()]
        grad_y = torch.randn_like(x)
        y = layer(x)
        launched = kernels(lambda: torch.autograd.grad(y, inputs, grad_y, retain_graph=True))
        assert len(launched) == 1, launched
        assert "backward_kernel" in launched[0]

    def test_split(self):
        weights = parameters(4, 384, 1536)
        x = tokens(5000, 384)
        launched = kernels(lambda: ewa.functional.moe_ffn(x, *weights, seed=0, backend="triton-split"))
        assert len(launched) == 2, launched

    def test_backward_in_the_faster_form(self):
        """For a large gated layer that is three launches, on Hopper."""
        if torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("of this kind of GPU nothing is known")
        layer = ewa.RandomPartitionMoE(1536, 4096, 4, gated=True, device="cuda", dtype=torch.bfloat16, backend="triton")
        x = tokens(5000, 1536).requires_grad_()
        y = layer(x)
        inputs, grad_y = [x, *layer.parameters()], torch.randn_like(y)
        launched = kernels(lambda: torch.autograd.grad(y, inputs, grad_y, retain_graph=True))
        assert sorted(launched) == ["grad_x_kernel", "pre_kernel", "weights_kernel"]

    def test_library(self):
        """Three passes forward and five backward, between two products and four."""
        weights = [t.requires_grad_() for t in parameters(4, 384, 1536)]
        x, grad_y = tokens(5000, 384).requires_grad_(), tokens(5000, 384)
        y = ewa.functional.moe_ffn(x, *weights, seed=0, backend="cublas")
        forward = kernels(lambda: ewa.functional.moe_ffn(x, *weights, seed=0, backend="cublas"))
        assert [n for n in forward if n.endswith("_kernel")] == ["gather_kernel", "activate_kernel", "scatter_kernel"]
        backward = kernels(lambda: torch.autograd.grad(y, [x, *weights], grad_y, retain_graph=True))
        passes = ["activate_backward_kernel", "gather_kernel", "scatter_kernel", "sums_kernel"]
        assert sorted(n for n in backward if n.endswith("_kernel")) == passes
        assert (len(forward), len(backward)) == (5, 8)

    def test_the_mean_of_experts(self):
        layer = ewa.RandomPartitionMoE(384, 1536, 4, device="cuda", dtype=torch.bfloat16).eval()
        x = tokens(5000, 384)
        with torch.no_grad():
            launched = kernels(lambda: layer(x))
        assert sum("merge_kernel" in name for name in launched) == 1
        assert len(launched) <= 4  # and two products, and the activation

    def test_permutation(self):
        seed = torch.tensor(3, device="cuda")
        assert len(kernels(lambda: ewa.functional.random_permutation(50432, seed))) == 1


def test_permutation_is_the_specified_one():
    for num_tokens in (1, 5, 1023, 1024, 50432, 3_000_000):
        expected = ewa.reference.random_permutation(num_tokens, 2**62 + 1)
        assert torch.equal(ewa.functional.random_permutation(num_tokens, 2**62 + 1, device="cuda").cpu(), expected)


def step(x, weights, grad_y, seed, form):
    y = ewa.functional.moe_ffn(x, *weights, seed=seed, dropout_p=0.1, backend=form)
    return y.detach(), *torch.autograd.grad(y, [x, *weights], grad_y)


@pytest.mark.parametrize(("d_model", "form"), [(384, "triton-single"), (96, "triton-onchip"), (384, "cublas")])
def test_same_bits_a_hundred_times(d_model, form):
    weights = [t.requires_grad_() for t in parameters(4, d_model, 4 * d_model)]
    x, grad_y = tokens(9001, d_model).requires_grad_(), tokens(9001, d_model)
    first = step(x, weights, grad_y, 1, form)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(step(x, weights, grad_y, 1, form), first, strict=True))
    assert not any(counters.any() for counters in counters._counters.values())


def test_streams_do_not_disturb_one_another():
    weights = [t.requires_grad_() for t in parameters(4, 384, 1536)]
    x, grad_y = tokens(9001, 384).requires_grad_(), tokens(9001, 384)
    expected = [step(x, weights, grad_y, seed, "triton-single") for seed in range(4)]
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for seed, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append(step(x, weights, grad_y, seed, "triton-single"))
        torch.cuda.synchronize()
        for ours, theirs in zip(results, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_after_a_launch_that_failed(monkeypatch):
    """Its counters are in an unknown state, and nobody gets them again."""
    weights = [t.requires_grad_() for t in parameters(4, 384, 1536)]
    x, grad_y = tokens(9001, 384).requires_grad_(), tokens(9001, 384)
    expected = step(x, weights, grad_y, 1, "triton-single")

    def fail(launch, tensors, counters, **others):
        counters.fill_(7)
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patched:
            patched.setattr(Launch, "__call__", fail)
            with pytest.raises(KeyboardInterrupt):
                step(x, weights, grad_y, 1, "triton-single")
        again = step(x, weights, grad_y, 1, "triton-single")
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


class TestGraphs:
    def test_seed_in_memory(self):
        """A replay reads the seed that is there then."""
        weights, x = parameters(4, 384, 1536), tokens(5000, 384)
        seed = torch.tensor(1, device="cuda")
        ewa.functional.moe_ffn(x, *weights, seed=seed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ewa.functional.moe_ffn(x, *weights, seed=seed)
        for value in (1, 5, 2**62):
            seed.fill_(value)
            for _ in range(3):
                graph.replay()
            assert torch.equal(y, ewa.functional.moe_ffn(x, *weights, seed=value))

    def test_a_layer_draws_anew_in_each_replay(self):
        layer = ewa.RandomPartitionMoE(384, 768, 4, device="cuda", dtype=torch.bfloat16)
        x, grad_y = tokens(5000, 384).requires_grad_(), tokens(5000, 384)
        layer(x).backward(grad_y)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
            (grad_x,) = torch.autograd.grad(y, [x], grad_y)
        seen = []
        for _ in range(3):
            graph.replay()
            seen.append(y.clone())
            assert grad_x.isfinite().all()
        assert not torch.equal(seen[0], seen[1])
        assert not torch.equal(seen[1], seen[2])

    @pytest.mark.parametrize("seed", [7, torch.tensor(7)], ids=["int", "on the CPU"])
    def test_a_seed_on_the_host_is_refused(self, seed):
        weights, x = parameters(4, 384, 768), tokens(500, 384)
        ewa.functional.moe_ffn(x, *weights, seed=7)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="seed must be a tensor on cuda"), torch.cuda.graph(graph):
            ewa.functional.moe_ffn(x, *weights, seed=seed)

    def test_weights_are_those_of_the_replay(self):
        """Under autocast, with bfloat16 copies that other values have replaced, or that are gone."""
        model = torch.nn.Sequential(ewa.RandomPartitionMoE(384, 768, 4, device="cuda"))
        optimizer = ewa.optim.AdamW(
            model.parameters(), lr=0.1, averager=ewa.ExpertAverager(model, 0.3), bf16_copies=True
        )
        x, seed = tokens(1000, 384, dtype=torch.float32), torch.tensor(3, device="cuda")

        def forward():
            with torch.autocast("cuda", torch.bfloat16):
                return model[0](x, seed=seed)

        forward().sum().backward()
        optimizer.step()
        with torch.no_grad():
            forward()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = forward()
            model.load_state_dict({name: value / 2 for name, value in model.state_dict().items()})
            del optimizer
            torch.cuda.empty_cache()
            graph.replay()
            assert torch.equal(y, forward())


class TestCompile:
    def test_a_seed_on_the_cpu_in_each_replay(self):
        """CUDA graphs of the compiler, too, deal by the seed of the call."""
        torch.compiler.reset()
        layer = ewa.RandomPartitionMoE(384, 768, 4, device="cuda", dtype=torch.bfloat16)
        compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
        x = tokens(5000, 384)
        with torch.no_grad():
            for step in range(6):
                torch.compiler.cudagraph_mark_step_begin()
                assert torch.equal(compiled(x, seed=torch.tensor(step)), layer(x, seed=step))

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_as_eager(self, mode):
        torch.compiler.reset()
        layer = ewa.RandomPartitionMoE(384, 768, 4, device="cuda", dtype=torch.bfloat16)
        compiled = torch.compile(layer, fullgraph=True, mode=mode)
        x = tokens(5000, 384).requires_grad_()
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            compiled(x, seed=torch.tensor(3, device="cuda")).sum().backward()
        x.grad = None
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x, seed=torch.tensor(3, device="cuda"))
        torch.testing.assert_close(y, layer(x, seed=3))

    def test_draws_the_seeds_of_eager(self):
        torch.compiler.reset()
        layer = ewa.RandomPartitionMoE(384, 768, 4, device="cuda", dtype=torch.bfloat16)
        compiled = torch.compile(layer, fullgraph=True)
        x = tokens(5000, 384)
        compiled(x)
        results = []
        for function in (compiled, layer):
            torch.manual_seed(5)
            results.append([function(x), function(x)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(*results[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_the_deal(use_reentrant):
    layer = ewa.RandomPartitionMoE(384, 768, 4, dropout=0.2, device="cuda", dtype=torch.bfloat16)

    def grads(run):
        torch.manual_seed(1)
        x = tokens(5000, 384).requires_grad_()
        y = run(x)
        y.square().sum().backward()
        return y.detach(), x.grad

    plain = grads(layer)
    recomputed = grads(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("form", ["triton-single", "triton-split"])
@pytest.mark.parametrize("offsets", [[0, 1000, 0, 1000, 1000], [5, 90000, -7, 600, 12]])
def test_bad_offsets_end(form, offsets):
    """With more row blocks than exist the backward once waited for ever; nothing is written elsewhere."""
    x, weights = tokens(1000, 384).requires_grad_(), parameters(4, 384, 768)
    partition = {
        "permutation": torch.randperm(1000, device="cuda").int(),
        "expert_offsets": torch.tensor(offsets, device="cuda"),
    }
    routing_weights = torch.rand(1000, 1, device="cuda", requires_grad=True)
    around = [torch.full((1 << 20,), 3.0, device="cuda") for _ in range(8)]
    y = ewa.functional.grouped_ffn(x, *weights, **partition, routing_weights=routing_weights, backend=form)
    y.sum().backward()
    torch.cuda.synchronize()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(bool((wall == 3.0).all()) for wall in around)


@pytest.mark.parametrize("is_bad", [False, True])
def test_debug_mode_says_what_is_wrong_and_nothing_else(is_bad):
    """In a process of its own: a failed assert ends its use of the GPU. Hashes may overflow, of deals and dropout."""
    code = f"""
import torch, ewa_kernels as ewa
layer = ewa.RandomPartitionMoE(64, 128, 4, dropout=0.1, device="cuda", dtype=torch.bfloat16)
x = torch.zeros(1000, 64, device="cuda", dtype=torch.bfloat16)
layer(x).sum().backward()
torch.cuda.synchronize()
print("dealt")
partition = dict(permutation=torch.arange(1000), expert_offsets=torch.tensor([0, 9, {3 if is_bad else 9}, 9, 1000]))
partition = {{name: value.cuda() for name, value in partition.items()}}
ewa.functional.grouped_ffn(x, *layer.experts, **partition, backend="triton").sum().backward()
torch.cuda.synchronize()
"""
    environment = {**os.environ, "EWA_KERNELS_DEBUG": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert "dealt" in result.stdout, result.stderr
    assert (result.returncode != 0) == is_bad, result.stderr
    assert ("expert_offsets must rise" in result.stdout + result.stderr) == is_bad


@pytest.mark.parametrize("form", ["triton-single", "triton-split"])
def test_weights_at_odd_addresses(form):
    """The bits, and about the time, of the same weights at even ones: no other kernel is compiled for them."""
    x, weights = tokens(5000, 384).requires_grad_(), [w.requires_grad_() for w in parameters(4, 384, 1536)]
    odd = [torch.empty(w.numel() + 1, dtype=w.dtype, device="cuda")[1:].view(w.shape) for w in weights]
    odd = [t.copy_(w.detach()).requires_grad_() for t, w in zip(odd, weights, strict=True)]
    expected = step(x, weights, x, 1, form)
    launched = (forward_kernel, half_kernel, backward_kernel, pre_kernel, weights_kernel, grad_x_kernel)
    compiled = {kernel: len(kernel.device_caches[0][0]) for kernel in launched}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = step(x, odd, x, 1, form)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert compiled == {kernel: len(kernel.device_caches[0][0]) for kernel in compiled}


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="tiles for Hopper")
@pytest.mark.parametrize(
    ("kernel", "tile"), [(k, t) for k, tiles in configs.CANDIDATES.items() for t in tiles], ids=lambda value: str(value)
)
def test_tiles_that_may_become_the_default(kernel, tile, monkeypatch, request):
    for made in (problem._made, calls._problems):
        request.addfinalizer(made.clear)
    form = "triton-single" if kernel in ("forward", "backward") else "triton-split"
    x, weights = tokens(5000, 384).requires_grad_(), [w.requires_grad_() for w in parameters(4, 384, 1536)]
    expected = step(x, weights, x, 1, form)
    monkeypatch.setitem(configs.table(90, torch.bfloat16, "ieee"), kernel, (tile,))
    problem._made.clear()
    calls._problems.clear()
    for value, other in zip(step(x, weights, x, 1, form), expected, strict=True):
        assert (value - other).norm() <= 1e-3 * other.norm()


class TestMargin:
    @pytest.fixture(autouse=True)
    def no_margin_stays(self):
        yield
        ewa.set_sm_margin(0)

    @pytest.mark.parametrize("form", ["triton-single", "triton-split"])
    def test_changes_no_bit(self, form):
        x = tokens(50_000, 384).requires_grad_()
        weights = [w.requires_grad_() for w in parameters(4, 384, 1536)]
        expected = step(x, weights, x, 1, form)
        ewa.set_sm_margin(8)
        assert all(torch.equal(a, b) for a, b in zip(step(x, weights, x, 1, form), expected, strict=True))

    @pytest.mark.parametrize(("margin", "is_early"), [(0, False), (8, True)])
    def test_leaves_multiprocessors_free(self, margin, is_early):
        """What another stream launches in the meantime runs on them, or else when the one kernel is done."""
        weights, x = parameters(4, 1024, 4096), tokens(200_000, 1024)
        other, square = torch.cuda.Stream(), tokens(256, 256)  # its product needs more registers than the layer leaves
        begin, end, done = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        ewa.set_sm_margin(margin)
        with torch.no_grad():
            for _ in range(2):  # the first compiles
                torch.cuda.synchronize()
                begin.record()
                ewa.functional.moe_ffn(x, *weights, seed=1, backend="triton-single")
                end.record()
                with torch.cuda.stream(other):
                    other.wait_event(begin)
                    torch.cuda._sleep(1_000_000)  # half a millisecond, in which the layer has begun
                    square @ square
                    done.record()
                torch.cuda.synchronize()
        assert (begin.elapsed_time(done) < 0.5 * begin.elapsed_time(end)) == is_early


def test_a_foreign_stream():
    """One that torch did not make gets counters of its own in each launch."""
    x, weights = tokens(5000, 384).requires_grad_(), [w.requires_grad_() for w in parameters(4, 384, 768)]
    expected = step(x, weights, x, 1, "triton-single")
    torch.cuda.synchronize()
    kept = len(counters._counters)
    stream = torch.cuda.ExternalStream(torch.cuda.Stream().cuda_stream)
    with torch.cuda.stream(stream):
        ours = step(x, weights, x, 1, "triton-single")
    stream.synchronize()
    assert len(counters._counters) == kept
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_nothing_waits_for_the_gpu():
    layer = ewa.RandomPartitionMoE(384, 768, 4, device="cuda", dtype=torch.bfloat16)
    x = tokens(5000, 384).requires_grad_()
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_kept_for_backward():
    """x is the caller's; what a forward leaves behind is pre_activation, y and the permutation."""
    layer = ewa.RandomPartitionMoE(768, 3072, 4, device="cuda", dtype=torch.bfloat16)
    x = tokens(20000, 768).requires_grad_()
    layer(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    kept = torch.cuda.memory_allocated() - before
    expected = 20000 * (2 * (3072 + 768) + 4)
    assert kept <= expected + 2**22, (kept, expected)  # blocks of memory have remainders; hidden would be 123 MB
    assert y.requires_grad
