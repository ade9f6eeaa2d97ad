"""Which tensors share memory: exactly those that have an element's memory in common are refused."""

import itertools
import random

import pytest
import torch

import ewa_kernels as ewa
from ewa_kernels.memory import Place, overlaps

X = torch.zeros(4, 12)


def elements(tensor):
    """Places of all elements, by going through all indices."""
    indices = itertools.product(*map(range, tensor.shape))
    places = [sum(i * step for i, step in zip(index, tensor.stride(), strict=True)) for index in indices]
    return [tensor.storage_offset() + place for place in places]


def some_view(memory, rng):
    """One that does not overlap itself, of one dimension to three, with or without gaps."""
    while True:
        ndim = rng.randint(1, 3)
        shape = [rng.randint(1, 4) for _ in range(ndim)]
        strides = [rng.choice([1, 2, 3, 4, 5, 6, 8, 12, 24, 30]) for _ in range(ndim)]
        view = memory.as_strided(shape, strides, rng.randint(0, 30))
        try:
            ewa.functional.average_experts_([view], 0.0)
        except ValueError:
            continue
        assert len(set(elements(view))) == view.numel()
        return view


@pytest.mark.parametrize("num_pieces", [0, 1024])
def test_pairs_of_views(num_pieces, monkeypatch):
    """Whether tensors in equal pieces are compared as they are, or by piece."""
    monkeypatch.setattr("ewa_kernels.memory._MANY", num_pieces)
    memory, rng, found = torch.zeros(320), random.Random(num_pieces), []
    for _ in range(1500):
        views = [some_view(memory, rng) for _ in range(2)]
        found.append(not set(elements(views[0])).isdisjoint(elements(views[1])))
        if found[-1]:
            with pytest.raises(ValueError, match=r"must (have memory of its own, but shares|not be given twice)"):
                ewa.functional.average_experts_(views, 0.0)
        else:
            ewa.functional.average_experts_(views, 0.0)
    assert 0.1 < sum(found) / len(found) < 0.9


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param([X[:, ::2], X[1:]], id="rows in the gaps' range"),
        pytest.param([X[:, ::2], X[1:, ::2]], id="a part"),
        pytest.param([X[:, ::2], X[:, ::3]], id="other steps"),
        pytest.param([X[:, 0::2], X[:, 1::2], X[:, 5:6]], id="the second of three"),
        pytest.param([X.view(4, 3, 4)[..., :2], [X[0, 1:3], X[1, 4:6]]], id="separate"),
    ],
)
def test_shared(tensors):
    with pytest.raises(ValueError, match="must have memory of its own, but shares some with tensors"):
        ewa.functional.average_experts_(tensors, 0.3)


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param([X[:, ::2], X[:, 1::2]], id="even and odd"),
        pytest.param([X[:, i::3] for i in range(3)], id="three"),
        pytest.param([X.view(4, 3, 4)[:, i] for i in range(3)], id="query, key, value"),
        pytest.param([X.view(4, 3, 4)[..., :2], [X[0, 2:4], X[1, 6:8]]], id="separate experts in gaps"),
        pytest.param([X[:, :0], X[:, 3:3], X], id="no elements"),
    ],
)
def test_not_shared(tensors):
    ewa.functional.average_experts_(tensors, 0.3)


def test_large_tensors_are_not_gone_through():
    """Of 10^10 elements each: going through them would take hours."""
    steps = ((8, 10**10), (10**11, 2))

    def overlap(start, size):
        end = start + sum(step * (count - 1) for step, count in steps) + size
        places = [Place("cpu", 0, end, "a", 4, steps), Place("cpu", start, end, "b", size, steps)]
        return len([*overlaps(places)]) > 0

    assert not overlap(4, 4)
    assert overlap(3, 4)
    assert overlap(4, 5)
