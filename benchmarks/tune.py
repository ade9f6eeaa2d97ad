"""`python -m benchmarks.tune`: what each form of the layer takes on this GPU, phase by phase, for real shapes.

Kernels alone, by events, with a cold second cache; all forms of a shape take turns, once they computed the same. Then
the passes over rows between a library's products, of a copy of as many bytes. Writes `forms-<device>.json`, which
`EWA_KERNELS_FORMS=<file>` makes the package heed; `--ship` puts it into `ewa_kernels/kernels/forms.json` in place of
what was predicted for this kind of GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import floors, model, peers, problem
from benchmarks.cases import Case
from benchmarks.environment import environment
from benchmarks.parity import differs
from benchmarks.timing import Stopwatch, Variant, interleaved, timed
from ewa_kernels.kernels import devices, forms, hopper
from ewa_kernels.kernels import moe_ffn as kernels
from ewa_kernels.kernels.triton import cublas
from ewa_kernels.kernels.triton.layer import Layer
from ewa_kernels.problem import Deal, Inputs, Options, Problem

ROUNDS = 11
SEED = 1
TOLERANCE = 1e-2  # between forms, in norm


def backend_of(form: str) -> str:
    """How the public functions call a form."""
    return form if form in ("cublas", "hopper") else f"triton-{form}"


class Operands:
    """The operands of a shape, and what each form makes of them."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype):
        made = problem.make(replace(case, dtype=dtype), device)
        leaves: dict[str, Any] = dict.fromkeys(Inputs._fields)
        leaves |= {name: leaf.detach() for name, leaf in made.leaves.items()}
        self.case, self.grad_y = case, made.grad_y
        self.inputs = Inputs(**leaves)
        self.dense = made.as_dense()

    def problem(self, form: str) -> Problem:
        options = Options(self.case.activation, self.case.gated, 0.0, backend_of(form), "full")
        return Problem.of(self.inputs, False, options, saved="full")

    def layer(self, form: str) -> Layer:
        return Layer(self.problem(form), self.inputs, Deal(SEED))

    def forms(self, phase: str) -> Iterator[str]:
        """Those that there are for this shape; the first is what others are held against."""
        fits = self.layer("single").onchip_tile() is not None
        yield from ("single", "split", "cublas")
        if devices.why_not_hopper(self.grad_y.device) is None:
            yield "hopper"
        if phase == "forward" and fits:
            yield "onchip"

    def forward(self, form: str) -> tuple[Tensor, Tensor | None, Tensor]:
        problem = self.problem(form)
        of_backend = kernels.of(problem)
        return of_backend.forward(problem, of_backend.prepared(problem, self.inputs), Deal(SEED))

    def backward_of(self, form: str) -> Callable[[], list[Tensor]]:
        """The backward after a forward of the same form."""
        problem, (_, pre_activation, permutation) = self.problem(form), self.forward(form)
        of_backend = kernels.of(problem)
        inputs = of_backend.prepared(problem, self.inputs)
        needed = [t is not None for t in inputs]

        def backward() -> list[Tensor]:
            deal = Deal(SEED, permutation)
            grads = of_backend.backward(problem, self.grad_y, inputs, deal, pre_activation, needed)
            return [grad for grad in grads if grad is not None]

        return backward

    def beside(self, phase: str) -> dict[str, Callable[[], Any]]:
        """What forms are held against: the dense FFN, and a library's products with nothing between them."""
        (x, up, _, down, *_), experts = self.inputs, self.case.num_experts
        y = peers.dense(self.case)(self.dense, None)
        rows = x[: len(x) // experts * experts].view(experts, -1, x.shape[1])
        hidden, pre = (rows.new_zeros(*rows.shape[:2], width) for width in (down.shape[2], up.shape[1]))

        def products() -> None:
            torch.bmm(rows, up.mT)
            torch.bmm(hidden, down.mT)

        def products_backward() -> None:
            torch.bmm(rows, down)
            torch.bmm(pre, up)
            torch.bmm(rows.mT, hidden)
            torch.bmm(pre.mT, rows)

        def backward() -> None:
            torch.autograd.grad(y, list(self.dense.leaves.values()), self.dense.grad_y, retain_graph=True)

        if phase == "forward":
            return {"dense FFN": lambda: peers.dense(self.case)(self.dense, None), "products alone": products}
        return {"dense FFN": backward, "products alone": products_backward}


def with_choice(call: Callable[[], Any], **choice: bool) -> Callable[[], Any]:
    """A call in which `kernels/hopper.py` has another choice than it ships with."""

    def function() -> Any:
        before = {name: getattr(hopper, name) for name in choice}
        vars(hopper).update(choice)
        try:
            return call()
        finally:
            vars(hopper).update(before)

    return function


def measure(operands: Operands, watch: Stopwatch, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Microseconds by phase and form, and of what is beside; a form that computes something else raises an error."""
    found: dict[str, dict[str, float]] = {}
    for phase in ("forward", "backward"):
        variants: dict[str, Variant] = {}
        expected: list[Tensor] | None = None
        for form in operands.forms(phase):
            call: Callable[[], Any]
            call = functools.partial(operands.forward, form) if phase == "forward" else operands.backward_of(form)
            result: Any = call()
            ours = [result[0]] if phase == "forward" else result
            expected = ours if expected is None else expected
            if (error := differs(ours, expected)) > TOLERANCE:
                raise RuntimeError(f"{operands.case.name}, {phase}, {form}: differs by {error:.1e} from the first form")
            variants[form] = timed(call, watch)
            if form == "hopper":
                variants["hopper, no overlap"] = timed(with_choice(call, OVERLAPS=False), watch)
                if phase == "forward":
                    variants["hopper, one launch"] = timed(with_choice(call, ONE_LAUNCH=True), watch)
        variants |= {name: timed(call, watch) for name, call in operands.beside(phase).items()}
        timings = interleaved(variants, 0, min_rounds=rounds)
        found[phase] = {name: round(1e3 * timings[name][0].median, 2) for name in variants}
    return found


@dataclass(frozen=True)
class Pass:
    """A pass over rows: what it took, and a copy of as many bytes at the rate of `benchmarks.floors`."""

    name: str
    moved_bytes: int
    microseconds: float
    of_copy: float


def passes(operands: Operands, copy_rate: float, watch: Stopwatch, rounds: int = ROUNDS) -> list[Pass]:
    """Of the form by a library's products. Meant is at most 1.15 of a copy."""
    problem, grad_y, (x, _, up_bias, _, down_bias, _) = operands.problem("cublas"), operands.grad_y, operands.inputs
    dealing = operands.layer("cublas")
    grouped_x, _ = cublas.gather(dealing)
    dealt = Layer(problem, operands.inputs, Deal(SEED, dealing.tensors["permutation"]))
    product = x.new_empty(len(grouped_x), problem.num_up).normal_()
    hidden, y = cublas.activate(dealt, product, None), torch.empty_like(x)
    grad_hidden = torch.zeros_like(hidden)
    partial_up, partial_down = cublas.sums(dealt, up_bias), cublas.sums(dealt, down_bias)
    size = x.element_size() * problem.num_rows
    row, wide, up = (size * width for width in (problem.d_model, problem.d_ff, problem.num_up))
    calls: dict[str, tuple[float, Callable[[], object]]] = {
        "gather": (2 * row, lambda: cublas.gather(dealing)),
        "activate": (up + wide, lambda: cublas.activate(dealt, product, None)),
        "scatter": (2 * row, lambda: cublas.scatter(dealt, grouped_x, y, down_bias)),
        "gather, backward": (4 * row, lambda: cublas.gather(dealt, True, grad_y, partial_down)),
        "activate, backward": (
            2 * wide + 2 * up,
            lambda: cublas.activate_backward(dealt, grad_hidden, product, hidden, partial_up, None),
        ),
    }
    timings = interleaved({name: timed(call, watch) for name, (_, call) in calls.items()}, 0, min_rounds=rounds)
    found = []
    for name, (moved, _) in calls.items():
        seconds = timings[name][0].median / 1e3
        found.append(Pass(name, int(moved), round(1e6 * seconds, 2), round(seconds * copy_rate / moved, 3)))
    return found


def entry(case: Case, capability: int, found: dict[str, dict[str, float]], source: str) -> forms.Entry:
    return forms.Entry(
        name=case.name,
        capability=capability,
        itemsize=2,
        gated=case.gated,
        num_rows=case.num_rows,
        num_experts=case.num_experts,
        d_model=case.d_model,
        d_ff=case.d_ff,
        **{phase: {form: t for form, t in times.items() if form in forms.FORMS} for phase, times in found.items()},
        measured=True,
        source=source,
    )


def show(console: Console, name: str, found: dict[str, dict[str, float]], of_rows: list[Pass]) -> None:
    names = list(dict.fromkeys(name for times in found.values() for name in times))
    table = Table("phase", *names, title=f"{name}, µs")
    for phase, times in found.items():
        table.add_row(phase, *(f"{times[name]:.0f}" if name in times else "" for name in names))
    console.print(table)
    console.print("passes, of a copy: " + ", ".join(f"{p.name} {p.of_copy:.2f}" for p in of_rows))


def main() -> None:
    cases = {case.name: case for case in model.CASES if case.bias}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(cases), default=list(cases))
    parser.add_argument("--minutes", type=float, default=4.5, help="no shape is begun after so many")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="a folder")
    parser.add_argument("--ship", action="store_true", help="write the package's own table too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it needs a CUDA device; what a model of one says: python -m benchmarks.model")
    console, start, watch = Console(width=120), time.monotonic(), Stopwatch("cuda")
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()[0]
    path = arguments.output / f"forms-{name.replace(' ', '-').lower()}.json"
    arguments.output.mkdir(parents=True, exist_ok=True)
    stamp = environment("cuda")
    copy_rate = floors.measure("cuda", ()).copy_rate
    entries: list[forms.Entry] = []
    of_rows: dict[str, Any] = {}
    of_all: dict[str, Any] = {}
    for shape in arguments.shapes:
        if time.monotonic() - start > 60 * arguments.minutes:
            console.print(f"{shape}: left out for want of time")
            continue
        operands = Operands(cases[shape], "cuda", torch.bfloat16)
        found = measure(operands, watch)
        entries.append(entry(cases[shape], capability, found, f"measured on an {name}, {stamp['commit']}"))
        rows = passes(operands, copy_rate, watch)
        of_rows[shape] = [asdict(p) for p in rows]
        of_all[shape] = found
        show(console, shape, found, rows)
        found_so_far = {"environment": stamp, "copy_rate": copy_rate, "passes": of_rows, "all": of_all}
        path.write_text(json.dumps({**found_so_far, "entries": [asdict(e) for e in entries]}, indent=1) + "\n")
    if arguments.ship:
        kept = [e for e in forms.read(forms.TABLE) if (e.capability, e.itemsize) != (capability, 2)]
        model.write(forms.TABLE, [*entries, *kept], stamp)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
