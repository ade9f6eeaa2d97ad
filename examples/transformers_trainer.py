"""The Trainer of transformers: a small ViT on scikit-learn's digits, with experts that are averaged and folded.

python examples/transformers_trainer.py --steps 300 --output digits-vit

transformers imports torchvision where it is installed, which then must be made for this PyTorch. If it is not, the
error is "operator torchvision::nms does not exist"; README.md says what to install.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import ewa_kernels as ewa
from ewa_kernels.integrations.transformers import EWACallback

parser = argparse.ArgumentParser(description="Trains a ViT with experts, folds it and saves it.")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--experts", type=int, default=4)
parser.add_argument("--share-rate", type=float, default=0.03, help="β after each step")
parser.add_argument("--output", default="digits-vit", help="folder for checkpoints and the folded model")
parser.add_argument("--resume", action="store_true", help="from the last checkpoint in that folder")
parser.add_argument("--seed", type=int, default=0)


class Digits(torch.utils.data.Dataset):
    """Digits of scikit-learn, 8 × 8 pixels in 0…1."""

    def __init__(self, indices: slice):
        digits = load_digits()
        self.images = torch.tensor(digits.images[indices], dtype=torch.float32)[:, None] / 16
        self.labels = torch.tensor(digits.target[indices])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    options = parser.parse_args()
    set_seed(options.seed)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    print(ewa.replace_ffn_(model, num_experts=options.experts))

    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        logging_steps=max(options.steps // 5, 1),
        save_steps=max(options.steps // 2, 1),
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
    )
    test = Digits(slice(1400, None))
    trainer = Trainer(model, arguments, train_dataset=Digits(slice(1400)), eval_dataset=test, compute_metrics=accuracy)
    EWACallback(share_rate=options.share_rate).add_to(trainer)
    trainer.train(resume_from_checkpoint=options.resume)  # prints loss, share_rate and expert_spread
    trainer.save_model()  # dense: the callback has folded the model

    dense, report = ViTForImageClassification.from_pretrained(options.output, output_loading_info=True)
    differing = {kind: names for kind, names in report.items() if names}
    print(f"from_pretrained found each weight that it needs, and no other: {not differing}")
    print(f"accuracy on {len(test)} test images: {trainer.evaluate()['eval_accuracy']:.4f}")
    same = all(torch.equal(a, b) for a, b in zip(dense.parameters(), model.parameters(), strict=True))
    print(f"the loaded model has the folded weights: {same}")


if __name__ == "__main__":
    main()
