"""Two equal sets of parameters: for our AdamW with averaging, and for torch's followed by `ExpertAverager.step`."""

import torch
from torch import nn

import ewa_kernels as ewa

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def parameters(dtype=torch.float32, seed=0):
    """Two stacked tensors, one with an odd size, five separate experts, three parameters without fellows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 30, 17), (3, 7), *[(5, 6)] * 5, (33, 5), (7,), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def averager_of(params, share_rate=0.1, **options):
    return ewa.ExpertAverager([params[0], params[1], params[2:7]], share_rate, **options)


def set_grads(params, step, missing=()):
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if i in missing:
            p.grad = None


def twins(dtype=torch.float32, groups=lambda params: params, averager_options=None, **options):
    """(ours, its params), (torch's, its params, its averager), from equal starts."""
    pairs = []
    for ours in (True, False):
        params = parameters(dtype)
        averager = averager_of(params, **(averager_options or {}))
        if ours:
            optimizer = ewa.optim.AdamW(groups(params), averager=averager, **options)
        else:
            optimizer = torch.optim.AdamW(groups(params), fused=True, **options)
        pairs.append((optimizer, params, averager))
    return pairs


def assert_same(ours, theirs):
    """All parameters, moments and steps, up to a few roundings."""
    (optimizer, params, averager), (torchs, torchs_params, torchs_averager) = ours, theirs
    for p, q in zip(params, torchs_params, strict=True):
        eps = torch.finfo(p.dtype).eps
        torch.testing.assert_close(p, q, rtol=8 * eps, atol=8 * eps)
        assert optimizer.state[p].keys() == torchs.state[q].keys()
        for name, value in optimizer.state[p].items():
            torch.testing.assert_close(value, torchs.state[q][name], rtol=8 * eps, atol=8 * eps)
    assert averager.num_steps == torchs_averager.num_steps


def train(ours, theirs, num_steps=5, start=0, missing=()):
    for step in range(start, start + num_steps):
        for optimizer, params, averager in (ours, theirs):
            set_grads(params, step, missing if step == 3 else ())
            optimizer.step()
            if not isinstance(optimizer, ewa.optim.AdamW):
                averager.step()
