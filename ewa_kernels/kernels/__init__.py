"""Implementations of the operations, one file each; `ewa_kernels.ops` binds them."""
