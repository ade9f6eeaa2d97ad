"""Averaging and AdamW on a GPU: launches, the same bits as on the CPU, graphs, streams. Run by `make gpu`."""

import copy

import pytest
import torch
from test_gpu import kernels

import ewa_kernels as ewa
from ewa_kernels.kernels import copies

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def tensors(device="cuda", scale=1):
    """Of every dtype, with odd sizes, few and many experts, stacked and separate, slices that are not aligned."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for dtype in DTYPES:
        for shape in ((4, 3072 * scale, 77), (2, 5), (5, 1001), (8, 64), (9, 333), (70, 129), (199, 640), (1000, 65)):
            result.append(torch.randn(shape, generator=generator).to(dtype).to(device))
        result.append([torch.randn(33, 7, generator=generator).to(dtype).to(device) for _ in range(6)])
        memory = torch.randn(4, 10_007, generator=generator).to(dtype).to(device)
        result += [memory[:, 1:5001], memory[:, 5001:]]
    return result


def few_experts():
    """As many as the parameters of a launch have room for."""
    return [t for t in tensors() if isinstance(t, torch.Tensor) and len(t) < 20]


def flat(groups):
    return [t for group in groups for t in (group if isinstance(group, list) else [group])]


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("share_rate", [0.0, 0.3, 1.0])
def test_same_bits_as_on_the_cpu(share_rate, rounding):
    ours, theirs = tensors(), tensors("cpu")
    for seed in range(3):
        ewa.functional.average_experts_(ours, share_rate, rounding=rounding, seed=seed, backend="cuda")
        ewa.functional.average_experts_(theirs, share_rate, rounding=rounding, seed=seed, backend="cpp")
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_triton_too(rounding):
    """Up to roundings in float32, which it fuses."""
    ours, theirs = tensors(), tensors()
    ewa.functional.average_experts_(ours, 0.3, rounding=rounding, seed=1, backend="triton")
    ewa.functional.average_experts_(theirs, 0.3, rounding=rounding, seed=1, backend="cuda")
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_rate_on_the_gpu_for_experts_on_the_cpu(dtype):
    ours, theirs = (torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(2))
    share_rate, seed = torch.tensor(0.3, dtype=torch.float64), torch.tensor(7)
    ewa.functional.average_experts_([ours], share_rate.cuda(), seed=seed, backend="cpp")
    ewa.functional.average_experts_([theirs], share_rate, seed=seed, backend="cpp")
    assert torch.equal(ours, theirs)


def test_triton_waits_for_nothing_and_can_be_captured():
    """With a share rate that is a number, and so a constant."""
    ours, theirs = tensors(), tensors()
    options = {"seed": torch.tensor(3, device="cuda"), "backend": "triton"}
    ewa.functional.average_experts_(theirs, 0.3, **options)
    ewa.functional.average_experts_(tensors(), 0.3, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ewa.functional.average_experts_(ours, 0.3, **options)
    graph.replay()
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert torch.equal(a, b)


def optimizers(device, groups=None, **options):
    groups = tensors(device) if groups is None else groups
    params = [[torch.nn.Parameter(t) for t in g] if isinstance(g, list) else torch.nn.Parameter(g) for g in groups]
    alone = [torch.nn.Parameter(torch.ones(1000, device=device)), torch.nn.Parameter(torch.ones((), device=device))]
    averager = ewa.ExpertAverager(params, 0.3)
    optimizer = ewa.optim.AdamW([*flat(params), *alone], lr=0.01, averager=averager, **options)
    for i, p in enumerate([*flat(params), *alone]):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype).to(device)
    return optimizer, [*flat(params), *alone]


def test_adamw_has_the_same_bits_as_on_the_cpu():
    (ours, params), (theirs, others) = optimizers("cuda"), optimizers("cpu")
    for _ in range(3):
        ours.step()
        theirs.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p.cpu(), q)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(ours.state[p][name].cpu(), theirs.state[q][name])


@pytest.mark.parametrize("dtype", DTYPES)
class TestGradientsThatAreNotAligned:
    """As DDP's views into its buckets are, after a parameter of odd size."""

    def optimizer(self, dtype, offset, columns, device="cuda"):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(4, 1, columns, generator=generator).to(dtype).to(device))
        bucket = torch.ones(offset + p.numel(), dtype=dtype, device=device)
        p.grad = bucket[offset:].view_as(p)
        return ewa.optim.AdamW([p], lr=0.01, averager=ewa.ExpertAverager([p], 0.3), bf16_copies=True)

    def test_same_bits_as_on_the_cpu(self, dtype):
        for offset in range(1, 9):
            results = []
            for device in ("cuda", "cpu"):
                optimizer = self.optimizer(dtype, offset, 70_007, device)
                optimizer.grad_scale = torch.tensor(3.0, device=device)
                for _ in range(3):
                    optimizer.step()
                [(p, state)] = optimizer.state.items()
                copied = [copies.find(p, torch.bfloat16)] if dtype == torch.float32 else []
                results.append([p, p.grad, state["exp_avg"], state["exp_avg_sq"], *copied])
            for ours, theirs in zip(*results, strict=True):
                assert torch.equal(ours.cpu(), theirs)

    def test_time(self, dtype):
        """Of steps that take longer than their launches."""
        milliseconds = []
        for offset in (0, 1):
            optimizer = self.optimizer(dtype, offset, 2**24)
            times = []
            for _ in range(5):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                optimizer.step()
                begin.record()
                for _ in range(10):
                    optimizer.step()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 10)
            milliseconds.append(min(times))
        assert milliseconds[1] < 1.5 * milliseconds[0], milliseconds


class TestLaunches:
    def test_averaging(self):
        groups, share_rate = few_experts(), torch.tensor(0.3, device="cuda")
        seed = torch.tensor(1, device="cuda")
        launched = kernels(lambda: ewa.functional.average_experts_(groups, share_rate, seed=seed))
        assert len(launched) == 1, launched
        assert "parameter_pass" in launched[0]

    def test_adamw(self):
        optimizer, _ = optimizers("cuda", few_experts())
        optimizer.param_groups[0]["lr"] = torch.tensor(0.01, device="cuda")
        launched = kernels(optimizer.step)
        assert len(launched) == 1, launched

    def test_many_tensors(self):
        """More than fit the parameters of a launch: one launch, after some that write their table."""
        groups = [torch.randn(4, 10, device="cuda") for _ in range(2000)]
        launched = kernels(lambda: ewa.functional.average_experts_(groups, 0.3))
        assert sum("parameter_pass" in name for name in launched) == 1
        assert all("parameter_pass" in name or "write_table" in name for name in launched), launched


class TestGraphs:
    def test_averaging_reads_share_rate_seed_and_found_inf_in_each_replay(self):
        groups, expected = tensors(), tensors()
        share_rate, seed = torch.tensor(0.3, device="cuda"), torch.tensor(1, device="cuda")
        found_inf = torch.zeros(1, device="cuda")
        options = {"seed": seed, "found_inf": found_inf}
        ewa.functional.average_experts_(groups, 0.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ewa.functional.average_experts_(groups, share_rate, **options)
        for beta, number, skipped in ((0.3, 1, 0.0), (0.1, 2, 0.0), (0.5, 3, 1.0)):
            share_rate.fill_(beta)
            seed.fill_(number)
            found_inf.fill_(skipped)
            graph.replay()
            if not skipped:
                ewa.functional.average_experts_(expected, share_rate, seed=number)
        for a, b in zip(flat(groups), flat(expected), strict=True):
            assert torch.equal(a, b)

    def test_adamw(self):
        (optimizer, params), (eager, others) = optimizers("cuda", capturable=True), optimizers("cuda")
        for each in (optimizer, eager):
            each.averager.rounding = "nearest"
            each.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for _ in range(3):
            graph.replay()
            eager.step()
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(optimizer.state[p]["step"], eager.state[q]["step"])

    @pytest.mark.parametrize("change", [{"lr": torch.tensor(0.01)}, {"initial_lr": 0.01}], ids=["tensor", "schedule"])
    def test_a_learning_rate_that_would_be_frozen(self, change):
        optimizer, _ = optimizers("cuda", few_experts(), capturable=True)
        optimizer.averager.rounding = "nearest"
        optimizer.step()
        optimizer.param_groups[0].update(change)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="lr must be a tensor on cuda"), torch.cuda.graph(graph):
            optimizer.step()

    def test_a_table_that_parameters_have_no_room_for(self):
        """Each replay writes it again. Its memory is torch's, and none is left behind."""
        many = [
            [torch.randn(4, 10, generator=torch.Generator().manual_seed(i)).cuda() for i in range(300)] for _ in "ab"
        ]
        (optimizer, params), (eager, others) = optimizers("cuda", many[0], capturable=True), optimizers("cuda", many[1])
        optimizer.step()
        eager.step()
        allocated = []
        for _ in range(3):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            # What eager steps allocate lies where the table did, if that were not the graph's.
            for _ in range(3):
                graph.replay()
                eager.step()
            torch.cuda.synchronize()
            del graph
            allocated.append(torch.cuda.memory_allocated())
        assert len(set(allocated)) == 1, allocated
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q)

    def test_a_share_rate_that_would_be_frozen(self):
        experts = torch.randn(4, 5, device="cuda")
        averager = ewa.ExpertAverager([experts], ewa.LinearShareRate(0.3, 10))
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="share_rate must be constant in a CUDA graph"), torch.cuda.graph(graph):
            averager.step()


def test_grad_scaler():
    """As torch's fused AdamW followed by averaging, without a sync; a skipped step changes nothing."""
    results = []
    for ours in (True, False):
        params = [torch.nn.Parameter(torch.ones(4, 999, device="cuda") * (1 + i)) for i in range(3)]
        averager = ewa.ExpertAverager(params, 0.3)
        kind = {"averager": averager} if ours else {"fused": True}
        optimizer = (ewa.optim.AdamW if ours else torch.optim.AdamW)(params, lr=0.1, **kind)
        if not ours:
            averager.attach(optimizer)
        scaler = torch.amp.GradScaler(init_scale=8.0)
        for step in range(5):
            optimizer.zero_grad()
            generator = torch.Generator("cuda").manual_seed(step)
            noise = [torch.randn(p.shape, device="cuda", generator=generator) for p in params]
            loss = sum((p * n).sum() for p, n in zip(params, noise, strict=True))
            scaler.scale(loss * (torch.inf if step == 2 else 1)).backward()
            before = params[0].detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(params[0], before) == (step == 2)
        results.append((params, [optimizer.state[p]["step"] for p in params]))
    for ours, theirs in zip(*results, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_streams():
    """Each has a counter of its own."""
    pairs = [optimizers("cuda") for _ in range(4)]
    expected = copy.deepcopy([p.detach() for p in pairs[0][1]])
    reference, others = optimizers("cuda")
    torch.cuda.synchronize()
    for optimizer, _ in pairs:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                optimizer.step()
    torch.cuda.synchronize()
    for _ in range(5):
        reference.step()
    for _, params in pairs:
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q)
    assert not all(torch.equal(p, e) for p, e in zip(others, expected, strict=True))


def test_nothing_waits_for_the_gpu():
    optimizer, _ = optimizers("cuda")
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        optimizer.averager.step(found_inf=torch.zeros(1, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_an_int32_of_elements():
    experts = torch.zeros(2, 2**31 + 5, dtype=torch.bfloat16, device="cuda")
    experts[0] = 2
    ewa.functional.average_experts_([experts], 0.5, rounding="nearest")
    assert bool((experts == 1).all())


def test_bf16_copies_are_used_under_autocast():
    """No kernel casts a weight."""
    layer = ewa.RandomPartitionMoE(384, 768, 4, device="cuda")
    optimizer = ewa.optim.AdamW(layer.parameters(), averager=ewa.ExpertAverager(layer, 0.3), bf16_copies=True)
    x = torch.randn(5000, 384, device="cuda", dtype=torch.bfloat16)

    def forward():
        with torch.autocast("cuda", torch.bfloat16):
            return layer(x)

    forward().sum().backward()
    optimizer.step()
    assert len(kernels(forward)) == 1
