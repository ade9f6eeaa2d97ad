"""What a CUDA graph may keep: it repeats what the host knew while it was recorded, whatever the host knows later."""

from __future__ import annotations

import torch
from torch import Tensor


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on a device now is recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def replayable(name: str, value: Tensor, device: torch.device) -> Tensor:
    """A value that launches on `device` take, and that may be another one in each replay.

    A compiler may make a CUDA graph of what it traces: a value on the host is brought to the device by a step of the
    traced graph itself.

    Raises:
        RuntimeError: the value is on the CPU and a CUDA graph is being captured.
    """
    if device.type != "cuda" or value.device.type != "cpu":
        return value
    if torch.compiler.is_compiling():
        return value.to(device)
    check_replayable(name, value, device)
    return value


def check_replayable(name: str, value: object, device: torch.device) -> None:
    """Raises RuntimeError if a CUDA graph is being captured and a value that launches on a GPU take is on the host."""
    is_on_host = not isinstance(value, Tensor) or value.device.type == "cpu"
    if is_on_host and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name} must be a tensor on {device} while a CUDA graph is captured, got a value on the CPU, which every "
            "replay would repeat"
        )
