"""Older path of `ewa_kernels.models`."""
