"""`save_unfolded`, `load_unfolded_`: a file from which a dense model gets experts where the saved one had them.

It holds the model's state dict. Any other way to save and load that does as well, if the model that loads has gone
through the same `replace_ffn_`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, checks
from ..train import shards
from .ffns import FFNSite, find_ffns
from .layout import swap_modules_
from .replace import ReplacementReport, replaced_in, stand_in_

_FORMAT = "ewa_kernels.unfolded"
_VERSION = 2


def save_unfolded(model: nn.Module, path: str | os.PathLike[str], *, is_main_process: bool = True) -> None:
    """Saves a model with all its experts, for `load_unfolded_`. The file is complete or not there.

    Optimizer and averager have a `state_dict` of their own.

    Args:
        model: with experts that `replace_ffn_` made; a DDP or torch.compile wrapper is looked through.
        path: of the file.
        is_main_process: False writes nothing. Of a sharded model all processes must make the call, for it gathers.

    Raises:
        TypeError: `model` is not an nn.Module, or `path` not a path.
        ValueError: it holds no experts that `replace_ffn_` made.
        FileNotFoundError: the folder of `path` does not exist.
    """
    path = _path(path)
    model = _unwrapped(model)
    if not replaced_in(model):
        raise ValueError("model must hold experts that replace_ffn_ made, got none: save its state_dict")
    tensors = {k: v.full_tensor() if shards.is_sharded(v) else v for k, v in model.state_dict().items()}
    if not is_main_process:
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, got {path}")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with unfinished.open("wb") as file:
            torch.save({"format": _FORMAT, "version": _VERSION, "state_dict": tensors}, file)
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
    state_dict = _read(path)
    if replaced := replaced_in(model):
        _check_and_load(model, state_dict)
        return ReplacementReport(replaced=tuple(replaced), kept=(), skipped={})
    sites = find_ffns(model)
    chosen = [(site, number) for site in sites if (number := _num_experts(site, state_dict)) is not None]
    for site, _ in chosen:
        if site.skip_reason is not None:
            raise ValueError(f"model must be of the saved architecture, but its {site.name} {site.skip_reason}")
    new = stand_in_(model, chosen, "copy", backend)
    try:
        _check_and_load(model, state_dict)
    except BaseException:
        swap_modules_(model, {layer: layer.original() for layer in new})
        raise
    for layer in new:
        layer.release()
    return ReplacementReport(
        replaced=tuple(site.name for site, _ in chosen),
        kept=tuple(s.name for s in sites if s.skip_reason is None and s not in [site for site, _ in chosen]),
        skipped={s.name: s.skip_reason for s in sites if s.skip_reason is not None},
        forms={site.name: site.form for site, _ in chosen},
    )


def _num_experts(site: FFNSite, state_dict: Mapping[str, Any]) -> int | None:
    """Of the experts that a state dict has for an FFN, by their names in either form; None if it has none."""
    keys = [f"{site.name}.up.weight"]
    if site.projections is not None:
        dot = f"{site.holder}." if site.holder else ""
        keys.append(f"{dot}{site.projections.up[0]}.experts.weight")
    stacked = [state_dict[key] for key in keys if key in state_dict]
    return next((len(t) for t in stacked if isinstance(t, Tensor) and t.ndim == 3), None)


def _check_and_load(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Raises ValueError, before anything is changed, unless names and shapes are the model's."""
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
    if any(shards.is_sharded(parameter) for parameter in model.parameters()):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(model, state_dict, options=StateDictOptions(full_state_dict=True, strict=True))
    else:
        model.load_state_dict(state_dict, strict=True)


def _path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a PathLike, got {type(path).__name__}")
    return Path(path)


def _read(path: Path) -> dict[str, Any]:
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
    if not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"path must be a complete file of save_unfolded, got one without tensors: {path}")
    return content["state_dict"]


def _unwrapped(model: nn.Module) -> nn.Module:
    checks.module("model", model)
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model
