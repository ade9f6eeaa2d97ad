"""`RandomPartitionMoE` and the `FFN` it becomes."""

import copy
import pickle

import pytest
import torch
from torch import nn

import ewa_kernels as ewa

X = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))


def test_names_shapes_and_options():
    layer = ewa.RandomPartitionMoE(8, 12, 4, activation="silu", gated=True, dropout=0.1, dtype=torch.float64)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "up.weight": (4, 24, 8),
        "up.bias": (4, 24),
        "down.weight": (4, 8, 12),
        "down.bias": (4, 8),
    }
    assert all(p.dtype == torch.float64 for p in layer.parameters())
    assert (layer.d_model, layer.d_ff, layer.num_experts) == (8, 12, 4)
    assert "d_model=8, d_ff=12, num_experts=4, activation=silu, gated=True, dropout=0.1" in repr(layer)
    without = ewa.RandomPartitionMoE(8, 12, 4, bias=False)
    assert without.up.bias is None
    assert without.down.bias is None
    assert without.train()(X).shape == without.eval()(X).shape == X.shape
    assert ewa.RandomPartitionMoE(8, 12, 4, device="meta").up.weight.is_meta


def test_each_expert_starts_as_nn_linear_does():
    torch.manual_seed(0)
    layer = ewa.RandomPartitionMoE(64, 256, 3)
    for experts, fan_in in ((layer.up, 64), (layer.down, 256)):
        bound = fan_in**-0.5
        for parameter in (experts.weight, experts.bias):
            for expert in parameter:
                assert 0.9 * bound < expert.abs().max() <= bound
            assert float(parameter.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
            assert not torch.equal(parameter[0], parameter[1])


class TestTraining:
    def test_deals_anew_at_each_call(self):
        layer = ewa.RandomPartitionMoE(8, 12, 4)
        assert not torch.equal(layer(X), layer(X))

    def test_manual_seed_and_seed_argument_reproduce(self):
        layer = ewa.RandomPartitionMoE(8, 12, 4, dropout=0.5)
        torch.manual_seed(1)
        first = layer(X)
        torch.manual_seed(1)
        assert torch.equal(layer(X), first)
        assert torch.equal(layer(X, seed=5), layer(X, seed=torch.tensor(5)))

    def test_seed_argument_leaves_the_generator_alone(self):
        layer = ewa.RandomPartitionMoE(8, 12, 4, dropout=0.5)
        state = torch.get_rng_state()
        layer(X, seed=5)
        assert torch.equal(torch.get_rng_state(), state)

    def test_is_the_functional(self):
        layer = ewa.RandomPartitionMoE(8, 12, 4, activation="relu2", gated=True, dropout=0.3)
        expected = ewa.functional.moe_ffn(
            X,
            layer.up.weight,
            layer.up.bias,
            layer.down.weight,
            layer.down.bias,
            seed=5,
            activation="relu2",
            gated=True,
            dropout_p=0.3,
        )
        assert torch.equal(layer(X, seed=5), expected)

    @pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 8), (2, 3, 4, 8)])
    def test_shapes(self, shape):
        layer = ewa.RandomPartitionMoE(8, 12, 4)
        x = torch.randn(shape, requires_grad=True)
        for mode in (True, False):
            y = layer.train(mode)(x)
            assert y.shape == x.shape
            y.sum().backward()
            assert all(p.grad.isfinite().all() for p in layer.parameters())


class TestEval:
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_is_the_folded_ffn_to_the_bit(self, gated, bias):
        layer = ewa.RandomPartitionMoE(8, 12, 4, gated=gated, bias=bias, dropout=0.5).eval()
        ffn = layer.fuse()
        assert isinstance(ffn, ewa.FFN)
        assert torch.equal(layer(X), ffn(X))
        for name, parameter in ffn.named_parameters():
            stacked = layer.get_parameter(name)
            assert torch.equal(parameter, stacked.double().mean(0).float())

    def test_has_no_randomness(self):
        layer = ewa.RandomPartitionMoE(8, 12, 4, dropout=0.5).eval()
        state = torch.get_rng_state()
        assert torch.equal(layer(X), layer(X))
        assert torch.equal(torch.get_rng_state(), state)

    def test_is_never_stale(self):
        layer = ewa.RandomPartitionMoE(8, 12, 4).eval()
        before = layer(X)
        other = ewa.RandomPartitionMoE(8, 12, 4).eval()
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(X), other(X))
        layer.up.weight.data.mul_(2)  # `.data` does not even count as a version
        assert not torch.equal(layer(X), other(X))
        assert torch.equal(layer(X), layer.fuse()(X))
        assert not torch.equal(layer(X), before)

    def test_gradient_goes_to_all_experts_alike(self):
        layer = ewa.RandomPartitionMoE(8, 12, 4).eval()
        ffn = layer.fuse()
        layer(X).square().sum().backward()
        ffn(X).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, ffn.get_parameter(name).grad.expand_as(parameter) / 4)


def test_fuse_copies_mode_dtype_frozen_flags_and_shares_nothing():
    layer = ewa.RandomPartitionMoE(8, 12, 1, activation="relu", dropout=0.25, dtype=torch.float64)
    layer.down.requires_grad_(False)
    for mode in (True, False):
        ffn = layer.train(mode).fuse()
        assert ffn.training is ffn.up.training is mode
    assert (ffn.activation, ffn.dropout, ffn.up.weight.dtype) == ("relu", 0.25, torch.float64)
    assert ffn.up.weight.requires_grad
    assert not ffn.down.weight.requires_grad
    ffn.up.weight.data.zero_()
    assert layer.up.weight.any()
    ewa.FFN(8, 12, activation="relu", dropout=0.25, dtype=torch.float64).load_state_dict(ffn.state_dict())


def test_deepcopy_and_pickle():
    layer = ewa.RandomPartitionMoE(8, 12, 4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(X, seed=3), layer(X, seed=3))


def test_parameters_move_and_convert():
    layer = ewa.RandomPartitionMoE(8, 12, 4).to(torch.bfloat16)
    assert layer(X.bfloat16()).dtype == layer.eval()(X.bfloat16()).dtype == torch.bfloat16


def test_meta_device():
    layer = ewa.RandomPartitionMoE(8, 12, 4, device="meta")
    for mode in (True, False):
        assert layer.train(mode)(torch.empty(6, 8, device="meta")).shape == (6, 8)


def test_expert_tensors():
    model = nn.ModuleDict({"a": ewa.RandomPartitionMoE(8, 12, 4, bias=False), "b": nn.Linear(8, 8)})
    assert [name for name, _ in ewa.expert_tensors(model)] == ["a.up.weight", "a.down.weight"]
    assert all(isinstance(p, nn.Parameter) and len(p) == 4 for _, p in ewa.expert_tensors(model))
    assert [name for name, _ in ewa.expert_tensors(model["a"])] == ["up.weight", "down.weight"]
