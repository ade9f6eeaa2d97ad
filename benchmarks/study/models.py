"""The arms of the study, what they make of a model, and a Point-style transformer."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import ewa_kernels as ewa
from ewa_kernels.demo.training import Block, Mlp

EVERY_OTHER, ALL, LAST_HALF = "every other", "all", "last half"
RANDOM, FUSED = "random", "fused"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What a dense model becomes, and how its weights are averaged.

    Attributes:
        name: as tables and comparisons have it.
        experts: what `layers` become: None for nothing, "random" for experts that get tokens by random uniform
            partition, "fused" for ExFusion's.
        num_experts: E.
        layers: which FFNs: "every other" (the second, fourth, …), "all" or "last half".
        share_rate: β after each step, or at the last step if `is_linear`; 0 for no averaging.
        is_linear: β rises linearly from 0.
        drop_path: chance that the last block's branches are dropped; smaller for those before, 0 for the first.
        dropout: in each FFN, after the activation and after the second layer.
        ema_memory: of the average over the trajectory's weights, which is tested in their place, as a share of the
            training's steps; 0 for no such average.
    """

    name: str
    experts: str | None = None
    num_experts: int = 4
    layers: str = EVERY_OTHER
    share_rate: float = 0.0
    is_linear: bool = False
    drop_path: float = 0.0
    dropout: float = 0.0
    ema_memory: float = 0.0

    def ffns(self, depth: int) -> list[int]:
        """Which of the blocks' FFNs become experts."""
        chosen = {EVERY_OTHER: slice(1, None, 2), ALL: slice(None), LAST_HALF: slice(depth // 2, None)}
        return list(range(depth))[chosen[self.layers]]


DENSE = Arm(name="dense")
NO_AVERAGING = Arm(name="no averaging", experts=RANDOM)
CONSTANT_RATES = tuple(Arm(name=f"β = {rate:g}", experts=RANDOM, share_rate=rate) for rate in (0.001, 0.003, 0.03, 0.3))
LINEAR_RATE = Arm(name="β = 0 → 0.3", experts=RANDOM, share_rate=0.3, is_linear=True)  # recommended today
MIDDLE_RATE = CONSTANT_RATES[2]  # what E and the layers are varied at
FEWER_EXPERTS, MORE_EXPERTS = (replace(MIDDLE_RATE, name=f"E = {number}", num_experts=number) for number in (2, 8))
ALL_LAYERS = replace(MIDDLE_RATE, name="all FFNs", layers=ALL)
LAST_LAYERS = replace(MIDDLE_RATE, name="last half of the FFNs", layers=LAST_HALF)
EXFUSION = Arm(name="ExFusion", experts=FUSED)
EMA = Arm(name="weight EMA", ema_memory=0.1)
STOCHASTIC_DEPTH = Arm(name="stochastic depth", drop_path=0.1)
DROPOUT = Arm(name="dropout", dropout=0.1)
RIVALS = (EXFUSION, EMA, STOCHASTIC_DEPTH, DROPOUT)
ARMS = (
    *(DENSE, NO_AVERAGING, *CONSTANT_RATES, LINEAR_RATE),
    *(FEWER_EXPERTS, MORE_EXPERTS, ALL_LAYERS, LAST_LAYERS, *RIVALS),
)


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


class DropPath(nn.Module):
    """Stochastic depth: drops a branch `[B, ...]` for some examples, and scales it up for the others."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, branch: Tensor) -> Tensor:
        kept = branch.new_ones(len(branch), *[1] * (branch.dim() - 1))
        return branch * F.dropout(kept, self.p, self.training)


class FusedFFN(nn.Module):
    """ExFusion's FFN, as its abstract describes it: Σₑ wₑ·expertₑ of the weights before the forward, w learned.

    What it leaves open is our choice: w is a softmax, equal at first. Copies get noise, or they would stay equal; it
    has no mean over them, so that the model starts as the dense one. Independent experts' mean starts smaller.
    """

    NOISE = 0.1  # standard deviation, relative to that of the weights

    def __init__(self, ffn: Mlp, num_experts: int, init: str):
        super().__init__()
        self.ffn = ffn
        self.logits = nn.Parameter(torch.zeros(num_experts))
        self.experts = nn.ParameterList()  # of each tensor of the FFN, stacked
        others = [copy.deepcopy(ffn) for _ in range(num_experts - 1)]
        for other in others if init == "independent" else ():
            other.fc1.reset_parameters()
            other.fc2.reset_parameters()
        for tensors in zip(*(expert.parameters() for expert in (ffn, *others)), strict=True):
            stacked = torch.stack([tensor.detach() for tensor in tensors])
            if init == "copy":
                noise = torch.randn_like(stacked)
                stacked += self.NOISE * stacked.std() * (noise - noise.mean(dim=0))
            self.experts.append(nn.Parameter(stacked))
        self.ffn.requires_grad_(False)  # only its forward is used, with the fused weights

    def fused(self) -> dict[str, Tensor]:
        """The weights of one FFN."""
        weights = self.logits.softmax(dim=0)
        names = (name for name, _ in self.ffn.named_parameters())
        return {name: torch.tensordot(weights, expert, 1) for name, expert in zip(names, self.experts, strict=True)}

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.ffn, self.fused(), x)

    @torch.no_grad()
    def fold(self) -> Mlp:
        self.ffn.load_state_dict(self.fused())
        return self.ffn.requires_grad_()


def apply_(arm: Arm, model: nn.Module, init: str) -> None:
    """Makes of a dense model what the arm says.

    Args:
        model: with blocks that `ewa_kernels.demo.training.Block` made in `model.blocks`.
        init: of experts: "copy" or "independent", see `ewa_kernels.replace_ffn_`.
    """
    blocks = model.get_submodule("blocks")
    assert isinstance(blocks, nn.Sequential)
    names = [f"blocks.{i}.mlp" for i in arm.ffns(len(blocks))]
    if arm.experts == FUSED:
        for name in names:
            ffn = model.get_submodule(name)
            assert isinstance(ffn, Mlp)
            model.set_submodule(name, FusedFFN(ffn, arm.num_experts, init))
    elif arm.experts is not None:
        ewa.replace_ffn_(model, arm.num_experts, filter_fn=lambda name, _: name in names, init=init)
    for i in range(len(blocks)):
        if arm.dropout:
            _append_(model, f"blocks.{i}.mlp.act", nn.Dropout(arm.dropout))
            _append_(model, f"blocks.{i}.mlp", nn.Dropout(arm.dropout))
        if arm.drop_path:
            for branch in ("proj", "mlp"):
                _append_(model, f"blocks.{i}.{branch}", DropPath(arm.drop_path * i / max(1, len(blocks) - 1)))


def _append_(model: nn.Module, name: str, module: nn.Module) -> None:
    model.set_submodule(name, nn.Sequential(model.get_submodule(name), module))


def fold_(arm: Arm, model: nn.Module) -> None:
    """Experts become FFNs again."""
    if arm.experts == RANDOM:
        ewa.fold_(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedFFN):
            model.set_submodule(name, module.fold())
