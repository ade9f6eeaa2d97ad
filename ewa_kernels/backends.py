"""Which implementation runs an operation on a device, and why not another."""

from __future__ import annotations

import torch

from ewa_kernels import checks
from ewa_kernels.kernels import cpp_rows
from ewa_kernels.version import VERSION

BACKENDS = ("auto", "reference", "torch", "triton", "cuda", "cpp")

# Best first: "auto" picks the first that can run.
_IMPLEMENTED = {
    "random_permutation": ("cpp", "reference"),
    "moe_ffn": ("cpp", "torch", "reference"),
    "average_experts_": ("reference",),
    "merge_experts": ("reference",),
}

_DESCRIPTIONS = {
    "reference": "the specification in plain PyTorch, differentiable by autograd",
    "torch": "PyTorch calls block by block, hand-written backward that keeps the pre-activation only",
    "cpp": "C++ (in moe_ffn: what lies between PyTorch's matrix products, in float32)",
}


class BackendError(ValueError, RuntimeError):
    """The backend asked for cannot run here: a wrong argument (ValueError) on this machine (RuntimeError)."""


def resolve(operation: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The implementation that `backend` stands for.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
        BackendError: it cannot run `operation` on `device` in `dtype`.
    """
    checks.choice("backend", backend, BACKENDS)
    if backend == "auto":
        return next(b for b in _IMPLEMENTED[operation] if why_not(operation, b, device, dtype) is None)
    reason = why_not(operation, backend, device, dtype)
    if reason is not None:
        raise BackendError(f"backend={backend!r} cannot run {operation} on {device}: {reason}")
    return backend


def why_not(operation: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a backend cannot run an operation; None if it can."""
    if backend not in _IMPLEMENTED[operation]:
        return f"ewa_kernels {VERSION} has {' and '.join(_IMPLEMENTED[operation])} only"
    if backend == "cpp":
        if device.type != "cpu":
            return "it is for the CPU"
        if dtype != torch.float32:
            return f"it is for torch.float32, not {dtype}"
        return cpp_rows.WHY_NOT
    return None


def table(device: torch.device) -> list[tuple[str, str, str]]:
    """(operation, backend that "auto" picks, what that is) for every operation, and why no faster one."""
    rows = []
    for operation, implemented in _IMPLEMENTED.items():
        backend = resolve(operation, "auto", device)
        rows.append((operation, backend, _DESCRIPTIONS[backend]))
        for faster in implemented[: implemented.index(backend)]:
            rows.append(("", f"not {faster}", str(why_not(operation, faster, device))))
    return rows
