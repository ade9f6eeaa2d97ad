"""Layers of experts as libraries and research code write them, beside `moe_blocks`. D = 8, E = 4."""

import torch
import torch.nn.functional as F
from models import Mlp
from torch import nn

# Of a transformers model as small as can be.
TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Net(nn.Module):
    """nanoMoE: the FFN inside a module of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8), nn.Dropout(0.1))

    def forward(self, x):
        return self.net(x)


class Tutorial(nn.Module):
    """A softmax of the chosen logits."""

    def __init__(self, make=Mlp):
        super().__init__()
        self.experts = nn.ModuleList(make() for _ in range(4))
        self.gate = nn.Linear(8, 4)

    def forward(self, x):
        tokens = x.reshape(-1, 8)
        values, choices = self.gate(tokens).topk(2)
        return dispatch(tokens, self.experts, values.softmax(-1), choices).reshape(x.shape)


def dispatch(x, experts, weights, choices):
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, place = torch.where(choices == e)
        y.index_add_(0, token, expert(x[token]) * weights[token, place, None])
    return y


class Dictionary(Tutorial):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{e}": Mlp() for e in range(4)})

    def forward(self, x):
        values, choices = self.gate(x).topk(2)
        return dispatch(x, self.experts.values(), values.softmax(-1), choices)


class Nested(nn.Module):
    """The list's own holder has no forward."""

    def __init__(self):
        super().__init__()
        self.mixture = nn.Module()
        self.mixture.experts = nn.ModuleList(Mlp() for _ in range(4))
        self.gate = nn.Linear(8, 4)

    def forward(self, x):
        tokens = x.reshape(-1, 8)
        weights, choices = self.gate(tokens).softmax(-1).topk(2)
        return dispatch(tokens, self.mixture.experts, weights, choices).reshape(x.shape)


class Soft(nn.Module):
    """All experts see all tokens, under names that say nothing."""

    def __init__(self):
        super().__init__()
        self.fs, self.last = nn.ModuleList(Mlp() for _ in range(4)), nn.Linear(8, 4)

    def forward(self, x):
        weights = self.last(x).softmax(-1)
        return (torch.stack([f(x) for f in self.fs], -2) * weights.unsqueeze(-1)).sum(-2)


class List(nn.ModuleList):
    """A list that is the layer, router and all."""

    def __init__(self):
        super().__init__(Mlp() for _ in range(4))
        self.keys = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        weights = (x @ self.keys.T).softmax(-1)
        return sum(expert(x) * weight.unsqueeze(-1) for expert, weight in zip(self, weights.unbind(-1), strict=True))


class Chain(nn.Module):
    """No experts, and not called so."""

    def __init__(self):
        super().__init__()
        self.fs = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x):
        for f in self.fs:
            x = f(x)
        return x


class Lucidrains(nn.Module):
    """Stacked for einsum, [E, D, F] and [E, F, D]."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 8, 12)), nn.Parameter(torch.randn(4, 12, 8))

    def forward(self, x):
        return F.relu(x @ self.w1) @ self.w2


class FMoELinear(nn.Module):
    def __init__(self, out_features, in_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, out_features, in_features))
        self.bias = nn.Parameter(torch.randn(4, out_features))


class FastMoE(nn.Module):
    """Stacked in children."""

    def __init__(self):
        super().__init__()
        self.htoh4, self.h4toh, self.gate = FMoELinear(16, 8), FMoELinear(8, 16), nn.Linear(8, 4)


class DeepSpeed(nn.Module):
    """Experts that are no plain FFNs, under another name."""

    def __init__(self):
        super().__init__()
        parts = (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4))
        self.deepspeed_experts = nn.ModuleList(parts)
        self.wg = nn.Linear(8, 4)


class Member(nn.Module):
    """Knows its block, as no child of it."""

    def __init__(self, parent):
        super().__init__()
        self.fc1, self.act, self.fc2, self.parent = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), [parent]

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Parents(Tutorial):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Member(self) for _ in range(4))
