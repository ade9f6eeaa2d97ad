"""Trains a small vision transformer with random-partition experts, sharded by FSDP2 over all processes.

    torchrun --nproc-per-node 2 examples/fsdp2_torchrun.py --steps 20

The images are random: what it shows is the loop. It saves a distributed checkpoint, resumes from the last one, on
any number of processes, and leaves the folded model's weights in dense.pt. Without GPUs it runs on CPUs by gloo.
examples/multi_node.md says how to run it on several machines.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import ewa_kernels as ewa
from ewa_kernels.integrations.fsdp import expert_shard_placement, fold_rank_into_seed_, folded_state_dict

IMAGE_SIZE, PATCH_SIZE, NUM_CLASSES = 32, 8, 10


class Block(nn.Module):
    def __init__(self, d_model: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = nn.MultiheadAttention(d_model, num_heads=4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, d_model: int = 64, depth: int = 4):
        super().__init__()
        self.patches = nn.Conv2d(3, d_model, PATCH_SIZE, PATCH_SIZE)
        self.position = nn.Parameter(0.02 * torch.randn((IMAGE_SIZE // PATCH_SIZE) ** 2, d_model))
        self.blocks = nn.Sequential(*(Block(d_model) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def random_batch(step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Another one for each rank and step: in place of a DataLoader with a DistributedSampler."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    images = torch.randn(8, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return images.to(device), torch.randint(NUM_CLASSES, (8,), generator=generator).to(device)


def last_step(folder: Path) -> int | None:
    """That of the last complete checkpoint: its metadata is written when all else is there."""
    steps = [int(path.parent.name) for path in folder.glob("*/.metadata") if path.parent.name.isdigit()]
    return max(steps, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="to have taken in the end, in all runs together")
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("fsdp2_output"), help="on a disk that all machines share")
    arguments = parser.parse_args()
    if arguments.save_every < 1:
        parser.error(f"--save-every must be at least 1, got {arguments.save_every}")

    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if use_cuda else "gloo")

    # The same weights on every rank; and from then on the same random numbers, except for the deals of the tokens.
    torch.manual_seed(0)
    model = ViT()
    report = ewa.replace_ffn_(model, num_experts=4)
    fold_rank_into_seed_(model)
    model.to(device)
    for block in model.blocks:
        fully_shard(block, shard_placement_fn=expert_shard_placement)
    fully_shard(model, shard_placement_fn=expert_shard_placement)

    # After fully_shard, which exchanges the parameters. AdamW and averaging in one pass; with any other optimizer
    # averager.attach(optimizer).
    averager = ewa.ExpertAverager(model, share_rate=0.03)
    optimizer = ewa.optim.AdamW(model.parameters(), lr=1e-3, averager=averager)

    def state() -> dict[str, object]:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state, "averager": averager.state_dict()}

    def say(text: str) -> None:
        if dist.get_rank() == 0:
            print(text, flush=True)

    say(str(report))
    checkpoints = arguments.output / "checkpoints"
    start = last_step(checkpoints)
    if start is not None:
        loaded = state()
        checkpoint.load(loaded, checkpoint_id=checkpoints / str(start))
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        averager.load_state_dict(loaded["averager"])
        say(f"resumed after step {start}")

    for step in range(start or 0, arguments.steps):
        torch.manual_seed(step)  # a resumed run draws what one that went on would have drawn
        images, labels = random_batch(step, device)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
            checkpoint.save(state(), checkpoint_id=checkpoints / str(step + 1))
            spread = averager.spread()  # every rank must ask
            mean = sum(spread.values()) / len(spread)
            say(f"step {step + 1}: loss {loss.item():.3f}, share rate {averager.share_rate:.3f}, spread {mean:.4f}")

    dense_state = folded_state_dict(model)  # every rank must call it; rank 0 gets it
    if dist.get_rank() == 0:
        ViT().load_state_dict(dense_state, strict=True)
        torch.save(dense_state, arguments.output / "dense.pt")
        say(f"dense weights in {arguments.output / 'dense.pt'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
