"""Replace, train, fold."""

import copy
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import Mlp, MLPBlock, PackedGLU, PointMlp, SwiGLU, Transformer, tokens
from torch import nn
from torch.nn.utils import prune

import ewa_kernels as ewa


class TestReplace:
    def test_every_other_by_default(self):
        model = Transformer(*(Mlp() for _ in range(5)))
        report = ewa.replace_ffn_(model, 3)
        assert report.replaced == ("blocks.1.mlp", "blocks.3.mlp")
        assert report.kept == ("blocks.0.mlp", "blocks.2.mlp", "blocks.4.mlp")
        assert report.skipped == {}
        assert str(report).splitlines()[0] == "blocks.1.mlp  replaced fused"
        assert report.forms == {"blocks.1.mlp": "fused", "blocks.3.mlp": "fused"}
        for i, block in enumerate(model.blocks):
            assert isinstance(block.mlp, ewa.RandomPartitionMoE) == (i % 2 == 1)
        assert model.blocks[1].mlp.num_experts == 3

    def test_filter(self):
        model = Transformer(*(Mlp() for _ in range(3)))
        seen = []
        report = ewa.replace_ffn_(
            model, filter_fn=lambda name, module: seen.append((name, type(module))) or "0" in name
        )
        assert seen == [(f"blocks.{i}.mlp", Mlp) for i in range(3)]
        assert report.replaced == ("blocks.0.mlp",)

    @pytest.mark.parametrize("num_experts", [1, 3, 4])
    @pytest.mark.parametrize("make", [Mlp, MLPBlock, PointMlp, PackedGLU, SwiGLU])
    def test_copy_does_not_change_the_eval_output(self, registered, make, num_experts):
        model = Transformer(make(), make()).eval()
        expected = model(tokens())
        ewa.replace_ffn_(model, num_experts)
        assert torch.equal(model(tokens()), expected)
        # In training mode all experts are alike, so every deal gives the dense output too.
        torch.testing.assert_close(model.train()(tokens()), expected) if make is not PointMlp else None

    def test_copies_mode_dtype_and_frozen_flags(self):
        model = Transformer(Mlp(), Mlp()).double()
        model.blocks[1].mlp.eval()
        model.blocks[1].mlp.fc2.requires_grad_(False)
        ewa.replace_ffn_(model)
        layer = model.blocks[1].mlp
        assert not layer.training
        assert layer.up.weight.dtype == torch.float64
        assert layer.up.bias.requires_grad
        assert not layer.down.weight.requires_grad
        ewa.fold_(model)
        assert not model.blocks[1].mlp.training
        assert not model.blocks[1].mlp.drop1.training
        assert not model.blocks[1].mlp.fc2.bias.requires_grad

    def test_attributes_of_parameters(self):
        """The experts get them, and the FFN has them again after folding."""
        model = Transformer(Mlp())
        model.blocks[0].mlp.fc2.weight.lr_scale = 0.3
        ewa.replace_ffn_(model, filter_fn=lambda *_: True)
        assert model.blocks[0].mlp.down.weight.lr_scale == 0.3
        weight = ewa.fold_(model).blocks[0].mlp.fc2.weight
        assert weight.lr_scale == 0.3
        assert not hasattr(model.blocks[0].mlp.fc1.weight, "lr_scale")

    def test_called_by_keyword(self):
        class HiddenStates(Mlp):
            def forward(self, hidden_states):
                return super().forward(hidden_states)

        class ByKeyword(Transformer):
            def forward(self, x):
                return self.blocks[0].mlp(hidden_states=x)

        model, x = ByKeyword(HiddenStates()).eval(), tokens(2, 5, 8)
        expected = model(x)
        ewa.replace_ffn_(model, filter_fn=lambda *_: True)
        assert torch.equal(model(x), expected)
        model.train()(x).sum().backward()
        layer = model.blocks[0].mlp
        torch.manual_seed(0)
        by_name = layer(hidden_states=x, seed=3)
        assert torch.equal(layer(x=x, seed=3), by_name)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled.eval()(x), expected)
        for bad in ({"y": x}, {"hidden_states": x, "scale": 1}, {}):
            with pytest.raises(TypeError, match="x must be given, or hidden_states"):
                layer(**bad)

    def test_shared_modules_stay_shared(self):
        shared = Mlp()
        model = Transformer(Mlp(), shared, Mlp(), shared)
        model.alias = shared
        original_keys = list(model.state_dict())
        report = ewa.replace_ffn_(model)
        assert report.replaced == ("blocks.1.mlp",)
        assert model.blocks[1].mlp is model.blocks[3].mlp is model.alias
        assert isinstance(model.alias, ewa.RandomPartitionMoE)
        assert list(ewa.folded_state_dict(model)) == original_keys
        ewa.fold_(model)
        assert model.blocks[1].mlp is model.blocks[3].mlp is model.alias
        assert isinstance(model.alias, Mlp)

    def test_output_dropout_acts_in_training_only(self):
        model = Transformer(Mlp(drop=1.0), Mlp(drop=1.0))
        ewa.replace_ffn_(model, filter_fn=lambda *_: True)
        x = tokens(2, 5, 8)
        assert not model.blocks[0].mlp(x).any()
        assert model.eval().blocks[0].mlp(x).any()

    @pytest.mark.parametrize("stage", ["filter", "second layer"])
    def test_an_error_half_way_leaves_the_model_as_it_was(self, monkeypatch, stage):
        model = Transformer(*(Mlp() for _ in range(4)))
        modules = list(model.modules())
        state = copy.deepcopy(model.state_dict())
        calls = []

        def fail(*_):
            calls.append(None)
            if len(calls) == 2:
                raise MemoryError("no more")
            return True

        if stage == "filter":
            options = {"filter_fn": fail}
        else:
            options = {"init": "independent", "num_experts": 2}
            monkeypatch.setattr(Mlp, "reset_parameters", fail, raising=False)
        with pytest.raises(MemoryError):
            ewa.replace_ffn_(model, **options)
        assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())

    def test_warns_when_nothing_is_replaced(self):
        with pytest.warns(
            UserWarning, match="replace_ffn_ replaced nothing:\nno FFN found: ewa_kernels.register_ffn_adapter"
        ):
            ewa.replace_ffn_(nn.Sequential(nn.Linear(4, 4)))

    def test_meta_device(self):
        with torch.device("meta"):
            model = Transformer(Mlp(), Mlp())
        ewa.replace_ffn_(model, init="independent")
        assert all(p.is_meta for p in model.parameters())
        assert all(p.is_meta for p in ewa.fold_(model).parameters())


def trained(model, steps=5):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    averager = ewa.ExpertAverager(model, 0.2)
    averager.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens(4, 5, 4)).square().mean().backward()
        optimizer.step()
    assert max(averager.spread().values()) > 1e-5
    return model


@pytest.mark.parametrize("make", [Mlp, MLPBlock, PointMlp, PackedGLU, SwiGLU, lambda: PackedGLU(gate_last=False)])
class TestFold:
    def test_back_to_the_original(self, registered, make):
        torch.manual_seed(0)
        model = Transformer(*(make() for _ in range(4)))
        original = copy.deepcopy(model)
        ewa.replace_ffn_(model)
        trained(model).eval()
        expected = model(tokens())
        unfolded_keys = list(model.state_dict())
        state = ewa.folded_state_dict(model)
        assert list(model.state_dict()) == unfolded_keys

        assert ewa.fold_(model) is model
        assert torch.equal(model(tokens()), expected)
        assert repr(model) == repr(original)
        assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
        assert list(state) == list(model.state_dict()) == list(original.state_dict())
        assert state._metadata == original.state_dict()._metadata
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))

        original.load_state_dict(state, strict=True)
        assert torch.equal(original.eval()(tokens()), expected)
        assert model.blocks[1].mlp.training is False
        model.train()(tokens()).sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_copies_of_the_model_fold_too(self, registered, make):
        """As an EMA copy, a pickled checkpoint, and after a change of dtype."""
        model = Transformer(make(), make())
        ewa.replace_ffn_(model)
        trained(model).eval()
        expected = ewa.folded_state_dict(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))) if make.__name__ != "<lambda>" else ():
            folded = ewa.fold_(twin).state_dict()
            assert all(torch.equal(expected[name], value) for name, value in folded.items())
        wide = ewa.fold_(copy.deepcopy(model).double())
        assert all(p.dtype == torch.float64 and not p.is_meta for p in wide.parameters())
        torch.testing.assert_close(wide(tokens().double()).float(), model(tokens()))


class Remembers(Mlp):
    """Holds what cannot be copied, and keeps what it computes."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.last = None

    def forward(self, x):
        self.last = self.act(self.fc1(x))
        return self.fc2(self.last)


class TestFoldOthers:
    def test_ffn_with_state_that_cannot_be_copied(self):
        model = Transformer(Mlp(), Remembers()).eval()
        original = model.blocks[1].mlp
        lock = original.lock
        expected = model(tokens())
        ewa.replace_ffn_(model)
        assert torch.equal(model(tokens()), expected)
        ewa.fold_(model)
        assert model.blocks[1].mlp is original
        assert original.lock is lock
        assert torch.equal(model(tokens()), expected)

    def test_old_ffn_elsewhere_fails_rather_than_being_stale(self):
        model = Transformer(Mlp(), Mlp())
        kept = [model.blocks[1].mlp]
        ewa.replace_ffn_(model)
        assert all(p.is_meta for p in kept[0].parameters())

    def test_eval_from_many_threads(self):
        model = Transformer(Mlp(), Mlp()).eval()
        ewa.replace_ffn_(model)
        expected = model(tokens())
        with ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(lambda _: model(tokens()), range(200)))
        assert all(torch.equal(y, expected) for y in outputs)

    def test_pruned_experts(self):
        """Their weight is no Parameter any more; it is computed from others."""
        model = Transformer(Mlp(), Mlp()).eval()
        ewa.replace_ffn_(model)
        prune.l1_unstructured(model.blocks[1].mlp.up, "weight", amount=0.5)
        expected = model(tokens())
        assert torch.equal(ewa.fold_(model)(tokens()), expected)

    def test_subclass_with_a_forward_of_its_own(self):
        class Doubled(ewa.RandomPartitionMoE):
            def forward(self, x, *, seed=None):
                return 2 * super().forward(x, seed=seed)

        model = nn.Sequential(Doubled(8, 12, 2))
        model[0].gamma = nn.Parameter(torch.ones(8))
        assert [name for name, _ in ewa.expert_tensors(model)] == [
            "0.up.weight",
            "0.up.bias",
            "0.down.weight",
            "0.down.bias",
        ]
        with pytest.raises(TypeError, match="Doubled must override fuse, because it overrides forward"):
            ewa.fold_(model)

    def test_own_layers_become_ffns(self):
        model = nn.Sequential(nn.Linear(8, 8), ewa.RandomPartitionMoE(8, 12, 4)).eval()
        x = tokens(3, 8)
        expected = model(x)
        assert isinstance(ewa.fold_(model)[1], ewa.FFN)
        assert torch.equal(model(x), expected)

    def test_a_layer_by_itself(self):
        layer = ewa.RandomPartitionMoE(8, 12, 4)
        assert list(ewa.folded_state_dict(layer)) == ["up.weight", "up.bias", "down.weight", "down.bias"]
        with pytest.raises(ValueError, match=r"use model\.fuse\(\)"):
            ewa.fold_(layer)

    def test_nothing_to_fold(self):
        model = Transformer(Mlp())
        modules = list(model.modules())
        assert list(ewa.fold_(model).modules()) == modules

    def test_an_error_half_way_leaves_the_model_as_it_was(self, monkeypatch):
        model = Transformer(Mlp(), Mlp())
        ewa.replace_ffn_(model, filter_fn=lambda *_: True)
        modules = list(model.modules())
        kind = type(model.blocks[1].mlp)
        fuse = kind.fuse
        calls = []

        def fail(self):
            calls.append(None)
            if len(calls) == 2:
                raise MemoryError("no more")
            return fuse(self)

        monkeypatch.setattr(kind, "fuse", fail)
        for function in (ewa.fold_, ewa.folded_state_dict):
            calls.clear()
            with pytest.raises(MemoryError):
                function(model)
            assert list(model.modules()) == modules

    def test_state_dict_that_fails_puts_the_layers_back(self):
        class Broken(Transformer):
            def state_dict(self, *args, **kwargs):
                raise RuntimeError("no")

        model = Broken(Mlp(), Mlp())
        ewa.replace_ffn_(model)
        modules = list(model.modules())
        with pytest.raises(RuntimeError, match="no"):
            ewa.folded_state_dict(model)
        assert list(model.modules()) == modules

    def test_replace_again_after_folding(self):
        model = Transformer(Mlp(), Mlp()).eval()
        for _ in range(2):
            expected = model(tokens())
            ewa.replace_ffn_(model)
            torch.testing.assert_close(model(tokens()), expected, rtol=0, atol=0)
            ewa.fold_(model)

    def test_unfolded_checkpoint_resumes(self):
        model = Transformer(Mlp(), Mlp())
        ewa.replace_ffn_(model)
        trained(model)
        other = Transformer(Mlp(), Mlp())
        ewa.replace_ffn_(other)
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other.eval()(tokens()), model.eval()(tokens()))

    def test_compiled_model_with_replaced_ffns(self):
        torch.compiler.reset()
        model = Transformer(Mlp(drop=0.1), Mlp(drop=0.1))
        ewa.replace_ffn_(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(compiled.eval()(tokens()), model.eval()(tokens()))
            compiled.train()(tokens()).sum().backward()
