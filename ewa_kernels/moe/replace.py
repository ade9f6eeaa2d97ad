"""`replace_moe_`: the experts of a model go through the kernels, with its router or without."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ewa_kernels.backends as backends
import ewa_kernels.checks as checks
from ewa_kernels.moe import stacked
from ewa_kernels.moe.adapters import NotExpertsError
from ewa_kernels.moe.blocks import BlockFormula, prove
from ewa_kernels.moe.experts import ExpertsSite, find_experts
from ewa_kernels.moe.lists import signature
from ewa_kernels.moe.replaced import ExpertStack, has_forward_of_its_own, switch_, switch_block_, switched
from ewa_kernels.surgery.layout import FFNLayout
from ewa_kernels.surgery.replace import ReplacementReport
from ewa_kernels.surgery.sites import HOOKS, PARAMETER_HOOKS, has_hooks

# Of blocks that are made alike: what they compute, or why they are left alone.
Verdicts = dict[Hashable, BlockFormula | str]

TARGETS = ("random_partition", "routed")


@dataclass(frozen=True)
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
) -> ExpertsReport:
    """Lets the experts of a model's MoE layers go through the kernels, in place.

        report = ewa.replace_moe_(model, to="routed")

    "routed": every layer computes what it computed, with its own router. "random_partition": in training the tokens
    are dealt among the experts at random, in eval mode the mean expert is taken, as `RandomPartitionMoE` does; the
    output is that of one expert, so that where the weights of a router do not sum to 1 the scale changes.

    Either way the router and the block stay the objects they are and the router is called as before, so that its logits
    and the losses on them are where they were; without such a loss, "random_partition" gives it no gradient.

    Experts stacked as in transformers 5 keep their parameters, and so checkpoints and optimizers go on; the setting of
    `ewa_kernels.integrations.transformers_experts` does the same for a whole model. After this call, though,
    `set_experts_implementation` has no effect on them: `restore_moe_` first.

    Experts in a list (transformers 4, research code) become stacked parameters: `experts.up.weight` `[E, F, D]` and so
    on in place of the list, which changes the `state_dict` until `restore_moe_`. They keep their gradients; make the
    optimizer after this call. For a moment such experts take their memory twice. A block with a list is replaced only
    if a copy of it, run with random parameters, gives the output and the gradients that ours gives, keeps nothing, and
    does not hang on its buffers. Its numbers and flags, such as `top_k`, must then stay as they are: a later change
    raises RuntimeError in the forward. `fold_moe_` leaves the mean expert of a random partition.

    Args:
        model: any module; `ewa_kernels.moe.experts.find_experts` tells what is known in it.
        to: "random_partition" or "routed". A model may go from one to the other, by another call.
        filter_fn: which of the replaceable experts, by their name and module; by default all.
        backend: see `ewa_kernels.functional.moe_ffn`.

    Returns:
        What was replaced, and what was not, and why. Warns if nothing was replaced.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of range. The model is as it was then, and so
            it is after any other error.
    """
    checks.choice("to", to, TARGETS)
    checks.choice("backend", backend, backends.BACKENDS)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a callable (name, module) -> bool, got {type(filter_fn).__name__}")
    replaceable: dict[str, Callable[[], Callable[[], None]]] = {}
    modules: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    verdicts: Verdicts = {}
    for site in find_experts(model):
        try:
            replaceable[site.name] = _replacement(model, site, to, backend, verdicts)
            modules[site.name] = site.module
        except NotExpertsError as error:
            skipped[site.name] = str(error)
    chosen = [name for name, module in modules.items() if filter_fn is None or filter_fn(name, module)]
    # All that can fail is done here; then the model is changed.
    changes = [replaceable[name]() for name in chosen]
    for change in changes:
        change()
    report = ExpertsReport(tuple(chosen), tuple(name for name in modules if name not in chosen), skipped)
    if not chosen:
        warnings.warn(f"replace_moe_ replaced nothing:\n{report}", stacklevel=2)
    return report


def _replacement(
    model: nn.Module, site: ExpertsSite, to: str, backend: str, verdicts: Verdicts
) -> Callable[[], Callable[[], None]]:
    """What prepares the replacement, and gives what makes it and cannot fail.

    Raises:
        NotExpertsError: these experts cannot be replaced.
    """
    module = site.module
    if site.skip_reason is not None:
        raise NotExpertsError(site.skip_reason)
    if isinstance(module, ExpertStack):

        def change_stack() -> None:
            module.routed, module.backend = to == "routed", backend

        return lambda: change_stack
    if stacked.is_stacked(module):
        _check_stacked(module)

        def switch() -> None:
            switch_(module, to)
            module.__dict__[stacked.BACKEND] = backend

        return lambda: switch
    if site.kind != "list" or site.layout is None:
        raise NotExpertsError(f"is a {site.kind}, whose forward is its own")
    _check_not_shared(model, module)
    block = model.get_submodule(site.holder)
    layout, trained = site.layout, _check_members(module, site.layout)
    formula = _formula(block, site, verdicts)

    def prepare() -> Callable[[], None]:
        experts = _stack(module, layout, trained, to, backend)

        def replace_list() -> None:
            switch_block_(block, formula, experts)

        return replace_list

    return prepare


def _check_not_shared(model: nn.Module, experts: nn.Module) -> None:
    """The other holder would be left with experts of its own. Activations without parameters may be shared."""
    num_holders = Counter(child for module in model.modules() for child in module._modules.values())
    for name, module in experts.named_modules():
        if num_holders[module] > 1 and next(module.parameters(), None) is not None:
            raise NotExpertsError(f"shares with another module: {name or 'the list itself'}")


def _check_stacked(module: nn.Module) -> None:
    _check_forward(module)
    if getattr(module, "_is_expert_parallel", False):
        raise NotExpertsError("has a part of the experts only: the others are in other processes")
    reason = stacked.formula_of(module).reason
    if reason is not None:
        raise NotExpertsError(reason)


def _check_forward(module: nn.Module) -> None:
    """Ours must be the one that is called."""
    if has_forward_of_its_own(module):
        raise NotExpertsError(f"the {type(module).__name__} has a forward of its own, in its attributes")
    if module._compiled_call_impl is not None:
        raise NotExpertsError(f"the {type(module).__name__} is compiled: compile it after this call")


def _formula(block: nn.Module, site: ExpertsSite, verdicts: Verdicts) -> BlockFormula:
    _check_forward(block)
    if switched(block) is not None:
        raise NotExpertsError(f"is in a {type(block).__name__} that was replaced already")
    dot = f"{site.holder}." if site.holder else ""
    routers = {name.removeprefix(dot).partition(".")[0] for name in site.router}
    routers -= set(block._parameters) | set(block._buffers)
    if len(routers) != 1:
        found = ", ".join(sorted(name.removeprefix(dot) for name in site.router)) or "none"
        raise NotExpertsError(f"is in a {type(block).__name__} whose router is not one module: {found}")
    assert site.layout is not None
    (router,), experts = routers, site.name.removeprefix(dot)
    key = signature(block), experts, router
    if key not in verdicts:
        try:
            verdicts[key] = prove(block, experts, site.layout, router)
        except NotExpertsError as error:
            verdicts[key] = str(error)
        except Exception as error:  # of foreign code: one odd block must not hide all others
            verdicts[key] = f"cannot be examined: {type(error).__name__}: {error}"
    verdict = verdicts[key]
    if isinstance(verdict, str):
        raise NotExpertsError(f"is in a {type(block).__name__} that {verdict}")
    return verdict


def _check_members(experts: nn.Module, layout: FFNLayout) -> dict[str, bool]:
    """Name of a stacked tensor → whether it is to be trained.

    Raises:
        NotExpertsError: the members' parameters are not all of one kind, or hooks would be lost.
    """
    hooked = [name or "it" for name, member in experts.named_modules() if has_hooks(member, HOOKS)]
    hooked += [name for name, parameter in experts.named_parameters() if has_hooks(parameter, PARAMETER_HOOKS)]
    if hooked:
        raise NotExpertsError(f"has hooks that would be lost, on {', '.join(hooked)}")
    every = list(experts.parameters())
    for what in ("device", "dtype"):
        values = {str(getattr(parameter, what)) for parameter in every}
        if len(values) > 1:
            raise NotExpertsError(f"has parameters of more than one {what}: {', '.join(sorted(values))}")
    kinds = {type(parameter).__name__ for parameter in every if type(parameter) is not nn.Parameter}
    if kinds or not every[0].is_floating_point():
        raise NotExpertsError(f"has parameters that are {', '.join(kinds) or every[0].dtype}")
    trained = {}
    for name, projections in (("up", layout.up), ("down", (layout.down,))):
        linears = [member.get_submodule(path) for member in experts.children() for path in projections]
        for which in ("weight", "bias"):
            flags = {None if (p := linear._parameters[which]) is None else p.requires_grad for linear in linears}
            if len(flags) > 1:
                raise NotExpertsError(f"has projections that differ in {which}: frozen, or missing")
            trained[f"{name}.{which}"] = flags == {True}
    return trained


@torch.inference_mode(False)
@torch.no_grad()
def _stack(members: nn.Module, layout: FFNLayout, trained: dict[str, bool], to: str, backend: str) -> ExpertStack:
    def stacked_of(tensor_of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        experts = [
            layout.stack({name: tensor_of(parameter) for name, parameter in member.named_parameters()})
            for member in members.children()
        ]
        return {name: torch.stack([expert[name] for expert in experts]) for name in experts[0]}

    tensors = {name: nn.Parameter(t, requires_grad=trained[name]) for name, t in stacked_of(lambda p: p).items()}
    if any(parameter.grad is not None for parameter in members.parameters()):
        for name, grad in stacked_of(lambda p: torch.zeros_like(p) if p.grad is None else p.grad).items():
            tensors[name].grad = grad if trained[name] else None
    return ExpertStack(members, layout, tensors, routed=to == "routed", backend=backend)
