"""`replace_moe_`, `fold_moe_`, `restore_moe_`: blocks that somebody else wrote, with a list of experts."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from moe_blocks import (
    D,
    DeepSeek,
    Dense,
    E,
    Masked,
    Mixtral,
    Qwen,
    Switch,
    made,
    register_all,
    sequential,
    tokens,
)
from parity import assert_parity
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import ewa_kernels as ewa
from ewa_kernels.models import experts_adapters, replace_experts
from ewa_kernels.models.stacked import ExpertStack

BLOCKS = (Mixtral, Qwen, DeepSeek, Switch, Dense, Masked)
every_block = pytest.mark.parametrize("make", BLOCKS, ids=lambda make: make.__name__)


@pytest.fixture(autouse=True)
def _registrations(monkeypatch):
    monkeypatch.setattr(experts_adapters, "_registered", [])
    register_all()


def run(model, x):
    """Output and gradients, under the names that the parameters have in lists."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    values = {"y": y.detach(), "x": x.grad}
    values |= {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, ExpertStack):
            grads = {path: values.pop(f"{name}.{path}") for path, _ in module.named_parameters()}
            values |= {f"{name}.{path}": grad for path, grad in module.spread(grads).items()}
    return values


# DeepSeek's own forward fails in float64, those of Switch and Masked under autocast.
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ROUTED = [(m, d) for m in BLOCKS for d in DTYPES if (m, d) != (DeepSeek, torch.float64)]


@pytest.mark.parametrize(("make", "dtype"), ROUTED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_routed_is_what_the_block_computes(make, dtype):
    model, x = made(make, dtype), tokens(dtype=dtype)
    wide = made(make, torch.float64 if make is not DeepSeek else torch.float32)
    wide.load_state_dict(model.state_dict())
    exact = run(wide, x.to(next(wide.parameters()).dtype))
    baseline = run(model, x)
    assert ewa.replace_moe_(model, to="routed").replaced == ("layers.0.experts",)
    actual = run(model, x)
    assert actual.keys() == baseline.keys()
    for name, value in actual.items():
        if dtype == torch.float64 and issubclass(make, Mixtral):  # which takes the softmax in float32
            assert (value - exact[name]).norm() <= 1e-6 * exact[name].norm()
        else:
            assert_parity(name, value, exact[name].double(), baseline[name])


def test_a_router_in_float32_beside_16_bit_experts():
    """As in DeepSeek's checkpoints; the block casts tokens for it."""

    class Cast(Mixtral):
        def forward(self, hidden_states):
            x = hidden_states.reshape(-1, D)
            logits = self.gate(x.to(self.gate.weight.dtype))
            weights, chosen = F.softmax(logits, dim=1, dtype=torch.float).topk(self.top_k, dim=-1)
            y = self.routed(x, chosen, (weights / weights.sum(-1, keepdim=True)).to(x.dtype))
            return y.reshape(hidden_states.shape), logits

    model = made(Cast).bfloat16()
    model.layers[0].gate.float()
    x = tokens().bfloat16()
    (expected, expected_logits), ours = model.layers[0](x), copy.deepcopy(model)
    ewa.replace_moe_(ours, to="routed")
    y, logits = ours.layers[0](x)
    assert torch.equal(logits, expected_logits)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=1e-2)
    assert expected.norm() > 1


@pytest.mark.parametrize("make", [Mixtral, Qwen, DeepSeek, Dense])
def test_routed_autocast(make):
    model, x = made(make), tokens()
    exact = run(copy.deepcopy(model), x)
    with torch.autocast("cpu", torch.bfloat16):
        baseline = run(model, x)
        ewa.replace_moe_(model, to="routed")
        actual = run(model, x)
    for name in ("y", *(name for name in exact if "experts." in name)):
        error, bound = ((values[name] - exact[name]).norm() for values in (actual, baseline))
        assert actual[name].dtype == torch.float32
        assert error <= 2 * bound


@every_block
class TestRouted:
    def test_block_and_router_stay(self, make):
        model = made(make)
        block, kind = model.layers[0], type(model.layers[0])
        router = block.gate if hasattr(block, "gate") else block.router
        expected, calls = block(tokens()), []
        router.register_forward_hook(lambda *_: calls.append(1))
        ewa.replace_moe_(model, to="routed")
        assert model.layers[0] is block
        assert type(block) is kind
        actual = block(tokens())
        assert calls == [1]
        assert type(actual) is type(expected)
        torch.testing.assert_close(actual, expected)
        for shape in ((0,), (1,), (2, 0), (2, 3, 4)):
            x = tokens(*shape).requires_grad_()
            y = model(x)
            assert y.shape == x.shape
            y.sum().backward()
            assert x.grad.isfinite().all()

    def test_copies_and_restored(self, make):
        model = made(make, num_layers=2)
        original = copy.deepcopy(model)
        ewa.replace_moe_(model, to="routed")
        with torch.no_grad():
            model.layers[0].experts.down.weight.mul_(2)
        expected = model(tokens())
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(tokens()), expected)
            with torch.no_grad():
                twin.layers[0].experts.down.weight.mul_(2)  # and so not that of the model
            assert not torch.equal(twin(tokens()), expected)
            assert torch.equal(model(tokens()), expected)
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
        options = {"activation": experts.activation, "gated": experts.gated}
        expected = ewa.reference.moe_ffn(x, *experts.experts, seed=ewa.functional.draw_seed(x), **options)
        if make is Qwen:
            expected = expected + block.shared(x)
        if make is DeepSeek:
            expected = expected + block.shared_experts(x)
        torch.testing.assert_close(y, expected)

    def test_mean_in_eval_and_after_the_fold_and_in_its_checkpoint(self, make):
        model = made(make, num_layers=2)
        mean = copy.deepcopy(model).eval()
        with torch.no_grad():
            for block in mean.layers:
                for group in zip(*(expert.parameters() for expert in block.experts), strict=True):
                    average = torch.stack(group).double().mean(0)
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
        saved = model.state_dict()
        assert list(saved) == list(mean.state_dict())
        assert all(torch.equal(value, mean.state_dict()[name]) for name, value in saved.items() if "experts" in name)
        assert len({value.data_ptr() for value in saved.values()}) == len(saved)
        mean.load_state_dict(saved)
        model.load_state_dict(made(make, num_layers=2).state_dict())  # of experts that differ
        assert torch.equal(model(tokens()), expected)
        with pytest.raises(ValueError, match="got one that was folded"):
            ewa.restore_moe_(model)

    def test_and_back(self, make):
        model = made(make)
        expected = model(tokens())
        for to in ("random_partition", "routed"):
            assert ewa.replace_moe_(model, to=to).replaced == ("layers.0.experts",)
        torch.testing.assert_close(model(tokens()), expected)


@pytest.mark.parametrize("make", [Mixtral, Switch], ids=lambda make: make.__name__)
class TestCheckpoints:
    """The list's names, or those of the stacked parameters: before and after load in both directions."""

    def models(self, make):
        before, after = made(make, num_layers=2), made(make, num_layers=2)
        for parameter in before.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        ewa.replace_moe_(after, to="routed")
        return before, after

    @pytest.mark.parametrize("assign", [False, True])
    def test_both_directions(self, make, assign):
        before, after = self.models(make)
        expected = before(tokens())
        after.load_state_dict(before.state_dict(), assign=assign)
        torch.testing.assert_close(after(tokens()), expected)
        before = made(make, num_layers=2)
        before.load_state_dict(after.state_dict())
        assert torch.equal(before(tokens()), expected)
        assert list(before.state_dict()) == list(after.state_dict())

    def test_stacked_names_count(self, make):
        before, after = self.models(make)
        stacked = {
            f"layers.0.experts.{name}": torch.ones_like(p) for name, p in after.layers[0].experts.named_parameters()
        }
        state = {key: value for key, value in before.state_dict().items() if "layers.0.experts" not in key}
        for given in (state | stacked, before.state_dict() | stacked):
            after.load_state_dict(given)
            assert all((p == 1).all() for p in after.layers[0].experts.parameters())

    def test_not_all_experts(self, make):
        before, after = self.models(make)
        state = {key: value for key, value in before.state_dict().items() if "layers.1.experts.2" not in key}
        with pytest.raises(RuntimeError, match=r"must have all experts of layers.1.experts, lacks layers.1.experts.2"):
            after.load_state_dict(state, strict=False)
        state = {key: value for key, value in before.state_dict().items() if "experts" not in key}
        with pytest.raises(RuntimeError, match=r"Missing key.*layers.0.experts.up.weight"):
            after.load_state_dict(state)

    def test_its_tensors_are_the_parameters(self, make):
        """As averages of weights that write into them need it."""
        _, after = self.models(make)
        with torch.no_grad():
            for value in after.state_dict().values():
                value.fill_(0.5)
        assert all((parameter == 0.5).all() for parameter in after.parameters())

    def test_nobody_writes_beside_them(self, make):
        """What is found under a list's names has shapes alone."""
        model = made(make)
        name, own = next((n, p) for n, p in model.layers[0].experts.named_parameters())
        ewa.replace_moe_(model, to="routed")
        weight = model.get_submodule(f"layers.0.experts.{name.rpartition('.')[0]}").weight
        assert weight.shape == own.shape
        for write in (weight.zero_, lambda: weight.data.zero_(), lambda: weight.copy_(torch.ones_like(own))):
            with pytest.raises(RuntimeError, match=f"ExpertStack.{name} has experts in its place: load a state dict"):
                write()
        with pytest.raises(RuntimeError, match=f"ExpertStack.{name} has experts in its place"):
            model.get_submodule(f"layers.0.experts.{name.rpartition('.')[0]}").weight = nn.Parameter(own.clone())

    @pytest.mark.parametrize("full", [False, True])
    def test_of_torch_distributed(self, make, full):
        before, after = self.models(make)
        expected, options = before(tokens()), StateDictOptions(full_state_dict=full)
        assert list(get_model_state_dict(after, options=options)) == list(before.state_dict())
        set_model_state_dict(after, get_model_state_dict(before, options=options), options=options)
        torch.testing.assert_close(after(tokens()), expected)
        ewa.replace_moe_(after, to="random_partition")
        mean = after.eval()(tokens())
        folded = ewa.fold_moe_(copy.deepcopy(after))
        set_model_state_dict(folded, get_model_state_dict(after, options=options), options=options)
        assert torch.equal(folded(tokens()), mean)


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
            for module in model.modules():  # as whoever trains without it does
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            torch.testing.assert_close(model.train().layers[0](x[:1])[0], model.eval().layers[0](x[:1])[0])

    def test_frozen_and_mode(self):
        model = made(Switch).eval()
        for expert in model.layers[0].experts:
            expert[0].requires_grad_(False)
        ewa.replace_moe_(model, to="routed")
        experts = model.layers[0].experts
        assert [p.requires_grad for p in experts.parameters()] == [False, False, True, True]
        assert not experts.training
        ewa.restore_moe_(model)
        assert [p.requires_grad for p in model.layers[0].experts[0].parameters()] == [False, False, True, True]

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
        assert ewa.replace_moe_(block, to="routed").replaced == ("experts",)  # of the model that is the block itself
        for args, kwargs in (((), {"mask": None}), ((None,), {}), ((None,), {"scale": 1.0})):
            torch.testing.assert_close(block(tokens(), *args, **kwargs), expected)
        torch.testing.assert_close(block(x=tokens(), mask=None), expected)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens(), mask=None), expected)
        torch._dynamo.reset()
        for args, kwargs in (((tokens(),), {}), ((), {"scale": 2.0}), ((None, 3), {}), ((), {"other": None})):
            with pytest.raises(TypeError, match="Called must get one Tensor after replace_moe_, got Tensor, "):
                block(tokens(), *args, **kwargs)

    def test_a_hook_that_hides_the_forward(self):
        """As accelerate's do; its object stays the block's."""
        model = made(Mixtral)
        ewa.replace_moe_(model, to="routed")
        block, expected = model.layers[0], model(tokens())
        ours, block.forward = block.forward, lambda *args: ours(*args)
        with pytest.raises(ValueError, match="remove hooks around them first"):
            ewa.restore_moe_(model)
        assert torch.equal(model(tokens()), expected)
        block.forward = ours
        torch.testing.assert_close(ewa.restore_moe_(model)(tokens()), expected)

    def test_settings_that_change(self):
        model = made(Mixtral)
        ewa.replace_moe_(model, to="routed")
        model.layers[0].top_k = 1
        with pytest.raises(RuntimeError, match=r"top_k of Mixtral must be 2, as at replace_moe_, got 1: call restore"):
            model(tokens())
        model.layers[0].top_k = 2
        model(tokens())
        model.layers[0].jitter = 0.1  # which its class has
        with pytest.raises(RuntimeError, match=r"jitter of Mixtral must be 0.0, as at replace_moe_, got 0.1"):
            model(tokens())
        del model.layers[0].jitter
        model.layers[0].top_k = 1
        ewa.replace_moe_(ewa.restore_moe_(model), to="routed")
        assert model.layers[0].forward.formula.top_k == 1

    def test_blocks_that_are_alike_are_run_once(self, monkeypatch):
        proved, prove = [], replace_experts.prove
        monkeypatch.setattr(replace_experts, "prove", lambda *args: proved.append(1) or prove(*args))
        model = made(Mixtral, num_layers=4)
        model.layers[2].renormalize = False
        model.layers[3].experts[1].act_fn = nn.ReLU()  # which its experts' tensors do not show
        report = ewa.replace_moe_(model, to="routed")
        assert report.replaced == tuple(f"layers.{i}.experts" for i in range(3))
        assert "does not compute the sum" in report.skipped["layers.3.experts"]
        assert len(proved) == 3
        assert [block.forward.formula.renormalize for block in model.layers[:3]] == [True, True, False]
