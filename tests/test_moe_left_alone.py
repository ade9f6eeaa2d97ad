"""What `replace_moe_` leaves alone, and why: blocks that compute something else, or more."""

import pytest
import torch
from moe_blocks import D, Dense, E, Mixtral, Model, Switch, made, tokens
from torch import nn

import ewa_kernels as ewa
from ewa_kernels.moe import replace


class Capacity(Switch):
    """Three tokens each."""

    def forward(self, x):
        weight, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = torch.where(chosen.flatten() == e)[0][:3]
            y.view(-1, D)[rows] = expert(x.reshape(-1, D)[rows])
        return y * weight.unsqueeze(-1)


class Sigmoid(Switch):
    def forward(self, x):
        weights = self.router(x).sigmoid()
        return (torch.stack([expert(x) for expert in self.experts], -2) * weights.unsqueeze(-1)).sum(-2)


class KeepsItsLoss(Dense):
    def forward(self, x):
        self.loss = self.router(x).logsumexp(-1).square().mean()
        return super().forward(x)


class Counts(Dense):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Noisy(Dense):
    def forward(self, x):
        logits = self.router(x)
        if self.training:
            logits = logits + torch.randn_like(logits)
        return (torch.stack([expert(x) for expert in self.experts], -2) * logits.softmax(-1).unsqueeze(-1)).sum(-2)


class Detached(Dense):
    def forward(self, x):
        weights = self.router(x).softmax(-1).detach()
        return (torch.stack([expert(x) for expert in self.experts], -2) * weights.unsqueeze(-1)).sum(-2)


class AddsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, loss):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.full((), 1e-6, dtype=grad.dtype)


class AddsItsLoss(Dense):
    """As DeepSeek's own code did."""

    def forward(self, x):
        return AddsLoss.apply(super().forward(x), self.router(x).logsumexp(-1).mean())


class WithGradients(Dense):
    def forward(self, x):
        y = super().forward(x)
        return 1.1 * y if torch.is_grad_enabled() else y


class Norm(Dense):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        return super().forward(self.norm(x))


class BareRouter(Dense):
    def __init__(self):
        super().__init__()
        del self.router
        self.to_experts = nn.Parameter(torch.randn(D, E))

    def router(self, x):
        return x @ self.to_experts


class Dictionary(Mixtral):
    def forward(self, x):
        return dict(zip(("y", "logits"), super().forward(x), strict=True))


def jittered():
    block = Mixtral()
    block.jitter = 0.1
    return block


def hooked():
    block = Switch()
    block.experts[1].register_forward_hook(lambda *_: None)
    return block


def half_frozen():
    block = Switch()
    block.experts[1][0].weight.requires_grad_(False)
    return block


def own_forward():
    block = Switch()
    block.forward = lambda x: Switch.forward(block, x)
    return block


class TestLeftAlone:
    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (Capacity, "drops tokens, or adds some: its experts saw"),
            (Sigmoid, "does not compute the sum of what the chosen experts give"),
            (KeepsItsLoss, "keeps something of each forward in its loss"),
            (Counts, "keeps something of each forward in its calls"),
            (Noisy, "computes something else in training mode"),
            (jittered, "computes something else in training mode"),
            (Detached, "has another gradient with respect to its input"),
            (AddsItsLoss, "adds a gradient of its own with respect to its input"),
            (WithGradients, "computes something else where gradients are needed"),
            (Norm, "does not compute the sum of what the chosen experts give"),
            (BareRouter, "whose router is not one module: to_experts"),
            (Dictionary, "returns a dict, not y or"),
            (hooked, "has hooks that would be lost, on 1"),
            (half_frozen, "has projections that differ in weight: frozen, or missing"),
            (own_forward, "has a forward of its own, in its attributes|leads to the original"),
        ],
        ids=lambda value: getattr(value, "__name__", ""),
    )
    @pytest.mark.parametrize("to", ["routed", "random_partition"])
    def test_with_a_reason(self, make, reason, to):
        torch.manual_seed(0)
        model = Model(make())
        before = dict(model.named_parameters())
        with pytest.warns(UserWarning, match=f"(?s)replace_moe_ replaced nothing.*{reason}"):
            report = ewa.replace_moe_(model, to=to)
        assert list(report.skipped) == ["layers.0.experts"]
        after = dict(model.named_parameters())
        assert before.keys() == after.keys()
        assert all(before[name] is after[name] for name in before)

    @pytest.mark.parametrize("to", ["routed", "random_partition"])
    def test_a_list_with_two_holders(self, to):
        model = made(Switch, num_layers=3)
        model.layers[1].experts = model.layers[0].experts
        x = tokens()
        expected = model(x)
        report = ewa.replace_moe_(model, to=to, filter_fn=lambda name, _: True)
        assert report.replaced == ("layers.2.experts",)
        assert report.skipped == {"layers.0.experts": "shares with another module: the list itself"}
        if to == "routed":
            torch.testing.assert_close(model(x), expected)
        assert ewa.ExpertAverager(model, 0.3).spread()  # which needs no list of its own

    def test_a_part_with_two_holders(self):
        model = made(Switch)
        model.first = model.layers[0].experts[0][0]
        with pytest.warns(UserWarning, match=r"shares with another module: 0\.0"):
            ewa.replace_moe_(model, to="routed")

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

    @pytest.mark.parametrize(
        ("hook", "where"),
        [
            (lambda experts: experts[1].register_full_backward_hook(lambda *_: None), "1"),
            (lambda experts: experts.register_full_backward_pre_hook(lambda *_: None), "it"),
            (lambda experts: experts[1].register_forward_pre_hook(lambda *_: None), "1"),
            (lambda experts: experts[1][0].weight.register_hook(lambda grad: grad), r"1\.0\.weight"),
            (
                lambda experts: experts[1][0].bias.register_post_accumulate_grad_hook(lambda _: None),
                r"1\.0\.bias",
            ),
            (lambda experts: experts[1].register_state_dict_pre_hook(lambda *_: None), "1"),
        ],
    )
    def test_hooks(self, hook, where):
        model = made(Switch)
        hook(model.layers[0].experts)
        with pytest.warns(UserWarning, match=f"has hooks that would be lost, on {where}"):
            ewa.replace_moe_(model, to="routed")

    def test_by_the_filter(self):
        model = made(Switch, num_layers=3)
        report = ewa.replace_moe_(model, to="routed", filter_fn=lambda name, module: "1" in name)
        assert (report.replaced, report.kept) == (("layers.1.experts",), ("layers.0.experts", "layers.2.experts"))
        assert "layers.1.experts  replaced" in str(report)

    def test_no_experts(self):
        with pytest.warns(UserWarning, match="no experts found"):
            assert str(ewa.replace_moe_(nn.Linear(2, 2), to="routed")) == "no experts found"

    def test_layers_of_this_package(self):
        model = nn.Sequential(ewa.RoutedMoE(D, 12, E))
        with pytest.warns(UserWarning, match="is a RoutedMoE, whose forward is its own"):
            ewa.replace_moe_(model, to="random_partition")

    def test_after_a_failure_all_is_as_it_was(self, monkeypatch):
        model = made(Switch, num_layers=2)
        names = [name for name, _ in model.named_parameters()]
        calls = []

        def fail_at_second(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise MemoryError
            return stack(*args, **kwargs)

        stack = replace._stack
        monkeypatch.setattr(replace, "_stack", fail_at_second)
        with pytest.raises(MemoryError):
            ewa.replace_moe_(model, to="routed")
        assert [name for name, _ in model.named_parameters()] == names
        assert not any(p.is_meta for p in model.parameters())
        assert all(type(block) is Switch for block in model.layers)

    def test_random_generator_is_not_touched(self):
        model = made(Switch)
        state = torch.get_rng_state()
        ewa.replace_moe_(model, to="routed")
        assert torch.equal(torch.get_rng_state(), state)
