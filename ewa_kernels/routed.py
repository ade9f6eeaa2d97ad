"""`RoutedMoE`: the mixture of experts whose router is learned, through the same kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import calls, checks, functional
from .modules import StackedExperts


class Router(nn.Linear):
    """logits = x @ weightᵀ in float32 or wider, autocast or not: which experts are chosen hangs on the last bits."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        if not checks.autocast_enabled(x.device):
            return F.linear(x.to(dtype), self.weight.to(dtype))
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))


class RoutedMoE(StackedExperts):
    """y[t] = Σ_j w[t, j] · FFN_e(x[t]) over the k experts e whose router logits are the highest for token t.

    w = softmax(router(x)), of all experts, in float32 or wider, autocast or not. No expert has a capacity: no token
    is dropped. Of equal logits the expert with the lower number is taken. Nothing is random but dropout, and nothing
    waits for the device, except for the backend "torch".

        y = layer(x)
        loss = criterion(y) + 0.01 * layer.load_balance_loss + 0.001 * layer.z_loss

    Args:
        d_model, d_ff, num_experts, activation, gated, bias, dropout, device, dtype, backend, saved, recompute:
            see `RandomPartitionMoE`; bias is the experts', the router has none.
        top_k: k, 1 ≤ k ≤ E.
        renormalize: divide the k weights of a token by their sum. With k = 1 each is 1 then, and the router learns
            from the two losses only.

    Attributes:
        router: gives logits `[T, E]`; an nn.Linear, `weight` `[E, D]`. `ewa_kernels.ExpertAverager` leaves it alone.
        up, down: the experts, as in `RandomPartitionMoE`.
        load_balance_loss: of the last forward in training mode, None before: E · Σ_e f_e · p_e, f_e the share of the
            choices that fell on expert e, p_e the mean of its softmax. 1 if all are alike.
        z_loss: likewise; the mean of logsumexp(logits)². Under activation checkpointing both have a gradient with
            use_reentrant=False only.

    Raises:
        TypeError, ValueError: an argument of a wrong type, or out of range.

    Source: the losses are equations 4 to 6 of arXiv 2101.03961 and equation 5 of arXiv 2202.08906.
    """

    load_balance_loss: Tensor | None
    z_loss: Tensor | None

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        top_k: int = 1,
        *,
        renormalize: bool = False,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        saved: str = "full",
        recompute: bool = False,
    ):
        super().__init__(
            d_model,
            d_ff,
            num_experts,
            activation=activation,
            gated=gated,
            bias=bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
            backend=backend,
            saved=saved,
            recompute=recompute,
        )
        checks.integer("top_k", top_k, minimum=1, below=num_experts + 1)
        checks.boolean("renormalize", renormalize)
        self.top_k, self.renormalize = top_k, renormalize
        self.router = Router(d_model, num_experts, bias=False, device=device, dtype=dtype)
        self.load_balance_loss = self.z_loss = None

    def reset_parameters(self) -> None:
        """Draws all experts and the router afresh."""
        super().reset_parameters()
        self.router.reset_parameters()

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`[..., D]` → `[..., D]`.

        Args:
            x: of the dtype and device of the parameters.
            seed: of dropout, in training: int in 0…2⁶³−1 or int64 tensor with one element. None draws it.
            mask: bool `[...]`, False for tokens that are padding: they are routed as all are, but the two losses are of
                the others. None: no token is.

        Raises:
            TypeError, ValueError: x or seed is not what `ewa_kernels.functional.grouped_ffn` needs; mask is not bool,
                or of another shape or device than x's tokens.
        """
        if (
            type(x) not in calls.PLAIN
            and (y := calls.of_another_kind(self, x, seed=seed, mask=mask)) is not NotImplemented
        ):
            return y
        if mask is not None:
            checks.mask(mask, x)
        checks.ffn(x, *self.experts, self.activation, self.gated, self.dropout)
        logits = self.router(x.reshape(-1, self.d_model))
        routing_weights, choices = functional.route(logits, self.top_k, renormalize=self.renormalize)
        permutation, expert_offsets = functional.partition_by_expert(choices, self.num_experts)
        dropout_p = self.dropout if self.training else 0.0
        if seed is None:
            seed = self.draw_seed(x) if dropout_p > 0 else 0
        if self.training:
            self.load_balance_loss, self.z_loss = _losses(logits, choices, expert_offsets, mask)
        return functional.grouped_ffn(
            x,
            *self.experts,
            permutation=permutation,
            expert_offsets=expert_offsets,
            routing_weights=routing_weights,
            seed=seed,
            activation=self.activation,
            gated=self.gated,
            dropout_p=dropout_p,
            backend=self.backend,
            saved=self.saved,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the losses, which belong to a graph and cannot be copied."""
        return {**self.__dict__, "load_balance_loss": None, "z_loss": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, top_k={self.top_k}, renormalize={self.renormalize}"


def _losses(logits: Tensor, choices: Tensor, expert_offsets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """choices `[T, k]`; mask: of the tokens that count."""
    num_experts = logits.shape[1]
    if mask is None:
        # 0 without tokens, rather than NaN.
        shares = expert_offsets.diff() / expert_offsets[-1].clamp(min=1)
        mean_probabilities = logits.softmax(dim=-1).sum(0) / max(len(logits), 1)
        z_loss = logits.logsumexp(dim=-1).square().sum() / max(len(logits), 1)
    else:
        # How many tokens count is known on the device only; the others may hold anything.
        logits, counts = torch.where(mask.reshape(-1, 1), logits, 0), mask.reshape(-1).to(logits.dtype)
        number = mask.sum().clamp(min=1)
        shares = counts @ torch.zeros_like(logits).scatter_(1, choices.long(), 1.0) / (number * choices.shape[1])
        mean_probabilities = counts @ logits.softmax(dim=-1) / number
        z_loss = counts @ logits.logsumexp(dim=-1).square() / number
    return num_experts * (shares * mean_probabilities).sum(), z_loss
