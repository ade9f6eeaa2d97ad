"""`save_pretrained` of a model with experts saves what the folded model would.

Unfolded weights have names that the dense model does not know: loaded with `from_pretrained`, its FFNs would keep their
random initialisation, with no more than a warning.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

import ewa_kernels.functional as functional
from ewa_kernels.surgery.replaced import ReplacedFFN, folded, replaced_ffns

_METHOD = "save_pretrained"
NOT_LOADABLE = "_ewa_not_loadable"  # attribute of modules whose weights no library's class has
_TENSORS = ("up.weight", "up.bias", "down.weight", "down.bias")
# Whose models may come to hold a model with experts, after `replace_ffn_` too.
_LIBRARIES = (("transformers.modeling_utils", "PreTrainedModel"), ("huggingface_hub.hub_mixin", "ModelHubMixin"))
# What torch's wrappers put into names, and may leave out of state_dict keys.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def guard_save_pretrained(*models: nn.Module) -> None:
    """Makes `save_pretrained` of each class in these models save folded weights of models with experts.

    Of transformers' and huggingface_hub's base classes too, if loaded: what holds a model need not be inside it. For a
    model without experts of `replace_ffn_` the method does what it did. A `state_dict` that the caller gives is folded,
    and may come from a wrapper (DDP, FSDP, torch.compile). Of a model after `fold_moe_` it raises ValueError.
    """
    classes = {type(module) for model in models for module in model.modules()}
    classes |= {getattr(sys.modules[module], name) for module, name in _LIBRARIES if module in sys.modules}
    for own in classes:
        base = next((base for base in own.__mro__ if _METHOD in vars(base)), None)
        if base is not None and inspect.isfunction(vars(base)[_METHOD]):
            setattr(base, _METHOD, _guarded(vars(base)[_METHOD]))


def _guarded(method: Any) -> Any:
    if hasattr(method, "_saves_folded"):
        return method

    @functools.wraps(method)
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, nn.Module):
            _check_loadable(self)
        layers = replaced_ffns(self) if isinstance(self, nn.Module) else {}
        if not layers:
            return method(self, *args, **kwargs)
        call = inspect.signature(method).bind(self, *args, **kwargs)
        holder = call.arguments
        for parameter in call.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD and "state_dict" not in holder:
                holder = call.arguments.get(parameter.name, holder)
        if holder.get("state_dict") is not None:
            holder["state_dict"] = fold_state_dict(self, holder["state_dict"])
            return method(*call.args, **call.kwargs)
        with folded(self, layers.values()):
            return method(*call.args, **call.kwargs)

    save_pretrained._saves_folded = True  # type: ignore[attr-defined]
    return save_pretrained


def _check_loadable(model: nn.Module) -> None:
    """Of modules that no class of the library has, as `fold_moe_` leaves them.

    Raises:
        ValueError: there is one.
    """
    for name, module in model.named_modules():
        if getattr(module, NOT_LOADABLE, False):
            raise ValueError(
                f"save_pretrained must have what {type(model).__name__}.from_pretrained can load, got a "
                f"{type(module).__name__} at {name}: save model.state_dict() with torch.save; a model made by "
                "replace_moe_ and fold_moe_ loads it"
            )


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
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    folded: dict[str, Any] = {}
    done: set[str] = set()
    for key, value in state_dict.items():
        path, tensor = _split(key)
        name = plain.get(_plain(path), "")
        if tensor == "":
            folded[key] = value
        elif name in layers:
            if path not in done:
                done.add(path)
                layer = layers[name]
                which = names[layer].index(name)  # of several places where the layer stands
                for end, mean in _dense(layer, path, state_dict).items():
                    holder, end = layer.place_of(end)
                    folded[f"{_beside(path, name, names[holder][which])}.{end}"] = mean
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
    return {name: tensor.clone() for name, tensor in layer.layout.unstack(merged).items()}


def _beside(path: str, name: str, other: str) -> str:
    """What `other` is called in a dict where `name` is called `path`; both are names in the model."""
    ours, its = name.split("."), other.split(".")
    while ours and its and ours[0] == its[0]:  # the names part inside the block, below any wrapper
        ours, its = ours[1:], its[1:]
    root = path.split(".")[: -len(ours)] if ours else path.split(".")
    return ".".join([*root, *its])


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
