"""Time against T: linear, and on a GPU up to more than 2³¹ elements of the pre-activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.layer import training_pass
from benchmarks.parity import Gate, WrongResultError
from benchmarks.peer import Peer
from benchmarks.peers import BMM, OURS
from benchmarks.problem import make
from benchmarks.timing import Stopwatch, interleaved

# ViT-S's FFN; the last T on a GPU makes T·F = 2.4·10⁹ > 2³¹.
SIZES = {
    "cuda": (*(2**k for k in range(13, 21)), 3 * 2**19),
    "cpu": (512, 1024, 2048, 4096),
}
# The gate's float64 results must fit: longer ones are held by the tests (tests/big_indices.py).
LONGEST_GATED = 2**17


def run(device: str, peers: Sequence[Peer], seconds: float) -> list[dict[str, Any]]:
    """Forward and backward of this package and of eager bmm, a result for each T."""
    sizes = SIZES[device]
    base = Case("growth", 0, 384 if device == "cuda" else 192, 1536 if device == "cuda" else 768)
    results = []
    watch = Stopwatch(device)
    for num_tokens in sizes:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        case = replace(base, num_tokens=num_tokens, dtype=dtype)
        problem = make(case, device)
        functions = {peer.name: peer.build(case) for peer in peers if peer.name in (OURS, BMM)}
        head = {"sizes": case.sizes, "dtype": case.dtype_name, "num_tokens": num_tokens}
        try:
            if num_tokens <= LONGEST_GATED:
                gate = Gate(problem)
                for function in functions.values():
                    gate.check(function, problem)
                del gate
            variants = {name: training_pass(function, problem, watch) for name, function in functions.items()}
            timings = interleaved(variants, seconds / len(sizes), min_rounds=3)
        except (WrongResultError, torch.OutOfMemoryError) as error:
            results.append({**head, "peer": "all", "why_not": str(error).splitlines()[0]})
            break
        results += [{**head, "peer": name, **both.as_dict()} for name, (_, _, both) in timings.items()]
    return results
