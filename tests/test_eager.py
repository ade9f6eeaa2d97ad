"""In eager the kernels are called straight; who watches sees the operations, and the same numbers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import ewa_kernels as ewa
from ewa_kernels import ops


class Watcher(TorchDispatchMode):
    """Notes the operations of this package."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "ewa_kernels":
            self.seen.append(operation)
        return operation(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """As a library's tensor that keeps its values elsewhere."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def layers():
    torch.manual_seed(0)
    return {
        "random partition": ewa.RandomPartitionMoE(6, 10, 3),
        "gated, dropout": ewa.RandomPartitionMoE(6, 10, 3, gated=True, dropout=0.3, bias=False),
        "recompute": ewa.RandomPartitionMoE(6, 10, 3, recompute=True),
        "PyTorch calls": ewa.RandomPartitionMoE(6, 10, 3, backend="torch"),
        "Triton": ewa.RandomPartitionMoE(6, 10, 3, backend="triton"),
        "routed": ewa.RoutedMoE(6, 10, 3, 2),
    }


def output_and_grads(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x, seed=5)
    return y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])


def forbid_dispatch(monkeypatch):
    """The operations themselves must not be called."""

    def fail(*arguments):
        raise AssertionError("dispatched")

    monkeypatch.setattr(ops, "moe_ffn", fail)
    monkeypatch.setattr(ops, "moe_ffn_backward", fail)


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_the_same_bits_watched_or_not(name, autocast, monkeypatch):
    layer, x = layers()[name], torch.randn(21, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with Watcher() as watcher:
            watched = output_and_grads(layer, x)
        forbid_dispatch(monkeypatch)
        straight = output_and_grads(layer, x)
    assert [op.name() for op in watcher.seen] == ["ewa_kernels::moe_ffn", "ewa_kernels::moe_ffn_backward"]
    for ours, theirs in zip(straight, watched, strict=True):
        assert torch.equal(ours, theirs)


def test_without_gradients(monkeypatch):
    layer, x = layers()["random partition"], torch.randn(21, 6)
    expected = layer(x, seed=5)
    forbid_dispatch(monkeypatch)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = layer(x, seed=5)
        assert not y.requires_grad
        assert torch.equal(y, expected)


def test_a_watcher_of_the_backward_alone():
    layer, x = layers()["random partition"], torch.randn(21, 6)
    loss = layer(x, seed=5).sum()
    with Watcher() as watcher:
        loss.backward()
    assert watcher.seen == [ops.moe_ffn_backward]


def test_no_second_derivative():
    layer, x = layers()["random partition"], torch.randn(21, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x, seed=5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


class TestWhoSees:
    """The operation, as before."""

    @pytest.fixture
    def layer(self):
        return ewa.RandomPartitionMoE(6, 10, 3)

    def test_fake_tensors(self, layer):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            y = layer(mode.from_tensor(torch.randn(21, 6)), seed=5)
        assert type(y).__name__ == "FakeTensor"

    def test_tracing(self, layer):
        traced = make_fx(lambda x: layer(x, seed=5))(torch.randn(21, 6))
        assert ops.moe_ffn in [node.target for node in traced.graph.nodes]

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
    def test_jit_trace(self, layer):
        layer.requires_grad_(False)
        x = torch.randn(21, 6)
        traced = torch.jit.trace(lambda x: layer(x, seed=5), x)
        assert "ewa_kernels::moe_ffn" in str(traced.graph)
        other = torch.randn(21, 6)
        assert torch.equal(traced(other), layer(other, seed=5))

    @pytest.mark.parametrize("strict", [False, True])
    def test_export(self, layer, strict):
        exported = torch.export.export(layer.train(), (torch.randn(21, 6),), {"seed": 5}, strict=strict)
        assert ops.moe_ffn in [node.target for node in exported.graph.nodes]

    def test_compiler(self, layer):
        torch.compiler.reset()
        seen = []

        def backend(module, inputs):
            seen.extend(node.target for node in module.graph.nodes)
            return module.forward

        torch.compile(lambda x: layer(x, seed=5), backend=backend, fullgraph=True)(torch.randn(21, 6))
        assert ops.moe_ffn in seen

    def test_vmap(self, layer):
        batch = torch.randn(2, 21, 6)
        y = torch.func.vmap(lambda x: layer(x, seed=5))(batch)
        assert torch.equal(y, torch.stack([layer(x, seed=5) for x in batch]))

    def test_a_subclass(self, layer):
        Subclass.seen.clear()
        layer(torch.randn(21, 6).as_subclass(Subclass), seed=5)
        assert ops.moe_ffn in Subclass.seen

    def test_selective_checkpointing(self, layer):
        seen = []

        def policy(context, operation, *args, **kwargs):
            seen.append(operation)
            return CheckpointPolicy.PREFER_RECOMPUTE

        def contexts():
            return create_selective_checkpoint_contexts(policy)

        x = torch.randn(21, 6, requires_grad=True)
        checkpoint(lambda x: layer(x, seed=5), x, use_reentrant=False, context_fn=contexts).sum().backward()
        assert ops.moe_ffn in seen
