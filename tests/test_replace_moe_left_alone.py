"""Blocks that `replace_moe_` leaves alone, each with its reason, and what it refuses."""

import pytest
import torch
from experts_zoo import Lucidrains, Nested, Parents, Tutorial
from moe_blocks import (
    D,
    DeepSeek,
    Dense,
    E,
    Mixtral,
    Model,
    Qwen,
    Switch,
    made,
    register_all,
    tokens,
)
from torch import nn

import ewa_kernels as ewa
from ewa_kernels.models import experts_adapters, replace_experts


@pytest.fixture(autouse=True)
def _registrations(monkeypatch):
    monkeypatch.setattr(experts_adapters, "_registered", [])
    register_all()


class AddsLoss(torch.autograd.Function):
    """As DeepSeek's own code did."""

    @staticmethod
    def forward(ctx, y, loss):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.full((), 1e-6, dtype=grad.dtype)


def capacity(self, x):
    """200 tokens each."""
    weights = self.router(x).softmax(-1)
    places = torch.nn.functional.one_hot(weights.argmax(-1).flatten(), E).cumsum(0).view(weights.shape)
    return self.mixed(x, weights * (places <= 200))


def changed(make, change):
    def block():
        made = make()
        change(made)
        return made

    return block


def variant(forward, **attributes):
    """Dense with another forward, or a class of blocks, with other attributes."""
    make = forward if isinstance(forward, type) else type("Variant", (Dense,), {"forward": forward})
    return changed(make, lambda block: [setattr(block, name, value) for name, value in attributes.items()])


def noisy(self, x):
    logits = self.router(x)
    return self.mixed(x, (logits + self.training * torch.randn_like(logits)).softmax(-1))


def loss(self, x):
    return self.router(x).logsumexp(-1).mean()


IN_TRAINING = "computes something else on 3 tokens in training mode"
SUM = "does not compute the sum of what the chosen experts give"
LEFT_ALONE = {
    "capacity": (variant(capacity), "computes something else on 256 tokens"),
    "sigmoid": (variant(lambda self, x: self.mixed(x, self.router(x).sigmoid())), SUM),
    "norm": (variant(lambda self, x: Dense.forward(self, nn.functional.layer_norm(x, (D,)))), SUM),
    "corrected by a buffer that is zero now": (
        variant(lambda self, x: self.mixed(x, (self.router(x) + self.b).softmax(-1)), b=nn.Buffer(torch.zeros(E))),
        SUM,
    ),
    "another factor with gradients": (
        variant(lambda self, x: Dense.forward(self, x) * (1.1 if torch.is_grad_enabled() else 1)),
        SUM,
    ),
    "keeps its loss": (
        variant(lambda self, x: setattr(self, "loss", loss(self, x)) or Dense.forward(self, x)),
        "keeps something of each forward in its loss",
    ),
    "collects its losses": (
        variant(lambda self, x: self.losses.append(loss(self, x)) or Dense.forward(self, x), losses=[]),
        "keeps something of each forward in its losses",
    ),
    "counts": (
        variant(lambda self, x: Dense.forward(self, x) + 0 * self.n.add_(1), n=nn.Buffer(torch.zeros(()))),
        "keeps something of each forward in its n",
    ),
    "noisy": (variant(noisy), IN_TRAINING),
    "jitter": (variant(Mixtral, jitter=0.1), IN_TRAINING),
    "detached": (
        variant(lambda self, x: self.mixed(x, self.router(x).softmax(-1).detach())),
        "has gradients of its own on 3 tokens",
    ),
    "adds its loss": (
        variant(lambda self, x: AddsLoss.apply(Dense.forward(self, x), loss(self, x))),
        "has gradients of its own on 3 tokens",
    ),
    "in place": (variant(lambda self, x: Dense.forward(self, x.mul_(2))), "writes into its input"),
    "dictionary": (variant(lambda self, x: {"y": Dense.forward(self, x)}), "returns a dict, not y or"),
    "too many of too few": (variant(Mixtral, top_k=5), "fails on one tensor"),
    "hook": (
        changed(Switch, lambda b: b.experts[1].register_forward_hook(print)),
        "has hooks that would be lost, on 1",
    ),
    "hook of a parameter": (
        changed(Switch, lambda block: block.experts[1][0].bias.register_hook(print)),
        r"has hooks that would be lost, on 1\.0\.bias",
    ),
    "frozen expert": (changed(Switch, lambda b: b.experts[1].requires_grad_(False)), "of which a part is frozen"),
    "frozen projection": (
        changed(Mixtral, lambda block: [expert.w3.requires_grad_(False) for expert in block.experts]),
        "of which a part is frozen",
    ),
    "own forward": (changed(Switch, lambda block: vars(block).update(forward=len)), "has a forward of its own"),
    "compiled": (changed(Switch, lambda block: block.compile()), "is compiled: compile it after this call"),
    "no FFNs": (
        lambda: Mixtral(make=lambda: nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D))),
        "is no FFN of two or three",
    ),
    "stacked": (Lucidrains, r"ewa\.register_experts_adapter\(Lucidrains, up='w1', down='w2'\) says"),
    "of this package": (lambda: ewa.RoutedMoE(D, 12, E), "is a RoutedMoE, whose forward is its own"),
}


class TestLeftAlone:
    @pytest.mark.parametrize("name", LEFT_ALONE)
    def test_with_a_reason(self, name):
        torch.manual_seed(0)
        make, reason = LEFT_ALONE[name]
        model = Model(make())
        before, numbers = dict(model.named_parameters()), torch.get_rng_state()
        for to in ("routed", "random_partition"):
            with pytest.warns(UserWarning, match=f"(?s)replace_moe_ replaced nothing.*{reason}"):
                report = ewa.replace_moe_(model, to=to)
            assert len(report.skipped) == 1
        after = dict(model.named_parameters())
        assert before.keys() == after.keys()
        assert all(before[name] is after[name] for name in before)
        assert torch.equal(torch.get_rng_state(), numbers)

    @pytest.mark.parametrize(
        ("make", "name"),
        [(Mixtral, "MixtralSparseMoeBlock"), (Qwen, "Qwen2MoeSparseMoeBlock"), (DeepSeek, "DeepseekV3MoE")],
    )
    def test_but_for_blocks_of_transformers_4_by_name(self, make, name, monkeypatch):
        monkeypatch.setattr(experts_adapters, "_registered", [])
        model = made(type(name, (make,), {}))
        expected = model(tokens())
        assert [site.kind for site in ewa.find_experts(model)] == [name]
        assert ewa.replace_moe_(model, to="routed").replaced == ("layers.0.experts",)
        torch.testing.assert_close(model(tokens()), expected)

    @pytest.mark.parametrize("make", [Mixtral, Tutorial, Nested, Parents], ids=lambda make: make.__name__)
    def test_until_the_line_that_is_printed_teaches_it(self, make, monkeypatch):
        """Members that know their block are copied with it, and go on knowing it."""
        monkeypatch.setattr(experts_adapters, "_registered", [])
        model = nn.Sequential(make())
        expected = model(tokens())
        with pytest.warns(UserWarning, match=f"is in a {make.__name__} of which no adapter names the router") as caught:
            ewa.replace_moe_(model, to="routed")
        assert len(ewa.ExpertAverager(model, 0.3).spread()) >= 3  # which needs none
        exec(str(caught[0].message).partition("router: ")[2], {"ewa": ewa, make.__name__: make})
        assert len(ewa.replace_moe_(model, to="routed").replaced) == 1
        torch.testing.assert_close(model(tokens()), expected)
        ewa.restore_moe_(model)
        torch.testing.assert_close(model(tokens()), expected)
        if make is Parents:
            assert model[0].experts[2].parent[0] is model[0]

    def test_a_list_with_two_holders(self):
        model = made(Switch, num_layers=3)
        model.layers[1].experts = model.layers[0].experts
        expected = model(tokens())
        report = ewa.replace_moe_(model, to="routed")
        assert report.replaced == ("layers.2.experts",)
        assert report.skipped == {"layers.0.experts": "shares with another module: the list itself"}
        torch.testing.assert_close(model(tokens()), expected)

    def test_what_others_hold_of_the_list(self):
        model = made(Switch)
        members = model.layers[0].experts
        model.layers[0].first = [members[0]]  # out of sight
        weight, expected = members[0][0].weight, members[0](tokens())
        assert ewa.replace_moe_(model, to="routed").replaced
        assert members[0][0].weight is weight
        assert torch.equal(model.layers[0].first[0](tokens()), expected)
        restored = ewa.restore_moe_(model).layers[0].experts
        assert restored[0] is not members[0]
        assert torch.equal(restored[0](tokens()), expected)

    def test_by_the_filter(self):
        model = made(Switch, num_layers=3)
        report = ewa.replace_moe_(model, to="routed", filter_fn=lambda name, module: "1" in name)
        assert (report.replaced, report.kept) == (("layers.1.experts",), ("layers.0.experts", "layers.2.experts"))
        assert "layers.1.experts  replaced" in str(report)

    def test_no_experts(self):
        with pytest.warns(UserWarning, match="no experts found"):
            assert str(ewa.replace_moe_(nn.Linear(2, 2), to="routed")) == "no experts found"

    def test_after_a_failure_all_is_as_it_was(self, monkeypatch):
        model, calls, stack = made(Switch, num_layers=2), [], replace_experts._stack
        names = [name for name, _ in model.named_parameters()]

        def fail_at_second(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise MemoryError
            return stack(*args, **kwargs)

        monkeypatch.setattr(replace_experts, "_stack", fail_at_second)
        with pytest.raises(MemoryError):
            ewa.replace_moe_(model, to="routed")
        assert [name for name, _ in model.named_parameters()] == names
        assert not any(p.is_meta for p in model.parameters())
        assert all("forward" not in vars(block) for block in model.layers)


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
