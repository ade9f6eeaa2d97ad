"""A training loop with Accelerate: gradient accumulation, and checkpoints that resume to the bit.

accelerate launch examples/accelerate_recipe.py --steps 300
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import ewa_kernels as ewa

parser = argparse.ArgumentParser(description="Trains a model with experts by Accelerate and folds it.")
parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
parser.add_argument("--accumulate", type=int, default=2, help="batches for each")
parser.add_argument("--experts", type=int, default=4)
parser.add_argument("--share-rate", type=float, default=0.03, help="β after each step")
parser.add_argument("--output", default="digits-accelerate", help="folder for the checkpoint and the folded model")
parser.add_argument("--save-at", type=int, default=None, help="save a checkpoint after this step")
parser.add_argument("--resume", action="store_true", help="from that checkpoint")
parser.add_argument("--seed", type=int, default=0)


class Block(torch.nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(size), torch.nn.LayerNorm(size)
        self.attention = torch.nn.MultiheadAttention(size, 4, batch_first=True)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(size, 4 * size), torch.nn.GELU(), torch.nn.Linear(4 * size, size)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm1(x)
        x = x + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class RowTransformer(torch.nn.Module):
    """Each row of an image is a token."""

    def __init__(self, size: int = 64, depth: int = 4):
        super().__init__()
        self.embed = torch.nn.Linear(8, size)
        self.position = torch.nn.Parameter(torch.randn(8, size) * 0.02)
        self.blocks = torch.nn.Sequential(*(Block(size) for _ in range(depth)))
        self.head = torch.nn.Linear(size, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(images) + self.position).mean(dim=1))


def main() -> None:
    options = parser.parse_args()
    if options.save_at is not None and not 1 <= options.save_at <= options.steps:
        parser.error(f"--save-at must be in 1…{options.steps}, the number of steps, got {options.save_at}")
    # The order of each epoch's data follows from the seed and its number, so that a resumed run finds its place.
    accelerator = Accelerator(
        gradient_accumulation_steps=options.accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(options.seed)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target))
    # With a generator of its own, starting the loader draws nothing from the one that deals tokens to experts.
    generator = torch.Generator().manual_seed(options.seed)
    loader = DataLoader(data, batch_size=32, shuffle=True, drop_last=True, generator=generator)

    model = RowTransformer()
    accelerator.print(ewa.replace_ffn_(model, num_experts=options.experts))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    averager = ewa.ExpertAverager(model, share_rate=options.share_rate)
    # To torch's optimizer, before prepare: Accelerate's wrapper is called for every batch and mostly does nothing.
    averager.attach(optimizer)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(averager)
    if not 1 <= options.accumulate <= len(loader):
        parser.error(f"--accumulate must be in 1…{len(loader)}, the batches of an epoch, got {options.accumulate}")

    checkpoint = Path(options.output) / "checkpoint"
    num_batches = 0
    if options.resume:
        accelerator.load_state(str(checkpoint))  # experts, optimizer, averager, random generators
        num_batches = averager.num_steps * options.accumulate
    per_epoch = len(loader) - len(loader) % options.accumulate  # each epoch ends with an optimizer step
    while averager.num_steps < options.steps:
        loader.set_epoch(num_batches // per_epoch)
        batches = accelerator.skip_first_batches(loader, num_batches % per_epoch)
        for images, labels in batches:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            num_batches += 1
            step = averager.num_steps
            if accelerator.sync_gradients:
                if step % max(options.steps // 5, 1) == 0:
                    spreads = averager.spread().values()
                    accelerator.print(
                        f"step {step}: loss {loss.item():.4f}, next share rate {averager.share_rate:.3f}, "
                        f"mean spread of the experts {sum(spreads) / len(spreads):.3g}"
                    )
                if step == options.save_at:
                    accelerator.save_state(str(checkpoint))
            if step == options.steps or num_batches % per_epoch == 0:
                break

    folded = ewa.fold_(accelerator.unwrap_model(model))
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    accelerator.save(folded.state_dict(), Path(options.output) / "folded.pt")
    RowTransformer().load_state_dict(folded.state_dict(), strict=True)
    accelerator.print(f"averaged {averager.num_steps} times in {num_batches} batches")
    accelerator.print("the folded weights load into an untouched model, strictly")


if __name__ == "__main__":
    main()
