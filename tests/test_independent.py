"""`init="independent"`: experts that are drawn as the FFN was."""

import copy

import pytest
import torch
import transformers
from models import Block, Mlp, Transformer
from torch import nn

import ewa_kernels as ewa


def test_independent_experts():
    torch.manual_seed(0)
    model = Transformer(Mlp(), Mlp(d_ff=32))
    dense = copy.deepcopy(model.blocks[1].mlp)
    ewa.replace_ffn_(model, 3, init="independent")
    up = model.blocks[1].mlp.up
    assert torch.equal(up.weight[0], dense.fc1.weight)
    assert torch.equal(up.bias[0], dense.fc1.bias)
    assert len({expert.sum().item() for expert in up.weight}) == 3
    assert 0.8 < up.weight[1:].abs().max() * 8**0.5 <= 1


def test_independent_experts_by_the_modules_own_initialiser():
    class Sevens(Mlp):
        def reset_parameters(self):
            for parameter in self.parameters():
                nn.init.constant_(parameter, 7)

    model = Transformer(Sevens())
    ewa.replace_ffn_(model, 2, init="independent", filter_fn=lambda *_: True)
    stacked = model.blocks[0].mlp.down.weight
    assert (stacked[1] == 7).all()
    assert not (stacked[0] == 7).any()


@pytest.mark.parametrize("around", [False, True])
def test_independent_experts_by_the_models_initialiser(around):
    """Which is the `_init_weights` around the FFN, or one that nothing names."""

    def init(module):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    class Initialises(Transformer):
        def _init_weights(self, m):
            init(m)

    class Other(Block):
        def _init_weights(self):
            raise AssertionError("of another kind")

    model = (Initialises if around else Transformer)(Mlp(48, 192), d_model=48)
    model.blocks[0].__class__ = Other
    model.apply(init)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias.fill_(0 if around else 0.25)
    ewa.replace_ffn_(model, 3, init="independent", filter_fn=lambda *_: True)
    layer = model.blocks[0].mlp
    for weight in (layer.up.weight, layer.down.weight):
        assert ((weight.flatten(1).std(1) - 0.02).abs() < 0.002).all()
        assert not torch.equal(weight[1], weight[2])
    assert not layer.down.bias.any()
    assert (layer.up.bias == (0 if around else 0.25)).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViTModel", {"image_size": 8, "patch_size": 4, "num_channels": 1}),
        ("BertModel", {"vocab_size": 20}),
    ],
)
def test_transformers_draw_independent_experts(name, options):
    """FFNs in a module of their own, and in parts of a block."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, name.replace("Model", "Config"))(**sizes, **options)
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # as after from_pretrained
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.bias += 1  # as after training
    ewa.replace_ffn_(model, 3, init="independent")
    for tensor_name, parameter in ewa.expert_tensors(model):
        if tensor_name.endswith("bias"):
            assert not parameter[1:].any()
        else:
            assert ((parameter.flatten(1).std(1) - 0.02).abs() < 0.002).all()
