"""`python -m benchmarks.exchange`: gradients exchanged by DDP in 8 bits, beside the other ways PyTorch has.

Bytes that a rank sends, the error of the mean gradient against float64, and the time of backward with the exchange, on
processes of this machine by gloo: what a network would add is not in it. The results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.environment import environment, file_name
from ewa_kernels.integrations import ddp

RESULTS = Path(__file__).parent / "results"
ROUNDS, WARM_UP = 12, 4


def make() -> nn.Module:
    """34 MB of parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))


def backward(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(64, 1024, generator=generator)
    (model(x) * torch.randn(64, 1024, generator=generator)).sum().backward()


def in_bfloat16(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations with types
    """What `bf16_compress_hook` does, which PyTorch refuses without NCCL."""
    buffer = bucket.buffer()
    narrow = buffer.div_(dist.get_world_size()).bfloat16()

    def widen(future: Any) -> Tensor:
        return buffer.copy_(future.value()[0])

    work: Any = dist.all_reduce(narrow, async_op=True)
    return work.get_future().then(widen)


def hooks() -> dict[str, Callable[[DistributedDataParallel], None]]:
    def ours(parallel: DistributedDataParallel, feedback: bool = False) -> None:
        parallel.register_comm_hook(ddp.QuantizedAllReduce(feedback), ddp.quantized_all_reduce)

    def power(parallel: DistributedDataParallel) -> None:
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        parallel.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    return {
        "all-reduce, float32": lambda parallel: None,
        "all-reduce, bfloat16": lambda parallel: parallel.register_comm_hook(None, in_bfloat16),
        "PowerSGD, rank 4": power,
        "8 bits": ours,
        "8 bits, error feedback": lambda parallel: ours(parallel, True),
    }


class Counter:
    """Bytes that collectives of this rank send, by the algorithms that send least."""

    def __init__(self) -> None:
        self.bytes = 0.0
        size = dist.get_world_size()
        share = {"all_reduce": (0, 2.0), "all_to_all_single": (1, 1.0), "all_gather_single": (1, float(size))}
        share["all_gather_into_tensor"] = share["all_gather_single"]
        for name, (position, factor) in share.items():
            if hasattr(dist, name):
                setattr(dist, name, self._counting(getattr(dist, name), position, factor * (size - 1) / size))

    def _counting(self, function: Any, position: int, factor: float) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.bytes += factor * arguments[position].nbytes
            return function(*arguments, **options)

        return run


def error(grads: list[Tensor], exact: list[Tensor]) -> float:
    lost = sum(float((a - b).square().sum()) for a, b in zip(grads, exact, strict=True))
    return (lost / sum(float(b.square().sum()) for b in exact)) ** 0.5


def work(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    model = make()
    backward(model)
    exact = [p.grad.double() for p in model.parameters() if p.grad is not None]
    for grad in exact:
        dist.all_reduce(grad.div_(world_size))
    counter, rows = Counter(), []
    plain = 2 * sum(grad.numel() * 4 for grad in exact) * (world_size - 1) / world_size
    for name, register in hooks().items():
        # One bucket: PowerSGD begins collectives when others end, which by gloo meet others' of the next bucket.
        parallel, times = DistributedDataParallel(make(), bucket_cap_mb=100), []
        register(parallel)
        mean = [torch.zeros_like(grad) for grad in exact]
        for i in range(ROUNDS):
            parallel.zero_grad()
            dist.barrier()
            counter.bytes, start = 0.0, time.perf_counter()
            backward(parallel)
            times.append(time.perf_counter() - start)
            grads = [p.grad.double() for p in parallel.parameters() if p.grad is not None]
            if i >= WARM_UP:
                for total, grad in zip(mean, grads, strict=True):
                    total += grad / (ROUNDS - WARM_UP)
        sent = counter.bytes or plain  # DDP's own all-reduce is not called from Python
        row = {"name": name, "MB sent": sent / 1e6, "ms": 1e3 * median(times[WARM_UP:])}
        rows.append({**row, "error": error(grads, exact), "error of the mean": error(mean, exact)})
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exchange", description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    about, console, results = environment(), Console(width=120), {}
    for world_size in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(work, (world_size, folder), nprocs=world_size)  # type: ignore[attr-defined]
            rows = results[str(world_size)] = json.loads((Path(folder) / "rows.json").read_text())
        table = Table(f"{world_size} processes", "MB sent", "of float32's", "error", "of the mean of 8", "ms")
        for row in rows:
            share = row["MB sent"] / rows[0]["MB sent"]
            table.add_row(
                row["name"],
                *(f"{row['MB sent']:.1f}", f"{share:.3f}", f"{row['error']:.4f}"),
                *(f"{row['error of the mean']:.4f}", f"{row['ms']:.0f}"),
            )
        console.print(table)
    path = RESULTS / f"exchange-{file_name(about['device'])}.json"
    path.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
