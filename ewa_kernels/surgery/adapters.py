"""Where the projections of an FFN are, by class. What it computes with them is found out by running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from ewa_kernels.modules import RandomPartitionMoE


@dataclass(frozen=True)
class Adapter:
    """Names of the projections inside the modules of one kind.

    Attributes:
        kind: what reports call it.
        projections: module → (names of the up projections, name of the down projection), or None if the module
            is not of this kind. Two up projections are those of a GLU, in either order. Names may be dotted.
    """

    kind: str
    projections: Callable[[nn.Module], tuple[tuple[str, ...], str] | None]


# Names of projections that libraries use, up and down. Two of a GLU are tried in both orders.
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


def _by_names(module: nn.Module, up: tuple[str, ...], down: str) -> tuple[tuple[str, ...], str] | None:
    children = [module._modules.get(name) for name in (*up, down)]
    # Experts among a block's parts took the FFN's place already.
    return None if any(child is None or isinstance(child, RandomPartitionMoE) for child in children) else (up, down)


def _sequential(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """torchvision style: Sequential(Linear, activation, [Dropout], Linear, [Dropout])."""
    if not isinstance(module, nn.Sequential):
        return None
    children = dict(module.named_children())
    linear = [name for name, child in children.items() if isinstance(child, nn.Linear)]
    rest = [child for child in children.values() if not isinstance(child, nn.Linear)]
    if len(linear) != 2 or any(next(child.children(), None) is not None for child in rest):
        return None
    # Something must stand between the two, or they are no FFN.
    names = list(children)
    if names[0] != linear[0] or names.index(linear[1]) < 2:
        return None
    return (linear[0],), linear[1]


_BUILT_IN = (
    *(Adapter("_".join((*up, down)), partial(_by_names, up=up, down=down)) for up, down in _NAMES),
    Adapter("sequential", _sequential),
)
_registered: list[Adapter] = []


def register_ffn_adapter(
    module_class: type[nn.Module],
    *,
    up: str | Sequence[str],
    down: str,
    kind: str | None = None,
) -> None:
    """Teaches `find_ffns` an FFN class: where its projections are.

        ewa.register_ffn_adapter(MyFFN, up="w_in", down="w_out")
        ewa.register_ffn_adapter(MySwiGLU, up=("w_gate", "w_value"), down="w_out")

    Activation, order of gate and value, and places of the dropouts are found out by running each module, and so
    is whether it is a plain token-wise FFN at all. A later registration goes before an earlier one.

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
    _registered.insert(
        0,
        Adapter(
            kind or module_class.__name__,
            lambda module: (names, down) if isinstance(module, module_class) else None,
        ),
    )


def adapter_of(module: nn.Module) -> tuple[str, tuple[str, ...], str] | None:
    """(kind, names of the up projections, name of the down projection), or None if no adapter knows it."""
    for adapter in (*_registered, *_BUILT_IN):
        projections = adapter.projections(module)
        if projections is not None:
            return adapter.kind, *projections
    return None
