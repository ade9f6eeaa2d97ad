"""Point clouds of ten solids: sampled on their surfaces, stretched, turned, cut off on one side, and noised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation
from torch import Tensor

Array = NDArray[np.float64]
Sampler = Callable[[int, Generator], Array]

STRETCH = 0.4  # the logarithm of each axis' scale is uniform in ±STRETCH
TILT = 0.2  # in radians, the standard deviation about each axis


def revolved(profile: Array) -> Sampler:
    """The surface that a line `[S + 1, 2]` of points (radius, height) makes when it turns about the axis."""
    first, last = profile[:-1], profile[1:]
    areas = np.linalg.norm(last - first, axis=1) * (first[:, 0] + last[:, 0])

    def sample(num_points: int, rng: Generator) -> Array:
        segments = rng.choice(len(areas), num_points, p=areas / areas.sum())
        a, b = first[segments], last[segments]
        # Along a segment the density is that of the radius, which is linear: that of the larger, or of the smaller, of
        # two uniform numbers, or a mixture of both.
        two = np.sort(rng.random((num_points, 2)), axis=1)
        outwards = rng.random(num_points) * (a[:, 0] + b[:, 0]) < b[:, 0]
        t = np.where(outwards, two[:, 1], two[:, 0])[:, None]
        radius, height = (a + t * (b - a)).T
        angle = rng.uniform(0, 2 * np.pi, num_points)
        return np.stack((radius * np.cos(angle), radius * np.sin(angle), height), axis=1)

    return sample


def hull(vertices: Any) -> Sampler:
    """The surface of the convex hull of vertices `[V, 3]`."""
    corners = np.asarray(vertices, dtype=np.float64)
    a, b, c = corners[ConvexHull(corners).simplices].transpose(1, 0, 2)
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1)

    def sample(num_points: int, rng: Generator) -> Array:
        triangles = rng.choice(len(areas), num_points, p=areas / areas.sum())
        u, v = np.sort(rng.random((2, num_points)), axis=0)[..., None]
        return u * a[triangles] + (v - u) * b[triangles] + (1 - v) * c[triangles]

    return sample


def _arc(start: float, stop: float, height: float = 0.0, radius: float = 1.0, distance: float = 0.0) -> Array:
    """Part of a circle about (distance, height), angles in units of π, 0 outwards and ½ upwards."""
    angles = np.pi * np.linspace(start, stop, 33)
    return np.stack((distance + radius * np.cos(angles), height + radius * np.sin(angles)), axis=1)


def _polygon(num_corners: int, height: float) -> list[tuple[float, float, float]]:
    angles = 2 * np.pi * np.arange(num_corners) / num_corners
    return [(float(np.cos(angle)), float(np.sin(angle)), height) for angle in angles]


SOLIDS: dict[str, Sampler] = {
    "sphere": revolved(_arc(-0.5, 0.5)),
    "half sphere": revolved(np.concatenate((np.zeros((1, 2)), _arc(0, 0.5)))),
    "cylinder": revolved(np.array([[0.0, -1.0], [1.0, -1.0], [1.0, 1.0], [0.0, 1.0]])),
    "cone": revolved(np.array([[0.0, -1.0], [1.0, -1.0], [0.0, 1.0]])),
    "capsule": revolved(np.concatenate((_arc(-0.5, 0, height=-1.0), _arc(0, 0.5, height=1.0)))),
    "torus": revolved(_arc(-1, 1, radius=0.4, distance=0.8)),
    "box": hull(_polygon(4, -0.7) + _polygon(4, 0.7)),
    "prism": hull(_polygon(3, -0.8) + _polygon(3, 0.8)),
    "pyramid": hull([*_polygon(4, -0.7), (0.0, 0.0, 0.9)]),
    "octahedron": hull([*_polygon(4, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, -1.0)]),
}


def clouds(labels: Array, num_points: int, rng: Generator, *, noise: float = 0.0, cut: float = 0.0) -> Tensor:
    """`[N, num_points, 3]` in float32, in the unit ball before the noise.

    Args:
        labels: `[N]`, indices into SOLIDS.
        noise: standard deviation of the error of each coordinate.
        cut: share of the points that is missing on one side, as of an object seen from the other.
    """
    samplers = list(SOLIDS.values())
    num_sampled = round(num_points / (1 - cut))
    points = np.stack([samplers[int(label)](num_sampled, rng) for label in labels])  # [N, num_sampled, 3]
    points *= np.exp(rng.uniform(-STRETCH, STRETCH, (len(labels), 1, 3)))
    turns = Rotation.from_euler("z", rng.uniform(0, 2 * np.pi, (len(labels), 1)))
    points @= (Rotation.from_rotvec(rng.normal(0, TILT, (len(labels), 3))) * turns).as_matrix()
    kept = np.argsort(points[:, :, 0], axis=1)[:, :num_points]
    points = np.take_along_axis(points, rng.permuted(kept, axis=1)[:, :, None], axis=1)
    points -= points.mean(axis=1, keepdims=True)
    points /= np.linalg.norm(points, axis=2).max(axis=1)[:, None, None]
    return torch.tensor(points + noise * rng.standard_normal(points.shape), dtype=torch.float32)


def patches(points: Tensor, num_patches: int, patch_size: int) -> Tensor:
    """`[N, P, 3]` → `[N, num_patches, 1 + patch_size, 3]`: centres, then their nearest points relative to them.

    Each centre is the point that is farthest from those chosen before, the first from the middle.
    """
    rows = torch.arange(len(points))
    distances = points.square().sum(dim=-1)  # [N, P]
    chosen: list[Tensor] = []
    for _ in range(num_patches):
        centre = points[rows, distances.argmax(dim=1)]
        squares = (points - centre[:, None]).square().sum(dim=-1)
        distances = torch.minimum(distances, squares) if chosen else squares
        chosen.append(centre)
    centres = torch.stack(chosen, dim=1)  # [N, num_patches, 3]
    nearest = torch.cdist(centres, points).topk(patch_size, largest=False).indices
    neighbours = points[rows[:, None, None], nearest] - centres[:, :, None]
    return torch.cat((centres[:, :, None], neighbours), dim=2)
