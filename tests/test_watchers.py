"""Who stands between eager code and the kernels sees the operations: compilers, modes, transforms, subclasses."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import ewa_kernels as ewa
from ewa_kernels import ops
from ewa_kernels.kernels import moe_ffn as kernels
from ewa_kernels.problem import Deal


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


@pytest.fixture
def layer():
    return ewa.RandomPartitionMoE(6, 10, 3)


def test_a_watcher_of_the_backward_alone(layer):
    x = torch.randn(21, 6)
    loss = layer(x, seed=5).sum()
    with Watcher() as watcher:
        loss.backward()
    assert watcher.seen == [ops.moe_ffn_backward]


def test_no_second_derivative(layer):
    x = torch.randn(21, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x, seed=5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_a_profiler_of_a_checkpointed_forward(layer):
    """Both keep the same for backward."""
    x = torch.randn(21, 6, requires_grad=True)
    with torch.profiler.profile() as profile:
        y = checkpoint(layer, x, use_reentrant=False)
    y.sum().backward()
    assert "MoeFFN" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_gradients_have_the_same_bits_whoever_watches(layer, backend):
    """Of float32 parameters under autocast too."""
    x, layer.backend = torch.randn(2, 300, 6, requires_grad=True), backend
    leaves = [x, *layer.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, seed=5)
    loss = y.float().square().sum()
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    with Watcher():
        watched = torch.autograd.grad(loss, leaves, retain_graph=True)
    for others in (watched, torch.autograd.grad(loss, leaves, create_graph=True)):
        assert [g.dtype for g in others] == [torch.float32] * 5
        assert all(map(torch.equal, others, plain))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_backends_get_a_seed_as_an_int(layer, backend, monkeypatch):
    """From operations too, unless it is on a GPU: how it comes decides how a kernel is compiled."""
    module, seen = kernels.of(SimpleNamespace(backend=backend)), []

    def noting(function):
        def note(*arguments):
            seen.extend(type(a.seed) for a in arguments if isinstance(a, Deal))
            return function(*arguments)

        return note

    for name in ("forward", "backward"):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    layer.backend = backend
    with Watcher():
        layer(torch.randn(21, 6), seed=torch.tensor(5)).sum().backward()
    assert seen == [int, int]


class TestWhoSees:
    """The operation."""

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

    def test_tracing_before_dispatch(self, layer):
        traced = make_fx(lambda x: layer(x, seed=5), pre_dispatch=True)(torch.randn(21, 6))
        assert ops.moe_ffn in [node.target for node in traced.graph.nodes]

    def test_gradients_in_a_batch(self, layer):
        """By the vmap that autograd has of its own."""
        x, grads_y = torch.randn(21, 6, requires_grad=True), torch.randn(4, 21, 6)
        y = layer(x, seed=5)
        (together,) = torch.autograd.grad(y, x, grads_y, is_grads_batched=True, retain_graph=True)
        one_by_one = [torch.autograd.grad(y, x, grad_y, retain_graph=True)[0] for grad_y in grads_y]
        torch.testing.assert_close(together, torch.stack(one_by_one))

    @pytest.mark.parametrize("backend", ["auto", "torch"])
    def test_meta_tensors(self, backend):
        layer = ewa.RoutedMoE(6, 10, 3, 2, backend=backend).to("meta")
        x = torch.empty(21, 6, device="meta", requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == x.shape

    def test_a_function_mode(self, layer):
        seen = []

        class Mode(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))

        with Mode():
            layer(torch.randn(21, 6), seed=5)
        assert ops.moe_ffn in seen

    def test_a_tensor_that_is_yet_to_be_negated(self, layer):
        x = torch.randn(21, 6)
        assert torch.equal(layer(torch._neg_view(x), seed=5), layer(-x, seed=5))

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


def test_eager_goes_straight(layer, monkeypatch):
    """Where nobody stands between, neither operation is called, nor a seed put into a tensor."""

    def fail(*arguments):
        pytest.fail("an operation was called")

    for name in ("moe_ffn", "moe_ffn_backward", "draw_seed", "random_permutation"):
        monkeypatch.setattr(ops, name, fail)
    x = torch.randn(3, 7, 6, requires_grad=True)
    for recompute in (False, True):
        layer.recompute = recompute
        layer(x).sum().backward()
    with torch.no_grad():
        layer(x, seed=torch.tensor(3))
    routed = ewa.RoutedMoE(6, 10, 3, 2)
    routed(x).sum().backward()
    assert type(layer.draw_seed(x)) is int
