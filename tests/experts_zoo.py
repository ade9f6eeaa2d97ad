"""Layers of experts as libraries and research code write them, and what looks like them and is none. D = 8, E = 4."""

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


def sequential(d_ff=16):
    return nn.Sequential(nn.Linear(8, d_ff), nn.GELU(), nn.Linear(d_ff, 8))


class Net(nn.Module):
    """nanoMoE: the FFN inside a module of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8), nn.Dropout(0.1))

    def forward(self, x):
        return self.net(x)


class Glu(nn.Module):
    """Mixtral's expert in transformers 4; of Qwen's and others' only the names differ."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 12, False), nn.Linear(12, 8, False), nn.Linear(8, 12, False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


def dispatch(x, experts, weights, choices):
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, place = torch.where(choices == e)
        y.index_add_(0, token, expert(x[token]) * weights[token, place, None])
    return y


class Mixtral4(nn.Module):
    """transformers 4.57: [B, S, D] only; gives the router's logits too."""

    def __init__(self, make=Glu, top_k=2):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList(make() for _ in range(4))

    def forward(self, hidden_states):
        batch_size, sequence_length, d_model = hidden_states.shape
        x = hidden_states.view(-1, d_model)
        logits = self.gate(x)
        weights, choices = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        return dispatch(x, self.experts, weights, choices).reshape(batch_size, sequence_length, d_model), logits


class Qwen4(Mixtral4):
    """With a shared expert and its gate."""

    def __init__(self):
        super().__init__()
        self.shared_expert, self.shared_expert_gate = Glu(), nn.Linear(8, 1, bias=False)

    def forward(self, x):
        y, logits = super().forward(x)
        return y + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x), logits


class Corrected(nn.Module):
    """A router with a correction that only the choice sees."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Glu() for _ in range(4))
        self.gate = nn.Linear(8, 4)
        self.register_buffer("correction", torch.tensor([0.1, 0.3, -0.2, 0.0]))

    def forward(self, x):
        tokens = x.reshape(-1, 8)
        scores = self.gate(tokens).sigmoid()
        choices = (scores + self.correction).topk(2).indices
        return dispatch(tokens, self.experts, scores.gather(1, choices), choices).reshape(x.shape)


class Tutorial(nn.Module):
    def __init__(self, make=sequential):
        super().__init__()
        self.experts = nn.ModuleList(make() for _ in range(4))
        self.gate = nn.Linear(8, 4)
        self.loads = []

    def forward(self, x):
        tokens = x.reshape(-1, 8)
        values, choices = self.gate(tokens).topk(2)
        self.loads.append(choices.flatten().bincount(minlength=4))
        return dispatch(tokens, self.experts, values.softmax(-1), choices).reshape(x.shape)


class Soft(nn.Module):
    """All experts see all tokens, under names that say nothing."""

    def __init__(self):
        super().__init__()
        self.fs, self.r = nn.ModuleList(Net() for _ in range(4)), nn.Sequential(nn.Linear(8, 6), nn.Tanh())
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        weights = self.last(self.r(x)).softmax(-1)
        return (torch.stack([f(x) for f in self.fs], -2) * weights.unsqueeze(-1)).sum(-2)


class Top1(nn.Module):
    """The router is a bare parameter, [N, D] alone is taken, and empty experts are not called."""

    def __init__(self):
        super().__init__()
        self.branches, self.wg = nn.ModuleList(Mlp() for _ in range(4)), nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        _, d_model = x.shape
        value, choice = (x @ self.wg).softmax(-1).max(-1)
        y = torch.zeros(len(x), d_model)
        for e, branch in enumerate(self.branches):
            if (choice == e).any():
                y[choice == e] = branch(x[choice == e]) * value[choice == e, None]
        return y


class Switch(nn.Module):
    """A dict of experts."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleDict({f"expert_{e}": Mlp() for e in range(4)})

    def forward(self, x):
        probability, choice = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts.values()):
            y[choice == e] = expert(x[choice == e])
        return probability.unsqueeze(-1) * y, choice


class Inner(nn.ModuleList):
    """A list with a forward that takes what the router says."""

    def forward(self, x, weights, choices):
        return dispatch(x, self, weights, choices)


class Nested(nn.Module):
    """The list's own holder does not run on tokens."""

    def __init__(self):
        super().__init__()
        self.mixture = nn.Module()
        self.mixture.inner = Inner(sequential() for _ in range(4))
        self.gate = nn.Linear(8, 4)

    def forward(self, x):
        tokens = x.reshape(-1, 8)
        weights, choices = self.gate(tokens).softmax(-1).topk(2)
        return self.mixture.inner(tokens, weights, choices).reshape(x.shape)


class Grouped(nn.Module):
    """DeepSeek: the better two of four experts are chosen among the experts of the better group."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Glu() for _ in range(4))
        self.gate = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        tokens = x.reshape(-1, 8)
        groups = self.gate(tokens).sigmoid().view(-1, 2, 2)
        best = F.one_hot(groups.sum(-1).argmax(-1), 2)
        weights, choices = (groups * best.unsqueeze(-1)).flatten(1).topk(2)
        return dispatch(tokens, self.experts, weights, choices).reshape(x.shape)


class List(nn.ModuleList):
    """A list that is the layer, router and all."""

    def __init__(self):
        super().__init__(Mlp() for _ in range(4))
        self.keys = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        weights = (x @ self.keys.T).softmax(-1)
        return sum(expert(x) * weight.unsqueeze(-1) for expert, weight in zip(self, weights.unbind(-1), strict=True))


class Hashed(nn.Module):
    """What is chosen hangs on the token, but on no parameter: the name alone says what it is."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x):
        tokens = x.reshape(-1, 8)
        choices = (tokens.sum(-1, keepdim=True) * 1000).long() % 4
        return dispatch(tokens, self.experts, torch.ones(len(tokens), 1), choices).reshape(x.shape)


# class or function → names of the router's tensors
EXPERTS = {
    "Mixtral 4": (Mixtral4, "experts", ("gate.weight",)),
    "Qwen 4": (Qwen4, "experts", ("gate.weight",)),
    "corrected": (Corrected, "experts", ("gate.weight", "gate.bias", "correction")),
    "tutorial": (Tutorial, "experts", ("gate.weight", "gate.bias")),
    "tutorial, nested FFN": (lambda: Tutorial(Net), "experts", ("gate.weight", "gate.bias")),
    "soft": (Soft, "fs", ("last.weight", "last.bias")),
    "top 1": (Top1, "branches", ("wg",)),
    "dict": (Switch, "experts", ("router.weight",)),
    "grouped": (Grouped, "experts", ("gate.weight",)),
    "list": (List, "", ("keys",)),
    "hashed": (Hashed, "experts", ()),
    "nested": (Nested, "mixture.inner", ("gate.weight", "gate.bias")),
}


class Chain(nn.Module):
    def __init__(self, name="fs"):
        super().__init__()
        self.name = name
        self.add_module(name, nn.ModuleList(sequential() for _ in range(4)))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for f in getattr(self, self.name):
            x = self.step(f, x)
        return self.head(x)

    def step(self, f, x):
        return f(x)


class Residuals(Chain):
    def step(self, f, x):
        return x + F.layer_norm(f(x), (8,))


class Ensemble(Chain):
    def forward(self, x):
        return torch.stack([f(x) for f in self.fs]).mean(0)


class Multiway(Chain):
    """Each FFN has tokens of its own."""

    def forward(self, x):
        return torch.cat([f(part) for f, part in zip(self.fs, x.chunk(4, -2), strict=True)], -2)


class Modalities(nn.Module):
    """Experts of words and of pictures, which are told apart by their places."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleDict({"words": Mlp(), "pictures": Mlp()})

    def forward(self, x):
        return torch.cat([self.experts["words"](x[..., :4, :]), self.experts["pictures"](x[..., 4:, :])], -2)


class Heads(Chain):
    """One FFN for each level of a pyramid."""

    def forward(self, levels):
        x = [levels[..., ::stride, :] for stride in (1, 2, 4, 8)]
        return [f(level) for f, level in zip(self.fs, x, strict=True)]


class Tasks(Chain):
    """One output for each task, of which the first is looked at."""

    def forward(self, x):
        return {f"task {i}": f(x) for i, f in enumerate(self.fs)}


class MultiHead(Chain):
    """Four FFNs, each with a projection of its own before and after it: equivariant, but they share no tokens."""

    def __init__(self):
        super().__init__()
        self.into, self.out_of = nn.Parameter(torch.randn(4, 8, 8)), nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        return sum(f(x @ a) @ b for f, a, b in zip(self.fs, self.into, self.out_of, strict=True))


class Shared(nn.Module):
    """What every token goes through is no routed expert."""

    def __init__(self):
        super().__init__()
        self.shared_experts = nn.ModuleList(Glu() for _ in range(2))

    def forward(self, x):
        return sum(expert(x) for expert in self.shared_experts)


class Scaled(Chain):
    """Branches, each with a scale of its own."""

    def __init__(self, *size):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, *size))

    def forward(self, x):
        return x + sum(scale * f(x) for f, scale in zip(self.fs, self.scale, strict=True))


class Boosted(Chain):
    """The weights are a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weights", torch.rand(4))

    def forward(self, x):
        return sum(weight * f(x) for f, weight in zip(self.fs, self.weights, strict=True))


class Mixed(Chain):
    """As the heads of attention are."""

    def __init__(self):
        super().__init__()
        self.out_of = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        return torch.einsum("e...d,edh->...h", torch.stack([f(x) for f in self.fs]), self.out_of)


class ScalarMix(Chain):
    """ELMo's."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return sum(weight * f(x) for f, weight in zip(self.fs, self.mix.softmax(0), strict=True))


class Uncertain(Chain):
    """Tasks with a variance each."""

    def __init__(self):
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return torch.stack([f(x) * (-v).exp() for f, v in zip(self.fs, self.log_variance, strict=True)]).square().sum(0)


class Normed(ScalarMix):
    """A norm comes after."""

    def forward(self, x):
        return F.layer_norm(x + super().forward(x), (8,))


class ScaledAndNormed(Scaled):
    def forward(self, x):
        return F.layer_norm(super().forward(x), (8,))


class Queries(Scaled):
    """Heads of attention, each with a scale."""

    def forward(self, x):
        heads = [(f(x) @ x.mT).softmax(-1) @ x for f in self.fs]
        return sum(scale * head for scale, head in zip(self.scale, heads, strict=True))


class EnsembleOfExperts(nn.Module):
    """By the name alone they would be experts."""

    def __init__(self, combine):
        super().__init__()
        self.combine, self.experts = combine, nn.ModuleList(sequential() for _ in range(4))
        self.last = nn.Linear(32, 8)

    def forward(self, x):
        outputs = [expert(x) for expert in self.experts]
        return {
            "mean": lambda: torch.stack(outputs).mean(0),
            "max": lambda: torch.stack(outputs).amax(0),
            "last": lambda: self.last(torch.cat(outputs, -1)),
        }[self.combine]()


NO_EXPERTS = {
    "chain": (Chain, "holds modules that see what others of them give"),
    "residuals": (Residuals, "holds modules that see what others of them give"),
    "chain that is called experts": (lambda: Chain("experts"), "holds modules that see what others of them give"),
    "residuals that are called experts": (lambda: Residuals("experts"), "holds modules that see what others of them"),
    "ensemble": (Ensemble, "holds modules whose order does not matter"),
    "multiway": (Multiway, "holds modules among which nothing chooses"),
    "modalities": (Modalities, "holds modules among which tokens are dealt by their places"),
    "heads of a pyramid": (Heads, "holds modules among which nothing chooses"),
    "heads of tasks": (Tasks, "holds modules among which nothing chooses"),
    "heads with projections": (MultiHead, "holds modules that do not see the same tokens"),
    "scaled": (Scaled, "holds modules that count alike for all tokens"),
    "scaled by feature": (lambda: Scaled(8), "holds modules that count alike for all tokens"),
    "boosted": (Boosted, "holds modules that count alike for all tokens"),
    "mixed by a projection": (Mixed, "holds modules that count alike for all tokens"),
    "scalar mix": (ScalarMix, "holds modules that count alike for all tokens"),
    "scalar mix and a norm": (Normed, "holds modules that count alike for all tokens"),
    "scaled by feature and a norm": (lambda: ScaledAndNormed(8), "holds modules that count alike for all tokens"),
    "queries": (Queries, "holds modules that count alike for all tokens"),
    "tasks with variances": (Uncertain, "holds modules that count alike for all tokens"),
    "mean of experts": (lambda: EnsembleOfExperts("mean"), "holds modules that count alike for all tokens"),
    "maximum of experts": (lambda: EnsembleOfExperts("max"), "holds modules that count alike for all tokens"),
    "all experts side by side": (lambda: EnsembleOfExperts("last"), "holds modules that count alike for all tokens"),
    "shared experts": (Shared, "holds modules whose order does not matter"),
}


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
    """Experts that are no plain FFNs."""

    def __init__(self):
        super().__init__()
        parts = (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(4))
        self.deepspeed_experts = nn.ModuleList(parts)
        self.wg = nn.Linear(8, 4)

    def forward(self, x):
        parts = x.chunk(4, -2)
        return torch.cat([f(part) for f, part in zip(self.deepspeed_experts, parts, strict=True)], -2)
