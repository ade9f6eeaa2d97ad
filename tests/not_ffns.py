"""Modules that look like FFNs and must not be replaced, each with the beginning of the reason."""

import random

import torch
from models import Mlp, SwiGLU
from torch import nn


class Residual(Mlp):
    def forward(self, x):
        return x + super().forward(x)


class TinyResidual(Mlp):
    def forward(self, x):
        return 1e-4 * x + super().forward(x)


class Scaled(Mlp):
    def forward(self, x):
        return 0.5 * super().forward(x)


class MixesTokens(Mlp):
    def forward(self, x):
        return super().forward(x + x.mean(1, keepdim=True))


class FunctionalDropout(Mlp):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class InputDropout(Mlp):
    def forward(self, x):
        return super().forward(self.drop2(x))


class Saturating(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)).clamp(-12, 12))


class LayerDrop(Mlp):
    def forward(self, x):
        if self.training and torch.rand(()) < 0.01:
            return torch.zeros_like(x)
        return super().forward(x)


class PythonLayerDrop(Mlp):
    def forward(self, x):
        if self.training and random.random() < 0.01:
            return torch.zeros_like(x)
        return super().forward(x)


class MixesManyTokens(Mlp):
    def forward(self, x):
        return super().forward(x) + (x.mean(1, keepdim=True) if x.shape[1] > 64 else 0)


class MixesImages(Mlp):
    def forward(self, x):
        return super().forward(x) + (x.mean(1, keepdim=True) if x.ndim == 4 else 0)


class Detaches(Mlp):
    def forward(self, x):
        return super().forward(x.detach())


class NoGradHidden(Mlp):
    def forward(self, x):
        with torch.no_grad():
            hidden = self.act(self.fc1(x))
        return self.fc2(hidden)


class StraightThrough(Mlp):
    def forward(self, x):
        return super().forward(x) + x - x.detach()


class DetachesInTraining(Mlp):
    def forward(self, x):
        return super().forward(x.detach() if self.training else x)


class ResidualInTraining(Mlp):
    def forward(self, x):
        y = super().forward(x)
        return y + x if self.training and torch.is_grad_enabled() else y


class ResidualWithGradients(Mlp):
    def forward(self, x):
        y = super().forward(x)
        return y + x.detach() if torch.is_grad_enabled() else y


class ResidualUnlessDouble(Mlp):
    def forward(self, x):
        y = super().forward(x)
        return y + x if x.dtype != torch.float64 else y


class WritesIntoInput(Mlp):
    def forward(self, x):
        y = super().forward(x)
        x.zero_()
        return y


class NoArgument(Mlp):
    def forward(self):
        return None


class PlainNormed(Mlp):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16, elementwise_affine=False)


class ConvMlp(Mlp):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Conv2d(8, 16, 1)


def frozen_bias_of_two():
    ffn = SwiGLU()
    ffn.w_gate.requires_grad_(False)
    return ffn


def tied():
    ffn = Mlp()
    ffn.fc2.weight = nn.Parameter(ffn.fc1.weight.detach().clone().t().contiguous())
    ffn.other = nn.Linear(1, 1)
    ffn.other.weight = ffn.fc1.weight
    return ffn


def hooked():
    ffn = Mlp()
    ffn.fc1.register_forward_hook(lambda *_: None)
    return ffn


def half():
    ffn = Mlp()
    ffn.fc2.half()
    return ffn


NO_FORMULA = (
    "its output is not down(act(up(x))) with act any of gelu, gelu_tanh, quick_gelu, relu, relu2, silu, identity"
)

# An FFN is no plain one, but its projections are a pair: (module, why not the fused layer).
PAIRS = [
    (Residual(), NO_FORMULA),
    (TinyResidual(), NO_FORMULA),
    (Scaled(), NO_FORMULA),
    (MixesTokens(), NO_FORMULA),  # before the pair
    (PlainNormed(), NO_FORMULA),
    (Mlp(act=nn.Tanh), NO_FORMULA),
    (FunctionalDropout(), "in training does something else than dropout of hidden and of the output"),
    (InputDropout(drop=0.1), "in training does something else than"),
    (Saturating(), "is no plain FFN on every input: not on [2, 3, 8], scale 100"),
    (Mlp(act=nn.ReLU6), "is no plain FFN on every input: not on [2, 3, 8], scale 100"),
    (LayerDrop(), "in training does something else than dropout"),
    (PythonLayerDrop(), "in training does something else than dropout"),
    (MixesManyTokens(), "is no plain FFN on every input: not on [1, 70, 8], scale 1"),
    (MixesImages(), "is no plain FFN on every input: not on [2, 4, 5, 8], scale 1"),
    (Detaches(), "its gradient with respect to its input is not that of its output"),
    (NoGradHidden(), "its gradient with respect to its input is not that of its output"),
    (StraightThrough(), "its gradient with respect to its input is not that of its output"),
    (DetachesInTraining(), "its gradient with respect to its input is not that of its output in training"),
    (ResidualInTraining(), "its output is another where gradients are recorded"),
    (ResidualWithGradients(), "its output is another where gradients are recorded"),
    (ResidualUnlessDouble(), "is another FFN at [16, 8] in torch.float32 than as a small copy"),
    (WritesIntoInput(), "writes into its input"),
]

SKIPPED = [
    (NoArgument(), "fails on one tensor [2, 3, D]: TypeError"),
    (torch.jit.script(Mlp()), "is a script: call replace_ffn_ before torch.jit.script"),
    (ConvMlp(), "fc1 is a Conv2d, not an nn.Linear"),
    (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 5)), "maps 8 to 5 features, not to as many"),
    (frozen_bias_of_two(), "its up projections differ in weight: frozen, or missing"),
    (tied(), "shares with another module: fc1.weight"),
    (hooked(), "has hooks that would be lost, on fc1"),
    (half(), "has parameters of more than one dtype: torch.float16, torch.float32"),
    (nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(16, 8)), "its up projection gives 12 features"),
]
