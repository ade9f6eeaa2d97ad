"""The comparison itself: what must fail does fail."""

import pytest
import torch
from parity import assert_parity

EXACT = torch.randn(64, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
class TestComparison:
    def test_rounded_result_passes(self, dtype):
        assert_parity("y", EXACT.to(dtype), EXACT, EXACT.to(dtype))

    @pytest.mark.parametrize(
        "spoil",
        [
            pytest.param(torch.zeros_like, id="zeros"),
            pytest.param(lambda t: torch.full_like(t, torch.nan), id="nan"),
            pytest.param(lambda t: t.index_fill(0, torch.tensor([3]), torch.nan), id="one row nan"),
            pytest.param(lambda t: t.index_fill(0, torch.tensor([3]), 0), id="one row zero"),
            pytest.param(lambda t: t.roll(1, 0), id="rows shifted"),
            pytest.param(lambda t: t * (1 + 32 * torch.finfo(t.dtype).eps), id="off by 32 roundings"),
        ],
    )
    def test_wrong_result_fails(self, dtype, spoil):
        with pytest.raises(AssertionError, match="error"):
            assert_parity("y", spoil(EXACT.to(dtype)), EXACT, EXACT.to(dtype))

    def test_all_zero_expectation_is_refused(self, dtype):
        zeros = torch.zeros(4, dtype=torch.float64)
        with pytest.raises(AssertionError, match="nothing could fail"):
            assert_parity("y", zeros.to(dtype), zeros, zeros.to(dtype))


def test_other_dtype_or_shape_fails():
    with pytest.raises(AssertionError, match="dtype"):
        assert_parity("y", EXACT, EXACT, EXACT.float())
    with pytest.raises(AssertionError, match="shape"):
        assert_parity("y", EXACT[:1], EXACT, EXACT)
