"""AdamW's bfloat16 copies of experts in float32."""

import gc

import pytest
import torch

import ewa_kernels as ewa
from ewa_kernels.kernels import copies


class TestBfloat16Copies:
    def layer(self, **options):
        torch.manual_seed(0)
        layer = ewa.RandomPartitionMoE(16, 24, 4)
        averager = ewa.ExpertAverager(layer, 0.3)
        optimizer = ewa.optim.AdamW(layer.parameters(), lr=0.01, averager=averager, **options)
        return layer, optimizer

    def step(self, layer, optimizer, seed=0):
        x = torch.randn(30, 16, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, seed=seed)
        y.float().square().mean().backward()
        optimizer.step()
        return y.detach()

    def test_same_bits_with_and_without(self):
        (layer, optimizer), (other, plain) = self.layer(bf16_copies=True), self.layer()
        for seed in range(5):
            assert torch.equal(self.step(layer, optimizer, seed), self.step(other, plain, seed))
        for p, q in zip(layer.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
            assert torch.equal(p.grad, q.grad)

    def test_is_the_parameter_rounded(self):
        layer, optimizer = self.layer(bf16_copies=True)
        self.step(layer, optimizer)
        for p in (layer.up.weight, layer.down.weight):
            assert torch.equal(copies.find(p, torch.bfloat16), p.to(torch.bfloat16))
            assert copies.find(p, torch.float16) is None
        assert copies.find(layer.up.bias, torch.bfloat16) is None

    def test_is_used(self, monkeypatch):
        """No weight is cast any more."""
        layer, optimizer = self.layer(bf16_copies=True)
        self.step(layer, optimizer)
        cast, found = [], copies.find

        def find(tensor, dtype):
            result = found(tensor, dtype)
            if result is None and tensor.ndim == 3:
                cast.append(tensor)
            return result

        monkeypatch.setattr(copies, "find", find)
        self.step(layer, optimizer)
        assert not cast

    @pytest.mark.parametrize(
        "change",
        [
            lambda p: p.detach().add_(1),
            lambda p: p.mul_(2),
            lambda p: setattr(p, "data", p.data + 1),
            lambda p: ewa.functional.average_experts_([p], 0.5),
        ],
        ids=["detach", "in place", "data", "average"],
    )
    def test_is_never_stale(self, change):
        layer, optimizer = self.layer(bf16_copies=True)
        self.step(layer, optimizer)
        with torch.no_grad():
            change(layer.up.weight)
        assert copies.find(layer.up.weight, torch.bfloat16) is None
        self.step(layer, optimizer)
        assert torch.equal(copies.find(layer.up.weight, torch.bfloat16), layer.up.weight.to(torch.bfloat16))

    def test_of_an_optimizer_that_is_gone(self):
        """torch's fused ones change parameters without a count of it."""
        layer, optimizer = self.layer(bf16_copies=True)
        self.step(layer, optimizer)
        assert copies.find(layer.up.weight, torch.bfloat16) is not None
        del optimizer
        gc.collect()
        assert copies.find(layer.up.weight, torch.bfloat16) is None

    def test_of_a_model_that_is_gone(self):
        layer, optimizer = self.layer(bf16_copies=True)
        gc.collect()
        before = len(copies._copies)
        self.step(layer, optimizer)
        assert len(copies._copies) == before + 2
        del layer, optimizer
        gc.collect()
        assert len(copies._copies) == before
