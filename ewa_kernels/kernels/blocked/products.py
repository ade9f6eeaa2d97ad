"""Who makes the matrix products of a call on a CPU, and in which type: C++ of our own (`csrc/layer/products.h`), which
looks rows up and puts them back as it goes, or PyTorch's library.

The processor's instructions and the call's sizes decide, and no clock: with the same seed and as many threads, two runs
have the same bits. With AVX-512 ours do: on an AMD EPYC PyTorch's take 1.1 to 2 times as long, on an Intel Xeon 0.98 to
1.24 times. But oneDNN's are faster in bfloat16 with AMX, or where an expert has few rows. In the environment
EWA_KERNELS_CPU_PRODUCTS=cpp or torch decides instead, as far as the processor has them; it is read at the first call of
each size.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from ...problem import Problem
from .. import extension
from ..parameter_pass import DTYPES

if extension.WHY_NOT is None:
    from ... import _C

ENVIRONMENT = "EWA_KERNELS_CPU_PRODUCTS"
# Of so few rows of an expert PyTorch makes products of bfloat16 faster than C++ does, which packs more.
FEW_ROWS = 256


class Products(NamedTuple):
    """How matrix products are made.

    Attributes:
        dtype: what numbers are rounded to before they are multiplied.
        by_cpp: whether C++ makes them, and all else, in one call; if not, PyTorch does, block by block.
    """

    dtype: torch.dtype
    by_cpp: bool


def products_of(problem: Problem) -> Products:
    """How those of a call are made; the same for all calls of its kind, backward too, which reads what forward kept."""
    if problem.backend != "cpp":
        return Products(problem.dtype, by_cpp=False)
    found: Products | None = problem.kept.get("products")
    return found or problem.kept.setdefault("products", _choose(problem))


def candidates(dtype: torch.dtype) -> list[Products]:
    """All that this processor makes at full speed, ours first."""
    is_fast = dtype == torch.float32 or _has_fast(dtype)
    by_torch = Products(dtype if is_fast else torch.float32, by_cpp=False)
    if have_cpp(dtype):
        return [Products(dtype, by_cpp=True), by_torch]
    if have_cpp(torch.float32) and (dtype == torch.float16 or not is_fast):
        return [Products(torch.float32, by_cpp=True), by_torch]
    return [by_torch]


def have_cpp(dtype: torch.dtype) -> bool:
    """Whether there are products in C++: with AVX-512, and for bfloat16 its instructions, but not with AMX."""
    return bool(_C.have_products(DTYPES[dtype]))


def _has_fast(dtype: torch.dtype) -> bool:
    """Whether PyTorch has products of 16 bits that are not some twenty times as slow as in float32."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, name)())


def _choose(problem: Problem) -> Products:
    among = candidates(problem.dtype)
    wanted = os.environ.get(ENVIRONMENT, "auto")
    if wanted not in ("auto", "cpp", "torch"):
        raise ValueError(f"{ENVIRONMENT} must be auto, cpp or torch, got {wanted!r}")
    if wanted != "auto":
        return among[0 if wanted == "cpp" else -1]
    few = among[0].dtype == torch.bfloat16 and problem.num_rows // problem.num_experts < FEW_ROWS
    return among[-1 if few else 0]
