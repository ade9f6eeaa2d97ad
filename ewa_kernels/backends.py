"""Which implementation runs an operation on a device, and why not another."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from . import checks
from .kernels import devices, extension, multiprocessors
from .kernels import triton as triton_kernels
from .version import VERSION

BACKENDS = (
    *("auto", "reference", "torch", "triton", "triton-single", "triton-split", "triton-onchip", "cublas"),
    *("hopper", "cuda", "cpp"),
)

# Best first: "auto" picks the first that can run. Of moe_ffn those behind "reference" are for who names them, and where
# a table says that they are faster than "triton", see `kernels/forms.py`.
IMPLEMENTED = {
    "random_permutation": ("triton", "cpp", "reference"),
    "moe_ffn": (
        *("triton", "cpp", "torch", "reference", "triton-single", "triton-split", "triton-onchip", "cublas", "hopper"),
    ),
    "expert_linear": ("triton", "cpp", "torch", "reference"),
    "average_experts_": ("cuda", "triton", "cpp", "reference"),
    "adamw": ("cuda", "cpp", "torch"),
    "merge_experts": ("triton", "cpp", "reference"),
}

_DESCRIPTIONS: dict[str | tuple[str, str], str] = {
    "reference": "the specification in plain PyTorch, differentiable by autograd",
    "torch": "PyTorch calls block by block, hand-written backward that keeps the pre-activation only",
    "triton": "Triton: the layer in one launch forward and one backward, averaging in one for each tensor",
    ("moe_ffn", "triton"): "Triton, one launch forward and one backward; on Hopper other forms where a table says so",
    "cublas": "PyTorch's matrix products, and Triton's passes over rows between them",
    "hopper": "CUDA for sm_90a, products and all between them; what it is not for by Triton",
    "cuda": "CUDA, one launch for all tensors",
    "cpp": "C++",
    ("moe_ffn", "cpp"): "C++, in part with PyTorch's matrix products",
    ("expert_linear", "triton"): "Triton, one launch forward, rows looked up and put back in it",
    ("expert_linear", "torch"): "PyTorch's products, an expert at a time",
    ("expert_linear", "cpp"): "C++, in part with PyTorch's matrix products",
    ("adamw", "torch"): "PyTorch's fused AdamW, and then average_experts_",
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
        found = _auto(operation, device, dtype)
        _warn_once_of_slowness(operation, found, device)
        return found
    reason = why_not(operation, backend, device, dtype)
    if reason is not None:
        raise BackendError(f"backend={backend!r} cannot run {operation} on {device}: {reason}")
    return backend


def _auto(operation: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    return next(b for b in IMPLEMENTED[operation] if _why_not_auto(operation, b, device, dtype) is None)


_warned: set[str] = set()


def _warn_once_of_slowness(operation: str, found: str, device: torch.device) -> None:
    """Where the extension would be faster and is not there: one warning for all operations on a kind of device."""
    missing = extension.WHY_NOT if device.type == "cpu" else None
    if device.type == "cuda":
        missing = extension.WHY_NOT_CUDA or devices.old_driver()
    expected = {"cpu": "cpp", "cuda": "cuda"}.get(device.type)
    # On AMD's GPUs there is nothing to install.
    if missing is None or torch.version.hip or device.type in _warned or expected not in IMPLEMENTED[operation]:
        return
    _warned.add(device.type)
    warnings.warn(
        f"{operation} runs on {device.type} by {found!r}, which is right but slower: {missing}. "
        "`python -m ewa_kernels` tells more.",
        stacklevel=2,
    )


def why_not(operation: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a backend cannot run an operation; None if it can."""
    if backend not in IMPLEMENTED[operation]:
        *others, last = IMPLEMENTED[operation]
        return f"ewa_kernels {VERSION} has {', '.join(others)} and {last} only"
    if backend in ("reference", "torch"):
        return None
    if operation in ("moe_ffn", "expert_linear") and dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it is for torch.float16, torch.bfloat16 and torch.float32, not {dtype}"
    if backend == "cpp":
        return extension.WHY_NOT if device.type == "cpu" else "it is for the CPU"
    if backend == "cuda":
        if device.type != "cuda":
            return "it is for CUDA devices"
        if torch.version.hip:
            return "it is for NVIDIA's GPUs"
        return devices.why_not_cuda(device)
    # Triton, in all its forms; Hopper's kernels leave to it what they are not for.
    if triton_kernels.WHY_NOT is not None:
        return triton_kernels.WHY_NOT
    if backend == "hopper":
        return devices.why_not_hopper(device)
    if device.type == "cuda":
        return devices.too_old(device)
    if device.type != "cpu":
        return "it is for CUDA devices"
    if not triton_kernels.INTERPRETED:
        return "on the CPU it needs Triton's interpreter: set TRITON_INTERPRET=1 before ewa_kernels is imported"
    return None


def _why_not_auto(operation: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why "auto" does not pick a backend; None if it may."""
    reason = why_not(operation, backend, device, dtype)
    if reason is None and backend.startswith("triton") and device.type != "cuda":
        return "Triton's interpreter is for tests"
    return reason


def set_sm_margin(number: int) -> None:
    """How many multiprocessors of each GPU the persistent kernels leave to others from now on, such as NCCL's.

    A persistent kernel keeps the multiprocessors it runs on until it is done, for milliseconds: a collective that DDP
    or FSDP starts meanwhile waits, unless some are left free. PyTorch's own carve-out counts as well; the larger number
    holds. Results have the same bits whatever the number is.

    Args:
        number: 0 (the default) or more; one multiprocessor is always used.

    Raises:
        TypeError, ValueError: not an int, or below 0.
    """
    checks.integer("number", number, minimum=0)
    multiprocessors.set_margin(number)


def chosen(device: torch.device) -> dict[str, dict[str, Any]]:
    """Of every operation the `backend` that "auto" picks, `what` that is, and `why_not` what would be faster there."""
    found = {}
    for operation, implemented in IMPLEMENTED.items():
        backend = _auto(operation, device)
        faster = (b for b in implemented[: implemented.index(backend)] if device.type == "cuda" or b == "cpp")
        found[operation] = {
            "backend": backend,
            "what": _DESCRIPTIONS.get((operation, backend)) or _DESCRIPTIONS[backend],
            "why_not": {name: str(_why_not_auto(operation, name, device)) for name in faster},
        }
    return found
