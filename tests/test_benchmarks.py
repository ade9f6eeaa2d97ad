"""The benchmarks' own rules: a wrong variant gets no time, and the timer sees what a variant does."""

import time

import pytest
import torch

import ewa_kernels as ewa
from benchmarks import ffn
from benchmarks.environment import environment
from benchmarks.timing import interleaved


@pytest.mark.parametrize("spoil", ["output", "gradient"])
def test_wrong_variant_is_refused(spoil):
    class Wrong(ewa.RandomPartitionMoE):
        def forward(self, x, *, seed=None):
            y = super().forward(x, seed=seed)
            return y * 1.001 if spoil == "output" else y + 0.1 * (x - x.detach())

    x = torch.randn(512, 8)
    ffn.check("right", ewa.RandomPartitionMoE(8, 12, 4), x)
    with pytest.raises(AssertionError, match="wrong is wrong by"):
        ffn.check("wrong", Wrong(8, 12, 4), x)


def test_timer_sees_what_a_variant_sleeps():
    timings = interleaved({"quick": lambda: None, "slow": lambda: time.sleep(0.02)}, rounds=5)
    assert timings["slow"].p20 <= timings["slow"].median <= timings["slow"].p80
    assert 20 <= timings["slow"].median - timings["quick"].median < 40


def test_result_says_where_it_is_from():
    assert {"commit", "device", "threads", "torch"} <= set(environment())
