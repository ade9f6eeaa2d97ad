"""Older path of `ewa_kernels.models.replaced`."""

from ewa_kernels.models.replaced import ReplacedFFN

__all__ = ["ReplacedFFN"]
