"""Averaging in a loop of Accelerate's."""

import pytest
import torch
import vision  # noqa: F401
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from models import Mlp, Transformer, tokens
from transformers import ViTConfig, ViTForImageClassification

import ewa_kernels as ewa
from ewa_kernels.integrations.callbacks import plain_optimizer

SHARE_RATE = ewa.LinearShareRate(end=0.5, num_steps=10)


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps one for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """As in examples/accelerate_recipe.py."""

    def __init__(self, seed=0, **options):
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True, **options)
        model = Transformer(*(Mlp(drop=0.1) for _ in range(4)))
        ewa.replace_ffn_(model, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.averager = ewa.ExpertAverager(model, SHARE_RATE)
        self.averager.attach(optimizer)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.accelerator.register_for_checkpointing(self.averager)

    def train(self, num_batches):
        for _ in range(num_batches):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model.train()(torch.randn(2, 5, 4)).square().mean())
                self.optimizer.step()
                self.optimizer.zero_grad()


def assert_same(model, other):
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_accumulate(averagings):
    run = Run(gradient_accumulation_steps=3)
    run.train(8)
    assert averagings == pytest.approx([0, 0.05])
    run.train(1)
    assert averagings == pytest.approx([0, 0.05, 0.1])
    assert run.averager.num_steps == 3


def test_ten_steps_are_five_and_five(averagings, tmp_path):
    straight = Run(gradient_accumulation_steps=2)
    straight.train(10)
    straight.accelerator.save_state(tmp_path / "state")
    straight.train(10)
    AcceleratorState._reset_state(reset_partial_state=True)

    resumed = Run(seed=1, gradient_accumulation_steps=2)
    resumed.accelerator.load_state(tmp_path / "state")
    assert resumed.averager.num_steps == 5
    resumed.train(10)
    assert averagings == pytest.approx([0.05 * step for step in [*range(10), *range(5, 10)]])
    assert_same(straight.model, resumed.model)
    straight, resumed = (ewa.fold_(run.accelerator.unwrap_model(run.model)) for run in (straight, resumed))
    assert_same(straight, resumed)
    Transformer(*(Mlp() for _ in range(4))).load_state_dict(resumed.state_dict(), strict=True)


class TestGradScaler:
    """Its steps go through the wrapper; Accelerate itself makes one on GPUs only."""

    @pytest.mark.parametrize("fused", [False, True])
    def test_skipped_steps_average_nothing(self, averagings, fused):
        accelerator = Accelerator(cpu=True)
        model = Transformer(Mlp(), Mlp())
        ewa.replace_ffn_(model, 3)
        plain = torch.optim.AdamW(model.parameters(), fused=fused)
        averager = ewa.ExpertAverager(model, SHARE_RATE)
        averager.attach(plain)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        optimizer = AcceleratedOptimizer(plain, device_placement=False, scaler=scaler)
        assert accelerator.sync_gradients
        for factor in (1, torch.inf, torch.nan, 1):
            scaler.scale(model(tokens()).square().mean() * factor).backward()
            before = [parameter.clone() for parameter in model.parameters()]
            optimizer.step()
            moved = any(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
            assert moved == (factor == 1)
            optimizer.zero_grad()
        assert averagings == pytest.approx([0, 0.05])

    def test_wrappers_are_looked_through(self):
        Accelerator(cpu=True)
        plain = torch.optim.SGD(Mlp().parameters(), lr=0.1)
        wrapped = AcceleratedOptimizer(AcceleratedOptimizer(plain, device_placement=False), device_placement=False)
        assert plain_optimizer(wrapped) is plain
        assert plain_optimizer(plain) is plain
        with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got list"):
            plain_optimizer([])


def test_save_pretrained_as_accelerate_recommends(tmp_path):
    """With the state_dict of the prepared model, which has the experts in it."""
    accelerator = Accelerator(cpu=True)
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
    model = ViTForImageClassification(config)
    ewa.replace_ffn_(model, 3, init="independent")
    prepared = accelerator.prepare(model)
    state_dict = accelerator.get_state_dict(prepared)
    assert "vit.layers.1.mlp.up.weight" in state_dict
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path, is_main_process=accelerator.is_main_process, state_dict=state_dict
    )
    loaded, report = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert all(".mlp.up." in key or ".mlp.down." in key for key in report["unexpected_keys"])
    for name, tensor in ewa.folded_state_dict(model).items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
