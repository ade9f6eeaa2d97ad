"""EWACallback in Lightning's Trainer."""

import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import vision  # noqa: F401
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from models import Mlp, Transformer
from timm.optim import Lookahead
from torch import nn

import ewa_kernels as ewa
from ewa_kernels.integrations.callbacks import AveragingCallback
from ewa_kernels.integrations.lightning import EWACallback

SHARE_RATE = ewa.LinearShareRate(end=0.5, num_steps=10)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Logger(DummyLogger):
    def __init__(self):
        super().__init__()
        self.seen = []

    def log_metrics(self, metrics, step=None):
        self.seen.append({**metrics, "step": step})


class Module(pl.LightningModule):
    def __init__(self, seed=0, dense=False):
        super().__init__()
        torch.manual_seed(seed)
        self.model = Transformer(*(Mlp(drop=0.1) for _ in range(4)))
        if not dense:
            ewa.replace_ffn_(self.model, 3)

    def training_step(self, batch, batch_idx):
        return self.model(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data(shuffle=True):
    tokens = torch.randn(20, 5, 4, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=4, shuffle=shuffle)


def make_trainer(*callbacks, logger=False, **options):
    """Five batches an epoch."""
    defaults = {
        "max_steps": 10,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }
    return pl.Trainer(callbacks=list(callbacks), logger=logger, **(defaults | options))


class TestTraining:
    def test_averages_once_a_step_logs_and_folds(self, averagings):
        module, logger = Module(), Logger()
        make_trainer(EWACallback(share_rate=SHARE_RATE), logger=logger).fit(module, data())
        assert averagings == pytest.approx([0.05 * step for step in range(10)])
        seen = [metrics for metrics in logger.seen if "share_rate" in metrics]
        assert [metrics["step"] for metrics in seen] == [1, 3, 5, 7, 9]
        assert [metrics["share_rate"] for metrics in seen] == pytest.approx([0.05, 0.15, 0.25, 0.35, 0.45])
        assert all(0 < metrics["expert_spread"] < 0.1 for metrics in seen)
        Module(dense=True).load_state_dict(module.state_dict(), strict=True)

    def test_logs_the_mean_spread(self):
        module = Module()
        averager = ewa.ExpertAverager(module, 0.3)
        trainer = make_trainer(EWACallback(averager, fold_at_end=False), logger=Logger())
        trainer.fit(module, data())
        spreads = averager.spread().values()
        assert trainer.logged_metrics["expert_spread"].item() == pytest.approx(sum(spreads) / len(spreads))

    @pytest.mark.parametrize("every", [1, 3])
    def test_gradient_accumulation(self, averagings, every):
        logger = Logger()
        trainer = make_trainer(
            EWACallback(share_rate=SHARE_RATE), logger=logger, max_steps=4, accumulate_grad_batches=every
        )
        trainer.fit(Module(), data())
        assert averagings == pytest.approx([0, 0.05, 0.1, 0.15])
        rates = [metrics["share_rate"] for metrics in logger.seen if "share_rate" in metrics]
        assert rates == pytest.approx([0.05, 0.15])

    def test_manual_optimization_with_two_optimizers(self, averagings):
        """Only the one that has the experts counts."""

        class Manual(Module):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def configure_optimizers(self):
                head = set(self.model.head.parameters())
                rest = [p for p in self.parameters() if p not in head]
                return [torch.optim.SGD(head, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)]

            def training_step(self, batch, batch_idx):
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                    self.manual_backward(super().training_step(batch, batch_idx))
                    optimizer.step()

        make_trainer(EWACallback(share_rate=0.3)).fit(Manual(), data())
        assert averagings == [0.3] * 5  # ten steps, five of each

    def test_steps_that_a_gradient_scaler_skipped(self, averagings):
        class Overflows(Module):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                return loss * torch.inf if batch_idx in (1, 2) else loss

        precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
        callback = EWACallback(share_rate=SHARE_RATE)
        make_trainer(callback, plugins=precision, max_steps=5).fit(Overflows(), data(shuffle=False))
        assert averagings == pytest.approx([0, 0.05, 0.1])
        assert callback.averager.num_steps == 3

    def test_an_optimizer_that_does_not_call_its_base_class(self, averagings):
        class WithLookahead(Module):
            def configure_optimizers(self):
                return Lookahead(super().configure_optimizers())

        make_trainer(EWACallback(share_rate=SHARE_RATE)).fit(WithLookahead(), data())
        assert averagings == pytest.approx([0.05 * step for step in range(10)])

    def test_is_the_plain_loop(self):
        module = Module()
        loader = data(shuffle=False)
        state = {}

        class Start(pl.Callback):
            def on_train_batch_start(self, *args):
                state.setdefault("generator", torch.get_rng_state())

        make_trainer(EWACallback(share_rate=0.3, fold_at_end=False), Start(), max_steps=5).fit(module, loader)
        plain = Module().train()
        averager = ewa.ExpertAverager(plain, 0.3)
        optimizer = plain.configure_optimizers()
        batches = list(loader)
        torch.set_rng_state(state["generator"])
        for step, batch in enumerate(batches):
            optimizer.zero_grad()
            plain.training_step(batch, step).backward()
            optimizer.step()
            averager.step()
        for name, tensor in plain.state_dict().items():
            assert torch.equal(tensor, module.state_dict()[name]), name


class TestFrozenAtFirst:
    """Experts that are frozen when training begins, and trained later."""

    KEPT = 1 - 0.3 * 3 / 2  # of the spread, at each averaging

    class Task(Module):
        def __init__(self):
            super().__init__()
            self.spreads = []
            with torch.no_grad():
                for _, p in ewa.expert_tensors(self):
                    p.normal_()

        @property
        def backbone(self):
            return self.model.blocks

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-12)

        def on_train_batch_end(self, *args):
            self.spreads.append([(p - p.mean(0)).norm().item() for _, p in ewa.expert_tensors(self)])

    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize("given", [True, False])
    def test_backbone_finetuning(self, order, given):
        """Averaged in the steps in which they are trained, once in each."""
        module = self.Task()
        module.on_train_batch_end()
        callback = EWACallback(ewa.ExpertAverager(module, 0.3)) if given else EWACallback(share_rate=0.3)
        finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0, train_bn=False)
        make_trainer(*[finetuning, callback][::order]).fit(module, data())
        assert len(module.spreads) == 11
        for step, spreads in enumerate(module.spreads):
            kept = self.KEPT ** max(step - 5, 0)
            assert spreads == pytest.approx([kept * spread for spread in module.spreads[0]], rel=1e-3)
        assert not list(ewa.expert_tensors(module))

    def test_of_several_optimizers_the_one_that_they_join(self):
        """And of a single one at once: transformers' callback has no other time."""
        for num_optimizers in (1, 2):
            model, others = self.Task().model, [nn.Parameter(torch.ones(2)) for _ in range(num_optimizers)]
            experts = [p.requires_grad_(False) for _, p in ewa.expert_tensors(model)]
            optimizers = [torch.optim.SGD([p], lr=1e-12) for p in others]
            callback = AveragingCallback(None, 0.3, False, False)
            callback._begin(model)
            callback._attach(optimizers)
            assert (callback.averager.attached_to is None) == (num_optimizers == 2)
            for p in experts:
                p.requires_grad_(True)
            optimizers[-1].add_param_group({"params": experts})
            callback._attach(optimizers)
            before = callback.averager.spread()
            for optimizer in optimizers:
                optimizer.step()
            for name, spread in callback.averager.spread().items():
                assert spread == pytest.approx(self.KEPT * before[name])


class TestNoDoubleAveraging:
    def test_averager_that_is_attached(self, averagings):
        class Attached(Module):
            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                averager.attach(optimizer)
                return optimizer

        averager = ewa.ExpertAverager(module := Attached(), SHARE_RATE)
        make_trainer(EWACallback(averager)).fit(module, data())
        assert averagings == pytest.approx([0.05 * step for step in range(10)])

    def test_averager_of_the_one_pass_optimizer(self, averagings):
        class OnePass(Module):
            def configure_optimizers(self):
                return ewa.optim.AdamW(self.parameters(), lr=1e-2, averager=averager)

        averager = ewa.ExpertAverager(module := OnePass(), SHARE_RATE)
        make_trainer(EWACallback(averager)).fit(module, data())
        assert averager.num_steps == 10
        assert averagings in ([], pytest.approx([0.05 * step for step in range(10)]))  # with the extension, and without

    def test_fitted_again_after_an_error(self, averagings):
        class Fails(Module):
            def training_step(self, batch, batch_idx):
                if batch_idx == 3:
                    raise RuntimeError("stop")
                return super().training_step(batch, batch_idx)

        callback = EWACallback(share_rate=SHARE_RATE)
        with pytest.raises(RuntimeError, match="stop"):
            make_trainer(callback).fit(Fails(), data())
        make_trainer(callback).fit(Module(), data())
        assert averagings == pytest.approx([0, 0.05, 0.1] + [0.05 * step for step in range(10)])


class TestResuming:
    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
    @pytest.mark.parametrize("num_steps", [5, 3])
    def test_ten_steps_are_so_many_and_the_rest(self, num_steps, tmp_path):
        """From the end of an epoch, where the data gets a new order, and from inside one."""
        loader = data()
        if num_steps == 3:  # Lightning begins with the first batch again: all are alike here
            (tokens,) = loader.dataset.tensors
            loader = torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(tokens[:1].expand_as(tokens)), batch_size=4, shuffle=True
            )
        first, runs = tmp_path / "first.ckpt", []
        for seed, path in [(0, None), (1, first)]:
            module, logger = Module(seed), Logger()
            saves = ModelCheckpoint(tmp_path, every_n_train_steps=num_steps, filename="{step}", save_top_k=-1)
            trainer = make_trainer(EWACallback(share_rate=SHARE_RATE, fold_at_end=False), saves, logger=logger)
            torch.manual_seed(seed)
            trainer.fit(module, loader, ckpt_path=path)
            (log,) = (metrics for metrics in logger.seen if metrics["step"] == 9 and "share_rate" in metrics)
            runs.append((module, log["share_rate"], log["expert_spread"]))
            if path is None:
                (tmp_path / f"step={num_steps}.ckpt").rename(first)
        (straight, *log), (resumed, *other_log) = runs
        for name, tensor in straight.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name
        assert log == other_log

    def test_experts_and_averager_are_in_the_checkpoint(self, tmp_path):
        saves = ModelCheckpoint(tmp_path, save_last=True)
        trainer = make_trainer(EWACallback(share_rate=SHARE_RATE), saves)
        trainer.fit(module := Module(), data())
        content = torch.load(tmp_path / "last.ckpt", weights_only=False)
        (state,) = (state for name, state in content["callbacks"].items() if "EWACallback" in name)
        assert state["averager"]["num_steps"] == 10
        unfolded = Module(seed=1)
        unfolded.load_state_dict(content["state_dict"], strict=True)
        for name, tensor in ewa.folded_state_dict(unfolded).items():
            assert torch.equal(module.state_dict()[name], tensor), name

    def test_saved_before_training(self, tmp_path):
        """There is no averager yet; the checkpoint then has none."""
        trainer = make_trainer(EWACallback(share_rate=0.3))
        trainer.strategy.connect(Module())
        trainer.save_checkpoint(tmp_path / "early.ckpt")
        content = torch.load(tmp_path / "early.ckpt", weights_only=False)
        assert not any("EWACallback" in name for name in content["callbacks"])


class TestFolding:
    def test_not_if_not_wanted(self):
        make_trainer(EWACallback(share_rate=0.3, fold_at_end=False)).fit(module := Module(), data())
        assert list(ewa.expert_tensors(module))

    @pytest.mark.parametrize(
        "options", [{"fast_dev_run": True}, {"max_epochs": 0}, {"limit_train_batches": 0}], ids=["fast", "0", "no data"]
    )
    def test_not_without_training(self, options):
        """And training is possible afterwards."""
        module, callback = Module(), EWACallback(share_rate=0.3)
        make_trainer(callback, **options).fit(module, data())
        assert list(ewa.expert_tensors(module))
        make_trainer(callback).fit(module, data())
        assert not list(ewa.expert_tensors(module))

    def test_happens_after_a_run_that_was_resumed_at_its_end(self, tmp_path):
        module, other = Module(), Module(1)
        for trained, path in ((module, None), (other, tmp_path / "last.ckpt")):
            trainer = make_trainer(EWACallback(share_rate=0.3), ModelCheckpoint(tmp_path, save_last=True))
            trainer.fit(trained, data(), ckpt_path=path)
        assert not list(ewa.expert_tensors(other))
        for name, tensor in module.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name

    def test_happens_after_all_checkpoints(self, tmp_path):
        class Last(ModelCheckpoint):
            def on_train_end(self, trainer, pl_module):
                trainer.save_checkpoint(tmp_path / "end.ckpt")

        make_trainer(Last(tmp_path), EWACallback(share_rate=0.3)).fit(module := Module(), data())
        Module().load_state_dict(torch.load(tmp_path / "end.ckpt", weights_only=False)["state_dict"], strict=True)
        assert not list(ewa.expert_tensors(module))

    def test_model_that_is_made_in_configure_model(self):
        class Late(Module):
            def __init__(self):
                pl.LightningModule.__init__(self)
                self.model = None

            def configure_model(self):
                if self.model is None:
                    self.model = Transformer(Mlp(), Mlp())
                    ewa.replace_ffn_(self.model, 3)

        make_trainer(EWACallback(share_rate=0.3)).fit(module := Late(), data())
        Transformer(Mlp(), Mlp()).load_state_dict(module.model.state_dict(), strict=True)


def test_csv_logger(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    make_trainer(EWACallback(share_rate=0.3), logger=logger).fit(Module(), data())
    header, *rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"share_rate", "expert_spread"} <= set(header.split(","))
    assert len(rows) == 5


class TestBadInput:
    def test_a_module_without_experts(self):
        with pytest.raises(ValueError, match="call replace_ffn_"):
            make_trainer(EWACallback(share_rate=0.3)).fit(Module(dense=True), data())

    def test_experts_in_no_optimizer(self):
        class Head(Module):
            def configure_optimizers(self):
                return torch.optim.SGD(self.model.head.parameters(), lr=1e-2)

        with pytest.raises(ValueError, match="one optimizer must have the experts, got 0 of 1"):
            make_trainer(EWACallback(share_rate=0.3)).fit(Head(), data())

    def test_an_averager_of_another_model(self):
        """Nothing of this one would be averaged, and nobody told."""
        with pytest.raises(ValueError, match=r"got 0 of 1: .*the averager of the model that is trained"):
            make_trainer(EWACallback(ewa.ExpertAverager(Module(), 0.3))).fit(Module(), data())

    def test_fold_at_end(self):
        with pytest.raises(TypeError, match="fold_at_end must be a bool, got str 'no'"):
            EWACallback(share_rate=0.3, fold_at_end="no")

    def test_averager_and_share_rate(self):
        with pytest.raises(ValueError, match="averager or share_rate must be given, got neither"):
            EWACallback()
        with pytest.raises(TypeError, match="averager must be an ExpertAverager, got Linear"):
            EWACallback(nn.Linear(1, 1))


PYTORCH_LIGHTNING = """
import sys, warnings
import vision, torch
sys.modules["lightning"] = None
import pytorch_lightning as pl
import ewa_kernels as ewa
from ewa_kernels.integrations.callbacks import AveragingCallback
from ewa_kernels.integrations.lightning import EWACallback
from models import Mlp, Transformer

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Transformer(Mlp(), Mlp())
        ewa.replace_ffn_(self.model, 3)
    def training_step(self, batch, batch_idx):
        return self.model(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())

callback = EWACallback(share_rate=0.3)
trainer = pl.Trainer(max_steps=3, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)
module = Module()
trainer.fit(module, torch.randn(4, 2, 5, 4))
assert isinstance(callback, pl.Callback)
print(callback.averager.num_steps, list(ewa.expert_tensors(module)))
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)


def test_pytorch_lightning():
    result = run(PYTORCH_LIGHTNING)
    assert result.stdout.strip().splitlines()[-1:] == ["3 []"], result.stderr


def test_lightning_missing():
    code = "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
    result = run(code + "import ewa_kernels.integrations.lightning")
    assert "ImportError: ewa_kernels.integrations.lightning needs Lightning: pip install lightning" in result.stderr
