"""The tuner, with Triton's interpreter in place of a GPU: candidates are held against what ships, and ranked."""

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import tune
from benchmarks.cases import Case
from benchmarks.timing import Stopwatch
from ewa_kernels.kernels.triton.configs import Tile

SHAPE = Case("small", 40, 32, 32, num_experts=2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_ranks_what_is_right(kernel):
    problem = tune.Operands(SHAPE, DEVICE, torch.float16)
    others = [Tile(16, 32, 32, 1, 4, 1), Tile(32, 16, 32, 1, 4, 1, per_multiprocessor=2)]
    ranked = tune.tune(problem, kernel, others, Stopwatch("cpu"), rounds=2)
    assert {tile for tile, _ in ranked} == {problem.shipped(kernel), *others}
    assert [ms for _, ms in ranked] == sorted(ms for _, ms in ranked)


def test_what_is_wrong_is_not_timed(monkeypatch):
    problem = tune.Operands(SHAPE, DEVICE, torch.float16)
    bad, run = Tile(16, 16, 16, 1, 4, 1), tune.Operands.run

    def broken(self, kernel, tile):
        outputs = run(self, kernel, tile)
        if tile == bad:
            outputs[0][3] += 1
        return outputs

    monkeypatch.setattr(tune.Operands, "run", broken)
    ranked = tune.tune(problem, "forward", [bad], Stopwatch("cpu"), rounds=2)
    assert [tile for tile, _ in ranked] == [problem.shipped("forward")]


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_candidates_are_many_and_differ(kernel):
    tiles = list(tune.candidates(kernel))
    assert len(set(tiles)) == len(tiles) >= 30
