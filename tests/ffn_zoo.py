"""FFNs as well-known research code writes them, each in a small block [B, N, 16]; rebuilt from their papers' code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models import Mlp, MLPBlock, PointMlp
from torch import nn

D, D_FF = 16, 24


class Residual(nn.Module):
    """x + f(x): a block around an FFN that is a module of its own."""

    def __init__(self, ffn):
        super().__init__()
        self.ffn = ffn

    def forward(self, x):
        return x + self.ffn(x)


class LlamaFFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*size, bias=False) for size in ((D, D_FF), (D_FF, D), (D, D_FF)))

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class T5GatedFFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi_0, self.wi_1 = nn.Linear(D, D_FF, bias=False), nn.Linear(D, D_FF, bias=False)
        self.wo, self.dropout, self.act = nn.Linear(D_FF, D, bias=False), nn.Dropout(0.1), nn.GELU("tanh")

    def forward(self, hidden_states):
        return self.wo(self.dropout(self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)))


class DinoSwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.w12, self.w3 = nn.Linear(D, 2 * D_FF), nn.Linear(D_FF, D)

    def forward(self, x):
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(x1) * x2)


class BertLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.intermediate, self.output = nn.Module(), nn.Module()
        self.intermediate.dense, self.output.dense = nn.Linear(D, D_FF), nn.Linear(D_FF, D)
        self.output.LayerNorm, self.output.dropout = nn.LayerNorm(D), nn.Dropout(0.1)

    def forward(self, x, attention_mask=None):
        hidden = F.gelu(self.intermediate.dense(x))
        return self.output.LayerNorm(self.output.dropout(self.output.dense(hidden)) + x)


class DetrLayer(nn.Module):
    """DETR's encoder layer: [N, B, D], with positions that may be given."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(D, 2, dropout=0.1)
        self.linear1, self.dropout, self.linear2 = nn.Linear(D, D_FF), nn.Dropout(0.1), nn.Linear(D_FF, D)
        self.norm1, self.norm2, self.dropout1, self.dropout2 = (
            *(nn.LayerNorm(D) for _ in "12"),
            *(nn.Dropout(0.1) for _ in "12"),
        )

    def forward(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        q = src if pos is None else src + pos
        attended = self.self_attn(q, q, src, attn_mask=src_mask, key_padding_mask=src_key_padding_mask)[0]
        src = self.norm1(src + self.dropout1(attended))
        return self.norm2(src + self.dropout2(self.linear2(self.dropout(F.relu(self.linear1(src))))))


class FairseqLayer(nn.Module):
    """Its mask must be given; dropouts are functions."""

    def __init__(self):
        super().__init__()
        self.self_attn, self.self_attn_layer_norm = nn.MultiheadAttention(D, 2), nn.LayerNorm(D)
        self.fc1, self.fc2, self.final_layer_norm = nn.Linear(D, D_FF), nn.Linear(D_FF, D), nn.LayerNorm(D)
        self.activation_fn, self.dropout_p = F.gelu, 0.1

    def forward(self, x, encoder_padding_mask):
        attended, _ = self.self_attn(query=x, key=x, value=x, key_padding_mask=encoder_padding_mask)
        x = self.self_attn_layer_norm(x + F.dropout(attended, self.dropout_p, self.training))
        hidden = F.dropout(self.activation_fn(self.fc1(x)), self.dropout_p, self.training)
        return self.final_layer_norm(x + F.dropout(self.fc2(hidden), self.dropout_p, self.training))


class NoMask(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, None)


class ConvNeXtBlock(nn.Module):
    """[N, C, H, W], channels last between its two permutations."""

    def __init__(self):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(D, D, 3, padding=1, groups=D), nn.LayerNorm(D)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D)
        self.gamma = nn.Parameter(torch.full((D,), 0.5))

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class Image(nn.Module):
    """[B, N, D] as an image one row high."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x.mT.unsqueeze(2)).squeeze(2).mT


class GPTBlock(nn.Module):
    """minGPT: the FFN is a lambda over a ModuleDict."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.c_attn, self.attn_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(D, 4 * D),
                "c_proj": nn.Linear(4 * D, D),
                "act": nn.GELU("tanh"),
                "dropout": nn.Dropout(0.1),
            }
        )
        m = self.mlp
        self.mlpf = lambda x: m.dropout(m.c_proj(m.act(m.c_fc(x))))

    def forward(self, x):
        q, k, v = self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        x = x + self.attn_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlpf(self.ln_2(x))


class PairTransition(nn.Module):
    """OpenFold: a norm before, a mask after."""

    def __init__(self):
        super().__init__()
        self.layer_norm, self.relu = nn.LayerNorm(D), nn.ReLU()
        self.linear_1, self.linear_2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, z, mask=None):
        if mask is None:
            mask = z.new_ones(z.shape[:-1])
        return self.linear_2(self.relu(self.linear_1(self.layer_norm(z)))) * mask.unsqueeze(-1)


class XTransformersGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.act = nn.Linear(D, 2 * D_FF), nn.SiLU()

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * self.act(gate)


class XTransformersFFN(nn.Module):
    def __init__(self, into=None):
        super().__init__()
        into = into or nn.Sequential(nn.Linear(D, D_FF), nn.GELU())
        self.ff = nn.Sequential(into, nn.LayerNorm(D_FF), nn.Dropout(0.1), nn.Linear(D_FF, D))

    def forward(self, x):
        return self.ff(x)


class GEGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(D, 2 * D_FF)

    def forward(self, hidden_states):
        hidden_states, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return hidden_states * F.gelu(gate)


class DiffusersFFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(), nn.Dropout(0.1), nn.Linear(D_FF, D)])

    def forward(self, hidden_states, *args, **kwargs):
        for module in self.net:
            hidden_states = module(hidden_states)
        return hidden_states


def lucidrains():
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D_FF), nn.GELU(), nn.Dropout(0.1), nn.Linear(D_FF, D))


def mish():
    return nn.Sequential(nn.Linear(D, D_FF), nn.Mish(), nn.Linear(D_FF, D))


# name → (a block, the form in which its FFN is replaced)
ZOO = {
    "timm": (lambda: Residual(Mlp(D, D_FF, 0.1)), "fused"),
    "torchvision": (lambda: Residual(MLPBlock(D, D_FF, 0.1)), "fused"),
    "Point-MAE": (lambda: Residual(PointMlp(D, D_FF)), "fused"),
    "Llama": (lambda: Residual(LlamaFFN()), "fused"),
    "T5, gated": (lambda: Residual(T5GatedFFN()), "fused"),
    "DINOv2": (lambda: Residual(DinoSwiGLU()), "fused"),
    "diffusers": (lambda: Residual(DiffusersFFN()), "fused"),
    "BERT": (BertLayer, "pair"),
    "lucidrains": (lambda: Residual(lucidrains()), "pair"),
    "DETR": (DetrLayer, "pair"),
    "fairseq": (lambda: NoMask(FairseqLayer()), "pair"),
    "ConvNeXt": (lambda: Image(ConvNeXtBlock()), "pair"),
    "minGPT": (GPTBlock, "pair"),
    "OpenFold": (lambda: Residual(PairTransition()), "pair"),
    "x-transformers": (lambda: Residual(XTransformersFFN()), "pair"),
    "x-transformers, GLU": (lambda: Residual(XTransformersFFN(XTransformersGLU())), "pair"),
    "Mish": (lambda: Residual(mish()), "pair"),
    "torch": (lambda: nn.TransformerEncoderLayer(D, 2, D_FF, batch_first=True), "pair"),
}
