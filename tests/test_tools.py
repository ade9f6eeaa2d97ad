"""What handles a model's modules, or traces them: our layers give what an nn.Linear would give, or say what to do."""

import copy
import io
import subprocess
import sys

import peft
import pytest
import torch
from ffn_zoo import ZOO, Residual, mish
from models import Mlp, PointMlp, Transformer, tokens
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from vision import torchvision  # isort: skip  # before what imports it
from torchvision.models.feature_extraction import create_feature_extractor

import ewa_kernels as ewa

EVERY = {"filter_fn": lambda *_: True}


def fused():
    torch.manual_seed(0)
    model = Transformer(Mlp(), Mlp())
    ewa.replace_ffn_(model, 3, init="independent", **EVERY)
    return model


def pair():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), Residual(mish()), Residual(mish()))
    ewa.replace_ffn_(model, 3, init="independent", **EVERY)
    return model


def own():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), ewa.RandomPartitionMoE(8, 12, 3), ewa.RandomPartitionMoE(8, 12, 3, gated=True)
    )


def exported(model):
    return torch.export.export(model, (tokens(),), dynamic_shapes=({0: torch.export.Dim("b")},)).module()


def exported_and_loaded(model):
    program = torch.export.export(model, (tokens(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


def onnx(model):
    """Run by the interpreter of ONNX's own package."""
    dynamic = ({0: torch.export.Dim("b")},)
    program = torch.onnx.export(model, (tokens(),), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    evaluator = ReferenceEvaluator(program.model_proto)
    return lambda x: torch.from_numpy(evaluator.run(None, {evaluator.input_names[0]: x.numpy()})[0])


def traced(model):
    return torch.jit.trace(model, (tokens(),))


every_kind = pytest.mark.parametrize("make", [fused, pair, own], ids=lambda make: make.__name__)


@every_kind
class TestGraphs:
    @pytest.mark.parametrize(
        "capture",
        [torch.fx.symbolic_trace, torch.jit.script, traced, exported, exported_and_loaded, onnx],
        ids=lambda capture: capture.__name__,
    )
    @pytest.mark.parametrize("folded", [False, True])
    @pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # of torch.onnx
    def test_in_eval_mode(self, make, capture, folded):
        model = make().eval()
        model = ewa.fold_(model) if folded else model
        other = tokens(7, 5, 4)
        if capture is torch.jit.script and not folded:  # it would put what is dense into the model itself
            experts = list(ewa.expert_tensors(model))
            with pytest.raises(TypeError, match=r"torch\.jit\.script takes no .*: call ewa_kernels\.fold_\(model\)"):
                capture(model)
            assert len(list(ewa.expert_tensors(model))) == len(experts)
            return
        torch.testing.assert_close(capture(model)(other), model(other))

    def test_fx_in_training_mode(self, make):
        """A layer is one node, which deals the tokens at each call."""
        model, x = make(), tokens()
        graph = torch.fx.symbolic_trace(model)
        torch.manual_seed(5)
        expected = model(x)
        torch.manual_seed(5)
        assert torch.equal(graph(x), expected)

    def test_jagged(self, make):
        """All tokens of a jagged tensor are dealt together, as those of one sequence."""
        model = make()
        nested = torch.nested.nested_tensor([tokens(3, 4), tokens(5, 4)], layout=torch.jagged)
        for training in (True, False):
            model.train(training)
            torch.manual_seed(5)
            y = model(nested)
            torch.manual_seed(5)
            torch.testing.assert_close(y.values(), model(nested.values()))
        y.values().sum().backward()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strided_nested_tensors():
    layer = ewa.RandomPartitionMoE(4, 12, 3)
    with pytest.raises(TypeError, match=r"x must not be nested, or with layout torch\.jagged"):
        layer(torch.nested.nested_tensor([tokens(3, 4), tokens(5, 4)], layout=torch.strided))


def test_routed_layers_are_nodes_too():
    model = nn.Sequential(ewa.RoutedMoE(4, 12, 3)).eval()
    assert torch.equal(torch.fx.symbolic_trace(model)(tokens()), model(tokens()))
    nested = torch.nested.nested_tensor([tokens(3, 4), tokens(5, 4)], layout=torch.jagged)
    torch.testing.assert_close(model(nested).values(), model(nested.values()))


def test_feature_extractor():
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3)
    ewa.replace_ffn_(vit)
    x = torch.randn(2, 3, 16, 16)
    extract = create_feature_extractor(vit.eval(), ["encoder"])
    assert torch.equal(vit.heads(extract(x)["encoder"][:, 0]), vit(x))


@every_kind
class TestHooks:
    def linears(self, model):
        return [module for module in model.modules() if type(module).__name__ == "ExpertLinear"]

    def trained(self, model, num_steps=2):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(num_steps):
            optimizer.zero_grad()
            torch.manual_seed(5)
            model(tokens()).square().sum().backward()
            optimizer.step()

    def test_pruned(self, make):
        """The weight is computed anew in each forward, and whenever it is asked for."""
        model = make()
        linear = self.linears(model)[0]
        prune.l1_unstructured(linear, "weight", amount=0.5)
        mask = linear.weight_mask
        self.trained(model)
        assert torch.equal(linear.weight, linear.weight_orig * mask)
        expected = model.eval()(tokens())
        assert torch.equal(copy.deepcopy(model)(tokens()), expected)
        prune.remove(linear, "weight")
        torch.testing.assert_close(model(tokens()), expected)
        torch.testing.assert_close(ewa.fold_(model)(tokens()), expected)

    def test_normed(self, make):
        model = make()
        linear = self.linears(model)[0]
        expected = model.eval()(tokens())
        nn.utils.parametrizations.weight_norm(linear, "weight", dim=1)
        torch.testing.assert_close(model(tokens()), expected)
        self.trained(model.train())
        g, v = (getattr(linear.parametrizations.weight, f"original{i}") for i in (0, 1))
        assert g.grad.any()
        assert v.grad.any()
        expected = model.eval()(tokens())
        parametrize.remove_parametrizations(linear, "weight")
        torch.testing.assert_close(ewa.fold_(model)(tokens()), expected)

    def test_offloaded(self, make):
        """accelerate brings the weights for the call of their module, and takes them away after it."""
        from accelerate import cpu_offload

        model = make().eval()
        expected = model(tokens())
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        cpu_offload(model, torch.device("cpu"), state_dict=state)
        assert any(parameter.is_meta for parameter in model.parameters())
        with torch.no_grad():
            torch.testing.assert_close(model(tokens()), expected)


class TestDropouts:
    @pytest.mark.parametrize("make", [lambda: Mlp(drop=0.0), PointMlp], ids=["p = 0", "used twice"])
    def test_loops_over_them(self, make):
        model = Transformer(make(), make())
        ewa.replace_ffn_(model, **EVERY)
        for rate in (1.0, 0.0):
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = rate
            layer = model.blocks[1].mlp
            assert (layer.dropout, layer.output_dropout) == (rate, rate)
            assert layer(tokens(2, 5, 8)).any() == (rate == 0)
        assert {m.p for m in ewa.fold_(model).modules() if isinstance(m, nn.Dropout)} == {0.0}

    def test_taken_out(self):
        model = Transformer(PointMlp(drop=1.0), Mlp(drop=1.0))
        ewa.replace_ffn_(model, **EVERY)
        for block in model.blocks:
            block.mlp.drop = block.mlp.output_drop = nn.Identity()
            assert block.mlp(tokens(2, 5, 8)).any()

    def test_of_a_layer_of_ones_own(self):
        layer = ewa.RandomPartitionMoE(8, 12, 3, dropout=1.0, bias=False)
        assert not layer(tokens(5, 8)).any()
        next(m for m in layer.modules() if isinstance(m, nn.Dropout)).p = 0.0
        assert layer(tokens(5, 8)).any()
        layer.dropout = 0.25
        assert layer.fuse().dropout == 0.25


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
class TestPeft:
    def model(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20))
        ewa.replace_ffn_(model, 3, init="independent", **EVERY)
        return model

    ids = torch.arange(12).view(2, 6)

    def test_lora_on_experts(self):
        names = ["mlp.up.weight", "mlp.down.weight"]
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names, lora_dropout=0.0)
        model = peft.get_peft_model(self.model(), config)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=self.ids, labels=self.ids).loss.backward()
            optimizer.step()
        lora = {n: p for n, p in model.named_parameters() if "lora_" in n and "mlp" in n}
        assert len(lora) == 8
        assert all(p.grad.any() for p in lora.values())
        expected = model.eval()(input_ids=self.ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=self.ids).logits, expected)
        torch.testing.assert_close(ewa.fold_(merged)(input_ids=self.ids).logits, expected)

    def test_modules_to_save(self, tmp_path):
        model = peft.get_peft_model(self.model(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(self.model(), tmp_path)
        expected = model.eval()(input_ids=self.ids).logits
        assert torch.equal(loaded.eval()(input_ids=self.ids).logits, expected)


@pytest.mark.parametrize("name", ["timm", "Mish"])
def test_flops(name):
    """Dealt or not, the products are those of the dense FFN."""
    model = nn.Sequential(ZOO[name][0](), ZOO[name][0]())
    x = torch.randn(3, 5, 16)
    counts = []
    for replaced in (False, True):
        if replaced:
            ewa.replace_ffn_(model, **EVERY)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_imported_anew():
    """As notebooks and test runners do it, with models of before that go on."""
    code = """
import importlib, sys, torch
import ewa_kernels as before
layer = before.RandomPartitionMoE(8, 12, 3)
importlib.reload(before)
for name in [name for name in sys.modules if name.startswith("ewa_kernels")]:
    del sys.modules[name]
import ewa_kernels as ewa
assert ewa is not before
x = torch.randn(5, 8)
other = ewa.RandomPartitionMoE(8, 12, 3)
other.load_state_dict(layer.state_dict())
y = layer(x, seed=3)
torch.testing.assert_close(other(x, seed=3), y)
z = torch.compile(other, backend="aot_eager", fullgraph=True)(x, seed=3)
torch.testing.assert_close(z, y)
z.sum().backward()
assert other.up.weight.grad.any()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_swapped_tensors():
    """`torch.__future__` has parameters swapped, not written, where modules are converted and state dicts loaded."""
    model, other = fused(), fused()
    expected = other.double().eval()(tokens().double())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        model.load_state_dict(other.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(model.eval()(tokens().double()), expected)
    averager = ewa.ExpertAverager(model, 0.3)
    before = averager.spread()
    averager.step()
    assert all(averager.spread()[name] == pytest.approx(0.55 * value) for name, value in before.items())
