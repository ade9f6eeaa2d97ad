"""Where a class has its experts, its router and its k: what users register, and the blocks of transformers 4."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .. import checks

Paths = dict[str, tuple[str, ...]]  # name → path of one stacked tensor, or paths of E separate ones


class NotExpertsError(Exception):
    """Its text is the reason."""


@dataclass(frozen=True)
class ExpertsAdapter:
    """What is known of the modules of one class.

    Attributes:
        kind: what reports call it.
        stacked: names of parameters `[E, ...]`, or of modules that hold nothing else.
        experts: name of the module whose children are the experts, if they are not stacked.
        router, top_k: see `register_experts_adapter`.
    """

    kind: str
    stacked: tuple[str, ...] = ()
    experts: str = "experts"
    router: str | None = None
    top_k: int | str | None = None


_registered: list[tuple[type[nn.Module], ExpertsAdapter]] = []

# Of transformers 4.57: (router, top_k). Phimoe and Ernie route in another way, as the execution test finds.
_SPARSE: tuple[str, ...] = (
    "Ernie4_5_Moe",
    "FlexOlmo",
    "MiniMax",
    "Mixtral",
    "Olmoe",
    "Phimoe",
    "Qwen2Moe",
    "Qwen3Moe",
    "Qwen3Next",
)
_SPARSE += ("Qwen3OmniMoeTalkerText", "Qwen3OmniMoeThinkerText")
_BUILT_IN: dict[str, tuple[str, str | None]] = {
    **dict.fromkeys((*(f"{name}SparseMoeBlock" for name in _SPARSE), "HunYuanMoEV1Moe"), ("gate", "top_k")),
    **dict.fromkeys(("DeepseekV2MoE", "DeepseekV3MoE", "Dots1MoE", "Glm4MoeMoE", "Glm4vMoeTextMoE"), ("gate", None)),
    "JambaSparseMoeBlock": ("router", "top_k"),
    "LongcatFlashMoE": ("router", None),
}


def register_experts_adapter(
    module_class: type[nn.Module],
    *,
    up: str | Sequence[str] = (),
    down: str | Sequence[str] = (),
    experts: str | None = None,
    router: str | None = None,
    top_k: int | str | None = None,
    kind: str | None = None,
    members: str | None = None,
) -> None:
    """Teaches a class that holds experts: where their tensors are, and which module routes.

        ewa.register_experts_adapter(Experts, up="w1", down="w2")           # parameters [E, ...]
        ewa.register_experts_adapter(FMoE, up="htoh4", down="h4toh")        # modules whose parameters are all [E, ...]
        ewa.register_experts_adapter(MoELayer, experts="experts", router="gate", top_k=2)   # a ModuleList of E modules

    `find_experts` believes what is named. `replace_moe_` needs the router, and runs a copy of the block. Of subclasses
    and superclasses the later registration counts. All names may be dotted.

    Args:
        module_class: the class, subclasses included.
        up, down: names of the parameters, weights and biases, or of modules that hold nothing else. Or `experts`.
        experts: name of the module whose children are the experts, of one class and with the same tensors.
        router: name of the module that gives logits `[..., E]`, as an nn.Linear does, or both choices and weights,
            each `[..., k]`.
        top_k: of a router that gives logits: to how many experts a token goes, or the attribute that has this number.
        kind: what reports call it; the class's name if None.
        members: an older name of `experts`.

    Raises:
        TypeError: `module_class` is no nn.Module class, a name no str, or `top_k` neither int nor str.
        ValueError: neither `up` and `down` nor `experts` is given, or both; `router` without `experts`, `top_k` without
            `router`, or `top_k` below 1.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"module_class must be a subclass of nn.Module, got {module_class!r}")
    ups, downs = ((names,) if isinstance(names, str) else names for names in (up, down))
    single = {"experts": experts, "router": router, "members": members}
    named = {"up": ups, "down": downs, **{what: (name,) for what, name in single.items() if name is not None}}
    for what, names in named.items():
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{what} must be a name, or several of up and down, got {names!r}")
    if members is not None and experts is not None:
        raise ValueError(f"members is an older name of experts: one must be given, got {experts=}, {members=}")
    experts = members if experts is None else experts
    if (experts is None) != bool(ups and downs) or (experts is not None and (ups or downs)):
        raise ValueError(f"up and down, or experts, must be given, got {up=}, {down=}, {experts=}")
    if (router is not None and experts is None) or (top_k is not None and router is None):
        raise ValueError(f"top_k needs router, and router experts, got {experts=}, {router=}, {top_k=}")
    if top_k is not None and not isinstance(top_k, str):
        checks.integer("top_k", top_k, minimum=1)
    adapter = ExpertsAdapter(kind or module_class.__name__, (*ups, *downs), experts or "", router, top_k)
    _registered.insert(0, (module_class, adapter))


def adapter_of(module: nn.Module) -> ExpertsAdapter | None:
    for module_class, adapter in _registered:
        if isinstance(module, module_class):
            return adapter
    names = [cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _BUILT_IN]
    if not names or not isinstance(module._modules.get("experts"), (nn.ModuleList, nn.ModuleDict)):
        return None  # transformers 5 stacks them, in classes of the same names
    router, top_k = _BUILT_IN[names[0]]
    return ExpertsAdapter(names[0], router=router, top_k=top_k)


def separate_paths(experts: nn.Module, held: Mapping[int, int]) -> Paths:
    """Of the children of a module, which are experts; `held`: id of a parameter or module → how many places hold it.

    Raises:
        NotExpertsError: there are fewer than two; they differ in class, or in names, shapes or dtypes of tensors; or
            another module holds a part of them.
    """
    members = [(name, member) for name, member in experts._modules.items() if member is not None]
    if len(members) < 2:
        raise NotExpertsError("holds fewer than two modules")
    (first_name, first), *_ = members
    for name, member in members:
        if type(member) is not type(first):
            raise NotExpertsError(f"holds a {type(first).__name__} and a {type(member).__name__}")
        if _tensors(member) != _tensors(first):
            raise NotExpertsError(f"holds modules whose tensors differ: {first_name} and {name}")
    shared = [name for name, p in parameters_in(experts) if held[id(p)] > 1]
    # Activations without parameters may be shared.
    shared += [n for n, m in experts.named_modules() if n and held[id(m)] > 1 and any(True for _ in m.parameters())]
    if shared:
        raise NotExpertsError(f"shares with another module: {', '.join(shared)}")
    paths = {f"*.{path}": tuple(f"{name}.{path}" for name, _ in members) for path, _ in parameters_in(first)}
    if not paths:
        raise NotExpertsError("holds modules without parameters")
    return paths


def stacked_paths(module: nn.Module, names: Sequence[str]) -> Paths:
    """Of parameters `[E, ...]`, or of modules that hold nothing else.

    Raises:
        NotExpertsError: there are none of these names, or they are not stacked alike.
    """
    tensors: dict[str, Tensor] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        parameter = child(module, parent)._parameters.get(leaf)
        if parameter is not None:
            tensors[name] = parameter
        else:
            tensors |= {f"{name}.{path}": p for path, p in parameters_in(child(module, name))}
    num_experts = {len(tensor) if tensor.ndim > 0 else 0 for tensor in tensors.values()}
    if len(num_experts) != 1 or min(num_experts) < 2:
        shapes = ", ".join(f"{path} {list(tensor.shape)}" for path, tensor in tensors.items())
        raise NotExpertsError(f"must have tensors [E, ...] of the same E ≥ 2, has {shapes or 'none'}")
    for path, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise NotExpertsError(f"has {tensor.dtype} {path}, which cannot be averaged")
    return {path: (path,) for path in tensors}


def unregistered_pair(module: nn.Module) -> tuple[str, str] | None:
    """Names of two stacked parameters that look like the projections of experts: of one E, with D and F or 2F."""
    stacked = [(name, p.shape) for name, p in module._parameters.items() if p is not None and p.ndim == 3]
    for (up, (num_experts, *sizes)), (down, (num_down, *others)) in itertools.combinations(stacked, 2):
        d_ffs = [(sum(sizes) - d_model, sum(others) - d_model) for d_model in {*sizes} & {*others}]
        if num_experts == num_down >= 2 and any(max(pair) in (min(pair), 2 * min(pair)) for pair in d_ffs):
            return up, down
    return None


def parameters_in(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """By the names under which modules hold them, which those of `named_parameters` are not in every wrapper."""
    for prefix, inner in module.named_modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), parameter


def child(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise NotExpertsError(f"has no {name!r}") from None


def _tensors(module: nn.Module) -> list[tuple[str, object, object]]:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in (*parameters_in(module), *module.named_buffers())]
