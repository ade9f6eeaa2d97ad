"""The tuner of tiles, with the interpreter in place of a GPU: candidates are held against what ships, and ranked."""

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import tiles
from benchmarks.cases import Case
from benchmarks.timing import Stopwatch
from ewa_kernels.kernels.triton.configs import Tile

SHAPE = Case("small", 40, 32, 32, num_experts=2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_ranks_what_is_right(kernel):
    problem = tiles.Operands(SHAPE, DEVICE, torch.float16)
    others = [Tile(32, 16, 32, 1, 4, 1, per_multiprocessor=2)]
    ranked = tiles.tune(problem, kernel, others, Stopwatch("cpu"), rounds=2)
    assert {tile for tile, _ in ranked} == {problem.shipped(kernel), *others}
    assert [ms for _, ms in ranked] == sorted(ms for _, ms in ranked)


def test_what_is_wrong_is_not_timed(monkeypatch):
    problem = tiles.Operands(SHAPE, DEVICE, torch.float16)
    bad, run = Tile(16, 16, 16, 1, 4, 1), tiles.Operands.run

    def broken(self, kernel, tile):
        outputs = run(self, kernel, tile)
        if tile == bad:
            outputs[0][3] += 1
        return outputs

    monkeypatch.setattr(tiles.Operands, "run", broken)
    ranked = tiles.tune(problem, "forward", [bad], Stopwatch("cpu"), rounds=2)
    assert [tile for tile, _ in ranked] == [problem.shipped("forward")]


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_candidates_are_many_and_differ(kernel):
    candidates = list(tiles.candidates(kernel))
    assert len(set(candidates)) == len(candidates) >= 30
