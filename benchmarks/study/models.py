"""A tiny ViT, a Point-style transformer, and what the arms of the study make of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import ewa_kernels as ewa
from ewa_kernels.demo.training import Block


class Arm(NamedTuple):
    """What becomes of every other FFN: nothing, "naive" (a router, top-1), or "random" (partition)."""

    name: str
    experts: str | None = None
    is_averaged: bool = False


DENSE = Arm("dense")
NAIVE, NAIVE_EWA = Arm("naive MoE", "naive"), Arm("naive MoE + EWA", "naive", is_averaged=True)
RANDOM, RANDOM_EWA = Arm("random partition", "random"), Arm("random partition + EWA", "random", is_averaged=True)
ARMS = {arm.name: arm for arm in (DENSE, NAIVE, NAIVE_EWA, RANDOM, RANDOM_EWA)}


class PatchEmbedding(nn.Module):
    """A small PointNet: patches `[B, G, K, 3]` of points → `[B, G, D]`, whatever the order of the points."""

    def __init__(self, d_model: int):
        super().__init__()
        width = d_model // 2
        self.points = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))
        # One projection of a point's features beside its patch's, in two parts: the patch's is made once.
        self.local = nn.Linear(width, d_model)
        self.whole = nn.Linear(width, d_model, bias=False)
        self.norm = nn.BatchNorm1d(d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, points: Tensor) -> Tensor:
        shape = points.shape[:3]
        features = self.points(points.flatten(0, 2)).unflatten(0, shape)
        features = self.local(features) + self.whole(features.max(dim=2, keepdim=True).values)
        features = self.norm(features.flatten(0, 2)).relu().unflatten(0, shape)
        return self.out(features).max(dim=2).values


class PointTransformer(nn.Module):
    """Patches `[B, G, 1 + K, 3]`, as `solids.patches` makes them → logits; Point-MAE's classifier, in small."""

    def __init__(self, d_model: int, depth: int, num_heads: int, num_classes: int):
        super().__init__()
        self.patch_embed = PatchEmbedding(d_model)
        self.pos_embed = nn.Sequential(nn.Linear(3, d_model), nn.GELU(), nn.Linear(d_model, d_model))
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, 1, d_model))
        self.blocks = nn.Sequential(*(Block(d_model, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(2 * d_model, num_classes)

    def forward(self, patches: Tensor) -> Tensor:
        tokens = self.patch_embed(patches[:, :, 1:]) + self.pos_embed(patches[:, :, 0])
        tokens = torch.cat((self.cls_token.expand(len(patches), -1, -1), tokens), dim=1)
        tokens = self.norm(self.blocks(tokens))
        return self.head(torch.cat((tokens[:, 0], tokens[:, 1:].max(dim=1).values), dim=-1))


def add_experts_(model: nn.Module, kind: str, num_experts: int, init: str) -> None:
    """Every other FFN becomes experts, which start alike in both kinds.

    Args:
        kind: "naive" or "random".
        init: see `ewa_kernels.replace_ffn_`. A router that knows nothing weighs each choice with about 1/E, so copies
            behind one are scaled by E: then the model starts as the one that was trained.
    """
    ewa.replace_ffn_(model, num_experts, init=init)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ewa.RandomPartitionMoE)}
    for name, layer in layers.items() if kind == "naive" else ():
        routed = ewa.RoutedMoE(layer.d_model, layer.d_ff, num_experts, activation=layer.activation)
        routed.up, routed.down = layer.up, layer.down
        with torch.no_grad():
            nn.init.normal_(routed.router.weight, std=0.02)
            for parameter in routed.down.parameters() if init == "copy" else ():
                parameter.mul_(num_experts)
        model.set_submodule(name, routed)


def load_balance_loss(model: nn.Module) -> Tensor | float:
    """Of all routers of the last forward."""
    losses = (m.load_balance_loss for m in model.modules() if isinstance(m, ewa.RoutedMoE))
    return sum((loss for loss in losses if loss is not None), start=0.0)
