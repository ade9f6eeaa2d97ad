"""Tensors, checkpoints and folding on every rank of a process group, each function by itself. `run.py` runs them."""

import re

import pytest
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
    shard,
    train,
    train_alone,
    whole,
)
from models import Mlp, Transformer
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import ewa_kernels as ewa
from ewa_kernels.integrations import fsdp


def every_sharding_averages_to_the_bits_of_whole_tensors():
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(0)
    shapes = [((3, 8, 5), Shard(1)), ((3, 5, 7), Shard(0)), ((5, 3), Shard(0)), ((6, 2, 3), Shard(2))]
    shapes += [((3,), Shard(0)), ((4, 5), Replicate()), ((5, 0), Shard(0)), ((1, 4), Shard(0)), ((2, 3), Shard(1))]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape, _ in shapes]
    lists = [torch.randn(3, 7, 2), torch.randn(2, 4)]
    plain = torch.randn(4, 6)
    expected = [t.clone() for t in (*tensors, *lists, plain)]
    ewa.functional.average_experts_(expected, 0.3)
    ours = [distribute_tensor(t, mesh, [p]) for t, (_, p) in zip(tensors, shapes, strict=True)]
    separate = [[distribute_tensor(expert, mesh, [Shard(0)]) for expert in experts] for experts in lists]
    ewa.functional.average_experts_([*ours, *separate, plain], 0.3)
    results = [t.full_tensor() for t in ours]
    results += [torch.stack([expert.full_tensor() for expert in experts]) for experts in separate]
    for result, right in zip([*results, plain], expected, strict=True):
        assert torch.equal(result, right)
    averager = ewa.ExpertAverager([*ours, *separate, plain], 0.3)
    spread = ewa.ExpertAverager(expected, 0.3).spread()
    # One number may be summed in another order.
    assert all(
        value == other or abs(value - other) <= 1e-12 * other
        for value, other in zip(averager.spread().values(), spread.values(), strict=True)
        if other == other
    )


def wrong_dtensors_are_refused_before_anything_changes():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    good = distribute_tensor(torch.randn(2, 4), mesh, [Shard(0)])
    before = good.full_tensor()
    partial = DTensor.from_local(torch.randn(2, 4), mesh, [Partial()], run_check=False)
    mixed = [distribute_tensor(torch.randn(4), mesh, [placement]) for placement in (Shard(0), Replicate())]
    for bad, words in (
        (partial, "tensors[1] must be sharded or replicated"),
        (mixed, "tensors[1][1] must have the shape and the sharding of tensors[1][0]"),
        ([mixed[0], torch.randn(4)], "tensors[1][1] must have the shape and the sharding"),
        (distribute_tensor(torch.randn(()), mesh, [Replicate()]), "tensors[1] must have a leading expert dimension"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            ewa.functional.average_experts_([good, bad], 0.3)
    assert torch.equal(good.full_tensor(), before)
    model = shard(make_model())
    optimizer = ewa.optim.AdamW(model.parameters(), averager=make_averager(model), bf16_copies=True)
    with pytest.raises(ValueError, match="bf16_copies must be False for sharded parameters"):
        train(model, optimizer, range(1), **here())


def rounding_is_equal_on_replicas_and_another_on_each_shard():
    """On [2 replicas, W/2 shards], experts whose mean is not a bfloat16: which are rounded up shows the bits."""
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, world_size // 2))
    experts = torch.tensor([1.0, 1 + 2**-7], dtype=torch.bfloat16)[:, None].repeat(1, 256)
    for placements in ([Replicate(), Shard(1)], [Replicate(), Shard(0)], [Replicate(), Replicate()]):
        tensor = distribute_tensor(experts, mesh, placements)
        plain = experts.clone()
        # The plain ones must be rounded alike whatever number their neighbour's shard has.
        ewa.ExpertAverager([tensor, plain], 0.5).step()
        assert_equal_on_all_ranks({"plain": plain})
        result = tensor.full_tensor()
        assert_equal_on_all_ranks({str(placements): result})
        mean = result.double().mean()
        assert abs(mean - experts.double().mean()) < 6 * 2**-8 / 512**0.5, "as often up as down"
        pieces = (result == 1).chunk(world_size // 2, dim=1)
        assert not any(torch.equal(pieces[0], piece) for piece in pieces[1:])


def experts_made_on_meta_are_drawn_whole():
    """`fully_shard` on meta, then `to_empty` and `reset_parameters`: no number may stay what it was in memory."""
    for placement in (fsdp.expert_shard_placement, None):
        with torch.device("meta"):
            model = nn.Sequential(ewa.RandomPartitionMoE(8, 16, 3))
        fully_shard(model, shard_placement_fn=placement)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().fill_(torch.nan)
        model[0].reset_parameters()
        for name, tensor in whole(model).items():
            bound = (8 if "up" in name else 16) ** -0.5
            assert 0.5 * bound < tensor.abs().max() <= bound
            assert tensor.std() > 0.3 * bound


def the_first_step_of_a_checkpoint_averages_nothing():
    """get_optimizer_state_dict makes a step at learning rate 0 on gradients of 0, to create the optimizer's state."""
    for make in (
        lambda model, averager: averager.attach(optimizer := make_optimizer(model)) and optimizer,
        lambda model, averager: ewa.optim.AdamW(model.parameters(), averager=averager),
    ):
        for placement in (fsdp.expert_shard_placement, None):
            model = shard(make_model(num_experts=3), placement)
            before, averager = whole(model), make_averager(model)
            optimizer = make(model, averager)
            get_optimizer_state_dict(model, optimizer)
            assert len(optimizer.state) > 0
            assert averager.num_steps == 0
            assert largest_difference(whole(model), before) == 0


def make_run():
    model = shard(make_model())
    optimizer, averager = make_optimizer(model), make_averager(model)
    averager.attach(optimizer)
    return model, optimizer, averager


def save(folder, model, optimizer, averager):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state, "averager": averager}, checkpoint_id=folder)


def load(folder, model, optimizer, averager):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "averager": averager}
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


def a_checkpoint_goes_from_4_processes_to_2(folder):
    """On 4 processes after step 5. On 2, which resume from it, after step 7, and they go on to step 10."""
    run = model, optimizer, averager = make_run()
    if dist.get_world_size() == 4:
        train(model, optimizer, range(5), **here())
        save(folder / "of_4", *run)
        return
    load(folder / "of_4", *run)
    assert averager.num_steps == 5
    assert largest_difference(whole(model), train_alone(num_steps=5)[0]) <= TOLERANCE
    train(model, optimizer, range(5, 7), **here())
    save(folder / "of_2", *run)
    train(model, optimizer, range(7, NUM_STEPS), **here())
    assert averager.num_steps == NUM_STEPS
    assert largest_difference(whole(model), train_alone()[0]) <= TOLERANCE


def a_sharded_model_folds_into_a_dense_state_dict():
    for num_experts, placement in ((4, fsdp.expert_shard_placement), (3, None)):
        model = make_model(num_experts)
        x, _ = micro_batch(0, 0)
        with torch.no_grad():
            expected, output = ewa.folded_state_dict(model), model.eval()(x)
        shard(model, placement)
        dense = Transformer(Mlp(), Mlp())
        folded = fsdp.folded_state_dict(model, keep_on=None)
        assert list(folded) == list(dense.state_dict())
        assert all(torch.equal(folded[name], expected[name]) for name in expected)
        assert (fsdp.folded_state_dict(model) == {}) == (dist.get_rank() > 0)
        dense.load_state_dict(folded, strict=True)
        assert torch.equal(dense.eval()(x), output)
        sharded_dense = shard(Transformer(Mlp(), Mlp()))
        set_model_state_dict(sharded_dense, ewa.folded_state_dict(model))
        with torch.no_grad():
            torch.testing.assert_close(sharded_dense.eval()(x), output)
        with torch.no_grad():  # the model is as it was
            torch.testing.assert_close(model(x), output)


def fold_in_place_of_a_sharded_model_is_refused():
    model = shard(make_model())
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"integrations\.fsdp\.folded_state_dict"):
        ewa.fold_(model)
    assert list(model.state_dict()) == before


CHECKS = [
    every_sharding_averages_to_the_bits_of_whole_tensors,
    wrong_dtensors_are_refused_before_anything_changes,
    rounding_is_equal_on_replicas_and_another_on_each_shard,
    experts_made_on_meta_are_drawn_whole,
    the_first_step_of_a_checkpoint_averages_nothing,
    a_checkpoint_goes_from_4_processes_to_2,
    a_sharded_model_folds_into_a_dense_state_dict,
    fold_in_place_of_a_sharded_model_is_refused,
]
