"""The operations as torch sees them: schema, fake tensors, autograd, compiler, transforms."""

import itertools
import warnings

import pytest
import torch
from parity import random_ffn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import ewa_kernels as ewa
from ewa_kernels import ops

X = torch.randn(21, 6, generator=torch.Generator().manual_seed(0))
SEED = torch.tensor(5)


def ffn_arguments(*, gated=False, bias=True, dropout_p=0.0, dtype=torch.float32, requires_grad=True):
    operands = (X.to(dtype), *random_ffn(4, 6, 10, gated=gated, bias=bias, dtype=dtype))
    leaves = [t if t is None else t.clone().requires_grad_(requires_grad) for t in operands]
    return (*leaves, None, SEED, None, None, "silu", gated, dropout_p)


def opcheck(operation, arguments):
    with warnings.catch_warnings():
        # PyTorch's own: since 2.15 opcheck compiles with clones of the leaves that it is given and reads their .grad,
        # hiding the warning where it would be printed, not where it is an error.
        message = "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed"
        warnings.filterwarnings("ignore", message, UserWarning, r"torch\._subclasses\.meta_utils")
        torch.library.opcheck(operation, arguments)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize(
    ("saved", "options"),
    [
        *itertools.product(["full", "recompute"], [{}, {"gated": True}, {"bias": False}, {"dropout_p": 0.5}]),
        ("4bit", {"gated": True}),
    ],
    ids=str,
)
def test_opcheck_moe_ffn(options, saved, backend):
    opcheck(ops.moe_ffn, (*ffn_arguments(**options), saved, backend))
    opcheck(ops.moe_ffn, (*ffn_arguments(requires_grad=False, **options), saved, backend))


@pytest.mark.parametrize("backend", ["triton-single", "triton-onchip", "cublas", "auto"])
def test_opcheck_moe_ffn_triton(backend):
    """Once each: the interpreter takes its time. 21 tokens and 4 experts: pre_activation has 24 rows."""
    opcheck(
        ops.moe_ffn,
        (*ffn_arguments(gated=True, dropout_p=0.5), "4bit" if backend == "triton-single" else "full", backend),
    )


@pytest.mark.parametrize("saved", ["full", "recompute"])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_opcheck_given_partition(saved, backend):
    opcheck(ops.moe_ffn, (*given_partition(), saved, backend))


def given_partition(requires_grad=True):
    arguments = list(ffn_arguments(requires_grad=requires_grad))
    arguments[5] = torch.rand(21, 2, requires_grad=requires_grad)
    arguments[7:9] = torch.randperm(42).int(), torch.tensor([0, 4, 4, 30, 42], dtype=torch.int32)
    return arguments


MASKS = [[True] * 6, [True] + [False] * 5, [False] * 4 + [True, False], [False] * 5 + [True]]


@pytest.mark.parametrize(
    ("saved", "mask"),
    [*itertools.product(["full", "recompute"], MASKS), ("8bit", MASKS[0]), ("recompute-8bit", MASKS[0])],
)
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_opcheck_moe_ffn_backward(mask, saved, backend):
    check_backward(given_partition(requires_grad=False), mask, saved, backend)
    if not mask[-1]:
        check_backward(ffn_arguments(requires_grad=False), mask, saved, backend)


@pytest.mark.parametrize("backend", ["triton", "cublas"])
def test_opcheck_moe_ffn_backward_triton(backend):
    check_backward(ffn_arguments(requires_grad=False), [True] * 5 + [False], "full", backend)


def test_opcheck_moe_ffn_backward_triton_given():
    check_backward(given_partition(requires_grad=False), [True] * 6, "4bit", "triton")


def check_backward(arguments, mask, saved, backend):
    y, pre_activation, kept_x, permutation = ops.moe_ffn(*arguments, saved, backend)
    x, *operands, seed, given, offsets, activation, gated, dropout_p = arguments
    permutation = permutation if given is None else given
    kept_x = x if kept_x.numel() == 0 else kept_x
    kept = (kept_x, *operands, seed, permutation, offsets, pre_activation)
    for dtype in (None, torch.float32):
        options = (activation, gated, dropout_p, mask, saved, backend, dtype)
        opcheck(ops.moe_ffn_backward, (torch.randn_like(y), *kept, *options))


def test_opcheck_the_others():
    opcheck(ops.random_permutation, (100, SEED))
    opcheck(ops.checked_permutation, (torch.randperm(6), torch.tensor([0, 2, 6]), None))
    opcheck(ops.draw_seed, (X,))
    experts = [torch.randn(3, 4), torch.randn(5), torch.randn(5)]
    for backend in ("reference", "cpp", "triton"):
        opcheck(ops.average_experts_, (experts, [0, 2], torch.tensor(0.3), None, None, backend))
    experts = [t.to(torch.bfloat16) for t in experts]
    opcheck(ops.average_experts_, (experts, [0, 2], torch.tensor(0.3), torch.zeros(1), SEED, "cpp"))


def test_opcheck_adamw():
    """A stacked tensor, two separate experts, one of them without a gradient, a parameter without fellows."""

    def tensors():
        return [torch.randn(3, 4), torch.randn(5), torch.zeros(0), torch.randn(7)]

    params = [torch.randn(3, 4), torch.randn(5), torch.randn(5), torch.randn(7)]
    exp_avg_sqs = [t.square() for t in tensors()]
    steps = [torch.ones(()), torch.ones(()), torch.zeros(0), torch.ones(())]
    copies = [torch.zeros(3, 4, dtype=torch.bfloat16), *(torch.zeros(0) for _ in range(3))]
    groups = ([0, 2, 1], [0, 0, 0, 0], [torch.tensor(0.1)], [0.9, 0.99, 1e-8, 0.1, 0.0])
    states = (params, tensors(), tensors(), exp_avg_sqs, steps, copies)
    opcheck(ops.adamw_, (*states, *groups, torch.tensor(0.3), torch.tensor(2.0), torch.zeros(1), None))


def test_every_operation_is_checked():
    """An operation that is added must be added above; those of one product are checked in test_expert_linear.py."""
    defined = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("ewa_kernels::")
    }
    layer = {"moe_ffn", "moe_ffn_backward", "random_permutation", "checked_permutation", "draw_seed"}
    assert defined == layer | {"expert_linear", "expert_linear_backward", "average_experts_", "adamw_"}


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu", "identity"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradcheck(activation, gated, dropout_p):
    operands = ffn_arguments(gated=gated, dtype=torch.float64)[:5]
    options = {"seed": 5, "activation": activation, "gated": gated, "dropout_p": dropout_p}
    assert torch.autograd.gradcheck(lambda *t: ewa.functional.moe_ffn(*t, **options), operands)


@pytest.mark.parametrize("backend", ["cpp", "torch", "triton-single"])
def test_recomputed_pre_activation_gives_the_same_gradients(backend):
    def grads(saved):
        arguments = ffn_arguments(gated=True, dropout_p=0.3)
        ops.moe_ffn(*arguments, saved, backend)[0].square().sum().backward()
        return [t.grad for t in arguments[:5]]

    for saved, recomputed in zip(grads("full"), grads("recompute"), strict=True):
        torch.testing.assert_close(saved, recomputed, rtol=1e-6, atol=1e-6)


def test_what_is_saved_for_backward():
    """x, pre_activation and the int32 permutation: nothing else of the size of a token."""
    sizes = []
    parameters = random_ffn(4, 6, 10)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.dtype, tuple(t.shape))) or t, lambda t: t):
        ewa.functional.moe_ffn(X.double(), *(p.requires_grad_() for p in parameters), seed=1)
    of_parameters = [(p.dtype, tuple(p.shape)) for p in parameters]
    others = [size for size in sizes if size not in of_parameters]
    wide = torch.float64
    assert sorted(others, key=str) == sorted([(wide, (21, 6)), (wide, (21, 10)), (torch.int32, (21,))], key=str)


def test_nothing_is_saved_without_grad():
    with torch.no_grad():
        assert ops.moe_ffn(*ffn_arguments(), "recompute", "torch")[1].numel() == 0


def test_second_derivative_raises():
    leaves = ffn_arguments(dtype=torch.float64)[:5]
    y = ewa.functional.moe_ffn(*leaves, seed=1)
    (grad,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_reference_has_a_second_derivative():
    leaves = ffn_arguments(dtype=torch.float64)[:5]

    def function(*t):
        return ewa.functional.moe_ffn(*t, seed=1, activation="silu", backend="reference")

    assert torch.autograd.gradgradcheck(function, leaves)


class TestForwardMode:
    """torch would answer with zeros, silently."""

    def test_dual_numbers_raise(self):
        x, *parameters = (t.detach() for t in ffn_arguments()[:5])
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="does not support forward-mode AD"):
            ewa.functional.moe_ffn(forward_ad.make_dual(x, torch.ones_like(x)), *parameters, seed=1)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_jvp_raises(self, compiled):
        x, *parameters = (t.detach() for t in ffn_arguments()[:5])

        def tangent(x):
            return torch.func.jvp(lambda x: ewa.functional.moe_ffn(x, *parameters, seed=1), (x,), (x,))

        if compiled:
            torch.compiler.reset()
            tangent = torch.compile(tangent, backend="aot_eager")
        with pytest.raises(RuntimeError, match="does not support forward-mode AD"):
            tangent(x)

    def test_reference_supports_it(self):
        x, *parameters = (t.detach() for t in ffn_arguments(dtype=torch.float64)[:5])

        def function(x):
            return ewa.functional.moe_ffn(x, *parameters, seed=1, backend="reference")

        direction = torch.randn_like(x)
        _, tangent = torch.func.jvp(function, (x,), (direction,))
        step = 1e-6
        torch.testing.assert_close(
            tangent,
            (function(x + step * direction) - function(x - step * direction)) / (2 * step),
            rtol=1e-6,
            atol=1e-8,
        )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.jacrev,
        lambda f: lambda x: torch.func.vjp(f, x),
        lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x[None]).sum()),
        lambda f: lambda x: torch.func.vmap(torch.func.grad(f))(x[None]),
    ],
    ids=["grad", "jacrev", "vjp", "grad of vmap", "vmap of grad"],
)
def test_func_grad_raises_rather_than_being_wrong(transform, compiled):
    x, *parameters = (t.detach() for t in ffn_arguments()[:5])
    function = transform(lambda x: ewa.functional.moe_ffn(x, *parameters, seed=1).sum())
    if compiled:
        torch.compiler.reset()
        function = torch.compile(function, backend="aot_eager")
    ours = 'moe_ffn does not support torch.func.grad.*"reference"'
    with pytest.raises(RuntimeError, match=None if compiled else ours):
        function(x)


class TestFlops:
    """What FlopCounterMode counts: the matrix products that are made."""

    def count(self, layer, x, **options):
        with FlopCounterMode(display=False) as counter:
            layer(x, **options).sum().backward()
        return counter.get_total_flops()

    @pytest.mark.parametrize("needs_x", [False, True])
    @pytest.mark.parametrize("options", [{}, {"gated": True}, {"bias": False}], ids=str)
    @pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
    def test_those_of_the_dense_ffn(self, backend, options, needs_x):
        layer = ewa.RandomPartitionMoE(6, 10, 4, backend=backend, **options)
        x = torch.randn(3, 7, 6, requires_grad=needs_x)
        assert self.count(layer, x) == self.count(layer.fuse(), x)
        assert self.count(layer.eval(), x) == self.count(layer.fuse(), x)

    def test_frozen_weights(self):
        layer, x = ewa.RandomPartitionMoE(6, 10, 4), torch.randn(21, 6, requires_grad=True)
        layer.up.weight.requires_grad_(False)
        layer.down.weight.requires_grad_(False)
        assert self.count(layer, x) == self.count(layer.fuse(), x) == 4 * 2 * 21 * 60

    def test_recomputing(self):
        layer, x = ewa.RandomPartitionMoE(6, 10, 4, recompute=True), torch.randn(21, 6)
        assert self.count(layer, x) == self.count(layer.fuse(), x) + 2 * 21 * 60

    @pytest.mark.parametrize("top_k", [1, 2])
    def test_routed(self, top_k):
        layer, x = ewa.RoutedMoE(6, 10, 4, top_k), torch.randn(21, 6)
        router = 2 * 2 * 21 * 4 * 6
        by_biases = 2 * 21 * 4 * 6  # in the gradient of the routing weights
        assert self.count(layer, x) == router + by_biases + 5 * 2 * 21 * top_k * 60


class TestVmapIsTheLoop:
    """By rules of our own: one that is missing is a warning of PyTorch's, and so an error here."""

    def layer(self, x, *parameters, seed=1):
        return ewa.functional.moe_ffn(x, *parameters, seed=seed, dropout_p=0.3)

    @pytest.mark.parametrize("in_dim", [0, 1, 2])
    def test_tokens_and_their_gradients(self, in_dim):
        leaves = [torch.randn(3, 21, 6).movedim(0, in_dim).requires_grad_(), *ffn_arguments()[1:5]]
        batch, *parameters = leaves
        together = torch.func.vmap(lambda x: self.layer(x, *parameters), in_dim)(batch)
        one_by_one = torch.stack([self.layer(x, *parameters) for x in batch.unbind(in_dim)])
        torch.testing.assert_close(together, one_by_one)
        grads = (torch.autograd.grad(y.square().sum(), leaves) for y in (together, one_by_one))
        torch.testing.assert_close(*grads)

    def test_upstream_gradients(self):
        leaves = ffn_arguments()[:5]
        y = self.layer(*leaves)

        def backward(grad_y):
            return torch.autograd.grad(y, leaves, grad_y, retain_graph=True)

        grads_y = torch.randn(3, *y.shape)
        expected = tuple(torch.stack(grads) for grads in zip(*map(backward, grads_y), strict=True))
        torch.testing.assert_close(torch.func.vmap(backward)(grads_y), expected)

    def test_weights_and_seeds(self):
        """An ensemble of layers for the same tokens."""
        _, *parameters = (t.detach() for t in ffn_arguments()[:5])
        ensemble = (*(torch.stack([p, -p]) for p in parameters), torch.tensor([1, 2]))

        def member(*parameters):
            return self.layer(X, *parameters[:-1], seed=parameters[-1])

        expected = torch.stack([member(*member_parameters) for member_parameters in zip(*ensemble, strict=True)])
        torch.testing.assert_close(torch.func.vmap(member)(*ensemble), expected)

    def test_nested_and_compiled(self):
        parameters = [t.detach() for t in ffn_arguments()[1:5]]
        batch = torch.randn(2, 3, 21, 6)
        expected = torch.stack([torch.stack([self.layer(x, *parameters) for x in row]) for row in batch])
        nested = torch.func.vmap(torch.func.vmap(lambda x: self.layer(x, *parameters)))
        torch.testing.assert_close(nested(batch), expected)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(nested, fullgraph=True, backend="aot_eager")(batch), expected)

    def test_random_permutation(self):
        seeds = torch.arange(3)
        expected = torch.stack([ewa.functional.random_permutation(100, seed) for seed in seeds])
        assert torch.equal(torch.func.vmap(lambda seed: ewa.functional.random_permutation(100, seed))(seeds), expected)


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch.compiler.reset()

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_layer_compiles_whole_and_draws_the_same_seeds(self, backend):
        layer = ewa.RandomPartitionMoE(6, 10, 4, dropout=0.2, gated=True)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)

        def run(function):
            torch.manual_seed(3)
            x = X.clone().requires_grad_()
            outputs = [function(x), function(x)]
            sum(y.square().sum() for y in outputs).backward()
            return *outputs, x.grad

        for ours, eager in zip(run(compiled), run(layer), strict=True):
            torch.testing.assert_close(ours, eager)
        first, second, _ = run(compiled)
        assert not torch.equal(first, second)

    def test_dynamic_shapes(self):
        layer = ewa.RandomPartitionMoE(6, 10, 4)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        for num_tokens in (21, 22, 3, 100):
            x = torch.randn(num_tokens, 6)
            torch.testing.assert_close(compiled(x, seed=SEED), layer(x, seed=SEED))

    def test_functions(self):
        parameters = random_ffn(4, 6, 10, dtype=torch.float32)

        def function(x, seed, experts):
            ewa.functional.average_experts_([experts, *parameters[:1]], 0.3)
            order = ewa.functional.random_permutation(x.shape[0], seed)
            return ewa.functional.moe_ffn(x, *parameters, seed=7), order, ewa.functional.merge_experts(experts)

        experts = torch.randn(3, 5)
        expected = ewa.reference.merge_experts(experts)
        y, order, mean = torch.compile(function, fullgraph=True, backend="aot_eager")(X, SEED, experts)
        torch.testing.assert_close(y, ewa.functional.moe_ffn(X, *parameters, seed=7))
        assert torch.equal(order, ewa.functional.random_permutation(21, 5))
        torch.testing.assert_close(mean, expected)

    def test_eval_mode(self):
        layer = ewa.RandomPartitionMoE(6, 10, 4).eval()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), layer(X))

    def test_autocast(self):
        layer = ewa.RandomPartitionMoE(6, 10, 4)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            y = compiled(X, seed=SEED)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y, layer(X, seed=SEED))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_recomputes_the_same_deal(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    layer = ewa.RandomPartitionMoE(6, 10, 4, dropout=0.3)

    def grads(run):
        torch.manual_seed(1)
        layer.zero_grad()
        x = X.clone().requires_grad_()
        run(x).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in layer.parameters())]

    plain = grads(layer)
    recomputed = grads(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
