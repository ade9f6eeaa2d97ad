"""What is an FFN, what it computes, and why something is none."""

import copy
import random
import resource
import sys

import pytest
import torch
from models import Block, Mlp, MLPBlock, PackedGLU, PointMlp, SwiGLU, Transformer, tokens
from not_ffns import SKIPPED, PythonLayerDrop, Residual
from torch import nn
from torch.nn.utils import parametrizations

import ewa_kernels as ewa
from ewa_kernels.surgery import adapters, probe


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
        run = probe._run
        monkeypatch.setattr(probe, "_run", lambda module, x: widths.append(x.shape[-1]) or run(module, x))
        for ffn in (Mlp(64, 128, drop=0.1), PackedGLU(64, 128, drop=0.1)):
            widths.clear()
            layout = layout_of(ffn)
            assert layout.dropout == 0.1
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

        assert (layout_of(Functional(0.2)).dropout, layout_of(Functional(0.0)).dropout) == (0.2, 0.0)

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

    def test_another_librarys_linear(self):
        ffn = Mlp()
        ffn.fc1.__class__ = type("Linear", (nn.Linear,), {"__module__": "other.layers"})
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

    def test_random_state_is_kept_when_a_module_is_refused(self):
        state = random.getstate()
        (site,) = ewa.find_ffns(nn.Sequential(PythonLayerDrop()))
        assert site.skip_reason is not None
        assert random.getstate() == state

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

    def test_shared_container(self, monkeypatch):
        class Apart(nn.Module):
            def __init__(self):
                super().__init__()
                self.i = nn.ModuleList([nn.Linear(8, 16)])
                self.o = nn.ModuleList([nn.Linear(16, 8)])

            def forward(self, x):
                return self.o[0](self.i[0](x).relu())

        monkeypatch.setattr(adapters, "_registered", [])
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
