"""What `find_experts` takes for experts, and what it does not."""

import copy
import random
import types

import pytest
import timm
import torch
import transformers
from experts_zoo import (
    EXPERTS,
    NO_EXPERTS,
    TINY,
    Chain,
    DeepSpeed,
    FastMoE,
    Glu,
    Lucidrains,
    Mixtral4,
    Switch,
    Tutorial,
)
from models import Mlp, Transformer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ewa_kernels as ewa
from ewa_kernels.moe import adapters, experts, trial


@pytest.fixture(autouse=True)
def _registrations(monkeypatch):
    monkeypatch.setattr(adapters, "_registered", list(adapters._registered))


def found(model):
    return [site for site in ewa.find_experts(model) if site.skip_reason is None]


def reason(model):
    (site,) = ewa.find_experts(model)
    assert not site.tensors
    return site.skip_reason


def mixtral(**options):
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TINY, num_local_experts=4, **options))


class TestLists:
    @pytest.mark.parametrize("name", EXPERTS)
    def test_found_where_they_are(self, name):
        make, path, router = EXPERTS[name]
        model = nn.Sequential(nn.LayerNorm(8), make(), make())
        sites = found(model)
        assert [site.name for site in sites] == [f"1.{path}".rstrip("."), f"2.{path}".rstrip(".")]
        for number, site in enumerate(sites, 1):
            assert (site.kind, site.holder, site.module) == ("list", str(number), model.get_submodule(site.name))
            assert site.router == tuple(f"{number}.{tensor}" for tensor in router)
            members = list(site.module.children())
            assert len(site.tensors) == len(list(members[0].parameters()))
            for group in zip(*(member.parameters() for member in members), strict=True):
                ours = next(tensors for tensors in site.tensors.values() if tensors[0] is group[0])
                assert all(a is b for a, b in zip(ours, group, strict=True))

    def test_says_what_each_expert_computes(self):
        layout = found(Mixtral4())[0].layout
        assert (layout.up, layout.down, layout.gated, layout.activation) == (("w1", "w3"), "w2", True, "silu")
        layout = found(Tutorial(Mlp))[0].layout
        assert (layout.up, layout.down, layout.gated, layout.activation) == (("fc1",), "fc2", False, "gelu")

    def test_names_of_tensors(self):
        (site,) = found(nn.Sequential(Switch()))
        assert next(iter(site.paths)) == "0.experts.*.fc1.weight"
        assert site.paths["0.experts.*.fc1.weight"][1] == "0.experts.expert_1.fc1.weight"

    @pytest.mark.parametrize("name", NO_EXPERTS)
    def test_what_is_none(self, name):
        make, expected = NO_EXPERTS[name]
        model = make()
        (site,) = [site for site in ewa.find_experts(model) if site.module is not model]
        assert site.skip_reason.startswith(expected)
        assert not found(nn.Sequential(make(), make()))

    @pytest.mark.parametrize(
        "make",
        [
            lambda: timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=4, num_heads=2, img_size=32),
            lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, depths=(2, 2), num_heads=(2, 4)),
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 4, enable_nested_tensor=False),
            lambda: Transformer(Mlp(), Mlp(), Mlp(), Mlp()),
            lambda: nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(4)) for _ in range(4)),
            lambda: nn.ModuleList([]),
        ],
        ids=["ViT", "Swin", "torch", "stack", "lists", "empty"],
    )
    def test_nothing_looks_like_experts(self, make):
        assert ewa.find_experts(make()) == []

    def test_experts_that_are_not_alike(self):
        model = Tutorial(Mlp)
        model.experts[2].act = nn.ReLU()
        assert reason(model) == "holds FFNs that do not all compute the same"
        model.experts[2] = Mlp(d_ff=20)
        assert reason(model) == "holds modules whose tensors differ: 0 and 2"
        model.experts[2] = Glu()
        assert reason(model) == "holds a Mlp and a Glu"

    def test_inside_of_wrappers(self):
        """Which say otherwise how their parameters are called."""
        layers = (Tutorial(Mlp) for _ in range(3))
        wrappers = (checkpoint_wrapper, nn.parallel.DataParallel, torch.compile)
        model = nn.Sequential(*(wrapper(layer) for wrapper, layer in zip(wrappers, layers, strict=True)))
        prefixes = ("0._checkpoint_wrapped_module", "1.module", "2._orig_mod")
        sites = found(model)
        assert [site.name for site in sites] == [f"{prefix}.experts" for prefix in prefixes]
        assert [len(site.tensors) for site in sites] == [4, 4, 4]
        assert reason(Tutorial(lambda: checkpoint_wrapper(Mlp()))).startswith("holds modules that cannot be examined")

    def test_shared_members(self):
        model = Tutorial(Mlp)
        model.experts[2] = model.experts[1]
        assert reason(model).startswith("shares with another module")
        model = Tutorial(Mlp)
        model.experts[2].fc1.weight = model.experts[1].fc1.weight
        assert reason(model) == "shares with another module: 1.fc1.weight, 2.fc1.weight"

    def test_no_ffns(self):
        model = Tutorial(lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
        assert reason(model) == "holds modules each of which is no FFN of two or three nn.Linear alone"

    def test_holder_that_needs_more_than_tokens(self):
        class Masked(Tutorial):
            def forward(self, x, mask):
                return super().forward(x * mask)

        assert reason(Masked()).startswith("Masked fails on one tensor [2, 16, D]: TypeError")

    def test_holder_that_reads_weights_itself(self):
        class Stacks(Tutorial):
            def forward(self, x):
                weight = torch.stack([expert[0].weight for expert in self.experts])
                return torch.einsum("...d,efd,...e->...f", x, weight, self.gate(x))

        assert reason(Stacks()) == "Stacks does not call its modules"

    def test_forward_of_another_object(self):
        model = Tutorial()
        model.forward = types.MethodType(Tutorial.forward, model)
        assert found(model)
        model.forward = lambda x: Tutorial.forward(model, x)
        assert reason(model) == "Tutorial holds a forward that leads to the original"
        assert model.loads == []

    def test_alike_layers_are_tried_once(self, monkeypatch):
        tried = []
        make = trial.Trial.__init__
        monkeypatch.setattr(trial.Trial, "__init__", lambda self, *args: tried.append(args) or make(self, *args))
        layers = [Tutorial(Mlp) for _ in range(6)]
        layers[3].experts.requires_grad_(False)
        layers[4].gate = nn.Linear(8, 4, bias=False)
        assert len(found(nn.Sequential(*layers))) == 6
        assert len(tried) == 2

    def test_on_meta_in_half_precision_and_many(self):
        for model in (Tutorial(Mlp).to("meta"), Tutorial(Mlp).to(torch.bfloat16), Tutorial(Mlp).double()):
            assert len(found(model)) == 1
        wide = Tutorial(Mlp)
        wide.experts = nn.ModuleList(Mlp() for _ in range(128))
        wide.gate = nn.Linear(8, 128)
        assert found(wide)[0].router == ("gate.weight", "gate.bias")


class TestNothingIsTouched:
    @pytest.mark.parametrize("name", EXPERTS)
    def test_model_generators_and_gradients(self, name):
        model = EXPERTS[name][0]()
        called = []
        for module in model.modules():
            module.register_forward_hook(lambda *_: called.append(1))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        state, grads = copy.deepcopy(model.state_dict()), {n: p.grad for n, p in model.named_parameters()}
        modules, parameters = list(model.named_modules()), list(model.named_parameters())
        numbers = torch.get_rng_state(), random.getstate()
        with torch.random.fork_rng():
            assert found(model)
            assert torch.equal(torch.get_rng_state(), numbers[0])
        assert random.getstate() == numbers[1]
        assert torch.get_default_dtype() is torch.float32
        assert list(model.named_modules()) == modules
        assert all(a[1] is b[1] for a, b in zip(model.named_parameters(), parameters, strict=True))
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert all(p.grad is grads[n] and bool((p.grad == 1).all()) for n, p in model.named_parameters())
        assert all(module.training for module in model.modules())
        assert called == []
        assert getattr(model, "loads", []) == []


class TestStacked:
    @pytest.mark.parametrize(
        ("make", "names"),
        [
            (mixtral, ("gate_up_proj", "down_proj")),
            (
                lambda: transformers.Qwen2MoeForCausalLM(
                    transformers.Qwen2MoeConfig(
                        **TINY,
                        num_experts=4,
                        num_experts_per_tok=2,
                        moe_intermediate_size=12,
                        shared_expert_intermediate_size=10,
                    )
                ),
                ("gate_up_proj", "down_proj"),
            ),
            (
                lambda: transformers.OlmoeForCausalLM(
                    transformers.OlmoeConfig(**TINY, num_experts=4, num_experts_per_tok=2)
                ),
                ("gate_up_proj", "down_proj"),
            ),
            (
                lambda: transformers.GptOssForCausalLM(
                    transformers.GptOssConfig(**TINY, num_local_experts=4, head_dim=8)
                ),
                ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"),
            ),
        ],
        ids=["Mixtral", "Qwen2-MoE", "OLMoE", "GPT-OSS"],
    )
    def test_transformers_5(self, make, names):
        model = make()
        sites = found(model)
        assert [site.name for site in sites] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
        for site in sites:
            assert site.kind == "stacked"
            assert tuple(site.tensors) == tuple(f"{site.name}.{name}" for name in names)
            assert all(tensor is model.get_parameter(name) for name, tensor in site.tensors.items())

    def test_refused(self):
        experts = mixtral().model.layers[0].mlp.experts
        experts._is_expert_parallel = True
        assert reason(experts) == "has a part of the experts only: the others are in other processes"
        experts._is_expert_parallel = False
        experts.down_proj = nn.Parameter(experts.down_proj.detach().transpose(1, 2))
        assert reason(experts) == "has gate_up_proj [4, 48, 16] and down_proj [4, 24, 16], which do not fit"
        experts.down_proj = nn.Parameter(torch.zeros(4, 16, 24, dtype=torch.float8_e4m3fn), requires_grad=False)
        assert reason(experts) == "has torch.float8_e4m3fn down_proj, which cannot be averaged"
        experts.down_proj = nn.Parameter(torch.zeros(7))
        assert reason(experts).startswith("must have tensors [E, ...] of the same E ≥ 2, has gate_up_proj [4, 48, 16]")
        del experts.down_proj
        assert reason(experts) == "has no 'down_proj'"

    @pytest.mark.parametrize("kind", [ewa.RandomPartitionMoE, ewa.RoutedMoE])
    def test_layers_of_this_package(self, kind):
        model = nn.Sequential(kind(8, 12, 4))
        (site,) = found(model)
        assert (site.name, site.kind) == ("0", kind.__name__)
        assert list(site.tensors) == ["0.up.weight", "0.up.bias", "0.down.weight", "0.down.bias"]
        assert list(found(model[0])[0].tensors) == ["up.weight", "up.bias", "down.weight", "down.bias"]

    def test_unknown(self):
        """A stack of tensors alone is no proof."""
        assert reason(Lucidrains()) == (
            "has stacked tensors that may be experts: register_experts_adapter(Lucidrains, up='w1', down='w2') says "
            "that they are"
        )


class TestRegistered:
    def test_stacked_parameters(self):
        ewa.register_experts_adapter(Lucidrains, up="w1", down="w2")
        (site,) = found(nn.Sequential(Lucidrains()))
        assert (site.kind, list(site.tensors)) == ("Lucidrains", ["0.w1", "0.w2"])

    def test_stacked_in_children(self):
        ewa.register_experts_adapter(FastMoE, up="htoh4", down="h4toh", kind="fastmoe")
        (site,) = found(FastMoE())
        assert site.kind == "fastmoe"
        assert list(site.tensors) == ["htoh4.weight", "htoh4.bias", "h4toh.weight", "h4toh.bias"]
        ewa.register_experts_adapter(FastMoE, up=["htoh4.weight", "htoh4.bias"], down="h4toh.weight")
        assert list(found(FastMoE())[0].tensors) == ["htoh4.weight", "htoh4.bias", "h4toh.weight"]

    def test_members(self):
        assert reason(DeepSpeed()).startswith("holds modules each of which is no FFN")
        ewa.register_experts_adapter(DeepSpeed, members="deepspeed_experts")
        (site,) = found(nn.Sequential(DeepSpeed()))
        assert next(iter(site.tensors)) == "0.deepspeed_experts.*.0.weight"
        assert [len(group) for group in site.tensors.values()] == [4] * 4

    def test_later_ones_and_subclasses(self):
        class Mine(Lucidrains):
            pass

        ewa.register_experts_adapter(Lucidrains, up="w1", down="w2")
        assert found(Mine())[0].kind == "Lucidrains"
        ewa.register_experts_adapter(Mine, up="w1", down="w2")
        assert [site.kind for site in found(nn.Sequential(Mine(), Lucidrains()))] == ["Mine", "Lucidrains"]

    def test_what_is_registered_wrongly(self):
        ewa.register_experts_adapter(Lucidrains, up="w1", down="w3")
        assert reason(Lucidrains()) == "has no 'w3'"
        ewa.register_experts_adapter(Glu, up="w1", down="w2")
        assert reason(Glu()) == "must have tensors [E, ...] of the same E ≥ 2, has w1.weight [12, 8], w2.weight [8, 12]"
        ewa.register_experts_adapter(DeepSpeed, members="wg")
        assert reason(DeepSpeed()) == "holds fewer than two modules"

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ({"up": "w1", "down": "w2", "module_class": 3}, TypeError, "module_class must be a subclass of nn.Module"),
            ({"up": "w1"}, ValueError, "up and down, or members, must be given, got up='w1', down=()"),
            ({}, ValueError, "up and down, or members, must be given"),
            ({"up": "w1", "down": "w2", "members": "m"}, ValueError, "up and down, or members, must be given"),
            ({"up": 3, "down": "w2"}, TypeError, "up must be a name, or several of up and down, got 3"),
            ({"members": 3}, TypeError, r"members must be a name, or several of up and down, got \(3,\)"),
        ],
    )
    def test_bad_arguments(self, arguments, kind, message):
        with pytest.raises(kind, match=message):
            ewa.register_experts_adapter(**({"module_class": Lucidrains} | arguments))


def test_members_of_lists_and_all_in_them():
    model = nn.Sequential(EXPERTS["tutorial, nested FFN"][0](), Chain(), DeepSpeed())
    reasons = experts.members_of_lists(model)
    assert reasons[model[0].experts[1].net] == "is one of the experts of 0.experts"
    assert reasons[model[2].deepspeed_experts[0]] == "is one of the experts of 2.deepspeed_experts"
    assert model[1].fs[0] not in reasons


def test_no_module():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        ewa.find_experts(3)
