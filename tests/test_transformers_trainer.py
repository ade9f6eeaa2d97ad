"""EWACallback in the Trainer of transformers."""

import shutil
import subprocess
import sys

import pytest
import torch
import vision  # noqa: F401
from timm.optim import Lookahead
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import ewa_kernels as ewa
from ewa_kernels.integrations.transformers import EWACallback

SHARE_RATE = ewa.LinearShareRate(end=0.5, num_steps=10)


def make_model(seed=0):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    return ViTForImageClassification(config)


def with_experts(seed=0):
    model = make_model(seed)
    ewa.replace_ffn_(model, 3)
    return model


class Data(torch.utils.data.Dataset):
    def __init__(self, size=24):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(size, 1, 8, 8, generator=generator)
        self.labels = torch.randint(3, (size,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


def make_trainer(model, folder, callback=None, *, optimizer=None, kind=Trainer, **options):
    defaults = {
        "max_steps": 10,
        "per_device_train_batch_size": 8,  # three batches an epoch
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(folder), **(defaults | options))
    return kind(
        model,
        arguments,
        train_dataset=Data(),
        eval_dataset=Data(),
        optimizers=(optimizer, None),
        callbacks=[callback] if callback else None,
    )


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class TestTraining:
    def test_averages_once_a_step_and_logs(self, averagings, tmp_path):
        trainer = make_trainer(model := with_experts(), tmp_path, EWACallback(share_rate=SHARE_RATE))
        trainer.train()
        assert averagings == pytest.approx([0.05 * step for step in range(10)])
        assert [entry["step"] for entry in logged(trainer)] == [2, 4, 6, 8, 10]
        assert [entry["share_rate"] for entry in logged(trainer)] == pytest.approx([0.05, 0.15, 0.25, 0.35, 0.45])
        assert all(0 < entry["expert_spread"] < 0.1 for entry in logged(trainer))
        assert not list(ewa.expert_tensors(model))

    def test_logs_the_mean_spread(self, tmp_path):
        averager = ewa.ExpertAverager(model := with_experts(), 0.3)
        trainer = make_trainer(model, tmp_path, EWACallback(averager, fold_at_end=False))
        trainer.train()
        spreads = averager.spread().values()
        assert logged(trainer)[-1]["expert_spread"] == pytest.approx(sum(spreads) / len(spreads))
        assert logged(trainer)[-1]["share_rate"] == 0.3

    def test_other_logs_stay_as_they_are(self, tmp_path):
        trainer = make_trainer(with_experts(), tmp_path, EWACallback(share_rate=0.3), eval_strategy="epoch")
        trainer.train()
        others = [entry for entry in trainer.state.log_history if "loss" not in entry]
        assert others
        assert not any("share_rate" in entry for entry in others)

    def test_loggers_see_it_too(self, tmp_path):
        class Logger(TrainerCallback):
            def __init__(self):
                self.seen = []

            def on_log(self, args, state, control, logs=None, **kwargs):
                self.seen.append(dict(logs))

        before, after = Logger(), Logger()
        trainer = make_trainer(with_experts(), tmp_path, before)
        callback = EWACallback(share_rate=0.3)
        trainer.add_callback(callback)
        assert callback.add_to(trainer) is callback
        trainer.add_callback(after)
        assert trainer.callback_handler.callbacks.count(callback) == 1
        trainer.train()
        for logger in (before, after):
            assert [logs["share_rate"] for logs in logger.seen if "loss" in logs] == [0.3] * 5
            assert all(logs["expert_spread"] > 0 for logs in logger.seen if "loss" in logs)

    def test_gradient_accumulation(self, averagings, tmp_path):
        callback = EWACallback(share_rate=SHARE_RATE)
        make_trainer(with_experts(), tmp_path, callback, max_steps=4, gradient_accumulation_steps=3).train()
        assert averagings == pytest.approx([0, 0.05, 0.1, 0.15])
        assert callback.averager.num_steps == 4

    def test_an_optimizer_that_does_not_call_its_base_class(self, averagings, tmp_path):
        model = with_experts()
        optimizer = Lookahead(torch.optim.AdamW(model.parameters()))
        make_trainer(model, tmp_path, EWACallback(share_rate=0.3), optimizer=optimizer, max_steps=4).train()
        assert averagings == [0.3] * 4

    def test_not_folded_without_training(self, tmp_path):
        trainer = make_trainer(
            model := with_experts(), tmp_path, EWACallback(share_rate=0.3), max_steps=-1, num_train_epochs=0
        )
        trainer.train()
        assert list(ewa.expert_tensors(model))

    def test_is_the_plain_loop(self, tmp_path):
        """The weights are those of a loop with an explicit averager.step(), to the bit."""
        model = with_experts()
        trainer = make_trainer(
            model, tmp_path, EWACallback(share_rate=0.3, fold_at_end=False), max_steps=3, seed=5, max_grad_norm=0
        )
        batches = []
        trainer.data_collator, collate = lambda x: batches.append(collate(x)) or batches[-1], trainer.data_collator
        state = {}

        class Start(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                state.setdefault("generator", torch.get_rng_state())

        trainer.add_callback(Start())
        trainer.train()

        plain = with_experts().train()
        averager = ewa.ExpertAverager(plain, 0.3)
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
        torch.set_rng_state(state["generator"])
        for step in range(3):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (3 - step) / 3
            optimizer.zero_grad()
            plain(**batches[step]).loss.backward()
            optimizer.step()
            averager.step()
        for name, tensor in plain.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name


class TestNoDoubleAveraging:
    def test_averager_that_is_attached(self, averagings, tmp_path):
        model = with_experts()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        averager = ewa.ExpertAverager(model, SHARE_RATE)
        averager.attach(optimizer)
        make_trainer(model, tmp_path, EWACallback(averager), optimizer=optimizer).train()
        assert averagings == pytest.approx([0.05 * step for step in range(10)])

    def test_averager_of_the_one_pass_optimizer(self, averagings, tmp_path):
        model = with_experts()
        averager = ewa.ExpertAverager(model, SHARE_RATE)
        optimizer = ewa.optim.AdamW(model.parameters(), lr=1e-2, averager=averager)
        trainer = make_trainer(model, tmp_path, EWACallback(averager), optimizer=optimizer)
        trainer.train()
        assert averager.num_steps == 10
        assert averagings in ([], pytest.approx([0.05 * step for step in range(10)]))  # with the extension, and without
        assert logged(trainer)[-1]["share_rate"] == pytest.approx(0.45)

    def test_trained_again_after_an_error(self, averagings, tmp_path):
        class Fails(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 3:
                    raise RuntimeError("stop")

        trainer = make_trainer(with_experts(), tmp_path, EWACallback(share_rate=SHARE_RATE))
        trainer.add_callback(Fails())
        with pytest.raises(RuntimeError, match="stop"):
            trainer.train()
        trainer.remove_callback(Fails)
        trainer.train()
        assert averagings == pytest.approx([0, 0.05, 0.1] + [0.05 * step for step in range(10)])

    def test_nothing_is_averaged_after_training(self, averagings, tmp_path):
        callback = EWACallback(share_rate=0.3, fold_at_end=False)
        trainer = make_trainer(with_experts(), tmp_path, callback)
        trainer.train()
        trainer.optimizer.optimizer.step()
        assert len(averagings) == 10
        callback.averager.attach(trainer.optimizer.optimizer)


class TestSaving:
    def test_the_model_is_dense_after_training(self, tmp_path):
        trainer = make_trainer(model := with_experts(), tmp_path, EWACallback(share_rate=0.3))
        trainer.train()
        trainer.save_model()
        loaded, report = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        images = Data().images
        with torch.no_grad():
            assert torch.equal(loaded(images).logits, model.eval()(images).logits)
        assert trainer.evaluate()["eval_loss"] > 0

    def test_each_checkpoint_has_dense_weights_and_all_experts(self, tmp_path):
        model = with_experts()
        callback = EWACallback(share_rate=0.3, fold_at_end=False)
        make_trainer(model, tmp_path, callback, save_strategy="steps", save_steps=5).train()
        for step in (5, 10):
            folder = tmp_path / f"checkpoint-{step}"
            loaded, report = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
            assert not report["missing_keys"]
            assert all(".mlp.up." in key or ".mlp.down." in key for key in report["unexpected_keys"])
            unfolded = make_model(seed=1)
            ewa.load_unfolded_(unfolded, folder / "ewa_experts.pt")
            for name, tensor in ewa.folded_state_dict(unfolded).items():
                assert torch.equal(loaded.state_dict()[name], tensor), name
        for name, tensor in model.state_dict().items():  # of the last one
            assert torch.equal(unfolded.state_dict()[name], tensor), name

    def test_the_best_model_has_the_best_experts(self, tmp_path):
        class Worse(Trainer):
            """The second checkpoint is the best."""

            def evaluate(self, *args, **kwargs):
                metrics = {"eval_loss": abs(self.state.global_step - 4.0)}
                self.log(metrics)
                return metrics

        for name, fold_at_end in [("experts", False), ("folded", True)]:
            model = with_experts()
            trainer = make_trainer(
                model,
                tmp_path / name,
                EWACallback(share_rate=0.3, fold_at_end=fold_at_end),
                kind=Worse,
                save_strategy="steps",
                save_steps=2,
                eval_strategy="steps",
                eval_steps=2,
                load_best_model_at_end=True,
            )
            trainer.train()
            best = make_model(seed=1)
            ewa.load_unfolded_(best, tmp_path / name / "checkpoint-4" / "ewa_experts.pt")
            expected = ewa.folded_state_dict(best) if fold_at_end else best.state_dict()
            assert model.state_dict().keys() == expected.keys()
            for key, tensor in expected.items():
                assert torch.equal(model.state_dict()[key], tensor), key


class TestResuming:
    def make(self, folder, seed=0, save_steps=5, **options):
        model = with_experts(seed)
        callback = EWACallback(share_rate=SHARE_RATE, fold_at_end=False, **options)
        return model, make_trainer(model, folder, callback, save_strategy="steps", save_steps=save_steps)

    @pytest.fixture
    def straight(self, tmp_path):
        model, trainer = self.make(tmp_path / "run")
        trainer.train()
        shutil.rmtree(tmp_path / "run" / "checkpoint-10")
        return model, trainer

    def assert_same(self, model, trainer, straight):
        for name, tensor in straight[0].state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        last, expected = logged(trainer)[-1], logged(straight[1])[-1]
        for name in ("step", "loss", "share_rate", "expert_spread"):
            assert last[name] == expected[name], name

    def test_ten_steps_are_five_and_five(self, straight, averagings, tmp_path):
        model, trainer = self.make(tmp_path / "run", seed=1)
        trainer.train(resume_from_checkpoint=True)
        assert averagings == pytest.approx([0.05 * step for step in range(5, 10)])
        self.assert_same(model, trainer, straight)

    def test_twice(self, straight, tmp_path):
        """A checkpoint of a resumed run is as good as another."""
        self.make(tmp_path / "run", save_steps=3)[1].train()
        for step in (6, 9):
            shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
        for step in (3, 6):
            model, trainer = self.make(tmp_path / "run", seed=step, save_steps=3)
            trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        self.assert_same(model, trainer, straight)

    def test_from_another_folder(self, straight, tmp_path):
        (tmp_path / "run" / "checkpoint-5").rename(moved := tmp_path / "moved")
        model, trainer = self.make(tmp_path / "run", seed=1)
        with pytest.raises(ValueError, match=r"are not in .*checkpoint-5: give its folder as EWACallback"):
            trainer.train(resume_from_checkpoint=str(moved))
        model, trainer = self.make(tmp_path / "run", seed=1, resume_from_checkpoint=moved)
        trainer.train(resume_from_checkpoint=str(moved))
        self.assert_same(model, trainer, straight)

    def test_another_run_in_the_output_folder_is_not_taken_for_it(self, straight, tmp_path):
        (tmp_path / "run" / "checkpoint-5").rename(moved := tmp_path / "moved")
        self.make(tmp_path / "run", seed=3)[1].train()
        _, trainer = self.make(tmp_path / "run", seed=1)
        with pytest.raises(ValueError, match="are not in"):
            trainer.train(resume_from_checkpoint=str(moved))

    def test_in_the_folder_of_a_trial(self, straight, tmp_path):
        """As a hyperparameter search has one for each."""

        class InTrial(Trainer):
            def _get_output_dir(self, trial):
                return str(tmp_path / "search" / "run-3")

        def make(seed):
            callback = EWACallback(share_rate=SHARE_RATE, fold_at_end=False)
            options = {"save_strategy": "steps", "save_steps": 5, "kind": InTrial}
            return (model := with_experts(seed)), make_trainer(model, tmp_path / "search", callback, **options)

        make(seed=0)[1].train()
        model, trainer = make(seed=1)
        trainer.train(resume_from_checkpoint=str(tmp_path / "search" / "run-3" / "checkpoint-5"))
        self.assert_same(model, trainer, straight)

    def test_without_the_callback(self, averagings, tmp_path):
        """An averager that belongs to the optimizer, whose state dict has its steps; experts are in the state dict."""

        def make(seed):
            torch.manual_seed(seed)
            sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
            model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20))
            ewa.replace_ffn_(model, 3, init="independent")
            averager = ewa.ExpertAverager(model, SHARE_RATE, seed=3)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            averager.attach(optimizer)
            options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10, "report_to": "none", "use_cpu": True}
            arguments = TrainingArguments(str(tmp_path), disable_tqdm=True, **options)
            rows = torch.randint(20, (16, 6), generator=torch.Generator().manual_seed(0))
            data = [{"input_ids": row, "labels": row} for row in rows]
            return model, Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))

        straight, trainer = make(seed=0)
        trainer.train()
        averagings.clear()
        model, trainer = make(seed=1)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        assert averagings == pytest.approx([0.05 * step for step in range(5, 10)])
        for name, tensor in straight.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name

    def test_from_a_checkpoint_without_averaging(self, averagings, tmp_path):
        make_trainer(with_experts(), tmp_path / "run", save_strategy="steps", save_steps=5).train()
        _, trainer = self.make(tmp_path / "run")
        with pytest.warns(UserWarning, match="saved without EWACallback.* averaging begins anew"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
        assert averagings == pytest.approx([0.05 * step for step in range(5)])


class TestBadInput:
    def test_averager_and_share_rate(self):
        averager = ewa.ExpertAverager(with_experts(), 0.3)
        with pytest.raises(ValueError, match="averager or share_rate must be given, got both"):
            EWACallback(averager, share_rate=0.3)
        with pytest.raises(ValueError, match="averager or share_rate must be given, got neither"):
            EWACallback()
        with pytest.raises(TypeError, match="averager must be an ExpertAverager, got float"):
            EWACallback(0.3)
        with pytest.raises(ValueError, match=r"share_rate must be in \[0, 1\], got 2"):
            EWACallback(share_rate=2)
        with pytest.raises(ValueError, match=r"share_rate must be in \[0, 1\], got 1.5"):
            EWACallback(share_rate=lambda step: 1.5)
        with pytest.raises(TypeError, match="got the class LinearShareRate"):
            EWACallback(share_rate=ewa.LinearShareRate)

    def test_options(self):
        with pytest.raises(TypeError, match="fold_at_end must be a bool, got str 'no'"):
            EWACallback(share_rate=0.3, fold_at_end="no")
        with pytest.raises(TypeError, match="resume_from_checkpoint must be the checkpoint's folder or None, got bool"):
            EWACallback(share_rate=0.3, resume_from_checkpoint=True)

    def test_an_averager_of_another_model(self, tmp_path):
        trainer = make_trainer(with_experts(), tmp_path, EWACallback(ewa.ExpertAverager(with_experts(), 0.3)))
        with pytest.raises(ValueError, match=r"got 0 of 1: .*the averager of the model that is trained"):
            trainer.train()

    def test_a_model_without_experts(self, tmp_path):
        trainer = make_trainer(make_model(), tmp_path, EWACallback(share_rate=0.3))
        with pytest.raises(ValueError, match="call replace_ffn_"):
            trainer.train()

    def test_an_optimizer_made_too_early(self, tmp_path):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters())
        ewa.replace_ffn_(model, 3)
        trainer = make_trainer(model, tmp_path, EWACallback(share_rate=0.3), optimizer=optimizer)
        with pytest.raises(ValueError, match="one optimizer must have the experts, got 0 of 1: make it after replace_"):
            trainer.train()

    def test_an_averager_attached_elsewhere(self, tmp_path):
        """Nothing would be averaged, and nobody told."""
        averager = ewa.ExpertAverager(model := with_experts(), 0.3)
        elsewhere = torch.optim.SGD(model.parameters(), lr=0.1)
        averager.attach(elsewhere)
        trainer = make_trainer(model, tmp_path, EWACallback(averager))
        with pytest.raises(ValueError, match="attached to the trainer's optimizer, is to another SGD"):
            trainer.train()

    def test_the_averager_is_made_when_training_begins(self):
        with pytest.raises(RuntimeError, match="made when training begins"):
            _ = EWACallback(share_rate=0.3).averager


def test_transformers_missing():
    code = "import sys; sys.modules['transformers'] = None; import ewa_kernels.integrations.transformers"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: ewa_kernels.integrations.transformers needs" in result.stderr
    assert "pip install transformers accelerate" in result.stderr
