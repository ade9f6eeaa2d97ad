"""torch.distributed: DDP, FSDP2, ZeRO-1 and distributed checkpoints, against training in a single process."""

import copy
import functools
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import exchange_on_ranks, same_training, state_on_ranks, training_on_ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

import ewa_kernels as ewa
from ewa_kernels.integrations import fsdp
from ewa_kernels.integrations.callbacks import AveragingCallback

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
CHECKS = [*training_on_ranks.CHECKS, *state_on_ranks.CHECKS, *exchange_on_ranks.CHECKS]


def torchrun(num_processes, script, *arguments):
    """What it printed. On a machine with fewer cores than processes each gets one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [*command, str(TESTS / "distributed" / "leave.py"), str(script), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    return run.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def results(folder):
    """Of all checks on 4 processes, and then on 2, which resume from the checkpoint of the 4."""

    def run(num_processes):
        torchrun(num_processes, TESTS / "distributed" / "run.py", folder)
        return json.loads((folder / f"results_{num_processes}.json").read_text())

    return {num_processes: run(num_processes) for num_processes in (4, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("num_processes", [2, 4])
def test_on_ranks(results, num_processes, check):
    """Each function of `distributed/*_on_ranks.py`, on every rank."""
    errors = results[num_processes][check]["errors"]
    assert not errors, "\n".join(f"rank {rank}: {text}" for rank, text in errors.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_a_checkpoint_goes_from_2_processes_to_1(results, folder):
    """Saved on 2 after step 7, which had been resumed from 4; here without a process group, and not sharded."""
    model = same_training.make_model()
    optimizer, averager = same_training.make_optimizer(model), same_training.make_averager(model)
    averager.attach(optimizer)
    state_on_ranks.load(folder / "of_2", model, optimizer, averager)
    assert averager.num_steps == 7
    assert same_training.largest_difference(model.state_dict(), same_training.train_alone(num_steps=7)[0]) <= 1e-5
    same_training.train(model, optimizer, range(7, 10))
    assert same_training.largest_difference(model.state_dict(), same_training.train_alone()[0]) <= 1e-5


def test_the_comparison_notices():
    """Without averaging, and with one step less, training ends elsewhere: the tolerance is not too wide."""
    expected, _ = same_training.train_alone()
    model = same_training.make_model()
    same_training.train(model, same_training.make_optimizer(model))
    assert same_training.largest_difference(model.state_dict(), expected) > 1e-3
    assert same_training.largest_difference(same_training.train_alone(num_steps=9)[0], expected) > 1e-3


@pytest.mark.slow
def test_fsdp2_example_trains_resumes_and_folds(tmp_path):
    """examples/fsdp2_torchrun.py, twice: the second run goes on where the first ended."""
    script = EXAMPLES / "fsdp2_torchrun.py"
    first = torchrun(2, script, "--steps", 2, "--output", tmp_path)
    assert "resumed" not in first
    second = torchrun(2, script, "--steps", 4, "--output", tmp_path)
    assert "resumed after step 2" in second
    assert "step 4" in second
    spec = importlib.util.spec_from_file_location("fsdp2_torchrun", script)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(1)
    dense = example.ViT()
    start = copy.deepcopy(dense.state_dict())
    dense.load_state_dict(torch.load(tmp_path / "dense.pt"), strict=True)
    assert all(tensor.isfinite().all() for tensor in dense.state_dict().values())
    assert same_training.largest_difference(dense.state_dict(), start) > 1e-3


class TestExpertShardPlacement:
    """In a single process; `fully_shard` itself asks in `distributed/training_on_ranks.py`."""

    @pytest.mark.parametrize(
        ("num_shards", "placements"),
        [
            (4, [1, 1, 1, 1]),  # F = 12, D = 8
            (8, [2, None, 1, 1]),  # only D is divisible
            (6, [1, 1, 2, None]),  # only F
            (5, [None, None, None, None]),
            (1, [1, 1, 1, 1]),
        ],
    )
    def test_first_dimension_that_divides_and_is_not_the_experts(self, num_shards, placements):
        layer = ewa.RandomPartitionMoE(8, 12, 4)
        place = functools.partial(fsdp.expert_shard_placement, num_shards=num_shards)
        parameters = (layer.up.weight, layer.up.bias, layer.down.weight, layer.down.bias)
        assert [place(p) for p in parameters] == [None if dim is None else Shard(dim) for dim in placements]

    def test_other_parameters_are_left_to_fsdp(self):
        place = functools.partial(fsdp.expert_shard_placement, num_shards=2)
        assert all(place(p) is None for p in nn.Linear(8, 8).parameters())
        assert place(nn.Parameter(torch.empty(4, 8, 8))) is None

    @pytest.mark.parametrize(
        "copied",
        [
            copy.deepcopy,
            lambda model: pickle.loads(pickle.dumps(model)),
            lambda model: copy.deepcopy(model).to("meta").to_empty(device="cpu"),
            lambda model: copy.deepcopy(model).double(),
        ],
        ids=["deepcopy", "pickle", "to_empty", "double"],
    )
    def test_experts_are_known_however_the_model_was_made(self, copied):
        model = copied(same_training.make_model())
        experts = {id(p) for _, p in ewa.expert_tensors(model)}
        assert len(experts) == 4
        for parameter in model.parameters():
            placement = fsdp.expert_shard_placement(parameter, num_shards=2)
            assert placement == (Shard(1) if id(parameter) in experts else None)

    def test_bad_input(self):
        layer = ewa.RandomPartitionMoE(8, 12, 4)
        with pytest.raises(TypeError, match="param must be a Parameter, got RandomPartitionMoE"):
            fsdp.expert_shard_placement(layer)
        with pytest.raises(ValueError, match="num_shards must be at least 1, got 0"):
            fsdp.expert_shard_placement(layer.up.weight, num_shards=0)
        with pytest.raises(RuntimeError, match="num_shards must be given where there is no process group"):
            fsdp.expert_shard_placement(layer.up.weight)


class TestFoldRankIntoSeed:
    def outputs(self, ranks, **options):
        model = same_training.make_model()
        x, _ = same_training.micro_batch(0, 0)
        for rank in ranks:
            if rank is not None:
                fsdp.fold_rank_into_seed_(model, rank)
            torch.manual_seed(0)
            yield model(x) if not options else model.blocks[1].mlp(model.embed(x), **options)

    def test_each_rank_deals_in_another_way_and_reproducibly(self):
        before, *ranks = self.outputs([None, *range(8)])
        assert torch.equal(before, ranks[0])
        assert not any(torch.equal(a, b) for i, a in enumerate(ranks) for b in ranks[:i])
        assert all(torch.equal(a, b) for a, b in zip(ranks, self.outputs(range(8)), strict=True))

    def test_a_given_seed_is_left_as_it_is(self):
        first, second = self.outputs([0, 3], seed=5)
        assert torch.equal(first, second)

    def test_random_numbers_drawn_afterwards_are_the_same(self):
        *_, _ = self.outputs([1])
        drawn = torch.rand(())
        *_, _ = self.outputs([None])
        assert torch.equal(torch.rand(()), drawn)

    def test_under_compile(self):
        model = same_training.make_model()
        fsdp.fold_rank_into_seed_(model, 2**32 - 1)
        x, _ = same_training.micro_batch(0, 0)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)

    def test_bad_input(self):
        model = same_training.make_model()
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
            fsdp.fold_rank_into_seed_([])
        with pytest.raises(ValueError, match="model must have RandomPartitionMoE layers"):
            fsdp.fold_rank_into_seed_(nn.Linear(2, 2), 0)
        with pytest.raises(ValueError, match="rank must be at least 0, got -1"):
            fsdp.fold_rank_into_seed_(model, -1)
        with pytest.raises(RuntimeError, match="rank must be given where there is no process group"):
            fsdp.fold_rank_into_seed_(model)


@pytest.fixture
def one_process():
    """A process group in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
class TestGatheredByFSDP2:
    """Averaging parameters which FSDP2 has gathered would be in vain."""

    def make(self, by_block):
        model = same_training.make_model()
        if by_block:
            same_training.shard(model)
        else:
            fully_shard(model, shard_placement_fn=fsdp.expert_shard_placement)
        return model

    @pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, ewa.optim.AdamW])
    @pytest.mark.parametrize("why", ["reshard_after_backward", "forward"])
    def test_raises_before_the_optimizer_steps(self, why, make_optimizer):
        model = self.make(by_block=why == "reshard_after_backward")
        averager = same_training.make_averager(model)
        if make_optimizer is ewa.optim.AdamW:
            optimizer = make_optimizer(model.parameters(), averager=averager)
        else:
            optimizer = make_optimizer(model.parameters())
            averager.attach(optimizer)
        x, _ = same_training.micro_batch(0, 0)
        if why == "reshard_after_backward":
            model.set_reshard_after_backward(False)
        model(x).square().mean().backward()
        if why == "forward":
            with torch.no_grad():
                model(x)
        before = [p.to_local().clone() for p in optimizer.param_groups[0]["params"]]
        for step in (optimizer.step, averager.check):
            with pytest.raises(RuntimeError, match=r"must be sharded when the optimizer steps.*call reshard\(\)"):
                step()
        after = [p.to_local() for p in optimizer.param_groups[0]["params"]]
        assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
        assert averager.spread()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        optimizer.step()
        assert averager.num_steps == 1

    def test_an_averager_made_before_sharding(self):
        """Its parameters are replaced then; the optimizer is made of the new ones."""
        model = same_training.make_model()
        averager = same_training.make_averager(model)
        same_training.shard(model)
        optimizer = same_training.make_optimizer(model)
        averager.attach(optimizer)
        same_training.train(model, optimizer, range(2))
        alone, _ = same_training.train_alone(num_steps=2)
        ours = {name: value.full_tensor() for name, value in model.state_dict().items()}
        assert same_training.largest_difference(ours, alone) <= 1e-5

    def test_names_are_those_without_ddp(self):
        model = same_training.make_model()
        names = list(same_training.make_averager(model).spread())
        ddp = nn.parallel.DistributedDataParallel(model)
        assert list(same_training.make_averager(ddp).spread()) == names

    def test_parameters_that_sharding_replaces_after_attach(self):
        model = same_training.make_model()
        averager = same_training.make_averager(model)
        averager.attach(optimizer := same_training.make_optimizer(model))
        same_training.shard(model)
        with pytest.warns(UserWarning, match=r"experts blocks\.1\.mlp\.up\.weight .*are averaged, but the AdamW"):
            optimizer.step()

    def test_experts_that_fsdp2_ignores_are_not_gathered(self):
        model = same_training.make_model()
        ignored = {p for _, p in ewa.expert_tensors(model)}
        fully_shard(model, ignored_params=ignored)
        averager = same_training.make_averager(model)
        averager.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        averager.check()

    def test_callbacks_begin_after_a_validation(self):
        """Lightning's, which comes before training, gathers the root's parameters."""
        model = self.make(by_block=False)
        averaging = AveragingCallback(None, 0.3, False, False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.no_grad():
            model(same_training.micro_batch(0, 0)[0])
        averaging._begin(model)
        averaging._attach([optimizer])
        assert averaging.averager.attached_to is optimizer

    def test_callbacks_say_at_the_start_that_they_cannot_fold(self):
        model = self.make(by_block=True)
        averaging = AveragingCallback(None, 0.3, True, False)
        with pytest.raises(ValueError, match=r"fold_at_end must be False for a sharded model.*folded_state_dict"):
            averaging._begin(model)


class TestWithoutProcesses:
    def test_folded_state_dict_of_a_model_that_is_not_sharded(self):
        model = same_training.make_model()
        ours, expected = fsdp.folded_state_dict(model), ewa.folded_state_dict(model)
        assert list(ours) == list(expected)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
        with pytest.raises(TypeError, match="keep_on must be an int, got str"):
            fsdp.folded_state_dict(model, keep_on="0")

    def test_flattened_parameters_are_refused(self):
        """As FullyShardedDataParallel leaves them between two forwards: numbers would pass for experts."""
        model = same_training.make_model()
        averager = ewa.ExpertAverager(model, 0.3)
        up = model.blocks[1].mlp.up
        up.weight = nn.Parameter(up.weight.detach().flatten()[:100])
        before = up.weight.detach().clone()
        with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.up\.weight must have 3 dimensions.*fully_shard"):
            averager.step()
        assert torch.equal(up.weight, before)

    def test_importing_the_package_does_not_import_dtensor(self):
        code = "import sys, ewa_kernels; assert 'torch.distributed.tensor' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)
