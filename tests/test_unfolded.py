"""Checkpoints with the experts in them."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from models import Mlp, MLPBlock, PackedGLU, PointMlp, SwiGLU, Transformer, tokens
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ewa_kernels as ewa


def dense(seed=0, num_blocks=2):
    torch.manual_seed(seed)
    ffns = (Mlp(), PackedGLU(), MLPBlock(), SwiGLU(), PointMlp())
    return Transformer(*(copy.deepcopy(ffn) for _ in range(num_blocks) for ffn in ffns))


@pytest.fixture
def model(registered):
    """Experts in five blocks, two at one and three at the others."""
    model = dense()
    ewa.replace_ffn_(model, 3, init="independent")
    ewa.replace_ffn_(model, 2, init="independent", filter_fn=lambda name, _: name == "blocks.4.mlp")
    return model


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def train(model, averager, optimizer, num_steps):
    for _ in range(num_steps):
        optimizer.zero_grad()
        model.train()(torch.randn(2, 5, 4)).square().mean().backward()
        optimizer.step()
        averager.step()


class TestRoundTrip:
    def test_into_a_dense_model(self, model, tmp_path):
        ewa.save_unfolded(model, tmp_path / "model.pt")
        other = dense(seed=1)
        report = ewa.load_unfolded_(other, tmp_path / "model.pt")
        assert report.replaced == tuple(f"blocks.{i}.mlp" for i in (1, 3, 4, 5, 7, 9))
        assert report.kept == tuple(f"blocks.{i}.mlp" for i in (0, 2, 6, 8))
        assert report.skipped == {}
        assert_same(model, other)
        assert repr(other) == repr(model)
        for run in (model, other):
            torch.manual_seed(0)
            run.result = run.train()(tokens())
        assert torch.equal(model.result, other.result)
        dense().load_state_dict(ewa.fold_(other).state_dict(), strict=True)

    def test_into_a_model_with_experts(self, model, tmp_path):
        ewa.save_unfolded(model, tmp_path / "model.pt")
        other = copy.deepcopy(model)
        parameters = list(other.parameters())
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        report = ewa.load_unfolded_(other, tmp_path / "model.pt")
        assert set(report.replaced) == {f"blocks.{i}.mlp" for i in (1, 3, 4, 5, 7, 9)}
        assert_same(model, other)
        assert all(ours is before for ours, before in zip(other.parameters(), parameters, strict=True))

    def test_ten_steps_are_five_and_five(self, registered, tmp_path):
        def start(model):
            averager = ewa.ExpertAverager(model, ewa.LinearShareRate(end=0.5, num_steps=10))
            return averager, torch.optim.AdamW(model.parameters(), lr=1e-2)

        model = dense()
        ewa.replace_ffn_(model, 3)
        averager, optimizer = start(model)
        train(model, averager, optimizer, 5)
        ewa.save_unfolded(model, tmp_path / "model.pt")
        state = copy.deepcopy((averager.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
        train(model, averager, optimizer, 5)

        other = dense(seed=1)
        ewa.load_unfolded_(other, tmp_path / "model.pt")
        averager, optimizer = start(other)
        averager.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        torch.set_rng_state(state[2])
        train(other, averager, optimizer, 5)
        assert_same(model, other)

    def test_ffn_in_parts_of_a_block(self, tmp_path):
        def encoder():
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
            return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

        model, other = encoder(), encoder()
        ewa.replace_ffn_(model, 3, init="independent")
        ewa.save_unfolded(model, tmp_path / "model.pt")
        report = ewa.load_unfolded_(other, tmp_path / "model.pt")
        assert report.replaced == ("layers.1", "layers.3")
        assert_same(model, other)
        x = torch.randn(2, 5, 8)
        assert torch.equal(model.eval()(x), other.eval()(x))
        encoder().load_state_dict(ewa.fold_(other).state_dict(), strict=True)

    def test_16_bits_and_frozen_parameters(self, model, tmp_path):
        model.bfloat16()
        ewa.save_unfolded(model, tmp_path / "model.pt")
        other = dense(seed=1).bfloat16()
        other.blocks[1].requires_grad_(False)
        ewa.load_unfolded_(other, tmp_path / "model.pt")
        assert_same(model, other)
        assert all(tensor.dtype == torch.bfloat16 for tensor in other.state_dict().values())
        frozen = {name for name, parameter in other.named_parameters() if not parameter.requires_grad}
        assert "blocks.1.mlp.up.weight" in frozen
        assert all(name.startswith("blocks.1.") for name in frozen)

    def test_wrappers_are_looked_through(self, model, one_process, tmp_path):
        ewa.save_unfolded(DistributedDataParallel(model), tmp_path / "model.pt")
        other = dense(seed=1)
        ewa.load_unfolded_(torch.compile(other), tmp_path / "model.pt")
        assert_same(model, other)

    def test_sharded(self, model, one_process, tmp_path):
        sharded = copy.deepcopy(model)
        fully_shard(sharded)
        ewa.save_unfolded(sharded, tmp_path / "model.pt")
        other = dense(seed=1)
        ewa.load_unfolded_(other, tmp_path / "model.pt")
        assert_same(model, other)
        with torch.no_grad():
            for parameter in sharded.parameters():
                parameter.zero_()
        ewa.load_unfolded_(sharded, tmp_path / "model.pt")
        for name, tensor in sharded.state_dict().items():
            assert torch.equal(tensor.full_tensor(), model.state_dict()[name]), name


class TestFile:
    def test_only_the_main_process_writes(self, model, tmp_path):
        ewa.save_unfolded(model, tmp_path / "model.pt", is_main_process=False)
        assert list(tmp_path.iterdir()) == []

    def test_is_complete_or_not_there(self, model, tmp_path, monkeypatch):
        ewa.save_unfolded(model, os.fspath(tmp_path / "model.pt"))
        before = (tmp_path / "model.pt").read_bytes()

        def fails(content, file):
            file.write(b"some")
            raise OSError("disk full")

        monkeypatch.setattr(torch, "save", fails)
        with pytest.raises(OSError, match="disk full"):
            ewa.save_unfolded(model, tmp_path / "model.pt")
        assert (tmp_path / "model.pt").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]

    def test_a_model_without_experts(self):
        with pytest.raises(ValueError, match="model must hold experts that replace_ffn_ made, got none"):
            ewa.save_unfolded(dense(), "model.pt")
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
            ewa.save_unfolded([], "model.pt")

    def test_paths(self, model, tmp_path):
        for function in (ewa.save_unfolded, ewa.load_unfolded_):
            with pytest.raises(TypeError, match="path must be a str or a PathLike, got int"):
                function(model, 3)
        with pytest.raises(FileNotFoundError, match=r"path must be in a folder that exists, got .*none/model\.pt"):
            ewa.save_unfolded(model, tmp_path / "none" / "model.pt")

    @pytest.mark.parametrize("plain", [False, True])
    def test_extra_state(self, model, tmp_path, plain):
        class Extra(nn.Module):
            def get_extra_state(self):
                return {"step": 3} if plain else NotCode()

            def set_extra_state(self, state):
                pass

        model.extra = Extra()
        if plain:
            ewa.save_unfolded(model, tmp_path / "model.pt")
            ewa.load_unfolded_(model, tmp_path / "model.pt")
        else:
            with pytest.raises(ValueError, match=r"extra states of plain types, got NotCode in extra\._extra_state"):
                ewa.save_unfolded(model, tmp_path / "model.pt")
            assert list(tmp_path.iterdir()) == []


class NotCode:
    """Would be, if unpickling it did not fail."""


class TestBadFile:
    """Each leaves the model as it was, whether dense or with experts."""

    @pytest.fixture(params=["dense", "experts"])
    def untouched(self, request, model, tmp_path):
        ewa.save_unfolded(model, tmp_path / "model.pt")
        target = dense(seed=1) if request.param == "dense" else model
        modules, parameters = list(target.modules()), list(target.parameters())
        values, text = copy.deepcopy(target.state_dict()), repr(target)
        yield target
        assert repr(target) == text
        assert all(a is b for a, b in zip(target.modules(), modules, strict=True))
        assert all(a is b for a, b in zip(target.parameters(), parameters, strict=True))
        assert all(torch.equal(tensor, values[name]) for name, tensor in target.state_dict().items())

    def changed(self, tmp_path, change):
        content = torch.load(tmp_path / "model.pt")
        change(content)
        torch.save(content, tmp_path / "changed.pt")
        return tmp_path / "changed.pt"

    def test_none(self, untouched, tmp_path):
        with pytest.raises(FileNotFoundError):
            ewa.load_unfolded_(untouched, tmp_path / "none.pt")

    @pytest.mark.parametrize("content", [b"", b"words", None])
    def test_unreadable(self, untouched, tmp_path, content):
        path = tmp_path / "bad.pt"
        path.write_bytes((tmp_path / "model.pt").read_bytes()[:500] if content is None else content)
        with pytest.raises(ValueError, match=r"path must be a file that save_unfolded wrote, cannot read .*bad\.pt"):
            ewa.load_unfolded_(untouched, path)

    def test_of_another_kind(self, untouched, tmp_path):
        for content in (untouched.state_dict(), [1], {"format": "another"}):
            torch.save(content, tmp_path / "other.pt")
            with pytest.raises(ValueError, match="path must be a file that save_unfolded wrote, got another"):
                ewa.load_unfolded_(untouched, tmp_path / "other.pt")

    def test_with_code(self, untouched, tmp_path):
        torch.save({"format": "ewa_kernels.unfolded", "version": NotCode()}, tmp_path / "code.pt")
        with pytest.raises(ValueError, match="cannot read"):
            ewa.load_unfolded_(untouched, tmp_path / "code.pt")

    def test_of_another_version(self, untouched, tmp_path):
        path = self.changed(tmp_path, lambda content: content.update(version=2))
        with pytest.raises(ValueError, match="version 1, got 2"):
            ewa.load_unfolded_(untouched, path)

    def test_incomplete_or_corrupt(self, untouched, tmp_path):
        path = self.changed(tmp_path, lambda content: content.pop("sites"))
        with pytest.raises(ValueError, match="path must be a complete file of save_unfolded"):
            ewa.load_unfolded_(untouched, path)
        for bad in ("many", -1, None):
            path = self.changed(
                tmp_path, lambda content, bad=bad: content["sites"]["blocks.9.mlp"].update(num_experts=bad)
            )
            with pytest.raises(ValueError, match=rf"has {bad} experts in blocks\.9\.mlp"):
                ewa.load_unfolded_(untouched, path)

    def test_other_tensors(self, untouched, tmp_path):
        path = self.changed(tmp_path, lambda content: content["state_dict"].pop("head.bias"))
        with pytest.raises(ValueError, match=r"the file lacks head\.bias and has beside them none"):
            ewa.load_unfolded_(untouched, path)
        path = self.changed(tmp_path, lambda content: content["state_dict"].update(extra=torch.zeros(1)))
        with pytest.raises(ValueError, match="the file lacks none and has beside them extra"):
            ewa.load_unfolded_(untouched, path)
        path = self.changed(tmp_path, lambda content: content["state_dict"].update({"head.bias": torch.zeros(4)}))
        with pytest.raises(ValueError, match=r"its head\.bias has \[3\], the saved one \[4\]"):
            ewa.load_unfolded_(untouched, path)

    def test_another_activation(self, untouched, tmp_path):
        path = self.changed(tmp_path, lambda content: content["sites"]["blocks.9.mlp"].update(activation="relu"))
        with pytest.raises(ValueError, match=r"activation = relu in blocks\.9\.mlp, got gelu"):
            ewa.load_unfolded_(untouched, path)

    def test_bad_backend(self, untouched, tmp_path):
        with pytest.raises(ValueError, match="backend must be one of"):
            ewa.load_unfolded_(untouched, tmp_path / "model.pt", backend="magic")


class TestAnotherModel:
    @pytest.fixture
    def path(self, model, tmp_path):
        ewa.save_unfolded(model, tmp_path / "model.pt")
        return tmp_path / "model.pt"

    def test_of_fewer_blocks(self, path):
        with pytest.raises(ValueError, match=r"model must be of the saved architecture, has no FFN blocks\.5\.mlp"):
            ewa.load_unfolded_(dense(num_blocks=1), path)

    def test_whose_ffn_is_not_replaceable(self, path):
        other = dense()
        other.blocks[3].mlp.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=r"its blocks\.3\.mlp has hooks that would be lost"):
            ewa.load_unfolded_(other, path)

    def test_of_another_width(self, path):
        other = dense()
        other.blocks[1].mlp = PackedGLU(d_ff=20)
        before = list(other.parameters())
        with pytest.raises(ValueError, match=r"d_ff = 16 in blocks\.1\.mlp, got 20"):
            ewa.load_unfolded_(other, path)
        assert all(a is b for a, b in zip(other.parameters(), before, strict=True))

    def test_on_the_meta_device(self, path):
        with torch.device("meta"):
            other = dense()
        with pytest.raises(ValueError, match=r"model must have memory to load into, got one on meta"):
            ewa.load_unfolded_(other, path)
        assert not any(isinstance(module, ewa.RandomPartitionMoE) for module in other.modules())

    def test_layers_of_ones_own_stay(self, path):
        other = nn.ModuleDict({"model": dense(), "own": ewa.RandomPartitionMoE(8, 16, 2)})
        with pytest.raises(ValueError, match=r"has no FFN blocks"):
            ewa.load_unfolded_(other, path)
        other = dense()
        other.own = ewa.RandomPartitionMoE(8, 16, 2)
        with pytest.raises(ValueError, match=r"the file lacks own\.down\.bias"):
            ewa.load_unfolded_(other, path)
        assert [name for name, m in other.named_modules() if isinstance(m, ewa.RandomPartitionMoE)] == ["own"]

    def test_undoing_restores_blocks(self, tmp_path):
        def encoder(width):
            layer = nn.TransformerEncoderLayer(8, 2, width, batch_first=True)
            return nn.TransformerEncoder(layer, 2)

        model, other = encoder(16), encoder(24)
        ewa.replace_ffn_(model)
        ewa.save_unfolded(model, tmp_path / "model.pt")
        before, vars_before = list(other.modules()), dict(vars(other.layers[1]))
        parameters = list(other.parameters())
        with pytest.raises(ValueError, match=r"d_ff = 16 in layers\.1\.linear1, got 24"):
            ewa.load_unfolded_(other, tmp_path / "model.pt")
        assert all(a is b for a, b in zip(other.modules(), before, strict=True))
        assert all(a is b for a, b in zip(other.parameters(), parameters, strict=True))
        assert vars(other.layers[1]) == vars_before
        assert other.use_nested_tensor

    def test_with_experts_elsewhere(self, path):
        other = dense()
        ewa.replace_ffn_(other, 3)
        with pytest.raises(ValueError, match=r"experts where the saved one had them, differs at blocks\.4\.mlp"):
            ewa.load_unfolded_(other, path)

    def test_with_another_number_of_experts(self, path):
        other = dense()
        ewa.replace_ffn_(other, 4, filter_fn=lambda name, _: name[7] in "134579")
        with pytest.raises(ValueError, match=r"num_experts = 3 in blocks\.1\.mlp, got 4"):
            ewa.load_unfolded_(other, path)
