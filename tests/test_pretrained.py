"""`save_pretrained` of a model with experts saves dense weights."""

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import vision  # noqa: F401
from huggingface_hub import PyTorchModelHubMixin
from models import Mlp, Transformer, tokens
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import ewa_kernels as ewa
from ewa_kernels.surgery.pretrained import fold_state_dict

VIT = ViTConfig(
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=8,
    patch_size=4,
    num_channels=1,
    num_labels=3,
)
BERT = BertConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, num_labels=3
)
LLAMA = LlamaConfig(
    vocab_size=20,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=32,
    tie_word_embeddings=True,
)
# Name, class, config, input: FFNs in a module of their own; in parts of a block; gated, with tied embeddings.
MODELS = [
    pytest.param(ViTForImageClassification, VIT, torch.randn(2, 1, 8, 8), id="vit"),
    pytest.param(BertForSequenceClassification, BERT, torch.arange(12).view(2, 6), id="bert"),
    pytest.param(LlamaForCausalLM, LLAMA, torch.arange(12).view(2, 6), id="llama"),
]


def with_experts(model, num_experts=3):
    ewa.replace_ffn_(model, num_experts, init="independent")
    return model


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return with_experts(ViTForImageClassification(VIT))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def load(model_class, folder):
    """The dense model, whose every weight must be in the file, and no other."""
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def assert_saved_folded(folder, model):
    expected = ewa.folded_state_dict(model)
    loaded = load(type(model), folder).state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(("model_class", "config", "x"), MODELS)
class TestSavesFolded:
    def test_and_keeps_the_experts(self, model_class, config, x, tmp_path):
        model = with_experts(model_class(config))
        names, parameters = list(model.state_dict()), list(model.parameters())
        model.save_pretrained(tmp_path)
        assert list(model.state_dict()) == names
        assert all(ours is before for ours, before in zip(model.parameters(), parameters, strict=True))
        assert_saved_folded(tmp_path, model)
        with torch.no_grad():
            assert torch.equal(load(model_class, tmp_path)(x).logits, model.eval()(x).logits)

    def test_without_the_guard_ffns_would_be_random(self, model_class, config, x, tmp_path):
        model = with_experts(model_class(config))
        model_class.save_pretrained.__wrapped__(model, tmp_path)
        _, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert report["missing_keys"]

    def test_a_given_state_dict(self, model_class, config, x, tmp_path):
        model = with_experts(model_class(config))
        for folder, args, kwargs in [
            ("stacked", (), {"state_dict": model.state_dict()}),
            ("by position", (True, model.state_dict()), {}),
            ("folded", (), {"state_dict": ewa.folded_state_dict(model)}),
        ]:
            model.save_pretrained(tmp_path / folder, *args, **kwargs)
            assert_saved_folded(tmp_path / folder, model)

    def test_state_dict_of_a_wrapper(self, model_class, config, x):
        model = with_experts(model_class(config))
        expected = ewa.folded_state_dict(model)
        for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
            folded = fold_state_dict(model, {prefix + name: t for name, t in model.state_dict().items()})
            assert folded.keys() == {prefix + name for name in expected}
            for name, tensor in expected.items():
                assert torch.equal(folded[prefix + name], tensor), name


class TestCopies:
    @pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_save_their_own_weights(self, vit, how, tmp_path):
        twin = how(vit)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        twin.save_pretrained(tmp_path / "twin")
        vit.save_pretrained(tmp_path / "original")
        assert_saved_folded(tmp_path / "twin", twin)
        assert_saved_folded(tmp_path / "original", vit)

    def test_of_the_averaged_kind(self, vit, tmp_path):
        averaged = torch.optim.swa_utils.AveragedModel(vit)
        averaged.module.save_pretrained(tmp_path)
        assert_saved_folded(tmp_path, averaged.module)

    def test_survive_the_original(self, vit, tmp_path):
        twin = copy.deepcopy(vit)
        ewa.fold_(vit)
        twin.save_pretrained(tmp_path)
        assert_saved_folded(tmp_path, twin)


class TestWrappers:
    def test_compiled(self, vit, tmp_path):
        torch.compile(vit).save_pretrained(tmp_path)
        assert_saved_folded(tmp_path, vit)

    @pytest.mark.usefixtures("one_process")
    def test_ddp(self, vit, tmp_path):
        wrapped = DistributedDataParallel(vit)
        wrapped.module.save_pretrained(tmp_path, state_dict=wrapped.module.state_dict())
        assert_saved_folded(tmp_path, vit)

    @pytest.mark.usefixtures("one_process")
    def test_fsdp(self, vit, tmp_path):
        expected = ewa.folded_state_dict(vit)
        for module in (*vit.vit.layers, vit):
            fully_shard(module)
        whole = get_model_state_dict(vit, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        vit.save_pretrained(tmp_path, state_dict=whole)
        loaded = load(ViTForImageClassification, tmp_path).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


class TestOtherMethods:
    """Of other libraries: no state_dict argument, or only one among **kwargs."""

    class Hub(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Transformer(*(Mlp() for _ in range(4)))

        def save_pretrained(self, folder):
            """Saves."""
            folder.append(self.state_dict())
            return len(folder)

    class Keywords(Hub):
        def save_pretrained(self, folder, **options):
            state_dict = options.get("state_dict")
            folder.append(self.state_dict() if state_dict is None else state_dict)

    def test_without_state_dict(self):
        model, saved = with_experts(self.Hub()), []
        assert model.save_pretrained(saved) == 1
        assert saved[0].keys() == ewa.folded_state_dict(model).keys()
        assert str(inspect.signature(model.save_pretrained)) == "(folder)"
        with pytest.raises(TypeError, match="unexpected keyword argument 'state_dict'"):
            model.save_pretrained(saved, state_dict={})

    def test_among_keywords(self):
        model, saved = with_experts(self.Keywords()), []
        model.save_pretrained(saved, state_dict=model.state_dict())
        model.save_pretrained(saved, state_dict=None)
        assert all(content.keys() == ewa.folded_state_dict(model).keys() for content in saved)

    def test_that_fails(self):
        model = with_experts(self.Hub())
        names = list(model.state_dict())
        with pytest.raises(AttributeError, match="append"):
            model.save_pretrained(None)
        assert list(model.state_dict()) == names


class TestHolders:
    """A model that was not the argument of `replace_ffn_`, but holds it, or a part of it."""

    def test_made_before(self, tmp_path):
        model = ViTForImageClassification(VIT)
        with_experts(model.vit)
        model.save_pretrained(tmp_path)
        assert_saved_folded(tmp_path, model)

    def test_made_afterwards(self, tmp_path):
        class Classifier(PreTrainedModel):
            config_class = ViTConfig
            _supports_sdpa = True

            def __init__(self, config, vit=None):
                super().__init__(config)
                self.vit = vit or ViTModel(config)
                self.post_init()

        model = Classifier(VIT, with_experts(ViTModel(VIT)))
        model.save_pretrained(tmp_path)
        assert_saved_folded(tmp_path, model)

    def test_encoder_of_a_pair(self, tmp_path):
        decoder = BertLMHeadModel(BertConfig(**{**BERT.to_dict(), "is_decoder": True, "add_cross_attention": True}))
        model = VisionEncoderDecoderModel(encoder=with_experts(ViTModel(VIT)), decoder=decoder)
        model.save_pretrained(tmp_path)
        assert not any(".up." in name for name in load_file(tmp_path / "model.safetensors"))
        load(VisionEncoderDecoderModel, tmp_path)

    def test_of_the_hub(self, tmp_path):
        class Mine(nn.Module, PyTorchModelHubMixin):
            def __init__(self):
                super().__init__()
                self.model = Transformer(Mlp(), Mlp())

        model = Mine()
        with_experts(model.model)
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        assert saved.keys() == ewa.folded_state_dict(model).keys()

    def test_a_shallow_copy(self, vit, tmp_path):
        twin = copy.copy(vit)
        twin.vit = copy.deepcopy(vit.vit)
        with torch.no_grad():
            for parameter in twin.vit.parameters():
                parameter.add_(1)
        twin.save_pretrained(tmp_path)
        assert_saved_folded(tmp_path, twin)

    def test_in_another_process(self, vit, tmp_path):
        torch.save(vit, tmp_path / "model.pt")
        code = f"""
import sys, vision, torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
model.save_pretrained({str(tmp_path)!r})
"""
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        assert_saved_folded(tmp_path, vit)


class TestAfterFolding:
    def test_is_as_it_was(self, vit, tmp_path):
        assert inspect.signature(vit.save_pretrained) == inspect.signature(
            inspect.unwrap(type(vit).save_pretrained).__get__(vit)
        )
        ewa.fold_(vit).save_pretrained(tmp_path)
        load(ViTForImageClassification, tmp_path)

    def test_and_replacing_again(self, vit, tmp_path):
        with_experts(ewa.fold_(vit)).save_pretrained(tmp_path)
        assert_saved_folded(tmp_path, vit)

    def test_of_a_part(self, vit, tmp_path):
        """The whole has no experts left then, and saves what it has."""
        ewa.fold_(vit.vit)
        vit.save_pretrained(tmp_path)
        load(ViTForImageClassification, tmp_path)


def test_submodule_with_a_method_of_its_own(vit, tmp_path):
    vit.vit.save_pretrained(tmp_path)
    _, report = type(vit.vit).from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}  # a classifier has none
    assert not report["unexpected_keys"]


def test_config_is_saved_as_ever(vit, tmp_path):
    vit.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]


class TestBadStateDict:
    def test_part_of_the_experts(self, vit, tmp_path):
        state_dict = vit.state_dict()
        del state_dict["vit.layers.1.mlp.down.bias"]
        with pytest.raises(ValueError, match=r"all experts, got nothing for vit\.layers\.1\.mlp\.down\.bias"):
            vit.save_pretrained(tmp_path / "x", state_dict=state_dict)
        assert not (tmp_path / "x").exists()

    def test_a_shard(self, vit, tmp_path):
        state_dict = vit.state_dict()
        state_dict["vit.layers.1.mlp.up.weight"] = state_dict["vit.layers.1.mlp.up.weight"][:1]
        with pytest.raises(ValueError, match=r"shape \[1, 32, 16\].*has shape \[3, 32, 16\]"):
            vit.save_pretrained(tmp_path, state_dict=state_dict)

    def test_unknown_names(self, vit, tmp_path):
        with pytest.raises(ValueError, match=r"under 'mine\.vit\.layers\.1\.mlp\.up\.weight'"):
            vit.save_pretrained(tmp_path, state_dict={f"mine.{name}": t for name, t in vit.state_dict().items()})


def test_layer_of_ones_own_is_saved_as_it_is():
    """It is part of the architecture that from_pretrained makes; only what replace_ffn_ put there is not."""

    class Native(TestOtherMethods.Hub):
        def __init__(self):
            super().__init__()
            self.experts = ewa.RandomPartitionMoE(8, 16, 2)

    model, saved = with_experts(Native()), []
    model.save_pretrained(saved)
    model.save_pretrained(saved)
    untouched = Native()
    for content in saved:
        untouched.load_state_dict(content, strict=True)
    assert torch.equal(untouched.eval().model(tokens()), model.eval().model(tokens()))
