"""Averaging and the layer in training loops as PyTorch offers them: optimizers, AMP, moving averages."""

import copy
import functools
import re

import numpy as np
import pytest
import torch
import vision  # noqa: F401
from models import Mlp, Transformer, tokens
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import backward, bits, make, make_model, same, train

import ewa_kernels as ewa
from ewa_kernels.kernels.blocked.products import candidates
from ewa_kernels.train import attachment

FUSED = [
    pytest.param(torch.optim.AdamW, {"fused": True}, id="AdamW"),
    pytest.param(torch.optim.SGD, {"fused": True, "momentum": 0.9}, id="SGD"),
    pytest.param(torch.optim.Adagrad, {"fused": True}, id="Adagrad"),
    pytest.param(ewa.optim.AdamW, {}, id="ours"),
]


class TestSkippedSteps:
    @pytest.mark.parametrize(("make_optimizer", "options"), FUSED)
    def test_fused_optimizer_told_by_attribute(self, make_optimizer, options):
        """Its hooks run, but nothing may move: no weight, no step of the schedule."""
        model, optimizer, averager = make(make_optimizer, **options)
        train(model, optimizer, 2)
        before, share_rate = bits(model), averager.share_rate
        backward(model)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
        optimizer.step()
        assert same(bits(model), before)
        assert (averager.num_steps, averager.share_rate) == (2, share_rate)
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        assert not same(bits(model), before)
        assert averager.num_steps == 3

    @pytest.mark.parametrize("unscale", [False, True])
    @pytest.mark.parametrize(
        ("make_optimizer", "options"),
        [*FUSED, pytest.param(torch.optim.AdamW, {}, id="not fused"), pytest.param(torch.optim.SGD, {}, id="plain")],
    )
    def test_grad_scaler(self, make_optimizer, options, unscale):
        """With and without clipping gradients first; a skipped step leaves no trace at all."""
        model, optimizer, averager = make(make_optimizer, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=True)
        # Not in the first step: torch's fused SGD would then go on with momentum that nobody has written.
        for overflow in (False, True, True, False):
            optimizer.zero_grad()
            before, steps = bits(model), averager.num_steps
            scaler.scale(model(torch.randn(16, 6)).square().mean()).backward()
            if overflow:
                model[0].weight.grad[0, 0] = torch.inf
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert same(bits(model), before) == overflow
            assert averager.num_steps == steps + (not overflow)

    @pytest.mark.parametrize(
        "make_optimizer",
        [
            torch.optim.SGD,
            functools.partial(torch.optim.SGD, momentum=0.9),
            torch.optim.Adagrad,
            torch.optim.AdamW,
            functools.partial(torch.optim.AdamW, lr=torch.tensor(0.01)),
        ],
    )
    def test_dry_runs_of_distributed_checkpoint(self, make_optimizer):
        """Getting and setting, before the first step and later, with and without state."""
        model = make_model()
        optimizer, averager = make_optimizer(model.parameters()), ewa.ExpertAverager(model, 0.3)
        averager.attach(optimizer)
        before = bits(model)
        get_optimizer_state_dict(model, optimizer)
        assert averager.num_steps == 0
        train(model, optimizer, 2)
        optimizer.zero_grad()
        state = get_optimizer_state_dict(model, optimizer)
        assert averager.num_steps == 2

        model = make_model()
        optimizer, averager = make_optimizer(model.parameters()), ewa.ExpertAverager(model, 0.3)
        averager.attach(optimizer)
        set_optimizer_state_dict(model, optimizer, state)
        assert same(bits(model), before)
        assert averager.num_steps == 2  # the optimizer's state has them
        train(model, optimizer, 1)
        assert averager.num_steps == 3

    def test_learning_rate_that_may_not_be_read(self):
        """As on a GPU, in a CUDA graph: on meta, reading raises."""
        optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
        assert not attachment.is_dry_run(optimizer, had_state=False)


class TestArgumentsOfTheAverager:
    @pytest.mark.parametrize(
        ("found_inf", "error", "words"),
        [
            ("no", TypeError, "found_inf must be a bool, a number, a tensor or None, got str 'no'"),
            ([], TypeError, "found_inf must be a bool, a number, a tensor or None, got list []"),
            (torch.tensor([0.0, 1.0]), ValueError, "found_inf must have one element, got shape [2]"),
        ],
    )
    def test_found_inf(self, found_inf, error, words):
        averager = ewa.ExpertAverager(make_model(), 0.3)
        with pytest.raises(error, match=re.escape(words)):
            averager.step(found_inf)
        assert averager.num_steps == 0

    def test_experts_by_name(self):
        first, second = torch.randn(3, 4), [torch.randn(2), torch.randn(2)]
        averager = ewa.ExpertAverager({"a": first, "b": second}, 0.3)
        assert list(averager.spread()) == ["a", "b"]

    @pytest.mark.parametrize(
        ("experts", "words"),
        [
            ("abc", "experts[0][0] must be a Tensor, got str"),
            ([nn.Sequential(nn.Linear(2, 2))], "experts[0][0] must be a Tensor, got Linear"),
            ({"a": [torch.zeros(2), torch.zeros(3)]}, "experts[0][1] must have the shape of experts[0][0]"),
        ],
    )
    def test_messages_speak_of_experts(self, experts, words):
        with pytest.raises((TypeError, ValueError), match=re.escape(words)):
            ewa.ExpertAverager(experts, 0.3)

    def test_spread_of_nothing(self):
        assert ewa.ExpertAverager([torch.randn(4, 0, 3)], 0.3).spread() == {"0": 0.0}

    def test_state_dict(self):
        with pytest.raises(TypeError, match=r"state_dict must be what state_dict\(\) returned, got NoneType"):
            ewa.ExpertAverager(make_model(), 0.3).load_state_dict(None)

    def test_folded_while_attached(self):
        model, optimizer, _ = make()
        ewa.fold_(model)
        backward(model)
        with pytest.raises(ValueError, match=r"call replace_ffn_.*or remove\(\) on what attach returned"):
            optimizer.step()


class TestShareRate:
    @pytest.mark.parametrize(
        ("share_rate", "error", "words"),
        [
            (lambda step: 1.5, ValueError, "share_rate must be in [0, 1], got 1.5"),
            (lambda step: torch.tensor(0.1), TypeError, "share_rate must be a number in [0, 1], got Tensor"),
            (ewa.LinearShareRate, TypeError, "got the class LinearShareRate: make one, LinearShareRate(…)"),
            ("0.3", TypeError, "share_rate must be a number in [0, 1], got str '0.3'"),
        ],
    )
    def test_is_checked_when_the_averager_is_made(self, share_rate, error, words):
        with pytest.raises(error, match=re.escape(words)):
            ewa.ExpertAverager(make_model(), share_rate)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (ewa.LinearShareRate(np.float64(0.3), np.int64(10)), ewa.LinearShareRate(0.3, 10)),
            (
                ewa.CosineShareRate(1, 10, start_step=np.int32(2), stop_step=np.int8(9)),
                ewa.CosineShareRate(1.0, 10, start=0, start_step=2, stop_step=9),
            ),
            (ewa.ConstantShareRate(1), 1),
            (ewa.ConstantShareRate(1), 1.0),
        ],
    )
    def test_equal_schedules_are_saved_in_equal_words(self, one, other):
        """Resuming with one instead of the other warns of nothing."""
        averagers = [ewa.ExpertAverager(make_model(), share_rate) for share_rate in (one, other)]
        assert averagers[0].state_dict() == averagers[1].state_dict()
        averagers[0].load_state_dict(averagers[1].state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
class TestAutocast:
    def test_layer_is_the_layer_in_16_bits(self, dtype):
        """To the bit, in training and eval; gradients in float32, perhaps those rounded to 16 bits.

        But where the processor has no products in 16 bits, autocast rounds no weights.
        """
        tolerance = 0.0 if candidates(dtype)[0].dtype == dtype else 4 * torch.finfo(dtype).eps
        layer = ewa.RandomPartitionMoE(8, 12, 4, gated=True, dropout=0.2)
        narrow = copy.deepcopy(layer).to(dtype)
        x = torch.randn(3, 7, 8)
        for mode in (True, False):
            layer.zero_grad()
            narrow.zero_grad()
            with torch.autocast("cpu", dtype):
                y = layer.train(mode)(x, seed=5)
            expected = narrow.train(mode)(x.to(dtype), seed=5)
            assert y.dtype == dtype
            if mode:  # eval takes the mean of the experts before it is rounded
                torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
                y.float().square().sum().backward()
                expected.float().square().sum().backward()
                for p, q in zip(layer.parameters(), narrow.parameters(), strict=True):
                    assert p.grad.dtype == torch.float32
                    scale = float(q.grad.abs().max())
                    torch.testing.assert_close(p.grad.to(dtype), q.grad, rtol=tolerance, atol=tolerance * scale)
            else:
                with torch.autocast("cpu", dtype):
                    assert torch.equal(y, layer.fuse()(x))

    def test_training(self, dtype):
        model, optimizer, averager = make()
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        x, target, losses = torch.randn(64, 6), torch.randn(64, 2), []
        for _ in range(40):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = nn.functional.mse_loss(model(x), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.9 * losses[0]
        assert averager.num_steps > 35
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


EMAS = {
    "timm": lambda model: ModelEmaV3(model, decay=0.8),
    "timm, one by one": lambda model: ModelEmaV3(model, decay=0.8, foreach=False),
    "torch": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8)),
    "torch, stochastic weight averaging": AveragedModel,
}


@pytest.mark.parametrize("name", EMAS)
def test_exponential_moving_averages_fold(name):
    """The copy follows the training, computes with its experts' mean, and folds into the dense model."""
    torch.manual_seed(0)
    model = Transformer(Mlp(), Mlp(), Mlp(), Mlp())
    dense = copy.deepcopy(model)
    ewa.replace_ffn_(model, num_experts=3)
    optimizer, averager = torch.optim.AdamW(model.parameters(), lr=1e-2), ewa.ExpertAverager(model, 0.1)
    averager.attach(optimizer)
    ema = EMAS[name](model)
    history = []
    for _ in range(5):
        optimizer.zero_grad()
        model(tokens()).square().mean().backward()
        optimizer.step()
        ema.update(model) if hasattr(ema, "update") else ema.update_parameters(model)
        history.append(model.blocks[1].mlp.up.weight.detach().clone())
    if name == "torch, stochastic weight averaging":
        torch.testing.assert_close(ema.module.blocks[1].mlp.up.weight, torch.stack(history).mean(0))
    y = ema.module.eval()(tokens())
    assert not torch.equal(y, model.eval()(tokens()))
    folded = ewa.fold_(ema.module)
    dense.load_state_dict(folded.state_dict(), strict=True)
    assert type(folded.blocks[1].mlp) is Mlp
    assert torch.equal(folded(tokens()), y)
    assert torch.equal(dense.eval()(tokens()), y)
    assert len(list(ewa.expert_tensors(model))) == 8
