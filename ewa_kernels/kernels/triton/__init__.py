"""Triton kernels: `moe_ffn` has the layer's forward and backward, `cublas` has them by a library's products,
`averaging` the experts' averaging."""

from __future__ import annotations

import torch

try:
    import triton
except ImportError:
    WHY_NOT: str | None = "Triton is not installed: pip install triton"
    INTERPRETED = False
else:
    from . import averaging, codec, cublas, exchange, merging, moe_ffn, permutation

    WHY_NOT = None
    if torch.version.hip:
        WHY_NOT = "its programs hand results to one another in ways that were proven on NVIDIA's GPUs only"
    INTERPRETED = triton.knobs.runtime.interpret


def runs(backend: str) -> bool:
    """Whether Triton kernels do what is between a backend's products, or all of it."""
    return backend in ("cublas", "hopper") or backend.startswith("triton")


__all__ = [
    "INTERPRETED",
    "WHY_NOT",
    "averaging",
    "codec",
    "cublas",
    "exchange",
    "merging",
    "moe_ffn",
    "permutation",
    "runs",
]
