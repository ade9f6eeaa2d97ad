"""A plain training loop: a small ViT of timm on scikit-learn's digits, with experts that are averaged and folded.

python examples/timm_plain_loop.py --steps 300

timm imports torchvision, which must be made for this PyTorch. If it is not, the error is
"operator torchvision::nms does not exist"; README.md says what to install.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer

import ewa_kernels as ewa

parser = argparse.ArgumentParser(description="Trains a ViT with experts and folds it.")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--experts", type=int, default=4)
parser.add_argument("--share-rate", type=float, default=0.03, help="β after each step")
parser.add_argument("--seed", type=int, default=0)


def make_model() -> torch.nn.Module:
    return VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return (model.eval()(images).argmax(dim=1) == labels).double().mean().item()


def main() -> None:
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    torch.manual_seed(options.seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train, test = torch.randperm(len(images)).tensor_split([1400])

    model = make_model()
    print(ewa.replace_ffn_(model, num_experts=options.experts))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)  # made after replace_ffn_
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=options.steps)
    averager = ewa.ExpertAverager(model, share_rate=options.share_rate)
    averager.attach(optimizer)

    for step in range(options.steps):
        batch = train[torch.randint(len(train), (64,))]
        loss = F.cross_entropy(model.train()(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(options.steps // 5, 1) == 0 or step == options.steps - 1:
            spreads = averager.spread().values()
            print(
                f"step {step}: loss {loss.item():.4f}, next share rate {averager.share_rate:.3f}, "
                f"mean spread of the experts {sum(spreads) / len(spreads):.3g}"
            )

    with torch.no_grad():
        before = model.eval()(images[test])
        after = ewa.fold_(model)(images[test])
    print(f"folding changed no bit of the output: {torch.equal(before, after)}")

    untouched = make_model()
    untouched.load_state_dict(model.state_dict(), strict=True)
    print("the folded weights load into an untouched model, strictly")
    print(f"accuracy on {len(test)} test images: {accuracy(untouched, images[test], labels[test]):.4f}")


if __name__ == "__main__":
    main()
