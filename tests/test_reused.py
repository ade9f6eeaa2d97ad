"""Large memory that the next step uses again: nobody's numbers change, and nothing is kept for ever."""

import concurrent.futures
import copy
import io
import os
import signal
import threading

import pytest
import torch
from parity import random_ffn
from torch import nn

import ewa_kernels as ewa
from ewa_kernels.kernels import reused
from ewa_kernels.kernels.reused import Reused

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch):
    monkeypatch.setattr(Reused, "LEAST_BYTES", 1)
    Reused.clear()
    yield
    Reused.clear()


def empty(*shape, dtype=torch.float32):
    return Reused.empty(shape, dtype, CPU)


def free():
    """Sizes of the blocks that no tensor has."""
    Reused._collect()
    return sorted(block.size for block in Reused._free)


@pytest.fixture
def new_blocks(monkeypatch):
    """Those that are made."""
    made = []

    class Block(reused._Block):
        def __init__(self, size):
            super().__init__(size)
            made.append(self)

    monkeypatch.setattr(reused, "_Block", Block)
    return made


def test_used_again_when_nothing_has_it():
    first = empty(8, 4)
    address = first.data_ptr()
    second = empty(8, 4)
    assert second.data_ptr() != address
    view = first[3].detach()
    del first
    third = empty(8, 4)
    assert third.data_ptr() != address
    del view
    assert empty(2, 8, dtype=torch.float64).data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_like_any_other_tensor(dtype):
    tensor, expected = empty(5, 3, dtype=dtype), torch.arange(15).view(5, 3).to(dtype)
    tensor.copy_(expected)
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert tensor._base is None
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    for other in (copy.deepcopy(tensor), torch.load(file), tensor.clone().share_memory_(), tensor.share_memory_()):
        assert torch.equal(other, expected)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
class TestLayer:
    @pytest.fixture
    def layer(self, backend):
        torch.manual_seed(0)
        return ewa.RandomPartitionMoE(16, 24, 4, backend=backend)

    def step(self, layer, seed):
        layer(torch.randn(50, 16, generator=torch.Generator().manual_seed(seed)), seed=seed).square().sum().backward()
        return [p.grad for p in layer.parameters()]

    def exact(self, layer, *seeds):
        """Gradients added up over steps, by memory that is new."""
        other = copy.deepcopy(layer)
        other.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Reused, "LEAST_BYTES", 2**40)
            for seed in seeds:
                self.step(other, seed)
        return [p.grad for p in other.parameters()]

    def test_each_step_in_the_same_memory(self, layer, new_blocks):
        """Autograd takes it for `.grad` as it is, and copies nothing."""
        addresses = {grad.data_ptr() for grad in self.step(layer, 1)}
        assert addresses <= {block.array.ctypes.data for block in new_blocks}
        for seed in (2, 3):
            layer.zero_grad()
            grads = self.step(layer, seed)
            assert {grad.data_ptr() for grad in grads} == addresses
            for ours, exact in zip(grads, self.exact(layer, seed), strict=True):
                assert torch.equal(ours, exact)
            del grads, ours

    def test_what_somebody_has_stays(self, layer):
        """The gradients of a step before, or a row of one."""
        before = self.step(layer, 1)
        values, row = [grad.clone() for grad in before], before[0][2, 3]
        del before[0]
        layer.zero_grad()
        self.step(layer, 2)
        assert torch.equal(row, values[0][2, 3])
        for grad, value in zip(before, values[1:], strict=True):
            assert torch.equal(grad, value)

    def test_accumulated(self, layer):
        for _ in range(3):
            for seed in (1, 2, 3):
                self.step(layer, seed)
            for ours, exact in zip((p.grad for p in layer.parameters()), self.exact(layer, 1, 2, 3), strict=True):
                assert torch.equal(ours, exact)
            layer.zero_grad(set_to_none=False)
            assert not any(p.grad.any() for p in layer.parameters())

    def test_may_be_changed_in_place(self, layer):
        """With a graph too, as no view could be that was made without one."""
        y = layer(torch.ones(50, 16), seed=1).square().sum()
        for grad, p in zip(torch.autograd.grad(y, list(layer.parameters())), layer.parameters(), strict=True):
            grad.detach_().add_(0.1 * p)
            assert grad.requires_grad

    def test_graphs_at_the_same_time_do_not_share(self, layer):
        """Pre-activations too are of this memory."""

        def graph(seed):
            return layer(torch.ones(50, 16) * seed, seed=seed).square().sum()

        graphs = [graph(1), graph(2)]
        first, second = (torch.autograd.grad(y, list(layer.parameters())) for y in graphs)
        for a, b in zip(first, torch.autograd.grad(graph(1), list(layer.parameters())), strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(first[0], second[0])


def test_on_a_cpu_whatever_device_is_the_default_one():
    with torch.device("meta"):
        assert empty(4).device == CPU


def test_expert_linear():
    x, weight = torch.randn(40, 16), torch.randn(4, 24, 16, requires_grad=True)
    deal = {"permutation": torch.randperm(40).int(), "expert_offsets": torch.tensor([0, 10, 20, 30, 40]).int()}
    addresses = set()
    for _ in range(4):
        weight.grad = None
        ewa.functional.expert_linear(x, weight, None, **deal).sum().backward()
        addresses.add(weight.grad.data_ptr())
    assert len(addresses) == 1


@pytest.mark.parametrize("zero_grad", ["before forward", "before backward", "never"])
@pytest.mark.parametrize("num_tokens", [8, 400])
def test_layers_of_a_model_need_no_new_block_after_the_first_steps(zero_grad, num_tokens, new_blocks):
    """Pre-activations are smaller than gradients, or larger. Fewer are in use at a time than a step asks for."""
    torch.manual_seed(0)
    model = nn.Sequential(*[ewa.RandomPartitionMoE(16, 24, 4, backend="cpp") for _ in range(5)])
    x = torch.randn(num_tokens, 16)
    for step in range(8):
        new_blocks.clear()
        if zero_grad == "before forward":
            model.zero_grad()
        loss = model(x).sum()
        if zero_grad == "before backward":
            model.zero_grad()
        loss.backward()
        assert new_blocks == [] or step < 2


def test_a_model_that_is_trained_no_more_is_forgotten():
    old = [empty(7) for _ in range(50)]
    del old
    assert free() == 50 * [28]
    in_use = empty(9)
    for _ in range(400):
        empty(8)
    assert sum(free()) + 36 <= 2 * (32 + 36)
    assert in_use.shape == (9,)


def test_inputs_of_ever_new_lengths_keep_no_more_than_twice_what_was_in_use():
    """Of a pre-activation and four gradients at a time. What is free longest goes first: the gradients stay."""
    torch.manual_seed(0)
    layer = ewa.RandomPartitionMoE(16, 24, 4)
    gradients = sum(p.nbytes for p in layer.parameters())
    for num_tokens in range(65, 105):  # never as large as a gradient
        addresses = {p.grad.data_ptr() for p in layer.parameters() if p.grad is not None}
        layer.zero_grad()
        layer(torch.randn(num_tokens, 16)).sum().backward()
        assert not addresses or addresses == {p.grad.data_ptr() for p in layer.parameters()}
        assert gradients + sum(free()) <= 2 * (gradients + 4 * 24 * num_tokens)


def test_many_small_ones_after_a_large_model():
    """They keep no more blocks than their own size allows."""
    large = [empty(1000) for _ in range(100)]
    del large
    for num in range(1, 9000):
        empty(num % 300 + 1)
    assert sum(free()) <= 2 * 4 * 300


def test_what_cannot_be_had_counts_for_nothing():
    before = Reused._held, Reused._in_use
    with pytest.raises(RuntimeError, match="memory"):
        empty(2**60)
    assert (Reused._held, Reused._in_use) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_while_another_thread_asks():
    held, done = threading.Event(), threading.Event()

    def hold():
        with Reused._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        empty(7)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    done.set()
    thread.join()


def test_what_was_in_use_for_long_is_not_old():
    """Gradients that are accumulated over many steps, and freed then."""
    long = empty(7)
    address = long.data_ptr()
    for _ in range(50):
        empty(8)
    del long
    empty(8)
    assert empty(7).data_ptr() == address


def test_threads_do_not_share():
    parameters = [p.requires_grad_() for p in random_ffn(4, 32, 64, dtype=torch.float32)]
    xs = torch.randn(8, 500, 32, generator=torch.Generator().manual_seed(0))

    def grads(x):
        y = ewa.functional.moe_ffn(x, *parameters, seed=4)
        return torch.autograd.grad(y.square().sum(), parameters)

    expected = [[g.clone() for g in grads(x)] for x in xs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for found, exact in zip(pool.map(grads, xs), expected, strict=True):
                assert all(map(torch.equal, found, exact))


def test_what_is_small_is_the_allocators(monkeypatch):
    monkeypatch.setattr(Reused, "LEAST_BYTES", 1000)
    empty(249)
    assert free() == []
    empty(250)
    assert free() == [1000]
