"""How many multiprocessors a persistent launch takes, and how many it leaves to others."""

from __future__ import annotations

import functools

import torch

from .. import private_torch

_margin = 0


def set_margin(number: int) -> None:
    """How many multiprocessors of each GPU are left free from now on."""
    global _margin
    _margin = number


def left_free(device: torch.device) -> int:
    """Those that the caller, or PyTorch's carve-out for its own kernels, wants left to others: the larger number."""
    if device.type != "cuda":
        return _margin
    return max(_margin, private_torch.multiprocessor_carveout())


@functools.cache
def count(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # of the interpreter, to have several
    return torch.cuda.get_device_properties(device).multi_processor_count
