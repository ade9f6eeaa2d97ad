"""Small models with FFNs as the common libraries write them."""

from __future__ import annotations

import torch
from torch import nn


class Mlp(nn.Module):
    """timm and DeiT: two dropouts and a place for a norm."""

    def __init__(self, d_model=8, d_ff=16, drop=0.0, act=nn.GELU, bias=True):
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_ff, bias=bias)
        self.act = act()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(d_ff, d_model, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class PointMlp(nn.Module):
    """Point-MAE: one dropout used twice."""

    def __init__(self, d_model=8, d_ff=16, drop=0.1):
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_ff)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(d_ff, d_model)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class MLPBlock(nn.Sequential):
    """torchvision."""

    def __init__(self, d_model=8, d_ff=16, drop=0.0):
        super().__init__(
            nn.Linear(d_model, d_ff), nn.GELU(), nn.Dropout(drop), nn.Linear(d_ff, d_model), nn.Dropout(drop)
        )


class SwiGLU(nn.Module):
    """Separate gate and value."""

    def __init__(self, d_model=8, d_ff=16):
        super().__init__()
        self.w_gate = nn.Linear(d_model, d_ff, bias=False)
        self.w_value = nn.Linear(d_model, d_ff, bias=False)
        self.w_out = nn.Linear(d_ff, d_model)

    def forward(self, x):
        return self.w_out(nn.functional.silu(self.w_gate(x)) * self.w_value(x))


class PackedGLU(nn.Module):
    """One projection for both; value first, as timm's GluMlp with gate_last."""

    def __init__(self, d_model=8, d_ff=16, gate_last=True, drop=0.0):
        super().__init__()
        self.fc1 = nn.Linear(d_model, 2 * d_ff)
        self.fc2 = nn.Linear(d_ff, d_model)
        self.drop1 = nn.Dropout(drop)
        self.gate_last = gate_last

    def forward(self, x):
        first, last = self.fc1(x).chunk(2, dim=-1)
        hidden = first * last.sigmoid() * last if self.gate_last else nn.functional.silu(first) * last
        return self.fc2(self.drop1(hidden))


class Block(nn.Module):
    """Pre-norm transformer block without the attention, which no test here needs."""

    def __init__(self, ffn, d_model=8):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.mlp = ffn

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Transformer(nn.Module):
    def __init__(self, *ffns, d_model=8):
        super().__init__()
        self.embed = nn.Linear(4, d_model)
        self.blocks = nn.Sequential(*(Block(ffn, d_model) for ffn in ffns))
        self.head = nn.Linear(d_model, 3)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x)))


def tokens(*shape):
    return torch.randn(*(shape or (2, 5, 4)), generator=torch.Generator().manual_seed(0))
