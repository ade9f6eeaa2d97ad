"""Equation 6 and its use in a training loop."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn

import ewa_kernels as ewa


def experts_of(num_experts, *shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_experts, *shape, generator=generator, dtype=torch.float64).to(dtype)


def equation_6(experts, beta):
    """Written out, expert by expert, in float64."""
    old, num_experts = experts.double(), len(experts)
    if num_experts == 1:
        return old
    others = [sum(old[j] for j in range(num_experts) if j != i) for i in range(num_experts)]
    return torch.stack([(1 - beta) * old[i] + beta / (num_experts - 1) * others[i] for i in range(num_experts)])


def spread(experts):
    return (experts.double() - experts.double().mean(0)).square().mean().sqrt()


class TestEquation6:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("num_experts", range(1, 10))
    def test_parity(self, num_experts, dtype):
        for beta in {0.0, 0.01, 0.3, (num_experts - 1) / num_experts, 1.0}:
            experts = experts_of(num_experts, 7, 5, dtype=dtype)
            expected = equation_6(experts, beta)
            ewa.functional.average_experts_([experts], beta)
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(experts.double(), expected, rtol=tolerance, atol=tolerance)

    def test_simultaneous_not_sequential(self):
        """A version that already reads averaged experts gives something else, and is caught by the parity test."""
        old = experts_of(4, 6)
        sequential = old.clone()
        for i in range(4):
            others = (sequential.sum(0) - sequential[i]) / 3
            sequential[i] = 0.7 * sequential[i] + 0.3 * others
        ewa.functional.average_experts_([ours := old.clone()], 0.3)
        torch.testing.assert_close(ours, equation_6(old, 0.3))
        assert (sequential - ours).norm() > 0.01 * ours.norm()

    @pytest.mark.parametrize("num_experts", range(2, 10))
    def test_mean_is_kept_and_spread_scaled(self, num_experts):
        for beta in (0.01, 0.3, (num_experts - 1) / num_experts, 1.0):
            experts = experts_of(num_experts, 50, 20)
            mean, before = experts.mean(0), spread(experts)
            ewa.functional.average_experts_([experts], beta)
            assert (experts.mean(0) - mean).abs().max() <= 1e-15 * experts.abs().max()
            factor = abs(1 - beta * num_experts / (num_experts - 1))
            assert abs(spread(experts) - factor * before) <= 1e-15 * before

    def test_full_share_rate_makes_all_experts_equal(self):
        for num_experts in (2, 3, 4, 8):
            experts = experts_of(num_experts, 100, dtype=torch.float32)
            ewa.functional.average_experts_([experts], (num_experts - 1) / num_experts)
            assert all(torch.equal(expert, experts[0]) for expert in experts)

    def test_share_rate_0_and_one_expert_change_no_bit(self):
        strange = torch.tensor([[1.0, torch.nan, torch.inf], [2.0, 3.0, 4.0]])
        for experts, beta in [(strange, 0.0), (strange, torch.tensor(0.0)), (experts_of(1, 3), 0.7)]:
            before = experts.clone()
            ewa.functional.average_experts_([experts], beta)
            assert torch.equal(experts.nan_to_num(), before.nan_to_num())

    def test_share_rate_as_tensor(self):
        for beta in (torch.tensor(0.3), torch.tensor([0.3], dtype=torch.float64)):
            experts = experts_of(4, 6)
            expected = equation_6(experts, float(beta))
            ewa.functional.average_experts_([experts], beta)
            torch.testing.assert_close(experts, expected)

    def test_share_rate_that_may_not_be_read(self):
        """As on a GPU, where reading it would synchronise: on meta, reading raises."""
        experts = [torch.empty(4, 3, device="meta"), [torch.empty(5, device="meta") for _ in range(2)]]
        ewa.functional.average_experts_(experts, torch.tensor(0.3, device="meta"))
        ewa.functional.average_experts_(experts, 0.3)

    def test_many_tensors_in_one_call(self):
        """Stacked and separate, of many shapes, dtypes and numbers of experts, views and empty ones."""
        base = experts_of(6, 8, 9)
        tensors = [
            experts_of(4, 3),
            experts_of(2, 5, 7, dtype=torch.float32),
            [experts_of(3, 4)[e].clone() for e in range(3)],
            base[1:4, ::2, 1:],
            experts_of(3, 4, 5).permute(0, 2, 1),
            experts_of(4),
            experts_of(4, 0),
        ]
        stacked = [torch.stack(t) if isinstance(t, list) else t.clone() for t in tensors]
        untouched = base.clone()
        ewa.functional.average_experts_(tensors, 0.3)
        for ours, old in zip(tensors, stacked, strict=True):
            ours = torch.stack(ours) if isinstance(ours, list) else ours
            torch.testing.assert_close(ours, equation_6(old, 0.3).to(old.dtype))
        assert torch.equal(base[0], untouched[0])
        assert torch.equal(base[:, 1::2], untouched[:, 1::2])

    def test_parameters_are_changed_without_a_graph(self):
        experts = nn.Parameter(experts_of(4, 6))
        version = experts._version
        ewa.functional.average_experts_([experts], 0.3)
        assert experts.grad_fn is None
        assert experts._version > version

    def test_any_iterable(self):
        experts = experts_of(4, 6)
        expected = equation_6(experts, 0.3)
        ewa.functional.average_experts_((t for t in [experts]), 0.3)
        torch.testing.assert_close(experts, expected)
        ewa.functional.average_experts_([], 0.3)


class TestMergeExperts:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_mean_rounded_once(self, dtype):
        experts = experts_of(5, 40, 30, dtype=dtype)
        assert torch.equal(ewa.functional.merge_experts(experts), experts.double().mean(0).to(dtype))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(1, 7), (3, 0), (3, 5), (2, 33, 1025), (64, 1030)], ids=str)
    def test_is_the_specification_to_the_bit(self, shape, dtype):
        """Zeros with their signs, what is not finite, what 16 bits cannot hold, and what is not contiguous."""
        experts = experts_of(*shape, dtype=torch.float64).mul_(1e3).to(dtype)
        experts.flatten()[:5] = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan, 6e4]).to(dtype)[: experts.numel()]
        experts[:, -1:] = -0.0
        for given in (experts, experts.mT.contiguous().mT if experts.ndim == 3 else experts.repeat(1, 2)[:, ::2]):
            ours, specified = ewa.functional.merge_experts(given), ewa.reference.merge_experts(given)
            assert ours.shape == specified.shape
            torch.testing.assert_close(ours, specified, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(ours.nan_to_num().signbit(), specified.nan_to_num().signbit())

    @pytest.mark.parametrize("num_experts", range(1, 10))
    def test_equal_experts_are_not_changed(self, num_experts):
        one = experts_of(1, 1000, dtype=torch.float32)
        assert torch.equal(ewa.functional.merge_experts(one.repeat(num_experts, 1)), one[0])

    def test_no_overflow_in_float16(self):
        experts = torch.full((4, 3), 6e4, dtype=torch.float16)
        assert torch.equal(ewa.functional.merge_experts(experts), experts[0])

    def test_gradient(self):
        assert torch.autograd.gradcheck(ewa.functional.merge_experts, experts_of(3, 4).requires_grad_())


class TestSchedules:
    def test_constant(self):
        assert [ewa.ConstantShareRate(0.3)(step) for step in (0, 7, 10**9)] == [0.3] * 3

    def test_linear(self):
        schedule = ewa.LinearShareRate(end=0.3, num_steps=10)
        assert [schedule(step) for step in (0, 5, 10, 11, 10**9)] == pytest.approx([0, 0.15, 0.3, 0.3, 0.3])
        assert ewa.LinearShareRate(0.1, 4, 0.5)(1) == pytest.approx(0.4)

    def test_cosine(self):
        schedule = ewa.CosineShareRate(0.4, num_steps=8, start=0.2)
        assert [schedule(step) for step in (0, 2, 4, 8, 9)] == pytest.approx(
            [0.2, 0.2 + 0.1 * (1 - 0.5**0.5), 0.3, 0.4, 0.4]
        )

    @pytest.mark.parametrize(
        "schedule",
        [
            ewa.ConstantShareRate(0.3, start_step=2, stop_step=5),
            ewa.LinearShareRate(0.3, 4, start=0.1, start_step=2, stop_step=5),
            ewa.CosineShareRate(0.3, 4, start=0.1, start_step=2, stop_step=5),
        ],
    )
    def test_window(self, schedule):
        """Steps are counted from the window's start; outside β = 0."""
        inside = type(schedule)(0.3, 4, start=0.1) if hasattr(schedule, "end") else ewa.ConstantShareRate(0.3)
        assert [schedule(step) for step in range(8)] == [0, 0, inside(0), inside(1), inside(2), 0, 0, 0]


def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), ewa.RandomPartitionMoE(8, 12, 4), nn.Linear(8, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, num_steps, averager=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        x = torch.randn(16, 6, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if averager is not None:
            averager.step()


class TestExpertAverager:
    def test_step_by_hand_and_attached_are_the_same(self):
        results = []
        for by_hand in (True, False):
            model, optimizer = small_model()
            averager = ewa.ExpertAverager(model, ewa.LinearShareRate(0.3, 5))
            attachment = None if by_hand else averager.attach(optimizer)
            train(model, optimizer, 8, averager if by_hand else None)
            assert averager.num_steps == 8
            results.append(copy.deepcopy(model.state_dict()))
            if attachment is not None:
                attachment.remove()
                train(model, optimizer, 1)
                assert averager.num_steps == 8
                averager.attach(optimizer)
        assert all(torch.equal(results[0][name], value) for name, value in results[1].items())

    def test_spread_follows_the_contraction(self):
        model, _ = small_model()
        averager = ewa.ExpertAverager(model, ewa.ConstantShareRate(0.3))
        before = averager.spread()
        assert set(before) == {"1.up.weight", "1.up.bias", "1.down.weight", "1.down.bias"}
        assert before["1.up.weight"] == pytest.approx(float(spread(model[1].up.weight.detach())))
        averager.step()
        for name, value in averager.spread().items():
            assert value == pytest.approx(0.6 * before[name], rel=1e-5)

    def test_share_rate_is_that_of_the_next_step(self):
        model, _ = small_model()
        averager = ewa.ExpertAverager(model, ewa.LinearShareRate(0.4, 4))
        seen = []
        for _ in range(6):
            seen.append(averager.share_rate)
            averager.step()
        assert seen == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
        assert ewa.ExpertAverager(model, 0.25).share_rate == 0.25

    @pytest.mark.parametrize("found_inf", [True, 1.0, torch.tensor(1.0), torch.tensor([1.0])])
    def test_skipped_step(self, found_inf):
        model, _ = small_model()
        averager = ewa.ExpertAverager(model, 0.3)
        before = copy.deepcopy(model.state_dict())
        averager.step(found_inf=found_inf)
        assert averager.num_steps == 0
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        averager.step(found_inf=torch.zeros_like(torch.as_tensor(found_inf)))
        assert averager.num_steps == 1

    def test_grad_scaler_skips(self):
        """Also with a fused optimizer, which GradScaler lets run and skip by itself."""
        for fused in (False, True):
            model, _ = small_model()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
            averager = ewa.ExpertAverager(model, 0.3)
            averager.attach(optimizer)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
            for overflow in (False, True, False):
                optimizer.zero_grad()
                before = averager.spread()["1.up.weight"]
                scaler.scale(model(torch.randn(16, 6)).square().mean()).backward()
                if overflow:
                    next(model.parameters()).grad[0, 0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
                assert (averager.spread()["1.up.weight"] == before) == overflow
            assert averager.num_steps == 2

    def test_dry_run_of_distributed_checkpoint_does_not_average(self):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        model, optimizer = small_model()
        averager = ewa.ExpertAverager(model, 0.3)
        averager.attach(optimizer)
        before = averager.spread()
        get_optimizer_state_dict(model, optimizer)
        assert len(optimizer.state) > 0
        assert averager.spread() == before
        train(model, optimizer, 1)
        assert averager.num_steps == 1

    def test_first_step_of_a_warm_up_from_0_counts(self):
        model, optimizer = small_model()
        optimizer.param_groups[0]["lr"] = 0.0
        averager = ewa.ExpertAverager(model, 0.3)
        averager.attach(optimizer)
        train(model, optimizer, 1)
        assert averager.num_steps == 1

    def test_resume_is_bit_exact(self):
        def fresh():
            model, optimizer = small_model()
            averager = ewa.ExpertAverager(model, ewa.CosineShareRate(0.3, 10))
            averager.attach(optimizer)
            return model, optimizer, averager

        model, optimizer, averager = fresh()
        torch.manual_seed(1)
        train(model, optimizer, 5, seed=1)
        rng = torch.get_rng_state()
        saved = pickle.dumps([part.state_dict() for part in (model, optimizer, averager)])
        train(model, optimizer, 5, seed=2)

        resumed = fresh()
        for part, state in zip(resumed, pickle.loads(saved), strict=True):
            part.load_state_dict(state)
        torch.set_rng_state(rng)
        train(resumed[0], resumed[1], 5, seed=2)
        assert resumed[2].num_steps == 10
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed[0].parameters(), strict=True))

    def test_resuming_another_schedule_warns(self):
        model, _ = small_model()
        state = ewa.ExpertAverager(model, 0.3).state_dict()
        with pytest.warns(UserWarning, match=r"ConstantShareRate\(.*value=0.3\) was saved"):
            ewa.ExpertAverager(model, 0.2).load_state_dict(state)

    def test_resuming_a_function_of_yours_does_not_warn(self):
        model, _ = small_model()
        state = ewa.ExpertAverager(model, lambda step: 0.1).state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ewa.ExpertAverager(model, lambda step: 0.1).load_state_dict(state)

    def test_a_copy_without_the_optimizer_is_attached_to_nothing(self):
        model, optimizer = small_model()
        averager = ewa.ExpertAverager(model, 0.3)
        averager.attach(optimizer)
        with pytest.warns(UserWarning, match="has none of the experts"):  # but the original's
            copy.deepcopy(averager).attach(optimizer)

    def test_may_be_attached_again_when_the_optimizer_is_gone(self):
        model, optimizer = small_model()
        averager = ewa.ExpertAverager(model, 0.3)
        averager.attach(optimizer)
        with pytest.raises(ValueError, match="on what attach returned, or delete the optimizer"):
            ewa.optim.AdamW(model.parameters(), averager=averager)
        del optimizer
        gc.collect()
        ewa.optim.AdamW(model.parameters(), averager=averager)

    def test_parameter_list(self):
        parameters = nn.ParameterList([nn.Parameter(experts_of(4, 3)), nn.Parameter(experts_of(2, 5))])
        assert list(ewa.ExpertAverager(parameters, 0.3).spread()) == ["0", "1"]

    def test_tied_layers_are_averaged_once(self):
        model = nn.Sequential(ewa.RandomPartitionMoE(4, 6, 3), ewa.RandomPartitionMoE(4, 6, 3))
        model[1].up.weight = model[0].up.weight
        averager = ewa.ExpertAverager(model, 0.3)
        before = averager.spread()
        averager.step()
        assert len(before) == 7
        assert averager.spread()["0.up.weight"] == pytest.approx((1 - 0.3 * 3 / 2) * before["0.up.weight"])

    def test_found_inf_that_may_not_be_read(self, monkeypatch):
        """As on a GPU: it is handed on as it is, and nothing is synchronised."""
        model, _ = small_model()
        averager = ewa.ExpertAverager(model, 0.3)
        seen = []
        monkeypatch.setattr(ewa.functional, "average_experts_", lambda *_, found_inf, **__: seen.append(found_inf))
        averager.step(found_inf=torch.ones(1, device="meta"))
        assert seen[0].is_meta
        assert averager.num_steps == 1

    def test_never_averages_stale_parameters(self):
        """load_state_dict(assign=True) puts new tensors in place of the ones the averager was made with."""
        model, _ = small_model()
        averager = ewa.ExpertAverager(model, 0.75)
        other = copy.deepcopy(model)
        model.load_state_dict(other.state_dict(), assign=True)
        averager.step()
        assert max(averager.spread().values()) < 1e-7
        assert spread(model[1].up.weight.detach()) < 1e-7

    def test_deepcopy_and_pickle(self):
        model, _ = small_model()
        averager = ewa.ExpertAverager(model, 0.3)
        averager.step()
        for twin in (copy.deepcopy(averager), pickle.loads(pickle.dumps(averager))):
            assert twin.num_steps == 1
            assert twin.spread() == averager.spread()
            twin.step()
        assert averager.num_steps == 1
        assert twin.spread() != averager.spread()

    def test_given_tensors(self):
        stacked, separate = experts_of(3, 4), [experts_of(1, 5, seed=s)[0] for s in range(4)]
        averager = ewa.ExpertAverager([stacked, separate], 0.3)
        assert list(averager.spread()) == ["0", "1"]
        expected = equation_6(stacked, 0.3), equation_6(torch.stack(separate), 0.3)
        averager.step()
        torch.testing.assert_close(stacked, expected[0])
        torch.testing.assert_close(torch.stack(separate), expected[1])
        model, _ = small_model()
        assert "1.up.bias" in ewa.ExpertAverager(ewa.expert_tensors(model), 0.3).spread()

    def test_no_experts_left_after_folding(self):
        model, _ = small_model()
        averager = ewa.ExpertAverager(model, 0.3)
        ewa.fold_(model)
        with pytest.raises(ValueError, match="got a model without experts"):
            averager.step()
