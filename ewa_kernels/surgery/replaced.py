"""Older path of `ewa_kernels.models.replaced`."""

from ..models.replaced import ReplacedFFN

__all__ = ["ReplacedFFN"]
