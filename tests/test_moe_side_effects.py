"""Blocks that keep something, or hang on what may change: what `replace_moe_` must notice, and what `find_experts`."""

import copy
import pickle

import pytest
import torch
from moe_blocks import D, DeepSeek, Dense, E, Masked, Mixtral, Switch, made, tokens
from torch import nn

import ewa_kernels as ewa


class Tracker:
    def __init__(self):
        self.losses = []


LOSSES = []
STATE = {"losses": []}
TRACKER = Tracker()
COUNT = 0


class Store(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = None
        self.register_buffer("count", torch.zeros(E))


class Keeps(Dense):
    def __init__(self):
        super().__init__()
        self.tracker, self.store, self.state = Tracker(), Store(), {"losses": []}

    def forward(self, x):
        self.keep(self.router(x).softmax(-1))
        return super().forward(x)


class InAnObject(Keeps):
    def keep(self, p):
        self.tracker.losses.append(p.mean())


class InAGlobalList(Keeps):
    def keep(self, p):
        LOSSES.append(p.mean())


class InAGlobalDict(Keeps):
    def keep(self, p):
        STATE["losses"].append(p.mean())


class InAGlobalObject(Keeps):
    def keep(self, p):
        TRACKER.losses.append(p.mean())


def log(p):
    LOSSES.append(p.mean())


class ByAFunction(Keeps):
    def keep(self, p):
        log(p)


class InAGlobalNumber(Keeps):
    def keep(self, p):
        global COUNT
        COUNT += 1


class InAChild(Keeps):
    def keep(self, p):
        self.store.last = p.mean()


class InAChildsBuffer(Keeps):
    def keep(self, p):
        self.store.count += 1


class InADictOfLists(Keeps):
    def keep(self, p):
        self.state["losses"].append(p.mean())


class InTheRouter(Keeps):
    def keep(self, p):
        self.router.last = p


class InItsClass(Keeps):
    def keep(self, p):
        type(self).loss = p.mean()


class WithGradients(Keeps):
    def keep(self, p):
        if self.training and torch.is_grad_enabled():
            self.loss = p.mean()


class KeepsItsLogits(nn.Linear):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class OverTheRouters(Keeps):
    def __init__(self):
        super().__init__()
        self.router = KeepsItsLogits(D, E)

    def forward(self, x):
        y = Dense.forward(self, x)
        self.router.last = self.router.last.softmax(-1)
        return y


KEEPS = {
    InAnObject: "tracker.losses",
    InAGlobalList: "LOSSES",
    InAGlobalDict: "STATE.losses",
    InAGlobalObject: "TRACKER.losses",
    ByAFunction: "LOSSES",
    InAGlobalNumber: "COUNT",
    InAChild: "store.last",
    InAChildsBuffer: "store.count",
    InADictOfLists: "state.losses",
    InTheRouter: "router.last",
    InItsClass: "InItsClass.loss",
    WithGradients: "loss",
    OverTheRouters: "router.last",
}


def reason(model):
    with pytest.warns(UserWarning, match="replace_moe_ replaced nothing"):
        report = ewa.replace_moe_(model, to="routed")
    return report.skipped["layers.0.experts"]


@pytest.mark.parametrize(("make", "where"), KEEPS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_a_block_keeps(make, where):
    assert f"keeps something of each forward in its {where}" in reason(made(make)).replace(f"{__name__}.", "")


def test_what_its_router_keeps():
    """It is kept still."""
    model = made(Dense)
    model.layers[0].router = KeepsItsLogits(D, E)
    assert ewa.replace_moe_(model, to="routed").replaced
    model(tokens())
    assert model.layers[0].router.last.shape == (3, 11, E)


@pytest.mark.parametrize("make", [InAnObject, InADictOfLists, InAChild])
def test_found_without_a_trace(make):
    model = made(make)
    block = model.layers[0]
    block.holds = [block.tracker, {"same": block.tracker}]
    assert ewa.find_experts(model)[0].skip_reason is None
    assert (block.tracker.losses, block.state, block.store.last) == ([], {"losses": []}, None)
    assert block.holds[0] is block.tracker


def dispatch(block, x, capacity):
    rows = x.reshape(-1, D)
    weight, chosen = block.router(rows).softmax(-1).max(-1)
    y = torch.zeros_like(rows)
    for e, expert in enumerate(block.experts):
        token = torch.where(chosen == e)[0][:capacity]
        y[token] = expert(rows[token]) * weight[token, None]
    return y.reshape(x.shape)


class MinimalCapacity(Switch):
    """DeepSpeed's defaults: seen on many tokens only."""

    def forward(self, x):
        num_tokens = x.numel() // D
        return dispatch(self, x, max(16, -(-num_tokens // E)))


class AmpleCapacity(Switch):
    """Seen only where most tokens are alike."""

    def forward(self, x):
        num_tokens = x.numel() // D
        return dispatch(self, x, max(16, 3 * num_tokens // E))


class CapacityInTraining(Switch):
    def forward(self, x):
        return dispatch(self, x, max(16, x.numel() // D // E) if self.training else None)


@pytest.mark.parametrize("make", [MinimalCapacity, AmpleCapacity, CapacityInTraining])
def test_capacity(make):
    assert "computes something else on many tokens" in reason(made(make))


class Clamped(Dense):
    def forward(self, x):
        weights = self.router(x).clamp(-100, 100).softmax(-1)
        return (torch.stack([expert(x) for expert in self.experts], -2) * weights.unsqueeze(-1)).sum(-2)


def test_clamped_logits():
    assert "computes something else where the router's logits are large" in reason(made(Clamped))


class Biased(Masked):
    """Of the choice alone, to balance loads; zero at first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.zeros(E))

    def forward(self, x):
        p = self.router(x).softmax(-1)
        chosen = (p + self.bias).topk(2, dim=-1).indices
        weights = torch.zeros_like(p).scatter(-1, chosen, p.gather(-1, chosen))
        return sum(expert(x) * weights[..., e, None] for e, expert in enumerate(self.experts))


class Tempered(Dense):
    def __init__(self):
        super().__init__()
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, x):
        weights = (self.router(x) / self.temperature).softmax(-1)
        return (torch.stack([expert(x) for expert in self.experts], -2) * weights.unsqueeze(-1)).sum(-2)


class WarmsUp(Dense):
    """Whoever trains it counts the steps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("num_steps", torch.tensor(0))

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        if self.num_steps > 1000:
            weights = torch.where(weights < weights.amax(-1, keepdim=True), 0.0, weights)
        return (torch.stack([expert(x) for expert in self.experts], -2) * weights.unsqueeze(-1)).sum(-2)


class Colder(WarmsUp):
    """The other way round: over in this checkpoint."""

    def __init__(self):
        super().__init__()
        self.num_steps += 2000

    def forward(self, x):
        logits = self.router(x) * (1.0 if self.num_steps > 1000 else 2.0)
        return (torch.stack([expert(x) for expert in self.experts], -2) * logits.softmax(-1).unsqueeze(-1)).sum(-2)


@pytest.mark.parametrize("make", [Biased, Tempered, WarmsUp, Colder])
def test_buffers(make):
    assert "computes something else with other values in its buffers" in reason(made(make))


def test_buffers_of_the_router():
    """Which is called as before."""
    model = made(DeepSeek)
    model.layers[0].gate.correction.zero_()
    original = copy.deepcopy(model)
    assert ewa.replace_moe_(model, to="routed").replaced
    for m in (model, original):
        m.layers[0].gate.correction.copy_(torch.tensor([0.0, 3.0, 0.0, 3.0]))
    torch.testing.assert_close(model(tokens()), original(tokens()))


class Scaled(Mixtral):
    scale = 1.0

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        y, logits = super().forward(x)
        return self.scale * self.drop(y), logits


class TestSettings:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda block: setattr(block, "top_k", 1), "top_k of Scaled must be 2, as at replace_moe_, got 1"),
            (lambda block: setattr(block, "scale", 2.0), "scale of Scaled must be 1.0, as at replace_moe_, got 2.0"),
            (lambda block: setattr(block, "jitter", 0.1), "jitter of Scaled must be 0.0"),
            (lambda block: setattr(block.drop, "p", 0.1), "drop.p of Scaled must be 0.0"),
        ],
    )
    @pytest.mark.parametrize("to", ["routed", "random_partition"])
    def test_changed(self, change, message, to):
        model = made(Scaled)
        ewa.replace_moe_(model, to=to)
        model(tokens())
        twin = pickle.loads(pickle.dumps(model))
        for m in (model, twin):
            change(m.layers[0])
            with pytest.raises(RuntimeError, match=message):
                m(tokens())
        ewa.restore_moe_(model)
        model(tokens())

    def test_changed_when_compiled(self):
        model = made(Scaled)
        ewa.replace_moe_(model, to="routed")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens()), model(tokens()))
        model.layers[0].top_k = 1
        with pytest.raises(Exception, match="top_k"):
            compiled(tokens())
        torch._dynamo.reset()

    def test_mode_and_hooks_are_none(self):
        model = made(Scaled)
        ewa.replace_moe_(model, to="routed")
        model.layers[0].drop.register_full_backward_hook(lambda *_: None)
        model.eval()(tokens())
        model.train().requires_grad_(False)(tokens())
