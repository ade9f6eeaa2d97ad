"""For a look while one works: `pytest benchmarks/quick.py --benchmark-enable`. What counts comes of `make bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import experts
from benchmarks.cases import QUICK_CASES, Case
from benchmarks.parity import Gate
from benchmarks.peer import Peer
from benchmarks.peers import BMM, LOOP, OURS, peers
from benchmarks.problem import make

Benchmark = Callable[[Callable[[], object]], Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEERS = [peer for peer in peers() if peer.name in (OURS, BMM, LOOP)]


@pytest.mark.parametrize("case", QUICK_CASES, ids=str)
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_layer(benchmark: Benchmark, peer: Peer, case: Case) -> None:
    """Forward and backward, past the parity gate."""
    problem = make(case, DEVICE)
    function = peer.build(case)
    Gate(problem).check(function, problem)
    leaves = list(problem.leaves.values())

    def step() -> None:
        torch.autograd.grad(function(problem, None), leaves, problem.grad_y)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(step)


@pytest.mark.parametrize("operation", ["averaging", "AdamW and averaging"])
def test_experts(benchmark: Benchmark, operation: str) -> None:
    call = experts.subject(operation, DEVICE)

    def step() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(step)
