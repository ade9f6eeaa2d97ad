"""AdamW and averaging in one pass, against `torch.optim.AdamW` followed by `ExpertAverager.step`."""

import copy
import functools
import itertools
import os
import pickle

import pytest
import torch
from adamw_twins import DTYPES, assert_same, averager_of, parameters, set_grads, train, twins
from torch import nn

import ewa_kernels as ewa
from ewa_kernels.kernels import extension
from ewa_kernels.train import adamw


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}, id="all"),
        pytest.param({"maximize": True}, id="maximize"),
        pytest.param({"capturable": True}, id="capturable"),
        pytest.param({"lr": torch.tensor(0.03)}, id="lr tensor"),
    ],
)
def test_same_as_torch_then_averager(options, dtype):
    ours, theirs = twins(dtype, **options)
    train(ours, theirs, 20)
    assert_same(ours, theirs)


def test_moves_and_averages():
    """The comparisons above see it if either half is missing."""
    (optimizer, params, _), theirs = twins()
    before = [p.detach().clone() for p in params]
    train((optimizer, params, None), theirs)
    assert all((p - b).abs().max() > 1e-3 for p, b in zip(params, before, strict=True))
    without, theirs = twins(averager_options={"share_rate": 0.0})
    train(without, theirs)
    assert (params[0] - without[1][0]).abs().max() > 0.1


def test_parameter_groups():
    def groups(params):
        return [
            {"params": params[:3], "lr": 0.1, "weight_decay": 0.0},
            {"params": params[3:7], "betas": (0.5, 0.9), "maximize": True},
            {"params": params[7:], "eps": 0.1},
        ]

    ours, theirs = twins(groups=groups)
    train(ours, theirs)
    assert_same(ours, theirs)


def test_experts_without_gradients():
    """They are averaged all the same; their steps are not counted, nor those of one expert among others."""
    ours, theirs = twins()
    train(ours, theirs, 6, missing=(0, 3, 8))
    assert_same(ours, theirs)
    assert ours[0].state[ours[1][3]]["step"] == 5


def test_experts_that_the_optimizer_does_not_have():
    ours, theirs = twins(groups=lambda params: params[2:])
    train(ours, theirs)
    for p, q in zip(ours[1][:2], theirs[1][:2], strict=True):
        torch.testing.assert_close(p, q)
        assert not torch.equal(p, parameters()[0])


def test_without_an_averager():
    params, torchs = parameters(), parameters()
    optimizer, theirs = ewa.optim.AdamW(params), torch.optim.AdamW(torchs, fused=True)
    for step in range(4):
        set_grads(params, step)
        set_grads(torchs, step)
        optimizer.step()
        theirs.step()
    assert all(torch.allclose(p, q, rtol=1e-6, atol=1e-6) for p, q in zip(params, torchs, strict=True))


def test_other_layouts():
    """Parameters and gradients that are transposed, strided, expanded. torch's fused AdamW is wrong in these."""
    results = []
    for ours in (True, False):
        params = [nn.Parameter(p) for p in (torch.ones(3, 4, 5).mT, torch.arange(24.0).view(4, 6)[:, ::2])]
        averager = ewa.ExpertAverager(params, 0.2)
        kind = {"averager": averager} if ours else {}
        optimizer = (ewa.optim.AdamW if ours else torch.optim.AdamW)(params, lr=0.1, **kind)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            params[0].grad = torch.randn(3, 5, 1, generator=generator).expand(3, 5, 4)
            params[1].grad = torch.randn(3, 4, generator=generator).T
            optimizer.step()
            if not ours:
                averager.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q)


def test_share_rate_follows_the_schedule():
    ours, theirs = twins(averager_options={"share_rate": ewa.LinearShareRate(0.5, 4)})
    train(ours, theirs, 7)
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_rounded_as_the_averager_rounds(dtype):
    for rounding in ("stochastic", "nearest"):
        ours, theirs = twins(dtype, averager_options={"rounding": rounding, "seed": 7})
        train(ours, theirs, 1)
        for p, q in zip(ours[1], theirs[1], strict=True):
            assert (p == q).double().mean() > 0.99


class TestStateDict:
    def test_format_is_torchs(self):
        ours, theirs = twins()
        train(ours, theirs)
        mine, torchs = ours[0].state_dict(), theirs[0].state_dict()
        assert mine["param_groups"][0].pop("averaging_steps") == 5  # the averager's
        assert mine["param_groups"] == torchs["param_groups"]
        assert mine["state"].keys() == torchs["state"].keys()
        for i, state in mine["state"].items():
            described = {name: (value.dtype, value.shape, value.device) for name, value in state.items()}
            assert described == {n: (v.dtype, v.shape, v.device) for n, v in torchs["state"][i].items()}

    @pytest.mark.parametrize("fused", [True, False])
    def test_torchs_loads_into_ours_and_back(self, fused):
        """Also of an optimizer that is not fused, whose steps may be kept otherwise."""
        params = parameters()
        source = torch.optim.AdamW(params, fused=fused)
        for step in range(3):
            set_grads(params, step)
            source.step()
        ours, theirs = twins()
        for optimizer, params, _ in (ours, theirs):
            optimizer.load_state_dict(pickle.loads(pickle.dumps(source.state_dict())))
            for p, value in zip(params, source.param_groups[0]["params"], strict=True):
                p.data.copy_(value.detach())
        train(ours, theirs, start=3)
        for p, q in zip(ours[1], theirs[1], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        theirs[0].load_state_dict(copy.deepcopy(ours[0].state_dict()))
        train(ours, theirs, start=8)
        assert_same(ours, theirs)

    def test_copy_and_pickle(self):
        ours, theirs = twins()
        train(ours, theirs)
        for again in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
            optimizer, params = again((ours[0], ours[1]))
            assert optimizer.averager is not ours[2]
            twin = copy.deepcopy(theirs)
            train((optimizer, params, optimizer.averager), twin, start=5)
            assert_same((optimizer, params, optimizer.averager), twin)

    def test_distributed_checkpoint_averages_nothing(self):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        model = ewa.RandomPartitionMoE(6, 8, 3)
        averager = ewa.ExpertAverager(model, 0.3)
        optimizer = ewa.optim.AdamW(model.parameters(), averager=averager)
        before = averager.spread()
        get_optimizer_state_dict(model, optimizer)
        assert len(optimizer.state) > 0
        assert averager.spread() == before
        assert averager.num_steps == 0


class TestGradScaler:
    @pytest.mark.parametrize("unscale", [False, True])
    def test_same_as_torch(self, unscale):
        """Including the steps that are skipped, and gradients, which are unscaled in memory."""
        ours, theirs = twins()
        scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
        for step in range(6):
            for (optimizer, params, averager), scaler in zip((ours, theirs), scalers, strict=True):
                set_grads(params, step)
                scaler.scale(torch.ones(()))
                for p in params:
                    p.grad *= 1024
                if step == 2:
                    params[0].grad[0, 0, 0] = torch.inf
                if unscale:
                    scaler.unscale_(optimizer)
                before = params[0].detach().clone()
                scaler.step(optimizer)
                if not isinstance(optimizer, ewa.optim.AdamW) and step != 2:
                    averager.step()
                scaler.update(1024.0)
                assert torch.equal(params[0], before) == (step == 2)
            for p, q in zip(ours[1], theirs[1], strict=True):
                torch.testing.assert_close(p.grad, q.grad)
        assert_same(ours, theirs)
        assert ours[2].num_steps == 5


class TestWithoutTheExtension:
    def test_same_results(self, monkeypatch):
        ours, theirs = twins()
        monkeypatch.setattr(extension, "WHY_NOT", "it is not here")
        monkeypatch.setattr(ewa.backends, "_warned", set())
        with pytest.warns(
            UserWarning, match=r"(?s)adamw runs on cpu by 'torch'.*it is not here.*python -m ewa_kernels"
        ):
            train(ours, theirs, 1)
        train(ours, theirs, 4, start=1)  # it warned once
        assert_same(ours, theirs)
        for p, q in zip(ours[1], theirs[1], strict=True):
            assert torch.equal(p, q)

    def test_hooks_run_once(self, monkeypatch):
        monkeypatch.setattr(ewa.backends, "_warned", {"cpu"})
        for why_not in (extension.WHY_NOT, "it is not here"):
            monkeypatch.setattr(extension, "WHY_NOT", why_not)
            (optimizer, params, _), _ = twins()
            calls = []
            optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
            set_grads(params, 0)
            optimizer.step()
            assert calls == [1]


def test_closure():
    params = parameters()
    optimizer = ewa.optim.AdamW(params, averager=averager_of(params))

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_thread_count_changes_no_bit():
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            params = [nn.Parameter(torch.ones(4, 100_003)), nn.Parameter(torch.ones(70_001))]
            optimizer = ewa.optim.AdamW(params, averager=ewa.ExpertAverager(params[:1], 0.3))
            set_grads(params, 0)
            optimizer.step()
            results.append(params)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_learning_rate_schedulers():
    ours, theirs = twins(lr=0.1)
    schedulers = [torch.optim.lr_scheduler.StepLR(pair[0], 2, 0.5) for pair in (ours, theirs)]
    for step in range(5):
        train(ours, theirs, 1, start=step)
        for scheduler in schedulers:
            scheduler.step()
    assert_same(ours, theirs)


class Subclass(torch.Tensor):
    """May be anything."""


class TestByTorch:
    def test_a_subclass_is_warned_of_once(self, monkeypatch):
        monkeypatch.setattr(adamw, "_warned", set())
        _, theirs = twins()
        params = [nn.Parameter(p.detach().as_subclass(Subclass)) for p in parameters()]
        averager = averager_of(params)
        ours = (ewa.optim.AdamW(params, averager=averager), params, averager)
        with pytest.warns(
            UserWarning, match="AdamW steps by torch's kernels and then averages, .*: subclasses of Tensor"
        ):
            train(ours, theirs, 1)
        train(ours, theirs, 4, start=1)  # it warned once
        assert_same(ours, theirs)

    def test_too_many_experts_are_warned_of(self, monkeypatch):
        monkeypatch.setattr(adamw, "_warned", set())
        param = nn.Parameter(torch.arange(1025.0)[:, None])
        optimizer = ewa.optim.AdamW([param], lr=0.0, averager=ewa.ExpertAverager([param], 1024 / 1025))
        param.grad = torch.ones_like(param)
        with pytest.warns(UserWarning, match="the extension averages at most 1024 experts"):
            optimizer.step()
        torch.testing.assert_close(param, torch.full_like(param, 512.0))


@pytest.mark.skipif("EWA_TEST_EXTENSION" in os.environ, reason="of the installed one")
def test_extension_is_built():
    assert extension.WHY_NOT is None


class TestDtypes:
    """Parameters × gradients × first moments × second moments."""

    def trained(self, make_optimizer, dtypes):
        """Values and the step's error; `lr` and betas such that a moment that is wrong would show."""
        generator = torch.Generator().manual_seed(0)
        of_param, of_grad, *of_moments = dtypes
        p = nn.Parameter(torch.randn(4, 6, generator=generator).to(of_param))
        p.grad_dtype = None
        optimizer = make_optimizer([p], lr=0.1, betas=(0.5, 0.9))
        moments = (torch.zeros(4, 6, dtype=dtype) for dtype in of_moments)
        optimizer.state[p].update(zip(("step", "exp_avg", "exp_avg_sq"), (torch.zeros(()), *moments), strict=True))
        before = p.detach().clone()
        for _ in range(3):
            p.grad = torch.randn(4, 6, generator=generator).to(of_grad)
            try:
                optimizer.step()
            except RuntimeError as error:
                return before, str(error)
        return p.detach().clone(), None

    @pytest.mark.filterwarnings("ignore:AdamW steps by torch's kernels")
    @pytest.mark.parametrize("of_param", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_every_pair_that_torch_takes(self, of_param):
        """By its loop, which takes the most; where that takes none, torch's words, and nothing has changed."""
        kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
        num_taken = 0
        for others in itertools.product(kinds, repeat=3):
            dtypes = (of_param, *others)
            expected, refused = self.trained(functools.partial(torch.optim.AdamW, foreach=False), dtypes)
            ours, error = self.trained(ewa.optim.AdamW, dtypes)
            assert error == refused, dtypes
            # The pass makes a step of 16 bits in float32, as torch's fused one does.
            is_exact = refused is not None or len(set(dtypes)) > 1
            tolerance = 0.0 if is_exact else 8 * torch.finfo(of_param).eps
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance, msg=str(dtypes))
            num_taken += refused is None
        assert num_taken == 16

    @pytest.mark.filterwarnings("ignore:AdamW steps by torch's kernels")
    def test_with_averaging_options_and_a_gradient_scaler(self):
        """Gradients and moments in bfloat16, parameters in float32: unscaled, skipped and averaged as by torch."""
        results = []
        for ours in (True, False):
            generator = torch.Generator().manual_seed(0)
            params = [nn.Parameter(torch.randn(4, 6, generator=generator)) for _ in range(2)]
            averager = ewa.ExpertAverager(params, 0.3)
            options = {"lr": torch.tensor(0.1), "capturable": True} if ours else {"lr": 0.1, "foreach": False}
            kind = {"averager": averager} if ours else {}
            optimizer = (ewa.optim.AdamW if ours else torch.optim.AdamW)(params, maximize=True, **options, **kind)
            for p in params:
                p.grad_dtype = torch.bfloat16
                moments = {name: torch.zeros(4, 6, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p].update(step=torch.zeros(()), **moments)
            for skipped in (False, True, False):
                for p in params:
                    p.grad = torch.randn(6, 4, generator=generator).bfloat16().T
                if ours:
                    for p in params:
                        p.grad *= 4
                    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(skipped))
                    optimizer.step()
                elif not skipped:
                    optimizer.step()
                    averager.step()
            assert averager.num_steps == 2
            results.append(params)
        for p, q in zip(*results, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)
