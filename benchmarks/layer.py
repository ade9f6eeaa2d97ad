"""One case: every peer past the parity gate, then all by turns, forward and backward."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.cases import PHASES, Case
from benchmarks.floors import Floors
from benchmarks.parity import Function, Gate, WrongResultError
from benchmarks.peer import Peer
from benchmarks.peers import BMM
from benchmarks.problem import Problem, make
from benchmarks.timing import Sample, Stopwatch, Variant

Result = dict[str, Any]


def training_pass(function: Function, problem: Problem, watch: Stopwatch) -> Variant:
    """Forward and backward as a variant of three phases: forward, backward and both. Tokens are dealt anew.

    As in a training loop: gradients of the step before are dropped first, and `.backward()` leaves new ones in `.grad`.
    It copies those that do not lie as their parameter does, which `torch.autograd.grad` would hand out as they are.
    """
    y: Tensor

    def forward() -> None:
        nonlocal y
        for leaf in problem.leaves.values():
            leaf.grad = None
        y = function(problem, None)

    def backward() -> None:
        y.backward(problem.grad_y)

    def variant() -> Sample:
        taken = watch.phase(forward), watch.phase(backward)
        return *taken, sum(taken)

    return variant


def run(case: Case, device: str, peers: Sequence[Peer], seconds: float, compiling: bool = True) -> list[Result]:
    """A result for each peer: what it took, or `why_not`.

    Args:
        seconds: for the rounds of all peers together; gates and first calls come on top.
        compiling: whether there is time to compile anything.
    """
    torch._dynamo.reset()  # compiled peers of other cases count against its limit of recompilations
    problem = make(case, device)
    gates: dict[int, Gate] = {}
    able: dict[str, tuple[Function, Problem]] = {}
    results: dict[str, Result] = {}
    for peer in peers:
        results[peer.name] = result = _head(case, peer)
        reason = peer.why_not(case, device)
        if reason is None and peer.compiled and not (case.compiled and compiling):
            reason = "not compiled here, for want of time"
        if reason is not None:
            result["why_not"] = reason
            continue
        own = peer.prepare(problem)
        try:
            function = peer.build(case)
            result["first_call_s"] = round(_first_call(function, own, device), 4)
            if own.case.num_experts not in gates:
                gates[own.case.num_experts] = Gate(own)
            gates[own.case.num_experts].check(function, own)
        except WrongResultError as error:
            result["why_not"] = str(error)
        except Exception as error:  # whatever a library may raise: the others go on
            result["why_not"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            able[peer.name] = function, own
    del gates
    watch = Stopwatch(device)
    variants = {name: training_pass(function, own, watch) for name, (function, own) in able.items()}
    samples = timing.rounds(variants, seconds)
    for name, taken in samples.items():
        results[name] |= _measured(case, taken, samples.get(BMM)) | _resources(*able[name], device)
    return list(results.values())


def _head(case: Case, peer: Peer) -> Result:
    return {"case": case.name, "dtype": case.dtype_name, "sizes": case.sizes, "peer": peer.name}


def _first_call(function: Function, problem: Problem, device: str) -> float:
    """Seconds of the first forward and backward, compilation and all."""
    start = time.perf_counter()
    _call(function, problem)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _call(function: Function, problem: Problem) -> tuple[Tensor, ...]:
    y = function(problem, None)
    return torch.autograd.grad(y, list(problem.leaves.values()), problem.grad_y)


def _measured(case: Case, samples: list[Sample], baseline: list[Sample] | None) -> Result:
    """Of each phase: milliseconds, TFLOP/s, and how many times as long as the baseline it takes."""
    result: Result = {"intensity": round(case.operations("both") / case.least_bytes("both"), 3)}
    for phase, taken in zip(PHASES, timing.timings(samples), strict=True):
        result[phase] = {**taken.as_dict(), "tflops": round(case.operations(phase) / taken.median / 1e9, 4)}
    if baseline is not None:
        for phase, ratio in zip(PHASES, timing.ratios(samples, baseline), strict=True):
            result[phase]["to_bmm"] = ratio.as_dict()
    return result


def relate(case: Case, results: Sequence[Result], floors: Floors) -> None:
    """Adds to each phase its floor in milliseconds, and what part of the time taken that is."""
    for phase in PHASES:
        floor = 1e3 * floors.seconds(case, phase)
        for result in results:
            if phase in result:
                taken = result[phase]
                taken |= {"floor": round(floor, 5), "of_floor": round(floor / taken["median"], 4)}


def _resources(function: Function, problem: Problem, device: str) -> Result:
    call = functools.partial(_call, function, problem)
    result: Result = {"peak_bytes": timing.peak_bytes(call, device)}
    if device == "cuda":
        result["launches"] = timing.num_launches(call)
        result["host_ms"] = round(_host_ms(call), 4)
    return result


def _host_ms(call: functools.partial[Any]) -> float:
    """Milliseconds that the host needs to launch forward and backward, while the GPU sleeps."""
    samples = []
    for _ in range(5):
        torch.cuda.synchronize()
        torch.cuda._sleep(int(timing.CYCLES_PER_SECOND * timing.MAX_HEAD_START))
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return 1e3 * sorted(samples)[2]
