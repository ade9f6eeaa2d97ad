"""torch.compile of the model, the optimizer's step, the averager's and all of it; torch.func over the layer."""

import copy

import pytest
import torch
from models import Mlp, Transformer, tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from training import bits, make, same, train

import ewa_kernels as ewa


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def counting(backend="aot_eager"):
    """A backend whose `frame_count` says how often something was compiled."""
    return CompileCounterWithBackend(backend)


def assert_close(model, other, tolerance=1e-5):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


class TestModel:
    def make(self):
        torch.manual_seed(0)
        dense = Transformer(Mlp(), Mlp(), Mlp(), Mlp())
        model = copy.deepcopy(dense)
        ewa.replace_ffn_(model, num_experts=3)
        return model, dense

    def test_train_eval_and_fold(self):
        """The same object, compiled once, in each of its lives; gradients to the bit."""
        model, _ = self.make()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        results = []
        for function in (model, compiled):
            torch.manual_seed(1)
            model.train().zero_grad()
            y = function(tokens())
            y.square().sum().backward()
            results.append([y, *(p.grad.clone() for p in model.parameters())])
        assert same(*results)
        expected = model.eval()(tokens())
        torch.testing.assert_close(compiled(tokens()), expected)
        ewa.fold_(model)
        torch.testing.assert_close(compiled(tokens()), expected)

    def test_any_number_of_tokens(self):
        """One graph for the first size, one for all others, in each mode; the deal is that of the eager layer."""
        model, _ = self.make()
        counter = counting()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for is_training in (True, False):
            model.train(is_training)
            for batch in (4, 5, 3, 17, 2, 64, 33):
                outputs = []
                for function in (model, compiled):
                    torch.manual_seed(batch)
                    outputs.append(function(tokens(batch, 5, 4)))
                torch.testing.assert_close(*outputs)
        assert counter.frame_count <= 4


KINDS = [pytest.param(torch.optim.AdamW, id="torch"), pytest.param(ewa.optim.AdamW, id="ours")]


class TestOptimizer:
    """With an averager that is attached: its hooks survive, and its schedule is not burnt into the graph."""

    @pytest.mark.parametrize("form", ["method", "function"])
    @pytest.mark.parametrize("make_optimizer", KINDS)
    def test_step(self, make_optimizer, form):
        parts, others, counter = make(make_optimizer), make(make_optimizer), counting()
        optimizer = parts[1]
        step = torch.compile(optimizer.step if form == "method" else lambda: optimizer.step(), backend=counter)
        for model, run in ((parts[0], step), (others[0], others[1].step)):
            torch.manual_seed(1)
            for _ in range(12):
                model.zero_grad()
                model(torch.randn(16, 6)).square().mean().backward()
                run()
        assert parts[2].num_steps == others[2].num_steps == 12
        assert parts[2].share_rate == others[2].share_rate > 0.1
        assert_close(parts[0], others[0])
        assert counter.frame_count <= 4
        without = make(make_optimizer)
        without[2].schedule = ewa.ConstantShareRate(0.0)
        torch.manual_seed(1)
        train(*without[:2], 12)
        with pytest.raises(AssertionError):
            assert_close(without[0], others[0])

    def test_ours_compiles_whole(self):
        model, optimizer, averager = make(ewa.optim.AdamW)
        model(torch.randn(16, 6)).square().mean().backward()
        torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)()
        assert averager.num_steps == 1

    @pytest.mark.parametrize("make_optimizer", KINDS)
    def test_skipped_steps(self, make_optimizer):
        """What GradScaler says is not burnt in either."""
        options = {} if make_optimizer is ewa.optim.AdamW else {"fused": True}
        model, optimizer, averager = make(make_optimizer, **options)
        step = torch.compile(optimizer.step, backend="aot_eager")
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer.step = step
        for overflow in (False, True, False, True, False):
            optimizer.zero_grad()
            before, steps = bits(model), averager.num_steps
            scaler.scale(model(torch.randn(16, 6)).square().mean()).backward()
            if overflow:
                model[0].weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            assert same(bits(model), before) == overflow
            assert averager.num_steps == steps + (not overflow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:step.. averages once more than the optimizer")  # the averagers are attached
def test_averager_step(dtype):
    """Whole, to the bit, with stochastic rounding, and not compiled again for each share rate."""
    parts, others, counter = make(dtype=dtype), make(dtype=dtype), counting()
    step = torch.compile(parts[2].step, backend=counter, fullgraph=True)
    for _ in range(12):
        step()
        others[2].step()
    assert parts[2].num_steps == 12
    assert same(bits(parts[0]), bits(others[0]))
    assert not same(bits(parts[0]), bits(make(dtype=dtype)[0]))
    assert counter.frame_count <= 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at the loss
@pytest.mark.parametrize("make_optimizer", KINDS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_whole_training_step(make_optimizer, backend):
    parts, others, counter = make(make_optimizer), make(make_optimizer), counting(backend)
    model, optimizer, averager = parts

    @torch.compile(backend=counter)
    def step(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    torch.manual_seed(1)
    losses = [float(step(torch.randn(16, 6)).detach()) for _ in range(12)]
    torch.manual_seed(1)
    train(*others[:2], 12)
    assert averager.num_steps == 12
    assert losses[-1] < losses[0]
    assert_close(model, others[0])
    assert counter.frame_count <= 6


class TestFunc:
    """In training mode; eval mode is plain PyTorch."""

    X = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def make(self, backend="auto"):
        torch.manual_seed(0)
        layer = ewa.RandomPartitionMoE(6, 10, 4, backend=backend)
        return nn.Sequential(nn.Linear(6, 6), layer).double()

    def loss(self, model):
        return lambda parameters, x: torch.func.functional_call(model, parameters, (x,)).square().sum()

    def test_functional_call(self):
        """With other parameters, which get the gradient; `seed` reaches the layer."""
        model, other = self.make(), self.make()
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.1)
        torch.manual_seed(1)
        parameters = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
        y = torch.func.functional_call(model, parameters, (self.X,))
        torch.manual_seed(1)
        expected = other(self.X)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        for name, p in other.named_parameters():
            assert torch.equal(parameters[name].grad, p.grad)
        assert all(p.grad is None for p in model.parameters())
        layer = model[1]
        y = torch.func.functional_call(layer, dict(other[1].named_parameters()), (self.X,), {"seed": 5})
        assert torch.equal(y, other[1](self.X, seed=5))

    @pytest.mark.parametrize("is_training", [True, False])
    def test_grad_by_the_reference(self, is_training):
        model = self.make("reference").train(is_training)
        torch.manual_seed(1)
        grads = torch.func.grad(self.loss(model))(dict(model.named_parameters()), self.X)
        torch.manual_seed(1)
        model(self.X).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(grads[name], p.grad)

    def test_jacobians_by_the_reference(self):
        """Forward and reverse mode agree, with one deal for all columns."""
        model = self.make("reference")
        jacobians = []
        for transform in (torch.func.jacrev, lambda f: torch.func.jacfwd(f, randomness="same")):
            torch.manual_seed(1)
            jacobians.append(transform(model)(self.X))
        torch.testing.assert_close(*jacobians)
        assert jacobians[0].any()

    @pytest.mark.parametrize("transform", [torch.func.jacfwd, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))])
    def test_forward_mode_raises(self, transform):
        layer = self.make()[1]
        with pytest.raises(RuntimeError, match=r'moe_ffn does not support forward-mode AD.*use backend="reference"'):
            transform(lambda x: layer(x, seed=5))(self.X)

    def test_vmap_must_be_told_about_randomness(self):
        """As torch's own random operations."""
        batch, model = torch.stack([self.X, self.X + 1, self.X]), self.make()
        with pytest.raises(RuntimeError, match="RandomPartitionMoE deals the tokens at random, which vmap"):
            torch.func.vmap(model)(batch)
        torch.manual_seed(1)
        together = torch.func.vmap(model, randomness="same")(batch)
        for x, y in zip(batch, together, strict=True):
            torch.manual_seed(1)
            torch.testing.assert_close(y, model(x))
        torch.manual_seed(1)
        apart = torch.func.vmap(model, randomness="different")(batch)
        torch.manual_seed(1)
        for x, y in zip(batch, apart, strict=True):
            torch.testing.assert_close(y, model(x))
        assert not torch.allclose(apart[0], apart[2])

    def test_gradients_per_sample_by_the_reference(self):
        batch, model = torch.stack([self.X, self.X + 1]), self.make("reference")
        parameters = dict(model.named_parameters())
        torch.manual_seed(1)
        grads = torch.func.vmap(torch.func.grad(self.loss(model)), (None, 0), randomness="same")(parameters, batch)
        for i, x in enumerate(batch):
            torch.manual_seed(1)
            model.zero_grad()
            model(x).square().sum().backward()
            for name, p in model.named_parameters():
                torch.testing.assert_close(grads[name][i], p.grad)
