"""Equation 6 by every implementation: C++, Triton (interpreted), and with it how 16-bit experts are rounded.

`extension_variants.py` runs this file with a sanitized build, and with the CUDA kernel compiled for the host.
"""

import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity

import ewa_kernels as ewa
from ewa_kernels.kernels import extension
from ewa_kernels.kernels import triton as triton_kernels

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HALF = [torch.float16, torch.bfloat16]
BACKENDS = [
    "cpp",
    pytest.param("triton", marks=pytest.mark.skipif(not triton_kernels.INTERPRETED, reason="on the CPU")),
]
average_experts_ = ewa.functional.average_experts_


def experts_of(num_experts, *shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_experts, *shape, generator=generator, dtype=torch.float64).to(dtype)


def equation_6(experts, beta):
    old, num_experts = experts.double(), len(experts)
    if num_experts == 1:
        return old
    return (1 - beta) * old + beta / (num_experts - 1) * (old.sum(0) - old)


def by_torch(experts, beta):
    """In PyTorch calls: what an implementation may be twice as wrong as."""
    if len(experts) == 1:
        return experts.clone()
    wide = experts if experts.dtype == torch.float64 else experts.float()
    return torch.lerp(wide, wide.mean(0), beta * len(experts) / (len(experts) - 1)).to(experts.dtype)


def check(tensors, beta, slack=1.0, **options):
    """`tensors`: stacked ones, or lists of separate ones."""
    old = [torch.stack(t) if isinstance(t, list) else t.clone() for t in tensors]
    average_experts_(tensors, beta, **options)
    for i, (new, before) in enumerate(zip(tensors, old, strict=True)):
        new = torch.stack(new) if isinstance(new, list) else new
        if before.numel() > 0:
            assert_parity(f"tensors[{i}]", new, equation_6(before, beta), by_torch(before, beta), slack)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", [*range(1, 10), 33])
def test_parity(num_experts, dtype, rounding, backend):
    # Distances from the first expert are summed up, which may be twice as far from the mean as what torch sums.
    slack = 2.0 if num_experts > 9 else 1.0
    for beta in (0.0, 0.3, (num_experts - 1) / num_experts, 1.0):
        tensors = [experts_of(num_experts, 7, 151, dtype=dtype)]
        check(tensors, beta, slack, rounding=rounding, seed=3, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 2, 3, 5, 8, 17, 511, 16384, 16385, 70001])
def test_sizes(numel, dtype):
    """Around a vector, a block, a tile."""
    for num_experts in (4, 9):
        check([experts_of(num_experts, numel, dtype=dtype)], 0.3, rounding="nearest", backend="cpp")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(1, 9))
def test_slices_that_are_not_aligned(offset, dtype):
    """All experts by the same, which is a head before the vectors, and each by another; nothing beside is touched."""
    for num_experts, numel in ((3, 4096), (4, 1001), (12, 100)):
        memory = experts_of(num_experts, numel + 16, dtype=dtype)
        before = memory.clone()
        inside = slice(offset, offset + numel)
        check([memory[:, inside]], 0.3, rounding="nearest", backend="cpp")
        assert torch.equal(memory[:, :offset], before[:, :offset])
        assert torch.equal(memory[:, offset + numel :], before[:, offset + numel :])


def test_mixed_list():
    """Stacked and separate, every dtype, many numbers of experts, views, no elements: in one call."""
    base = experts_of(6, 8, 9)
    tensors = [
        experts_of(4, 3),
        experts_of(2, 5, 7, dtype=torch.float64),
        [experts_of(1, 40, seed=e, dtype=torch.bfloat16)[0] for e in range(3)],
        base[1:4, ::2, 1:],
        experts_of(3, 4, 5).permute(0, 2, 1),
        experts_of(5, 4, 3, dtype=torch.float16).permute(2, 0, 1),
        [experts_of(1, 6, 5, seed=e)[0].T for e in range(11)],
        experts_of(4),
        experts_of(4, 0),
        experts_of(1, 5),
    ]
    for backend in ("cpp", "triton") if triton_kernels.INTERPRETED else ("cpp",):
        check(tensors, 0.3, seed=1, backend=backend)


def test_bits_do_not_depend_on_layout():
    """Stacked, separate, in another order in memory, a slice of something larger: the same numbers."""
    for dtype in DTYPES:
        expected = experts_of(5, 6, 20, dtype=dtype)
        stacked = expected.clone()
        average_experts_([expected], 0.2, seed=4)
        separate = [expert.clone() for expert in stacked]
        transposed = stacked.mT.contiguous().mT
        padded = torch.zeros(5, 6, 23, dtype=dtype)[:, :, 2:22]
        padded.copy_(stacked)
        for layout in (separate, transposed, padded):
            average_experts_([layout], 0.2, seed=4, backend="cpp")
            assert torch.equal(torch.stack(tuple(layout)), expected)


def test_more_tensors_than_fit_a_launch():
    tensors = [experts_of(4, 5, seed=i) for i in range(600)]
    check(tensors, 0.3, backend="cpp")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_list(data):
    tensors = []
    for i in range(data.draw(st.integers(1, 5))):
        dtype = data.draw(st.sampled_from(DTYPES))
        shape = data.draw(st.lists(st.integers(0, 40), max_size=3))
        tensor = experts_of(data.draw(st.integers(1, 12)), *shape, dtype=dtype, seed=i)
        kind = data.draw(st.sampled_from(["as it is", "transposed", "strided", "separate"]))
        if kind == "transposed" and len(shape) > 1:
            tensor = tensor.mT
        if kind == "strided" and shape:
            step, start = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
            tensor = tensor[..., start::step]
        tensors.append([t.clone() for t in tensor] if kind == "separate" else tensor)
    beta, seed = data.draw(st.floats(0, 1)), data.draw(st.integers(0, 2**63 - 1))
    # Rounded stochastically, a number may go to the farther neighbour: no bound by PyTorch's error holds then for every
    # beta. But the bits are those of contiguous tensors.
    plain = [torch.stack(tuple(group)) for group in tensors]
    average_experts_(plain, beta, seed=seed, backend="cpp")
    average_experts_(tensors, beta, seed=seed, backend="cpp")
    for group, expected in zip(tensors, plain, strict=True):
        assert torch.equal(torch.stack(tuple(group)), expected)
    check(tensors, beta, rounding="nearest", backend="cpp")


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_experts_are_not_changed(backend):
    for dtype in DTYPES:
        experts = experts_of(1, 1000, dtype=dtype).repeat(3, 1)
        before = experts.clone()
        average_experts_([experts], 0.3, seed=0, backend=backend)
        assert torch.equal(experts, before)


def test_thread_count_changes_no_bit():
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3, 7):
            torch.set_num_threads(num_threads)
            tensors = [experts_of(4, 100_003), experts_of(9, 70_001, dtype=torch.bfloat16)]
            average_experts_(tensors, 0.3, seed=9, backend="cpp")
            results.append(tensors)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class TestSkipping:
    @pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
    def test_found_inf(self, backend):
        for dtype in DTYPES:
            experts = experts_of(4, 33, dtype=dtype)
            before = experts.clone()
            average_experts_([experts], 0.3, found_inf=torch.ones(()), seed=0, backend=backend)
            assert torch.equal(experts, before)
            average_experts_([experts], 0.3, found_inf=torch.zeros(1), seed=0, backend=backend)
            assert not torch.equal(experts, before)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_share_rate_0_moves_nothing_next_to_a_nan(self, backend):
        experts = torch.tensor([[1.0, torch.nan, torch.inf], [2.0, 3.0, 4.0]])
        before = experts.clone()
        average_experts_([experts], torch.zeros(()), backend=backend)
        assert torch.equal(experts.view(torch.int32), before.view(torch.int32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_column(dtype, backend):
    for value in (torch.nan, torch.inf):
        experts = experts_of(4, 50, dtype=dtype)
        experts[1, 7] = value
        average_experts_([experts], 0.3, seed=1, backend=backend)
        assert not experts[:, 7].isfinite().any()
        assert experts[:, :7].isfinite().all()
        assert experts[:, 8:].isfinite().all()


@pytest.mark.parametrize("dtype", HALF)
class TestStochasticRounding:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_bits_are_those_of_the_reference(self, dtype, backend):
        """Up to a rounding in float32 that falls on the other side, once in thousands."""
        ours = [experts_of(1, 9, dtype=dtype), experts_of(3, 10_001, dtype=dtype) * 2.0**-10]
        theirs = [t.clone() for t in ours]
        average_experts_(ours, 0.1, seed=2**62 + 5, backend=backend)
        ewa.reference.average_experts_(theirs, 0.1, seed=2**62 + 5)
        assert (ours[1] == theirs[1]).double().mean() > 0.995

    def test_every_value_goes_to_a_neighbour_and_is_right_on_average(self, dtype):
        """Including what is below float16's smallest normal number, and what is below its smallest at all."""
        for scale in (1.0, 2.0**-13, 2.0**-20, 2.0**-24):
            experts = (experts_of(2, 64) * scale).to(dtype)
            exact = equation_6(experts, 0.25)
            # Neighbours of float32's results: the error of float32 itself is far below the spacing.
            lower, upper = experts.double().amin(0), experts.double().amax(0)
            total, num_draws = torch.zeros_like(exact), 4000
            for seed in range(num_draws):
                rounded = experts.clone()
                average_experts_([rounded], 0.25, seed=seed)
                assert (rounded >= lower).all()
                assert (rounded <= upper).all()
                total += rounded.double()
            nearest = exact.to(dtype)
            spacing = (torch.nextafter(nearest, torch.full_like(nearest, torch.inf)).double() - nearest.double()).abs()
            assert ((total / num_draws - exact).abs() < spacing * 5 / num_draws**0.5).all()

    def test_small_share_rates_do_not_stall(self, dtype):
        """300 steps at β = 0.01: exactly (1 − 0.01·4/3)^300 = 1.8 % of the spread is left; to nearest it stalls."""
        left = {}
        for rounding in ("stochastic", "nearest"):
            experts = (1 + experts_of(4, 2000) / 50).to(dtype)
            before = (experts.double() - experts.double().mean(0)).square().mean().sqrt()
            mean = experts.double().mean()
            for step in range(300):
                average_experts_([experts], 0.01, rounding=rounding, seed=step)
            left[rounding] = (experts.double() - experts.double().mean(0)).square().mean().sqrt() / before
            # Rounding moves a column's mean by 0.2 units or so a step, at random; there are 2,000 columns.
            drift = torch.finfo(dtype).eps * 0.2 * (300 / 2000) ** 0.5
            assert rounding == "nearest" or (experts.double().mean() - mean).abs() < 4 * drift
        noise = torch.finfo(dtype).eps / before  # what rounding itself keeps up
        assert left["stochastic"] < 0.018 + 1.5 * noise
        assert left["nearest"] > 2 * left["stochastic"]

    def test_seeds(self, dtype):
        """The same seed gives the same bits; another seed, another expert, another element others."""

        def rounded(seed, **options):
            experts = experts_of(1, 4096, dtype=dtype).repeat(4, 1)
            experts[2:] *= 1.3
            average_experts_([experts], 0.123, seed=seed, **options)
            return experts

        first = rounded(5)
        assert torch.equal(first, rounded(torch.tensor(5)))
        assert not torch.equal(first, rounded(6))
        assert not torch.equal(first[0], first[1])
        torch.manual_seed(3)
        drawn = rounded(None)
        torch.manual_seed(3)
        assert torch.equal(drawn, rounded(None))

    def test_float32_draws_no_seed(self, dtype):
        state = torch.get_rng_state()
        average_experts_([experts_of(4, 5)], 0.3)
        average_experts_([experts_of(4, 5, dtype=dtype)], 0.3, rounding="nearest")
        assert torch.equal(torch.get_rng_state(), state)
        average_experts_([experts_of(4, 5, dtype=dtype)], 0.3)
        assert not torch.equal(torch.get_rng_state(), state)


class TestSharedMemory:
    def test_overlapping_tensors(self):
        memory = torch.zeros(100)
        for tensors, shared in (
            ([memory[:40].view(4, 10), memory[30:70].view(4, 10)], ", but shares some with"),
            ([[memory[:10], memory[5:15]]], ", but shares some with"),
            ([torch.as_strided(memory, (4, 10), (5, 1))], " for every element"),
        ):
            with pytest.raises(ValueError, match=f"must have memory of its own{shared}"):
                average_experts_(tensors, 0.3)

    def test_overlap_of_what_is_not_contiguous(self):
        x, y = torch.zeros(4, 10), torch.zeros(6, 8)
        for tensors in (
            [x[:, ::2], x[:, ::2]],
            [[y.T, y.T]],
            [[y[:, ::2], y[:, ::2]]],
            [x, x[:, ::2]],
            [x.new_zeros(100).as_strided((4, 3, 2), (1, 4, 1))],
            [x.new_zeros(300).as_strided((2, 3, 3), (100, 1, 1))],
        ):
            with pytest.raises(ValueError, match=r"must (have memory of its own|not be given twice)"):
                average_experts_(tensors, 0.3)
        average_experts_([x[:, ::2], x[:, 1::2]], 0.3)

    def test_interleaved_experts_are_fine(self):
        """A flat buffer for each expert, in which every parameter is a slice."""
        memory = experts_of(4, 30)
        check([memory[:, :10], memory[:, 10:13], memory[:, 13:]], 0.3)


def test_one_bad_tensor_changes_none():
    for bad in (torch.zeros(4, 3).int(), torch.zeros(()), [torch.zeros(2), torch.zeros(3)], None):
        good = experts_of(4, 6)
        before = good.clone()
        with pytest.raises((TypeError, ValueError), match=r"tensors\[1\]"):
            average_experts_([good, bad], 0.3)
        assert torch.equal(good, before)


def test_autograd_is_told():
    experts = torch.nn.Parameter(experts_of(4, 6))
    loss = (experts**2).sum()
    average_experts_([experts], 0.3, backend="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_made_in_inference_mode():
    with torch.inference_mode():
        experts = experts_of(4, 6)
        check([experts], 0.3, backend="cpp")


def test_seeds_of_the_averager():
    """Ranks round alike, and so does a run that was resumed."""
    results = []
    for generator_seed in (0, 1):
        torch.manual_seed(generator_seed)
        experts = experts_of(4, 100, dtype=torch.bfloat16)
        averager = ewa.ExpertAverager([experts], 0.1)
        for _ in range(3):
            averager.step()
        resumed = ewa.ExpertAverager([experts], 0.1)
        resumed.load_state_dict(averager.state_dict())
        resumed.step()
        results.append(experts)
    assert torch.equal(*results)
    other = experts_of(4, 100, dtype=torch.bfloat16)
    averager = ewa.ExpertAverager([other], 0.1, seed=1)
    for _ in range(4):
        averager.step()
    assert not torch.equal(results[0], other)


@pytest.mark.skipif(os.environ.get("EWA_TEST_VARIANT") != "cuda-on-host", reason="has both kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_gives_the_bits_of_cpp(dtype, monkeypatch):
    """Averaging of few and of many experts, of more than shared memory holds, and the AdamW step before it.

    By elements, by vectors, and in a slice that has elements before the first vector.
    """

    def run():
        shapes = [(n, numel) for n in (2, 3, 4, 5, 8, 9, 40) for numel in (64, 1003, 1008)]
        tensors = [*(experts_of(*shape, dtype=dtype) for shape in shapes), experts_of(4, 1008, dtype=dtype)[:, 2:1002]]
        params = [torch.nn.Parameter(t) for t in [*tensors, experts_of(300, 72, dtype=dtype)]]
        averager = ewa.ExpertAverager(params, 0.3)
        averager.step()
        averaged = [p.detach().clone() for p in params]
        optimizer = ewa.optim.AdamW(params, lr=0.01, averager=averager)
        for p in params:
            p.grad = p.detach() * 3 - 1
        optimizer.step()
        optimizer.step()
        states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq", "step")]
        return [*averaged, *params, *states]

    by_cuda = run()
    monkeypatch.setattr(
        sys.modules["ewa_kernels._C"], "parameter_pass_cpu", sys.modules["ewa_kernels._C"].parameter_pass_by_cpp
    )
    for ours, theirs in zip(by_cuda, run(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif("EWA_TEST_EXTENSION" in os.environ, reason="of the installed one")
def test_extension_is_built():
    """Else nothing above has tested it."""
    assert extension.WHY_NOT is None
