"""`ExpertAverager.attach`: averaging after each step of any optimizer."""

import copy
import functools
import gc
from collections import OrderedDict

import pytest
import torch
import vision  # noqa: F401
from timm.optim import Lookahead
from torch import nn
from torch.optim import lr_scheduler
from training import SCHEDULE, backward, bits, make, make_model, same, train

import ewa_kernels as ewa


class TestAttach:
    def test_accumulated_gradients(self):
        """Once per step of the optimizer, whatever the number of backward passes."""
        results = []
        for attach in (True, False):
            model = make_model()
            optimizer, averager = torch.optim.AdamW(model.parameters()), ewa.ExpertAverager(model, SCHEDULE)
            if attach:
                averager.attach(optimizer)
            torch.manual_seed(1)
            for batch in range(12):
                backward(model)
                if batch % 4 == 3:
                    optimizer.step()
                    optimizer.zero_grad()
                    if not attach:
                        averager.step()
            assert averager.num_steps == 3
            results.append(bits(model))
        assert same(*results)

    @pytest.mark.parametrize("make_optimizer", [torch.optim.LBFGS, torch.optim.AdamW])
    def test_closures(self, make_optimizer):
        """LBFGS calls it many times within a step; averaging comes after the last."""
        results = []
        for attach in (True, False):
            model = make_model()
            optimizer, averager = make_optimizer(model.parameters(), lr=0.01), ewa.ExpertAverager(model, SCHEDULE)
            if attach:
                averager.attach(optimizer)
            calls, x = [], torch.randn(16, 6)

            def closure(model=model, optimizer=optimizer, calls=calls, x=x):
                calls.append(1)
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            for _ in range(2):
                optimizer.step(closure)
                if not attach:
                    averager.step()
            assert (len(calls) > 10) == (make_optimizer is torch.optim.LBFGS)
            assert averager.num_steps == 2
            results.append(bits(model))
        assert same(*results)

    def test_several_optimizers(self):
        """Each averager follows its own; an optimizer with two averagers runs both."""
        model = nn.ModuleList([make_model(), make_model(seed=1)])
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in model]
        averagers = [ewa.ExpertAverager([model[0][1].down.weight], 0.2), ewa.ExpertAverager(model[1], 0.2)]
        for averager, optimizer in zip(averagers, optimizers, strict=True):
            averager.attach(optimizer)
        third = ewa.ExpertAverager([model[0][1].up.weight], 0.2)
        third.attach(optimizers[0])
        before = bits(model[1])
        for _ in range(3):
            for part in model:
                backward(part)
            optimizers[0].step()
        assert [averager.num_steps for averager in (*averagers, third)] == [3, 0, 3]
        assert same(bits(model[1]), before)
        optimizers[1].step()
        assert [averager.num_steps for averager in (*averagers, third)] == [3, 1, 3]

    @pytest.mark.parametrize("before", [True, False])
    @pytest.mark.parametrize(
        "make_scheduler",
        [
            functools.partial(lr_scheduler.CosineAnnealingLR, T_max=4),
            functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=10),
            functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: step / 4),  # the first step at 0
        ],
        ids=["cosine", "one cycle", "warm-up"],
    )
    def test_schedulers_that_wrap_step(self, make_scheduler, before):
        model = make_model()
        optimizer, averager = torch.optim.AdamW(model.parameters(), lr=0.01), ewa.ExpertAverager(model, SCHEDULE)
        if before:
            averager.attach(optimizer)
        scheduler = make_scheduler(optimizer)
        if not before:
            averager.attach(optimizer)
        for step in range(4):
            train(model, optimizer, 1)
            scheduler.step()
            assert averager.num_steps == step + 1

    @pytest.mark.parametrize("zero_grad_first", [True, False])
    def test_an_optimizer_that_does_not_call_its_base_class(self, zero_grad_first):
        """timm's Lookahead has a dict for hooks, but torch has not wrapped the step that would run them."""

        class Silent(torch.optim.Optimizer):
            def __init__(self, base):
                self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
                self.base, self.param_groups, self.state = base, base.param_groups, {}
                self.defaults = base.defaults

            def step(self, closure=None):
                return self.base.step(closure)

        for make_optimizer in (Silent, Lookahead):
            model = make_model()
            optimizer, averager = make_optimizer(torch.optim.AdamW(model.parameters())), ewa.ExpertAverager(model, 0.3)
            if zero_grad_first:
                optimizer.zero_grad()
            averager.attach(optimizer)
            for step in range(6):
                backward(model)
                optimizer.step()
                assert averager.num_steps == step + 1

    def test_the_steps_are_in_a_wrappers_state_dict(self):
        """timm's gives and loads what the optimizer inside it has, and no hook of the wrapper runs."""
        saved = None
        for expected in (3, 6):
            model = make_model()
            optimizer, averager = Lookahead(torch.optim.AdamW(model.parameters())), ewa.ExpertAverager(model, 0.3)
            averager.attach(optimizer)
            if saved is not None:
                optimizer.load_state_dict(saved)
            for _ in range(3):
                backward(model)
                optimizer.step()
            assert averager.num_steps == expected
            saved = copy.deepcopy(optimizer.state_dict())

    def test_an_optimizer_that_is_driven_by_other_methods(self):
        """SAM: attached to the optimizer which it steps."""

        class SAM(torch.optim.Optimizer):
            def __init__(self, params, base):
                super().__init__(params, {})
                self.base_optimizer = base(self.param_groups, lr=0.1)

            @torch.no_grad()
            def first_step(self):
                for p in self.param_groups[0]["params"]:
                    self.state[p]["old"] = p.clone()
                    p.add_(p.grad, alpha=0.01)

            @torch.no_grad()
            def second_step(self):
                for p in self.param_groups[0]["params"]:
                    p.copy_(self.state[p]["old"])
                self.base_optimizer.step()

            def step(self, closure=None):
                raise NotImplementedError

        model = make_model()
        optimizer, averager = SAM(model.parameters(), torch.optim.SGD), ewa.ExpertAverager(model, 0.3)
        averager.attach(optimizer.base_optimizer)
        for step in range(3):
            backward(model)
            optimizer.first_step()
            backward(model)
            optimizer.second_step()
            assert averager.num_steps == step + 1

    @pytest.mark.parametrize("options", [{"lr": None}, {}], ids=["None", "missing"])
    def test_an_optimizer_that_finds_its_own_learning_rate(self, options):
        """As transformers' Adafactor does; a step of it is a real one."""

        class Own(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self, closure=None):
                for p in self.param_groups[0]["params"]:
                    p.sub_(p.grad, alpha=0.01)

        model = make_model()
        optimizer, averager = Own(model.parameters(), options), ewa.ExpertAverager(model, 0.3)
        averager.attach(optimizer)
        train(model, optimizer, 2)
        assert averager.num_steps == 2

    def test_an_optimizer_without_the_experts_is_warned_of(self):
        """Made before replace_ffn_, it goes on with the parameters that were exchanged."""
        dense = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)), nn.Linear(6, 2))
        optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
        ewa.replace_ffn_(dense, 3, filter_fn=lambda name, module: True)
        with pytest.warns(UserWarning, match=r"the SGD attached to has none of the experts.*after replace_ffn_"):
            ewa.ExpertAverager(dense, 0.3).attach(optimizer)

    def test_experts_in_the_memory_of_a_parameter(self):
        """Views of one that the optimizer has: no warning."""
        packed = nn.Parameter(torch.randn(2, 4, 3))
        averager = ewa.ExpertAverager([packed.detach()[0], packed.data[1]], 0.3)
        averager.attach(torch.optim.SGD([packed], lr=0.1))

    @pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, ewa.optim.AdamW])
    @pytest.mark.parametrize("wrong", ["share rate", "folded"])
    def test_what_is_wrong_is_found_before_the_optimizer_steps(self, make_optimizer, wrong):
        model, optimizer, averager = make(make_optimizer)
        backward(model)
        if wrong == "folded":
            ewa.fold_(model)
        else:
            averager.schedule = lambda step: 1.5
        before = [p.clone() for p in optimizer.param_groups[0]["params"]]
        with pytest.raises(ValueError, match=r"got 1\.5" if wrong == "share rate" else "experts must hold something"):
            optimizer.step()
        assert same(before, optimizer.param_groups[0]["params"])
        assert not optimizer.state
        assert averager.num_steps == 0

    @pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, ewa.optim.AdamW])
    def test_a_step_by_hand_as_well_is_warned_of(self, make_optimizer):
        model, optimizer, averager = make(make_optimizer)
        train(model, optimizer, 1)
        with pytest.warns(UserWarning, match=r"step\(\) averages once more than the optimizer"):
            averager.step()
        averager._attachment.remove()
        averager.step()

    def test_a_wrapper_without_hooks_is_refused_and_claims_nothing(self):
        class Wrapper(torch.optim.Optimizer):
            def __init__(self, inner):
                self.inner = inner

        model = make_model()
        optimizer, averager = torch.optim.SGD(model.parameters(), lr=0.1), ewa.ExpertAverager(model, 0.3)
        with pytest.raises(TypeError, match="must have step hooks, got Wrapper: attach to the optimizer it wraps"):
            averager.attach(Wrapper(optimizer))
        averager.attach(optimizer)

    def test_an_optimizer_that_is_gone_sets_the_averager_free(self):
        model, optimizer, averager = make()
        del optimizer
        gc.collect()
        averager.attach(torch.optim.SGD(model.parameters(), lr=0.1))


class TestOneAverager:
    """Of the same experts: two would average twice a step."""

    def test_a_second_is_refused_whatever_its_optimizer(self):
        model = make_model()
        first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
        attachment = ewa.ExpertAverager(model, 0.3).attach(first)
        for optimizer in (first, second):
            with pytest.raises(ValueError, match=r"that of a SGD averages .*up\.weight already"):
                ewa.ExpertAverager(model, 0.3).attach(optimizer)
            with pytest.raises(ValueError, match=r"averages .*up\.weight already"):
                ewa.optim.AdamW(model.parameters(), averager=ewa.ExpertAverager(model, 0.3))
        attachment.remove()
        ewa.ExpertAverager(model, 0.3).attach(first)

    def test_one_whose_optimizer_is_gone_is_no_second(self):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ewa.ExpertAverager(model, 0.3).attach(optimizer)
        optimizer.itself = optimizer  # a circle, which is not collected at once
        del optimizer
        ewa.ExpertAverager(model, 0.3).attach(torch.optim.SGD(model.parameters(), lr=0.1))

    def test_others_have_steps_of_their_own(self):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        halves = [[p] for p in model.parameters() if p.ndim == 3][:2]
        averagers = [ewa.ExpertAverager(tensors, 0.3) for tensors in halves]
        averagers[0].num_steps = 5
        for averager in averagers:
            averager.attach(optimizer)
        assert [averager.num_steps for averager in averagers] == [5, 0]
        saved = optimizer.state_dict()
        other = torch.optim.SGD(make_model().parameters(), lr=0.0)
        other.load_state_dict(saved)
        again = ewa.ExpertAverager([other.param_groups[0]["params"][0]], 0.3)
        again.attach(other)
        assert again.num_steps == 5
