"""What an attached averager notices of its optimizer: that it does not train the experts, or undoes their averaging."""

import functools
import re
import warnings

import pytest
import timm.optim
import torch
import vision  # noqa: F401
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from training import backward, make_model, train

import ewa_kernels as ewa

BETA = 0.3
KEPT = 1 - BETA * 4 / 3  # of the spread of four experts, at each averaging


class Matrix(nn.Module):
    """Four experts in one matrix, as somebody else's class has them; and something else."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w1 = nn.Parameter(torch.randn(24, 8))
        self.head = nn.Parameter(torch.randn(8))

    def backward(self):
        (self.w1.square().sum() + self.head.square().sum()).backward()


def spread(w1):
    experts = w1.detach().double().view(4, 6, 8)
    return (experts - experts.mean(0)).norm().item()


def steps(model, optimizer, num_steps):
    """What is left of the spread, and the warnings. The learning rate is next to nothing."""
    before = spread(model.w1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(num_steps):
            optimizer.zero_grad()
            model.backward()
            optimizer.step()
    return spread(model.w1) / before, [str(warning.message) for warning in caught]


def to_dtype(model):
    model.to(torch.bfloat16)


def moved(model):
    model.w1.data = model.w1.data.clone()  # as to() does for another device


def assigned(model):
    model.load_state_dict({"w1": torch.randn(24, 8), "head": torch.randn(8)}, assign=True)


def replaced(model):
    model.w1 = nn.Parameter(torch.randn(24, 8))


LOST = r"experts 0 \[4, 6, 8\] are averaged, but the SGD attached to does not train them any more: .*Make the optimizer"


class TestGivenTensors:
    @pytest.mark.parametrize("change", [None, to_dtype, moved, assigned, replaced])
    @pytest.mark.parametrize("num_steps_before", [0, 3])
    def test_views_of_a_parameter(self, change, num_steps_before):
        model = Matrix()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
        ewa.ExpertAverager([model.w1.detach().view(4, 6, 8)], BETA).attach(optimizer)
        assert steps(model, optimizer, num_steps_before) == (pytest.approx(KEPT**num_steps_before), [])
        if change is not None:
            change(model)
        left, told = steps(model, optimizer, 1)
        if change is None:
            assert (left, told) == (pytest.approx(KEPT), [])
        else:
            assert left == pytest.approx(1, rel=1e-3)
            assert len(told) == 1
            assert re.match(LOST, told[0])
        assert steps(model, optimizer, 3)[1] == []  # it is said once

    @pytest.mark.parametrize("change", [to_dtype, moved, assigned])
    def test_parameters_themselves(self, change):
        """What only moves is followed."""
        model = nn.Module()
        model.w1 = nn.Parameter(torch.randn(4, 6, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
        ewa.ExpertAverager([("w1", model.w1)], BETA).attach(optimizer)
        model.backward = lambda: model.w1.square().sum().backward()
        model.head = torch.zeros(8)
        if change is assigned:
            model.load_state_dict({"w1": torch.randn(4, 6, 8)}, assign=True)
            left, told = steps(model, optimizer, 2)
            assert left == pytest.approx(1)
            assert [text[: text.index(", but")] for text in told] == ["experts w1 [4, 6, 8] are averaged"]
        else:
            change(model)
            left, told = steps(model, optimizer, 2)
            assert left == pytest.approx(KEPT**2, rel=0.02)
            assert told == []

    def test_experts_that_have_no_gradient_for_a_while(self):
        model = Matrix()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
        ewa.ExpertAverager([list(model.w1.detach().view(4, 6, 8))], BETA).attach(optimizer)
        for _ in range(5):
            model.w1.grad, model.head.grad = None, torch.ones(8)
            optimizer.step()
        model.w1.requires_grad_(False)
        optimizer.step()

    def test_parameters_that_are_in_no_module(self):
        """As functions take them."""

        def run():
            w1 = nn.Parameter(torch.randn(4, 6))
            optimizer = torch.optim.SGD([w1], lr=0.1)
            ewa.ExpertAverager([w1], BETA).attach(optimizer)
            optimizer.step()

        run()


class TestModel:
    def make(self, kind=torch.optim.SGD):
        model = make_model()
        averager = ewa.ExpertAverager(model, BETA)
        ours = {"averager": averager} if kind is ewa.optim.AdamW else {}
        optimizer = kind(model.parameters(), lr=1e-12, **ours)
        if not ours:
            averager.attach(optimizer)
        return model, optimizer, averager

    @pytest.mark.parametrize("kind", [torch.optim.SGD, ewa.optim.AdamW])
    def test_all_parameters_are_replaced(self, kind):
        model, optimizer, averager = self.make(kind)
        train(model, optimizer, 2)
        model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
        names = (
            r"experts 1\.up\.weight \[4, 12, 8\], 1\.up\.bias \[4, 12\], 1\.down\.weight \[4, 8, 12\] and 1 more are"
        )
        with pytest.warns(UserWarning, match=names + " averaged, but the (SGD|AdamW) attached to does not"):
            train(model, optimizer, 1)
        train(model, optimizer, 3)
        assert averager.num_steps == 6

    def test_one_is_replaced_and_the_optimizer_gets_the_new_one(self):
        model, optimizer, averager = self.make()
        before = averager.spread()
        model[1].up.weight = nn.Parameter(torch.randn(4, 12, 8))
        with pytest.warns(UserWarning, match=r"experts 1\.up\.weight \[4, 12, 8\] are averaged, but the SGD"):
            train(model, optimizer, 1)
        optimizer.add_param_group({"params": [model[1].up.weight]})
        train(model, optimizer, 1)
        assert averager.spread()["1.down.weight"] == pytest.approx(KEPT**2 * before["1.down.weight"])
        optimizer.param_groups.pop()
        with pytest.warns(UserWarning, match=r"experts 1\.up\.weight \[4, 12, 8\] are averaged, but the SGD"):
            train(model, optimizer, 1)

    @pytest.mark.parametrize("change", [lambda m: m.bfloat16(), lambda m: [moved_in_place(p) for p in m.parameters()]])
    def test_parameters_that_only_move_are_followed(self, change):
        model, optimizer, averager = self.make()
        before = averager.spread()["1.up.weight"]
        change(model)
        train(model, optimizer, 2)
        assert averager.spread()["1.up.weight"] == pytest.approx(KEPT**2 * before, rel=0.02)

    @pytest.mark.parametrize(
        "make_optimizer",
        [
            functools.partial(torch.optim.AdamW, foreach=True),
            functools.partial(torch.optim.AdamW, fused=True, capturable=True),
            torch.optim.AdamW,
            functools.partial(torch.optim.SGD, foreach=True),
            ewa.optim.AdamW,
        ],
        ids=["foreach", "fused", "AdamW", "SGD", "ours"],
    )
    def test_no_false_alarm(self, make_optimizer):
        """Experts frozen and trained again, some the optimizer never had, groups that are added and replaced."""
        model = nn.ModuleList([make_model(), make_model(seed=1)])
        averager = ewa.ExpertAverager(model, BETA)
        ours = {"averager": averager} if make_optimizer is ewa.optim.AdamW else {}
        optimizer = make_optimizer(model[0].parameters(), lr=1e-12, **ours)
        if not ours:
            averager.attach(optimizer)
        before = averager.spread()

        def step():
            for part in model:
                backward(part)
            optimizer.step()

        step()
        model[0][1].up.requires_grad_(False)
        step()
        optimizer.add_param_group({"params": [*model[1].parameters()]})
        step()
        model[0][1].up.requires_grad_(True)
        optimizer.param_groups[0]["params"] = [*reversed(optimizer.param_groups[0]["params"])]
        step()
        for name, value in averager.spread().items():
            num_steps = 2 if name.startswith("0.1.up") else 4
            assert value == pytest.approx(KEPT**num_steps * before[name], rel=1e-3)

    def test_experts_frozen_at_first_that_the_optimizer_never_gets(self):
        model = make_model()
        averager = ewa.ExpertAverager(model, BETA)
        model[1].requires_grad_(False)
        optimizer = torch.optim.SGD([model[0].weight], lr=0.1)
        averager.attach(optimizer)
        train(model, optimizer, 2)
        model[1].requires_grad_(True)
        with pytest.warns(UserWarning, match="the SGD attached to has none of the experts"):
            train(model, optimizer, 1)
        train(model, optimizer, 1)


def moved_in_place(parameter):
    parameter.data = parameter.data.clone()


class Masters(torch.optim.Optimizer):
    """Adam-like, with float32 copies of its own from which it writes the parameters anew at each step."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.masters = {p: p.detach().float().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        for p, master in self.masters.items():
            if p.grad is not None:
                master.sub_(p.grad.float().sign(), alpha=self.param_groups[0]["lr"])
                p.copy_(master)


class TestUndone:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("start", [0, 5])
    def test_master_weights(self, dtype, start):
        """At the second step that averages."""
        model = make_model(dtype)
        optimizer = Masters(model.parameters(), lr=1e-3)
        averager = ewa.ExpertAverager(model, ewa.ConstantShareRate(BETA, start_step=start))
        averager.attach(optimizer)
        train(model, optimizer, start + 1)
        with pytest.warns(UserWarning, match=r"the Masters attached to undoes averaging.*Give ExpertAverager these"):
            train(model, optimizer, 1)
        train(model, optimizer, 4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_way_out(self, dtype):
        model = make_model(dtype)
        optimizer = Masters(model.parameters(), lr=1e-6)
        experts = dict(ewa.expert_tensors(model))
        copies = {f"{name} of the optimizer": optimizer.masters[p] for name, p in experts.items()}
        averager = ewa.ExpertAverager(experts | copies, BETA)
        averager.attach(optimizer)
        before = averager.spread()
        train(model, optimizer, 8)
        for name, value in averager.spread().items():
            assert value == pytest.approx(KEPT**8 * before[name], rel=0.1, abs=0 if "of" in name else 1e-3)

    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            (torch.optim.SGD, {"lr": 0.3}),
            (torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1}),
            (torch.optim.Adam, {"lr": 1e-2, "betas": (0.9, 0.99)}),
        ],
    )
    def test_training_in_balance_with_averaging_is_no_false_alarm(self, kind, options):
        """Each expert is drawn to a place of its own by just as much as averaging draws it away."""
        own = type("Own", (kind,), {"__module__": __name__})  # not one of torch's, which are not looked at
        torch.manual_seed(0)
        experts, goal = nn.Parameter(torch.randn(4, 64)), torch.randn(4, 64)
        optimizer = own([experts], **options)
        ewa.ExpertAverager([experts], BETA).attach(optimizer)
        for _ in range(70):
            before = experts.detach().clone()
            optimizer.zero_grad()
            (0.5 * (experts - goal).square().sum()).backward()
            optimizer.step()
        assert (experts - before).norm() < 0.02 * before.norm()  # in balance indeed

    @pytest.mark.parametrize("name", ["lamb", "lookahead_adam", "muon", "adopt"])
    def test_optimizers_of_timm_are_no_false_alarm(self, name):
        model = make_model()
        optimizer = timm.optim.create_optimizer_v2(model, opt=name, lr=1e-3)
        averager = ewa.ExpertAverager(model, BETA)
        averager.attach(optimizer)
        train(model, optimizer, 33)
        assert averager.num_steps == 33


class TestStepsInsideBackward:
    WAY_OUT = r"has a part of the experts only: attach to none, and call averager\.step\(\) after each backward"

    def test_torchs_own_are_refused(self):
        model = make_model()
        _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
        averager = ewa.ExpertAverager(model, BETA)
        with pytest.raises(ValueError, match=self.WAY_OUT):
            averager.attach(model[1].up.weight._in_backward_optimizers[0])
        assert averager.attached_to is None
        twin = make_model()
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        ewa.ExpertAverager(twin, BETA).attach(optimizer)
        for _ in range(3):
            torch.manual_seed(1)
            backward(model)
            averager.step()
            torch.manual_seed(1)
            train(twin, optimizer, 1)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)

    @pytest.mark.parametrize("attached_first", [True, False])
    def test_one_optimizer_for_each_parameter(self, attached_first):
        """Before its hook is there it is as any other; then its first step says so, before anything changes."""
        model = make_model()
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
        averager, weight = ewa.ExpertAverager(model, BETA), model[1].up.weight
        if attached_first:
            averager.attach(optimizers[weight])
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
        if not attached_first:
            with pytest.raises(ValueError, match=self.WAY_OUT):
                averager.attach(optimizers[weight])
            return
        before = weight.detach().clone()
        with pytest.raises(RuntimeError, match=self.WAY_OUT):
            backward(model)
        assert torch.equal(weight, before)

    def test_an_averager_of_its_own_for_each_parameter(self):
        """Then each step, inside backward, ends with averaging all that belongs together."""
        model = make_model()
        before = ewa.ExpertAverager(model, BETA).spread()
        optimizers = {p: torch.optim.SGD([p], lr=1e-12) for p in model.parameters()}
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
        for _, p in ewa.expert_tensors(model):
            ewa.ExpertAverager([p], BETA).attach(optimizers[p])
        backward(model)
        for name, value in ewa.ExpertAverager(model, BETA).spread().items():
            assert value == pytest.approx(KEPT * before[name])

    def test_two_optimizers_after_backward(self):
        """Weights in one and biases in the other; hooks that only look on."""
        model = make_model()
        weights, biases = ([p for _, p in ewa.expert_tensors(model) if p.ndim == ndim] for ndim in (3, 2))
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: None)
        averager = ewa.ExpertAverager(model, BETA)
        optimizer, other = (torch.optim.SGD(params, lr=0.1) for params in (weights, biases))
        averager.attach(optimizer)
        train(model, optimizer, 2)
        other.step()
        assert averager.num_steps == 2
