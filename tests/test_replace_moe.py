"""`replace_moe_`, `fold_moe_`, `restore_moe_`: experts that somebody else wrote, in lists and stacked."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from moe_blocks import D, DeepSeek, Dense, E, Masked, Mixtral, Qwen, Switch, made, sequential, tokens
from parity import assert_parity

import ewa_kernels as ewa
from ewa_kernels.moe.replaced import ExpertStack

TESTS = Path(__file__).parent

BLOCKS = (Mixtral, Qwen, DeepSeek, Switch, Dense, Masked)
every_block = pytest.mark.parametrize("make", BLOCKS, ids=lambda make: make.__name__)


def run(model, x):
    """Output and gradients, under the names that the parameters have in lists."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    values = {"y": y.detach(), "x": x.grad}
    values |= {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return values


def run_stacked(model, x):
    """`run` of a replaced model."""
    values = run(model, x)
    for name, module in model.named_modules():
        if isinstance(module, ExpertStack):
            named = {path: values.pop(f"{name}.{path}") for path, _ in module.named_parameters()}
            for e in range(E):
                of_expert = module._origin.layout.unstack({path: grad[e] for path, grad in named.items()})
                values |= {f"{name}.{e}.{path}": grad for path, grad in of_expert.items()}
    return values


# DeepSeek's own forward fails in float64, those of Switch and Masked under autocast.
ROUTED = [
    (make, dtype)
    for make in BLOCKS
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    if (make, dtype) != (DeepSeek, torch.float64)
]


@pytest.mark.parametrize(("make", "dtype"), ROUTED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_routed_is_what_the_block_computes(make, dtype):
    model, x = made(make, dtype), tokens(dtype=dtype)
    wide = made(make, torch.float64 if make is not DeepSeek else torch.float32)
    wide.load_state_dict(model.state_dict())
    exact = run(wide, x.to(next(wide.parameters()).dtype))
    baseline = run(model, x)
    report = ewa.replace_moe_(model, to="routed")
    assert report.replaced == ("layers.0.experts",)
    actual = run_stacked(model, x)
    assert actual.keys() == baseline.keys()
    for name, value in actual.items():
        if dtype == torch.float64 and issubclass(make, Mixtral):  # which takes the softmax in float32
            assert (value - exact[name]).norm() <= 1e-6 * exact[name].norm()
        else:
            assert_parity(name, value, exact[name].double(), baseline[name])


@pytest.mark.parametrize("make", [Mixtral, Qwen, DeepSeek, Dense])
def test_routed_autocast(make):
    model, x = made(make), tokens()
    exact = run(copy.deepcopy(model), x)
    with torch.autocast("cpu", torch.bfloat16):
        baseline = run(model, x)
        ewa.replace_moe_(model, to="routed")
        actual = run_stacked(model, x)
    for name in ("y", *(name for name in exact if "experts." in name)):
        error, bound = ((values[name] - exact[name]).norm() for values in (actual, baseline))
        assert actual[name].dtype == torch.float32
        assert error <= 2 * bound


@every_block
class TestRouted:
    def test_block_and_router_stay(self, make):
        model = made(make)
        block = model.layers[0]
        router = block.gate if hasattr(block, "gate") else block.router
        expected = block(tokens())
        calls = []
        router.register_forward_hook(lambda *_: calls.append(1))
        ewa.replace_moe_(model, to="routed")
        assert isinstance(model.layers[0], make)
        assert model.layers[0] is block
        assert type(block).__name__ == make.__name__
        actual = block(tokens())
        assert calls == [1]
        assert type(actual) is type(expected)
        torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (2, 3, 4)])
    def test_shapes(self, make, shape):
        model = made(make)
        ewa.replace_moe_(model, to="routed")
        x = tokens(*shape).requires_grad_()
        y = model(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad.isfinite().all()

    def test_copies(self, make):
        model = made(make)
        ewa.replace_moe_(model, to="routed")
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(tokens()), model(tokens()))
            assert isinstance(twin.layers[0], make)
            assert list(twin.state_dict()) == list(model.state_dict())

    def test_restored(self, make):
        model = made(make, num_layers=2)
        original = copy.deepcopy(model)
        ewa.replace_moe_(model, to="routed")
        with torch.no_grad():
            model.layers[0].experts.down.weight.mul_(2)
        expected = model(tokens())
        assert ewa.restore_moe_(model) is model
        assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
        assert vars(model.layers[0]).keys() == vars(original.layers[0]).keys()
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(model(tokens()), expected, rtol=1e-5, atol=1e-6 * scale)
        original.load_state_dict(model.state_dict())


@pytest.mark.parametrize("make", [Qwen, DeepSeek], ids=lambda make: make.__name__)
@pytest.mark.parametrize("to", ["routed", "random_partition"])
def test_compiled(make, to):
    model = made(make)
    ewa.replace_moe_(model, to=to)
    torch.manual_seed(5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens())
    torch.manual_seed(5)
    torch.testing.assert_close(compiled, model(tokens()))
    torch._dynamo.reset()


@every_block
class TestRandomPartition:
    def test_deals_in_training(self, make):
        model = made(make)
        block = model.layers[0]
        ewa.replace_moe_(model, to="random_partition")
        experts, x = block.experts, tokens(33)
        torch.manual_seed(5)
        y = block(x)
        y = y[0] if isinstance(y, tuple) else y
        torch.manual_seed(5)
        expected = ewa.reference.moe_ffn(
            x,
            *experts.experts,
            seed=ewa.functional.draw_seed(x),
            activation=experts.activation,
            gated=experts.gated,
        )
        if make is Qwen:
            expected = expected + block.shared(x)
        if make is DeepSeek:
            expected = expected + block.shared_experts(x)
        torch.testing.assert_close(y, expected)

    def test_mean_in_eval_and_after_the_fold(self, make):
        model = made(make, num_layers=2)
        mean = copy.deepcopy(model).eval()
        with torch.no_grad():
            for block in mean.layers:
                for group in zip(*(expert.parameters() for expert in block.experts), strict=True):
                    average = torch.stack(group).mean(0)
                    for parameter in group:
                        parameter.copy_(average)
        ewa.replace_moe_(model, to="random_partition")
        expected = model.eval()(tokens())
        if make in (Mixtral, Dense, Masked):  # their weights sum to 1
            torch.testing.assert_close(expected, mean(tokens()))
        returned = model.layers[0](tokens())
        assert ewa.fold_moe_(model) is model
        assert torch.equal(model(tokens()), expected)
        torch.testing.assert_close(model.layers[0](tokens()), returned, rtol=0, atol=0)
        assert isinstance(model.layers[0].experts, ewa.FFN)
        assert torch.equal(pickle.loads(pickle.dumps(model))(tokens()), expected)
        with pytest.raises(ValueError, match="got one that was folded"):
            ewa.restore_moe_(model)

    def test_and_back(self, make):
        model = made(make)
        expected = model(tokens())
        for to in ("random_partition", "routed"):
            assert ewa.replace_moe_(model, to=to).replaced == ("layers.0.experts",)
        torch.testing.assert_close(model(tokens()), expected)


class TestExperts:
    def test_names_and_averaging(self):
        model = made(Switch)
        mean = torch.stack([expert[0].weight for expert in model.layers[0].experts]).mean(0)
        ewa.replace_moe_(model, to="routed")
        names = [f"layers.0.experts.{which}" for which in ("up.weight", "up.bias", "down.weight", "down.bias")]
        assert [name for name, _ in ewa.expert_tensors(model)] == names
        averager = ewa.ExpertAverager(model, 0.3)
        before = averager.spread()
        averager.step()
        assert list(before) == names
        assert averager.spread()[names[0]] == pytest.approx((1 - 0.3 * E / (E - 1)) * before[names[0]], rel=1e-5)
        torch.testing.assert_close(model.layers[0].experts.up.weight.mean(0), mean)

    def test_dropout_of_what_each_expert_gives(self):
        """Two choices of a token are dropped apart."""
        model = made(lambda: Mixtral(make=lambda: sequential(0.5))).train()
        ewa.replace_moe_(model, to="routed")
        experts = model.layers[0].experts
        assert (experts.dropout, experts.output_dropout) == (0.0, 0.5)
        x = tokens(1).expand(20000, D)
        with torch.no_grad():
            y = model.layers[0](x)[0]
            model.eval()
            torch.testing.assert_close(y.mean(0), model.layers[0](x[:1])[0][0], rtol=0.1, atol=0.02)
            assert 0.2 < (y == 0).float().mean() < 0.3

    def test_frozen_and_mode(self):
        model = made(Switch).eval()
        for expert in model.layers[0].experts:
            expert[0].requires_grad_(False)
        ewa.replace_moe_(model, to="routed")
        experts = model.layers[0].experts
        assert [p.requires_grad for p in experts.parameters()] == [False, False, True, True]
        assert not experts.training
        ewa.restore_moe_(model)
        flags = [p.requires_grad for p in model.layers[0].experts[0].parameters()]
        assert flags == [False, False, True, True]

    def test_pending_gradients(self):
        model = made(Mixtral)
        model(tokens()).sum().backward()
        experts = model.layers[0].experts
        up = torch.stack([torch.cat([expert.w1.weight.grad, expert.w3.weight.grad]) for expert in experts])
        experts[1].w2.weight.grad = None  # as of one that saw no token
        down = torch.stack([experts[e].w2.weight.grad if e != 1 else torch.zeros(D, 12) for e in range(E)])
        ewa.replace_moe_(model, to="routed")
        assert torch.equal(model.layers[0].experts.up.weight.grad, up)
        assert torch.equal(model.layers[0].experts.down.weight.grad, down)

    def test_arguments_that_are_their_defaults(self):
        class Called(Dense):
            def forward(self, x, mask=None, *, scale=1.0):
                y = super().forward(x) * scale
                return y if mask is None else y * mask

        block = made(Called).layers[0]
        expected = block(tokens())
        ewa.replace_moe_(block, to="routed")
        for args, kwargs in (((), {"mask": None}), ((None,), {}), ((None,), {"scale": 1.0})):
            torch.testing.assert_close(block(tokens(), *args, **kwargs), expected)
        torch.testing.assert_close(block(x=tokens(), mask=None), expected)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens(), mask=None), expected)
        torch._dynamo.reset()
        for args, kwargs in (((tokens(),), {}), ((), {"scale": 2.0}), ((None, 3), {}), ((), {"other": None})):
            with pytest.raises(TypeError, match="Called must get one Tensor after replace_moe_, got Tensor, "):
                block(tokens(), *args, **kwargs)

    def test_the_model_itself_is_a_block(self):
        model = made(Mixtral).layers[0]
        expected = model(tokens())
        assert ewa.replace_moe_(model, to="routed").replaced == ("experts",)
        torch.testing.assert_close(model(tokens()), expected)
        with pytest.raises(TypeError, match=r"Mixtral must get one Tensor after replace_moe_, got Tensor, NoneType"):
            model(tokens(), None)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ewa.replace_moe_(3, to="routed"), TypeError, "model must be an nn.Module, got int"),
        (lambda: ewa.replace_moe_(Switch(), to="x"), ValueError, "to must be one of random_partition, routed, got 'x'"),
        (lambda: ewa.replace_moe_(Switch(), to="routed", backend="x"), ValueError, "backend must be one of"),
        (lambda: ewa.replace_moe_(Switch(), to="routed", filter_fn=1), TypeError, "filter_fn must be a callable"),
        (lambda: ewa.fold_moe_(3), TypeError, "model must be an nn.Module, got int"),
        (lambda: ewa.fold_moe_(Switch()), ValueError, "model must have experts in random partition"),
        (lambda: ewa.restore_moe_(3), TypeError, "model must be an nn.Module, got int"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
