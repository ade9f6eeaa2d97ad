"""`python -m benchmarks.ffn_cuda`: the layer on a GPU in all its forms, next to what one would write in PyTorch.

Each variant passes a parity gate before it is timed; each prediction of `benchmarks.model` is shown beside it.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ewa_kernels as ewa
from benchmarks import model
from benchmarks.environment import environment

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _dense(x: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor) -> Tensor:
    """One FFN of the same FLOPs."""
    return F.linear(F.gelu(F.linear(x, up_weight[0], up_bias[0])), down_weight[0], down_bias[0])


def _bmm(x: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor) -> Tensor:
    """Gather, batched products, scatter: for T that E divides."""
    permutation = torch.randperm(len(x), device=x.device)
    grouped = x[permutation].view(len(up_weight), -1, x.shape[1])
    hidden = F.gelu(torch.baddbmm(up_bias.unsqueeze(1), grouped, up_weight.mT))
    y = torch.baddbmm(down_bias.unsqueeze(1), hidden, down_weight.mT)
    return torch.empty_like(x).index_copy(0, permutation, y.flatten(0, 1))


def variants(shape: model.Shape) -> dict[str, Callable[..., Tensor]]:
    """All that compute an FFN of this shape."""

    def ours(backend: str) -> Callable[..., Tensor]:
        return lambda *operands: ewa.functional.moe_ffn(*operands, seed=3, backend=backend)

    forms = ["triton-single", "triton-split"] + ["triton-onchip"] * (shape.d_model <= 128)
    return {
        "dense, eager": _dense,
        "gather-bmm-scatter, eager": _bmm,
        "gather-bmm-scatter, compiled": torch.compile(_bmm),
        **{form: ours(form) for form in forms},
    }


def check(name: str, function: Callable[..., Tensor], operands: Operands) -> None:
    """No wrong result is timed.

    Raises:
        AssertionError: a form of ours is wrong.
    """
    if not name.startswith("triton"):
        return
    y = function(*operands)
    exact = ewa.functional.moe_ffn(*(t.double() for t in operands), seed=3, backend="torch")
    error = float((y.double() - exact).norm() / exact.norm())
    if not error < 1e-2:
        raise AssertionError(f"{name} is wrong by {error:.1e}: not timed")


def measure(function: Callable[[], Any]) -> tuple[float, float, float]:
    """Median, p20 and p80 in µs; the L2 cache is flushed before each run."""
    median, p20, p80 = triton.testing.do_bench(function, warmup=20, rep=150, quantiles=[0.5, 0.2, 0.8])
    return 1e3 * median, 1e3 * p20, 1e3 * p80


def run(shape: model.Shape) -> list[dict[str, Any]]:
    torch.manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device="cuda") * scale).to(torch.bfloat16).requires_grad_()

    e, d, f = shape.num_experts, shape.d_model, shape.d_ff
    operands = (
        random(shape.num_tokens, d),
        random(e, f, d, scale=d**-0.5),
        random(e, f),
        random(e, d, f, scale=f**-0.5),
        random(e, d),
    )
    grad_y = torch.randn_like(operands[0])
    predicted = dict(model.predictions(shape))
    results = []
    for name, function in variants(shape).items():
        start = time.perf_counter()
        y = function(*operands)
        torch.autograd.grad(y, operands, grad_y)
        torch.cuda.synchronize()
        first_call = time.perf_counter() - start
        with torch.no_grad():
            check(name, function, operands)
            forward = measure(functools.partial(function, *operands))
        y = function(*operands)
        backward = measure(functools.partial(torch.autograd.grad, y, operands, grad_y, retain_graph=True))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(function(*operands), operands, grad_y)
        peak = torch.cuda.max_memory_allocated() - before
        for i, (what, timing) in enumerate((("forward", forward), ("backward", backward))):
            form = {"triton-single": "single", "triton-split": "split", "triton-onchip": "on chip"}.get(name, "")
            prediction = predicted.get(f"{what}, {form}")
            results.append(
                {
                    "shape": shape.name,
                    "what": what,
                    "variant": name,
                    "median_us": timing[0],
                    "p20_us": timing[1],
                    "p80_us": timing[2],
                    "tflops": model.operations(shape)[i] / timing[0] / 1e6,
                    "floor_us": 1e6 * model.floors(shape)[i],
                    "predicted_us": None if prediction is None else 1e6 * prediction,
                    "peak_bytes": peak,
                    "first_call_s": first_call,
                }
            )
    return results


def host_cost() -> dict[str, float]:
    """µs of host time for a forward of few tokens, when nothing waits for the GPU."""
    layer = ewa.RandomPartitionMoE(384, 1536, 4, device="cuda", dtype=torch.bfloat16)
    dense = layer.fuse().train()
    x = torch.randn(64, 384, device="cuda", dtype=torch.bfloat16)
    costs = {}
    with torch.no_grad():
        for name, module in (("experts", layer), ("dense", dense)):
            for _ in range(50):
                module(x)
            samples = []
            for _ in range(200):
                torch.cuda.synchronize()
                start = time.perf_counter()
                module(x)
                samples.append(time.perf_counter() - start)
            costs[name] = 1e6 * sorted(samples)[100]
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="a folder")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name()
    results = [result for shape in model.SHAPES if not shape.gated for result in run(shape)]
    table = Table("shape", "what", "variant", "median µs", "p20–p80", "TFLOP/s", "floor µs", "predicted µs", "first s")
    for r in results:
        predicted = "" if r["predicted_us"] is None else f"{r['predicted_us']:.0f}"
        spread = f"{r['p20_us']:.0f}–{r['p80_us']:.0f}"
        row = (f"{r['median_us']:.0f}", spread, f"{r['tflops']:.0f}", f"{r['floor_us']:.0f}", predicted)
        table.add_row(r["shape"], r["what"], r["variant"], *row, f"{r['first_call_s']:.1f}")
    costs = host_cost()
    Console(width=140).print(table, costs)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / (re.sub(r"\W+", "-", name).strip("-").lower() + ".json")
    machine = {**environment(), "gpu": name, "triton": triton.__version__}
    path.write_text(json.dumps({"environment": machine, "host_us": costs, "results": results}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
