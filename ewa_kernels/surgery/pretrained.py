"""`save_pretrained` of a model with experts saves what the folded model would.

Unfolded weights have names that the dense model does not know: loaded with `from_pretrained`, its FFNs would keep their
random initialisation, with no more than a warning.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ewa_kernels import functional
from ewa_kernels.surgery.replaced import ReplacedFFN, folded, replaced_ffns

_METHOD = "save_pretrained"
_TENSORS = ("up.weight", "up.bias", "down.weight", "down.bias")
# What torch's wrappers put into names, and may leave out of state_dict keys.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def guard_save_pretrained_(model: nn.Module) -> None:
    """Makes each `save_pretrained` inside a model, its own included, save folded weights while it holds experts.

    A `state_dict` that the caller gives is folded, and may come from a wrapper (DDP, FSDP, torch.compile). Copies and
    pickles of the model are guarded too.
    """
    for module in model.modules():
        if not isinstance(module.__dict__.get(_METHOD), FoldedSave) and _has_method(module) and replaced_ffns(module):
            module.__dict__[_METHOD] = FoldedSave(module)


def unguard_save_pretrained_(model: nn.Module) -> None:
    """Gives each module without experts its own `save_pretrained` back."""
    for module in model.modules():
        guard = module.__dict__.get(_METHOD)
        if isinstance(guard, FoldedSave) and not replaced_ffns(module):
            del module.__dict__[_METHOD]
            if guard.previous is not None:
                module.__dict__[_METHOD] = guard.previous


class FoldedSave:
    """Stands in for `module.save_pretrained`. An attribute of the instance, so that copies get one of their own."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.previous: Callable[..., Any] | None = module.__dict__.get(_METHOD)

    @property
    def __wrapped__(self) -> Callable[..., Any]:  # where `inspect.signature` looks
        if self.previous is not None:
            return self.previous
        return getattr(type(self.module), _METHOD).__get__(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own.

        Raises:
            ValueError: `state_dict` has stacked experts, but not all of a layer's or under names that are not the
                model's.
        """
        call = inspect.signature(self.__wrapped__).bind(*args, **kwargs)
        holder = call.arguments
        for parameter in call.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD and "state_dict" not in holder:
                holder = call.arguments.get(parameter.name, holder)
        if holder.get("state_dict") is not None:
            holder["state_dict"] = fold_state_dict(self.module, holder["state_dict"])
            return self.__wrapped__(*call.args, **call.kwargs)
        with folded(self.module, replaced_ffns(self.module).values()):
            return self.__wrapped__(*call.args, **call.kwargs)


def fold_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What `model.state_dict()` gave, with the dense weights in place of the experts; without experts, as it is.

    Args:
        model: whose layers say what the keys mean.
        state_dict: of the model or of a wrapper around it.

    Raises:
        ValueError: stacked experts of unknown name or shape, or not all of a layer's.
    """
    layers = replaced_ffns(model)
    plain = {_plain(name): name for name in layers}
    folded: dict[str, Any] = {}
    done: set[str] = set()
    for key, value in state_dict.items():
        path, tensor = _split(key)
        name = plain.get(_plain(path))
        if tensor == "":
            folded[key] = value
        elif name is not None:
            if path not in done:
                done.add(path)
                for end, mean in _dense(layers[name], path, state_dict).items():
                    folded[_beside(path, name, end, model, layers[name])] = mean
        elif any(_plain(path).endswith(f".{name}") for name in plain):
            raise ValueError(
                f"state_dict must have the names of {type(model).__name__}, got stacked experts under {key!r}: "
                "give none, or ewa_kernels.folded_state_dict(model)"
            )
        else:
            folded[key] = value
    return folded


def _dense(layer: ReplacedFFN, path: str, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of the FFN, by its own names."""
    merged = {}
    for name, parameter in layer.named_parameters():
        stacked = state_dict.get(f"{path}.{name}")
        if not isinstance(stacked, Tensor) or stacked.shape != parameter.shape:
            got = "nothing" if stacked is None else f"shape {list(getattr(stacked, 'shape', []))}"
            raise ValueError(
                f"state_dict must hold all experts, got {got} for {path}.{name}, which has shape "
                f"{list(parameter.shape)}: gather it first, or give ewa_kernels.folded_state_dict(model)"
            )
        merged[name] = functional.merge_experts(stacked)
    # Safetensors take no views of one another's memory.
    return {name: tensor.clone() for name, tensor in layer._origin.layout.unstack(merged).items()}


def _beside(path: str, name: str, end: str, model: nn.Module, layer: ReplacedFFN) -> str:
    """The key of an FFN's tensor `end`; `path`: that of the layer in the same dict; `name`: in the model."""
    parts = layer._origin.places.modules
    if not parts:
        return f"{path}.{end}"
    part, _, tensor = end.partition(".")
    aliases = [alias for alias, module in replaced_ffns(model).items() if module is layer]
    of_part = [alias for alias, m in model.named_modules(remove_duplicate=False) if m is parts[part]]
    ours, its = name.split("."), of_part[aliases.index(name)].split(".")
    while ours and its and ours[0] == its[0]:  # the names part inside the block, below any wrapper
        ours, its = ours[1:], its[1:]
    root = path.split(".")[: -len(ours)] if ours else path.split(".")
    return ".".join([*root, *its, tensor])


def _split(key: str) -> tuple[str, str]:
    """(path of the layer, name of the stacked tensor), or (key, "") if its name is none of theirs."""
    for name in _TENSORS:
        if key.endswith(f".{name}"):
            return key[: -len(name) - 1], name
    return key, ""


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def _has_method(module: nn.Module) -> bool:
    # Not hasattr, which is true of wrappers that forward to what they hold.
    return _METHOD in module.__dict__ or hasattr(type(module), _METHOD)
