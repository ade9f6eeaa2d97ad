"""`find_experts`: every layer of a model that has experts, and where their tensors are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

import ewa_kernels.checks as checks
from ewa_kernels.modules import StackedExperts, expert_tensors
from ewa_kernels.moe import adapters
from ewa_kernels.moe.adapters import NotExpertsError, Paths
from ewa_kernels.moe.lists import Lists, says_experts
from ewa_kernels.surgery.layout import FFNLayout
from ewa_kernels.surgery.sites import claims


@dataclass(frozen=True)
class ExpertsSite:
    """The experts of one layer.

    Attributes:
        name: where `model.named_modules()` meets the module first.
        module: what holds the experts: a layer of this package, a module with stacked tensors, a ModuleList.
        kind: the class, of what is registered and of this package's layers; "stacked" in transformers 5; "list".
        skip_reason: why these are not taken for experts, None if they are.
        paths: name of a tensor → its path in the model, or, of separate experts, the paths of E tensors.
        tensors: name of a tensor → the stacked Parameter `[E, ...]`, or E Parameters; as of the call.
        layout: of a list: what each of its members computes.
        holder: of a list: name of the module around it that was run.
        router: of a list: names of the tensors by which the holder chooses or weighs experts.
    """

    name: str
    module: nn.Module = field(repr=False)
    kind: str
    skip_reason: str | None = None
    paths: Paths = field(default_factory=dict, repr=False)
    tensors: dict[str, Tensor | list[Tensor]] = field(default_factory=dict, repr=False)
    layout: FFNLayout | None = None
    holder: str = ""
    router: tuple[str, ...] = ()


def find_experts(model: nn.Module) -> list[ExpertsSite]:
    """All experts of a model in module order, and what looks like experts but is not shown to be, with the reason.

        for site in ewa.find_experts(model):
            print(site.name, site.kind, site.skip_reason, list(site.tensors), site.router)

    Known are classes given to `register_experts_adapter`, the layers of this package, modules with the flags and names
    of transformers 5, and lists (nn.ModuleList, nn.ModuleDict) of FFNs that are alike. Those are experts if a copy of
    the module around them, run with random parameters and a small random input, shows that none sees another's output,
    that a router chooses among them, or, where none is found, that the list has "expert" in its name and treats
    tokens alike wherever they stand, and that they do not count alike for all tokens. The model is not touched,
    nor what it holds; what its code writes into globals or attributes of its classes stays there.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    checks.module("model", model)
    lists = Lists(model)
    sites: list[ExpertsSite] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        site = _site(model, name, module, lists)
        if site is not None:
            sites.append(site)
            if site.skip_reason is None or adapters.adapter_of(module) is not None:
                inside += (f"{name}." if name else "",)  # nothing inside experts is a layer of experts
    return sites


def members_of_lists(model: nn.Module) -> dict[nn.Module, str]:
    """Module → "is one of the experts of …", for the modules in all lists that are experts, or have their name."""
    reasons = {}
    for site in find_experts(model):
        if site.kind == "list" and (site.skip_reason is None or says_experts(site.name)):
            modules = (inner for member in site.module.children() for inner in member.modules())
            reasons.update(dict.fromkeys(modules, f"is one of the experts of {site.name}"))
    return reasons


def resolve(model: nn.Module, path: str) -> Tensor:
    """The parameter at a path.

    Raises:
        KeyError: there is none.
    """
    *parents, leaf = path.split(".")
    module: nn.Module | None = model
    for name in parents:
        module = None if module is None else module._modules.get(name)
    parameter = None if module is None else module._parameters.get(leaf)
    if parameter is None:
        raise KeyError(path)
    return parameter


def _site(model: nn.Module, name: str, module: nn.Module, lists: Lists) -> ExpertsSite | None:
    """None if the module does not look like experts."""
    kind, inner = type(module).__name__, None
    dot = f"{name}." if name else ""
    try:
        adapter = adapters.adapter_of(module)
        if adapter is not None:
            kind, inner = adapter.kind, adapter.find(module)
        elif isinstance(module, StackedExperts):
            inner = {path: (path,) for path, _ in expert_tensors(module)}
        elif isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            kind = "list"
            found = lists.examine(name, module)
            if found is None:
                return None
            tensors = _tensors(model, found.paths)
            return ExpertsSite(name, module, kind, None, found.paths, tensors, found.layout, found.holder, found.router)
        elif (inner := adapters.stacked_paths(module)) is not None:
            kind = "stacked"
        elif (pair := adapters.unregistered_pair(module)) is not None:
            raise NotExpertsError(
                f"has stacked tensors that may be experts: register_experts_adapter({kind}, up={pair[0]!r}, "
                f"down={pair[1]!r}) says that they are"
            )
        else:
            return None
    except NotExpertsError as error:
        return ExpertsSite(name, module, kind, str(error))
    paths = {dot + tensor: tuple(dot + path for path in where) for tensor, where in inner.items()}
    return ExpertsSite(name, module, kind, None, paths, _tensors(model, paths))


def _tensors(model: nn.Module, paths: Paths) -> dict[str, Tensor | list[Tensor]]:
    return dict(resolved(model, paths))


def resolved(model: nn.Module, paths: Paths) -> Iterator[tuple[str, Tensor | list[Tensor]]]:
    """(name, stacked tensor or list of E tensors), as the model has them now.

    Raises:
        KeyError: the model has no such parameter.
    """
    for name, where in paths.items():
        yield name, resolve(model, where[0]) if len(where) == 1 else [resolve(model, path) for path in where]


claims.append(members_of_lists)
