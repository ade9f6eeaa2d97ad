"""Checkpoints with the experts in them, to resume training: `save_unfolded` and `load_unfolded_`."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ewa_kernels.backends as backends
import ewa_kernels.checks as checks
import ewa_kernels.train.shards as shards
from ewa_kernels.surgery.replace import ReplacementReport, stand_in_
from ewa_kernels.surgery.replaced import ReplacedFFN, put_back_, replaced_ffns
from ewa_kernels.surgery.sites import FFNSite, find_ffns

_FORMAT = "ewa_kernels.unfolded"
_VERSION = 1
_OPTIONS = ("num_experts", "d_model", "d_ff", "activation", "gated")


def save_unfolded(model: nn.Module, path: str | os.PathLike[str], *, is_main_process: bool = True) -> None:
    """Saves a model with all its experts, and which FFNs they stand for, for `load_unfolded_`.

    Optimizer and averager have a `state_dict` of their own. The file is complete or not there.

    Args:
        model: with layers that `replace_ffn_` made; a DDP or torch.compile wrapper is looked through.
        path: of the file.
        is_main_process: False writes nothing. Of a sharded model all processes must make the call, for it gathers.

    Raises:
        TypeError: `model` is not an nn.Module, or `path` not a path.
        ValueError: it holds no experts that `replace_ffn_` made, or an extra state that could not be loaded.
        FileNotFoundError: the folder of `path` does not exist.
    """
    path = _path(path)
    model = _unwrapped(model)
    layers = _layers(model)
    if not layers:
        raise ValueError("model must hold experts that replace_ffn_ made, got none: save its state_dict")
    tensors = {key: _whole(value) for key, value in model.state_dict().items()}
    if not is_main_process:
        return
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "sites": {name: _options(layer) for name, layer in layers.items()},
        "state_dict": tensors,
    }
    for key, value in tensors.items():
        if not _is_plain(value):
            raise ValueError(f"model must have extra states of plain types, got {type(value).__name__} in {key}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, got {path}")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with unfinished.open("wb") as file:
            torch.save(content, file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_unfolded_(model: nn.Module, path: str | os.PathLike[str], *, backend: str = "auto") -> ReplacementReport:
    """Makes a model the one that `save_unfolded` saved, in place.

    A dense model gets experts where the saved one had them: make the optimizer after this call. A model that has
    them there already keeps its parameters, and its optimizer, and gets the values.

    Args:
        model: of the saved model's architecture; a DDP or torch.compile wrapper is looked through.
        path: of the file. Nothing in it is executed.
        backend: of new layers; see `ewa_kernels.functional.moe_ffn`.

    Returns:
        What was replaced, now or before, and what was not.

    Raises:
        TypeError: `model` is not an nn.Module, or `path` not a path.
        ValueError: not such a file; or the model is of another architecture, has experts elsewhere, or is on the meta
            device. The model is as it was then.
        FileNotFoundError: no file.
    """
    checks.choice("backend", backend, backends.BACKENDS)
    path = _path(path)
    model = _unwrapped(model)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model must have memory to load into, got one on meta: use model.to_empty(device=…) first")
    sites, state_dict = _read(path)
    layers = _layers(model)
    if layers:
        if set(layers) != set(sites):
            differing = ", ".join(sorted(set(layers) ^ set(sites)))
            raise ValueError(
                f"model must be dense or have experts where the saved one had them, differs at {differing}"
            )
        _check(model, sites, state_dict)
        _load(model, state_dict)
        return ReplacementReport(replaced=tuple(layers), kept=(), skipped={})
    found = _found(model, sites)
    new = stand_in_(
        model, [(found[place], options["num_experts"]) for place, options in sites.items()], "copy", backend
    )
    try:
        _check(model, sites, state_dict)
        _load(model, state_dict)
    except BaseException:
        put_back_(model, {layer: layer.ffn for layer in new})
        raise
    for layer in new:
        layer.release()
    return ReplacementReport(
        replaced=tuple(site.name for place, site in found.items() if place in sites),
        kept=tuple(s.name for place, s in found.items() if place not in sites and s.skip_reason is None),
        skipped={site.name: site.skip_reason for site in found.values() if site.skip_reason is not None},
    )


def _path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a PathLike, got {type(path).__name__}")
    return Path(path)


def _is_plain(value: Any) -> bool:
    """Whether `torch.load` reads it without executing code."""
    if isinstance(value, Tensor):
        return True
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # of many kinds, for what is not such a file
        raise ValueError(f"path must be a file that save_unfolded wrote, cannot read {path}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"path must be a file that save_unfolded wrote, got another in {path}")
    if content.get("version") != _VERSION:
        raise ValueError(f"path must be of version {_VERSION}, got {content.get('version')}: {path}")
    sites, state_dict = content.get("sites"), content.get("state_dict")
    if not isinstance(sites, dict) or not isinstance(state_dict, dict):
        raise ValueError(f"path must be a complete file of save_unfolded, got one without sites or tensors: {path}")
    for place, options in sites.items():
        num_experts = options.get("num_experts") if isinstance(options, dict) else None
        if not isinstance(num_experts, int) or num_experts < 1:
            raise ValueError(
                f"path must be a file that save_unfolded wrote, has {num_experts} experts in {place}: {path}"
            )
    return sites, state_dict


def _found(model: nn.Module, sites: Mapping[str, Mapping[str, Any]]) -> dict[str, FFNSite]:
    """The model's FFNs by the places of their layers. Raises ValueError unless all `sites` are among them."""
    found = {_place(site): site for site in find_ffns(model)}
    for place in sites:
        if place not in found:
            raise ValueError(f"model must be of the saved architecture, has no FFN {place}")
        if (reason := found[place].skip_reason) is not None:
            raise ValueError(f"model must be of the saved architecture, but its {place} {reason}")
    return found


def _place(site: FFNSite) -> str:
    """The name that a layer in place of this FFN has."""
    if site.block is None:
        return site.name
    return f"{site.name}.{site.block.up}" if site.name else site.block.up


def _check(model: nn.Module, sites: Mapping[str, Mapping[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError unless loading will succeed."""
    for name, layer in _layers(model).items():
        ours = _options(layer)
        for option in _OPTIONS:
            if ours[option] != sites[name].get(option):
                raise ValueError(f"model must have {option} = {sites[name].get(option)} in {name}, got {ours[option]}")
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"model must have the saved tensors; the file lacks {', '.join(missing) or 'none'} "
            f"and has beside them {', '.join(unexpected) or 'none'}"
        )
    for key, tensor in own.items():
        if isinstance(tensor, Tensor) and tensor.shape != getattr(state_dict[key], "shape", None):
            got = list(getattr(state_dict[key], "shape", []))
            raise ValueError(
                f"model must have the saved shapes; its {key} has {list(tensor.shape)}, the saved one {got}"
            )


def _load(model: nn.Module, state_dict: dict[str, Any]) -> None:
    if any(shards.is_sharded(parameter) for parameter in model.parameters()):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(model, state_dict, options=StateDictOptions(full_state_dict=True, strict=True))
    else:
        model.load_state_dict(state_dict, strict=True)


def _layers(model: nn.Module) -> dict[str, ReplacedFFN]:
    """Each under its first name, by which `find_ffns` knows it."""
    named = replaced_ffns(model)
    return {name: layer for name, layer in model.named_modules() if name in named}


def _options(layer: ReplacedFFN) -> dict[str, Any]:
    return {option: getattr(layer, option) for option in _OPTIONS}


def _whole(value: Any) -> Any:
    return value.full_tensor() if shards.is_sharded(value) else value


def _unwrapped(model: nn.Module) -> nn.Module:
    checks.module("model", model)
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model
