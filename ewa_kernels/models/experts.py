"""`find_experts`: every layer of a model that has experts, and where their tensors are. Nothing is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from .. import checks
from ..modules import FFN, ExpertLinear, StackedExperts, expert_tensors
from . import experts_adapters as adapters
from .experts_adapters import ExpertsAdapter, NotExpertsError, Paths

_FLAGS = {"has_gate", "has_bias", "is_transposed", "is_concatenated"}  # set by transformers' use_experts_implementation


@dataclass(frozen=True)
class ExpertsSite:
    """The experts of one layer.

    Attributes:
        name: where `model.named_modules()` meets the module first.
        module: what holds the experts: a layer of this package, a module with stacked tensors, a list of modules.
        kind: the class, of what is registered and of this package's layers; "stacked" in transformers 5; "list".
        skip_reason: why these are not taken for experts, None if they are.
        paths: name of a tensor → its path in the model, or, of separate experts, the paths of E tensors.
        tensors: name of a tensor → the stacked Parameter `[E, ...]`, or E Parameters; as of the call.
        holder: of separate experts: name of the block around them.
        adapter: what is known of the class of `module`, or of the block.
    """

    name: str
    module: nn.Module = field(repr=False)
    kind: str
    skip_reason: str | None = None
    paths: Paths = field(default_factory=dict, repr=False)
    tensors: dict[str, Tensor | list[Tensor]] = field(default_factory=dict, repr=False)
    holder: str = ""
    adapter: ExpertsAdapter | None = None


def find_experts(model: nn.Module) -> list[ExpertsSite]:
    """All experts of a model in module order, and what looks like experts but no rule knows, with the reason.

        for site in ewa.find_experts(model):
            print(site.name, site.kind, site.skip_reason, list(site.tensors))

    Nothing is run. Known are the layers of this package; classes given to `register_experts_adapter`; the MoE blocks of
    transformers 4; modules with the flags and names of transformers 5; and an nn.ModuleList (or nn.ModuleDict) named
    `experts` whose members are of one class and one shape.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    checks.module("model", model)
    held = held_by(model)
    sites: list[ExpertsSite] = []
    inside: set[nn.Module] = set()  # of experts, where no others are
    for name, module in model.named_modules():
        site = None if module in inside else _site(model, name, module, held)
        if site is not None and site.module not in inside:
            sites.append(site)
            if site.skip_reason is None or site.adapter is not None:
                inside.update(site.module.modules())
    return sites


def members_of_lists(model: nn.Module) -> dict[nn.Module, str]:
    """Module → "is one of the experts of …", for all that is in lists which are experts, or have their name."""
    return {
        module: f"is one of the experts of {site.name}"
        for site in find_experts(model)
        if is_list(site.module) or (site.adapter and not site.adapter.stacked and not site.skip_reason)
        for member in site.module.children()
        for module in member.modules()
    }


def held_by(model: nn.Module) -> Counter[int]:
    """id of a parameter or module → how many places in a model hold it."""
    modules = list(model.modules())
    return Counter(id(held) for m in modules for held in (*m._parameters.values(), *m._modules.values()))


def is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def resolved(model: nn.Module, paths: Paths) -> Iterator[tuple[str, Tensor | list[Tensor]]]:
    """(name, stacked tensor or list of E tensors), as the model has them now.

    Raises:
        KeyError: the model has no such parameter.
    """
    for name, where in paths.items():
        tensors = [_parameter(model, path) for path in where]
        yield name, tensors[0] if len(tensors) == 1 else tensors


def _parameter(model: nn.Module, path: str) -> Tensor:
    module: nn.Module | None = model
    *parents, leaf = path.split(".")
    for name in parents:
        module = None if module is None else module._modules.get(name)
    if module is None or (parameter := module._parameters.get(leaf)) is None:
        raise KeyError(path)
    return parameter


def _site(model: nn.Module, name: str, module: nn.Module, held: Counter[int]) -> ExpertsSite | None:
    """None if the module does not look like experts."""
    kind, holder, adapter = type(module).__name__, "", adapters.adapter_of(module)
    try:
        if adapter is not None and not adapter.stacked:
            kind, holder, module = adapter.kind, name, adapters.child(module, adapter.experts)
            name = ".".join(filter(None, (name, adapter.experts)))
            if isinstance(module, (StackedExperts, FFN)):  # which stand where experts were
                return None
            inner = adapters.separate_paths(module, held)
        elif adapter is not None:
            kind, inner = adapter.kind, adapters.stacked_paths(module, adapter.stacked)
        elif isinstance(module, (StackedExperts, ExpertLinear)):
            inner = {path: (path,) for path, _ in expert_tensors(module)}
        elif is_list(module) and name.rpartition(".")[2] == "experts" and module._modules:
            kind, holder = "list", _around(model, name)
            inner = adapters.separate_paths(module, held)
        elif vars(module).keys() >= _FLAGS:
            kind, inner = "stacked", _paths_of_transformers(module)
        elif (pair := adapters.unregistered_pair(module)) is not None:
            line = f"ewa.register_experts_adapter({kind}, up={pair[0]!r}, down={pair[1]!r})"
            raise NotExpertsError(f"has stacked tensors that may be experts: {line} says that they are")
        else:
            return None
    except NotExpertsError as error:
        return ExpertsSite(name, module, kind, str(error), holder=holder, adapter=adapter)
    dot = f"{name}." if name else ""
    paths = {dot + tensor: tuple(dot + path for path in where) for tensor, where in inner.items()}
    return ExpertsSite(name, module, kind, None, paths, dict(resolved(model, paths)), holder, adapter)


def _around(model: nn.Module, name: str) -> str:
    """Name of the nearest module around that has a forward; "" of the model."""
    while name:
        name = name.rpartition(".")[0]
        if type(model.get_submodule(name)).forward is not nn.Module.forward:
            break
    return name


def _paths_of_transformers(module: nn.Module) -> Paths:
    if getattr(module, "_is_expert_parallel", False):
        raise NotExpertsError("has a part of the experts only: the others are in other processes")
    up = "gate_up_proj" if module.has_gate else "up_proj"
    biases = [name for name in (f"{up}_bias", "down_proj_bias") if module._parameters.get(name) is not None]
    return adapters.stacked_paths(module, (up, "down_proj", *biases))
