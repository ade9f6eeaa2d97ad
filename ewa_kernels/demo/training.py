"""The demo's model, data, training and measurements: all of it that needs neither matplotlib nor rich."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ConstantShareRate, CosineShareRate, ExpertAverager, LinearShareRate, fold_, replace_ffn_

NUM_IMAGES = 1797
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
NUM_MEASUREMENTS = 60  # of the spread, in one training


# --- options ---


@dataclass(frozen=True)
class Options:
    experts: int
    share_rate: float
    schedule: str
    init: str
    seeds: int
    train_images: int
    epochs: int
    output: Path

    @property
    def num_steps(self) -> int:
        return self.epochs * math.ceil(self.train_images / BATCH_SIZE)

    def make_schedule(self) -> Callable[[int], float]:
        """β of each step."""
        if self.schedule == "constant":
            return ConstantShareRate(self.share_rate)
        ramp = LinearShareRate if self.schedule == "linear" else CosineShareRate
        return ramp(end=self.share_rate, num_steps=self.num_steps)

    def contraction(self, beta: float) -> float:
        """What one averaging leaves of the spread: |1 − βE/(E−1)|."""
        return abs(1 - beta * self.experts / (self.experts - 1))


# --- the model: nothing in it knows of experts ---


class Mlp(nn.Module):
    """The FFN of a ViT: `[..., D]` → `[..., D]`."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_ff)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention, then the FFN: `[B, N, D]` → `[B, N, D]`."""

    def __init__(self, d_model: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = Mlp(d_model, 4 * d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Images `[B, 1, H, H]` → logits `[B, 10]`, over patches and a class token; H is 8 by default, of 16 patches."""

    def __init__(
        self, d_model: int = 64, depth: int = 4, num_heads: int = 4, *, image_size: int = 8, patch_size: int = 2
    ):
        super().__init__()
        self.patch_embed = nn.Conv2d(1, d_model, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, 1, d_model))
        # As large as the patches: started at the usual 0.02, positions are learnt too slowly for so few images.
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, 1 + (image_size // patch_size) ** 2, d_model))
        self.blocks = nn.Sequential(*(Block(d_model, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls_token.expand(len(images), -1, -1), patches), dim=1)
        return self.head(self.norm(self.blocks(tokens + self.pos_embed))[:, 0])


# --- training ---


class Data(NamedTuple):
    """Images `[N, 1, 8, 8]` in [−1, 1], labels `[N]`."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data(train_images: int, seed: int) -> Data:
    """A split of the digits, with the same share of each class on both sides."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, train_size=train_images, random_state=seed, stratify=labels)
    x_train, x_test = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1 for x in parts[:2])
    y_train, y_test = (torch.tensor(y, dtype=torch.int64) for y in parts[2:])
    return Data(x_train, y_train, x_test, y_test)


class Contraction(NamedTuple):
    """The experts' spread just before and just after one averaging, of each tensor."""

    step: int
    beta: float
    before: list[float]
    after: list[float]


def train(
    model: nn.Module,
    data: Data,
    options: Options,
    seed: int,
    advance: Callable[..., None],
    averager: ExpertAverager | None = None,
) -> tuple[list[float], list[Contraction]]:
    """Trains dense and experts alike; returns the mean loss of each epoch, and what some averagings did."""
    torch.manual_seed(seed)
    batches = torch.Generator().manual_seed(seed)  # of its own: dealing tokens out must not change the batches
    warm_up = max(1, options.num_steps // 20)
    # A float64 pass over all experts before and after each averaging would take time.
    measured_every = max(1, options.num_steps // NUM_MEASUREMENTS)

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * step / options.num_steps))

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    losses, contractions = [], []
    for _ in range(options.epochs):
        total = 0.0
        for batch in torch.randperm(len(data.train_images), generator=batches).split(BATCH_SIZE):
            loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if averager is not None and averager.num_steps % measured_every == 0:
                step, beta, before = averager.num_steps, averager.share_rate, averager.spread()
                averager.step()
                contractions.append(Contraction(step, beta, [*before.values()], [*averager.spread().values()]))
            elif averager is not None:
                averager.step()
            total += loss.item() * len(batch)
            advance(loss=loss.item())
        losses.append(total / len(data.train_images))
    return losses, contractions


@torch.no_grad()
def predict(model: nn.Module, data: Data) -> Tensor:
    return model.eval()(data.test_images)


def accuracy(logits: Tensor, data: Data) -> float:
    """In percent of the test images."""
    return 100 * (logits.argmax(dim=-1) == data.test_labels).double().mean().item()


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- one seed ---


class Result(NamedTuple):
    """One model of one seed."""

    accuracy: float
    parameters_training: int
    parameters_after: int
    seconds: float
    losses: list[float]  # of each epoch


class Pair(NamedTuple):
    """All models of one seed."""

    dense: Result
    experts: Result
    folded: Result
    contractions: list[Contraction]


def run_pair(
    options: Options, seed: int, advance_dense: Callable[..., None], advance_experts: Callable[..., None]
) -> Pair:
    """Trains dense and with experts from the same weights, then folds the experts."""
    data = load_data(options.train_images, seed)
    torch.manual_seed(seed)
    dense = VisionTransformer()
    model = copy.deepcopy(dense)
    size = num_parameters(dense)

    start = time.perf_counter()
    losses, _ = train(dense, data, options, seed, advance_dense)
    seconds = time.perf_counter() - start
    dense_result = Result(accuracy(predict(dense, data), data), size, size, seconds, losses)

    start = time.perf_counter()
    replace_ffn_(model, options.experts, init=options.init)
    averager = ExpertAverager(model, share_rate=options.make_schedule())
    losses, contractions = train(model, data, options, seed, advance_experts, averager)
    seconds = time.perf_counter() - start
    experts_logits = predict(model, data)
    size_experts = num_parameters(model)
    experts_result = Result(accuracy(experts_logits, data), size_experts, size_experts, seconds, losses)

    start = time.perf_counter()
    fold_(model)
    seconds += time.perf_counter() - start
    folded_logits = predict(model, data)
    folded_result = Result(accuracy(folded_logits, data), size_experts, num_parameters(model), seconds, losses)

    untouched = VisionTransformer()
    untouched.load_state_dict(model.state_dict(), strict=True)
    check_equal("the folded ViT", folded_logits, "the ViT with experts in eval", experts_logits)
    check_equal("an untouched ViT with the folded weights", predict(untouched, data), "the folded ViT", folded_logits)
    return Pair(dense_result, experts_result, folded_result, contractions)


def check_equal(name: str, logits: Tensor, expected_name: str, expected: Tensor) -> None:
    if not torch.equal(logits, expected):
        difference = (logits - expected).abs().max().item()
        fail(f"{name} differs from {expected_name} by up to {difference:.3g}")


def fail(message: str) -> NoReturn:
    raise SystemExit(f"ewa_kernels.demo: {message}")
