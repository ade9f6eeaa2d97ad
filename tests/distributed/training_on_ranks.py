"""Training on every rank of a process group, each function by itself. `run.py` runs them."""

import copy

import torch
import torch.distributed as dist
from distributed.same_training import (
    NUM_STEPS,
    TOLERANCE,
    assert_equal_on_all_ranks,
    here,
    largest_difference,
    make_averager,
    make_model,
    make_optimizer,
    micro_batch,
    on_all_ranks,
    shard,
    train,
    train_alone,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import ewa_kernels as ewa
from ewa_kernels.integrations import fsdp


def ddp_equals_a_single_process():
    expected, spread = train_alone()
    model = DistributedDataParallel(make_model())
    optimizer, averager = make_optimizer(model), make_averager(model)
    averager.attach(optimizer)
    train(model, optimizer, **here())
    assert averager.num_steps == NUM_STEPS
    assert largest_difference(model.module.state_dict(), expected) <= TOLERANCE
    assert_equal_on_all_ranks(model.module.state_dict())
    assert (
        max(abs(ours - theirs) for ours, theirs in zip(averager.spread().values(), spread.values(), strict=True))
        <= TOLERANCE
    )


def ddp_ranks_deal_differently_and_stay_identical():
    """Two seeds a rank: its own generator's, and one that all share, with the rank folded in. 16-bit experts."""
    for seed, fold in ((dist.get_rank(), False), (0, True)):
        model = DistributedDataParallel(make_model(dtype=torch.bfloat16))
        if fold:
            fsdp.fold_rank_into_seed_(model)
        averager = make_averager(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        averager.attach(optimizer)
        before = copy.deepcopy(model.module.state_dict())
        torch.manual_seed(seed)
        for step in range(3):
            x, _ = micro_batch(step, 0, torch.bfloat16)  # the same tokens: what differs is their deal alone
            model.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            outputs = on_all_ranks(model.module(x))
        assert not any(torch.equal(outputs[0], other) for other in outputs[1:])
        assert largest_difference(model.module.state_dict(), before) > 1e-3
        assert_equal_on_all_ranks(model.module.state_dict())


def zero_1_equals_a_single_process():
    expected, _ = train_alone()
    model = DistributedDataParallel(make_model())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2, eps=1e-4)
    averager = make_averager(model)
    averager.attach(optimizer)
    train(model, optimizer, **here())
    assert averager.num_steps == NUM_STEPS
    assert largest_difference(model.module.state_dict(), expected) <= TOLERANCE
    assert_equal_on_all_ranks(model.module.state_dict())


def experts_moved(model, before):
    return any(not torch.equal(p, before[name]) for name, p in ewa.expert_tensors(model))


def fsdp_equals_a_single_process_and_averages_without_communication():
    expected, spread = train_alone()
    model = shard(make_model())
    for _, parameter in ewa.expert_tensors(model):
        assert parameter.placements == (Shard(1),)
    assert model.head.weight.placements == (Shard(0),)
    optimizer, averager = make_optimizer(model), make_averager(model)
    averager.attach(optimizer)
    train(model, optimizer, **here())
    assert largest_difference(whole(model), expected) <= TOLERANCE
    ours = averager.spread()
    assert on_all_ranks(ours) == [ours] * dist.get_world_size()
    assert max(abs(ours[name] - spread[name]) for name in spread) <= TOLERANCE
    before = {name: p.detach().clone() for name, p in ewa.expert_tensors(model)}
    with CommDebugMode() as communication:
        averager.average()
    assert communication.get_total_counts() == 0
    assert experts_moved(model, before)


def fsdp_sharded_by_experts_equals_a_single_process():
    """3 experts: on 4 processes the last has none of them, on 2 it has one, and the first two."""
    expected, spread = train_alone(num_experts=3)
    model = shard(make_model(num_experts=3), placement=None)
    held = on_all_ranks(len(model.blocks[1].mlp.up.weight.to_local()))
    assert held == {2: [2, 1], 4: [1, 1, 1, 0]}[dist.get_world_size()]
    optimizer, averager = make_optimizer(model), make_averager(model)
    averager.attach(optimizer)
    train(model, optimizer, **here())
    assert largest_difference(whole(model), expected) <= TOLERANCE
    ours = averager.spread()
    assert max(abs(ours[name] - spread[name]) for name in spread) <= TOLERANCE


def fsdp_with_adamw_in_one_pass_equals_a_single_process():
    """In one pass where experts are not split; else, with 3 experts, torch's step and then averaging."""
    for num_experts, placement in ((4, fsdp.expert_shard_placement), (3, None)):
        expected, _ = train_alone(num_experts)
        model = shard(make_model(num_experts), placement)
        averager = make_averager(model)
        optimizer = ewa.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, averager=averager)
        one_pass = []
        run = optimizer._pass_anew
        optimizer._pass_anew = lambda *args, run=run, one_pass=one_pass: (one_pass.append(1), run(*args))
        train(model, optimizer, **here())
        assert averager.num_steps == NUM_STEPS
        assert len(one_pass) == (NUM_STEPS if placement is not None else 0)
        assert largest_difference(whole(model), expected) <= TOLERANCE
        steps = {int(state["step"]) for state in optimizer.state.values()}
        assert steps == {NUM_STEPS}, "also of empty shards"


def hybrid_sharding_of_16_bit_parameters_keeps_replicas_identical():
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    for one_pass in (False, True):
        model = shard(make_model(dtype=torch.bfloat16), mesh=mesh)
        averager = make_averager(model)
        if one_pass:
            optimizer = ewa.optim.AdamW(model.parameters(), lr=1e-2, averager=averager)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            averager.attach(optimizer)
        train(model, optimizer, range(4), dtype=torch.bfloat16, **here())
        for name, parameter in model.named_parameters():
            shards = on_all_ranks(parameter.to_local())
            half = world_size // 2
            assert all(torch.equal(shards[i], shards[half + i]) for i in range(half)), name


def mixed_precision_and_autocast_train():
    """bfloat16 in the forward, by FSDP2's policy and by autocast: what autocast gives in a single process.

    The policy rounds in other places than autocast, and is nearer to it than float32 is.
    """
    expected, _ = train_alone(amp=torch.bfloat16)

    def distance(state_dict):
        return sum((expected[name] - state_dict[name]).square().sum() for name in expected).sqrt().item()

    in_float32 = distance(train_alone()[0])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for options, amp in (({"mp_policy": policy}, None), ({}, torch.bfloat16)):
        model = shard(make_model(), **options)
        optimizer, averager = make_optimizer(model), make_averager(model)
        averager.attach(optimizer)
        train(model, optimizer, amp=amp, **here())
        result = whole(model)
        if amp is None:
            assert 0 < distance(result) <= in_float32 / 2, f"{distance(result)}, in float32 {in_float32}"
        else:
            assert largest_difference(result, expected) <= TOLERANCE
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def overflow_on_one_rank_skips_the_step_on_all():
    for one_pass in (False, True):
        model = shard(make_model())
        averager = make_averager(model)
        if one_pass:
            optimizer = ewa.optim.AdamW(model.parameters(), lr=1e-2, averager=averager)
        else:
            optimizer = make_optimizer(model)
            averager.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        before = whole(model)
        for step in range(2):
            optimizer.zero_grad()
            x, y = micro_batch(step, dist.get_rank())
            scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
            if step == 0 and dist.get_rank() == 0:
                model.head.bias.grad.to_local().fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
            assert averager.num_steps == step
            assert (largest_difference(whole(model), before) > 0) == (step == 1)


def a_first_step_at_learning_rate_0_is_the_same_on_all_ranks():
    """A warm-up starts there. One rank alone has a gradient that is not 0: all must average, or none would end."""
    model = shard(make_model(num_experts=3), placement=None)
    averager = ewa.ExpertAverager(model, 0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    averager.attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if dist.get_rank() == 0:
        model.embed.weight.grad.to_local().fill_(1)
    before = whole(model)
    optimizer.step()
    assert on_all_ranks(averager.num_steps) == [1] * dist.get_world_size()
    assert largest_difference(whole(model), before) > 1e-3


CHECKS = [
    ddp_equals_a_single_process,
    ddp_ranks_deal_differently_and_stay_identical,
    zero_1_equals_a_single_process,
    fsdp_equals_a_single_process_and_averages_without_communication,
    fsdp_sharded_by_experts_equals_a_single_process,
    fsdp_with_adamw_in_one_pass_equals_a_single_process,
    hybrid_sharding_of_16_bit_parameters_keeps_replicas_identical,
    mixed_precision_and_autocast_train,
    overflow_on_one_rank_skips_the_step_on_all,
    a_first_step_at_learning_rate_0_is_the_same_on_all_ranks,
]
