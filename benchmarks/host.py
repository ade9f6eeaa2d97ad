"""`python -m benchmarks.host`: microseconds of the host's own time, at sizes where nothing else counts.

One thread, 8 tokens, and without a GPU launchers of Triton's kernels that launch nothing: what a call costs before the
first number is computed. Beside ours, in the same rounds, the dense FFN `Linear, GELU, Linear` and torch's fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ewa_kernels as ewa
from benchmarks.environment import ROOT, environment
from benchmarks.timing import Variant, ratios, rounds, timings
from ewa_kernels import backends
from ewa_kernels.kernels import devices
from ewa_kernels.kernels import triton as triton_kernels

NUM_TOKENS, D_MODEL, D_FF, NUM_EXPERTS, NUM_LAYERS = 8, 16, 32, 4, 12
CALLS = {"optimizer": 5, "layer": 50}  # in a sample
DENSE, FUSED, STUBBED = "dense FFN", "torch's fused AdamW", "triton, launches stubbed"
HOPPER = "hopper, launches stubbed"


@dataclass(frozen=True)
class Limit:
    """What `variant` may take of the time of the baseline."""

    case: str
    variant: str
    ratio: float


LIMITS = (
    Limit("forward", "auto", 2.0),
    Limit("forward, backward", "auto", 1.5),
    Limit("eval", "auto", 2.0),
    Limit("optimizer step", "AdamW, averaging", 1.3),
    Limit("optimizer step", "averager.step", 0.5),
    Limit("forward", STUBBED, 2.5),
    Limit("forward, backward", STUBBED, 2.0),
    Limit("forward", HOPPER, 2.5),
    Limit("forward, backward", HOPPER, 2.5),
)


class _Nothing:
    """Stands in for a kernel, and for what is compiled of it: takes what a launch takes, and launches nothing."""

    def __init__(self, kernel: Any):
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., _Nothing]:
        return lambda *args, **kwargs: self


class _Unlaunched:
    """Stands in for the extension: its kernels for Hopper launch nothing."""

    HopperActivation = SimpleNamespace(gelu="gelu")
    HopperCall = SimpleNamespace(up="up", down="down", grad_pre="grad_pre", grad_x="grad_x", grad_weight="grad_weight")
    HopperLayer = staticmethod(lambda *of_layer: SimpleNamespace(slots=NUM_TOKENS, splits_of=lambda m, n: 1))
    hopper_gather = hopper_product = staticmethod(lambda *args, **operands: None)


def stub_launches() -> None:
    """Of all kernels for GPUs of the layer, for the rest of the process; of none where there is no Triton."""
    if triton_kernels.WHY_NOT is not None:
        return
    from ewa_kernels.kernels import hopper
    from ewa_kernels.kernels.triton import backward, forward, onchip

    hopper._C = _Unlaunched  # type: ignore[assignment, attr-defined]
    devices.why_not_hopper = lambda device: None

    for module in (forward, backward, onchip):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, _Nothing(getattr(module, name)))


def layer_cases(device: str) -> dict[str, dict[str, Callable[[], object]]]:
    """{what is called: {by whom: the call}}; the first is the baseline."""
    x = torch.randn(NUM_TOKENS, D_MODEL, device=device)
    xs = {dtype: x.to(dtype, copy=True).requires_grad_() for dtype in (torch.float32, torch.bfloat16)}
    up, down = nn.Linear(D_MODEL, D_FF, device=device), nn.Linear(D_FF, D_MODEL, device=device)
    layers: dict[str, nn.Module] = {DENSE: nn.Sequential(up, nn.GELU(), down)}
    stubbed = {"triton": STUBBED, "hopper": HOPPER} if device == "cpu" else {}
    for backend in ("auto", "cpp", "torch", "triton", "hopper"):
        if backend == "auto" or backends.why_not("moe_ffn", backend, torch.device(device)) is None:
            dtype = torch.bfloat16 if backend == "hopper" else torch.float32
            layers[stubbed.get(backend, backend)] = ewa.RandomPartitionMoE(
                D_MODEL, D_FF, NUM_EXPERTS, backend=backend, device=device, dtype=dtype
            )

    def x_of(layer: nn.Module) -> Tensor:
        return xs[next(layer.parameters()).dtype]

    def forward_and_backward(layer: nn.Module) -> Callable[[], object]:
        x, grad_y = x_of(layer), torch.randn_like(x_of(layer))

        def call() -> None:
            layer.zero_grad()
            x.grad = None
            layer(x).backward(grad_y)

        return call

    def evaluate(layer: nn.Module) -> Callable[[], object]:
        x = x_of(layer)

        def call() -> None:
            with torch.no_grad():
                layer.eval()(x)
            layer.train()

        return call

    def forward(layer: nn.Module) -> Callable[[], object]:
        x = x_of(layer)
        return lambda: layer(x)

    return {
        "forward": {name: forward(layer) for name, layer in layers.items()},
        "forward, backward": {name: forward_and_backward(layer) for name, layer in layers.items()},
        "eval": {name: evaluate(layer) for name, layer in layers.items() if name in (DENSE, "auto")},
    }


def optimizer_cases(device: str) -> dict[str, Callable[[], object]]:
    """Steps of the same 108 small parameters, of which 48 are experts; the first is the baseline."""

    def parameters() -> tuple[nn.Module, list[Tensor]]:
        layers = (ewa.RandomPartitionMoE(4, 8, NUM_EXPERTS, device=device) for _ in range(NUM_LAYERS))
        others = (nn.Parameter(torch.randn(8, device=device)) for _ in range(5 * NUM_LAYERS))
        model = nn.ModuleList([*layers, nn.ParameterList(others)])
        params: list[Tensor] = list(model.parameters())
        for p in params:
            p.grad = torch.randn_like(p)
        return model, params

    fused = torch.optim.AdamW(parameters()[1], fused=True)
    model, params = parameters()
    ours = ewa.optim.AdamW(params, averager=ewa.ExpertAverager(model, 0.3))
    averager = ewa.ExpertAverager(parameters()[0], 0.3)
    return {FUSED: fused.step, "AdamW, averaging": ours.step, "averager.step": averager.step}


def _sample(function: Callable[[], object], calls: int) -> Variant:
    """Seconds of one call, as the mean of some."""

    def variant() -> tuple[float]:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return ((time.perf_counter() - start) / calls,)

    return variant


def measure(device: str, seconds: float) -> list[dict[str, Any]]:
    """A row for each case and variant: microseconds, and the ratio to the baseline within a round."""
    if device == "cpu":
        stub_launches()
    cases: dict[str, tuple[int, Mapping[str, Callable[[], object]]]] = {
        name: (CALLS["layer"], variants) for name, variants in layer_cases(device).items()
    }
    cases["optimizer step"] = (CALLS["optimizer"], optimizer_cases(device))
    rows = []
    for case, (calls, variants) in cases.items():
        samples = rounds({name: _sample(f, calls) for name, f in variants.items()}, seconds / len(cases))
        baseline = samples[next(iter(variants))]
        for name, taken in samples.items():
            (microseconds,), (ratio,) = timings([(1e3 * s,) for (s,) in taken]), ratios(taken, baseline)
            limit = next((each.ratio for each in LIMITS if (each.case, each.variant) == (case, name)), None)
            rows.append(
                {
                    "case": case,
                    "variant": name,
                    "microseconds": microseconds.as_dict(),
                    "ratio": ratio.as_dict(),
                    "limit": limit,
                }
            )
    return rows


def run(device: str, seconds: float) -> list[dict[str, Any]]:
    """`measure` in a process of its own, with one thread, in which no kernel is launched on a CPU."""
    variables = {"OMP_NUM_THREADS": "1", **({"TRITON_INTERPRET": "1"} if device == "cpu" else {})}
    command = [sys.executable, "-m", "benchmarks.host", "--device", device, "--seconds", str(seconds), "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True
    )
    rows: list[dict[str, Any]] = json.loads(done.stdout)["host"]
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table("case", "variant", "µs", "p20–p80", "÷ baseline", "limit", title="the host's time of a call")
    for row in rows:
        taken, limit = row["microseconds"], row["limit"]
        met = "" if limit is None else f"≤ {limit}: {'met' if row['ratio']['median'] <= limit else 'missed'}"
        spread = f"{taken['p20']:.1f}–{taken['p80']:.1f}"
        result.add_row(
            row["case"], row["variant"], f"{taken['median']:.1f}", spread, f"{row['ratio']['median']:.2f}", met
        )
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="default here: %(default)s")
    parser.add_argument("--seconds", type=float, default=20, help="that it may take, about")
    parser.add_argument("--json", action="store_true", help="print JSON, and measure in this very process")
    options = parser.parse_args(arguments)
    if options.json:
        torch.set_num_threads(1)
        rows = measure(options.device, options.seconds)
        print(json.dumps({"environment": environment(options.device), "host": rows}, indent=1))
        return 0
    console = Console(width=120)
    console.print(environment(options.device), table(run(options.device, options.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
