"""The mean of experts by the Triton kernel: the specification to the bit, all tensors of a layer in one launch."""

import pytest
import torch

pytest.importorskip("triton")
import ewa_kernels as ewa
from ewa_kernels.kernels import merging
from ewa_kernels.kernels.triton import merging as triton_merging

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def experts(*shape, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)


def same(ours, specified):
    """Zeros with their signs."""
    ours, specified = (t.nan_to_num(nan=123.0) for t in (ours, specified))
    return torch.equal(ours, specified) and torch.equal(ours.signbit(), specified.signbit())


@pytest.mark.filterwarnings("ignore:invalid value encountered in add")  # NumPy's, of the interpreter: inf - inf
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_experts", [1, 2, 5, 33])
def test_to_the_bit(num_experts, dtype):
    layer = [
        experts(num_experts, 37, 61, dtype=dtype),
        experts(num_experts, 37, dtype=dtype, scale=1e-5),  # subnormal in float16
        experts(num_experts, 61, 37, dtype=dtype, scale=2e4).mT,
        experts(num_experts, 0, dtype=dtype),
    ]
    layer[0][0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    layer[0][-1, 0, 0] = -torch.inf
    layer[1][:, 5] = -0.0
    for count in range(1, 5):
        means = triton_merging.merge_experts(layer[:count])
        assert all(mean.is_contiguous() for mean in means)
        assert all(map(same, means, map(ewa.reference.merge_experts, layer)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_tie_goes_to_the_even_neighbour(dtype):
    """Of each number and the next: their mean is half-way between the two."""
    lower = torch.arange(0, 2000, dtype=torch.int16).view(dtype).to(DEVICE)
    upper = torch.arange(1, 2001, dtype=torch.int16).view(dtype).to(DEVICE)
    pair = torch.stack((lower, upper))
    assert torch.equal(triton_merging.merge_experts([pair])[0], ewa.reference.merge_experts(pair))


def test_one_launch_for_a_layer(monkeypatch):
    """Two, if the biases are of another dtype."""
    launches = []

    class Counting:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    kernel = triton_merging.merge_kernel
    monkeypatch.setattr(triton_merging, "merge_kernel", Counting())
    if DEVICE == "cpu":
        monkeypatch.setattr(merging, "_on_cpu", None)
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    weights = [experts(3, 8, 5, dtype=torch.bfloat16), experts(3, 5, 8, dtype=torch.bfloat16)]
    for dtype, expected in ((torch.bfloat16, 1), (torch.float32, 2)):
        biases = [experts(3, 8, dtype=dtype), experts(3, 5, dtype=dtype)]
        layer = [weights[0], biases[0], weights[1], biases[1]]
        launches.clear()
        means = merging.merge_experts(layer)
        assert len(launches) == expected
        assert all(map(torch.equal, means, map(ewa.reference.merge_experts, layer)))
