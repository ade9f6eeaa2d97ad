"""What experts as transformers 5 stacks them compute, found by execution."""

import copy

import pytest
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.0")

import ewa_kernels as ewa  # noqa: E402
from ewa_kernels.moe import stacked  # noqa: E402


@pytest.fixture
def experts():
    """Mixtral's."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    model = transformers.MixtralModel(transformers.MixtralConfig(**sizes, vocab_size=97, num_local_experts=4))
    return model.layers[0].mlp.experts


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class TestFormula:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"has_post_expert_norm": True}, "has a norm after each expert"),
            ({"act_fn": nn.PReLU()}, "has an activation with parameters"),
            ({"act_fn": nn.Softplus()}, "does not compute act"),
            ({"act_fn": nn.Module()}, "cannot be examined: NotImplementedError"),
            ({"_apply_gate": lambda pre: pre.clamp(max=90).chunk(2, -1)[0]}, "does not compute act"),
            ({"gate_up_proj": None}, "has no gate_up_proj of three dimensions"),
            ({"has_gate": False}, "has no up_proj of three dimensions"),
        ],
    )
    def test_reasons(self, experts, change, reason):
        for name, value in change.items():
            setattr(experts, name, value)
        assert reason in stacked.formula_of(experts).reason

    @pytest.mark.parametrize("name", list(ewa.reference.ACTIVATIONS))
    def test_every_activation_is_found(self, experts, name):
        experts.act_fn = Function(ewa.reference.ACTIVATIONS[name])
        assert stacked.formula_of(experts) == ("gate_up_proj", True, False, name, None)

    def test_an_activation_that_is_replaced_is_found_again(self, experts):
        for name in ("silu", "relu"):
            experts.act_fn = Function(ewa.reference.ACTIVATIONS[name])
            assert stacked.formula_of(experts).activation == name

    def test_interleaved_and_clamped_are_not_taken_for_plain(self, experts):
        silu = nn.functional.silu
        for apply_gate in (
            lambda pre: silu(pre[..., ::2]) * pre[..., 1::2],
            lambda pre: silu(pre.clamp(max=100).chunk(2, -1)[0]) * pre.chunk(2, -1)[1],
            lambda pre: silu(pre.chunk(2, -1)[1]) * pre.chunk(2, -1)[0],
        ):
            twin = copy.deepcopy(experts)
            twin._apply_gate = apply_gate
            assert stacked.formula_of(twin).reason is not None
