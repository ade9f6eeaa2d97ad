"""A small model with experts, its optimizer and its averager, and a training loop."""

from __future__ import annotations

import torch
from torch import nn

import ewa_kernels as ewa

SCHEDULE = ewa.LinearShareRate(0.3, 20, start=0.05)


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), ewa.RandomPartitionMoE(8, 12, 4, dropout=0.1), nn.Linear(8, 2)).to(dtype)


def make(make_optimizer=torch.optim.AdamW, dtype=torch.float32, seed=0, **options):
    """A model, its optimizer and an averager that follows it."""
    model = make_model(dtype, seed)
    averager = ewa.ExpertAverager(model, SCHEDULE)
    if make_optimizer is ewa.optim.AdamW:
        return model, make_optimizer(model.parameters(), lr=1e-2, averager=averager, **options), averager
    optimizer = make_optimizer(model.parameters(), lr=1e-2, **options)
    averager.attach(optimizer)
    return model, optimizer, averager


def backward(model, batch=16):
    model(torch.randn(batch, 6).to(model[0].weight.dtype)).square().mean().backward()


def train(model, optimizer, num_steps):
    for _ in range(num_steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def bits(model):
    return [value.clone() for value in model.state_dict().values()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
