"""`python -m benchmarks.saved_training`: does training lose by what is kept for backward in 8 and 4 bits?

Two models, both with experts in place of every FFN: the demo's ViT on handwritten digits, and a decoder as Llama's (RMS
norms, rotary positions, SwiGLU) on sequences of a fixed random source of order 2. Each seed trains the same weights on
the same batches, dealt alike, once for each form; what counts is the difference to "full". Ten seeds: some 10 minutes
on two cores. Written down before the first run: no difference that ten seeds can tell from none.

`--noise` adds an arm to the decoder's results: gate and value as they are, but for independent noise in what backward
reads of them, as large as the error of 4 bits. What it costs no code with errors of that size can gain.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ewa_kernels as ewa
import ewa_kernels.reference as reference
from benchmarks.environment import environment, file_name
from benchmarks.study.statistics import estimate
from ewa_kernels import codec
from ewa_kernels.demo import training as demo

FORMS = ("full", "8bit", "4bit")
NOISE, OF_NOISE = "noise", 0.085  # of the rms of gate and of value
RESULTS = Path(__file__).parent / "results"
STEPS, BATCH = 400, 64
VOCABULARY, LENGTH = 32, 48

Curve = dict[str, float]


class DecoderBlock(nn.Module):
    """`[B, N, D]` → `[B, N, D]`."""

    def __init__(self, d_model: int, num_heads: int, saved: str, backend: str):
        super().__init__()
        self.num_heads = num_heads
        self.norm, self.ffn_norm = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model, bias=False), nn.Linear(d_model, d_model, bias=False)
        self.ffn = ewa.RandomPartitionMoE(
            *(d_model, 8 * d_model // 3 // 32 * 32, 4),
            activation="silu",
            gated=True,
            bias=False,
            backend=backend,
            saved=saved,
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(
            F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True).transpose(1, 2).flatten(2)
        )
        return x + self.ffn(self.ffn_norm(x))


def rotated(x: Tensor) -> Tensor:
    """Rotary positions: `[B, H, N, d]`."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 10_000 ** -(torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


class Decoder(nn.Module):
    """Tokens `[B, N]` → logits `[B, N, VOCABULARY]`."""

    def __init__(self, saved: str, backend: str, d_model: int = 96, depth: int = 3):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, d_model)
        self.blocks = nn.Sequential(*(DecoderBlock(d_model, 4, saved, backend) for _ in range(depth)))
        self.norm, self.head = nn.RMSNorm(d_model), nn.Linear(d_model, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def sequences(count: int, generator: torch.Generator) -> Tensor:
    """`[count, LENGTH + 1]`, each token drawn by the two before it, from tables that are the same for all seeds."""
    logits = 2.5 * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    chances, tokens = logits.softmax(-1), torch.randint(VOCABULARY, (count, LENGTH + 1), generator=generator)
    for i in range(2, LENGTH + 1):
        of_next = chances[tokens[:, i - 2], tokens[:, i - 1]]
        tokens[:, i] = torch.multinomial(of_next, 1, generator=generator)[:, 0]
    return tokens


def train(model: nn.Module, loss_of: Callable[[nn.Module, torch.Generator], Tensor], seed: int) -> float:
    """The mean loss of the last tenth of the steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    averager = ewa.ExpertAverager(model, share_rate=0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    averager.attach(optimizer)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, generator)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-STEPS // 10 :]) / (STEPS // 10)


def vision(seed: int) -> dict[str, Curve]:
    """Of each form: loss on training images, loss on the test's, error on these in percent."""
    data = demo.load_data(1000, seed)
    torch.manual_seed(seed)
    start, results = demo.VisionTransformer(), {}
    for form in FORMS:
        model = copy.deepcopy(start)
        torch.manual_seed(seed)
        ewa.replace_ffn_(model, filter_fn=lambda *_: True, init="independent", saved=form)

        def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
            batch = torch.randint(len(data.train_images), (BATCH,), generator=generator)
            return F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])

        loss = train(model, loss_of, seed)
        logits = demo.predict(model, data)
        test = F.cross_entropy(logits, data.test_labels).item()
        results[form] = {"training loss": loss, "test loss": test, "test error, %": 100 - demo.accuracy(logits, data)}
    return results


def language(seed: int, forms: Sequence[str] = FORMS, backend: str = "auto") -> dict[str, Curve]:
    """Of each form: loss on batches that are drawn anew, and on those of another seed, by the mean experts."""
    results = {}
    test = sequences(1000, torch.Generator().manual_seed(10_000 + seed))
    for form in forms:
        torch.manual_seed(seed)
        model = Decoder(form, backend)

        def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
            tokens = sequences(BATCH // 2, generator)
            return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

        loss = train(model, loss_of, seed)
        with torch.no_grad():
            of_test = F.cross_entropy(model.eval()(test[:, :-1]).flatten(0, 1), test[:, 1:].flatten()).item()
        results[form] = {"training loss": loss, "test loss": of_test}
    return results


def language_with_noise(seed: int) -> Curve:
    """The decoder in PyTorch's words, whose 4 bits are noise in place of a code."""
    generator = torch.Generator().manual_seed(20_000 + seed)

    def noised(rows: Tensor, form: codec.Format) -> Tensor:
        if form == codec.ROWS_8BIT:
            return kept(rows, form)
        return torch.cat([part + _noise(part, generator) for part in rows.chunk(2, dim=1)], dim=1)

    kept = reference._kept
    with mock.patch.object(reference, "_kept", noised):
        return language(seed, ("4bit",), backend="reference")["4bit"]


def _noise(part: Tensor, generator: torch.Generator) -> Tensor:
    return OF_NOISE * part.square().mean().sqrt() * torch.randn(part.shape, generator=generator)


def summary(results: dict[str, list[dict[str, Curve]]]) -> list[str]:
    """Mean of "full", and the mean difference of each form to it, with its 95 % interval by Student's t and its p."""
    lines = []
    for task, seeds in results.items():
        for what in seeds[0]["full"]:
            full = [seed["full"][what] for seed in seeds]
            lines.append(f"{task}, {what}: full {sum(full) / len(full):.4f}")
            for form in [form for form in (*FORMS[1:], NOISE) if form in seeds[0]]:
                differences = [seed[form][what] - seed["full"][what] for seed in seeds]
                mean, low, high, p = estimate(differences)
                lines.append(f"    {form} less full {mean:+.4f} ({low:+.4f} to {high:+.4f}), p = {p:.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saved_training", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--noise", action="store_true", help="of the seeds whose results are there")
    options = parser.parse_args()
    about = environment()
    path = RESULTS / f"saved-training-{file_name(about['device'])}.json"
    if options.noise:
        content = json.loads(path.read_text())
        for seed, forms in enumerate(content["results"]["decoder"]):
            forms[NOISE] = language_with_noise(seed)
            print(seed, forms, flush=True)
    else:
        results: dict[str, list[dict[str, Curve]]] = {"ViT on digits": [], "decoder": []}
        for seed in range(options.seeds):
            results["ViT on digits"].append(vision(seed))
            results["decoder"].append(language(seed))
            print(seed, {task: seeds[-1] for task, seeds in results.items()}, flush=True)
        content = {"environment": about, "steps": STEPS, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(summary(content["results"])))


if __name__ == "__main__":
    main()
