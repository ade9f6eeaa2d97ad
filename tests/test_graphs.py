"""What a CUDA graph would keep for ever: values on the host, copies, counters. No GPU: the tensors are fake."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ewa_kernels as ewa
from ewa_kernels import calls, functional, ops
from ewa_kernels.kernels import copies, counters, graphs
from ewa_kernels.train import adamw

SIZES = ((2, 32, 16), (2, 32), (2, 16, 32), (2, 16))


@pytest.fixture
def capturing(monkeypatch):
    """As if a graph were being captured."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.fixture
def on_gpu():
    """Makes tensors of a GPU, which have no memory."""
    with FakeTensorMode():
        yield lambda *shape, **options: torch.empty(shape, device="cuda:0", **options)


@pytest.mark.parametrize("value", [3, torch.tensor(3)], ids=["int", "tensor"])
@pytest.mark.parametrize("operation", ["moe_ffn", "grouped_ffn"])
def test_capture_refuses_a_seed_on_the_host(operation, value, on_gpu, capturing):
    options = {"seed": value, "dropout_p": 0.1}
    if operation == "grouped_ffn":
        options |= {"permutation": on_gpu(8, dtype=torch.int32), "expert_offsets": on_gpu(3, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match="seed must be a tensor on cuda:0 while a CUDA graph is captured"):
        getattr(functional, operation)(on_gpu(8, 16), *(on_gpu(*size) for size in SIZES), **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 3), ("seed", torch.tensor(3)), ("share_rate", torch.tensor(0.25)), ("found_inf", torch.tensor(0.0))],
    ids=str,
)
def test_capture_refuses_to_average_by_the_host(name, value, capturing, monkeypatch):
    monkeypatch.setattr(functional, "device_of", lambda tensors: torch.device("cuda", 0))
    experts = torch.randn(2, 3).bfloat16()
    before = experts.clone()
    with pytest.raises(RuntimeError, match=f"{name} must be a tensor on cuda:0 while a CUDA graph is captured"):
        functional.average_experts_([experts], **{"share_rate": 0.3, name: value})
    assert torch.equal(experts, before)


@pytest.mark.parametrize(
    "group", [{"lr": torch.tensor(0.1)}, {"lr": 0.1, "initial_lr": 0.2}], ids=["tensor", "schedule"]
)
def test_capture_refuses_a_learning_rate_that_changes(group, capturing):
    with pytest.raises(RuntimeError, match="lr must be a tensor on cuda:0"):
        adamw._learning_rate(group, torch.device("cuda", 0))


def test_capture_takes_a_learning_rate_that_stays(capturing):
    assert float(adamw._learning_rate({"lr": 0.25}, torch.device("cuda", 0))) == 0.25


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("lr must be a tensor on cuda:0", {"lr": torch.tensor(0.1)}),
        ("betas must be numbers", {"betas": (torch.tensor(0.9), torch.tensor(0.99))}),
        ("found_inf must be a tensor on cuda:0", {}),
    ],
)
def test_capture_refuses_a_step_by_the_host(message, options, capturing, monkeypatch):
    """Also where torch makes the step."""
    monkeypatch.setattr(functional, "device_of", lambda tensors: torch.device("cuda", 0))
    monkeypatch.setattr(adamw, "_health_check", lambda optimizer: None)  # of torch: CPU parameters are not capturable
    monkeypatch.setattr(ewa.optim.AdamW, "_why_not", lambda *arguments: "")
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = ewa.optim.AdamW([parameter], capturable=True, **options)
    optimizer.found_inf = torch.tensor(1.0)
    parameter.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=f"{message} while a CUDA graph is captured"):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(3))


@pytest.mark.parametrize("found_inf", [False, 0.0, torch.tensor(0.0)])
def test_capture_refuses_a_decision_to_skip(found_inf, capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    averager = ewa.ExpertAverager([torch.ones(2, 3)], 0.3)
    with pytest.raises(RuntimeError, match="found_inf must be a tensor on the GPU while a CUDA graph is captured"):
        averager.step(found_inf)
    assert averager.num_steps == 0


class TestCompiledForCuda:
    """A compiler may make a CUDA graph of the traced one: in that, what may change comes from the device."""

    def graph_of(self, function, *arguments):
        torch.compiler.reset()
        graphs_seen = []

        def backend(module, inputs):
            graphs_seen.append(module.graph)
            return module.forward

        torch.compile(function, backend=backend, fullgraph=True)(*arguments)
        return graphs_seen[-1]

    def argument(self, graph, operation, name):
        """The node that an operation takes as the argument of a name."""
        (node,) = (node for node in graph.nodes if node.target is operation)
        place = [argument.name for argument in operation._schema.arguments].index(name)
        return node.args[place]

    @pytest.mark.parametrize("seed", [torch.tensor(3), 3], ids=["tensor", "int"])
    def test_seed(self, seed, on_gpu, monkeypatch):
        monkeypatch.setattr(calls, "resolve", lambda *arguments: "torch")
        x, weights = on_gpu(8, 16), [on_gpu(*size) for size in SIZES]
        seed = torch.empty((), dtype=torch.int64) if isinstance(seed, torch.Tensor) else seed
        graph = self.graph_of(lambda x, seed: functional.moe_ffn(x, *weights, seed=seed), x, seed)
        seed = self.argument(graph, ops.moe_ffn, "seed")
        assert seed.meta["example_value"].device == torch.device("cuda", 0)

    @pytest.mark.parametrize("name", ["share_rate", "found_inf", "seed"])
    def test_averaging(self, name, on_gpu, monkeypatch):
        monkeypatch.setattr(functional, "resolve", lambda *arguments: "cuda")
        experts = on_gpu(2, 3, dtype=torch.bfloat16)
        options = {"seed": 3, "share_rate": 0.3, name: torch.empty((), dtype=torch.int64 if name == "seed" else None)}
        graph = self.graph_of(
            lambda experts, options: functional.average_experts_([experts], **options), experts, options
        )
        value = self.argument(graph, ops.average_experts_, name)
        assert value.meta["example_value"].device == torch.device("cuda", 0)

    def test_learning_rate(self, on_gpu):
        device = torch.device("cuda", 0)
        graph = self.graph_of(lambda x, lr: x * adamw._learning_rate({"lr": lr}, device), on_gpu(3), torch.empty(()))
        assert any(node.target == "to" and node.args[1] == device for node in graph.nodes)

    def test_no_seed_where_nothing_is_random(self):
        """A constant on the CPU would keep the graph of a layer without dropout from being one of the GPU alone."""
        layer = ewa.RoutedMoE(16, 32, 2)
        graph = self.graph_of(layer, torch.randn(8, 16))
        assert self.argument(graph, ops.moe_ffn, "seed") is None


def test_a_graph_casts_in_each_replay(monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(2, 3, 4))
    copy = torch.full((2, 3, 4), 7.0, dtype=torch.bfloat16)
    copies.register(parameter, copy, parameter)
    assert copies.in_dtype(parameter, torch.bfloat16) is copy
    monkeypatch.setattr(graphs, "is_capturing", lambda device: True)
    assert torch.equal(copies.in_dtype(parameter, torch.bfloat16), parameter.bfloat16())


def test_a_captured_step_leaves_no_copy_that_counts(capturing, monkeypatch):
    """Its replays will write it: until then it holds something else."""
    model = torch.nn.Sequential(ewa.RandomPartitionMoE(4, 8, 2))
    averager = ewa.ExpertAverager(model, 0.3)
    optimizer = ewa.optim.AdamW(model.parameters(), averager=averager, bf16_copies=True, capturable=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    monkeypatch.setattr(adamw, "_health_check", lambda optimizer: None)
    monkeypatch.setattr(graphs, "is_capturing", lambda device: False)
    optimizer.step()
    assert copies.find(model[0].up.weight, torch.bfloat16) is not None
    monkeypatch.setattr(graphs, "is_capturing", lambda device: True)
    optimizer.step()
    assert copies.find(model[0].up.weight, torch.bfloat16) is None


class Stream:
    """As torch shows a stream that it made, or one that somebody else did."""

    def __init__(self, stream_id, handle):
        self.stream_id, self.cuda_stream = stream_id, handle


@pytest.mark.parametrize(
    ("stream", "is_kept"), [(Stream(0, 0), True), (Stream(35, 94_000), True), (Stream(94_000, 94_000), False)]
)
def test_a_foreign_stream_leaves_no_counters_behind(stream, is_kept, monkeypatch):
    """It may be destroyed, and its handle return for another stream while its last launch is still at work."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(graphs, "is_capturing", lambda device: False)
    monkeypatch.setattr(counters, "_counters", {})
    zeros = torch.zeros
    monkeypatch.setattr(counters, "_new_counters", lambda count, device: zeros(count, dtype=torch.int32))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    first, whose = counters.zeroed_counters(10, torch.device("cuda", 0))
    first.fill_(1)  # still at work
    counters.give_back(first, whose)
    second, _ = counters.zeroed_counters(10, torch.device("cuda", 0))
    assert (second.data_ptr() == first.data_ptr()) == is_kept
