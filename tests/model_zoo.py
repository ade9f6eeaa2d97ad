"""Small models of five sources, made from configurations: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
import torch
import transformers
from ffn_zoo import ZOO
from models import PointMlp, Transformer
from torch import Tensor, nn
from vision import torchvision


@dataclass(frozen=True)
class Case:
    """A model, and what it is called with."""

    source: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]


def images(size: int, name: str = "x") -> dict[str, Tensor]:
    return {name: torch.randn(6, 3, size, size)}


def words(**more: Callable[[], Tensor]) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 90, (6, 7)), **{name: make() for name, make in more.items()}}


def _timm(label: str, name: str, size: int = 32, **options: object) -> Case:
    make = partial(timm.create_model, name, num_classes=5, **options)
    return Case("timm", f"{label} (`{name}`)", make, partial(images, size))


_VIT = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 32, "patch_size": 8}
_SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "img_size": 32, "window_size": 4, "patch_size": 2}
_FOUR = (1, 1, 2, 1)

TIMM = (
    _timm("ViT", "vit_tiny_patch16_224", **_VIT),
    _timm("DeiT", "deit_tiny_distilled_patch16_224", **_VIT),
    _timm("BEiT", "beit_base_patch16_224", **_VIT),
    _timm("EVA-02", "eva02_tiny_patch14_224", **_VIT),
    _timm("DINOv2, packed SwiGLU", "vit_giant_patch14_dinov2", **_VIT),
    _timm("SigLIP", "vit_base_patch16_siglip_224", **_VIT),
    _timm("SAM", "samvit_base_patch16_224", **_VIT),
    _timm("Swin", "swin_tiny_patch4_window7_224", **_SWIN),
    _timm("Swin v2", "swinv2_tiny_window8_256", **_SWIN),
    _timm("CaiT", "cait_xxs24_224", **_VIT),
    _timm("Twins", "twins_svt_small", 64, embed_dims=(16, 32, 64, 64), depths=_FOUR, num_heads=(1, 2, 4, 4)),
    _timm("Hiera", "hiera_tiny_224", 64, embed_dim=16, stages=_FOUR, img_size=64),
    _timm("XCiT", "xcit_nano_12_p16_224", embed_dim=32, depth=2, num_heads=2, img_size=32),
    _timm("ConvNeXt, NHWC", "convnext_tiny", depths=_FOUR, dims=(8, 16, 32, 32)),
    _timm("ConvNeXt v2", "convnextv2_tiny", depths=_FOUR, dims=(8, 16, 32, 32)),
    _timm("PVT v2", "pvt_v2_b0", 64, embed_dims=(8, 16, 40, 32), depths=_FOUR),
    _timm("MLP-Mixer", "mixer_s32_224", 64, img_size=64),
    _timm("gMLP", "gmlp_ti16_224", 32, img_size=32),
)


def _hf(model: str, config: str, inputs: Callable[[], dict[str, Tensor]], label: str = "", **options: object) -> Case:
    def make() -> nn.Module:
        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return Case("transformers", label or model, make, inputs)


_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
_IMAGE = {**_SIZES, "image_size": 32, "patch_size": 8}
_VOCABULARY = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT = {**_SIZES, **_VOCABULARY}
_DECODER = {"decoder_hidden_size": 32, "decoder_intermediate_size": 64, "decoder_num_hidden_layers": 2}
_pixels = partial(images, 32, "pixel_values")


def _two_towers(name: str) -> Case:
    def make() -> nn.Module:
        text = {**_TEXT, "max_position_embeddings": 16}
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=_IMAGE)
        return getattr(transformers, f"{name}Model")(config)

    return Case("transformers", f"{name}Model", make, lambda: {**words(), **_pixels()})


TRANSFORMERS = (
    _hf("ViTForImageClassification", "ViTConfig", _pixels, **_IMAGE),
    _hf("DeiTForImageClassification", "DeiTConfig", _pixels, **_IMAGE),
    _hf("BeitForImageClassification", "BeitConfig", _pixels, **_IMAGE),
    _hf(
        "SwinForImageClassification", "SwinConfig", _pixels,
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
    ),
    _hf("Dinov2ForImageClassification", "Dinov2Config", _pixels, **_IMAGE),
    _hf("Dinov2ForImageClassification", "Dinov2Config", _pixels, "Dinov2, SwiGLU", use_swiglu_ffn=True, **_IMAGE),
    _hf("DINOv3ViTModel", "DINOv3ViTConfig", _pixels, **_IMAGE),
    _hf("DINOv3ViTModel", "DINOv3ViTConfig", _pixels, "DINOv3ViTModel, gated", use_gated_mlp=True, **_IMAGE),
    _two_towers("CLIP"),
    _two_towers("Siglip"),
    _hf("ViTMAEForPreTraining", "ViTMAEConfig", _pixels, decoder_num_attention_heads=2, **_DECODER, **_IMAGE),
    _hf("BertModel", "BertConfig", words, **_TEXT),
    _hf("RobertaModel", "RobertaConfig", words, **_TEXT),
    _hf("LlamaForCausalLM", "LlamaConfig", words, num_key_value_heads=2, **_TEXT),
    _hf("Phi3ForCausalLM", "Phi3Config", words, num_key_value_heads=2, **_TEXT),
    _hf(
        "T5Model", "T5Config", lambda: words(decoder_input_ids=lambda: torch.randint(1, 90, (6, 5))),
        vocab_size=99, d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16,
    ),
    _hf(
        "SegformerModel", "SegformerConfig", partial(images, 64, "pixel_values"),
        hidden_sizes=[8, 16, 40, 32], depths=list(_FOUR),
    ),
    _hf("GPT2LMHeadModel", "GPT2Config", words, n_embd=32, n_layer=2, n_head=2, **_VOCABULARY),
)  # fmt: skip


def _torchvision_swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        patch_size=[2, 2], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5
    )


def _torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    )


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, activation="gelu", batch_first=True), 4)


def _after_norm() -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8), nn.Dropout(0.1)
    )


def _sequence(name: str) -> dict[str, Tensor]:
    return {name: torch.randn(6, 7, 32)}


# Of tests/ffn_zoo.py, which has others that stand above.
RESEARCH = ("diffusers", "DETR", "fairseq", "ConvNeXt", "minGPT", "OpenFold", "x-transformers", "Mish")

CASES = (
    *TIMM,
    *TRANSFORMERS,
    Case("torchvision", "VisionTransformer", _torchvision_vit, partial(images, 32)),
    Case("torchvision", "SwinTransformer", _torchvision_swin, partial(images, 32)),
    Case("torch", "nn.TransformerEncoder", _encoder, partial(_sequence, "src")),
    Case(
        "torch",
        "nn.Transformer",
        lambda: nn.Transformer(32, 2, 2, 2, 64, batch_first=True),
        lambda: {**_sequence("src"), **_sequence("tgt")},
    ),
    Case(
        "research code",
        "Point-MAE's FFN",
        lambda: Transformer(*(PointMlp() for _ in range(4))),
        lambda: {"x": torch.randn(6, 7, 4)},
    ),
    Case(
        "research code",
        "LayerNorm and FFN in one nn.Sequential",
        lambda: Transformer(*(_after_norm() for _ in range(4))),
        lambda: {"x": torch.randn(6, 7, 4)},
    ),
    *(
        Case(
            "research code",
            label,
            lambda make=make: nn.Sequential(*(make() for _ in range(4))),
            lambda: {"input": torch.randn(6, 7, 16)},
        )
        for label, (make, _) in ZOO.items()
        if label in RESEARCH
    ),
)
