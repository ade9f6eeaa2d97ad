"""The optimizer, `ewa_kernels.optim.AdamW`."""

from ewa_kernels.train.adamw import AdamW

__all__ = ["AdamW"]
