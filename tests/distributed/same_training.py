"""One training run, the same mathematics on any number of processes.

A step is made of four micro-batches. With W processes each works on 4/W of them; the deal of a micro-batch's tokens
is seeded by its number, so that a single process, which works on all four, deals them in the same way.
"""

import torch
import torch.distributed as dist
from models import Mlp, Transformer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import ewa_kernels as ewa
from ewa_kernels.integrations import fsdp

NUM_STEPS = 10
TOLERANCE = 1e-5
NUM_MICRO_BATCHES = 4


def make_model(num_experts=4, dtype=torch.float32):
    torch.manual_seed(0)
    model = Transformer(Mlp(), Mlp())
    ewa.replace_ffn_(model, num_experts, init="independent")
    return model.to(dtype)


def make_averager(experts, **options):
    schedule = ewa.LinearShareRate(start=0.05, end=0.3, num_steps=NUM_STEPS)
    return ewa.ExpertAverager(experts, schedule, **options)


def make_optimizer(model):
    # eps: gradients that are nothing but rounding errors must not decide about steps of size lr.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


def micro_batch(step, number, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * step + number)
    x = torch.randn(2, 5, 4, generator=generator)
    return x.to(dtype), torch.randn(2, 5, 3, generator=generator).to(dtype)


def train(model, optimizer, steps=range(NUM_STEPS), *, rank=0, world_size=1, dtype=torch.float32, amp=None):
    """Averaging is attached to the optimizer. `amp`: a dtype to autocast to."""
    for step in steps:
        optimizer.zero_grad()
        for number in range(rank, NUM_MICRO_BATCHES, world_size):
            x, y = micro_batch(step, number, dtype)
            torch.manual_seed(100 * step + number)
            with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
                out = model(x)
            loss = nn.functional.mse_loss(out.float(), y.float())
            (loss * world_size / NUM_MICRO_BATCHES).backward()
        optimizer.step()
    return loss.item()


def train_alone(num_experts=4, dtype=torch.float32, amp=None, num_steps=NUM_STEPS):
    """The `state_dict` after training in a single process, and the spread of the experts."""
    model = make_model(num_experts, dtype)
    optimizer, averager = make_optimizer(model), make_averager(model)
    averager.attach(optimizer)
    train(model, optimizer, range(num_steps), dtype=dtype, amp=amp)
    return model.state_dict(), averager.spread()


def largest_difference(ours, theirs):
    """Of two `state_dict`s, in absolute value."""
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in theirs)
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in theirs)


def shard(model, placement=fsdp.expert_shard_placement, **options):
    for block in model.blocks:
        fully_shard(block, shard_placement_fn=placement, **options)
    return fully_shard(model, shard_placement_fn=placement, **options)


def here():
    return {"rank": dist.get_rank(), "world_size": dist.get_world_size()}


def whole(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def on_all_ranks(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def assert_equal_on_all_ranks(tensors):
    for name, tensor in tensors.items():
        for rank, other in enumerate(on_all_ranks(tensor)):
            assert torch.equal(tensor, other), f"{name} is another on rank {rank}"
