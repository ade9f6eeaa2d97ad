"""What `find_experts` takes for experts, by which rule, and what it leaves alone."""

import random

import pytest
import timm
import torch
import transformers
from experts_zoo import (
    TINY,
    Chain,
    DeepSpeed,
    Dictionary,
    FastMoE,
    List,
    Lucidrains,
    Nested,
    Net,
    Parents,
    Soft,
    Tutorial,
)
from models import Mlp, Transformer
from moe_blocks import DeepSeek, Mixtral, Qwen
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ewa_kernels as ewa
from ewa_kernels.models import experts, experts_adapters


@pytest.fixture(autouse=True)
def _registrations(monkeypatch):
    monkeypatch.setattr(experts_adapters, "_registered", [])


def found(model):
    return [site for site in ewa.find_experts(model) if site.skip_reason is None]


def reason(model):
    (site,) = ewa.find_experts(model)
    assert not site.tensors
    return site.skip_reason


def taught(model):
    """The sites, after the line that the report prints was executed."""
    (line,) = {site.skip_reason.partition(": ")[2].partition(" says")[0] for site in ewa.find_experts(model)}
    exec(line, {"ewa": ewa, **{type(module).__name__: type(module) for module in model.modules()}})
    return found(model)


def mixtral(**options):
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TINY, num_local_experts=4, **options))


class TestLists:
    @pytest.mark.parametrize(
        ("make", "path", "holder"),
        [
            (Mixtral, "experts", ""),
            (Qwen, "experts", ""),
            (DeepSeek, "experts", ""),
            (lambda: Tutorial(Net), "experts", ""),
            (Dictionary, "experts", ""),
            (Nested, "mixture.experts", ""),
            (Parents, "experts", ""),
        ],
    )
    def test_found_by_their_name(self, make, path, holder):
        model = nn.Sequential(nn.LayerNorm(8), make(), make())
        sites = found(model)
        assert [site.name for site in sites] == [f"1.{path}", f"2.{path}"]
        for number, site in enumerate(sites, 1):
            assert (site.kind, site.holder, site.module) == ("list", str(number), model.get_submodule(site.name))
            members = list(site.module.children())
            assert len(site.tensors) == len(list(members[0].parameters()))
            for group in zip(*(member.parameters() for member in members), strict=True):
                ours = next(tensors for tensors in site.tensors.values() if tensors[0] is group[0])
                assert all(a is b for a, b in zip(ours, group, strict=True))

    def test_names_of_tensors(self):
        (site,) = found(nn.Sequential(Dictionary()))
        assert next(iter(site.paths)) == "0.experts.*.fc1.weight"
        assert site.paths["0.experts.*.fc1.weight"][1] == "0.experts.expert_1.fc1.weight"

    @pytest.mark.parametrize(
        "make",
        [
            lambda: timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=4, num_heads=2, img_size=32),
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 4, enable_nested_tensor=False),
            lambda: Transformer(Mlp(), Mlp(), Mlp(), Mlp()),
            lambda: nn.ModuleList([]),
            lambda: nn.Sequential(Chain(), Soft(), DeepSpeed(), List(), FastMoE()),
        ],
        ids=["ViT", "torch", "stack", "empty", "other names"],
    )
    def test_nothing_looks_like_experts(self, make):
        assert ewa.find_experts(make()) == []

    def test_experts_that_are_not_alike(self):
        model = Tutorial()
        model.experts[2] = Mlp(d_ff=20)
        assert reason(model) == "holds modules whose tensors differ: 0 and 2"
        model.experts[2] = model.experts[2].to(torch.bfloat16)
        assert reason(model) == "holds modules whose tensors differ: 0 and 2"
        model.experts[2] = Net()
        assert reason(model) == "holds a Mlp and a Net"
        model.experts = nn.ModuleList([Mlp()])
        assert reason(model) == "holds fewer than two modules"
        model.experts = nn.ModuleList([nn.Identity(), nn.Identity()])
        assert reason(model) == "holds modules without parameters"

    def test_inside_of_wrappers(self):
        """Which say otherwise how their parameters are called."""
        layers = (Tutorial() for _ in range(3))
        wrappers = (checkpoint_wrapper, nn.parallel.DataParallel, torch.compile)
        model = nn.Sequential(*(wrapper(layer) for wrapper, layer in zip(wrappers, layers, strict=True)))
        model.append(Tutorial(lambda: checkpoint_wrapper(Mlp())))
        prefixes = ("0._checkpoint_wrapped_module", "1.module", "2._orig_mod", "3")
        sites = found(model)
        assert [site.name for site in sites] == [f"{prefix}.experts" for prefix in prefixes]
        assert [len(site.tensors) for site in sites] == [4, 4, 4, 4]

    def test_shared_members(self):
        model = Tutorial()
        model.experts[2] = model.experts[1]
        assert reason(model) == "shares with another module: 1"
        model = Tutorial()
        model.experts[2].fc1.weight = model.experts[1].fc1.weight
        assert reason(model) == "shares with another module: 1.fc1.weight, 2.fc1.weight"
        model = Tutorial()
        model.first = model.experts[0].fc1
        assert reason(model) == "shares with another module: 0.fc1"
        model = Tutorial()
        for expert in model.experts:
            expert.act = model.experts[0].act  # without parameters
        assert found(model)

    def test_nothing_is_run_or_touched(self):
        model = Parents()
        model.forward = model.experts[0].forward = None
        state, numbers = model.state_dict(), (torch.get_rng_state(), random.getstate())
        assert len(found(model.to("meta"))) == len(found(model.to(torch.bfloat16))) == 1
        assert torch.equal(torch.get_rng_state(), numbers[0])
        assert random.getstate() == numbers[1]
        assert list(model.state_dict()) == list(state)


@pytest.mark.filterwarnings("ignore::FutureWarning")
class TestPeft:
    """Wraps modules, parameters and whole lists."""

    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    def test_linears_in_lists(self, peft):
        model = peft.get_peft_model(nn.Sequential(Mixtral()), peft.LoraConfig(target_modules=["w1", "w2"]))
        averager = ewa.ExpertAverager(model, 0.75)
        names = {f"base_model.model.0.experts.*.{w}.lora_{ab}.default.weight" for w in ("w1", "w2") for ab in "AB"}
        assert set(averager.spread()) == names
        averager.step()
        assert max(averager.spread().values()) < 1e-6

    def test_stacked_parameters(self, peft):
        config = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj"], target_modules=["q_proj"])
        sites = found(peft.get_peft_model(mixtral(), config))
        prefix = "base_model.model.model.layers.0.mlp.experts.base_layer"
        assert list(sites[0].tensors) == [f"{prefix}.gate_up_proj", f"{prefix}.down_proj"]

    def test_whole_modules(self, peft):
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"])
        model = peft.get_peft_model(mixtral(), config)
        assert all(site.skip_reason is None for site in ewa.find_experts(model))
        assert len(ewa.ExpertAverager(model, 0.3).spread()) == 4


class TestStacked:
    @pytest.mark.parametrize(
        ("make", "names"),
        [
            (mixtral, ("gate_up_proj", "down_proj")),
            (
                lambda: transformers.GptOssForCausalLM(
                    transformers.GptOssConfig(**TINY, num_local_experts=4, head_dim=8)
                ),
                ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"),
            ),
        ],
        ids=["Mixtral", "GPT-OSS"],
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


class TestRegistered:
    def test_stacked_parameters_by_the_line_that_is_printed(self):
        model = nn.Sequential(Lucidrains())
        assert reason(model) == (
            "has stacked tensors that may be experts: ewa.register_experts_adapter(Lucidrains, up='w1', down='w2') "
            "says that they are"
        )
        (site,) = taught(model)
        assert (site.kind, list(site.tensors)) == ("Lucidrains", ["0.w1", "0.w2"])

    def test_stacked_in_children(self):
        ewa.register_experts_adapter(FastMoE, up="htoh4", down="h4toh", kind="fastmoe")
        (site,) = found(FastMoE())
        assert site.kind == "fastmoe"
        assert list(site.tensors) == ["htoh4.weight", "htoh4.bias", "h4toh.weight", "h4toh.bias"]
        ewa.register_experts_adapter(FastMoE, up=["htoh4.weight", "htoh4.bias"], down="h4toh.weight")
        assert list(found(FastMoE())[0].tensors) == ["htoh4.weight", "htoh4.bias", "h4toh.weight"]

    @pytest.mark.parametrize("argument", ["experts", "members"])
    @pytest.mark.parametrize(
        ("make", "path"), [(DeepSpeed, "deepspeed_experts"), (Soft, "fs"), (Nested, "mixture.experts"), (List, "")]
    )
    def test_separate_modules(self, make, path, argument):
        """Lists under other names, and one that is the layer."""
        ewa.register_experts_adapter(make, **{argument: path})
        (site,) = found(nn.Sequential(make()))
        assert (site.name, site.kind, site.holder) == (f"0.{path}".rstrip("."), make.__name__, "0")
        members = list(site.module.children())
        assert [len(group) for group in site.tensors.values()] == [4] * 4
        assert next(iter(site.tensors.values()))[2] is next(members[2].parameters())

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
        ewa.register_experts_adapter(Mlp, up="fc1", down="fc2")
        assert reason(Mlp(d_ff=16)).startswith("must have tensors [E, ...] of the same E ≥ 2, has fc1.weight [16, 8]")
        ewa.register_experts_adapter(DeepSpeed, experts="wg")
        assert reason(DeepSpeed()) == "holds fewer than two modules"

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ({"up": "w1", "down": "w2", "module_class": 3}, TypeError, "module_class must be a subclass of nn.Module"),
            ({"up": "w1"}, ValueError, r"up and down, or experts, must be given, got up='w1', down=\(\)"),
            ({}, ValueError, "up and down, or experts, must be given"),
            ({"up": "w1", "down": "w2", "experts": "m"}, ValueError, "up and down, or experts, must be given"),
            ({"members": "m", "experts": "m"}, ValueError, "members is an older name of experts: one must be given"),
            ({"up": "w1", "down": "w2", "router": "gate"}, ValueError, "top_k needs router, and router experts"),
            ({"experts": "m", "top_k": 2}, ValueError, "top_k needs router, and router experts"),
            ({"experts": "m", "router": "gate", "top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
            ({"experts": "m", "router": "gate", "top_k": 1.5}, TypeError, "top_k must be an int, got float 1.5"),
            ({"up": 3, "down": "w2"}, TypeError, "up must be a name, or several of up and down, got 3"),
            ({"experts": 3}, TypeError, "experts must be a name, or several of up and down, got"),
            ({"experts": "m", "router": nn.Linear}, TypeError, "router must be a name, or several of up and down, got"),
        ],
    )
    def test_bad_arguments(self, arguments, kind, message):
        with pytest.raises(kind, match=message):
            ewa.register_experts_adapter(**({"module_class": Lucidrains} | arguments))


def test_members_of_lists_and_all_in_them():
    model = nn.Sequential(Tutorial(Net), Chain(), Tutorial())
    model[2].experts[1] = Net()  # unlike the others, but called an expert
    reasons = experts.members_of_lists(model)
    assert reasons[model[0].experts[1].net] == "is one of the experts of 0.experts"
    assert reasons[model[2].experts[0]] == "is one of the experts of 2.experts"
    assert model[1].fs[0] not in reasons
    ewa.register_experts_adapter(Chain, experts="fs")
    assert experts.members_of_lists(model)[model[1].fs[0]] == "is one of the experts of 1.fs"


def test_no_module():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        ewa.find_experts(3)
