"""What is an FFN, what it computes, and why something is none."""

import copy
import random
import re
import resource
import sys

import numpy
import pytest
import torch
from models import Block, Mlp, MLPBlock, PackedGLU, PointMlp, SwiGLU, Transformer, tokens
from not_ffns import PAIRS, SKIPPED, PythonLayerDrop, Residual
from torch import nn
from torch.nn.utils import parametrizations

import ewa_kernels as ewa
from ewa_kernels.models import execution, ffn_adapters
from ewa_kernels.models.ffn_adapters import NotReplaceableError
from ewa_kernels.models.layout import rate_in


def layout_of(ffn):
    (site,) = ewa.find_ffns(nn.Sequential(ffn))
    assert site.skip_reason is None, site.skip_reason
    assert site.layout is not None
    return site.layout


def rates(ffn):
    layout = layout_of(ffn)
    return rate_in(ffn, layout.dropout), rate_in(ffn, layout.output_dropout)


class TestFind:
    @pytest.mark.parametrize(
        ("ffn", "kind", "expected"),
        [
            (Mlp(), "fc1_fc2", {"activation": "gelu", "dropout": ("drop1", "p"), "output_dropout": ("drop2", "p")}),
            (Mlp(drop=0.1, bias=False), "fc1_fc2", {"dropout": ("drop1", "p"), "output_dropout": ("drop2", "p")}),
            (Mlp(act=lambda: nn.GELU("tanh")), "fc1_fc2", {"activation": "gelu_tanh"}),
            (Mlp(act=nn.ReLU), "fc1_fc2", {"activation": "relu"}),
            (Mlp(act=nn.SiLU), "fc1_fc2", {"activation": "silu"}),
            (Mlp(act=nn.Identity), "fc1_fc2", {"activation": "identity"}),
            (PointMlp(), "fc1_fc2", {"dropout": ("drop", "p"), "output_dropout": ("drop", "p")}),
            (PackedGLU(), "fc1_fc2", {"gated": True, "gate_last": True, "activation": "silu"}),
            (
                PackedGLU(gate_last=False, drop=0.2),
                "fc1_fc2",
                {"gated": True, "gate_last": False, "dropout": ("drop1", "p")},
            ),
            (MLPBlock(drop=0.1), "sequential", {"up": ("0",), "down": "3", "dropout": ("2", "p")}),
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

    def test_quick_gelu_is_that_of_transformers(self):
        """Both as an FFN's activation and by itself, over its whole range."""
        from transformers.activations import QuickGELUActivation

        assert layout_of(Mlp(act=QuickGELUActivation)).activation == "quick_gelu"
        v = torch.linspace(-30, 30, 2001, dtype=torch.float64)
        torch.testing.assert_close(
            ewa.reference.ACTIVATIONS["quick_gelu"](v), QuickGELUActivation()(v), rtol=1e-15, atol=0
        )

    def test_large_ones_are_examined_as_narrow_copies(self, monkeypatch):
        widths = []
        run = execution._run
        monkeypatch.setattr(execution, "_run", lambda module, x: widths.append(x.shape[-1]) or run(module, x))
        for ffn in (Mlp(64, 128, drop=0.1), PackedGLU(64, 128, drop=0.1)):
            widths.clear()
            assert rates(ffn)[0] == 0.1
            assert widths.count(64) == 1
            assert set(widths) == {24, 64}
            assert ffn.fc1.in_features == 64

    @pytest.mark.parametrize("wide_only", [False, True])
    def test_code_that_knows_its_width(self, wide_only):
        class Knows(Mlp):
            def forward(self, x):
                if wide_only:
                    assert x.shape[-1] == 64
                y = super().forward(x)
                return y if wide_only or self.fc1.in_features < 64 else y + x

        (site,) = ewa.find_ffns(nn.Sequential(Knows(64, 128)))
        assert (site.skip_reason is None) == wide_only

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_wide_ones_of_every_dtype(self, dtype):
        for ffn in (Mlp(300, 1200), PackedGLU(256, 700), MLPBlock(256, 1024)):
            layout_of(ffn.to(dtype))

    @pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is another")
    def test_wide_ones_take_little_memory(self):
        """A copy of this one in float64 would take 1.1 GB."""
        with torch.device("meta"):
            ffn = PackedGLU(4096, 11008).to(torch.bfloat16)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on Linux
        layout_of(ffn)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024

    def test_dropout_by_a_function(self):
        class Functional(Mlp):
            def __init__(self, rate):
                super().__init__()
                self.rate, self.other = rate, 0.7

            def forward(self, x):
                hidden = nn.functional.dropout(self.act(self.fc1(x)), self.rate, self.training)
                return self.drop2(self.fc2(hidden))

        assert (rates(Functional(0.2))[0], rates(Functional(0.0))[0]) == (0.2, 0.0)

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
        monkeypatch.setattr(ffn_adapters, "_registered", [])
        ewa.register_ffn_adapter(SwiGLU, up="typo", down="w_out")
        (site,) = ewa.find_ffns(nn.Sequential(SwiGLU()))
        assert site.skip_reason == "has no module 'typo'"

    def test_another_librarys_linear(self):
        ffn = Mlp()
        ffn.fc1.__class__ = type("Linear", (nn.Linear,), {"__module__": "other.layers", "forward": lambda _, x: x})
        (site,) = ewa.find_ffns(nn.Sequential(ffn))
        assert site.skip_reason == "fc1 is a other.layers.Linear, not an nn.Linear"

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

    def test_what_a_module_keeps_is_its_own(self):
        class Keeps(Mlp):
            def __init__(self):
                super().__init__()
                self.cache, self.seen = {}, []

            def forward(self, x):
                self.seen.append(x.shape)
                ramp = self.cache.setdefault(x.shape[-1], torch.linspace(1, 2, x.shape[-1], dtype=x.dtype))
                return self.fc2(self.fc1(x * ramp).tanh())

        model = nn.Sequential(Keeps(), Keeps())
        assert [site.form for site in ewa.find_ffns(model)] == ["pair", "pair"]
        assert (model[0].cache, model[0].seen) == ({}, [])

    def test_random_state_is_kept_when_a_module_is_refused(self):
        state = random.getstate()
        (site,) = ewa.find_ffns(nn.Sequential(PythonLayerDrop()))
        assert site.layout is None
        assert random.getstate() == state

    def test_numpys_numbers(self):
        """They are put back, and are the same for each module."""

        class Skips(Mlp):
            def forward(self, x):
                return super().forward(x) if numpy.random.random() > 0.5 or not self.training else x

        before = numpy.random.get_state()[1].tolist()
        reasons = {site.skip_reason for site in ewa.find_ffns(nn.Sequential(*(Skips() for _ in range(6))))}
        assert len(reasons) == 1
        assert numpy.random.get_state()[1].tolist() == before

    def test_other_modules_are_not_listed(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.LayerNorm(8))
        assert ewa.find_ffns(model) == []

    def test_frozen_16_bit_and_meta(self):
        model = Transformer(Mlp(), Mlp()).to(torch.bfloat16).requires_grad_(False)
        assert all(site.skip_reason is None for site in ewa.find_ffns(model))
        with torch.device("meta"):
            assert all(site.skip_reason is None for site in ewa.find_ffns(Transformer(Mlp(), Mlp())))


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
        assert site.skip_reason == "fc1.weight is no Parameter: it is computed from others"

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

    def test_shared_container(self, monkeypatch):
        class Apart(nn.Module):
            def __init__(self):
                super().__init__()
                self.i = nn.ModuleList([nn.Linear(8, 16)])
                self.o = nn.ModuleList([nn.Linear(16, 8)])

            def forward(self, x):
                return self.o[0](self.i[0](x).relu())

        monkeypatch.setattr(ffn_adapters, "_registered", [])
        ewa.register_ffn_adapter(Apart, up="i.0", down="o.0")
        model = Transformer(Apart(), Apart(), Apart())
        model.blocks[2].mlp.i = model.blocks[0].mlp.i
        reasons = [site.skip_reason for site in ewa.find_ffns(model)]
        assert reasons == ["shares with another module: i", None, "shares with another module: i"]

    def test_compiled(self):
        model = Transformer(Mlp(), Mlp(), Mlp())
        model.blocks[0].mlp = torch.compile(model.blocks[0].mlp)
        model.blocks[1].mlp.compile()
        assert {site.name: site.skip_reason for site in ewa.find_ffns(model)} == {
            "blocks.0.mlp._orig_mod": "is compiled: call replace_ffn_ before torch.compile",
            "blocks.1.mlp": "is compiled: call replace_ffn_ before compile()",
            "blocks.2.mlp": None,
        }

    @pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
    def test_hooks_of_a_parameter(self, kind):
        model = Transformer(Mlp())
        getattr(model.blocks[0].mlp.fc1.weight, kind)(lambda *_: None)
        assert ewa.find_ffns(model)[0].skip_reason == "has hooks that would be lost, on fc1.weight"

    def test_in_training_mode_in_part(self):
        model = Transformer(Mlp(drop=0.1))
        model.blocks[0].mlp.fc1.eval()
        assert ewa.find_ffns(model)[0].skip_reason == "is in training mode in part only"

    def test_root(self):
        """Nothing holds it that could hold a layer."""
        (site,) = ewa.find_ffns(Mlp())
        assert (site.name, site.form, site.skip_reason) == ("", "pair", None)

    def test_already_replaced(self):
        """Once more replaces nothing more, and says so; a filter decides."""
        model = Transformer(*(Mlp() for _ in range(4)))
        ewa.replace_ffn_(model)
        with pytest.warns(
            UserWarning, match="replaced nothing more: it has experts already; fold_ it, or give a filter"
        ):
            report = ewa.replace_ffn_(model)
        assert report.skipped == {f"blocks.{i}.mlp": "has experts already" for i in (1, 3)}
        assert report.kept == ("blocks.0.mlp", "blocks.2.mlp")
        assert ewa.replace_ffn_(model, filter_fn=lambda name, _: "0" in name).replaced == ("blocks.0.mlp",)

    def test_skipped_is_searched_inside(self):
        outer = Residual()
        outer.fc1 = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        names = {site.name: site.skip_reason for site in ewa.find_ffns(nn.Sequential(outer))}
        assert names == {"0": "fc1 is a Sequential, not an nn.Linear", "0.fc1": None}


@pytest.mark.parametrize(("ffn", "reason"), PAIRS, ids=[type(ffn).__name__ for ffn, _ in PAIRS])
def test_what_only_a_pair_can_stand_for(registered, ffn, reason):
    """The fused layer would compute something else, and the FFN's own code does not."""
    model = nn.Sequential(Block(ffn)).eval()
    (site,) = ewa.find_ffns(model)
    assert (site.skip_reason, site.form) == (None, "pair")
    with pytest.raises(NotReplaceableError, match=re.escape(reason)):
        execution.layout_of(ffn, site.projections.up, site.projections.down)
    x = tokens(2, 3, 8)
    expected = model(x)
    ewa.replace_ffn_(model, filter_fn=lambda *_: True)
    for actual, own in zip(outputs(model(x)), outputs(expected), strict=True):
        assert torch.equal(actual, own)


def outputs(value):
    return value if isinstance(value, tuple) else (value,)


class OwnGELU(nn.Module):
    """With a constant in float32."""

    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(torch.sqrt(torch.tensor(2.0 / torch.pi)) * (x + 0.044715 * x**3)))


class RoundedGELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


class Float32GELU(nn.Module):
    def forward(self, x):
        return nn.functional.gelu(x.float()).type_as(x)


class TestComputesAnFFN:
    """However it is written."""

    @pytest.mark.parametrize(
        ("act", "activation"), [(OwnGELU, "gelu_tanh"), (RoundedGELU, "gelu_tanh"), (Float32GELU, "gelu")]
    )
    def test_float32_in_its_activation(self, act, activation):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            assert layout_of(Mlp(300, 1200, act=act).to(dtype)).activation == activation

    def test_arguments_that_nobody_gives(self):
        class Old(Mlp):
            def forward(self, x, identity=None, scale: float = 1.0, *args, **kwargs):
                return super().forward(x)

        model = nn.Sequential(Old(), Old())
        ewa.replace_ffn_(model)
        x = tokens(2, 3, 8)
        y = model.eval()[1](x)
        for args, kwargs in (((None,), {}), ((None, 1.0), {}), ((), {"identity": None, "scale": 1.0})):
            assert torch.equal(model[1](x, *args, **kwargs), y)
        for args, kwargs, told in (((x,), {}, "identity"), ((), {"scale": 2.0}, "scale"), ((None, 1.0, 3), {}, "args")):
            with pytest.raises(TypeError, match=f"but for seed nothing else, got {told}"):
                model[1](x, *args, **kwargs)

    def test_a_forward_that_came_and_went(self):
        """accelerate puts the class's own back as an attribute when its hook is removed."""
        ffn = Mlp()
        ffn.forward = ffn.forward
        model, x = nn.Sequential(ffn).eval(), tokens(2, 3, 8)
        expected = model(x)
        ewa.replace_ffn_(model, filter_fn=lambda *_: True)
        with torch.no_grad():
            model[0].down.weight.mul_(2)
        assert not torch.equal(model(x), expected)
        ffn = Mlp()
        ffn.forward = lambda x: x
        assert "has a forward of its own" in ewa.find_ffns(nn.Sequential(ffn))[0].skip_reason

    def test_members_that_know_their_parent(self):
        class Member(Mlp):
            def __init__(self, parent):
                super().__init__()
                self.parent = [parent]

        class Parent(nn.Module):
            def __init__(self):
                super().__init__()
                self.ffns = nn.ModuleList()
                self.ffns.extend(Member(self) for _ in range(2))

            def forward(self, x):
                return self.ffns[1](self.ffns[0](x))

        model = nn.Sequential(Parent())
        assert ewa.replace_ffn_(model).replaced == ("0.ffns.1",)
        model(tokens(2, 3, 8)).sum().backward()
        ewa.fold_(model)
        assert isinstance(model[0].ffns[1], Member)
