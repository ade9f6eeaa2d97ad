"""What libraries do to models by rules of their own: weight decay, fusing; and what happens without them."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
from models import Mlp, Transformer
from timm.models import reparameterize_model
from timm.optim import param_groups_weight_decay
from torch import nn

import ewa_kernels as ewa

TESTS = Path(__file__).parent


def replaced():
    model = Transformer(Mlp(), Mlp())
    ewa.replace_ffn_(model)
    return model


def names_of(model, parameters):
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


EXPERTS = {"blocks.1.mlp.up", "blocks.1.mlp.down"}


class TestWeightDecay:
    def check(self, model, decays, rest):
        assert names_of(model, decays) >= {f"{name}.weight" for name in EXPERTS}
        assert names_of(model, rest) >= {f"{name}.bias" for name in EXPERTS}
        assert len(decays) + len(rest) == len(list(model.parameters()))

    def test_timm(self):
        model = replaced()
        rest, decays = param_groups_weight_decay(model, 0.1)
        assert (rest["weight_decay"], decays["weight_decay"]) == (0.0, 0.1)
        self.check(model, decays["params"], rest["params"])

    def test_transformers(self):
        model = replaced()
        trainer = transformers.Trainer.__new__(transformers.Trainer)
        decays = set(trainer.get_decay_parameter_names(model))
        named = dict(model.named_parameters())
        self.check(model, [named[n] for n in decays], [p for n, p in named.items() if n not in decays])

    def test_ours_also_where_a_rule_by_ndim_is_wrong(self):
        model = replaced()
        model.head.weight.requires_grad_(False)
        decays, rest = ewa.weight_decay_groups(model, 0.1)
        model.head.weight.requires_grad_(True)
        self.check(model, [*decays["params"], model.head.weight], rest["params"])
        assert (decays["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
        by_ndim = [p for p in model.parameters() if p.ndim < 2]
        assert names_of(model, rest["params"]) - names_of(model, by_ndim) == {f"{name}.bias" for name in EXPERTS}

    def test_biases_of_others_experts(self):
        """Stacked, they have two dimensions too."""
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        experts = {"intermediate_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **experts, vocab_size=20))
        decays, rest = ewa.weight_decay_groups(model, 0.1)
        assert not {name for name in names_of(model, decays["params"]) if name.endswith("bias")}
        biases = {f"model.layers.0.mlp.experts.{name}_proj_bias" for name in ("gate_up", "down")}
        assert biases <= names_of(model, rest["params"])

    def test_names_of_the_model(self):
        """Of a part, too."""

        class Spares(Transformer):
            def no_weight_decay(self):
                return {"embed.weight", "gone"}

        part = Spares(Mlp(), Mlp())
        ewa.replace_ffn_(part)
        model = nn.ModuleList([part, nn.Linear(2, 2)])
        decays, rest = ewa.weight_decay_groups(model, 0.1)
        assert "0.embed.weight" in names_of(model, rest["params"])
        assert {"0.head.weight", "1.weight"} <= names_of(model, decays["params"])
        vit = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=1, num_heads=2, img_size=32, patch_size=8)
        assert {"pos_embed", "cls_token"} <= names_of(vit, ewa.weight_decay_groups(vit, 0.1)[1]["params"])

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((3, 0.1), TypeError, "model must be an nn.Module, got int"),
            ((nn.Linear(1, 1), "0"), TypeError, "weight_decay must be a number"),
            ((nn.Linear(1, 1), -1.0), ValueError, "weight_decay must be finite and at least 0, got -1.0"),
            ((nn.Linear(1, 1), float("nan")), ValueError, "weight_decay must be finite and at least 0, got nan"),
        ],
    )
    def test_bad_input(self, arguments, error, message):
        with pytest.raises(error, match=message):
            ewa.weight_decay_groups(*arguments)


def test_timm_reparameterizes():
    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2, img_size=32, patch_size=8, num_classes=5
    )
    original = copy.deepcopy(model)
    ewa.replace_ffn_(model, init="independent")
    x = torch.randn(2, 3, 32, 32)
    expected = model.eval()(x)
    fused = reparameterize_model(model)
    assert repr(fused) == repr(original)
    assert torch.equal(fused(x), expected)
    assert isinstance(model.blocks[1].mlp, ewa.RandomPartitionMoE)  # it made a copy


def test_token_mixing_of_patchtsmixer():
    config = transformers.PatchTSMixerConfig(
        d_model=16, num_layers=1, context_length=32, patch_length=8, num_input_channels=3, mode="mix_channel"
    )
    reasons = {site.name: site.skip_reason for site in ewa.find_ffns(transformers.PatchTSMixerModel(config))}
    mixer = "encoder.mlp_mixer_encoder.mixers.0"
    mixes = "mixes tokens: its features are the places of a sequence"
    assert reasons == {
        f"{mixer}.patch_mixer.mlp": mixes,
        f"{mixer}.feature_mixer.mlp": None,
        f"{mixer}.channel_feature_mixer.mlp": mixes,
    }


def test_integrations_need_no_import():
    code = """
import sys, ewa_kernels as ewa
assert "torch.distributed.tensor" not in sys.modules
layer = ewa.RandomPartitionMoE(8, 12, 4)
assert ewa.integrations.fsdp.expert_shard_placement(layer.up.weight, num_shards=2).dim == 1
assert not hasattr(ewa.integrations, "nothing")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


LIBRARIES = ("timm", "transformers", "lightning", "pytorch_lightning", "accelerate", "torchvision")


def test_without_the_libraries():
    """All but the integrations works, and each integration says what to install."""
    code = f"""
import sys
sys.modules |= dict.fromkeys({LIBRARIES})  # None: import fails
import torch, ewa_kernels as ewa
from models import Mlp, Transformer, tokens
model = Transformer(Mlp(), Mlp())
ewa.replace_ffn_(model)
model(tokens(2, 3, 4)).sum().backward()
ewa.fold_(model)
for name in ("transformers", "lightning"):
    assert not hasattr(ewa.integrations, name)
    try:
        __import__(f"ewa_kernels.integrations.{{name}}")
    except ImportError as error:
        print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": TESTS},
    )
    first, second = result.stdout.splitlines()
    assert "pip install transformers" in first
    assert "pip install lightning" in second


@pytest.mark.slow
def test_transformers_4(tmp_path):
    """The models of the last release before 5.0: ViT's kin have their residual and LayerNorm inside `output`."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", tmp_path, "transformers==4.57.*"]
    subprocess.run(command, check=True)
    code = """
import sys, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
import vision, pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/test_models.py", "-k", "test_model and transformers"]))
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{TESTS}"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=TESTS.parent, check=False
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
