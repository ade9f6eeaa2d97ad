"""What AdamW with averaging refuses, and whose averager it takes."""

import copy
import gc
import pickle

import pytest
import torch
from adamw_twins import averager_of, parameters, set_grads, twins
from torch import nn

import ewa_kernels as ewa


class TestBadInput:
    def test_amsgrad(self):
        with pytest.raises(ValueError, match="amsgrad must be False, got True"):
            ewa.optim.AdamW(parameters(), amsgrad=True)
        (optimizer, params, _), _ = twins()
        optimizer.param_groups[0]["amsgrad"] = True
        set_grads(params, 0)
        before = copy.deepcopy(params)
        with pytest.raises(ValueError, match="amsgrad must be False, got True"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))

    def test_options(self):
        params = parameters()
        with pytest.raises(TypeError, match="averager must be an ExpertAverager or None, got float"):
            ewa.optim.AdamW(params, averager=0.3)
        with pytest.raises(ValueError, match="bf16_copies needs an averager"):
            ewa.optim.AdamW(params, bf16_copies=True)
        with pytest.raises(TypeError, match="bf16_copies must be a bool"):
            ewa.optim.AdamW(params, averager=averager_of(params), bf16_copies=1)
        with pytest.raises(ValueError, match="Invalid learning rate"):
            ewa.optim.AdamW(params, lr=-1.0)

    def test_an_averager_that_would_run_twice(self):
        params = parameters()
        averager = averager_of(params)
        optimizer = ewa.optim.AdamW(params, averager=averager)
        with pytest.raises(ValueError, match="the averager is attached already"):
            averager.attach(optimizer)
        with pytest.raises(ValueError, match="the averager is attached already"):
            ewa.optim.AdamW(params, averager=averager)

    def test_a_failed_constructor_claims_no_averager(self):
        params = parameters()
        averager = averager_of(params)
        with pytest.raises(ValueError, match="Invalid"):
            ewa.optim.AdamW(params, lr=-1.0, averager=averager)
        ewa.optim.AdamW(params, averager=averager)

    def test_parameters_that_changed_their_size(self):
        params = parameters()
        optimizer = ewa.optim.AdamW(params)
        set_grads(params, 0)
        optimizer.step()
        params[7].data = torch.zeros(66, 5)
        params[7].grad = torch.zeros(66, 5)
        with pytest.raises(ValueError, match=r"exp_avg must be \[66, 5\] on cpu like its parameter, got \[33, 5\]"):
            optimizer.step()

    def test_a_bad_share_rate_changes_nothing(self):
        params = parameters()
        averager = averager_of(params)
        averager.schedule = lambda step: 1.5
        optimizer = ewa.optim.AdamW(params, averager=averager)
        set_grads(params, 0)
        with pytest.raises(ValueError, match=r"share_rate must be in \[0, 1\], got 1.5"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, parameters(), strict=True))
        assert not optimizer.state

    def test_a_dtype_without_a_kernel(self):
        params = [nn.Parameter(torch.randn(4, 8).to(dtype)) for dtype in (torch.float32, torch.float8_e4m3fn)]
        optimizer = ewa.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
        params[0].grad = torch.ones(4, 8)
        optimizer.step()  # one without a gradient is left alone
        optimizer.state.clear()
        params[1].grad = torch.ones(4, 8).to(torch.float8_e4m3fn)
        before = params[0].detach().clone()
        with pytest.raises(
            TypeError, match=r"param_groups\[1\]\['params'\]\[0\] must be float16, .*got torch.float8_e4m3fn"
        ):
            optimizer.step()
        assert torch.equal(params[0], before)
        assert not optimizer.state

    def test_sparse_gradients(self):
        embedding = nn.Embedding(4, 3, sparse=True)
        optimizer = ewa.optim.AdamW(embedding.parameters())
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()


class TestWhoseAverager:
    def test_of_one_optimizer_after_another(self):
        param = nn.Parameter(torch.randn(4, 10))
        averager = ewa.ExpertAverager([param], 0.3)
        first = ewa.optim.AdamW([param], averager=averager)
        with pytest.raises(ValueError, match="the averager is attached already"):
            ewa.optim.AdamW([param], averager=averager)
        del first
        gc.collect()
        ewa.optim.AdamW([param], averager=averager)

    @pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
    def test_a_copy_has_its_own(self, twin_of):
        param = nn.Parameter(torch.randn(4, 10))
        optimizer = ewa.optim.AdamW([param], averager=ewa.ExpertAverager([param], 0.3))
        twin = twin_of(optimizer)
        assert twin.averager is not optimizer.averager
        for averager in (optimizer.averager, twin.averager):
            with pytest.raises(ValueError, match="the averager is attached already"):
                averager.attach(twin)

    @pytest.mark.parametrize(
        "given",
        [
            lambda p: [p.detach()],
            lambda p: [p.data],
            lambda p: [list(p.detach().unbind(0))],
            lambda p: [p.view(4, 2, 5)],
        ],
        ids=["detached", "data", "rows", "view"],
    )
    def test_experts_in_a_parameters_memory_are_refused(self, given):
        """Two passes over the same memory at once."""
        param = nn.Parameter(torch.randn(4, 10))
        before = param.detach().clone()
        optimizer = ewa.optim.AdamW([param], averager=ewa.ExpertAverager(given(param), 0.3))
        param.grad = torch.ones_like(param)
        with pytest.raises(ValueError, match=r"shape \[.* must have memory of its own, but shares some with a"):
            optimizer.step()
        assert torch.equal(param, before)
        assert not optimizer.state

    def test_parameters_in_an_experts_memory_are_refused(self):
        flat = torch.randn(4, 10)
        params = [nn.Parameter(row) for row in flat]
        optimizer = ewa.optim.AdamW(params, averager=ewa.ExpertAverager([flat], 0.3))
        for param in params:
            param.grad = torch.ones_like(param)
        before = flat.clone()
        with pytest.raises(ValueError, match="must have memory of its own"):
            optimizer.step()
        assert torch.equal(flat, before)
        assert not optimizer.state
