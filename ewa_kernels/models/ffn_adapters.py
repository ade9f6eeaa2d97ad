"""Where the projections of an FFN are, by class or by name. What is computed with them, the execution test finds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn


class NotReplaceableError(Exception):
    """Its text is the reason."""


class Projections(NamedTuple):
    """Names of the projections inside a module; two up projections are those of a GLU, in either order.

    `kind` is what reports call it.
    """

    kind: str
    up: tuple[str, ...]
    down: str


# Names of projections that libraries use, up and down.
_NAMES = (
    (("fc1",), "fc2"),  # timm, Point-MAE, transformers' ViT, CLIP, …
    (("fc1_g", "fc1_x"), "fc2"),  # timm's SwiGLU
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, DINOv2 and DINOv3 with SwiGLU
    (("up_proj",), "down_proj"),  # DINOv3
    (("gate_up_proj",), "down_proj"),  # Phi-3
    (("weights_in",), "weights_out"),  # DINOv2 with SwiGLU, before transformers 5
    (("w12",), "w3"),  # DINOv2's own code
    (("w1", "w3"), "w2"),  # Llama's own code
    (("lin1",), "lin2"),  # DistilBERT, SAM
    (("linear1",), "linear2"),
    (("dense1",), "dense2"),  # SegFormer, before transformers 5; with a convolution between
    (("wi_0", "wi_1"), "wo"),  # T5 with a GLU
    (("wi",), "wo"),  # T5
    (("c_fc",), "c_proj"),
)
# Of blocks: BERT and its kin, ViT and its kin before transformers 5.
_NAMES_IN_BLOCKS = ((("intermediate.dense",), "output.dense"),)

_registered: list[tuple[type[nn.Module], Projections]] = []


def register_ffn_adapter(
    module_class: type[nn.Module],
    *,
    up: str | Sequence[str],
    down: str,
    kind: str | None = None,
) -> None:
    """Teaches `find_ffns` a class: where the projections of its FFN are.

        ewa.register_ffn_adapter(MyFFN, up="w_in", down="w_out")
        ewa.register_ffn_adapter(MySwiGLU, up=("w_gate", "w_value"), down="w_out")
        ewa.register_ffn_adapter(MyBlock, up="mlp.0", down="mlp.3")

    Activation, order of gate and value, and places of the dropouts are found out by running each module. One that is
    not an FFN alone, or has another activation, is replaced as a pair of projections: see `replace_ffn_`. A later
    registration goes before an earlier one.

    Args:
        module_class: the class, subclasses included.
        up: name of the `nn.Linear` that maps D to F (or to 2F, gate and value of a GLU), or the names of both
            of a GLU. Dotted names reach into children.
        down: name of the `nn.Linear` that maps F to D.
        kind: what reports call it; the class's name if None.

    Raises:
        TypeError: `module_class` is no nn.Module class, or a name or `kind` no str.
        ValueError: `up` does not have one or two names.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"module_class must be a subclass of nn.Module, got {module_class!r}")
    names = tuple(up) if isinstance(up, (list, tuple)) else (up,)
    if len(names) not in (1, 2):
        raise ValueError(f"up must be one name, or two for a GLU, got {list(names)}")
    for name in (*names, down):
        if not isinstance(name, str):
            raise TypeError(f"up and down must be names of nn.Linear modules, got {type(name).__name__} {name!r}")
    if kind is not None and not isinstance(kind, str):
        raise TypeError(f"kind must be a str or None, got {type(kind).__name__} {kind!r}")
    _registered.insert(0, (module_class, Projections(kind or module_class.__name__, names, down)))


def projections_of(module: nn.Module) -> Projections | None:
    """Where an adapter or a rule says that they are, None if none knows the module."""
    for module_class, projections in _registered:
        if isinstance(module, module_class):
            return projections
    for up, down in _NAMES:
        if all(isinstance(module._modules.get(name), nn.Module) for name in (*up, down)):
            return Projections("_".join((*up, down)), up, down)
    for up, down in _NAMES_IN_BLOCKS:
        if all(isinstance(at(module, name), nn.Linear) for name in (*up, down)):
            return Projections("_".join((*up, down)), up, down)
    if isinstance(module, nn.Sequential) and isinstance([None, *module][-1], nn.Sigmoid | nn.Hardsigmoid):
        return None  # a gate, as that of squeeze and excitation, which sees pooled rows
    return _sequential(module) or _pair(module)


def at(module: nn.Module, name: str) -> nn.Module | None:
    """The module of this name inside, None if there is none."""
    for part in name.split("."):
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module


def linears_in(module: nn.Module) -> list[str]:
    """Names of all nn.Linear inside, in module order."""
    return [name for name, inner in module.named_modules() if isinstance(inner, nn.Linear)]


def _sequential(module: nn.Module) -> Projections | None:
    """torchvision style: Sequential(Linear, activation, [Dropout], Linear, [Dropout])."""
    if not isinstance(module, nn.Sequential):
        return None
    names, children = list(module._modules), list(module)
    linear = [name for name, child in zip(names, children, strict=True) if isinstance(child, nn.Linear)]
    # Something must stand between the two, or they are no FFN.
    if len(linear) != 2 or names[0] != linear[0] or names.index(linear[1]) < 2 or linears_in(module) != linear:
        return None
    return Projections("sequential", (linear[0],), linear[1])


def _pair(module: nn.Module) -> Projections | None:
    """Two nn.Linear whose sizes fit: the only ones that a module holds itself, or the only ones inside of it.

    Of modules inside one another it is the innermost. Three are a GLU's.
    """
    children = [name for name, child in module._modules.items() if isinstance(child, nn.Linear)]
    for names in (children, linears_in(module)):
        is_innermost = len({name.partition(".")[0] for name in names}) > 1
        if len(names) in (2, 3) and is_innermost and _fit(*(module.get_submodule(name) for name in names)):
            return Projections("pair", tuple(names[:-1]), names[-1])
    return None


def _fit(*linears: Any) -> bool:
    """D → F, or 2F in all, and F → D, where F is not D: those of an attention fit too."""
    *ups, down = linears
    d_model, d_ff, rows = down.out_features, down.in_features, sum(up.out_features for up in ups)
    is_like = {(up.in_features, up.out_features) for up in ups} == {(d_model, ups[0].out_features)}
    return is_like and d_ff != d_model and rows in ((d_ff, 2 * d_ff) if len(ups) == 1 else (2 * d_ff,))


# --- where an FFN stands, which running it alone cannot show ---

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


def check_place(model: nn.Module, name: str) -> None:
    """Raises NotReplaceableError with the reason, of what is known to be no FFN of tokens."""
    holder_name, _, attribute = name.rpartition(".")
    holder = type(model.get_submodule(holder_name)).__name__
    for holder_pattern, attribute_pattern, reason in _NOT_OF_TOKENS:
        if re.fullmatch(holder_pattern, holder) and re.fullmatch(attribute_pattern, attribute):
            raise NotReplaceableError(reason)


def holder_of(model: nn.Module, name: str) -> str:
    """Name of the module, or of the next one around it, that can be called: a ModuleList cannot."""
    while name and type(model.get_submodule(name)).forward is nn.Module.forward:
        name = name.rpartition(".")[0]
    return name
