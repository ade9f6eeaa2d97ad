"""Find, replace, train, fold."""

import copy
import pickle
import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import Block, Mlp, MLPBlock, PackedGLU, PointMlp, SwiGLU, Transformer, tokens
from torch import nn
from torch.nn.utils import parametrizations, prune

import ewa_kernels as ewa
from ewa_kernels.surgery import adapters


@pytest.fixture
def registered(monkeypatch):
    """SwiGLU is known, for one test."""
    monkeypatch.setattr(adapters, "_registered", [])
    ewa.register_ffn_adapter(SwiGLU, up=("w_gate", "w_value"), down="w_out")


def layout_of(ffn):
    (site,) = ewa.find_ffns(nn.Sequential(ffn))
    assert site.skip_reason is None, site.skip_reason
    return site.layout


class TestFind:
    @pytest.mark.parametrize(
        ("ffn", "kind", "expected"),
        [
            (Mlp(), "fc1_fc2", {"activation": "gelu", "dropout": 0.0}),
            (Mlp(drop=0.1), "fc1_fc2", {"dropout": 0.1, "output_dropout": 0.1}),
            (Mlp(drop=0.1, bias=False), "fc1_fc2", {"dropout": 0.1, "output_dropout": 0.1}),
            (Mlp(act=lambda: nn.GELU("tanh")), "fc1_fc2", {"activation": "gelu_tanh"}),
            (Mlp(act=nn.ReLU), "fc1_fc2", {"activation": "relu"}),
            (Mlp(act=nn.SiLU), "fc1_fc2", {"activation": "silu"}),
            (Mlp(act=nn.Identity), "fc1_fc2", {"activation": "identity"}),
            (PointMlp(), "fc1_fc2", {"dropout": 0.1, "output_dropout": 0.1}),
            (PackedGLU(), "fc1_fc2", {"gated": True, "gate_last": True, "activation": "silu"}),
            (PackedGLU(gate_last=False, drop=0.2), "fc1_fc2", {"gated": True, "gate_last": False, "dropout": 0.2}),
            (MLPBlock(drop=0.1), "sequential", {"up": ("0",), "down": "3", "dropout": 0.1, "output_dropout": 0.1}),
            (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), "sequential", {"activation": "relu"}),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
    )
    def test_what_it_computes(self, ffn, kind, expected):
        (site,) = ewa.find_ffns(Block(ffn))
        assert (site.name, site.module, site.kind) == ("mlp", ffn, kind)
        assert {name: getattr(site.layout, name) for name in expected} == expected

    def test_activation_in_the_forward(self):
        class Functional(Mlp):
            def forward(self, x):
                return self.fc2(nn.functional.relu(self.fc1(x)).square())

        assert layout_of(Functional()).activation == "relu2"

    def test_in_inference_mode(self):
        model = Transformer(Mlp(), Mlp())
        with torch.inference_mode():
            ewa.replace_ffn_(model)
        model(tokens()).sum().backward()
        assert model.blocks[1].mlp.up.weight.grad.any()

    def test_registered_class(self, registered):
        layout = layout_of(SwiGLU())
        assert (layout.up, layout.gated, layout.gate_last, layout.activation) == (
            ("w_gate", "w_value"),
            True,
            False,
            "silu",
        )
        ewa.register_ffn_adapter(SwiGLU, up=("w_value", "w_gate"), down="w_out", kind="swiglu")
        (site,) = ewa.find_ffns(nn.Sequential(SwiGLU()))
        assert site.kind == "swiglu"
        assert site.layout.gate_last

    def test_registered_names_that_do_not_exist(self, monkeypatch):
        monkeypatch.setattr(adapters, "_registered", [])
        ewa.register_ffn_adapter(SwiGLU, up="typo", down="w_out")
        (site,) = ewa.find_ffns(nn.Sequential(SwiGLU()))
        assert site.skip_reason == "has no module 'typo'"

    def test_touches_nothing(self):
        model = Transformer(Mlp(drop=0.3), MLPBlock(), PointMlp())
        model.blocks[1].eval()
        state = copy.deepcopy(model.state_dict())
        modes = [module.training for module in model.modules()]
        rng = torch.get_rng_state()
        ewa.find_ffns(model)
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), rng)
        assert model.blocks[0].mlp.drop1.p == 0.3

    def test_other_modules_are_not_listed(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.LayerNorm(8))
        assert ewa.find_ffns(model) == []

    def test_frozen_16_bit_and_meta(self):
        model = Transformer(Mlp(), Mlp()).to(torch.bfloat16).requires_grad_(False)
        assert all(site.skip_reason is None for site in ewa.find_ffns(model))
        with torch.device("meta"):
            assert all(site.skip_reason is None for site in ewa.find_ffns(Transformer(Mlp(), Mlp())))


class Residual(Mlp):
    def forward(self, x):
        return x + super().forward(x)


class TinyResidual(Mlp):
    def forward(self, x):
        return 1e-4 * x + super().forward(x)


class Scaled(Mlp):
    def forward(self, x):
        return 0.5 * super().forward(x)


class LearnedScale(Mlp):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8))


class MixesTokens(Mlp):
    def forward(self, x):
        return super().forward(x + x.mean(1, keepdim=True))


class FunctionalDropout(Mlp):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class InputDropout(Mlp):
    def forward(self, x):
        return super().forward(self.drop2(x))


class Saturating(Mlp):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)).clamp(-12, 12))


class LayerDrop(Mlp):
    def forward(self, x):
        if self.training and torch.rand(()) < 0.01:
            return torch.zeros_like(x)
        return super().forward(x)


class PythonLayerDrop(Mlp):
    def forward(self, x):
        if self.training and random.random() < 0.01:
            return torch.zeros_like(x)
        return super().forward(x)


class MixesManyTokens(Mlp):
    def forward(self, x):
        return super().forward(x) + (x.mean(1, keepdim=True) if x.shape[1] > 64 else 0)


class MixesImages(Mlp):
    def forward(self, x):
        return super().forward(x) + (x.mean(1, keepdim=True) if x.ndim == 4 else 0)


class Counts(Mlp):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (self.calls < 3)


class Detaches(Mlp):
    def forward(self, x):
        return super().forward(x.detach())


class NoGradHidden(Mlp):
    def forward(self, x):
        with torch.no_grad():
            hidden = self.act(self.fc1(x))
        return self.fc2(hidden)


class StraightThrough(Mlp):
    def forward(self, x):
        return super().forward(x) + x - x.detach()


class WritesIntoInput(Mlp):
    def forward(self, x):
        y = super().forward(x)
        x.zero_()
        return y


class NoArgument(Mlp):
    def forward(self):
        return None


class TwoArguments(Mlp):
    def forward(self, x, scale=1.0):
        return super().forward(x)


class NeedsImage(Mlp):
    def forward(self, x):
        _, _, _, width = x.shape
        return super().forward(x) * width / width


class Normed(Mlp):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)


class PlainNormed(Mlp):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16, elementwise_affine=False)


class ConvMlp(Mlp):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Conv2d(8, 16, 1)


class GivesTuple(Mlp):
    def forward(self, x):
        return super().forward(x), None


def frozen_bias_of_two():
    ffn = SwiGLU()
    ffn.w_gate.requires_grad_(False)
    return ffn


def tied():
    ffn = Mlp()
    ffn.fc2.weight = nn.Parameter(ffn.fc1.weight.detach().clone().t().contiguous())
    ffn.other = nn.Linear(1, 1)
    ffn.other.weight = ffn.fc1.weight
    return ffn


def hooked():
    ffn = Mlp()
    ffn.fc1.register_forward_hook(lambda *_: None)
    return ffn


def half():
    ffn = Mlp()
    ffn.fc2.half()
    return ffn


SKIPPED = [
    (Residual(), "its output is not down(act(up(x))) with act any of gelu, gelu_tanh, relu, relu2, silu, identity"),
    (TinyResidual(), "its output is not down(act(up(x)))"),
    (Scaled(), "its output is not down(act(up(x)))"),
    (MixesTokens(), "its output is not down(act(up(x)))"),
    (PlainNormed(), "its output is not down(act(up(x)))"),
    (Mlp(act=nn.Tanh), "its output is not down(act(up(x)))"),
    (Mlp(act=nn.PReLU), "has other parameters or buffers: act.weight"),
    (LearnedScale(), "has other parameters or buffers: gamma"),
    (Normed(), "has other parameters or buffers: norm.weight, norm.bias"),
    (FunctionalDropout(), "in training does something else than dropout of hidden and of the output"),
    (InputDropout(drop=0.1), "in training does something else than"),
    (Saturating(), "is no plain FFN on every input: not on [2, 3, 8], scale 100"),
    (Mlp(act=nn.ReLU6), "is no plain FFN on every input: not on [2, 3, 8], scale 100"),
    (LayerDrop(), "in training does something else than dropout"),
    (PythonLayerDrop(), "in training does something else than dropout"),
    (MixesManyTokens(), "is no plain FFN on every input: not on [1, 70, 8], scale 1"),
    (MixesImages(), "is no plain FFN on every input: not on [2, 4, 5, 8], scale 1"),
    (Counts(), "is no plain FFN on every input: not on [7, 8], scale 1"),
    (Detaches(), "its gradient with respect to its input is not that of its output"),
    (NoGradHidden(), "its gradient with respect to its input is not that of its output"),
    (StraightThrough(), "its gradient with respect to its input is not that of its output"),
    (WritesIntoInput(), "writes into its input"),
    (NoArgument(), "fails on one tensor [2, 3, D]: TypeError"),
    (torch.jit.script(Mlp()), "cannot be examined: "),
    (TwoArguments(), "its forward takes more than one argument: scale"),
    (NeedsImage(), "fails on one tensor [2, 3, D]: ValueError: not enough values to unpack"),
    (ConvMlp(), "fc1 is a Conv2d, not an nn.Linear"),
    (GivesTuple(), "gives tuple for a tensor [2, 3, 8]"),
    (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 5)), "maps 8 to 5 features, not to as many"),
    (frozen_bias_of_two(), "its up projections differ in weight: frozen, or missing"),
    (tied(), "has other parameters or buffers: other"),
    (hooked(), "has hooks that would be lost, on fc1"),
    (half(), "has parameters of more than one dtype: torch.float16, torch.float32"),
    (nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(16, 8)), "its up projection gives 12 features"),
]


class TestSkip:
    @pytest.mark.parametrize(
        ("ffn", "reason"), SKIPPED, ids=[type(ffn).__name__ + "-" + reason[:20] for ffn, reason in SKIPPED]
    )
    def test_reason(self, registered, ffn, reason):
        model = Transformer(Mlp(), ffn, Mlp())
        before = copy.deepcopy(model.state_dict())
        report = ewa.replace_ffn_(model)
        assert report.skipped["blocks.1.mlp"].startswith(reason)
        assert report.replaced == ("blocks.2.mlp",)
        assert model.blocks[1].mlp is ffn
        assert all(torch.equal(before[name], value) for name, value in ffn.state_dict(prefix="blocks.1.mlp.").items())

    def test_parametrized_projection(self):
        ffn = Mlp()
        parametrizations.weight_norm(ffn.fc1)
        (site,) = ewa.find_ffns(nn.Sequential(ffn))
        assert site.skip_reason == "fc1 is a ParametrizedLinear, not an nn.Linear"

    def test_shared_parameter(self):
        model = Transformer(Mlp(), Mlp())
        model.blocks[0].mlp.fc1.weight = model.blocks[1].mlp.fc1.weight
        for site in ewa.find_ffns(model):
            assert site.skip_reason == "shares with another module: fc1.weight"

    def test_shared_projection(self):
        """By a module outside any FFN, and by two FFNs."""
        model = Transformer(Mlp(), Mlp(), Mlp())
        model.alias = model.blocks[1].mlp.fc1
        model.blocks[2].mlp.fc1 = model.blocks[0].mlp.fc1
        for site in ewa.find_ffns(model):
            assert site.skip_reason == "shares with another module: fc1"

    def test_in_training_mode_in_part(self):
        model = Transformer(Mlp(drop=0.1))
        model.blocks[0].mlp.drop1.eval()
        assert ewa.find_ffns(model)[0].skip_reason == "is in training mode in part only"

    def test_root(self):
        (site,) = ewa.find_ffns(Mlp())
        assert site.skip_reason == "is the model itself: nothing holds it that could hold another"

    def test_already_replaced(self):
        model = Transformer(Mlp(), Mlp())
        ewa.replace_ffn_(model)
        with pytest.warns(UserWarning, match="replaced nothing"):
            report = ewa.replace_ffn_(model)
        assert report.skipped == {"blocks.1.mlp": "is a RandomPartitionMoE already"}
        assert report.kept == ("blocks.0.mlp",)

    def test_skipped_is_searched_inside(self):
        outer = Residual()
        outer.fc1 = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        names = {site.name: site.skip_reason for site in ewa.find_ffns(nn.Sequential(outer))}
        assert names == {"0": "fc1 is a Sequential, not an nn.Linear", "0.fc1": None}


class TestReplace:
    def test_every_other_by_default(self):
        model = Transformer(*(Mlp() for _ in range(5)))
        report = ewa.replace_ffn_(model, 3)
        assert report.replaced == ("blocks.1.mlp", "blocks.3.mlp")
        assert report.kept == ("blocks.0.mlp", "blocks.2.mlp", "blocks.4.mlp")
        assert report.skipped == {}
        assert str(report).splitlines()[0] == "blocks.1.mlp  replaced"
        for i, block in enumerate(model.blocks):
            assert isinstance(block.mlp, ewa.RandomPartitionMoE) == (i % 2 == 1)
        assert model.blocks[1].mlp.num_experts == 3

    def test_filter(self):
        model = Transformer(*(Mlp() for _ in range(3)))
        seen = []
        report = ewa.replace_ffn_(
            model, filter_fn=lambda name, module: seen.append((name, type(module))) or "0" in name
        )
        assert seen == [(f"blocks.{i}.mlp", Mlp) for i in range(3)]
        assert report.replaced == ("blocks.0.mlp",)

    @pytest.mark.parametrize("num_experts", [1, 3, 4])
    @pytest.mark.parametrize("make", [Mlp, MLPBlock, PointMlp, PackedGLU, SwiGLU])
    def test_copy_does_not_change_the_eval_output(self, registered, make, num_experts):
        model = Transformer(make(), make()).eval()
        expected = model(tokens())
        ewa.replace_ffn_(model, num_experts)
        assert torch.equal(model(tokens()), expected)
        # In training mode all experts are alike, so every deal gives the dense output too.
        torch.testing.assert_close(model.train()(tokens()), expected) if make is not PointMlp else None

    def test_independent_experts(self):
        torch.manual_seed(0)
        model = Transformer(Mlp(), Mlp(d_ff=32))
        dense = copy.deepcopy(model.blocks[1].mlp)
        ewa.replace_ffn_(model, 3, init="independent")
        up = model.blocks[1].mlp.up
        assert torch.equal(up.weight[0], dense.fc1.weight)
        assert torch.equal(up.bias[0], dense.fc1.bias)
        assert len({expert.sum().item() for expert in up.weight}) == 3
        assert 0.8 < up.weight[1:].abs().max() * 8**0.5 <= 1

    def test_independent_experts_by_the_modules_own_initialiser(self):
        class Sevens(Mlp):
            def reset_parameters(self):
                for parameter in self.parameters():
                    nn.init.constant_(parameter, 7)

        model = Transformer(Sevens())
        ewa.replace_ffn_(model, 2, init="independent", filter_fn=lambda *_: True)
        stacked = model.blocks[0].mlp.down.weight
        assert (stacked[1] == 7).all()
        assert not (stacked[0] == 7).any()

    def test_copies_mode_dtype_and_frozen_flags(self):
        model = Transformer(Mlp(), Mlp()).double()
        model.blocks[1].mlp.eval()
        model.blocks[1].mlp.fc2.requires_grad_(False)
        ewa.replace_ffn_(model)
        layer = model.blocks[1].mlp
        assert not layer.training
        assert layer.up.weight.dtype == torch.float64
        assert layer.up.bias.requires_grad
        assert not layer.down.weight.requires_grad
        ewa.fold_(model)
        assert not model.blocks[1].mlp.training
        assert not model.blocks[1].mlp.drop1.training
        assert not model.blocks[1].mlp.fc2.bias.requires_grad

    def test_shared_modules_stay_shared(self):
        shared = Mlp()
        model = Transformer(Mlp(), shared, Mlp(), shared)
        model.alias = shared
        original_keys = list(model.state_dict())
        report = ewa.replace_ffn_(model)
        assert report.replaced == ("blocks.1.mlp",)
        assert model.blocks[1].mlp is model.blocks[3].mlp is model.alias
        assert isinstance(model.alias, ewa.RandomPartitionMoE)
        assert list(ewa.folded_state_dict(model)) == original_keys
        ewa.fold_(model)
        assert model.blocks[1].mlp is model.blocks[3].mlp is model.alias
        assert isinstance(model.alias, Mlp)

    def test_output_dropout_acts_in_training_only(self):
        model = Transformer(Mlp(drop=1.0), Mlp(drop=1.0))
        ewa.replace_ffn_(model, filter_fn=lambda *_: True)
        x = tokens(2, 5, 8)
        assert not model.blocks[0].mlp(x).any()
        assert model.eval().blocks[0].mlp(x).any()

    @pytest.mark.parametrize("stage", ["filter", "second layer"])
    def test_an_error_half_way_leaves_the_model_as_it_was(self, monkeypatch, stage):
        model = Transformer(*(Mlp() for _ in range(4)))
        modules = list(model.modules())
        state = copy.deepcopy(model.state_dict())
        calls = []

        def fail(*_):
            calls.append(None)
            if len(calls) == 2:
                raise MemoryError("no more")
            return True

        if stage == "filter":
            options = {"filter_fn": fail}
        else:
            options = {"init": "independent", "num_experts": 2}
            monkeypatch.setattr(Mlp, "reset_parameters", fail, raising=False)
        with pytest.raises(MemoryError):
            ewa.replace_ffn_(model, **options)
        assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())

    def test_warns_when_nothing_is_replaced(self):
        with pytest.warns(UserWarning, match="replace_ffn_ replaced nothing:\nno FFN found"):
            ewa.replace_ffn_(nn.Sequential(nn.Linear(4, 4)))

    def test_meta_device(self):
        with torch.device("meta"):
            model = Transformer(Mlp(), Mlp())
        ewa.replace_ffn_(model, init="independent")
        assert all(p.is_meta for p in model.parameters())
        assert all(p.is_meta for p in ewa.fold_(model).parameters())


def trained(model, steps=5):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    averager = ewa.ExpertAverager(model, 0.2)
    averager.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens(4, 5, 4)).square().mean().backward()
        optimizer.step()
    assert max(averager.spread().values()) > 1e-5
    return model


@pytest.mark.parametrize("make", [Mlp, MLPBlock, PointMlp, PackedGLU, SwiGLU, lambda: PackedGLU(gate_last=False)])
class TestFold:
    def test_back_to_the_original(self, registered, make):
        torch.manual_seed(0)
        model = Transformer(*(make() for _ in range(4)))
        original = copy.deepcopy(model)
        ewa.replace_ffn_(model)
        trained(model).eval()
        expected = model(tokens())
        unfolded_keys = list(model.state_dict())
        state = ewa.folded_state_dict(model)
        assert list(model.state_dict()) == unfolded_keys

        assert ewa.fold_(model) is model
        assert torch.equal(model(tokens()), expected)
        assert repr(model) == repr(original)
        assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
        assert list(state) == list(model.state_dict()) == list(original.state_dict())
        assert state._metadata == original.state_dict()._metadata
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))

        original.load_state_dict(state, strict=True)
        assert torch.equal(original.eval()(tokens()), expected)
        assert model.blocks[1].mlp.training is False
        model.train()(tokens()).sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_copies_of_the_model_fold_too(self, registered, make):
        """As an EMA copy, a pickled checkpoint, and after a change of dtype."""
        model = Transformer(make(), make())
        ewa.replace_ffn_(model)
        trained(model).eval()
        expected = ewa.folded_state_dict(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))) if make.__name__ != "<lambda>" else ():
            folded = ewa.fold_(twin).state_dict()
            assert all(torch.equal(expected[name], value) for name, value in folded.items())
        wide = ewa.fold_(copy.deepcopy(model).double())
        assert all(p.dtype == torch.float64 and not p.is_meta for p in wide.parameters())
        torch.testing.assert_close(wide(tokens().double()).float(), model(tokens()))


class Remembers(Mlp):
    """Holds what cannot be copied, and keeps what it computes."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.last = None

    def forward(self, x):
        self.last = self.act(self.fc1(x))
        return self.fc2(self.last)


class TestFoldOthers:
    def test_ffn_with_state_that_cannot_be_copied(self):
        model = Transformer(Mlp(), Remembers()).eval()
        original = model.blocks[1].mlp
        lock = original.lock
        expected = model(tokens())
        ewa.replace_ffn_(model)
        assert torch.equal(model(tokens()), expected)
        ewa.fold_(model)
        assert model.blocks[1].mlp is original
        assert original.lock is lock
        assert torch.equal(model(tokens()), expected)

    def test_old_ffn_elsewhere_fails_rather_than_being_stale(self):
        model = Transformer(Mlp(), Mlp())
        kept = [model.blocks[1].mlp]
        ewa.replace_ffn_(model)
        assert all(p.is_meta for p in kept[0].parameters())

    def test_eval_from_many_threads(self):
        model = Transformer(Mlp(), Mlp()).eval()
        ewa.replace_ffn_(model)
        expected = model(tokens())
        with ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(lambda _: model(tokens()), range(200)))
        assert all(torch.equal(y, expected) for y in outputs)

    def test_pruned_experts(self):
        """Their weight is no Parameter any more; it is computed from others."""
        model = Transformer(Mlp(), Mlp()).eval()
        ewa.replace_ffn_(model)
        prune.l1_unstructured(model.blocks[1].mlp.up, "weight", amount=0.5)
        expected = model(tokens())
        assert torch.equal(ewa.fold_(model)(tokens()), expected)

    def test_subclass_with_a_forward_of_its_own(self):
        class Doubled(ewa.RandomPartitionMoE):
            def forward(self, x, *, seed=None):
                return 2 * super().forward(x, seed=seed)

        model = nn.Sequential(Doubled(8, 12, 2))
        model[0].gamma = nn.Parameter(torch.ones(8))
        assert [name for name, _ in ewa.expert_tensors(model)] == [
            "0.up.weight",
            "0.up.bias",
            "0.down.weight",
            "0.down.bias",
        ]
        with pytest.raises(TypeError, match="Doubled must override fuse, because it overrides forward"):
            ewa.fold_(model)

    def test_own_layers_become_ffns(self):
        model = nn.Sequential(nn.Linear(8, 8), ewa.RandomPartitionMoE(8, 12, 4)).eval()
        x = tokens(3, 8)
        expected = model(x)
        assert isinstance(ewa.fold_(model)[1], ewa.FFN)
        assert torch.equal(model(x), expected)

    def test_a_layer_by_itself(self):
        layer = ewa.RandomPartitionMoE(8, 12, 4)
        assert list(ewa.folded_state_dict(layer)) == ["up.weight", "up.bias", "down.weight", "down.bias"]
        with pytest.raises(ValueError, match=r"use model\.fuse\(\)"):
            ewa.fold_(layer)

    def test_nothing_to_fold(self):
        model = Transformer(Mlp())
        modules = list(model.modules())
        assert list(ewa.fold_(model).modules()) == modules

    def test_an_error_half_way_leaves_the_model_as_it_was(self, monkeypatch):
        model = Transformer(Mlp(), Mlp())
        ewa.replace_ffn_(model, filter_fn=lambda *_: True)
        modules = list(model.modules())
        kind = type(model.blocks[1].mlp)
        fuse = kind.fuse
        calls = []

        def fail(self):
            calls.append(None)
            if len(calls) == 2:
                raise MemoryError("no more")
            return fuse(self)

        monkeypatch.setattr(kind, "fuse", fail)
        for function in (ewa.fold_, ewa.folded_state_dict):
            calls.clear()
            with pytest.raises(MemoryError):
                function(model)
            assert list(model.modules()) == modules

    def test_state_dict_that_fails_puts_the_layers_back(self):
        class Broken(Transformer):
            def state_dict(self, *args, **kwargs):
                raise RuntimeError("no")

        model = Broken(Mlp(), Mlp())
        ewa.replace_ffn_(model)
        modules = list(model.modules())
        with pytest.raises(RuntimeError, match="no"):
            ewa.folded_state_dict(model)
        assert list(model.modules()) == modules

    def test_replace_again_after_folding(self):
        model = Transformer(Mlp(), Mlp()).eval()
        for _ in range(2):
            expected = model(tokens())
            ewa.replace_ffn_(model)
            torch.testing.assert_close(model(tokens()), expected, rtol=0, atol=0)
            ewa.fold_(model)

    def test_unfolded_checkpoint_resumes(self):
        model = Transformer(Mlp(), Mlp())
        ewa.replace_ffn_(model)
        trained(model)
        other = Transformer(Mlp(), Mlp())
        ewa.replace_ffn_(other)
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other.eval()(tokens()), model.eval()(tokens()))

    def test_compiled_model_with_replaced_ffns(self):
        torch.compiler.reset()
        model = Transformer(Mlp(drop=0.1), Mlp(drop=0.1))
        ewa.replace_ffn_(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(compiled.eval()(tokens()), model.eval()(tokens()))
            compiled.train()(tokens()).sum().backward()
