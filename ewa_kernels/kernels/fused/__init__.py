"""Triton kernels: `ffn` has the layer's forward and backward, `averaging` the experts'."""

from __future__ import annotations

try:
    import triton
except ImportError:
    WHY_NOT: str | None = "Triton is not installed: pip install triton"
    INTERPRETED = False
else:
    from ewa_kernels.kernels.fused import averaging, ffn, partition

    WHY_NOT = None
    INTERPRETED = triton.knobs.runtime.interpret

__all__ = ["INTERPRETED", "WHY_NOT", "averaging", "ffn", "partition"]
