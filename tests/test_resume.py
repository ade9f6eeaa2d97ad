"""Copies of a training in progress, and one that is saved and resumed: to the bit."""

import copy
import gc
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from training import SCHEDULE, bits, make, make_model, same, train

import ewa_kernels as ewa


def saved_and_loaded(parts):
    file = io.BytesIO()
    torch.save(parts, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def as_spawned(parts):
    """What a process that torch.multiprocessing starts gets of its arguments."""
    return pickle.loads(ForkingPickler.dumps(parts))


def train_seeded(rank, model, optimizer):
    torch.manual_seed(1)
    train(model, optimizer, 3)


KINDS = [
    pytest.param(torch.optim.AdamW, {}, id="torch"),
    pytest.param(torch.optim.AdamW, {"fused": True}, id="torch fused"),
    pytest.param(ewa.optim.AdamW, {}, id="ours"),
]
COPIES = [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts)), saved_and_loaded]


class TestCopies:
    @pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle", "save"])
    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
    @pytest.mark.parametrize(("make_optimizer", "options"), KINDS)
    def test_a_copy_of_all_trains_on_as_the_original(self, make_optimizer, options, order, copied):
        parts = make(make_optimizer, **options)
        train(*parts[:2], 3)
        copies = copied([parts[i] for i in order])
        model, optimizer, averager = (copies[order.index(i)] for i in range(3))
        before = bits(parts[0])
        torch.manual_seed(1)
        train(model, optimizer, 3)
        assert (averager.num_steps, parts[2].num_steps) == (6, 3)
        assert same(bits(parts[0]), before)
        torch.manual_seed(1)
        train(*parts[:2], 3)
        assert same(bits(parts[0]), bits(model))

    @pytest.mark.parametrize(
        ("copied", "order"),
        [*zip([*COPIES, as_spawned], [(0, 1), (1, 0), (0, 1), (1, 0)], strict=True), (copy.deepcopy, (1, 0))],
        ids=["deepcopy", "pickle", "save", "spawn", "deepcopy of the optimizer first"],
    )
    @pytest.mark.parametrize(("make_optimizer", "options"), KINDS)
    def test_a_copy_of_model_and_optimizer_alone_trains_on_as_the_original(
        self, make_optimizer, options, order, copied
    ):
        """The optimizer has its averager with it, and so has the copy of a copy."""
        original, parts = make(make_optimizer, **options), make(make_optimizer, **options)
        for model, optimizer, _ in (original, parts):
            torch.manual_seed(1)
            train(model, optimizer, 3)
        copies = copied(copied([parts[i] for i in order]))
        pairs = [original[:2], [copies[order.index(i)] for i in range(2)]]
        for model, optimizer in pairs:
            torch.manual_seed(2)
            train(model, optimizer, 3)
        assert same(*(bits(model) for model, _ in pairs))
        assert parts[2].num_steps == 3

    def test_a_copy_is_what_a_spawned_process_steps(self):
        """One real process: what it trains is what this one trains."""
        model, optimizer, _ = make()
        other = make()
        torch.multiprocessing.spawn(train_seeded, (model, optimizer), nprocs=1)  # in shared memory
        train_seeded(0, *other[:2])
        assert same(bits(model), bits(other[0]))

    def test_a_copy_of_given_tensors_says_that_it_does_not_average(self):
        """They are no parameters, whose memory a copy of them does not share."""
        parameter = torch.nn.Parameter(torch.randn(4, 6))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        ewa.ExpertAverager([parameter.detach().view(4, 2, 3)], 0.3).attach(optimizer)
        copied = copy.deepcopy(optimizer)
        with pytest.warns(UserWarning, match=r"experts 0 \[4, 2, 3\] are averaged, but the SGD attached to does not"):
            copied.step()
        copied.step()  # once
        optimizer.step()

    def test_a_copy_without_what_was_removed(self):
        model, optimizer, averager = make()
        averager._attachment.remove()
        model, optimizer = copy.deepcopy((model, optimizer))
        spread = ewa.ExpertAverager(model, 0.3).spread()
        optimizer.step()
        assert ewa.ExpertAverager(model, 0.3).spread() == spread

    @pytest.mark.parametrize(("make_optimizer", "options"), KINDS)
    def test_a_copy_cannot_be_attached_twice(self, make_optimizer, options):
        model, optimizer, averager = copy.deepcopy(make(make_optimizer, **options))
        with pytest.raises(ValueError, match="attached already"):
            averager.attach(optimizer)
        with pytest.raises(ValueError, match="attached already"):
            averager.attach(torch.optim.SGD(model.parameters(), lr=0.1))

    def test_a_copy_is_attached_as_the_original(self):
        """Once, and not any more if that was removed; a copy of the optimizer alone has an averager of its own."""
        model, optimizer, averager = make()
        copies = copy.deepcopy((model, optimizer, averager))
        averager._attachment.remove()
        train(*copies[:2], 1)
        train(model, optimizer, 1)
        assert (copies[2].num_steps, averager.num_steps) == (1, 0)
        again = copy.deepcopy((model, optimizer, averager))
        train(*again[:2], 1)
        assert again[2].num_steps == 0
        again[2].attach(again[1])
        alone = copy.deepcopy(copies[1])
        for p in alone.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        alone.step()
        assert copies[2].num_steps == 1

    @pytest.mark.parametrize(("make_optimizer", "options"), KINDS)
    def test_a_copy_of_the_averager_alone_is_free(self, make_optimizer, options):
        """Its optimizer, of which a copy was made too, is held by nobody."""
        model, optimizer, averager = make(make_optimizer, **options)
        copied = copy.deepcopy(averager)
        gc.collect()
        with pytest.warns(UserWarning, match="has none of the experts"):  # but the original's
            copied.attach(optimizer)
        train(model, optimizer, 1)
        assert (averager.num_steps, copied.num_steps) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make_optimizer", "options"), KINDS)
class TestResume:
    def run(self, kind, *, forget=None):
        """Weights after 10 steps, and after 5, saving, loading into new objects of another start, and 5 more."""
        make_optimizer, options, dtype = kind
        parts = make(make_optimizer, dtype, **options)
        torch.manual_seed(7)
        train(*parts[:2], 5)
        saved = [*(part.state_dict() for part in parts), torch.get_rng_state()]
        saved = saved_and_loaded(saved)
        train(*parts[:2], 5)
        assert parts[2].num_steps == 10

        resumed = make(make_optimizer, dtype, seed=99, **options)
        for i, part in enumerate(resumed):
            if i != forget:
                part.load_state_dict(saved[i])
        if forget != 3:
            torch.set_rng_state(saved[3])
        train(*resumed[:2], 5)
        return bits(parts[0]), bits(resumed[0])

    def test_a_seed_of_rounding_is_resumed_too(self, make_optimizer, options, dtype):
        averager = ewa.ExpertAverager(make(make_optimizer, dtype, **options)[0], SCHEDULE, seed=3)
        other = ewa.ExpertAverager(make(make_optimizer, dtype, **options)[0], SCHEDULE)
        other.load_state_dict(averager.state_dict())
        assert other.next_step() == averager.next_step()
        other.load_state_dict({"num_steps": 1, "schedule": repr(SCHEDULE)})  # of a version that did not save it
        assert other.seed == 3

    def test_bit_exact(self, make_optimizer, options, dtype):
        assert same(*self.run((make_optimizer, options, dtype)))

    def test_the_optimizer_has_the_averagers_steps(self, make_optimizer, options, dtype):
        """A loop that saves model and optimizer and nothing else goes on with the schedule where it was."""
        assert same(*self.run((make_optimizer, options, dtype), forget=2))

    @pytest.mark.parametrize("forget", [0, 1, 3], ids=["model", "optimizer", "generator"])
    def test_each_part_counts(self, make_optimizer, options, dtype, forget):
        """The comparison above would see any of them missing."""
        assert not same(*self.run((make_optimizer, options, dtype), forget=forget))


class TestStepsInTheOptimizersState:
    """Other ways of saving it than by the optimizer's own state_dict()."""

    def test_flattened(self):
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        parts, resumed = make(), make(seed=99)
        train(*parts[:2], 5)
        saved = saved_and_loaded(get_optimizer_state_dict(*parts[:2], options=options))
        set_optimizer_state_dict(*resumed[:2], saved, options=options)
        train(*resumed[:2], 1)
        assert resumed[2].num_steps == 6

    def test_two_averagers(self):
        first, (_, experts, down) = make_model(), make_model(seed=1)
        model = torch.nn.Sequential(first[0], first[1], experts, down)
        optimizer = torch.optim.AdamW(model.parameters())
        averagers = [ewa.ExpertAverager(part, SCHEDULE) for part in model[1:3]]
        attachments = [averager.attach(optimizer) for averager in averagers]
        train(model, optimizer, 2)
        attachments[0].remove()
        train(model, optimizer, 2)
        steps = {k: v for k, v in optimizer.state_dict()["param_groups"][0].items() if k.startswith("averaging_steps")}
        assert steps == {"averaging_steps_1": 4}
        averagers[1].load_state_dict({**averagers[1].state_dict(), "num_steps": 8})
        train(model, optimizer, 1)
        assert [averager.num_steps for averager in averagers] == [2, 9]
