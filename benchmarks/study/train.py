"""One training of the study, from its name to its result."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ewa_kernels as ewa
from benchmarks.study.models import ARMS, DENSE, Arm, add_experts_, load_balance_loss
from benchmarks.study.tasks import Data, Digits, Solids, Split, Task

SCRATCH, FINE_TUNED, PRETRAINING = "from scratch", "fine-tuned", "pretraining"
LOAD_BALANCE_WEIGHT = 0.01  # as in arXiv 2101.03961
WEIGHT_DECAY = 0.05


@dataclass(frozen=True, kw_only=True)
class Study:
    """All that decides its results, but for the machine."""

    tasks: tuple[Task, ...]
    seeds: int
    num_experts: int = 4
    share_rate: float = 0.3
    use_bfloat16: bool = False  # on a GPU

    def runs(self) -> list[Run]:
        """Seed by seed, so that one that is cut short has whole pairs; a pretraining before what starts from it."""
        order = [(PRETRAINING, DENSE.name), *((start, arm) for start in (SCRATCH, FINE_TUNED) for arm in ARMS)]
        return [
            Run(task.name, start, arm, seed)
            for seed in range(self.seeds)
            for task in self.tasks
            for start, arm in order
        ]

    def task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    def averager(self, model: nn.Module, arm: Arm, num_steps: int) -> ewa.ExpertAverager:
        """β grows from 0 as if to reach `share_rate` in the last step; with a router averaging ends half-way.

        Experts that are pulled together to the end are one expert, and leave a router nothing to choose.
        """
        stop_step = num_steps // 2 if arm.experts == "naive" else None
        return ewa.ExpertAverager(
            model, ewa.LinearShareRate(end=self.share_rate, num_steps=num_steps, stop_step=stop_step)
        )


class Run(NamedTuple):
    task: str
    start: str
    arm: str
    seed: int


class Result(NamedTuple):
    """Of a run. Accuracy in percent of the test set, the loss is the mean of the last tenth of the steps."""

    accuracy: float
    training_loss: float
    seconds: float
    cpu_seconds: float


# Sizes and learning rates were chosen by what the dense model does with seed 100; those of FULL are untried.
DEFAULT = Study(
    seeds=10,
    tasks=(
        Digits(
            name="digits",
            num_pretraining=500,
            num_training=150,
            num_test=1000,
            d_model=48,
            depth=4,
            num_heads=4,
            num_steps=200,
            batch_size=32,
            learning_rate=2e-3,
            fine_tuning_rate=1e-3,
        ),
        Solids(
            name="solids",
            num_pretraining=500,
            num_training=500,
            num_test=1000,
            d_model=48,
            depth=4,
            num_heads=4,
            num_steps=250,
            batch_size=32,
            learning_rate=2e-3,
            fine_tuning_rate=1e-3,
            num_points=128,
            num_patches=16,
            patch_size=8,
            noise=0.02,
            cut=0.2,
        ),
    ),
)
FULL = Study(
    seeds=30,
    use_bfloat16=True,
    tasks=(
        replace(DEFAULT.tasks[0], d_model=192, depth=8, num_heads=6, num_steps=1000, learning_rate=1e-3),
        Solids(
            name="solids",
            num_pretraining=5000,
            num_training=5000,
            num_test=5000,
            d_model=192,
            depth=8,
            num_heads=6,
            num_steps=4000,
            batch_size=64,
            learning_rate=1e-3,
            fine_tuning_rate=5e-4,
            num_points=1024,
            num_patches=64,
            patch_size=32,
            noise=0.02,
            cut=0.3,
        ),
    ),
)


def execute(run: Run, study: Study, checkpoint: Path, device: str) -> Result:
    """Trains and tests. Equal arguments give equal accuracies on a CPU.

    Args:
        checkpoint: the dense weights of the run's task and seed: a pretraining writes them, fine-tuning reads them.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    task, arm = study.task(run.task), ARMS[run.arm]
    data = task.data(run.seed)
    torch.manual_seed(run.seed)
    model = task.model()
    if run.start == FINE_TUNED:
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
    if arm.experts is not None:
        add_experts_(model, arm.experts, study.num_experts, "copy" if run.start == FINE_TUNED else "independent")
    model.to(device)
    averager = study.averager(model, arm, task.num_steps) if arm.is_averaged else None
    loss = fit(model, averager, task, study, run, data)
    if arm.experts == "random":
        ewa.fold_(model)
    accuracy = accuracy_of(model, data.test, device)
    if run.start == PRETRAINING:
        partial = checkpoint.with_suffix(".partial")
        torch.save(model.cpu().state_dict(), partial)
        partial.replace(checkpoint)
    return Result(accuracy, loss, time.perf_counter() - wall, time.process_time() - cpu)


def fit(model: nn.Module, averager: ewa.ExpertAverager | None, task: Task, study: Study, run: Run, data: Data) -> float:
    """Trains for `task.num_steps` steps; returns the mean loss of the last tenth of them."""
    split = data.pretraining if run.start == PRETRAINING else data.training
    device = next(model.parameters()).device
    rate = task.fine_tuning_rate if run.start == FINE_TUNED else task.learning_rate
    optimizer = ewa.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY, averager=averager)
    warm_up = max(1, task.num_steps // 20)

    def schedule(step: int) -> float:
        return min((step + 1) / warm_up, 0.505 + 0.495 * math.cos(math.pi * step / task.num_steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    inputs, labels = split.inputs.to(device), split.labels.to(device)
    torch.manual_seed(run.seed)
    # Of its own: whatever the model draws, the batches are the same.
    generator = torch.Generator().manual_seed(run.seed)
    batches = _batches(len(labels), task.batch_size, generator)
    model.train()
    losses = []
    for _ in range(task.num_steps):
        batch = next(batches).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=study.use_bfloat16 and device.type == "cuda"):
            loss = F.cross_entropy(model(task.augment(inputs[batch], generator)), labels[batch])
        losses.append(loss.detach())
        optimizer.zero_grad()
        (loss + LOAD_BALANCE_WEIGHT * load_balance_loss(model)).backward()
        optimizer.step()
        scheduler.step()
    return torch.stack(losses[-max(1, task.num_steps // 10) :]).mean().item()


def _batches(num_examples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices, in batches of one size, without end."""
    while True:
        order = torch.randperm(num_examples, generator=generator)
        yield from order[: num_examples // batch_size * batch_size].split(batch_size)


@torch.no_grad()
def accuracy_of(model: nn.Module, split: Split, device: str) -> float:
    """Accuracy in percent."""
    model.eval()
    right = [
        (model(inputs.to(device)).argmax(dim=-1).cpu() == labels).double()
        for inputs, labels in zip(split.inputs.split(500), split.labels.split(500), strict=True)
    ]
    return 100 * torch.cat(right).mean().item()
