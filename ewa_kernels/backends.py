"""Which implementation runs an operation on a device, and why not another."""

from __future__ import annotations

import torch

from ewa_kernels.version import VERSION

BACKENDS = ("auto", "reference", "torch", "triton", "cuda", "cpp")

# What "auto" may pick, best first. Every entry runs on any device.
_IMPLEMENTED = {
    "random_permutation": ("reference",),
    "moe_ffn": ("torch", "reference"),
    "average_experts_": ("reference",),
    "merge_experts": ("reference",),
}

_DESCRIPTIONS = {
    "reference": "the specification in plain PyTorch, differentiable by autograd",
    "torch": "PyTorch calls block by block, hand-written backward that keeps the pre-activation only",
}


class BackendError(ValueError, RuntimeError):
    """The backend asked for cannot run here: a wrong argument (ValueError) on this machine (RuntimeError)."""


def resolve(operation: str, backend: str, device: torch.device) -> str:
    """The implementation that `backend` stands for.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
        BackendError: it has no implementation of `operation` that can run on `device`.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    implemented = _IMPLEMENTED[operation]
    if backend == "auto":
        return implemented[0]
    if backend not in implemented:
        reason = why_not(backend) if backend not in _DESCRIPTIONS else f"it has {' and '.join(implemented)} only"
        raise BackendError(f"backend={backend!r} cannot run {operation} on {device}: {reason}")
    return backend


def why_not(backend: str) -> str:
    """Why a backend without an implementation cannot run."""
    return f"ewa_kernels {VERSION} has no {backend} kernels yet"


def table(device: torch.device) -> list[tuple[str, str, str]]:
    """(operation, backend that "auto" picks, what that is) for every operation."""
    rows = []
    for operation in _IMPLEMENTED:
        backend = resolve(operation, "auto", device)
        rows.append((operation, backend, _DESCRIPTIONS[backend]))
    return rows
