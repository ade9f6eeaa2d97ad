"""`find_ffns`: every FFN of a model, with the reason where it cannot be replaced."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

import ewa_kernels.checks as checks
from ewa_kernels.modules import RandomPartitionMoE
from ewa_kernels.surgery import places
from ewa_kernels.surgery.adapters import adapter_of
from ewa_kernels.surgery.joined import Block, block_of
from ewa_kernels.surgery.layout import FFNLayout
from ewa_kernels.surgery.probe import NotReplaceableError, probe

# Each tells which modules of a model are parts of something else, and why; `ewa_kernels.moe` adds the experts of lists.
claims: list[Callable[[nn.Module], Mapping[nn.Module, str]]] = []


@dataclass(frozen=True)
class FFNSite:
    """One FFN of a model.

    Attributes:
        name: where `model.named_modules()` meets it first.
        module: itself; the block around it, if its projections are parts of a larger block.
        kind: which adapter knows it.
        layout: what it computes, None if not replaceable.
        skip_reason: why it is not replaceable, None if it is.
        ffn: the module that is the FFN alone: `module`, or one made of a block's parts.
        block: where these parts are, None if `module` is the FFN alone.
    """

    name: str
    module: nn.Module
    kind: str
    layout: FFNLayout | None
    skip_reason: str | None
    ffn: nn.Module
    block: Block | None = None


def find_ffns(model: nn.Module) -> list[FFNSite]:
    """All FFNs of a model in module order, replaceable or not; the model is not touched.

    A module that looks like an FFN is run, as a copy with random parameters: it is replaceable only if output
    and gradients, in eval and in training mode, are those of the FFN it is taken for.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    checks.module("model", model)
    # How many modules hold each parameter, and each module.
    holders = Counter(
        id(held)
        for module in model.modules()
        for held in (*module._parameters.values(), *module._modules.values())
        if held is not None
    )
    claimed = {module: reason for claim in claims for module, reason in claim(model).items()}
    sites: list[FFNSite] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        site = _site(name, module, model, holders, claimed)
        if site is None:
            continue
        sites.append(site)
        if site.block is None and (site.layout is not None or isinstance(module, RandomPartitionMoE)):
            inside += (f"{name}.",)  # nothing inside a site is a site
    return sites


def _site(
    name: str, module: nn.Module, model: nn.Module, holders: Counter[int], claimed: Mapping[nn.Module, str]
) -> FFNSite | None:
    """None if the module does not look like an FFN."""
    if isinstance(module, RandomPartitionMoE):
        return FFNSite(name, module, "RandomPartitionMoE", None, "is a RandomPartitionMoE already", module)
    kind, ffn, block, layout, skip_reason = type(module).__name__, module, None, None, None
    up: tuple[str, ...]
    try:
        block = block_of(module)
        if block is not None:
            _check_not_shared(module, (block.up, block.down), holders)
            kind, ffn, up, down = block.kind, block.join(module), ("up",), "down"
        elif (found := adapter_of(module)) is not None:
            kind, up, down = found
            _check_place(name)
            _check_not_shared(module, (*up, down), holders)
        else:
            return None
        if module in claimed:
            raise NotReplaceableError(claimed[module])
        places.check(model, name)
        _check_parts(ffn, up, down, holders)
        layout = probe(ffn, up, down)
        if block is not None:
            block.check(module)
    except NotReplaceableError as error:
        layout, skip_reason = None, str(error)
    except Exception as error:  # of foreign code: one odd module must not hide all others
        layout, skip_reason = None, f"cannot be examined: {type(error).__name__}: {error}"
    return FFNSite(name, module, kind, layout, skip_reason, ffn, block)


def _check_place(name: str) -> None:
    if name == "":
        raise NotReplaceableError("is the model itself: nothing holds it that could hold another")
    if name.rpartition(".")[2] == "_orig_mod":
        raise NotReplaceableError("is compiled: call replace_ffn_ before torch.compile")


def _check_not_shared(module: nn.Module, names: tuple[str, ...], holders: Counter[int]) -> None:
    """Neither the projections of these names nor the modules that hold them, inside of `module`."""
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            try:
                held = module.get_submodule(path)
            except AttributeError:
                break  # `_linear` says so
            if holders[id(held)] > 1:
                raise NotReplaceableError(f"shares with another module: {path}")


def _check_parts(module: nn.Module, up: tuple[str, ...], down: str, holders: Counter[int]) -> None:
    """All that must be so before a module is even run."""
    linears = [_linear(module, name) for name in (*up, down)]
    *ups, last = linears
    d_model = ups[0].in_features
    rows = sum(linear.out_features for linear in ups)
    if last.out_features != d_model:
        raise NotReplaceableError(f"maps {d_model} to {last.out_features} features, not to as many")
    if (
        rows not in (last.in_features, 2 * last.in_features)
        or len({(linear.in_features, linear.out_features) for linear in ups}) > 1
    ):
        raise NotReplaceableError(
            f"its up projection gives {rows} features, its down projection takes {last.in_features}"
        )

    known = {f"{name}.{p}" for name in (*up, down) for p in ("weight", "bias")}
    parameters = dict(module.named_parameters())
    others = [name for name in parameters if name not in known]
    others += [name for name, _ in module.named_buffers()]
    if others:
        raise NotReplaceableError(f"has other parameters or buffers: {', '.join(others)}")
    shared = [name for name, p in parameters.items() if holders[id(p)] > 1]
    if shared or len(parameters) != sum(1 + (linear.bias is not None) for linear in linears):
        raise NotReplaceableError(f"shares with another module: {', '.join(shared) or 'its own projections'}")
    for what in ("dtype", "device"):
        values = {str(getattr(p, what)) for p in parameters.values()}
        if len(values) > 1:
            raise NotReplaceableError(f"has parameters of more than one {what}: {', '.join(sorted(values))}")
    if not ups[0].weight.is_floating_point():
        raise NotReplaceableError(f"has {ups[0].weight.dtype} parameters")
    for which in ("weight", "bias"):
        of_ups = [getattr(linear, which) for linear in ups]
        if len({None if p is None else p.requires_grad for p in of_ups}) > 1:
            raise NotReplaceableError(f"its up projections differ in {which}: frozen, or missing")

    if len({child.training for child in module.modules()}) > 1:
        raise NotReplaceableError("is in training mode in part only")
    if any(child._compiled_call_impl is not None for child in module.modules()):
        raise NotReplaceableError("is compiled: call replace_ffn_ before compile()")
    hooked = [name or "it" for name, child in module.named_modules() if has_hooks(child, HOOKS)]
    hooked += [name for name, p in parameters.items() if has_hooks(p, PARAMETER_HOOKS)]
    if hooked:
        raise NotReplaceableError(f"has hooks that would be lost, on {', '.join(hooked)}")
    extra = list(_extra_arguments(module))
    if extra:
        raise NotReplaceableError(f"its forward takes more than one argument: {', '.join(extra)}")


def _linear(module: nn.Module, name: str) -> nn.Linear:
    try:
        linear = module.get_submodule(name)
    except AttributeError:
        raise NotReplaceableError(f"has no module {name!r}") from None
    if type(linear) is not nn.Linear:
        own = type(linear).__name__
        raise NotReplaceableError(
            f"{name} is a {f'{type(linear).__module__}.{own}' if own == 'Linear' else own}, not an nn.Linear"
        )
    if type(linear.weight) is not nn.Parameter:
        kind = type(linear.weight).__name__
        raise NotReplaceableError(f"{name}.weight is a {kind}, not a plain Parameter")
    return linear


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def has_hooks(held: nn.Module | nn.Parameter, kinds: tuple[str, ...]) -> bool:
    return any(getattr(held, hooks, None) for hooks in kinds)


def _extra_arguments(module: nn.Module) -> Iterator[str]:
    """Names of what `forward` takes besides the tokens."""
    others = list(inspect.signature(module.forward).parameters.values())[1:]
    return (str(parameter).split(":")[0] for parameter in others)
