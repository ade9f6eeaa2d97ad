"""What kernels of ours need of a GPU and its driver."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import extension

if extension.WHY_NOT is None:
    from .. import _C


_NOTHING = contextlib.nullcontext()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """In which kernels are launched where the tensor is."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING


def too_old(device: torch.device) -> str | None:
    """Why a GPU cannot run kernels of ours, CUDA's or Triton's; None if it can."""
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"it needs compute capability 8.0, the device has {capability}"


def old_driver() -> str | None:
    """Why the driver cannot run the CUDA part; None if it can: what was built with its own major version, or older."""
    driver, built = _C.cuda_versions()
    # Built with 12.1 or newer, a launch has parameters of more than 4 KB, which drivers for 12.0 refuse.
    if driver // 1000 >= built // 1000 and not driver < 12010 <= built:
        return None
    names = [f"{version // 1000}.{version % 1000 // 10}" for version in (built, driver)]
    return f"the extension is built with CUDA {names[0]}, the driver is for {names[1]}: update it, or build with that"


# What torch.compiler.assume_constant_result does, without importing the compiler, which cannot look into the call.
old_driver._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not_cuda(device: torch.device) -> str | None:
    """Why the CUDA part does not run on a GPU; None if it does."""
    return extension.WHY_NOT_CUDA or old_driver() or too_old(device)


def why_not_hopper(device: torch.device) -> str | None:
    """Why the kernels of csrc/hopper do not run on a device; None if they do."""
    if device.type != "cuda":
        return "it is for CUDA devices"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return f"it is for compute capability 9.0, the device has {torch.cuda.get_device_capability(device)}"
    if extension.WHY_NOT_CUDA is not None:
        return extension.WHY_NOT_CUDA
    if not extension.HAS_HOPPER:
        return f"the extension is built without the kernels for Hopper: {extension.HOW_TO}"
    return old_driver()
