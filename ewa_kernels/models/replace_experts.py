"""`replace_moe_`, `fold_moe_`, `restore_moe_`: the experts of a model through the kernels, routed or at random."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, checks
from ..modules import StackedExperts
from ..problem import SAVED
from ..train import shards
from . import stacked
from .blocks import BlockFormula, BlockForward, layout_of_expert, prove
from .experts import ExpertsSite, find_experts, held_by
from .experts_adapters import NotExpertsError
from .ffns import why_hooked
from .layout import FFNLayout, has_forward_of_its_own, swap_modules_
from .replace import ReplacementReport
from .stacked import TENSORS, ExpertStack, MeanExpert, Origin

_SHARDED = "model must not be sharded, whose other layers gather their parameters as they were"

Verdict = tuple[FFNLayout, BlockFormula] | str


class ExpertsReport(ReplacementReport):
    """What `replace_moe_` did; `print(report)` shows it as a table. Attributes: see `ReplacementReport`."""

    def __str__(self) -> str:
        return super().__str__() if self.replaced or self.kept or self.skipped else "no experts found"


def replace_moe_(
    model: nn.Module,
    to: str,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    backend: str = "auto",
    saved: str = "full",
) -> ExpertsReport:
    """Lets the experts of a model's MoE layers go through the kernels, in place.

        report = ewa.replace_moe_(model, to="routed")

    "routed": every layer computes what it computed, with its own router. "random_partition": in training the tokens
    are dealt among the experts at random, in eval mode the mean expert is taken, as `RandomPartitionMoE` does; the
    output is that of one expert, so that where the weights of a router do not sum to 1 the scale changes.

    Either way the router and the block stay the objects they are and the router is called as before, so that its logits
    and the losses on them are where they were; without such a loss, "random_partition" gives it no gradient.

    Experts stacked as in transformers 5 keep their parameters, and each module gets a config of its own, so that
    `set_experts_implementation` has no effect on it until `restore_moe_`.

    Experts in a list become stacked parameters, `experts.up.weight` `[E, F, D]` and so on, with their gradients: make
    the optimizer after this call. The `state_dict` keeps the list's names. A block with a list is replaced only if
    `register_experts_adapter`, or this package, names its router, and a copy of it, run with random parameters, gives
    the output and the gradients that ours gives. Its numbers and flags, such as `top_k`, must then stay as they are: a
    later change raises RuntimeError in the forward. `fold_moe_` leaves the mean expert of a random partition.

    Args:
        model: any module; `ewa_kernels.find_experts` tells what is known in it.
        to: "random_partition" or "routed". A model may go from one to the other, by another call.
        filter_fn: which of the replaceable experts, by their name and module; by default all.
        backend, saved: see `ewa_kernels.functional.moe_ffn`.

    Returns:
        What was replaced, and what was not, and why. Warns if nothing was replaced.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of range. The model is as it was then, and so
            it is after any other error.
    """
    checks.choice("to", to, sorted(stacked.IMPLEMENTATIONS))
    checks.choice("backend", backend, backends.BACKENDS)
    checks.choice("saved", saved, SAVED)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a callable (name, module) -> bool, got {type(filter_fn).__name__}")
    prepared: dict[str, tuple[nn.Module, Callable[[], Callable[[], None]]]] = {}
    skipped: dict[str, str] = {}
    verdicts: dict[Hashable, Verdict] = {}
    for site in find_experts(model):
        try:
            prepared[site.name] = (
                site.module,
                _replacement(model, site, to, {"backend": backend, "saved": saved}, verdicts),
            )
        except NotExpertsError as error:
            skipped[site.name] = str(error)
    chosen = [name for name, (module, _) in prepared.items() if filter_fn is None or filter_fn(name, module)]
    # All that can fail is done here; then the model is changed.
    for change in [prepared[name][1]() for name in chosen]:
        change()
    report = ExpertsReport(tuple(chosen), tuple(name for name in prepared if name not in chosen), skipped)
    if not chosen:
        warnings.warn(f"replace_moe_ replaced nothing:\n{report}", stacklevel=2)
    return report


def fold_moe_(model: nn.Module) -> nn.Module:
    """Turns the experts of every layer in random partition into one FFN with their mean, in place; returns the model.

    Such layers are those of `replace_moe_(model, to="random_partition")`, and all of a transformers model whose experts
    implementation is "ewa_random_partition". The model's output in eval mode does not change, and what a block returns
    has the same form: its router is still called. In place of the experts stands a dense `ewa_kernels.FFN`, with new
    parameters that are in no optimizer. Layers whose router chooses are left alone. In the `state_dict`, and so in what
    `save_pretrained` writes, all experts are there under the library's names, each of them the mean.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: it has no such layer, or is one itself, or its experts are sharded. After any error the model is
            as it was.
    """
    checks.module("model", model)
    dense: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        options: Any = module
        if isinstance(module, ExpertStack) and not module.routed:
            experts, origin = module.experts, module._origin
        elif stacked.is_dealt(module) and (options := stacked.formula_of(module)).reason is None:
            experts, origin = options.experts(module), Origin(module, options)
        else:
            continue
        named = {name: tensor for name, tensor in zip(TENSORS, experts, strict=True) if tensor is not None}
        if any(map(shards.is_sharded, named.values())):
            raise ValueError(_SHARDED)
        dense[module] = MeanExpert(origin, named, options).train(module.training)
    if not dense:
        raise ValueError('model must have experts in random partition: replace_moe_(model, to="random_partition")')
    if model in dense:
        raise ValueError(f"model must hold the experts, got them themselves: {type(model).__name__}")
    swap_modules_(model, dense)
    return model


def restore_moe_(model: nn.Module) -> nn.Module:
    """Undoes `replace_moe_`, in place, with the experts as they are now; returns the model.

    Lists of experts stand where they stood; their parameters are in no optimizer, and have no gradients. Every block
    has its own forward again. What `fold_moe_` made of experts that were stacked by transformers stays.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: its experts are sharded, or a list of them was folded by `fold_moe_`, or something hides the forward
            of a block. The model is as it was then.
    """
    checks.module("model", model)
    lists: dict[nn.Module, nn.Module] = {}
    blocks = [module for module in model.modules() if isinstance(vars(module).get("forward"), BlockForward)]
    for block in blocks:
        experts = block.get_submodule(vars(block)["forward"].formula.experts)
        if not isinstance(experts, ExpertStack):
            raise ValueError(f"model must have the experts of each {type(block).__name__}, got one that was folded")
        if any(map(shards.is_sharded, experts.parameters())):
            raise ValueError(_SHARDED)
        lists[experts] = experts.restored()
    if any(isinstance(module, ExpertStack) and module not in lists for module in model.modules()):
        raise ValueError(
            "model must have its blocks' forwards as replace_moe_ left them: remove hooks around them first"
        )
    swap_modules_(model, lists)
    for block in blocks:
        del vars(block)["forward"]
    for module in model.modules():
        stacked.restore_(module)
    return model


def _replacement(
    model: nn.Module, site: ExpertsSite, to: str, how: dict[str, str], verdicts: dict[Hashable, Verdict]
) -> Callable[[], Callable[[], None]]:
    """What prepares the replacement, and gives what makes it and cannot fail.

    Raises:
        NotExpertsError: these experts cannot be replaced.
    """
    module, block = site.module, model.get_submodule(site.holder)
    kind, experts = type(block).__name__, site.name[len(site.holder) :].removeprefix(".")
    if site.skip_reason is not None:
        raise NotExpertsError(site.skip_reason)
    if isinstance(module, ExpertStack):
        return lambda: lambda: vars(module).update(routed=to == "routed", **how)
    if stacked.is_stacked(module):
        _check_forward(module)
        if (reason := stacked.formula_of(module).reason) is not None:
            raise NotExpertsError(reason)
        stacked.register_implementations()
        return lambda: lambda: stacked.switch_(module, to, how)
    if isinstance(module, StackedExperts) or (site.adapter is not None and site.adapter.stacked):
        raise NotExpertsError(f"is a {site.kind}, whose forward is its own")
    if site.adapter is None or site.adapter.router is None:
        raise NotExpertsError(f"is in a {kind} of which no adapter names the router: {_line(block, experts)}")
    if held_by(model)[id(module)] > 1:
        raise NotExpertsError("shares with another module: the list itself")
    _check_forward(block)
    _check_members(module)
    key = _key(block), site.adapter
    if key not in verdicts:
        try:
            layout = layout_of_expert(next(module.children()))
            verdicts[key] = layout, prove(block, experts, layout, site.adapter)
        except NotExpertsError as error:
            verdicts[key] = str(error)
        except Exception as error:  # of foreign code: one odd block must not hide all others
            verdicts[key] = f"cannot be examined: {type(error).__name__}: {error}"
    verdict = verdicts[key]
    if isinstance(verdict, str):
        raise NotExpertsError(f"is in a {kind} that {verdict}")
    layout, formula = verdict
    named = dict(module.named_parameters())
    flags = Origin(module, layout).gather(
        {n: torch.full((1,), p.requires_grad, device="cpu") for n, p in named.items()}
    )
    if any(flag.min() != flag.max() for flag in flags.values()):
        raise NotExpertsError("has experts, or projections side by side, of which a part is frozen")

    def prepare() -> Callable[[], None]:
        stack = _stack(module, layout, flags, routed=to == "routed", how=how)
        forward = BlockForward(block, formula)

        def change() -> None:
            swap_modules_(block, {module: stack})
            vars(block)["forward"] = forward

        return change

    return prepare


def _line(block: nn.Module, experts: str) -> str:
    """The code that would teach this block: by what looks like its router, and its k."""
    num_experts, children = len(block.get_submodule(experts)._modules), dict(block.named_children())
    routers = [name for name, module in children.items() if getattr(module, "out_features", None) == num_experts]
    routers += [name for name in children if "router" in name or "gate" in name]
    router, names = (*routers, "router")[0], ("top_k", "topk", "k", "num_experts_per_tok")
    top_k = next((repr(name) for name in names if name in vars(block)), "2")
    return f"ewa.register_experts_adapter({type(block).__name__}, {experts=}, {router=}, top_k={top_k})"


def _check_forward(module: nn.Module) -> None:
    """Ours must be the one that is called."""
    if has_forward_of_its_own(module):  # transformers 4 leaves the class's there after a call
        raise NotExpertsError(f"the {type(module).__name__} has a forward of its own, in its attributes")
    if module._compiled_call_impl is not None:
        raise NotExpertsError(f"the {type(module).__name__} is compiled: compile it after this call")


def _check_members(experts: nn.Module) -> None:
    if (reason := why_hooked(dict(experts.named_modules()))) is not None:
        raise NotExpertsError(reason)
    kinds = {(type(p).__name__, str(p.dtype), str(p.device)) for p in experts.parameters()}
    if len(kinds) > 1 or next(iter(kinds))[0] != "Parameter" or not next(experts.parameters()).is_floating_point():
        raise NotExpertsError(f"must have floating-point parameters of one dtype and device, has {sorted(kinds)}")


def _key(block: nn.Module) -> Hashable:
    """Equal for blocks that are made alike; what cannot be compared is like itself only."""
    parts: list[Any] = []
    for name, module in block.named_modules():
        own = [(k, v) for k, v in vars(module).items() if k not in vars(nn.Module())]
        tensors = [(k, t) for k, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]
        parts += [name, type(module), *((k, v if isinstance(v, (bool, int, float, str)) else id(v)) for k, v in own)]
        parts += [(k, t.shape, t.dtype) for k, t in tensors]
    return tuple(parts)


@torch.inference_mode(False)
@torch.no_grad()
def _stack(
    members: nn.Module, layout: FFNLayout, trained: Mapping[str, Tensor], *, routed: bool, how: Mapping[str, str]
) -> ExpertStack:
    origin, named = Origin(members, layout), dict(members.named_parameters())
    tensors = {name: nn.Parameter(t, bool(trained[name].all())) for name, t in origin.gather(named).items()}
    if any(parameter.grad is not None for parameter in named.values()):
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
        for name, grad in origin.gather(grads).items():
            tensors[name].grad = grad if tensors[name].requires_grad else None
    return ExpertStack(origin, tensors, routed=routed, how=how)
