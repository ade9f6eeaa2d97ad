"""State dicts of models with experts: saved by anything and loaded dense they give the mean; resumed, the experts."""

import copy
import io
import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import vision  # noqa: F401
from ffn_zoo import BertLayer
from models import Mlp, MLPBlock, PackedGLU, SwiGLU, Transformer, tokens
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import ewa_kernels as ewa

MAKERS = {
    "fused": lambda: Transformer(*(Mlp() for _ in range(4))),
    "sequential": lambda: Transformer(*(MLPBlock() for _ in range(4))),
    "GLU, gate last": lambda: Transformer(*(PackedGLU() for _ in range(4))),
    "GLU of two": lambda: Transformer(*(SwiGLU() for _ in range(4))),
    "pair": lambda: nn.Sequential(nn.Linear(4, 16), *(BertLayer() for _ in range(4))),
}


def dense(name="fused", seed=0):
    torch.manual_seed(seed)
    return MAKERS[name]().eval()


def with_experts(name="fused", seed=0):
    """Experts that are all different."""
    model = dense(name, seed)
    ewa.replace_ffn_(model, 3, init="independent")
    return model


def experts_of(model):
    return {name: parameter.detach().clone() for name, parameter in ewa.expert_tensors(model)}


def assert_experts(model, expected):
    actual = experts_of(model)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def by_load_state_dict(model, state):
    model.load_state_dict(state, strict=True)


def not_strict(model, state):
    model.load_state_dict(state, strict=False)


def by_assigning(model, state):
    model.load_state_dict(state, assign=True)


def of_distributed(model, state):
    set_model_state_dict(model, state, options=StateDictOptions(strict=True))


def whole_of_distributed(model, state):
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True, strict=False))


def over_its_own(model, state):
    """As old code has it, which takes what it knows."""
    own = model.state_dict()
    own.update({name: tensor for name, tensor in state.items() if name in own})
    model.load_state_dict(own)


LOADERS = (by_load_state_dict, not_strict, by_assigning, of_distributed, whole_of_distributed, over_its_own)


@pytest.mark.usefixtures("registered", "one_process")
@pytest.mark.parametrize("name", MAKERS)
class TestLoading:
    @pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
    def test_dense_weights_fill_all_experts(self, name, load):
        other, model = dense(name, seed=1), with_experts(name)
        load(model, other.state_dict())
        assert torch.equal(model(tokens()), other(tokens()))
        for stacked in experts_of(model).values():
            assert all(torch.equal(expert, stacked[0]) for expert in stacked)
        assert all(p.is_contiguous() and p.untyped_storage().size() == p.nbytes for p in model.parameters())

    @pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
    def test_experts_stay_experts(self, name, load):
        other, model = with_experts(name, seed=1), with_experts(name)
        load(model, copy.deepcopy(other.state_dict()))
        assert_experts(model, experts_of(other))

    def test_onto_meta(self, name):
        with torch.device("meta"):
            model = with_experts(name)
        other = dense(name, seed=1)
        model.to_empty(device="cpu").load_state_dict(other.state_dict())
        assert torch.equal(model(tokens()), other(tokens()))

    def test_the_dense_model_gets_the_mean(self, name):
        model = with_experts(name)
        untouched = dense(name, seed=2)
        keys = set(untouched.state_dict())
        missing = untouched.load_state_dict(model.state_dict(), strict=False).missing_keys
        assert (missing, torch.equal(untouched(tokens()), model(tokens()))) == ([], True)
        assert keys <= set(model.state_dict())

    def test_itself_is_nothing_new(self, name):
        model = with_experts(name)
        before = experts_of(model)
        model.load_state_dict(model.state_dict())
        assert_experts(model, before)


class TestRule:
    def test_dense_weights_beside_other_experts(self):
        """They are taken, and somebody is told."""
        other, model = dense(seed=1), with_experts()
        state = copy.deepcopy(with_experts(seed=2).state_dict()) | other.state_dict()
        with pytest.warns(UserWarning, match="experts of a ReplacedFFN whose mean is not what it has for the dense"):
            model.load_state_dict(state)
        assert torch.equal(model(tokens()), other(tokens()))

    def test_rounded_and_averaged_state_dicts_keep_their_experts(self):
        states = [with_experts(seed=seed).state_dict() for seed in (1, 2)]
        mean = {name: (tensor + states[1][name]) / 2 for name, tensor in states[0].items()}
        for state in (mean, {name: tensor.bfloat16() for name, tensor in mean.items()}):
            model = with_experts()
            model.load_state_dict(state)
            for name, tensor in experts_of(model).items():
                assert torch.equal(tensor, state[name].float())

    def test_a_part_of_an_ffn(self):
        other, model = dense(seed=1).state_dict(), with_experts()
        before = experts_of(model)
        del other["blocks.1.mlp.fc1.bias"]
        with pytest.raises(RuntimeError, match=r"Missing key.* .blocks\.1\.mlp\.up\.bias"):
            model.load_state_dict(other)
        model = with_experts()
        model.load_state_dict(other, strict=False)
        now = experts_of(model)
        assert torch.equal(now["blocks.1.mlp.up.bias"], before["blocks.1.mlp.up.bias"])
        assert torch.equal(now["blocks.1.mlp.up.weight"][2], other["blocks.1.mlp.fc1.weight"])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dense_weights_that_differ_a_little(self, dtype):
        """Of a model that was fine-tuned, over `model.state_dict()`: they are not rounded means."""
        model = with_experts().to(dtype)
        tuned = ewa.folded_state_dict(model)
        name = "blocks.1.mlp.fc1.weight"
        tuned[name] = tuned[name] * (1 + 8 * torch.finfo(dtype).eps)
        over_its_own(model, tuned)
        assert all(torch.equal(expert, tuned[name]) for expert in model.blocks[1].mlp.up.weight)

    @pytest.mark.parametrize("name", ["fused", "pair"])
    def test_edited_in_place(self, name):
        """As federated averaging does it with the model's own memory: experts and their mean alike."""
        model = with_experts(name)
        expected = {n: t * 0.37 for n, t in experts_of(model).items()}
        state = model.state_dict()
        for tensor in state.values():
            tensor.mul_(0.37)
        model.load_state_dict(state)
        assert_experts(model, expected)

    def test_kept_while_the_model_was_trained(self):
        """Its experts are those of now, and so they are kept, as a dense model's weights would be."""
        model = with_experts()
        state = model.state_dict()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        expected = experts_of(model)
        with pytest.warns(UserWarning, match="the experts are taken; leave out the experts to have the dense weights"):
            model.load_state_dict(state)
        assert_experts(model, expected)

    def test_a_part_of_the_experts(self):
        model, state = with_experts(), copy.deepcopy(with_experts(seed=1).state_dict())
        del state["blocks.1.mlp.up.bias"]
        with pytest.raises(RuntimeError, match=r"Missing key.* .blocks\.1\.mlp\.up\.bias"):
            with_experts().load_state_dict(state)
        model.load_state_dict(state, strict=False)
        assert torch.equal(model.blocks[1].mlp.up.weight, state["blocks.1.mlp.up.weight"])
        assert all(torch.equal(bias, state["blocks.1.mlp.fc1.bias"]) for bias in model.blocks[1].mlp.up.bias)

    def test_a_bias_that_the_model_has_not(self):
        """It is left, and named, and all else is loaded, as nn.Linear does."""
        torch.manual_seed(0)
        model = Transformer(Mlp(bias=False), Mlp(bias=False))
        ewa.replace_ffn_(model, 3, init="independent")
        other = Transformer(Mlp(), Mlp()).state_dict()
        unexpected = model.load_state_dict(other, strict=False).unexpected_keys
        assert {"blocks.1.mlp.fc1.bias", "blocks.1.mlp.fc2.bias"} <= set(unexpected)
        assert torch.equal(model.blocks[1].mlp.up.weight[2], other["blocks.1.mlp.fc1.weight"])

    @pytest.mark.usefixtures("registered")
    def test_one_projection_of_a_glu(self):
        model, other = with_experts("GLU of two"), dense("GLU of two", seed=1).state_dict()
        value = ewa.folded_state_dict(model)["blocks.1.mlp.w_value.weight"]
        del other["blocks.1.mlp.w_value.weight"]
        assert model.load_state_dict(other, strict=False).missing_keys == ["blocks.1.mlp.w_value.weight"]
        folded = ewa.folded_state_dict(model)
        assert torch.equal(folded["blocks.1.mlp.w_gate.weight"], other["blocks.1.mlp.w_gate.weight"])
        assert torch.equal(folded["blocks.1.mlp.w_value.weight"], value)

    def test_weights_that_are_computed(self):
        model, state = with_experts(), dense(seed=1).state_dict()
        nn.utils.parametrizations.weight_norm(model.blocks[1].mlp.up, "weight")
        model.load_state_dict(model.state_dict())
        with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp\.up\.weight is computed from others"):
            model.load_state_dict(state, strict=False)

    @pytest.mark.parametrize("name", ["fused", "pair"])
    def test_wrapped_experts(self, name):
        model, other = with_experts(name), dense(name, seed=1)
        check = lambda module: type(module).__name__ == "ExpertLinear"  # noqa: E731
        apply_activation_checkpointing(model, check_fn=check)
        before = [p.detach().clone() for p in model.parameters()]
        model.load_state_dict(model.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(tokens()), other(tokens()))

    def test_another_number_of_experts(self):
        model = dense()
        ewa.replace_ffn_(model, 2)
        with pytest.raises(RuntimeError, match=r"size mismatch for blocks\.1\.mlp\.up\.weight"):
            model.load_state_dict(with_experts().state_dict(), strict=False)

    @pytest.mark.usefixtures("registered")
    def test_projections_named_up_and_down(self):
        """The experts have these names: a dense model cannot load them, and an FFN's are told by their dimensions."""

        def make(seed):
            torch.manual_seed(seed)
            return Transformer(*(ewa.FFN(8, 16) for _ in range(2))).eval()

        ewa.register_ffn_adapter(ewa.FFN, up="up", down="down")
        model, other = make(0), make(1)
        ewa.replace_ffn_(model, 3, init="independent")
        state = copy.deepcopy(model.state_dict())
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(tokens()), other(tokens()))
        model.load_state_dict(state)
        assert torch.equal(model.blocks[1].mlp.up.weight, state["blocks.1.mlp.up.weight"])
        with pytest.raises(RuntimeError, match="size mismatch"):
            other.load_state_dict(state)


class TestSavedByAnything:
    def test_torch_and_safetensors(self, tmp_path):
        model, untouched = with_experts(), dense(seed=1)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        save_file(model.state_dict(), tmp_path / "file.safetensors")
        save_model(model, str(tmp_path / "model.safetensors"))
        for state in (torch.load(buffer), load_file(tmp_path / "file.safetensors")):
            untouched.load_state_dict(state, strict=False)
            assert torch.equal(untouched(tokens()), model(tokens()))
        resumed = with_experts(seed=2)
        load_model(resumed, tmp_path / "model.safetensors")
        assert_experts(resumed, experts_of(model))

    def test_copies(self):
        model = with_experts()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin.load_state_dict(dense(seed=1).state_dict())
            assert torch.equal(twin(tokens()), dense(seed=1)(tokens()))
        assert not torch.equal(model(tokens()), dense(seed=1)(tokens()))

    @pytest.mark.usefixtures("one_process")
    @pytest.mark.parametrize("name", ["fused", "pair"])
    def test_distributed_checkpoints(self, name, tmp_path):
        """Of a model that is sharded, resumed, and whole."""
        model = with_experts(name)
        fully_shard(model)
        expected = {n: t.full_tensor() for n, t in ewa.expert_tensors(model)}
        dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path)
        resumed = with_experts(name, seed=1)
        fully_shard(resumed)
        state = get_model_state_dict(resumed)
        dcp.load(state, checkpoint_id=tmp_path)
        set_model_state_dict(resumed, state)
        for key, tensor in ewa.expert_tensors(resumed):
            assert torch.equal(tensor.full_tensor(), expected[key]), key
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        untouched = dense(name, seed=2)
        untouched.load_state_dict(whole, strict=False)
        assert torch.equal(untouched(tokens()), ewa.fold_(with_experts(name))(tokens()))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(resumed, dense(name, seed=3).state_dict(), options=options)
        for key, tensor in ewa.expert_tensors(resumed):
            assert all(torch.equal(expert, tensor.full_tensor()[0]) for expert in tensor.full_tensor()), key


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VIT = ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1, num_labels=3)
BERT = BertConfig(**SIZES, vocab_size=20)
LLAMA = LlamaConfig(**SIZES, vocab_size=20, tie_word_embeddings=True)
IDS = torch.arange(12).view(2, 6)


def run(model, x):
    with torch.no_grad():
        output = model.eval()(x)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.parametrize(
    ("model_class", "config", "x"),
    [(ViTForImageClassification, VIT, torch.randn(2, 1, 8, 8)), (BertModel, BERT, IDS), (LlamaForCausalLM, LLAMA, IDS)],
    ids=["ViT", "BERT", "Llama"],
)
class TestTransformers:
    def test_save_pretrained(self, model_class, config, x, tmp_path):
        """The library's own class loads the mean, and knows nothing of the experts beside it."""
        model = model_class(config)
        ewa.replace_ffn_(model, 3, init="independent")
        model.save_pretrained(tmp_path)
        loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        assert all(".up." in key or ".down." in key or ".experts." in key for key in report["unexpected_keys"])
        assert torch.equal(run(loaded, x), run(model, x))

    @pytest.mark.parametrize("saved", ["dense", "with experts"])
    def test_a_class_that_replaces_in_its_init(self, model_class, config, x, saved, tmp_path):
        class Replaces(model_class):
            def __init__(self, config):
                super().__init__(config)
                ewa.replace_ffn_(self, 3)

        torch.manual_seed(0)
        model = model_class(config)
        if saved == "with experts":
            ewa.replace_ffn_(model, 3, init="independent")
        model.save_pretrained(tmp_path)
        loaded = Replaces.from_pretrained(tmp_path)
        merged = {name: ewa.functional.merge_experts(t) for name, t in experts_of(loaded).items()}
        run(loaded.train(), x)
        for name, t in experts_of(loaded).items():  # they were there before anybody asked
            assert torch.equal(ewa.functional.merge_experts(t), merged[name])
        other = model_class(config)
        ewa.replace_ffn_(other, 3, init="independent")
        resumed = Replaces.from_pretrained(tmp_path)
        resumed.load_state_dict(other.state_dict())
        run(resumed, x)
        assert_experts(resumed, experts_of(other))
        assert torch.equal(run(loaded, x), run(model, x))
        assert run(ewa.fold_(loaded), x).isfinite().all()
        if saved == "with experts":
            assert_experts(Replaces.from_pretrained(tmp_path), experts_of(model))
            low = Replaces.from_pretrained(tmp_path, dtype=torch.bfloat16)
            assert_experts(low, experts_of(model.bfloat16()))
            model.save_pretrained(tmp_path)
            assert_experts(Replaces.from_pretrained(tmp_path, dtype=torch.float32), experts_of(model.float()))


class TestUnderItsOldName:
    """What stands where a projection was: shapes, for who walks there by name, and no values."""

    def test_shapes_alone(self):
        model = with_experts()
        weight = model.blocks[1].mlp.fc1.weight
        assert (weight.shape, weight.dtype, weight.ndim) == ((16, 8), torch.float32, 2)
        for use in (
            lambda: weight + 1,
            lambda: weight.data.zero_(),
            lambda: weight.copy_(weight),
            lambda: weight.sum(),
        ):
            with pytest.raises(RuntimeError, match=r"fc1\.weight has experts in its place: load a state dict, or fold"):
                use()
        assert not hasattr(model.blocks[1].mlp, "fc3")
        assert "fc1" not in dict(model.blocks[1].mlp.named_children())

    def test_set_by_name(self):
        model, other = with_experts(), dense(seed=1).blocks[1].mlp
        for name, parameter in other.named_parameters():
            holder, _, which = name.partition(".")
            setattr(model.blocks[1].mlp.get_submodule(holder), which, parameter)
        x = tokens(2, 5, 8)
        assert torch.equal(model.blocks[1].mlp(x), other(x))


@pytest.mark.usefixtures("registered")
class TestUnfolded:
    """A file that makes the experts, too."""

    @pytest.fixture(params=["fused", "pair"])
    def name(self, request):
        return request.param

    def test_into_a_dense_model(self, name, tmp_path):
        model, other = with_experts(name), dense(name, seed=1)
        ewa.save_unfolded(model, tmp_path / "model.pt")
        report = ewa.load_unfolded_(other, os.fspath(tmp_path / "model.pt"))
        assert set(report.forms.values()) == {name}
        assert len(report.replaced) == len(report.kept) == 2
        assert_experts(other, experts_of(model))
        assert repr(other) == repr(model)
        dense(name).load_state_dict(ewa.fold_(other).state_dict(), strict=True)

    def test_into_a_model_with_experts(self, name, tmp_path):
        model, other = with_experts(name), with_experts(name, seed=1)
        parameters = list(other.parameters())
        ewa.save_unfolded(model, tmp_path / "model.pt")
        ewa.load_unfolded_(other, tmp_path / "model.pt")
        assert_experts(other, experts_of(model))
        assert all(a is b for a, b in zip(other.parameters(), parameters, strict=True))

    @pytest.mark.usefixtures("one_process")
    def test_wrapped_and_sharded(self, tmp_path):
        model = with_experts()
        ewa.save_unfolded(DistributedDataParallel(model), tmp_path / "model.pt")
        other = dense(seed=1)
        ewa.load_unfolded_(torch.compile(other), tmp_path / "model.pt")
        assert_experts(other, experts_of(model))
        sharded = with_experts(seed=2)
        fully_shard(sharded)
        ewa.load_unfolded_(sharded, tmp_path / "model.pt")
        ewa.save_unfolded(sharded, tmp_path / "again.pt")
        ewa.load_unfolded_(other := dense(seed=3), tmp_path / "again.pt")
        assert_experts(other, experts_of(model))

    def test_is_complete_or_not_there(self, tmp_path, monkeypatch):
        model = with_experts()
        ewa.save_unfolded(model, tmp_path / "model.pt")
        before = (tmp_path / "model.pt").read_bytes()

        def fails(content, file):
            file.write(b"some")
            raise OSError("disk full")

        monkeypatch.setattr(torch, "save", fails)
        with pytest.raises(OSError, match="disk full"):
            ewa.save_unfolded(model, tmp_path / "model.pt")
        assert (tmp_path / "model.pt").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
        ewa.save_unfolded(model, tmp_path / "other.pt", is_main_process=False)
        assert not (tmp_path / "other.pt").exists()

    def test_bad_arguments(self, tmp_path):
        with pytest.raises(ValueError, match="model must hold experts that replace_ffn_ made, got none"):
            ewa.save_unfolded(dense(), "model.pt")
        for function in (ewa.save_unfolded, ewa.load_unfolded_):
            with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
                function([], "model.pt")
            with pytest.raises(TypeError, match="path must be a str or a PathLike, got int"):
                function(with_experts(), 3)
        with pytest.raises(FileNotFoundError, match=r"path must be in a folder that exists, got .*none/model\.pt"):
            ewa.save_unfolded(with_experts(), tmp_path / "none" / "model.pt")
        with pytest.raises(FileNotFoundError):
            ewa.load_unfolded_(dense(), tmp_path / "none.pt")
        with torch.device("meta"), pytest.raises(ValueError, match="model must have memory to load into"):
            ewa.load_unfolded_(dense(), tmp_path / "none.pt")

    @pytest.mark.parametrize("target", [dense, with_experts])
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"words", "cannot read"),
            ([1], "got another"),
            ({"format": "ewa_kernels.unfolded", "version": 3}, "version 2, got 3"),
            ({"format": "ewa_kernels.unfolded", "version": 2}, "got one without tensors"),
            (lambda state: state.pop("head.bias"), r"the file lacks head\.bias and has beside them none"),
            (lambda state: state.update(extra=torch.zeros(1)), "the file lacks none and has beside them extra"),
            (
                lambda state: state.update({"head.bias": torch.zeros(4)}),
                r"its head\.bias has \[3\], the saved one \[4\]",
            ),
        ],
        ids=["unreadable", "another", "version", "incomplete", "less", "more", "shape"],
    )
    def test_a_bad_file_changes_nothing(self, target, content, message, tmp_path):
        path, model = tmp_path / "model.pt", target(seed=1)
        modules, values, text = list(model.modules()), copy.deepcopy(model.state_dict()), repr(model)
        if callable(content):
            ewa.save_unfolded(with_experts(), path)
            good = torch.load(path)
            content(good["state_dict"])
            torch.save(good, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            ewa.load_unfolded_(model, path)
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
        assert repr(model) == text

    def test_of_another_architecture(self, tmp_path):
        ewa.save_unfolded(with_experts(), tmp_path / "model.pt")
        other = dense()
        other.blocks[3].mlp.fc1.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=r"its blocks\.3\.mlp has hooks that would be lost"):
            ewa.load_unfolded_(other, tmp_path / "model.pt")
        other = Transformer(*(Mlp(d_ff=20) for _ in range(4)))
        with pytest.raises(ValueError, match=r"model must have the saved shapes"):
            ewa.load_unfolded_(other, tmp_path / "model.pt")
