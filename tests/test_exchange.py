"""Gradients in 8 bits: codes, payloads, and what comes of them, in one process; on several: test_distributed.py."""

import itertools

import pytest
import torch

import ewa_kernels as ewa
from ewa_kernels.integrations import payload
from ewa_kernels.kernels import exchange
from ewa_kernels.kernels import triton as triton_kernels
from ewa_kernels.kernels.exchange import BLOCK, num_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def encoded(values, by, residual=None):
    device = DEVICE if by is triton_kernels.exchange else "cpu"
    codes = torch.full((num_blocks(len(values)) * BLOCK,), 77, dtype=torch.int8, device=device)
    scales = torch.empty(num_blocks(len(values)), dtype=torch.bfloat16, device=device)
    rest = None if residual is None else residual.to(device)
    by.encode(values.to(device), codes, scales, rest)
    if residual is not None:
        residual.copy_(rest)
    return codes.cpu(), scales.cpu()


@pytest.fixture(params=["cpp", "triton"])
def by(request):
    return exchange if request.param == "cpp" else triton_kernels.exchange


@pytest.fixture
def in_torch(monkeypatch):
    """The implementation in PyTorch calls."""

    class Calls:
        def __getattr__(self, name):
            def run(*arguments):
                with monkeypatch.context() as patch:
                    patch.setattr(exchange, "_by_cpp", lambda tensor: False)
                    return getattr(exchange, name)(*arguments)

            return run

    return Calls()


def wild(n, dtype=torch.float32):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)) * torch.logspace(-38, 36, n)
    x[n // 3], x[n // 2], x[2 * n // 3 : 2 * n // 3 + 200] = torch.nan, -torch.inf, 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 128, 5000])
def test_same_bits_everywhere(by, in_torch, dtype, n):
    x = wild(n, dtype) if n > 1000 else torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    for feedback in (False, True):
        ours, theirs = (torch.linspace(-1e-3, 1e-3, n) if feedback else None for _ in range(2))
        codes, scales = encoded(x, by, ours)
        expected_codes, expected_scales = encoded(x, in_torch, theirs)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(scales.nan_to_num(-1), expected_scales.nan_to_num(-1))
        if feedback:
            assert torch.equal(ours, theirs)
            assert ours.isfinite().all()
    if by is not exchange and dtype == torch.bfloat16 and DEVICE == "cpu":
        dtype = torch.float32  # Triton's interpreter rounds bfloat16 towards zero
    out, expected = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
    device = DEVICE if by is triton_kernels.exchange else "cpu"
    result = out.to(device)
    by.decode(codes.to(device), scales.to(device), result)
    out.copy_(result)
    in_torch.decode(codes, scales, expected)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(1), expected.nan_to_num(1))


def test_totals_have_the_same_bits(by, in_torch):
    """Of several ranks, whose payloads lie one behind the other."""
    layout = payload.layout((3000, 70, 129), (False, True, False), 4, 3)
    generator = torch.Generator().manual_seed(0)
    received = payload.new_payloads(9, layout.num_bytes, torch.empty(0))
    for payloads in received.split(3):
        layout.encode([torch.randn(n, generator=generator) for n in (3000, 70, 129)], payloads, [None] * 6)
    codes, scales = layout.codes(received), layout.scales(received)
    expected = in_torch.total(codes, scales, 0.1)
    total = torch.zeros_like(expected)
    if by is exchange:
        total = by.total(codes, scales, 0.1)
    else:
        on_device = received.to(DEVICE)
        result = total.to(DEVICE)
        by.total(layout.codes(on_device), layout.scales(on_device), 0.1, result)
        total.copy_(result)
    assert torch.equal(total, expected)
    assert total.any()


class TestLayout:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 8])
    def test_every_element_once(self, world_size):
        sizes, exact = (5000, 7, 128, 0, 129, 1), (False, True, False, False, False, True)
        layout = payload.layout(sizes, exact, 2, world_size)
        seen = [torch.zeros(n) for n in sizes]
        used = torch.zeros(world_size, layout.blocks)
        for i, first, size, rank, block in layout.pieces:
            assert first % BLOCK == 0
            seen[i][first : first + size] += 1
            used[rank, block : block + num_blocks(size)] += 1
        assert used.max() <= 1
        assert [s.unique().tolist() for s in seen] == [[1.0], [0.0], [1.0], [], [1.0], [0.0]]
        tensors = [torch.randn(n, dtype=torch.float32).bfloat16() for n in sizes]
        payloads, out = payload.new_payloads(world_size, layout.num_bytes, tensors[0]), [t.clone() for t in tensors]
        layout.encode(tensors, payloads, [None] * 6)
        for t in out:
            t.fill_(torch.nan)
        layout.decode(payloads, out)
        for i, (ours, own) in enumerate(zip(out, tensors, strict=True)):
            assert torch.equal(ours, own) or (not exact[i] and (ours - own).float().norm() < 0.02 * own.float().norm())

    def test_parts_do_not_depend_on_what_lies_beside(self):
        """So that training that is resumed goes on to the bit, in whichever buckets DDP puts parameters then."""
        sizes, found = (5000, 640, 129), set()
        for order in itertools.permutations(range(3)):
            layout = payload.layout(tuple(sizes[i] for i in order), (False,) * 3, 4, 4)
            found.add(frozenset((order[p.tensor], p.first, p.size, p.rank) for p in layout.pieces))
        assert len(found) == 1

    def test_what_is_sent_as_it_is(self):
        layer = ewa.RandomPartitionMoE(8, 12, 4)
        exact = {name: payload.is_exact(p) for name, p in layer.named_parameters()}
        assert exact == {"up.weight": False, "up.bias": True, "down.weight": False, "down.bias": True}
        assert payload.is_exact(torch.nn.LayerNorm(3).weight)
        assert not payload.is_exact(torch.nn.Linear(3, 4).weight)


@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_error_and_bytes(world_size):
    """Of the mean of normal gradients, as DDP has it, and of a shard, as FSDP2 has it."""
    n = 2**20 // world_size * 2
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(world_size, n, generator=generator)
    layout = payload.layout((n,), (False,), 4, world_size)
    received = torch.empty(world_size, world_size, layout.num_bytes, dtype=torch.uint8)  # [to, from]
    for rank, grad in enumerate(grads):
        sent = payload.new_payloads(world_size, layout.num_bytes, grad)
        layout.encode([grad], sent, [None])
        received[:, rank] = sent
    exact, mean, owned = grads.double().mean(0), torch.empty(n), torch.empty(n)
    gathered = payload.new_payloads(world_size, layout.num_bytes, mean)
    for rank in range(world_size):
        total, _ = layout.total(received[rank], torch.float32, 1 / world_size)
        for _, first, size, owner, block in layout.pieces:
            if owner == rank:
                owned[first : first + size] = total[block * BLOCK : block * BLOCK + size]
        exchange.encode(total, layout.codes(gathered)[rank], layout.scales(gathered)[rank])
    layout.decode(gathered, [mean])
    assert (owned - exact).norm() < 0.008 * exact.norm()
    assert (mean - exact).norm() < 0.012 * exact.norm()
    assert layout.num_bytes * world_size < 0.27 * 4 * n
    assert layout.num_bytes * world_size < 0.53 * 2 * n


def test_small_values_beside_large_ones():
    """Blocks do not cross parameters: those of one that is 1,000 times smaller lose as little."""
    small, large = 1e-3 * torch.randn(130), torch.randn(1000)
    layout = payload.layout((1000, 130), (False, False), 4, 2)
    payloads, out = payload.new_payloads(2, layout.num_bytes, small), [torch.empty(1000), torch.empty(130)]
    layout.encode([large, small], payloads, [None] * 6)
    layout.decode(payloads, out)
    assert (out[1] - small).norm() < 0.012 * small.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_finite_stays_so(by, in_torch, dtype):
    """Scales are rounded up."""
    x = torch.full((130,), torch.finfo(dtype).max, dtype=dtype)
    codes, scales = encoded(x, by)
    for function in (by, in_torch):
        device = DEVICE if function is triton_kernels.exchange else "cpu"
        out = torch.empty(130, dtype=dtype, device=device)
        function.decode(codes.to(device), scales.to(device), out)
        assert out.isfinite().all()
        assert (out.float() > 0.99 * x.float().to(device)).all()
