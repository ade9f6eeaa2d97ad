"""Who makes the matrix products of a call on a CPU, and in which type: C++ of our own (`csrc/layer/products.h`), which
looks rows up and puts them back as it goes, or PyTorch's library.

Which is faster depends on the processor. On an AMD EPYC ours are, on an Intel Xeon MKL's may be, and where a processor
multiplies 16 bits by AMX oneDNN's are. So the first large call of a kind tries both, for some 20 ms. The environment
decides instead with EWA_KERNELS_CPU_PRODUCTS=cpp or torch, and so does `torch.use_deterministic_algorithms(True)`, for
ours: then no bit of a result depends on a clock.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from ...problem import Problem
from .. import extension
from ..parameter_pass import DTYPES
from ..scratch import Scratch
from .cpp_rows import matrix

if extension.WHY_NOT is None:
    from ... import _C

ENVIRONMENT = "EWA_KERNELS_CPU_PRODUCTS"
SECONDS, LEAST_ROUNDS = 0.018, 2
# PyTorch's are taken if they need at most so much of our time. A trial does not see what ours save, which is to read
# and write once more what lies between products: on an Intel Xeon 10 to 40 % of a call.
WORTH_IT = 0.7
# Multiplications for each expert and projection from which on it is worth trying: those of 50 µs.
LARGE = 1 << 22
# Of a trial's product for each expert at the most: those of half a millisecond. Of its rows up to `TRIAL_ROWS`.
TRIAL_SIZE, TRIAL_ROWS, TRIAL_TERMS, TRIAL_WEIGHTS = 1 << 25, 512, 1024, 1 << 20
# Experts of a trial for each thread at the most: how C++ divides its work depends on whether each thread has some.
TRIAL_EXPERTS = 2
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


_lock = threading.Lock()


def products_of(problem: Problem) -> Products:
    """How those of a call are made; the same for all calls of its kind, backward too, which reads what forward kept."""
    if problem.backend != "cpp":
        return Products(problem.dtype, by_cpp=False)
    found: Products | None = problem.kept.get("products")
    if found is None:
        with _lock:  # of threads that call at the same time one chooses for all
            found = problem.kept.get("products")
            if found is None:
                found = problem.kept["products"] = _choose(problem)
    return found


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
    """Whether there are products in C++: with AVX-512, and for bfloat16 its instructions."""
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
    rows = problem.num_rows // problem.num_experts
    is_small = rows * problem.d_model * problem.num_up < LARGE
    if is_small or len(among) == 1 or torch.are_deterministic_algorithms_enabled():
        few = among[0].dtype == torch.bfloat16 and rows < FEW_ROWS
        return among[-1 if few else 0]
    # Sizes by powers of two: layers of about the same size need no trial of their own.
    sizes = (1 << (size - 1).bit_length() for size in (rows, problem.d_model, problem.d_ff))
    experts = min(problem.num_experts, TRIAL_EXPERTS * torch.get_num_threads())
    key = (*among, experts, torch.get_num_threads(), *sizes)
    if key not in _chosen:
        _chosen[key] = fastest(among, experts, rows, problem.d_model, problem.d_ff)
    return _chosen[key]


_chosen: dict[tuple[object, ...], Products] = {}


def fastest(among: list[Products], experts: int, rows: int, d_model: int, d_ff: int) -> Products:
    """Ours, unless PyTorch's are faster by enough."""
    seconds = trial(among, experts, rows, d_model, d_ff)
    ours, by_torch = among
    return by_torch if seconds[by_torch] <= WORTH_IT * seconds[ours] else ours


def trial(among: list[Products], experts: int, rows: int, d_model: int, d_ff: int) -> dict[Products, float]:
    """Seconds that each needs for a product of the forward and one of the backward: the least of some rounds.

    Args:
        rows: of each expert.
    """
    end = time.perf_counter() + SECONDS
    rows, terms = min(rows, TRIAL_ROWS), min(d_model, TRIAL_TERMS)
    columns = max(min(d_ff, TRIAL_SIZE // (rows * terms), TRIAL_WEIGHTS // terms), 1)
    calls = {products: _calls(products, experts, rows, terms, columns) for products in among}
    seconds = dict.fromkeys(among, float("inf"))
    for count in itertools.count(1):
        begin = time.perf_counter()
        for products, call in calls.items():
            before = time.perf_counter()
            call()
            now = time.perf_counter()
            seconds[products] = min(seconds[products], now - before)
        # The first round finds memory that is new, and libraries that were never called.
        if count >= LEAST_ROUNDS and now + (now - begin) > end:
            break
    return seconds


def _calls(products: Products, experts: int, rows: int, terms: int, columns: int) -> Callable[[], None]:
    """x · Wᵀ, and gᵀ · x, of each expert."""
    dtype, narrow = products.dtype, products.dtype == torch.bfloat16
    x, weight, grad = (
        torch.full(shape, 0.5, dtype=dtype, device="cpu")
        for shape in ((experts, rows, terms), (experts, columns, terms), (experts, rows, columns))
    )
    out, grad_weight = (
        torch.empty_like(grad),
        torch.empty_like(weight, dtype=torch.float32 if products.by_cpp else dtype),
    )

    def by_torch() -> None:
        torch.bmm(x, weight.mT, out=out)
        torch.bmm(grad.mT, x, out=grad_weight)

    def by_cpp() -> None:
        groups = [rows] * experts
        times = _C.TimesWeights(groups, terms, columns, matrix(x), 0, matrix(weight), True, narrow)
        outer = _C.Outer(groups, columns, terms, matrix(grad), 0, matrix(x), 0, narrow)
        scratch = Scratch(x.device, dtype)
        memory = scratch.address("layer", max(times.workspace_bytes, outer.workspace_bytes))
        times.multiply(memory, 0, 0, matrix(out))
        outer.multiply(memory, matrix(grad_weight), 0)
        scratch.leave()

    return by_cpp if products.by_cpp else by_torch
