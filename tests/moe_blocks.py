"""MoE blocks as transformers 4.57 and research code write them: a router, and a list of experts."""

import torch
import torch.nn.functional as F
from torch import nn

import ewa_kernels as ewa

D, E = 8, 4


class Expert(nn.Module):
    """Mixtral's."""

    def __init__(self, d_ff=12):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(D, d_ff, bias=False) for _ in range(2))
        self.w2 = nn.Linear(d_ff, D, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


def sequential(dropout=0.0):
    return nn.Sequential(nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D), *([nn.Dropout(dropout)] if dropout else []))


class Mixtral(nn.Module):
    """As in transformers 4.57: a loop over a list, (y, router logits)."""

    renormalize = True
    jitter = 0.0

    def __init__(self, top_k=2, make=Expert):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(make() for _ in range(E))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = self.gate(x)
        weights, chosen = F.softmax(logits, dim=1, dtype=torch.float).topk(self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        y = self.routed(x, chosen, weights.to(x.dtype)) + self.shared(x)
        return y.reshape(hidden_states.shape), logits

    def routed(self, x, chosen, weights):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == e)
            y.index_add_(0, token, (expert(x[token]) * weights[token, choice, None]).to(x.dtype))
        return y

    def shared(self, x):
        return 0


class Qwen(Mixtral):
    renormalize = False

    def __init__(self):
        super().__init__()
        self.shared_expert, self.shared_expert_gate = Expert(10), nn.Linear(D, 1, bias=False)

    def shared(self, x):
        return self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)


class Router(nn.Module):
    """DeepSeek's: sigmoids, a correction that only chooses, a scale; in float32 always."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D))
        self.register_buffer("correction", torch.linspace(-0.1, 0.1, E))

    def forward(self, x):
        scores = F.linear(x.reshape(-1, D).float(), self.weight.float()).sigmoid()
        chosen = (scores + self.correction).topk(2, dim=-1).indices
        weights = scores.gather(1, chosen)
        return chosen, 2.5 * weights / weights.sum(-1, keepdim=True)


class DeepSeek(Mixtral):
    """The router decides; y alone is returned; fails in float64."""

    def __init__(self):
        super().__init__()
        self.gate, self.shared_experts = Router(), Expert(20)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        chosen, weights = self.gate(hidden_states)
        y = torch.zeros_like(x, dtype=weights.dtype)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == e)
            y.index_add_(0, token, expert(x[token]) * weights[token, choice, None])
        return y.to(x.dtype).reshape(hidden_states.shape) + self.shared_experts(hidden_states)


class Switch(nn.Module):
    """Top 1, with its probability."""

    def __init__(self):
        super().__init__()
        self.experts, self.router = nn.ModuleList(sequential() for _ in range(E)), nn.Linear(D, E)

    def forward(self, x):
        weight, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y[chosen == e] = expert(x[chosen == e])
        return y * weight.unsqueeze(-1)


class Dense(Switch):
    """All experts, by their softmax."""

    def forward(self, x):
        return self.mixed(x, self.router(x).softmax(-1))

    def mixed(self, x, weights):
        return (torch.stack([expert(x) for expert in self.experts], -2) * weights.unsqueeze(-1)).sum(-2)


class Masked(Switch):
    """Softmax of the chosen logits; every expert is run on everything."""

    def forward(self, x):
        values, chosen = self.router(x).topk(2, dim=-1)
        weights = torch.zeros(*x.shape[:-1], E, dtype=x.dtype).scatter(-1, chosen, values.softmax(-1))
        return sum(expert(x) * weights[..., e, None] for e, expert in enumerate(self.experts))


def register_all():
    """Of subclasses the later registration counts."""
    ewa.register_experts_adapter(Mixtral, experts="experts", router="gate", top_k="top_k")
    ewa.register_experts_adapter(DeepSeek, experts="experts", router="gate")
    for make, top_k in ((Switch, 1), (Dense, E), (Masked, 2)):
        ewa.register_experts_adapter(make, experts="experts", router="router", top_k=top_k)


class Model(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.layers:
            y = block(x)
            x = x + (y if isinstance(y, torch.Tensor) else y[0])
        return x


def made(make, dtype=torch.float32, num_layers=1):
    torch.manual_seed(0)
    model = Model(*(make() for _ in range(num_layers)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for block in model.layers:
            for parameter in (block.gate if hasattr(block, "gate") else block.router).parameters():
                parameter.normal_()
    return model.to(dtype)


def tokens(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (3, 11)), D, generator=torch.Generator().manual_seed(1)).to(dtype)
