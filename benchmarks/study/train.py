"""One training of the study, from its name to its result."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ewa_kernels as ewa
from benchmarks.study.models import ARMS, DENSE, Arm, apply_, fold_
from benchmarks.study.tasks import Data, Mnist, Solids, Split, Task

SCRATCH, FINE_TUNED, PRETRAINING = "from scratch", "fine-tuned", "pretraining"
WEIGHT_DECAY = 0.05
NUM_POINTS = 8  # of the test loss' course
NUM_FOLLOWED = 250  # test examples that the course is of


@dataclass(frozen=True, kw_only=True)
class Study:
    """All that decides its results, but for the machine."""

    tasks: tuple[Task, ...]
    seeds: int
    arms: tuple[Arm, ...] = ARMS
    use_bfloat16: bool = False  # on a GPU

    def runs(self) -> list[Run]:
        """Seed by seed, so that one that is cut short has whole pairs; a pretraining before what starts from it."""
        order = [
            (PRETRAINING, DENSE.name),
            *((start, arm.name) for start in (SCRATCH, FINE_TUNED) for arm in self.arms),
        ]
        return [
            Run(task.name, start, arm, seed)
            for seed in range(self.seeds)
            for task in self.tasks
            for start, arm in order
        ]

    def task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


class Run(NamedTuple):
    task: str
    start: str
    arm: str
    seed: int


class Result(NamedTuple):
    """Of a run. Accuracies in percent; losses are means.

    Attributes:
        accuracy, test_loss: on the whole test set, of the folded model.
        training_accuracy, training_loss: on the whole training set, likewise, as it is without augmentation.
        course: the loss on the first NUM_FOLLOWED test examples after each of `course_steps`.
    """

    accuracy: float
    test_loss: float
    training_accuracy: float
    training_loss: float
    course: tuple[float, ...]
    seconds: float
    cpu_seconds: float


# Sizes and learning rates were chosen by what the dense model does with seeds from 100 on; those of FULL are untried.
DEFAULT = Study(
    seeds=20,
    tasks=(
        Mnist(
            name="MNIST",
            num_pretraining=1000,
            num_training=200,
            num_test=2000,
            d_model=32,
            depth=4,
            num_heads=2,
            num_steps=600,
            num_fine_tuning_steps=350,
            batch_size=16,
            learning_rate=3e-3,
            fine_tuning_rate=3e-3,
            patch_size=7,
        ),
        Solids(
            name="solids",
            num_pretraining=500,
            num_training=150,
            num_test=1000,
            d_model=32,
            depth=4,
            num_heads=2,
            num_steps=800,
            num_fine_tuning_steps=450,
            batch_size=16,
            learning_rate=3e-3,
            fine_tuning_rate=3e-3,
            num_points=64,
            num_patches=12,
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
        Mnist(
            name="MNIST",
            num_pretraining=2000,
            num_training=1000,
            num_test=2000,
            d_model=192,
            depth=8,
            num_heads=6,
            num_steps=4000,
            num_fine_tuning_steps=2000,
            batch_size=64,
            learning_rate=1e-3,
            fine_tuning_rate=5e-4,
            patch_size=4,
        ),
        Solids(
            name="solids",
            num_pretraining=5000,
            num_training=5000,
            num_test=5000,
            d_model=192,
            depth=8,
            num_heads=6,
            num_steps=8000,
            num_fine_tuning_steps=4000,
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


def steps_of(task: Task, start: str) -> int:
    return task.num_fine_tuning_steps if start == FINE_TUNED else task.num_steps


def course_steps(num_steps: int) -> list[int]:
    """After how many steps the test loss is looked at; the last time at the end."""
    return sorted({max(1, num_steps * i // NUM_POINTS) for i in range(1, NUM_POINTS + 1)})


def execute(run: Run, study: Study, checkpoint: Path, device: str) -> Result:
    """Trains and tests. Equal arguments give equal accuracies on a CPU.

    Args:
        checkpoint: the dense weights of the run's task and seed: a pretraining writes them, fine-tuning reads them.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    task, arm = study.task(run.task), study.arm(run.arm)
    data = _data(task, run.seed)
    torch.manual_seed(run.seed)
    model = task.model()
    if run.start == FINE_TUNED:
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
    apply_(arm, model, "copy" if run.start == FINE_TUNED else "independent")
    model.to(device)
    model, course = fit(model, arm, task, study, run, data)
    fold_(arm, model)
    accuracy, loss = test(model, data.test)
    training_accuracy, training_loss = test(model, data.pretraining if run.start == PRETRAINING else data.training)
    if run.start == PRETRAINING:
        partial = checkpoint.with_suffix(".partial")
        torch.save(model.cpu().state_dict(), partial)
        partial.replace(checkpoint)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    return Result(accuracy, loss, training_accuracy, training_loss, course, *seconds)


@functools.lru_cache(maxsize=4)
def _data(task: Task, seed: int) -> Data:
    """For all arms that a process trains: what is in it is only read."""
    return task.data(seed)


def averager_of(arm: Arm, model: nn.Module, num_steps: int) -> ewa.ExpertAverager | None:
    if not arm.share_rate:
        return None
    if arm.is_linear:
        return ewa.ExpertAverager(model, ewa.LinearShareRate(end=arm.share_rate, num_steps=num_steps))
    return ewa.ExpertAverager(model, arm.share_rate)


def ema_of(arm: Arm, model: nn.Module, num_steps: int) -> AveragedModel | None:
    """Of weights and buffers, with a memory of `arm.ema_memory` of the training."""
    if not arm.ema_memory:
        return None
    decay = 1 - 1 / max(1.0, arm.ema_memory * num_steps)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def fit(
    model: nn.Module, arm: Arm, task: Task, study: Study, run: Run, data: Data
) -> tuple[nn.Module, tuple[float, ...]]:
    """Trains; returns the model that is tested, another one if weights are averaged, and the test loss' course."""
    split = data.pretraining if run.start == PRETRAINING else data.training
    fine_tuned = run.start == FINE_TUNED
    num_steps = steps_of(task, run.start)
    device = next(model.parameters()).device
    ema = ema_of(arm, model, num_steps)
    tested = model if ema is None else ema.module
    optimizer = ewa.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=task.fine_tuning_rate if fine_tuned else task.learning_rate,
        weight_decay=WEIGHT_DECAY,
        averager=averager_of(arm, model, num_steps),
    )
    warm_up = max(1, num_steps // 20)

    def schedule(step: int) -> float:
        return min((step + 1) / warm_up, 0.505 + 0.495 * math.cos(math.pi * step / num_steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    inputs, labels = split.inputs.to(device), split.labels.to(device)
    followed = Split(data.test.inputs[:NUM_FOLLOWED], data.test.labels[:NUM_FOLLOWED])
    looks, course = course_steps(num_steps), []
    torch.manual_seed(run.seed)
    # Of its own: whatever the model draws, the batches are the same.
    generator = torch.Generator().manual_seed(run.seed)
    batches = _batches(len(labels), task.batch_size, generator)
    model.train()
    for step in range(1, num_steps + 1):
        batch = next(batches).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=study.use_bfloat16 and device.type == "cuda"):
            loss = F.cross_entropy(model(task.augment(inputs[batch], generator)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if ema is not None:
            ema.update_parameters(model)
        if step in looks:
            course.append(test(tested, followed)[1])
            model.train()
    return tested, tuple(course)


def _batches(num_examples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices, in batches of one size, without end."""
    while True:
        order = torch.randperm(num_examples, generator=generator)
        yield from order[: num_examples // batch_size * batch_size].split(batch_size)


@torch.no_grad()
def test(model: nn.Module, split: Split) -> tuple[float, float]:
    """Accuracy in percent and the mean loss, in eval mode."""
    device = next(model.parameters()).device
    model.eval()
    logits = torch.cat([model(inputs.to(device)) for inputs in split.inputs.split(500)]).double().cpu()
    accuracy = 100 * (logits.argmax(dim=-1) == split.labels).double().mean().item()
    return accuracy, F.cross_entropy(logits, split.labels).item()
