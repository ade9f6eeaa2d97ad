"""The layer in single launches of Triton kernels: `ffn` has its forward and its backward."""

from __future__ import annotations

try:
    import triton
except ImportError:
    WHY_NOT: str | None = "Triton is not installed: pip install triton"
    INTERPRETED = False
else:
    from ewa_kernels.kernels.fused import ffn, partition

    WHY_NOT = None
    INTERPRETED = triton.knobs.runtime.interpret

__all__ = ["INTERPRETED", "WHY_NOT", "ffn", "partition"]
