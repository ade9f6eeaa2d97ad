"""The AdamW step by torch's own kernels, where the pass of this package cannot make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import adamw

# Of a parameter that has a gradient: grad, exp_avg, exp_avg_sq, step, and the index of its group.
State = tuple[Tensor, Tensor, Tensor, Tensor, int]


def step(
    param_groups: Sequence[dict[str, Any]],
    states: Mapping[Tensor, State],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Fused where that takes what there is, else tensor by tensor, which takes what any AdamW of torch does.

    Raises:
        RuntimeError: gradients have another dtype than `exp_avg`; torch's own words, before anything changes.
    """
    for grad, exp_avg, *_ in states.values():
        torch.empty(0, dtype=exp_avg.dtype).lerp_(torch.empty(0, dtype=grad.dtype), 0.5)
    for i, group in enumerate(param_groups):
        of_group = [(p, *state) for p, state in states.items() if state[-1] == i]
        if not of_group:
            continue
        params, grads, exp_avgs, exp_avg_sqs, steps, _ = map(list, zip(*of_group, strict=True))
        # torch's fused kernel takes it for granted that all lie in memory in the same order.
        for j, p in enumerate(params):
            if grads[j].stride() != p.stride():
                grads[j] = torch.empty_like(p, dtype=grads[j].dtype).copy_(grads[j])
        fused = all(
            len({(t.stride(), t.dtype) for t in tensors}) == 1
            for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)
        )
        if not fused:
            if found_inf is not None and bool(found_inf):
                continue
            grads = grads if grad_scale is None else [g / grad_scale for g in grads]
        adamw.adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=fused,
            foreach=False,
            capturable=group["capturable"] and (fused or params[0].device.type != "cpu"),
            grad_scale=grad_scale if fused else None,
            found_inf=found_inf if fused else None,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
