"""Where the tensors of experts are: in registered classes, and in modules that stack them as transformers 5 does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Paths = dict[str, tuple[str, ...]]  # name → path of one stacked tensor, or paths of E separate ones


class NotExpertsError(Exception):
    """Its text is the reason."""


@dataclass(frozen=True)
class ExpertsAdapter:
    """Of the modules of one class: `find` gives the paths inside a module, or raises NotExpertsError."""

    module_class: type[nn.Module]
    kind: str
    find: Callable[[nn.Module], Paths]


_registered: list[ExpertsAdapter] = []


def register_experts_adapter(
    module_class: type[nn.Module],
    *,
    up: str | Sequence[str] = (),
    down: str | Sequence[str] = (),
    members: str | None = None,
    kind: str | None = None,
) -> None:
    """Teaches `find_experts` a class that holds experts: where their tensors are.

        ewa.register_experts_adapter(Experts, up="w1", down="w2")           # parameters [E, ...]
        ewa.register_experts_adapter(FMoE, up="htoh4", down="h4toh")        # modules whose parameters are all [E, ...]
        ewa.register_experts_adapter(MoELayer, members="experts")           # a ModuleList of E modules

    What is named is believed: nothing is run. Of subclasses and superclasses the later registration counts.

    Args:
        module_class: the class, subclasses included.
        up, down: names of the parameters, weights and biases, or of modules that hold nothing else. Both, or `members`.
            Dotted names reach into children.
        members: name of the module whose children are the experts, of one class and with the same tensors.
        kind: what reports call it; the class's name if None.

    Raises:
        TypeError: `module_class` is no nn.Module class, or a name no str.
        ValueError: neither `up` and `down` nor `members` is given, or both.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"module_class must be a subclass of nn.Module, got {module_class!r}")
    ups, downs = ((names,) if isinstance(names, str) else names for names in (up, down))
    for what, names in (("up", ups), ("down", downs), ("members", () if members is None else (members,))):
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"{what} must be a name, or several of up and down, got {names!r}")
    if (members is None) != bool(ups and downs) or (members is not None and (ups or downs)):
        raise ValueError(f"up and down, or members, must be given, got {up=}, {down=}, {members=}")

    def find(module: nn.Module) -> Paths:
        if members is not None:
            return separate_paths(members, list(_child(module, members).named_children()))
        return _stacked_paths(module, (*ups, *downs))

    _registered.insert(0, ExpertsAdapter(module_class, kind or module_class.__name__, find))


def adapter_of(module: nn.Module) -> ExpertsAdapter | None:
    return next((adapter for adapter in _registered if isinstance(module, adapter.module_class)), None)


def separate_paths(prefix: str, members: Sequence[tuple[str, nn.Module]]) -> Paths:
    """Of experts that are modules of their own, `(name, module)`.

    Raises:
        NotExpertsError: there are fewer than two, or they differ in class, or in names, shapes or dtypes of tensors.
    """
    if len(members) < 2:
        raise NotExpertsError("holds fewer than two modules")
    first_name, first = members[0]
    tensors = _tensors(first)
    for name, member in members:
        if type(member) is not type(first):
            raise NotExpertsError(f"holds a {type(first).__name__} and a {type(member).__name__}")
        if _tensors(member) != tensors:
            raise NotExpertsError(f"holds modules whose tensors differ: {first_name} and {name}")
    dot = f"{prefix}." if prefix else ""
    names = [name for name, _ in parameters_in(first)]
    if not names:
        raise NotExpertsError("holds modules without parameters")
    return {f"{dot}*.{name}": tuple(f"{dot}{member}.{name}" for member, _ in members) for name in names}


def stacked_paths(module: nn.Module) -> Paths | None:
    """Of a module that has the flags of transformers 5 and its names; None without the flags.

    Raises:
        NotExpertsError: it has the flags, but not the tensors that belong to them.
    """
    if not all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated")):
        return None
    if getattr(module, "_is_expert_parallel", False):
        raise NotExpertsError("has a part of the experts only: the others are in other processes")
    up, num_rows = ("gate_up_proj", 2) if module.has_gate else ("up_proj", 1)
    biases = [name for name in (f"{up}_bias", "down_proj_bias") if module._parameters.get(name) is not None]
    paths = _stacked_paths(module, (up, "down_proj", *biases))
    shapes = [module.get_parameter(name).shape for name in (up, "down_proj")]
    if any(len(shape) != 3 for shape in shapes):
        raise NotExpertsError(f"has {up} {list(shapes[0])} and down_proj {list(shapes[1])}, not of three dimensions")
    (rows, d_model), (d_out, d_ff) = (shape[:0:-1] if module.is_transposed else shape[1:] for shape in shapes)
    if d_out != d_model or rows != num_rows * d_ff:
        raise NotExpertsError(f"has {up} {list(shapes[0])} and down_proj {list(shapes[1])}, which do not fit")
    return paths


def unregistered_pair(module: nn.Module) -> tuple[str, str] | None:
    """Names of two stacked parameters that look like the projections of experts, but need not be."""
    stacked = [(name, p.shape) for name, p in module._parameters.items() if p is not None and p.ndim == 3]
    for (up, (num_experts, *sizes)), (down, (num_down, *others)) in itertools.combinations(stacked, 2):
        if num_experts == num_down >= 2 and (_fit(sizes, others) or _fit(others, sizes)):
            return up, down
    return None


def _fit(up: Sequence[int], down: Sequence[int]) -> bool:
    pairs = itertools.product(itertools.permutations(up), itertools.permutations(down))
    return any(d_model == d_out and rows in (d_ff, 2 * d_ff) for (rows, d_model), (d_out, d_ff) in pairs)


def parameters_in(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """By the names under which modules hold them, which those of `named_parameters` are not in every wrapper."""
    for prefix, inner in module.named_modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), parameter


def _tensors(module: nn.Module) -> list[tuple[str, object, object]]:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in (*parameters_in(module), *module.named_buffers())]


def _stacked_paths(module: nn.Module, names: Sequence[str]) -> Paths:
    tensors = {path: tensor for name in names for path, tensor in _parameters_at(module, name)}
    num_experts = {len(tensor) if tensor.ndim > 0 else 0 for tensor in tensors.values()}
    if len(num_experts) != 1 or min(num_experts) < 2:
        shapes = ", ".join(f"{path} {list(tensor.shape)}" for path, tensor in tensors.items())
        raise NotExpertsError(f"must have tensors [E, ...] of the same E ≥ 2, has {shapes or 'none'}")
    for path, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise NotExpertsError(f"has {tensor.dtype} {path}, which cannot be averaged")
    return {path: (path,) for path in tensors}


def _parameters_at(module: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    parent, _, leaf = name.rpartition(".")
    holder = _child(module, parent)
    parameter = holder._parameters.get(leaf)
    if parameter is not None:
        yield name, parameter
    else:
        yield from ((f"{name}.{path}", inner) for path, inner in parameters_in(_child(module, name)))


def _child(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise NotExpertsError(f"has no {name!r}") from None
