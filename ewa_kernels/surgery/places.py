"""FFNs that are no FFN of tokens because of where they stand, which running them alone cannot show."""

from __future__ import annotations

import re

from torch import nn

from ewa_kernels.surgery.probe import NotReplaceableError

_CLASS_TOKEN = "sees class tokens alone: one row for each input"
_POOLED = "sees one pooled row for each input"
_POSITIONS = "computes position biases, not tokens"
_MIXES = "mixes tokens: its features are the places of a sequence"

# (class of the module that holds it, its name there, reason): regular expressions for the whole of each.
_NOT_OF_TOKENS = (
    # timm
    ("LayerScaleBlockClassAttn|ClassAttentionBlock|ClassBlock", ".*", _CLASS_TOKEN),  # CaiT, XCiT, VOLO
    ("AttentionPoolLatent|AttentionPool2d|RotAttentionPool2d", ".*", _POOLED),
    ("RelPosMlp", ".*", _POSITIONS),
    (".*", "cpb_mlp|meta_mlp", _POSITIONS),  # Swin v2; torchvision's too
    (".*", "mlp_tokens|token_mix(er|ing)(_mlp)?", _MIXES),  # MLP-Mixer
    # transformers
    ("PatchMixerBlock|PatchTSMixerChannelFeatureMixerBlock", "mlp", _MIXES),  # PatchTSMixer
    (".*(AttentionPoolingHead|MultiheadAttentionPoolingHead)", ".*", _POOLED),  # SigLIP, AIMv2
    (".*", "continuous_position_bias_mlp", _POSITIONS),  # Swin v2
)


def check(model: nn.Module, name: str) -> None:
    """Raises NotReplaceableError with the reason."""
    holder_name, _, attribute = name.rpartition(".")
    holder = type(model.get_submodule(holder_name)).__name__
    for holder_pattern, attribute_pattern, reason in _NOT_OF_TOKENS:
        if re.fullmatch(holder_pattern, holder) and re.fullmatch(attribute_pattern, attribute):
            raise NotReplaceableError(reason)
