"""`replace_moe_` on models of transformers: 5, and 4 with its lists of experts."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ewa_kernels as ewa

TESTS = Path(__file__).parent


class TestTransformers5:
    def made(self, to, **options):
        transformers = pytest.importorskip("transformers", minversion="5.0")
        config = transformers.MixtralConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            output_router_logits=True,
        )
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(config)
        model.set_experts_implementation("eager")
        original = copy.deepcopy(model)
        return model, original, ewa.replace_moe_(model, to=to, **options)

    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))

    def test_layer_by_layer(self):
        model, original, report = self.made("routed", filter_fn=lambda name, _: ".1." not in name, backend="reference")
        names = tuple(f"model.layers.{i}.mlp.experts" for i in range(3))
        assert (report.replaced, report.kept) == ((names[0], names[2]), (names[1],))
        settings = [layer.mlp.experts.config._experts_implementation for layer in model.model.layers]
        assert (settings, model.config._experts_implementation) == (["ewa", "eager", "ewa"], "eager")
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in original.named_parameters()]
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        expected, actual = (m(self.ids, labels=self.ids) for m in (original, model))
        torch.testing.assert_close(actual.logits, expected.logits)
        torch.testing.assert_close(actual.aux_loss, expected.aux_loss)
        assert len(actual.router_logits) == 3
        assert all(torch.equal(twin(self.ids).logits, actual.logits) for twin in twins)
        expected.loss.backward()
        actual.loss.backward()
        for (name, p), q in zip(model.named_parameters(), original.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)

    def test_random_partition_fold_and_restore(self):
        model, original, _ = self.made("random_partition")
        model.train()
        assert not torch.equal(model(self.ids).logits, model(self.ids).logits)
        expected = model.eval()(self.ids).logits
        twin = ewa.fold_moe_(copy.deepcopy(model))
        assert torch.equal(twin(self.ids).logits, expected)
        assert len(twin(self.ids).router_logits) == 3
        assert twin.model.layers[0].mlp.experts.up.weight.shape == (96, 32)
        ewa.restore_moe_(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
        assert torch.equal(model(self.ids).logits, original.eval()(self.ids).logits)
        assert all(layer.mlp.experts.config is model.config for layer in model.model.layers)

    def test_checkpoints_after_the_fold(self, tmp_path):
        """The library reads experts that are all the mean; the folded model reads the mean of the library's."""
        model, original, _ = self.made("random_partition")
        expected, keys = model.eval()(self.ids).logits, list(model.state_dict())
        ewa.fold_moe_(model).save_pretrained(tmp_path)
        assert list(model.state_dict()) == keys
        loaded = type(model).from_pretrained(tmp_path, experts_implementation="eager")
        for layer, own in zip(loaded.model.layers, model.model.layers, strict=True):
            up, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
            assert torch.equal(up, own.mlp.experts.up.weight.expand_as(up))
            assert torch.equal(down, own.mlp.experts.down.weight.expand_as(down))
        torch.testing.assert_close(loaded.eval()(self.ids).logits, expected)  # this router's weights sum to 1
        for state in copy.deepcopy([original.state_dict(), loaded.state_dict(), model.state_dict()]):
            for parameter in model.parameters():
                torch.nn.init.zeros_(parameter)
            model.load_state_dict(state)
            assert torch.equal(model(self.ids).logits, expected)

    def test_in_another_process(self, monkeypatch):
        """Where nothing of this package was imported."""
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        model, _, _ = self.made("routed")
        pickled, expected = pickle.dumps(model), model(self.ids).logits
        monkeypatch.delitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "ewa")
        with pytest.raises(KeyError, match="`ewa` is not a valid experts implementation"):
            model(self.ids)
        assert torch.equal(pickle.loads(pickled)(self.ids).logits, expected)

    def test_experts_implementation_after_restoring(self):
        model, original, _ = self.made("random_partition")
        model.eval().set_experts_implementation("eager")
        assert not torch.allclose(model(self.ids).logits, original.eval()(self.ids).logits)
        ewa.restore_moe_(model).set_experts_implementation("eager")
        assert torch.equal(model(self.ids).logits, original(self.ids).logits)

    def test_restoring_after_the_fold(self):
        model, _, _ = self.made("random_partition")
        expected = ewa.fold_moe_(model.eval())(self.ids).logits
        assert torch.equal(ewa.restore_moe_(model)(self.ids).logits, expected)

    def test_fold_after_the_setting(self):
        model, _, _ = self.made("routed")
        ewa.restore_moe_(model)
        import ewa_kernels.integrations.transformers_experts  # noqa: F401

        model.set_experts_implementation("ewa_random_partition")
        expected = model.eval()(self.ids).logits
        assert torch.equal(ewa.fold_moe_(model)(self.ids).logits, expected)

    def test_averaging(self):
        model, _, _ = self.made("routed")
        spread = ewa.ExpertAverager(model, 0.3).spread()
        assert len(spread) == 6

    def test_what_the_kernels_cannot_express_is_left_alone(self):
        transformers = pytest.importorskip("transformers", minversion="5.0")
        config = transformers.GptOssConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
        )
        model = transformers.GptOssForCausalLM(config)
        with pytest.warns(UserWarning, match="does not compute act"):
            ewa.replace_moe_(model, to="routed")


REAL = """
import copy, sys, pickle, torch, vision, transformers as tf
assert tf.__version__.startswith("4.57"), tf.__version__
import ewa_kernels as ewa
sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, max_position_embeddings=64, num_experts_per_tok=2)
logits = dict(output_router_logits=True)
heads = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
models = [
    tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, **logits, num_local_experts=4)),
    tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**sizes, **logits, num_experts=4, moe_intermediate_size=24,
                                             shared_expert_intermediate_size=40)),
    tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes, **logits, num_experts=4, moe_intermediate_size=24, head_dim=8)),
    tf.OlmoeForCausalLM(tf.OlmoeConfig(**sizes, **logits, num_experts=4)),
    tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**sizes, **heads, n_routed_experts=4, moe_intermediate_size=24,
                                                 first_k_dense_replace=1, n_group=2, topk_group=2)),
    tf.MiniMaxForCausalLM(tf.MiniMaxConfig(**sizes, **logits, num_local_experts=4, head_dim=8)),
    tf.JambaForCausalLM(tf.JambaConfig(**sizes, num_experts=4, use_mamba_kernels=False)),
    tf.Glm4MoeForCausalLM(tf.Glm4MoeConfig(**sizes, n_routed_experts=4, moe_intermediate_size=24, head_dim=8,
                                           first_k_dense_replace=1, n_group=1, topk_group=1)),
    tf.HunYuanMoEV1ForCausalLM(tf.HunYuanMoEV1Config(**sizes, num_experts=4, moe_topk=2, head_dim=8, pad_token_id=0)),
    tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(**sizes, num_experts=4, moe_intermediate_size=24, head_dim=8,
                                               shared_expert_intermediate_size=24,
                                               layer_types=["linear_attention", "full_attention"])),
]
ids = torch.randint(1, 97, (2, 9))
for model in models:
    original = copy.deepcopy(model)
    for called_before in (False, True):
        expected = original(ids, labels=ids)
        report = ewa.replace_moe_(model, to="routed")
        assert report.replaced and not report.skipped, report
        actual = model(ids, labels=ids)
        torch.testing.assert_close(actual.logits, expected.logits)
        if getattr(expected, "router_logits", None):
            torch.testing.assert_close(actual.router_logits, expected.router_logits)
            torch.testing.assert_close(actual.aux_loss, expected.aux_loss)
        actual.loss.backward(), expected.loss.backward()
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, actual.logits)
        ewa.ExpertAverager(model, 0.3).step()
        ewa.replace_moe_(model, to="random_partition")
        dealt = model(ids, labels=ids)
        assert len(getattr(dealt, "router_logits", None) or ()) == len(getattr(expected, "router_logits", None) or ())
        folded = ewa.fold_moe_(copy.deepcopy(model).eval())
        assert torch.equal(folded(ids).logits, model.eval()(ids).logits)
        folded.save_pretrained(sys.argv[1])
        loaded = type(model).from_pretrained(sys.argv[1]).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in folded.state_dict().items()), type(model)
        ewa.restore_moe_(model)
        original.load_state_dict(model.train().state_dict())
        original.train()
        assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
"""


@pytest.mark.slow
def test_transformers_4(tmp_path):
    """The blocks of the last release with lists of experts."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", tmp_path, "transformers==4.57.*"]
    subprocess.run(command, check=True)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{TESTS}"}
    result = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=TESTS.parent,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
