"""The plans that AdamW and the averager keep from step to step: used where nothing changed, and never stale."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from adamw_twins import averager_of, parameters, set_grads
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ewa_kernels as ewa
from ewa_kernels import ops, private_torch
from ewa_kernels.kernels import copies, parameter_pass


class Pair:
    """Ours, whose plan may be kept, and torch's AdamW with averaging by the reference, which has none."""

    def __init__(
        self, dtype=torch.float32, share_rate=0.1, groups=lambda params: params, rounding="nearest", **options
    ):
        self.share_rate = share_rate
        self.params = [parameters(dtype) for _ in range(2)]
        self.averager = averager_of(self.params[0], share_rate, rounding=rounding)
        self.ours = ewa.optim.AdamW(groups(self.params[0]), averager=self.averager, **options)
        self.theirs = torch.optim.AdamW(groups(self.params[1]), foreach=False, **options)
        self.optimizers = (self.ours, self.theirs)
        self.num_steps = 0

    def experts(self, params):
        return [params[0], params[1], params[2:7]]

    def step(self, missing=(), grads=lambda params: None):
        for params in self.params:
            for i, p in enumerate(params):
                p.grad = None
                if i not in missing:
                    generator = torch.Generator().manual_seed(100 * self.num_steps + i)
                    p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            grads(params)
        self.ours.step()
        self.theirs.step()
        beta = self.share_rate(self.num_steps) if callable(self.share_rate) else self.share_rate
        with torch.no_grad():
            ewa.reference.average_experts_(self.experts(self.params[1]), beta, rounding="nearest")
        self.num_steps += 1
        self.check()

    def check(self):
        for p, q in zip(*self.params, strict=True):
            eps = torch.finfo(p.dtype).eps
            torch.testing.assert_close(p, q, rtol=16 * eps, atol=16 * eps)

    def each(self, change):
        """Applied to both sides: (optimizer, params)."""
        for optimizer, params in zip(self.optimizers, self.params, strict=True):
            with torch.no_grad():
                change(optimizer, params)


@pytest.fixture
def made(monkeypatch):
    """Notes every plan that is made."""
    plans, init = [], parameter_pass.Plan.__init__

    def noted(self, *arguments, **options):
        plans.append(weakref.ref(self))
        init(self, *arguments, **options)

    monkeypatch.setattr(parameter_pass.Plan, "__init__", noted)
    return plans


def reallocated(p, index, shape=None, dtype=None):
    """Other values in memory that is, as it may be by chance, the very one that was freed."""
    memory = p.data
    values = torch.randn(p.shape, generator=torch.Generator().manual_seed(index))
    memory.copy_(values.to(memory.dtype))
    p.data = memory.view(shape or p.shape)


def restrided(p):
    """The same address, shape and values, and other strides."""
    values = p.detach().clone()
    order = list(range(p.ndim))[::-1]
    p.data = p.data.view([p.shape[i] for i in order]).permute(order)
    p.copy_(values)


def moments_of(optimizer, p):
    return optimizer.state[p]


CHANGES = {
    "data swapped": lambda optimizer, params: [setattr(p, "data", p.data.clone() * 0.5) for p in params],
    "data swapped for strided": lambda optimizer, params: [
        setattr(p, "data", torch.stack([p.data, p.data], -1)[..., 0]) for p in params
    ],
    "other values at the address": lambda optimizer, params: [reallocated(p, i) for i, p in enumerate(params)],
    "strides only": lambda optimizer, params: restrided(params[0]),
    "strides of a moment only": lambda optimizer, params: restrided(moments_of(optimizer, params[0])["exp_avg"]),
    "values of two swapped": lambda optimizer, params: (
        [setattr(p, "data", q) for p, q in zip(params[2:4], [params[3].data, params[2].data], strict=True)]
    ),
    "moment replaced": lambda optimizer, params: moments_of(optimizer, params[0]).update(
        exp_avg=torch.ones_like(params[0])
    ),
    "moment resized": lambda optimizer, params: moments_of(optimizer, params[8])["exp_avg"].resize_(7).fill_(0.5),
    "step replaced": lambda optimizer, params: moments_of(optimizer, params[7]).update(step=torch.tensor(9.0)),
    "state of one parameter replaced": lambda optimizer, params: optimizer.state.update(
        {params[1]: {**optimizer.state[params[1]], "exp_avg_sq": torch.ones_like(params[1])}}
    ),
    "state cleared": lambda optimizer, params: optimizer.state.clear(),
    "state loaded": lambda optimizer, params: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "state swapped for a copy": lambda optimizer, params: setattr(optimizer, "state", copy.copy(optimizer.state)),
    "lr": lambda optimizer, params: optimizer.param_groups[0].update(lr=0.3),
    "lr tensor": lambda optimizer, params: optimizer.param_groups[0].update(lr=torch.tensor(0.3)),
    "betas": lambda optimizer, params: optimizer.param_groups[0].update(betas=(0.5, 0.6)),
    "eps": lambda optimizer, params: optimizer.param_groups[0].update(eps=0.1),
    "weight_decay": lambda optimizer, params: optimizer.param_groups[0].update(weight_decay=0.9),
    "maximize": lambda optimizer, params: optimizer.param_groups[0].update(maximize=True),
    "parameters taken out": lambda optimizer, params: [optimizer.param_groups[0]["params"].pop() for _ in range(2)],
    "parameters reordered": lambda optimizer, params: optimizer.param_groups[0]["params"].reverse(),
    "group moved": lambda optimizer, params: optimizer.add_param_group(
        {"params": [optimizer.param_groups[0]["params"].pop(0)], "lr": 0.2}
    ),
    "no longer trained": lambda optimizer, params: params[8].requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_between_steps(change):
    pair = Pair(lr=0.05)
    for _ in range(2):
        pair.step()
    pair.each(change)
    for _ in range(3):
        pair.step()


def test_a_kept_plan_is_used(made):
    """Else nothing here is tested."""
    pair = Pair(lr=0.05)
    pair.step()
    assert len(made) == 1
    for _ in range(4):
        pair.step()
        # What changes from step to step is no reason for another: gradients are elsewhere, options are read.
        pair.each(lambda optimizer, params: optimizer.param_groups[0].update(lr=optimizer.param_groups[0]["lr"] * 0.9))
    assert len(made) == 1
    for _ in range(3):
        pair.averager.average()
    assert len(made) == 3  # one by the operation, one that is kept


def test_an_averagers_plan_is_used(made, monkeypatch):
    """And its experts are not looked up anew."""
    averager = ewa.ExpertAverager(nn.Sequential(ewa.RandomPartitionMoE(4, 8, 3)), 0.2)
    averager.step()
    monkeypatch.setattr(averager._found, "_find", lambda model: pytest.fail("looked up"))
    for _ in range(3):
        averager.step()
    assert len(made) == 2  # one by the operation, one that is kept


def test_gradients_that_go_and_return():
    pair = Pair(lr=0.05)
    for missing in ((), (), (0, 3, 8), (0, 3, 8), (1,), (), range(10), ()):
        pair.step(missing)


def test_a_parameter_that_is_trained_later():
    pair = Pair(lr=0.05)
    pair.step(missing=(0, 7))
    pair.step(missing=(0, 7))
    pair.step()
    pair.step()


GRADS = {
    "transposed": lambda g: g.mT.contiguous().mT if g.ndim > 1 else g,
    "strided": lambda g: torch.stack([g, g], -1)[..., 0],
    "expanded": lambda g: g[..., :1].expand(g.shape) if g.ndim else g,
    "view of a large one": lambda g: torch.cat([torch.zeros(1), g.flatten()])[1:].view(g.shape),
}


@pytest.mark.parametrize("other", GRADS.values(), ids=GRADS)
def test_gradients_that_are_laid_out_otherwise(other):
    pair = Pair(lr=0.05)

    def change(params):
        for p in params:
            p.grad = other(p.grad)

    for grads in (lambda params: None, lambda params: None, change, change, lambda params: None):
        pair.step(grads=grads)


def test_a_gradient_in_one_buffer_after_another():
    """As those of DistributedDataParallel's buckets; the memory of the last one is freed, and used for the next."""
    pair = Pair(lr=0.05)

    def into_buffer(params):
        buffer, at = torch.empty(sum(p.numel() for p in params)), 0
        for p in params:
            view = buffer[at : at + p.numel()].view(p.shape)
            p.grad, at = view.copy_(p.grad), at + p.numel()

    for _ in range(4):
        pair.step(grads=into_buffer)


def test_add_param_group():
    pair = Pair(lr=0.05, groups=lambda params: params[:5])
    pair.step(missing=range(5, 10))
    pair.step(missing=range(5, 10))
    pair.each(lambda optimizer, params: optimizer.add_param_group({"params": params[5:], "lr": 0.2}))
    pair.step()
    pair.step()


def test_a_schedule_of_the_share_rate():
    pair = Pair(lr=0.05, share_rate=ewa.LinearShareRate(0.6, 4))
    for _ in range(6):
        pair.step()


def test_an_averager_that_is_resumed():
    pair = Pair(lr=0.05, share_rate=ewa.LinearShareRate(0.6, 4))
    for _ in range(2):
        pair.step()
    pair.averager.load_state_dict({**pair.averager.state_dict(), "num_steps": 0})
    pair.share_rate = lambda step: ewa.LinearShareRate(0.6, 4)(step - 2)
    for _ in range(3):
        pair.step()


def test_an_averager_that_is_changed_for_another():
    pair = Pair(lr=0.05)
    pair.step()
    pair.step()
    pair.ours.averager = ewa.ExpertAverager([pair.params[0][2:7]], 0.4)
    pair.share_rate, pair.experts = 0.4, lambda params: [params[2:7]]
    pair.step()
    pair.ours.averager = None
    pair.share_rate = 0.0
    pair.step()


def test_two_optimizers_take_turns():
    params, others = parameters(), parameters()
    both = ewa.optim.AdamW(params[:5], lr=0.05), ewa.optim.AdamW(params[3:], lr=0.02, averager=averager_of(params))
    theirs = (
        torch.optim.AdamW(others[:5], lr=0.05, foreach=False),
        torch.optim.AdamW(others[3:], lr=0.02, foreach=False),
    )
    for step in range(6):
        set_grads(params, step)
        set_grads(others, step)
        both[step % 2].step()
        theirs[step % 2].step()
        if step % 2:
            with torch.no_grad():
                ewa.reference.average_experts_([others[0], others[1], others[2:7]], 0.1)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_of_another_dtype(dtype):
    """By `Module.to`, which swaps data; moments stay as they are until they are made anew."""
    results = []
    for again in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(ewa.RandomPartitionMoE(6, 10, 3), nn.Linear(6, 6))
        averager = ewa.ExpertAverager(model, 0.3, rounding="nearest")
        optimizer = ewa.optim.AdamW(model.parameters(), lr=0.05, averager=averager)
        for step in range(4):
            if step == 2:
                model.to(dtype)
                optimizer.state.clear()
            if not again:
                optimizer._plan = None
            set_grads(list(model.parameters()), step)
            optimizer.step()
        results.append(list(model.parameters()))
    assert all(p.dtype == dtype and torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_freed_memory_that_returns_in_another_dtype_and_shape():
    """The same address means nothing."""
    memory = torch.zeros(64, dtype=torch.float64)
    views = [
        memory.view(4, 16),
        memory.view(torch.float32).view(4, 32),
        memory.view(torch.float32)[:64].view(2, 32),
        memory.view(torch.bfloat16).view(8, 32),
        memory.view(torch.float16).view(8, 32),
        memory.view(torch.float16).view(32, 8).T,
    ]
    parameter = nn.Parameter(torch.zeros(2, 2))
    averager = ewa.ExpertAverager([parameter], 0.5, rounding="nearest")
    optimizer = ewa.optim.AdamW([parameter], lr=0.0, averager=averager)
    for view in [view for view in views for _ in range(3)]:
        with torch.no_grad():
            parameter.data = view
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) / 16)
        expected = parameter.detach().clone()
        ewa.reference.average_experts_([expected], 0.5, rounding="nearest")
        averager.average()
        assert torch.equal(parameter, expected)
        # No gradient: the optimizer averages only.
        ewa.reference.average_experts_([expected], 0.5, rounding="nearest")
        optimizer.state[parameter] = {}
        parameter.grad = None
        averager.num_steps = 0
        optimizer.step()
        torch.testing.assert_close(parameter, expected)


class TestChecksStay:
    """What was right when the plan was made may be wrong now."""

    def test_experts_that_come_to_overlap(self):
        experts = [nn.Parameter(torch.randn(4, 5)) for _ in range(2)]
        averager = ewa.ExpertAverager(experts, 0.3)
        averager.step()
        averager.step()
        experts[1].data = experts[0].data
        before = experts[0].detach().clone()
        with pytest.raises(ValueError, match="must not be given twice"):
            averager.step()
        assert torch.equal(experts[0], before)

    def test_an_expert_that_comes_to_lie_in_a_parameter(self):
        parameter, expert = nn.Parameter(torch.randn(4, 5)), torch.randn(4, 5)
        optimizer = ewa.optim.AdamW([parameter], averager=ewa.ExpertAverager([expert], 0.3))
        for _ in range(2):
            parameter.grad = torch.ones(4, 5)
            optimizer.step()
        expert.data = parameter.data
        parameter.grad = torch.ones(4, 5)
        with pytest.raises(ValueError, match="must have memory of its own"):
            optimizer.step()

    @pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
    def test_a_moment_of_another_size(self, name):
        pair = Pair()
        pair.step()
        pair.step()
        pair.ours.state[pair.params[0][7]][name] = torch.zeros(3)
        with pytest.raises(ValueError, match=f"{name} must be"):
            pair.ours.step()

    def test_a_sparse_gradient(self):
        embedding = nn.Embedding(4, 3)
        optimizer = ewa.optim.AdamW(embedding.parameters())
        for sparse in (False, False, True):
            embedding.sparse = sparse
            optimizer.zero_grad()
            embedding(torch.tensor([1])).sum().backward()
            if not sparse:
                optimizer.step()
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()

    def test_a_gradient_that_is_yet_to_be_negated(self):
        """torch refuses to hand it to an operation that changes its list."""
        pair = Pair()
        pair.step()
        pair.step()
        set_grads(pair.params[0], 2)
        pair.params[0][7].grad = torch._neg_view(pair.params[0][7].grad)
        before = pair.params[0][7].detach().clone()
        with pytest.raises(RuntimeError, match="negation"):
            pair.ours.step()
        assert torch.equal(pair.params[0][7], before)

    def test_amsgrad(self):
        pair = Pair()
        pair.step()
        pair.ours.param_groups[0]["amsgrad"] = True
        with pytest.raises(ValueError, match="amsgrad must be False"):
            pair.ours.step()


class TestCopies:
    """Plans are of these very tensors."""

    @pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
    def test_have_none(self, twin_of):
        pair = Pair(lr=0.05)
        pair.step()
        pair.step()
        pair.averager.average()
        optimizer, averager, params = twin_of((pair.ours, pair.averager, pair.params[0]))
        assert optimizer._plan is None
        assert averager._plan is None
        before = [p.detach().clone() for p in pair.params[0]]
        set_grads(params, 5)
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(pair.params[0], before, strict=True))
        assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))

    def test_of_a_model_and_its_averager(self):
        model = nn.Sequential(ewa.RandomPartitionMoE(4, 6, 3))
        averager = ewa.ExpertAverager(model, 0.3)
        averager.step()
        averager.step()
        twin, of_twin = copy.deepcopy((model, averager))
        before = [p.detach().clone() for p in model.parameters()]
        of_twin.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert not torch.equal(twin[0].up.weight, before[0])


class TestNothingIsKeptAlive:
    def test_by_an_optimizer(self):
        pair = Pair()
        pair.step()
        pair.step()
        params, state = pair.params[0], pair.ours.state
        gone = [weakref.ref(t) for t in (params[0].grad, params[7].grad, *state[params[0]].values())]
        memory = [weakref.ref(params[0].data.untyped_storage())]
        pair.ours.zero_grad(set_to_none=True)
        params[0].data = params[0].data.clone()
        state.clear()
        gc.collect()
        assert not any(ref() is not None for ref in gone + memory)
        gone = [weakref.ref(p) for p in params[7:]]
        pair.ours.param_groups[0]["params"] = params[:7]
        del params[7:]
        gc.collect()
        assert not any(ref() is not None for ref in gone)

    def test_by_an_averager(self):
        model = nn.ModuleList([ewa.RandomPartitionMoE(4, 6, 3), ewa.RandomPartitionMoE(4, 6, 3)])
        averager = ewa.ExpertAverager(model, 0.3)
        averager.step()
        averager.step()
        gone = [weakref.ref(model[1]), weakref.ref(model[1].up.weight)]
        del model[1]
        gc.collect()
        assert not any(ref() is not None for ref in gone)


class TestAutogradIsTold:
    def test_by_every_step(self):
        """Of parameters and what is kept of them; of gradients only if they are unscaled."""
        pair = Pair()
        for step in range(4):
            params = pair.params[0]
            set_grads(params, step)
            pair.ours.grad_scale = torch.tensor(2.0) if step == 3 else None
            tensors = [*params, *(t for p in params for t in pair.ours.state.get(p, {}).values())]
            grads = [p.grad for p in params]
            before, of_grads = [t._version for t in tensors], [g._version for g in grads]
            pair.ours.step()
            assert all(t._version > v for t, v in zip(tensors, before, strict=True))
            assert [g._version > v for g, v in zip(grads, of_grads, strict=True)] == [step == 3] * len(grads)

    def test_by_every_averaging(self):
        experts = [nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
        averager = ewa.ExpertAverager(experts, 0.3)
        for _ in range(3):
            before = [p._version for p in experts]
            averager.step()
            assert all(p._version > v for p, v in zip(experts, before, strict=True))


def test_bfloat16_copies_follow():
    """With a plan that is kept, of parameters that move and change."""
    torch.manual_seed(0)
    model = nn.ModuleList(ewa.RandomPartitionMoE(6, 10, 3) for _ in range(2))
    optimizer = ewa.optim.AdamW(model.parameters(), lr=0.05, averager=ewa.ExpertAverager(model, 0.3), bf16_copies=True)
    weights = [p for p in model.parameters() if p.ndim == 3]
    for step in range(6):
        with torch.no_grad():
            if step == 3:
                weights[0].mul_(2)
                weights[1].data = weights[1].data + 1
        set_grads(list(model.parameters()), step)
        optimizer.step()
        for p in weights:
            assert torch.equal(copies.find(p, torch.bfloat16), p.to(torch.bfloat16))
    optimizer.bf16_copies = False
    set_grads(list(model.parameters()), 7)
    optimizer.step()
    assert all(copies.find(p, torch.bfloat16) is None for p in weights)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_bits_are_those_of_plans_made_anew(rounding):
    """Seeds go on from step to step."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        pairs = [Pair(dtype, rounding=rounding, lr=0.05) for _ in range(2)]
        for step in range(4):
            for anew, pair in enumerate(pairs):
                set_grads(pair.params[0], step)
                if anew:
                    pair.ours._plan = pair.averager._plan = None
                pair.ours.step()
                pair.averager.average()
        assert all(torch.equal(p, q) for p, q in zip(pairs[0].params[0], pairs[1].params[0], strict=True))


def test_rounding_may_be_changed():
    pair = Pair(torch.bfloat16, lr=0.0, share_rate=0.3, rounding="nearest", weight_decay=0.0)
    other = Pair(torch.bfloat16, lr=0.0, share_rate=0.3, rounding="stochastic", weight_decay=0.0)
    for each in (pair, other):
        for _ in range(2):
            set_grads(each.params[0], 0)
            each.ours.step()
    same = parameters(torch.bfloat16)
    for each in (pair, other):
        each.averager.rounding = "stochastic"
        for p, q in zip(each.params[0], same, strict=True):
            p.data.copy_(q.detach())
        each.ours.step()
    assert all(torch.equal(p, q) for p, q in zip(pair.params[0], other.params[0], strict=True))


class TestWhoSees:
    """A step that is watched is an operation, also where a plan is kept."""

    class Watcher(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.seen += [operation] if operation.namespace == "ewa_kernels" else []
            return operation(*args, **(kwargs or {}))

    def test_a_dispatch_mode(self):
        pair = Pair(lr=0.05)
        pair.step()
        pair.averager.average()
        pair.averager.average()
        set_grads(pair.params[0], 1)
        with self.Watcher() as watcher:
            pair.ours.step()
            pair.averager.average()
        assert watcher.seen == [ops.adamw_, ops.average_experts_]

    def test_a_function_mode(self):
        seen = []

        class Mode(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))

        pair = Pair(lr=0.05)
        pair.step()
        set_grads(pair.params[0], 1)
        with Mode():
            pair.ours.step()
        assert ops.adamw_ in seen

    @pytest.mark.filterwarnings("ignore:.*Profiler clears events")
    def test_a_profiler(self):
        pair = Pair(lr=0.05)
        pair.step()
        set_grads(pair.params[0], 1)
        with torch.profiler.profile() as profile:
            pair.ours.step()
        assert "ewa_kernels::adamw_" in {event.key for event in profile.key_averages()}

    def test_modes_of_other_kinds_change_nothing(self):
        """Inference mode and autocast."""
        for mode in (torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
            pair = Pair(lr=0.05)
            pair.step()
            for step in range(1, 4):
                for params in pair.params:
                    set_grads(params, step)
                with mode() if step < 3 else torch.no_grad():
                    pair.ours.step()
                pair.theirs.step()
                with torch.no_grad():
                    ewa.reference.average_experts_(pair.experts(pair.params[1]), 0.1)
            pair.check()


def test_without_torchs_guards_nothing_is_kept(monkeypatch, made):
    monkeypatch.setattr(private_torch, "tensor_guards", lambda tensors: None)
    pair = Pair(lr=0.05)
    for _ in range(3):
        pair.step()
    assert len(made) == 3
