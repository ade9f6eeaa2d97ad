"""A whole run within a budget of time: what is measured in which order, and what is left out when time runs short."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import cases, experts, floors, growth, host, layer, training_step
from benchmarks.cases import Case
from benchmarks.environment import environment
from benchmarks.floors import Floors
from benchmarks.peers import OURS, peers

# What may take long, because it is compiled, comes late: it is left out first.
SECTIONS = ("layer", "growth", "training_step", "experts", "host")
BUDGET = {"cpu": 230, "cuda": 540}  # seconds
# Parts of the budget that go into rounds. What is left is for parity gates, first calls and compiling.
ROUNDS = {"layer": 0.4, "experts": 0.1, "training_step": 0.12, "growth": 0.04, "host": 0.04}
# No case begins, and nothing is compiled, when less than these parts of the budget are left.
RESERVE = {"layer": 0.35, "training_step": 0.1, "growth": 0.03}
RESERVE_FOR_COMPILING = {"layer": 0.5, "training_step": 0.3}

Run = dict[str, Any]


class Budget:
    """`seconds` from now on."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self, part: float) -> bool:
        """Whether at least this part of it is left."""
        return self._end - time.monotonic() >= part * self.seconds


def run(
    device: str,
    seconds: float,
    sections: Sequence[str] = SECTIONS,
    chosen: Sequence[Case] | None = None,
    save: Callable[[Run], None] = lambda run: None,
    say: Callable[[str], None] = lambda text: None,
) -> Run:
    """Measures everything, and calls `save` after each case and section with what there is by then.

    Args:
        chosen: the layer's cases, in place of the device's.
    """
    torch.manual_seed(0)
    budget = Budget(seconds)
    all_cases = cases.cases(device) if chosen is None else tuple(chosen)
    result: Run = {"environment": environment(device), "layer": []}
    for section in sections:
        say(f"{section} …")
        rounds = ROUNDS[section] * seconds
        if section == "layer":
            measured: list[tuple[Case, list[Run]]] = []
            roof = floors.measure(device, [case.dtype for case in all_cases])
            for case in all_cases:
                if budget.left(RESERVE["layer"]):
                    say(f"  {case}")
                    compiling = budget.left(RESERVE_FOR_COMPILING["layer"])
                    measured.append((case, layer.run(case, device, peers(), rounds / len(all_cases), compiling)))
                else:
                    measured.append((case, [_left_out(case)]))
                _relate(result, measured, roof)
                save(result)
            # Once more: what else ran on the machine may have left at another time than at the first.
            _relate(result, measured, roof.best(floors.measure(device, [case.dtype for case in all_cases])))
        elif section == "experts":
            result["experts"] = experts.run(device, rounds)
        elif section == "host":
            result["host"] = host.run(device, rounds)
        elif section == "training_step":
            result["training_step"] = _training_steps(device, budget, rounds)
        elif budget.left(RESERVE["growth"]):
            result["growth"] = growth.run(device, peers(), rounds)
        else:
            say("  left out, for want of time")
        save(result)
    return result


def _relate(result: Run, measured: Sequence[tuple[Case, list[Run]]], roof: Floors) -> None:
    for case, of_case in measured:
        layer.relate(case, of_case, roof)
    result["floors"] = asdict(roof)
    result["layer"] = [r for _, of_case in measured for r in of_case]


def _left_out(case: Case) -> Run:
    head = {"case": case.name, "dtype": case.dtype_name, "sizes": case.sizes}
    return {**head, "peer": OURS, "why_not": "left out, for want of time"}


def _training_steps(device: str, budget: Budget, rounds: float) -> list[Run]:
    vits = training_step.GPU_CASES if device == "cuda" else training_step.CPU_CASES
    results: list[Run] = []
    for vit in vits:
        if not budget.left(RESERVE["training_step"]):
            results.append({"case": vit.name, "variant": "all", "why_not": "left out, for want of time"})
            continue
        compiling = budget.left(RESERVE_FOR_COMPILING["training_step"])
        results += training_step.run(vit, device, rounds / len(vits), compiling)
    return results
