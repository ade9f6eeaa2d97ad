"""What a user feels: a training step of a ViT with experts in every other block, against the same ViT untouched.

A step is forward, loss, backward, AdamW and averaging. On a GPU the ViTs are timm's, under bfloat16 autocast.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ewa_kernels as ewa
from benchmarks.parity import WrongResultError
from benchmarks.timing import Stopwatch, Variant, interleaved, peak_bytes, timed

UNTOUCHED = "untouched"
NUM_EXPERTS, SHARE_RATE = 4, 0.3


@dataclass(frozen=True)
class StepCase:
    """A ViT by timm's arguments, and a batch of images."""

    name: str
    batch: int
    image_size: int
    options: dict[str, int] = field(hash=False)

    def make(self) -> nn.Module:
        transformer = import_timm()
        torch.manual_seed(0)
        return transformer(img_size=self.image_size, num_classes=1000, **self.options)


GPU_CASES = (
    StepCase("ViT-S, 256 images", 256, 224, {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}),
    StepCase("ViT-B, 256 images", 256, 224, {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}),
)
CPU_CASES = (
    StepCase("small ViT, 16 images", 16, 112, {"patch_size": 16, "embed_dim": 192, "depth": 4, "num_heads": 3}),
)


def import_timm() -> Callable[..., nn.Module]:
    """timm's VisionTransformer, also beside a torchvision whose operators were not built for this torch.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:  # it describes two operators which it does not have; timm needs none of them
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(_library)
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer


_kept: list[torch.library.Library] = []


def loss_of(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        logits = model(images)
    return F.cross_entropy(logits.float(), labels)


def with_experts(model: nn.Module) -> nn.Module:
    """A copy, every other FFN of it `NUM_EXPERTS` equal experts."""
    model = copy.deepcopy(model)
    ewa.replace_ffn_(model, NUM_EXPERTS)
    return model


def check(model: nn.Module, untouched: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Equal experts compute what the FFN computes: the same loss, and gradients which add up to its gradient.

    Raises:
        WrongResultError: they do not.
    """
    tolerance = 3e-2 if images.is_cuda else 1e-4
    losses = []
    for m in (model, untouched):
        loss = loss_of(m, images, labels)
        loss.backward()
        losses.append(loss.item())
    if not abs(losses[0] - losses[1]) <= tolerance * abs(losses[1]):
        raise WrongResultError(f"wrong: the loss is {losses[0]:.5f}, of the untouched ViT {losses[1]:.5f}")
    experts = [parameter for _, parameter in ewa.expert_tensors(model)]
    norms = [parameter.grad.sum(0).norm() for parameter in experts if parameter.grad is not None]
    ours = torch.stack(norms).norm() if norms else torch.zeros(())
    replaced = [m for i, m in enumerate(_ffns(untouched)) if i % 2]
    theirs = torch.stack([p.grad.norm() for m in replaced for p in m.parameters() if p.grad is not None]).norm()
    if not abs(float(ours - theirs)) <= tolerance * float(theirs):
        raise WrongResultError(f"wrong: the experts' gradients add up to {float(ours):.4e}, not to {float(theirs):.4e}")
    for m in (model, untouched):
        m.zero_grad(set_to_none=True)


def _ffns(model: nn.Module) -> list[nn.Module]:
    return [site.module for site in ewa.find_ffns(model) if site.skip_reason is None]


def _step(
    model: nn.Module, images: Tensor, labels: Tensor, one_pass: bool, compiled: bool
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    parameters = list(model.parameters())
    averager = ewa.ExpertAverager(model, SHARE_RATE) if any(True for _ in ewa.expert_tensors(model)) else None
    optimizer: torch.optim.Optimizer
    if one_pass:
        # Autocast needs the copies; without it they would be for nothing.
        optimizer = ewa.optim.AdamW(parameters, lr=1e-4, averager=averager, bf16_copies=images.is_cuda)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        if averager is not None:
            averager.attach(optimizer)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        loss_of(forward, images, labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, optimizer


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of parameters and moments, which are there all the time."""
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return sum(t.numel() * t.element_size() for t in (*parameters, *moments))


def run(case: StepCase, device: str, seconds: float, compiling: bool) -> list[dict[str, Any]]:
    """A result per variant: milliseconds and peak memory of a step (parameters, moments and all), or `why_not`."""
    try:
        untouched = case.make().to(device)
    except ImportError as error:
        return [{"case": case.name, "variant": UNTOUCHED, "why_not": str(error)}]
    images = torch.randn(case.batch, 3, case.image_size, case.image_size, device=device)
    labels = torch.randint(1000, (case.batch,), device=device)
    experts = with_experts(untouched)
    try:
        check(experts, untouched, images, labels)
    except WrongResultError as error:
        return [{"case": case.name, "variant": "experts", "why_not": str(error)}]

    watch = Stopwatch(device)
    results: dict[str, dict[str, Any]] = {}
    variants: dict[str, Variant] = {}
    steps: dict[str, tuple[Callable[[], None], torch.optim.Optimizer]] = {}
    for name, model, one_pass, compiled in (
        (UNTOUCHED, untouched, False, False),
        ("experts, AdamW, then averaging", experts, False, False),
        ("experts, AdamW and averaging in one pass", experts, True, False),
        (f"{UNTOUCHED}, compiled", untouched, False, True),
        ("experts, one pass, compiled", experts, True, True),
    ):
        results[name] = {"case": case.name, "variant": name}
        if compiled and not compiling:
            results[name]["why_not"] = "not compiled here, for want of time"
            continue
        step, _ = steps[name] = _step(copy.deepcopy(model), images, labels, one_pass, compiled)
        results[name]["first_call_s"] = round(timed(step, watch)()[0], 4)
        variants[name] = timed(step, watch)
    for name, (timing,) in interleaved(variants, seconds).items():
        results[name] |= timing.as_dict()
        step, optimizer = steps[name]
        results[name]["state_bytes"] = _state_bytes(optimizer)
        results[name]["peak_bytes"] = results[name]["state_bytes"] + peak_bytes(step, device)
    for name in variants:
        baseline = UNTOUCHED + (", compiled" if "compiled" in name else "")
        results[name]["ratio"] = round(results[name]["median"] / results[baseline]["median"], 4)
    return list(results.values())
