"""The experts of a model, which the averager looks up anew only where the model changed."""

import pytest
import torch
from torch import nn

import ewa_kernels as ewa


class TestLookup:
    """Of the experts of a model."""

    def model(self):
        torch.manual_seed(0)
        return nn.ModuleDict({name: ewa.RandomPartitionMoE(4, 6, 3) for name in "abc"})

    def stepped(self, model, share_rate=0.3):
        averager = ewa.ExpertAverager(model, share_rate)
        averager.step()
        averager.step()
        return averager

    def assert_averages(self, averager, tensors, others=()):
        before = [t.detach().clone() for t in (*tensors, *others)]
        for t in before[: len(tensors)]:
            ewa.reference.average_experts_([t], 0.3)
        averager.step()
        for t, expected in zip((*tensors, *others), before, strict=True):
            torch.testing.assert_close(t.detach(), expected)

    def tensors(self, model):
        return [p.data.normal_() for p in model.parameters()]

    def test_a_layer_that_is_replaced(self):
        model = self.model()
        averager = self.stepped(model)
        old = model["b"]
        model["b"] = ewa.RandomPartitionMoE(4, 6, 3)
        self.assert_averages(averager, self.tensors(model), self.tensors(old))

    def test_a_layer_that_is_removed_and_one_that_is_new(self):
        model = self.model()
        averager = self.stepped(model)
        del model["a"]
        self.assert_averages(averager, self.tensors(model))
        model["d"] = ewa.RandomPartitionMoE(5, 6, 2)
        self.assert_averages(averager, self.tensors(model))

    def test_a_layer_at_the_place_of_another_kind(self):
        """Whose ids may be those of the first one."""
        model = self.model()
        averager = self.stepped(model)
        for _ in range(10):
            model["b"] = nn.Linear(4, 4)
            self.assert_averages(averager, [p for n in "ac" for p in self.tensors(model[n])])
            model["b"] = ewa.RandomPartitionMoE(4, 6, 3)
            self.assert_averages(averager, self.tensors(model))

    def test_parameters_that_are_replaced(self):
        model = self.model()
        averager = self.stepped(model)
        model.load_state_dict({n: p.detach().clone() for n, p in model.state_dict().items()}, assign=True)
        self.assert_averages(averager, self.tensors(model))
        model["a"].up.weight = nn.Parameter(torch.randn(3, 6, 4))
        self.assert_averages(averager, self.tensors(model))

    def test_parameters_that_are_frozen_and_trained_again(self):
        model = self.model()
        averager = self.stepped(model)
        model["a"].requires_grad_(False)
        self.assert_averages(averager, self.tensors(nn.ModuleList([model["b"], model["c"]])), self.tensors(model["a"]))
        model["a"].requires_grad_(True)
        self.assert_averages(averager, self.tensors(model))

    def test_parameters_that_are_shared(self):
        model = self.model()
        averager = self.stepped(model)
        model["b"].up = model["a"].up
        self.assert_averages(averager, self.tensors(model))

    def test_flattened_parameters_are_refused(self):
        model = self.model()
        averager = self.stepped(model)
        weight = model["a"].up.weight
        weight.data = weight.data.flatten()
        with pytest.raises(ValueError, match="must have 3 dimensions"):
            averager.step()

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_beside_a_scripted_module(self):
        """Whose parameters are in no dict."""
        model = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), ewa.RandomPartitionMoE(8, 16, 2))
        averager = ewa.ExpertAverager(model, 0.3)
        for _ in range(2):
            expected = model[1].up.weight.detach().clone()
            ewa.reference.average_experts_([expected], 0.3)
            averager.step()
            torch.testing.assert_close(model[1].up.weight.detach(), expected)

    def test_modules_in_a_circle(self):
        model = self.model()
        model["a"].register_module("around", nn.Module())
        model["a"].around.register_module("again", model["a"])
        averager = self.stepped(model)
        self.assert_averages(averager, self.tensors(model))

    def test_a_layer_that_becomes_of_another_class(self):
        model = self.model()
        averager = self.stepped(model)
        for linear in (model["a"].up, model["a"].down):
            linear.__class__ = nn.Module
        self.assert_averages(averager, self.tensors(nn.ModuleList([model["b"], model["c"]])), self.tensors(model["a"]))
