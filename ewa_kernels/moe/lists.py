"""Lists of modules, and whether they are the experts of a layer: what each computes, and how its holder uses it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ewa_kernels.moe.adapters import NotExpertsError, Paths, parameters_in, separate_paths
from ewa_kernels.moe.trial import Trial
from ewa_kernels.moe.twin import CannotRunError, private_copy
from ewa_kernels.surgery.layout import FFNLayout, copy_with_parameters
from ewa_kernels.surgery.probe import NotReplaceableError, generators_kept, probe

# How many of the modules around a list are tried, from the inside out.
_MAX_HOLDERS = 3

_NARROW = 24


@dataclass(frozen=True)
class ExpertsList:
    """Attributes: see `ExpertsSite`; `router` and `holder` as there."""

    paths: Paths
    layout: FFNLayout
    holder: str
    router: tuple[str, ...]


@dataclass
class Lists:
    """The lists of one model. Modules that are made alike are examined once.

    Modules are made alike if all that could tell them apart is equal: class, attributes, shapes, children.
    """

    model: nn.Module
    _verdicts: dict[Hashable, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        modules = list(self.model.modules())
        held = [h for m in modules for h in (*m._parameters.values(), *m._modules.values()) if h is not None]
        self._num_holders = Counter(map(id, held))

    def examine(self, name: str, experts: nn.Module) -> ExpertsList | None:
        """None if it does not even look like a list of experts: it holds no FFNs, and its name does not say so.

        Raises:
            NotExpertsError: it looks like one, and is none, or cannot be proved to be one.
        """
        says_so = says_experts(name)
        first = next(experts.children(), None)
        if not isinstance(experts, (nn.ModuleList, nn.ModuleDict)) or first is None:
            return None
        if not says_so and (len(experts) < 2 or _linears(first) is None):
            return None
        try:
            paths = separate_paths(name, list(experts.named_children()))
            layouts = {self._layout(member) for member in experts.children()}
        except NotExpertsError:
            if says_so:
                raise
            return None
        if len(layouts) > 1:
            raise NotExpertsError("holds FFNs that do not all compute the same")
        shared = [n for n, p in experts.named_parameters(remove_duplicate=False) if self._num_holders[id(p)] > 1]
        shared += [n for n, m in experts.named_children() if self._num_holders[id(m)] > 1]
        if shared or len(list(experts.children())) != len(experts):
            raise NotExpertsError(f"shares with another module: {', '.join(shared) or 'a member'}")
        (layout,) = layouts
        holder, router = self._holder(name, experts, layout, says_so)
        return ExpertsList(paths, layout, holder, router)

    def _holder(self, name: str, experts: nn.Module, layout: FFNLayout, says_so: bool) -> tuple[str, tuple[str, ...]]:
        """Name of the module that shows them to be experts, and names of its router's tensors."""
        d_model = next(experts.children()).get_parameter(f"{layout.up[0]}.weight").shape[1]
        refusal: NotExpertsError = CannotRunError("is in no module that could be run")
        for i, holder_name in enumerate(_around(self.model, name)):
            if i == _MAX_HOLDERS or not isinstance(refusal, CannotRunError):
                break
            holder = self.model.get_submodule(holder_name)
            key = ("holder", signature(holder), name.removeprefix(holder_name).removeprefix("."), says_so)
            verdict = self._verdicts.get(key)
            if verdict is None:
                verdict = self._verdicts[key] = _try(holder, experts, d_model, says_so)
            if not isinstance(verdict, NotExpertsError):
                dot = f"{holder_name}." if holder_name else ""
                return holder_name, tuple(f"{dot}{tensor}" for tensor in verdict)
            if i == 0 or not isinstance(verdict, CannotRunError):
                refusal = verdict
        raise refusal

    def _layout(self, member: nn.Module) -> FFNLayout:
        key = ("member", signature(member))
        verdict = self._verdicts.get(key)
        if verdict is None:
            try:
                verdict = _layout(member)
            except (NotExpertsError, NotReplaceableError) as error:
                verdict = NotExpertsError(f"holds modules each of which {error}")
            except Exception as error:  # of foreign code
                verdict = NotExpertsError(f"holds modules that cannot be examined: {type(error).__name__}: {error}")
            self._verdicts[key] = verdict
        if isinstance(verdict, NotExpertsError):
            raise verdict
        return verdict


def says_experts(name: str) -> bool:
    """Whether an attribute's name calls what it holds experts, among which a router chooses."""
    attribute = next((part for part in reversed(name.split(".")) if not part.isdigit()), "").lower()
    return "expert" in attribute and "shared" not in attribute


def _around(model: nn.Module, name: str) -> Iterator[str]:
    """Names of the list and the modules around it that have a forward."""
    while True:
        if type(model.get_submodule(name)).forward is not nn.Module.forward:
            yield name
        if not name:
            return
        name = name.rpartition(".")[0]


def _try(holder: nn.Module, experts: nn.Module, d_model: int, says_so: bool) -> tuple[str, ...] | NotExpertsError:
    """Names of the router's tensors, or none where the list's name tells what it holds; or why these are no experts."""
    default_dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"), torch.autocast("cpu", enabled=False), generators_kept():
            torch.default_generator.manual_seed(0)
            trial = Trial(holder, experts, d_model)
            trial.check_independent()
            router: tuple[str, ...] = ()
            try:
                router = trial.router()
            except NotExpertsError:
                if not says_so:
                    raise
                trial.check_places()
            trial.check_chosen_by_tokens()
            return router
    except NotExpertsError as error:
        return error
    except Exception as error:  # of foreign code
        return CannotRunError(f"{type(holder).__name__} cannot be tried: {type(error).__name__}: {error}")
    finally:
        torch.set_default_dtype(default_dtype)


def _layout(member: nn.Module) -> FFNLayout:
    """What an FFN computes, whatever the names in it are; it has two `nn.Linear`, or three of a GLU, and no more.

    Raises:
        NotExpertsError, NotReplaceableError: it is no plain FFN.
    """
    member = private_copy(member, {})
    linears = _linears(member)
    if linears is None:
        raise NotExpertsError("is no FFN of two or three nn.Linear alone")
    error: Exception = NotExpertsError("is no FFN that maps D features to D")
    for down in reversed(linears):
        up = tuple(name for name in linears if name != down)
        d_model, d_ff = linears[up[0]].in_features, linears[down].in_features
        rows = sum(linears[name].out_features for name in up)
        if linears[down].out_features != d_model or rows not in (d_ff, 2 * d_ff) or (len(up) == 2 and rows == d_ff):
            continue
        for module in (_narrow(member, up, down, rows // d_ff), member):  # its code may work at its own width alone
            try:
                return probe(module, up, down)
            except NotReplaceableError as failure:
                error = failure
    raise error


def _linears(member: nn.Module) -> dict[str, nn.Linear] | None:
    linears = {name: module for name, module in member.named_modules() if type(module) is nn.Linear}
    tensors = {f"{name}.{which}" for name, linear in linears.items() for which, _ in linear.named_parameters()}
    others = tensors ^ {name for name, _ in (*parameters_in(member), *member.named_buffers())}
    return linears if len(linears) in (2, 3) and not others else None


def _narrow(member: nn.Module, up: tuple[str, ...], down: str, num_rows: int) -> nn.Module:
    """A copy with projections of small sizes, because many experts are to be examined."""
    rows = num_rows * _NARROW // len(up)
    parameters: dict[str, Tensor] = {}
    for name in (*up, down):
        out_features = _NARROW if name == down else rows
        parameters[f"{name}.weight"] = torch.empty(out_features, _NARROW, device="cpu")
        parameters[f"{name}.bias"] = torch.empty(out_features, device="cpu")
    twin = copy_with_parameters(member, parameters)
    for name in (*up, down):
        out_features = _NARROW if name == down else rows
        twin.get_submodule(name).__dict__.update(in_features=_NARROW, out_features=out_features)
    return twin


def signature(value: Any) -> Hashable:
    """Equal for what is made alike. What cannot be compared is like itself only."""
    if isinstance(value, nn.Module):
        attributes = {k: v for k, v in value.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")}
        tensors = (*value._parameters.items(), *value._buffers.items())
        return (
            type(value),
            signature(attributes),
            tuple((name, None if t is None else (t.shape, t.dtype)) for name, t in tensors),
            tuple((name, signature(child)) for name, child in value._modules.items()),
        )
    if isinstance(value, dict):
        return type(value), tuple((key, signature(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value), tuple(map(signature, value))
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(signature, value))
    if isinstance(value, (int, float, str, torch.dtype)):
        return type(value), value
    return id(value)
