"""Averaging and the layer in training loops as PyTorch offers them: optimizers, AMP, moving averages."""

import copy
import functools
import gc

import pytest
import torch
import vision  # noqa: F401
from models import Mlp, Transformer, tokens
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import SCHEDULE, backward, bits, make, make_model, same, train

import ewa_kernels as ewa
from ewa_kernels import attachment

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
        assert averager.num_steps == 0
        train(model, optimizer, 1)
        assert averager.num_steps == 1

    def test_learning_rate_that_may_not_be_read(self):
        """As on a GPU, in a CUDA graph: on meta, reading raises."""
        optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
        assert not attachment.is_dry_run(optimizer, had_state=False)


class TestAttach:
    def test_accumulated_gradients(self):
        """Once per step of the optimizer, whatever the number of backward passes."""
        results = []
        for attach in (True, False):
            model = make_model()
            optimizer, averager = torch.optim.AdamW(model.parameters()), ewa.ExpertAverager(model, SCHEDULE)
            if attach:
                averager.attach(optimizer)
            torch.manual_seed(1)
            for batch in range(12):
                backward(model)
                if batch % 4 == 3:
                    optimizer.step()
                    optimizer.zero_grad()
                    if not attach:
                        averager.step()
            assert averager.num_steps == 3
            results.append(bits(model))
        assert same(*results)

    @pytest.mark.parametrize("make_optimizer", [torch.optim.LBFGS, torch.optim.AdamW])
    def test_closures(self, make_optimizer):
        """LBFGS calls it many times within a step; averaging comes after the last."""
        results = []
        for attach in (True, False):
            model = make_model()
            optimizer, averager = make_optimizer(model.parameters(), lr=0.01), ewa.ExpertAverager(model, SCHEDULE)
            if attach:
                averager.attach(optimizer)
            calls, x = [], torch.randn(16, 6)

            def closure(model=model, optimizer=optimizer, calls=calls, x=x):
                calls.append(1)
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            for _ in range(2):
                optimizer.step(closure)
                if not attach:
                    averager.step()
            assert (len(calls) > 10) == (make_optimizer is torch.optim.LBFGS)
            assert averager.num_steps == 2
            results.append(bits(model))
        assert same(*results)

    def test_several_optimizers(self):
        """Each averager follows its own; an optimizer with two averagers runs both."""
        model = nn.ModuleList([make_model(), make_model(seed=1)])
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in model]
        averagers = [ewa.ExpertAverager(part, 0.2) for part in model]
        for averager, optimizer in zip(averagers, optimizers, strict=True):
            averager.attach(optimizer)
        third = ewa.ExpertAverager([model[0][1].up.weight], 0.2)
        third.attach(optimizers[0])
        before = bits(model[1])
        for _ in range(3):
            for part in model:
                backward(part)
            optimizers[0].step()
        assert [averager.num_steps for averager in (*averagers, third)] == [3, 0, 3]
        assert same(bits(model[1]), before)
        optimizers[1].step()
        assert [averager.num_steps for averager in (*averagers, third)] == [3, 1, 3]

    @pytest.mark.parametrize("before", [True, False])
    @pytest.mark.parametrize(
        "make_scheduler",
        [
            functools.partial(lr_scheduler.CosineAnnealingLR, T_max=4),
            functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=10),
            functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: step / 4),  # the first step at 0
        ],
        ids=["cosine", "one cycle", "warm-up"],
    )
    def test_schedulers_that_wrap_step(self, make_scheduler, before):
        model = make_model()
        optimizer, averager = torch.optim.AdamW(model.parameters(), lr=0.01), ewa.ExpertAverager(model, SCHEDULE)
        if before:
            averager.attach(optimizer)
        scheduler = make_scheduler(optimizer)
        if not before:
            averager.attach(optimizer)
        for step in range(4):
            train(model, optimizer, 1)
            scheduler.step()
            assert averager.num_steps == step + 1

    def test_a_wrapper_without_hooks_is_refused_and_claims_nothing(self):
        class Wrapper(torch.optim.Optimizer):
            def __init__(self, inner):
                self.inner = inner

        model, optimizer, averager = make()
        averager = ewa.ExpertAverager(model, 0.3)
        with pytest.raises(TypeError, match="must have step hooks, got Wrapper: attach to the optimizer it wraps"):
            averager.attach(Wrapper(optimizer))
        averager.attach(optimizer)

    def test_an_optimizer_that_is_gone_sets_the_averager_free(self):
        model, optimizer, averager = make()
        del optimizer
        gc.collect()
        averager.attach(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
class TestAutocast:
    def test_layer_is_the_layer_in_16_bits(self, dtype):
        """To the bit, in training and eval; gradients are those rounded to 16 bits, in float32."""
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
                assert torch.equal(y, expected)
                y.float().square().sum().backward()
                expected.float().square().sum().backward()
                for p, q in zip(layer.parameters(), narrow.parameters(), strict=True):
                    assert p.grad.dtype == torch.float32
                    assert torch.equal(p.grad, q.grad.float())
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
