"""FFNs inside larger blocks, and with activations that the kernels have not: replaced as pairs of projections."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from ffn_zoo import D_FF, ZOO, BertLayer, D, LlamaFFN, Residual, mish
from models import Mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

import ewa_kernels as ewa
from ewa_kernels.models.pairs import PairedExperts

EVERY = {"filter_fn": lambda *_: True}


def tokens(*shape):
    return torch.randn(*(shape or (3, 5, D)), generator=torch.Generator().manual_seed(0))


def made(make, num_blocks=2):
    torch.manual_seed(0)
    return nn.Sequential(*(make() for _ in range(num_blocks)))


@pytest.mark.parametrize("name", ZOO)
class TestZoo:
    def test_copies_compute_what_the_block_did(self, name):
        """Output and all gradients, in training mode: dealing equal experts changes nothing."""
        make, form = ZOO[name]
        model = made(make).double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
            if hasattr(module, "dropout_p"):
                module.dropout_p = 0.0
        x = tokens().double().requires_grad_()
        y = model(x)
        direction = torch.randn_like(y)
        dense = dict(zip(["x", *(n for n, _ in model.named_parameters())], grads(y, model, x, direction), strict=True))
        report = ewa.replace_ffn_(model, 3, **EVERY)
        assert (set(report.forms.values()), report.skipped, len(report.replaced)) == ({form}, {}, 2)
        actual = model(x)
        torch.testing.assert_close(actual, y)
        actual.backward(direction)
        torch.testing.assert_close(x.grad, dense.pop("x"))
        with torch.no_grad():  # an expert's gradient is that of its tokens: the sum is the FFN's
            for _, parameter in ewa.expert_tensors(model):
                parameter.copy_(3 * parameter.grad)
        folded = ewa.fold_(model).named_parameters()
        for parameter_name, parameter in folded:
            value = parameter if parameter.grad is None else parameter.grad
            torch.testing.assert_close(value, dense[parameter_name], msg=parameter_name)

    def test_trained_and_folded_to_the_bit(self, name):
        model = made(ZOO[name][0])
        keys, x = list(model.state_dict()), tokens()
        expected = model.eval()(x)
        modules = [type(module) for module in model.modules()]
        ewa.replace_ffn_(model, **EVERY)
        assert torch.equal(model(x), expected)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()(x).cos().sum().backward()
        optimizer.step()
        assert max(ewa.ExpertAverager(model, 0.3).spread().values()) > 1e-6
        trained, state = model.eval()(x), ewa.folded_state_dict(model)
        assert not torch.equal(trained, expected)
        assert torch.equal(ewa.fold_(model)(x), trained)
        assert list(model.state_dict()) == list(state) == keys
        assert [type(module) for module in model.modules()] == modules
        untouched = made(ZOO[name][0]).eval()
        untouched.load_state_dict(state, strict=True)
        assert torch.equal(untouched(x), trained)


def grads(y, model, x, direction):
    return torch.autograd.grad(y, [x, *model.parameters()], direction)


class MishGLU(LlamaFFN):
    def forward(self, x):
        return self.w2(F.mish(self.w1(x)) * self.w3(x))


def drifted(make):
    """A model of one block whose experts are all different."""
    model = made(lambda: Residual(make()), 1)
    ewa.replace_ffn_(model, 3, init="independent", **EVERY)
    return model


@pytest.mark.parametrize("make", [mish, MishGLU])
class TestDeal:
    def test_each_token_through_its_expert(self, make):
        model, x = drifted(make), tokens()
        torch.manual_seed(5)
        seed = ewa.functional.draw_seed(x)
        order, offsets = ewa.functional.random_permutation(15, seed), ewa.functional.expert_offsets(15, 3)
        weights = [p for _, p in ewa.expert_tensors(model)]
        expected, rows = x.clone().view(15, D), x.view(15, D)
        for e in range(3):
            chosen = order[offsets[e] : offsets[e + 1]].long()
            dense = {n: t[e] for (n, _), t in zip(make().named_parameters(), weights, strict=True)}
            ffn = made(make, 1)[0]
            expected[chosen] += torch.func.functional_call(ffn, {f"{n}": t for n, t in dense.items()}, rows[chosen])
        torch.manual_seed(5)
        torch.testing.assert_close(model(x).view(15, D), expected)
        assert not torch.equal(model(x), model(x))

    def test_reproduced(self, make):
        """By the seed, by activation checkpointing, by a compiler, by copies."""
        model, x = drifted(make), tokens().requires_grad_()

        def run(call, of=model):
            torch.manual_seed(5)
            of.zero_grad()
            y = call(x)
            y.square().sum().backward()
            return y.detach(), *(p.grad.clone() for p in of.parameters())

        expected = run(model)
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model)) if make is mish else copy.deepcopy(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        calls = [model, lambda x: checkpoint(model, x, use_reentrant=False), compiled]
        for actual in (*map(run, calls), *(run(twin, twin) for twin in twins)):
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b)
        torch._dynamo.reset()

    def test_rank_in_the_seed(self, make):
        from ewa_kernels.integrations.fsdp import fold_rank_into_seed_

        model, x = drifted(make), tokens()
        outputs = []
        for rank in (0, 1, 1):
            fold_rank_into_seed_(model, rank)
            torch.manual_seed(5)
            outputs.append(model(x))
        assert torch.equal(outputs[1], outputs[2])
        assert not torch.equal(outputs[0], outputs[1])


class TestMisuse:
    def test_down_without_up(self):
        model = drifted(mish)
        with pytest.raises(RuntimeError, match="got 15 rows after up projections: none"):
            model[0].ffn[2](tokens(3, 5, D_FF))
        model[0].ffn[0](tokens())
        with pytest.raises(RuntimeError, match="got 2 rows after up projections: 1 with 15 rows"):
            model[0].ffn[2](tokens(2, D_FF))
        model(tokens())  # nothing is left of it

    def test_up_alone_is_forgotten(self):
        model = drifted(mish)
        model[0].ffn[0](tokens())
        model(tokens(2, 3, D))


class MixesBetween(Mlp):
    def forward(self, x):
        hidden = self.act(self.fc1(x))
        return self.fc2(hidden + 1e-4 * hidden.mean(-2, keepdim=True))


class MixesInTraining(Mlp):
    """Beside a dropout, whose numbers are others on other rows."""

    def __init__(self):
        super().__init__(drop=0.1)

    def forward(self, x):
        hidden = self.drop1(self.fc1(x).tanh())
        return self.fc2(hidden - hidden.mean(-2, keepdim=True) if self.training else hidden)


class MixesLongOnes(Mlp):
    def forward(self, x):
        hidden = self.fc1(x).tanh()
        return self.fc2(hidden - hidden.mean(-2, keepdim=True) if x.shape[-2] > 64 else hidden)


class MixesVideos(Mlp):
    def forward(self, x):
        hidden = self.fc1(x).tanh()
        return self.fc2(hidden - hidden.mean(-2, keepdim=True) if x.ndim == 5 else hidden)


class MasksBetween(Mlp):
    """If it is given a mask."""

    def forward(self, x, mask=None):
        hidden = self.fc1(x).tanh()
        return self.fc2(hidden if mask is None else hidden * mask.unsqueeze(-1))


class Conditioned(Mlp):
    """One row for each input."""

    def forward(self, x, emb=None):
        hidden = self.fc1(x).tanh()
        return self.fc2(hidden if emb is None else hidden * emb.unsqueeze(1))


class Fills(Mlp):
    def forward(self, x, padding=None):
        hidden = self.fc1(x).tanh()
        return self.fc2(hidden if padding is None else hidden.masked_fill(padding.unsqueeze(-1), 0.0))


class Flagged(Mlp):
    def forward(self, x, causal=False):
        hidden = self.fc1(x).tanh()
        return self.fc2(hidden.cumsum(-2) if causal else hidden)


class Excites(nn.Module):
    """Squeeze and excitation: its Sequential is no FFN of tokens."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean(-2, keepdim=True))


class GlobalResponseNorm(Mlp):
    """Of images; of a sequence it is the identity."""

    def forward(self, x):
        hidden = self.act(self.fc1(x)).tanh()
        if x.ndim == 4:
            norm = hidden.norm(dim=(1, 2), keepdim=True)
            hidden = hidden * norm / norm.mean(-1, keepdim=True)
        return self.fc2(hidden)


class Squeeze(Mlp):
    """Pooled rows."""

    def forward(self, x):
        return x * self.fc2(self.fc1(x.mean(-2, keepdim=True)).relu()).sigmoid()


class Twice(Mlp):
    def forward(self, x):
        return self.fc2(self.fc1(x) + self.fc1(x.cos()).tanh())


class AddsHidden(Mlp):
    def forward(self, x):
        hidden = self.fc1(x).tanh()
        return self.fc2(hidden) + hidden[..., :8]


class Positions(Mlp):
    def forward(self, x):
        return self.fc2(self.fc1(x).tanh() * torch.arange(1, x.shape[-2] + 1, device=x.device).unsqueeze(-1))


class NeedsMore(Mlp):
    def forward(self, x, scale):
        return self.fc2(self.fc1(x).tanh() * scale)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (MixesBetween, "computes something else where the rows between its projections are dealt"),
        (MixesInTraining, "computes something else where the rows"),
        (MixesLongOnes, "computes something else where the rows"),
        (MixesVideos, "computes something else where the rows"),
        (MasksBetween, "computes something else where the rows .*, when mask is given"),
        (Conditioned, "computes something else where the rows .*, when emb is given"),
        (Fills, "computes something else where the rows .*, when padding is given"),
        (Flagged, "computes something else where the rows .*, when causal is given"),
        (GlobalResponseNorm, "computes something else where the rows"),
        (Squeeze, "does not call its projections once for each token"),
        (Twice, "does not call its projections once for each token"),
        (AddsHidden, "computes something else where the rows"),
        (Positions, "computes something else where the rows"),
        (NeedsMore, r"fails on \[2, 16, D\]: TypeError"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_mixes_tokens_is_left_alone(make, reason):
    model = made(lambda: Residual(make()))
    before = list(model.modules())
    with pytest.warns(UserWarning, match=rf"as a pair of projections it {reason}"):
        ewa.replace_ffn_(model, **EVERY)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


def test_gates_are_no_ffns():
    assert ewa.find_ffns(made(Excites)) == []


def test_two_threads():
    """Each has deals of its own: one is between its projections while the other runs."""
    model, x = drifted(mish), tokens()
    act, turns = model[0].ffn[1], [threading.Event(), threading.Event()]

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            turns[0].set()
            assert turns[1].wait(10)

    torch.manual_seed(5)
    expected = [model(x), model(x)]
    act.register_forward_hook(wait)
    torch.manual_seed(5)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(model, x)
        assert turns[0].wait(10)
        second = model(x)
        turns[1].set()
        torch.testing.assert_close([first.result(), second], expected)


class Norms(Mlp):
    """Row by row, with parameters of its own: it stays the block's."""

    def __init__(self):
        super().__init__(D, D_FF)
        self.norm, self.prelu = nn.LayerNorm(D_FF), nn.PReLU()

    def forward(self, x):
        return 0.5 * x + self.fc2(self.prelu(self.norm(self.fc1(x))))


def test_what_is_between_is_trained_too():
    model = made(Norms)
    ewa.replace_ffn_(model, **EVERY)
    model(tokens()).square().sum().backward()
    assert all(p.grad.any() for p in (model[0].norm.weight, model[0].prelu.weight))


class TestAsALinear:
    def test_weights_are_the_mean(self):
        model = drifted(mish)
        up = model[0].ffn[0]
        assert isinstance(up, PairedExperts)
        assert torch.equal(up.weight, ewa.functional.merge_experts(up.experts.weight))
        assert torch.equal(up.bias, ewa.functional.merge_experts(up.experts.bias))
        assert (up.in_features, up.out_features) == (D, D_FF)

    def test_names_of_experts(self):
        names = [f"0.ffn.{i}.experts.{which}" for i in (0, 2) for which in ("weight", "bias")]
        model = drifted(mish)
        assert [name for name, _ in ewa.expert_tensors(model)] == names
        averager = ewa.ExpertAverager(model, 0.3)
        before = averager.spread()
        averager.step()
        assert averager.spread() == pytest.approx({n: before[n] * (1 - 0.3 * 3 / 2) for n in names}, rel=1e-5)

    @pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU()])
    def test_torchs_fast_path(self, activation):
        """In eval mode without gradients it takes weights, and calls no module; with padding, of nested tensors."""
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(D, 2, D_FF, activation=activation, batch_first=True)
        model = nn.TransformerEncoder(layer, 2)
        ewa.replace_ffn_(model, init="independent", **EVERY)
        padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
        model.eval()
        outputs = []
        for fold in (False, True):
            model = ewa.fold_(model) if fold else model
            with torch.no_grad():
                outputs.append(model(tokens(), src_key_padding_mask=padding)[~padding])
        assert torch.equal(*outputs)

    def test_autocast(self):
        model = drifted(mish)
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(5)
            y = model(tokens())
        torch.manual_seed(5)
        torch.testing.assert_close(y.float(), model(tokens()), rtol=0.05, atol=0.05)

    def test_frozen_and_attributes(self):
        model = made(lambda: Residual(mish()), 1)
        model[0].ffn[0].requires_grad_(False)
        model[0].ffn[2].weight.lr_scale = 0.3
        ewa.replace_ffn_(model, **EVERY)
        up, down = model[0].ffn[0], model[0].ffn[2]
        assert [p.requires_grad for p in (*up.parameters(), *down.parameters())] == [False, False, True, True]
        assert down.experts.weight.lr_scale == 0.3
        linears = ewa.fold_(model)[0].ffn
        assert not linears[0].weight.requires_grad
        assert linears[2].weight.lr_scale == 0.3


class OwnLinear(nn.Linear):
    """As OpenFold has one, with an initialiser of its own."""


def test_a_subclass_of_linear_comes_back():
    model = nn.Sequential(Residual(nn.Sequential(OwnLinear(D, D_FF), nn.Mish(), OwnLinear(D_FF, D))))
    originals = model[0].ffn[0], model[0].ffn[2]
    ewa.replace_ffn_(model, **EVERY)
    ewa.fold_(model)
    assert (model[0].ffn[0], model[0].ffn[2]) == originals


def test_shared_projections_are_left_alone():
    model = nn.Sequential(BertLayer(), BertLayer(), BertLayer())
    model[1].intermediate = model[0].intermediate
    report = ewa.replace_ffn_(model, **EVERY)
    assert report.replaced == ("2",)
    assert report.skipped == dict.fromkeys("01", "shares with another module: intermediate")


def test_a_block_is_the_model():
    block = nn.TransformerEncoderLayer(D, 2, D_FF, batch_first=True).eval()
    expected = block(tokens())
    assert ewa.replace_ffn_(block, **EVERY).forms == {"": "pair"}
    assert torch.equal(block(tokens()), expected)
    (site,) = ewa.find_ffns(block)
    assert (site.name, site.skip_reason) == ("linear1", "has experts already")


def test_registered_block():
    class Unusual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.q = nn.Linear(D, D_FF), nn.Linear(D_FF, D), nn.Linear(D, D)

        def forward(self, x):
            return self.q(x) + self.b(self.a(x).sin())

    model = nn.Sequential(Unusual(), Unusual())
    assert ewa.find_ffns(model) == []
    ewa.register_ffn_adapter(Unusual, up="a", down="b")
    assert ewa.replace_ffn_(model).forms == {"1": "pair"}
