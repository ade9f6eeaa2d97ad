"""`ExpertAverager` on experts that this package did not make: means are kept, spreads contract, routers do not move."""

import copy
import pickle
from functools import partial

import pytest
import torch
import transformers
from experts_zoo import TINY, Chain, Dictionary, FastMoE, Lucidrains, Net, Parents, Soft, Tutorial
from models import Mlp
from moe_blocks import Mixtral, Qwen, register_all
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ewa_kernels as ewa
from ewa_kernels.models import experts_adapters
from ewa_kernels.train import found

SIZES = {**TINY, "num_experts_per_tok": 2}


class Pick(nn.Module):
    """y of (y, logits)."""

    def forward(self, outputs):
        return outputs[0]


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


def qwen2_moe():
    sizes = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 10}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SIZES, **sizes, num_experts=4))


def olmoe():
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**SIZES, num_experts=4))


def two(make):
    return nn.Sequential(nn.LayerNorm(8), make(), make())


# model, and how many tensors (or lists of them) it has to average
MODELS = {
    "RoutedMoE": (partial(two, lambda: ewa.RoutedMoE(8, 12, 4, top_k=2)), 8),
    "Mixtral": (mixtral, 4),
    "Qwen2-MoE": (qwen2_moe, 4),
    "OLMoE": (olmoe, 4),
    "Mixtral 4": (partial(two, Mixtral), 6),
    "Qwen 4": (partial(two, Qwen), 6),
    **{make.__name__: (partial(two, make), 8) for make in (Tutorial, Dictionary, Parents, Soft)},
    "nested FFN": (partial(two, lambda: Tutorial(Net)), 8),
    "lucidrains": (partial(two, Lucidrains), 4),
    "fastmoe": (partial(two, FastMoE), 8),
}


@pytest.fixture(autouse=True)
def _registrations(monkeypatch):
    monkeypatch.setattr(experts_adapters, "_registered", [])
    register_all()
    ewa.register_experts_adapter(Soft, experts="fs")
    ewa.register_experts_adapter(Lucidrains, up="w1", down="w2")
    ewa.register_experts_adapter(FastMoE, up="htoh4", down="h4toh")


def stacked(group):
    return group.detach() if isinstance(group, torch.Tensor) else torch.stack(list(group)).detach()


@torch.no_grad()
def randomize(model):
    """Distinct experts, biases too."""
    for parameter in model.parameters():
        parameter.normal_()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_means_are_kept_spreads_contract_and_all_else_stays(name):
    make, num_groups = MODELS[name]
    model, beta = randomize(make().double()), 0.3
    averager = ewa.ExpertAverager(model, beta)
    groups = averager.experts()
    assert len(groups) == num_groups
    before, spreads = [stacked(group).clone() for group in groups], averager.spread()
    averaged = {t for group in groups for t in ([group] if isinstance(group, torch.Tensor) else group)}
    others = {n: p.detach().clone() for n, p in model.named_parameters() if p not in averaged}
    assert others  # the norm at least
    for step in (1, 2, 3):
        averager.step()
        factor = (1 - beta * 4 / 3) ** step
        for group, old in zip(groups, before, strict=True):
            now, mean = stacked(group), old.mean(0)
            torch.testing.assert_close(now.mean(0), mean, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(now - mean, factor * (old - mean), rtol=1e-12, atol=1e-12)
        for tensor, spread in averager.spread().items():
            assert spread == pytest.approx(factor * spreads[tensor], rel=1e-12)
    assert all(torch.equal(model.get_parameter(n), value) for n, value in others.items())


@pytest.mark.parametrize("name", ["RoutedMoE", "Mixtral", "Qwen2-MoE", "OLMoE", "Mixtral 4", "Tutorial"])
def test_one_pass_is_two(name, monkeypatch):
    """AdamW of this package, on lists too, gives what torch's and a step of the averager give, without taking them."""
    monkeypatch.setattr(ewa.optim.AdamW, "_step_by_torch", None)
    results = []
    torch.manual_seed(0)
    start = randomize(MODELS[name][0]())
    for ours in (False, True):
        model = copy.deepcopy(start)
        averager = ewa.ExpertAverager(model, ewa.LinearShareRate(0.3, 3))
        if ours:
            optimizer = ewa.optim.AdamW(model.parameters(), lr=1e-2, averager=averager)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
            averager.attach(optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        assert averager.num_steps == 4
        results.append(model.state_dict())
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value, rtol=1e-6, atol=1e-6)


def loss_of(model):
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, nn.Sequential):
        output = model(torch.randn(2, 5, 8, generator=generator))
        return (output[0] if isinstance(output, tuple) else output).square().mean()
    tokens = torch.randint(3, 50, (2, 6), generator=generator)
    return model(tokens, labels=tokens, output_router_logits=True).loss


@pytest.mark.parametrize("name", ["RoutedMoE", "Tutorial", "Mixtral"])
@pytest.mark.parametrize(("window", "inside"), [({"stop_step": 2}, {0, 1}), ({"start_step": 2}, {2, 3})])
def test_early_and_late_windows(name, window, inside):
    """Outside of the window training is that without an averager, to the bit."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    averager = ewa.ExpertAverager(model, ewa.ConstantShareRate(0.3, **window))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager.attach(optimizer)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model).backward()
        plain = copy.deepcopy({n: p.detach() - 0.1 * p.grad for n, p in model.named_parameters() if p.grad is not None})
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        routers = [n for n in before if "gate.weight" in n or "router" in n]
        assert routers
        optimizer.step()
        changed = {n for n, value in plain.items() if not torch.allclose(model.get_parameter(n), value, atol=1e-7)}
        assert bool(changed) == (step in inside)
        assert changed.isdisjoint(routers)
        assert any(not torch.equal(model.get_parameter(n), before[n]) for n in routers)  # which learns


class TestWhatIsAveraged:
    def test_filter(self):
        seen = []

        def second(name, module):
            seen.append((name, type(module)))
            return name.startswith("2")

        model = nn.Sequential(ewa.RandomPartitionMoE(8, 12, 4), Tutorial(), ewa.RoutedMoE(8, 12, 4), Tutorial())
        averager = ewa.ExpertAverager(model, 0.3, filter_fn=second)
        assert seen == [
            ("0", ewa.RandomPartitionMoE),
            ("1.experts", nn.ModuleList),
            ("2", ewa.RoutedMoE),
            ("3.experts", nn.ModuleList),
        ]
        averager.step()
        assert len(seen) == 4
        assert list(averager.spread()) == ["2.up.weight", "2.up.bias", "2.down.weight", "2.down.bias"]
        assert next(iter(pickle.loads(pickle.dumps(ewa.ExpertAverager(model[2], 0.3))).spread())) == "up.weight"
        averager = ewa.ExpertAverager(model, 0.3, filter_fn=lambda name, module: "experts" in name)
        assert list(averager.spread())[::4] == ["1.experts.*.fc1.weight", "3.experts.*.fc1.weight"]

    def test_filter_that_chooses_none_or_has_no_model(self):
        with pytest.raises(ValueError, match=r"filter_fn must choose some of 0, 1\.experts, chose none"):
            ewa.ExpertAverager(
                nn.Sequential(ewa.RoutedMoE(8, 12, 4), Tutorial()), 0.3, filter_fn=lambda name, module: False
            )
        with pytest.raises(TypeError, match=r"filter_fn must be a callable \(name, module\) -> bool, got str"):
            ewa.ExpertAverager(Tutorial(), 0.3, filter_fn="experts")
        with pytest.raises(TypeError, match="filter_fn needs experts that are a model, got list"):
            ewa.ExpertAverager([torch.randn(4, 3)], 0.3, filter_fn=lambda name, module: True)

    def test_frozen_tensors_are_left_alone(self):
        model = randomize(nn.Sequential(ewa.RandomPartitionMoE(8, 12, 4), Tutorial()))
        averager = ewa.ExpertAverager(model, 0.3)
        assert len(averager.experts()) == 8
        model[0].up.requires_grad_(False)
        model[1].experts[3].fc2.weight.requires_grad_(False)  # and so the group of its fellows
        before = copy.deepcopy(model.state_dict())
        averager.step()
        same = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
        expected = {"0.up.weight", "0.up.bias", "1.gate.weight", "1.gate.bias"}
        assert same == expected | {f"1.experts.{e}.fc2.weight" for e in range(4)}
        assert set(averager.spread()) == {
            "0.down.weight",
            "0.down.bias",
            "1.experts.*.fc1.weight",
            "1.experts.*.fc1.bias",
            "1.experts.*.fc2.bias",
        }
        model.requires_grad_(False)
        averager.step()
        with pytest.raises(ValueError, match="got a model whose experts are all frozen"):
            ewa.ExpertAverager(model, 0.3)

    def test_no_experts(self):
        model = nn.Sequential(Chain(), Tutorial())
        model[1].experts[2] = Net()
        ewa.register_experts_adapter(Mlp, up="w1", down="w2")
        model.append(Mlp())
        with pytest.raises(ValueError, match="got a model without experts: call replace_ffn_") as info:
            ewa.ExpertAverager(model, 0.3)
        reasons = str(info.value).split("first; ")[1].split("; ")
        assert "its 1.experts holds a Mlp and a Net" in reasons
        assert "its 2 has no 'w1'" in reasons
        assert reasons[-1] == "register_experts_adapter tells where a class has its experts"


class TestStructureOnceTensorsAtEachStep:
    def test_nothing_is_looked_for_in_a_step(self, monkeypatch):
        model = nn.Sequential(Tutorial(), ewa.RoutedMoE(8, 12, 4))
        averager = ewa.ExpertAverager(model, 0.3)
        monkeypatch.setattr(found, "find_experts", None)
        averager.step()
        assert len(averager.spread()) == 8

    @pytest.mark.parametrize("name", ["Mixtral", "Mixtral 4"])
    def test_new_tensors_under_the_old_names(self, name):
        model = randomize(MODELS[name][0]())
        averager = ewa.ExpertAverager(model, 0.75)
        model.load_state_dict(copy.deepcopy(model).state_dict(), assign=True)
        averager.step()
        assert max(averager.spread().values()) < 1e-6
        for name, group in ewa.find_experts(model)[0].tensors.items():
            assert float((stacked(group) - stacked(group)[0]).abs().max()) < 1e-6, name

    def test_copies(self):
        model = randomize(Mixtral())
        averager = ewa.ExpertAverager(model, 0.3)
        for twin in (copy.deepcopy(averager), pickle.loads(pickle.dumps(averager))):
            twin.step()
            assert twin.spread() != averager.spread()
        other_model, other = copy.deepcopy((model, averager))
        other.step()
        assert float(other_model.experts[0].w1.weight.sub(model.experts[0].w1.weight).detach().abs().max()) > 0

    def test_a_model_of_another_architecture(self):
        model = nn.Sequential(Tutorial())
        averager = ewa.ExpertAverager(model, 0.3)
        model[0].experts = nn.ModuleList([Mlp()])
        with pytest.raises(ValueError, match=r"has no 0.experts.1.fc1.weight any more: make a new one"):
            averager.step()

    @pytest.mark.parametrize("after", [ewa.restore_moe_, ewa.fold_moe_])
    def test_layers_that_surgery_takes(self, after):
        """Not silently the rest alone."""
        model = nn.Sequential(Mixtral(), Pick(), Mixtral())
        ewa.replace_moe_(model, to="random_partition", filter_fn=lambda name, _: name == "0.experts")
        averager = ewa.ExpertAverager(model, 0.3)
        averager.step()
        after(model)
        with pytest.raises(ValueError, match=r"has no 0.experts.up.weight any more: make a new one after a change"):
            averager.step()
        assert len(ewa.ExpertAverager(model, 0.3).experts()) == (6 if after is ewa.restore_moe_ else 3)

    def test_a_routed_layer_that_goes(self):
        model = two(lambda: ewa.RoutedMoE(8, 12, 4))
        averager = ewa.ExpertAverager(model, 0.3)
        model[2] = nn.Identity()
        with pytest.raises(ValueError, match=r"has no 2.up.weight any more: make a new one"):
            averager.step()

    @pytest.mark.parametrize("name", ["Mixtral", "Mixtral 4"])
    def test_flattened_tensors(self, name):
        model = MODELS[name][0]()
        averager = ewa.ExpertAverager(model, 0.3)
        for parameter in model.parameters():
            parameter.data = parameter.data.flatten()
        with pytest.raises(ValueError, match=r"must have [23] dimensions.*use torch.distributed.fsdp.fully_shard"):
            averager.step()

    def test_experts_held_twice_are_averaged_once(self):
        model = two(Tutorial)
        model[2].experts = model[1].experts
        averager = ewa.ExpertAverager(model, 0.3)
        assert all(name.startswith("1.experts") for name in averager.spread())
        model = nn.Sequential(ewa.RoutedMoE(8, 12, 4), ewa.RoutedMoE(8, 12, 4))
        model[1].up = model[0].up
        assert len(ewa.ExpertAverager(model, 0.3).experts()) == 6


def test_folding_leaves_routed_layers_alone():
    model = nn.Sequential(ewa.RoutedMoE(8, 12, 4), ewa.RandomPartitionMoE(8, 12, 4), Tutorial())
    routed, tutorial = copy.deepcopy(model[0].state_dict()), copy.deepcopy(model[2].state_dict())
    averager = ewa.ExpertAverager(model, 0.3)
    assert len(averager.experts()) == 12
    ewa.fold_(model)
    assert [type(layer) for layer in model] == [ewa.RoutedMoE, ewa.FFN, Tutorial]
    assert all(torch.equal(model[0].state_dict()[key], value) for key, value in routed.items())
    assert all(torch.equal(model[2].state_dict()[key], value) for key, value in tutorial.items())
    averager.step()
    assert len(averager.experts()) == 8


def test_trainer_averages_and_leaves_the_model_as_it_is(tmp_path):
    from ewa_kernels.integrations.transformers import EWACallback

    torch.manual_seed(0)
    model = mixtral()
    callback = EWACallback(share_rate=0.3)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, save_strategy="no", report_to=[], use_cpu=True
    )
    rows = [{"input_ids": torch.arange(3, 9) + i, "labels": torch.arange(3, 9) + i} for i in range(8)]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    keys = list(model.state_dict())
    trainer.train()
    assert callback.averager.num_steps == 3
    assert "model.layers.0.mlp.experts.down_proj" in callback.averager.spread()
    assert list(model.state_dict()) == keys


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = ewa.RoutedMoE(8, 12, 4, top_k=2)

    def forward(self, x, labels):
        y = self.experts(x)
        return {"loss": (y - labels).square().mean() + 0.01 * self.experts.load_balance_loss, "y": y}


def test_trainer_resumes_a_routed_model(tmp_path):
    """From the trainer's own file: there is nothing to fold in it."""
    from ewa_kernels.integrations.transformers import EWACallback

    def train(folder, max_steps, **options):
        torch.manual_seed(0)
        model, callback = Regression(), EWACallback(share_rate=ewa.LinearShareRate(0.3, 4))
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=max_steps, save_steps=2, lr_scheduler_type="constant", report_to=[], use_cpu=True
        )
        rows = [{"x": torch.full((8,), i / 8).sin(), "labels": torch.full((8,), i / 8).cos()} for i in range(64)]
        transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train(**options)
        return model, callback

    whole, _ = train(tmp_path / "whole", 4)
    train(tmp_path / "half", 2)
    resumed, callback = train(tmp_path / "half", 4, resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert callback.averager.num_steps == 4
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def wrapped(model, how):
    """The model, or a layer of it, in what wraps it."""
    where, _, wrapper = how.partition(" in ")
    wrap = {"compile": torch.compile, "checkpoint": checkpoint_wrapper, "DataParallel": nn.DataParallel}
    if where == "whole":
        return wrap[wrapper](model)
    if where == "layer":
        layers = next(module for module in model.modules() if isinstance(module, nn.Sequential))
        layers[2] = wrap[wrapper](layers[2])
    return model


@pytest.mark.parametrize("name", ["RandomPartitionMoE", "RoutedMoE", "Tutorial", "lucidrains"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("none", "whole in compile"),
        ("none", "layer in checkpoint"),
        ("layer in compile", "none"),
        ("whole in DataParallel", "layer in compile"),
        ("whole in compile", "layer in checkpoint"),
        ("layer in checkpoint", "layer in DataParallel"),
    ],
)
def test_wrappers(name, before, after):
    """Around all or a part, before the averager is made or after; the optimizer is that of the model without them."""
    plain = two(lambda: ewa.RandomPartitionMoE(8, 12, 4)) if name == "RandomPartitionMoE" else MODELS[name][0]()
    model = wrapped(randomize(plain), before)
    averager = ewa.ExpertAverager(model, 0.3, filter_fn=lambda name, module: name.startswith("2"))
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-12)
    averager.attach(optimizer)
    model = wrapped(model, after)
    experts = averager.named_experts()
    prefix = "2.w" if name == "lucidrains" else "2."
    assert len(experts) in (2, 4)
    assert all(each.startswith(prefix) and "_" not in each and "module" not in each for each in experts)
    expected = {each: stacked(group).clone() for each, group in experts.items()}
    ewa.reference.average_experts_(list(expected.values()), 0.3)
    others = {each: p.detach().clone() for each, p in plain[1].named_parameters()}
    optimizer.step()
    for each, group in averager.named_experts().items():
        torch.testing.assert_close(stacked(group), expected[each])
    assert all(torch.equal(p, others[each]) for each, p in plain[1].named_parameters())
    averager._attachment.remove()
    averager.attach(torch.optim.SGD(model.parameters(), lr=1e-12))  # which has them, too
