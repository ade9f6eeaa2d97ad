"""The optimizer, `ewa_kernels.optim.AdamW`."""

from .train.adamw import AdamW

__all__ = ["AdamW"]
