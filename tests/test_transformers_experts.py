"""The experts of transformers 5 through our kernels: what its own experts compute, in every model that has them."""

import copy
import importlib
import sys
import warnings

import pytest
import torch
from parity import assert_parity
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.0")
from transformers.activations import ACT2CLS, ACT2FN  # noqa: E402
from transformers.models.aria.modeling_aria import AriaTextConfig, AriaTextForCausalLM  # noqa: E402

import ewa_kernels as ewa  # noqa: E402
from ewa_kernels.integrations import transformers_experts  # noqa: E402
from ewa_kernels.integrations.transformers_experts import random_partition_forward, routed_forward  # noqa: E402
from ewa_kernels.models import stacked  # noqa: E402

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
TWO = {**SIZES, "num_hidden_layers": 2}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


def mixtral(**more):
    config = transformers.MixtralConfig(**TWO, num_local_experts=4, output_router_logits=True, **more)
    return transformers.MixtralForCausalLM(config)


def qwen2(**more):
    config = transformers.Qwen2MoeConfig(
        **TWO, **ROUTED, num_experts=4, shared_expert_intermediate_size=40, output_router_logits=True, **more
    )
    return transformers.Qwen2MoeForCausalLM(config)


def qwen3():
    config = transformers.Qwen3MoeConfig(**TWO, **ROUTED, num_experts=4, head_dim=8, output_router_logits=True)
    return transformers.Qwen3MoeForCausalLM(config)


def olmoe():
    config = transformers.OlmoeConfig(**TWO, num_experts=4, num_experts_per_tok=2, output_router_logits=True)
    return transformers.OlmoeForCausalLM(config)


def deepseek():
    """Shared experts, weights that sum to 2.5, a dense first layer."""
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    groups = {"n_group": 2, "topk_group": 2, "first_k_dense_replace": 1}
    config = transformers.DeepseekV3Config(**TWO, **ROUTED, **heads, **groups, n_routed_experts=4)
    return transformers.DeepseekV3ForCausalLM(config)


def nemotron():
    """Not gated, with relu²."""
    config = transformers.NemotronHConfig(
        **SIZES,
        **ROUTED,
        layers_block_type=["attention", "moe"],
        n_routed_experts=4,
        moe_shared_expert_intermediate_size=16,
        n_group=1,
        topk_group=1,
        head_dim=8,
    )
    return transformers.NemotronHForCausalLM(config)


def aria():
    """Stored the other way round: [E, D, 2F]."""
    config = AriaTextConfig(**TWO, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, pad_token_id=0)
    return AriaTextForCausalLM(config)


def gpt_oss():
    """Clamped, interleaved: no formula of ours."""
    config = transformers.GptOssConfig(**TWO, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    return transformers.GptOssForCausalLM(config)


MODELS = (mixtral, qwen2, qwen3, olmoe, deepseek, nemotron, aria)
IDS = torch.randint(1, 97, (2, 17), generator=torch.Generator().manual_seed(0))


def made(make, dtype=torch.float32):
    """In training mode, with routers that have made up their minds and experts whose output counts."""
    torch.manual_seed(0)
    model = make().to(dtype).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                parameter.normal_()
            elif "experts." in name:
                parameter.normal_(std=0.3)
    return model


def experts_of(model):
    return [module for module in model.modules() if stacked.is_stacked(module)]


def model_run(model, implementation):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    output = model(IDS, labels=IDS)
    output.loss.backward()
    values = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    for i, logits in enumerate(getattr(output, "router_logits", None) or ()):
        values[f"router logits {i}"] = logits.detach()
    if getattr(output, "aux_loss", None) is not None:
        values["aux loss"] = output.aux_loss.detach()
    return values | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def experts_run(experts, forward, x, choices, weights):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = forward(experts, x, choices, weights)
    names = dict(experts.named_parameters())
    grads = torch.autograd.grad(y, [x, weights, *names.values()], torch.linspace(-1, 1, y.numel()).view_as(y).to(y))
    return {"y": y.detach(), **dict(zip(["x", "weights", *names], grads, strict=True))}


def routing(num_tokens, num_experts=4, top_k=2):
    choices = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)])
    return choices, torch.rand(num_tokens, top_k, dtype=torch.float64) + 0.1


class Counted:
    """How often the kernels were called."""

    def __init__(self, monkeypatch):
        self.calls = 0
        grouped_ffn = ewa.functional.grouped_ffn

        def count(*args, **kwargs):
            self.calls += 1
            return grouped_ffn(*args, **kwargs)

        monkeypatch.setattr(ewa.functional, "grouped_ffn", count)


@pytest.fixture
def kernels(monkeypatch):
    return Counted(monkeypatch)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
class TestIsTheLibrarysOwn:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_experts(self, make, dtype, kernels):
        """Output and all gradients, of one module of experts."""
        experts = experts_of(made(make, dtype))[0].to(dtype)
        torch.manual_seed(1)
        x = torch.randn(23, 32).to(dtype)
        choices, weights = routing(23)
        run = x, choices, weights.to(dtype)
        exact = experts_run(
            copy.deepcopy(experts).double(),
            stacked.original_forward,
            *(t.double() if t.is_floating_point() else t for t in run),
        )
        baseline = experts_run(experts, stacked.original_forward, *run)
        actual = experts_run(experts, routed_forward, *run)
        assert kernels.calls == 1
        for name, value in actual.items():
            assert_parity(name, value, exact[name], baseline[name])

    def test_model(self, make, kernels):
        """Logits, loss, router logits, auxiliary loss and the gradient of every parameter."""
        model = made(make)
        exact = model_run(copy.deepcopy(model).double(), "eager")
        baseline = model_run(model, "eager")
        assert kernels.calls == 0
        actual = model_run(model, "ewa")
        assert kernels.calls == len(experts_of(model))
        assert actual.keys() == baseline.keys()
        for name, value in actual.items():
            if exact[name].any():
                assert_parity(name, value, exact[name].double(), baseline[name])
            else:
                assert not value.any()

    def test_autocast(self, make, kernels):
        model = made(make)
        exact = model_run(model, "eager")
        with torch.autocast("cpu", torch.bfloat16):
            baseline, actual = (model_run(model, name) for name in ("eager", "ewa"))
        assert kernels.calls == len(experts_of(model))
        for name in ("logits", *(name for name, _ in model.named_parameters() if "experts." in name)):
            assert actual[name].dtype == baseline[name].dtype
            error, bound = ((values[name].double() - exact[name]).norm() for values in (actual, baseline))
            assert error <= 2 * bound


@pytest.mark.parametrize(("make", "implementation"), [(mixtral, "ewa"), (qwen3, "ewa_random_partition")])
def test_compiled_model(make, implementation):
    """Fullgraph, and without an eager call before."""
    model = made(make)
    model.model.layers = model.model.layers[:1]
    model.config.output_router_logits = False
    model.set_experts_implementation(implementation)
    torch.manual_seed(5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)(IDS).logits
    torch.manual_seed(5)
    torch.testing.assert_close(compiled, model(IDS).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [nemotron, aria], ids=lambda make: make.__name__)
def test_compiled_experts(make):
    model = made(make)
    model.set_experts_implementation("ewa")
    experts, (choices, weights) = experts_of(model)[0], routing(23)
    run = torch.randn(23, 32), choices, weights.float()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")(*run)
    torch.testing.assert_close(compiled, experts(*run))
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [nemotron, aria], ids=lambda make: make.__name__)
def test_triton(make):
    """In Triton's interpreter, where there is no GPU."""
    experts = experts_of(made(make))[0].to("cuda" if torch.cuda.is_available() else "cpu")
    device = experts.down_proj.device
    x, (choices, weights) = torch.randn(23, 32, device=device), routing(23)
    run = x, choices.to(device), weights.float().to(device)
    for forward in (routed_forward, random_partition_forward):
        values = {}
        for backend in ("reference", "triton"):
            experts._ewa_switched = stacked.Switched(experts.config, {"backend": backend})
            torch.manual_seed(3)
            values[backend] = experts_run(experts, uses_weights(forward), *run)
        for name, value in values["triton"].items():
            torch.testing.assert_close(value, values["reference"][name], rtol=1e-4, atol=1e-4, msg=name)


def uses_weights(forward):
    """A random partition has no gradient for the router's weights."""
    return lambda experts, x, choices, weights: forward(experts, x, choices, weights) + 0 * weights.sum()


def test_no_tokens():
    experts = experts_of(mixtral())[0]
    x = torch.empty(0, 32, requires_grad=True)
    choices, weights = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)
    for forward in (routed_forward, random_partition_forward):
        y = forward(experts, x, choices, weights)
        assert y.shape == (0, 32)
        y.sum().backward()
        assert not any(p.grad.any() for p in experts.parameters())


class TestSetting:
    def test_generate(self):
        model = made(qwen2).eval()
        tokens = []
        for implementation in ("eager", "ewa"):
            model.set_experts_implementation(implementation)
            tokens.append(model.generate(IDS[:, :5], max_new_tokens=5, do_sample=False, pad_token_id=0))
        assert torch.equal(*tokens)

    @pytest.mark.parametrize("implementation", ["ewa", "ewa_random_partition"])
    def test_gradient_checkpointing(self, implementation):
        model = made(qwen2)
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable()
            torch.manual_seed(3)
            gradients.append(model_run(model, implementation))
        for name, value in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], value)

    def test_checkpoints_are_the_librarys_own(self, tmp_path):
        model = mixtral()
        with torch.no_grad():
            expected = model.eval()(IDS).logits
        keys = {}
        for implementation in ("eager", "ewa"):
            model.set_experts_implementation(implementation)
            model.save_pretrained(tmp_path / implementation)
            keys[implementation] = _keys(tmp_path / implementation)
        assert keys["ewa"] == keys["eager"]
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ewa", experts_implementation="ewa")
        assert loaded.config._experts_implementation == "ewa"
        torch.testing.assert_close(loaded.eval()(IDS).logits, expected)


def _keys(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


class TestRandomPartition:
    def test_deals_in_training(self):
        experts = experts_of(made(qwen2))[0]
        x, (choices, weights) = torch.randn(23, 32), routing(23)
        torch.manual_seed(5)
        y = random_partition_forward(experts, x, choices, weights)
        torch.manual_seed(5)
        seed = ewa.functional.draw_seed(x)
        tensors = experts.gate_up_proj, None, experts.down_proj, None
        expected = ewa.reference.moe_ffn(x, *tensors, seed=seed, activation="silu", gated=True)
        torch.testing.assert_close(y, expected)
        assert not torch.equal(y, random_partition_forward(experts, x, choices, weights))

    @pytest.mark.parametrize("make", [qwen2, nemotron, aria], ids=lambda make: make.__name__)
    def test_mean_expert_in_eval(self, make):
        experts = experts_of(made(make, torch.float64))[0].double().eval()
        x, (choices, _) = torch.randn(23, 32, dtype=torch.float64), routing(23, top_k=1)
        y = random_partition_forward(experts, x, choices, torch.ones(23, 1))
        mean = copy.deepcopy(experts)
        with torch.no_grad():
            for parameter in mean.parameters():
                parameter.copy_(parameter.mean(0).expand_as(parameter))
        torch.testing.assert_close(y, stacked.original_forward(mean, x, choices, torch.ones(23, 1).double()))

    def test_router_is_called_and_its_loss_trains_it(self):
        model = made(mixtral)
        model.set_experts_implementation("ewa_random_partition")
        output = model(IDS, labels=IDS)
        assert len(output.router_logits) == 2
        output.loss.backward()
        assert model.model.layers[0].mlp.gate.weight.grad.any()
        assert all(p.grad.any() for e in experts_of(model) for p in e.parameters())

    def test_refuses_what_the_kernels_cannot_express(self):
        model = gpt_oss()
        model.set_experts_implementation("ewa_random_partition")
        with pytest.raises(NotImplementedError, match="GptOssExperts does not compute act"):
            model(IDS)


class TestFallback:
    def test_own_loop_and_one_warning(self, monkeypatch):
        monkeypatch.setattr(stacked, "_warned", set())
        model = gpt_oss()
        model.set_experts_implementation("eager")
        expected = model(IDS).logits
        model.set_experts_implementation("ewa")
        with pytest.warns(UserWarning, match="GptOssExperts runs its own loop") as caught:
            logits = model(IDS).logits
        assert len(caught) == 1
        assert torch.equal(logits, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(IDS)

    def test_expert_parallel(self, kernels):
        """Choices of other processes' experts are E, with weight 0."""
        experts = experts_of(made(mixtral))[0]
        choices, weights = routing(9)
        weights[choices == 1], choices[choices == 1] = 0, 4
        experts._is_expert_parallel = True
        y = routed_forward(experts, torch.randn(9, 32), choices, weights.float())
        assert y.isfinite().all()
        assert kernels.calls == 0


class TestFormula:
    """By flags and names alone."""

    @pytest.fixture
    def experts(self):
        return experts_of(mixtral())[0]

    def test_every_activation_of_the_library_that_we_have(self, experts):
        x = torch.linspace(-9, 9, 99, dtype=torch.float64)
        known = {
            "gelu",
            "gelu_fast",
            "gelu_new",
            "gelu_python",
            "gelu_pytorch_tanh",
            "gelu_python_tanh",
            "gelu_accurate",
        }
        known |= {"linear", "quick_gelu", "relu", "relu2", "silu", "swish"}
        for name in ACT2CLS.keys() - {"xielu"}:  # which needs more than the CPU
            experts.act_fn = ACT2FN[name]
            formula = stacked.formula_of(experts)
            assert (formula.reason is None) == (name in known), name
            if name in known:
                ours = ewa.reference.ACTIVATIONS[formula.activation](x)
                torch.testing.assert_close(experts.act_fn(x), ours, rtol=1e-9, atol=1e-9, msg=name)

    @pytest.mark.parametrize(
        ("act", "name"),
        [(nn.SiLU(), "silu"), (nn.functional.relu, "relu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh")],
    )
    def test_those_of_torch(self, experts, act, name):
        experts._modules.pop("act_fn")
        experts.act_fn = act
        assert stacked.formula_of(experts) == ("gate_up_proj", True, False, name, None)

    def test_another_class_of_the_same_name(self, experts):
        experts.act_fn = type("SiLU", (nn.Module,), {})()
        assert stacked.formula_of(experts).reason == "has an activation that the kernels do not know: SiLU"

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"has_post_expert_norm": True}, "has a norm after each expert"),
            ({"act_fn": nn.PReLU()}, "has an activation that the kernels do not know: PReLU"),
            ({"_apply_gate": lambda pre: pre.clamp(max=90).chunk(2, -1)[0]}, "has an _apply_gate of its own"),
            ({"is_concatenated": False}, "has an _apply_gate of its own"),
            ({"gate_up_proj": None}, "has no gate_up_proj of three dimensions"),
            ({"has_gate": False}, "has no up_proj of three dimensions"),
        ],
    )
    def test_reasons(self, experts, change, reason):
        for name, value in change.items():
            setattr(experts, name, value)
        assert reason in stacked.formula_of(experts).reason


def test_without_transformers_5(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match=r"needs transformers 5: pip install 'transformers>=5'"):
        importlib.reload(transformers_experts)
