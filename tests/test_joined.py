"""FFNs that are parts of a larger block: torch's own transformer layers, BERT's and their kin."""

import copy
import pickle

import pytest
import torch
from torch import nn

import ewa_kernels as ewa


def encoder(num_layers=2, activation="relu", dropout=0.0, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, activation, batch_first=True, **options)
    return nn.TransformerEncoder(layer, num_layers)


class Intermediate(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.dense = nn.Linear(16, 32)
        self.intermediate_act_fn = act or nn.GELU()

    def forward(self, x):
        return self.intermediate_act_fn(self.dense(x))


class Output(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(32, 16)
        self.dropout = nn.Dropout(0.1)
        self.LayerNorm = nn.LayerNorm(16)

    def forward(self, hidden, residual):
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class BertLike(nn.Module):
    """As BERT's layers are made, and ViT's before transformers 5."""

    def __init__(self, intermediate=None, output=None):
        super().__init__()
        self.intermediate, self.output = intermediate or Intermediate(), output or Output()

    def forward(self, x):
        return self.output(self.intermediate(x), x)


def x():
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


EVERY = {"filter_fn": lambda *_: True}


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"norm_first": True}, {"activation": nn.SiLU()}])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
class TestTorch:
    def test_replaced_ones_are_used(self, options, no_grad):
        """In eval mode and without gradients, torch's layers have a fast path that calls no module."""
        model = encoder(**options).eval()
        original = copy.deepcopy(model)
        padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
        context = torch.no_grad() if no_grad else torch.enable_grad()
        with context:
            expected = model(x(), src_key_padding_mask=padding)
        ewa.replace_ffn_(model, **EVERY)
        with torch.no_grad():
            for layer in model.layers:
                layer.linear1.down.weight *= torch.arange(4.0)[:, None, None]  # their mean is 1.5 times what it was
            for layer in original.layers:
                layer.linear2.weight *= 1.5
        with context:
            moved = model(x(), src_key_padding_mask=padding)
            by_hand = original(x(), src_key_padding_mask=padding)
        real = ~padding  # what the fast path gives for padding is 0
        torch.testing.assert_close(moved[real], by_hand[real])
        assert (moved - expected)[real].abs().max() > 0.1
        ewa.fold_(model)
        with context:
            assert torch.equal(model(x(), src_key_padding_mask=padding), by_hand)
        assert model.use_nested_tensor == original.use_nested_tensor
        for layer, before in zip(model.layers, original.layers, strict=True):
            assert vars(layer).keys() == vars(before).keys()
            assert layer.activation_relu_or_gelu == before.activation_relu_or_gelu
            assert isinstance(before.activation, nn.Module) or layer.activation is before.activation


class TestJoined:
    def test_dropouts(self):
        """That of hidden is the experts', that of the output stays the block's."""
        model = encoder(dropout=0.3)
        ewa.replace_ffn_(model)
        layer = model.layers[1]
        assert (layer.linear1.dropout, layer.linear1.output_dropout) == (0.3, 0.0)
        assert layer.dropout2.p == 0.3
        model(x()).sum().backward()

    def test_the_decoder_has_none_of_the_encoders_flags(self):
        model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True), 2).eval()
        expected = model(x(), x())
        assert ewa.replace_ffn_(model).replaced == ("layers.1",)
        assert torch.equal(model(x(), x()), expected)
        assert "activation_relu_or_gelu" not in vars(model.layers[1])

    def test_report_tells_the_block(self):
        (_, site) = ewa.find_ffns(encoder())
        assert (site.name, site.kind, type(site.module)) == ("layers.1", "torch", nn.TransformerEncoderLayer)

    def test_a_block_by_itself(self):
        block = encoder().layers[0].eval()
        expected = block(x())
        ewa.replace_ffn_(block, **EVERY)
        assert torch.equal(block(x()), expected)
        assert [site.skip_reason for site in ewa.find_ffns(block)] == ["is a RandomPartitionMoE already"]

    @pytest.mark.parametrize("where", ["class", "instance"])
    def test_an_ff_block_of_its_own(self, where):
        class Other(nn.TransformerEncoderLayer):
            def _ff_block(self, x):
                return 2 * super()._ff_block(x)

        model = encoder()
        if where == "class":
            model.layers[1].__class__ = Other
        else:
            model.layers[1]._ff_block = lambda x: x
        report = ewa.replace_ffn_(model, **EVERY)
        assert report.replaced == ("layers.0",)
        assert report.skipped == {"layers.1": "its _ff_block is not that of torch.nn.TransformerEncoderLayer"}

    @pytest.mark.parametrize("make", [lambda: encoder(4), lambda: nn.Sequential(BertLike(), BertLike())])
    def test_copies_fold_too(self, make):
        model = make()
        original = copy.deepcopy(model)
        ewa.replace_ffn_(model)
        with torch.no_grad():
            for _, parameter in ewa.expert_tensors(model):
                parameter += torch.randn_like(parameter)
        expected = ewa.folded_state_dict(model)
        assert list(expected) == list(original.state_dict())
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
            assert repr(ewa.fold_(twin)) == repr(original)
            assert all(torch.equal(expected[name], value) for name, value in twin.state_dict().items())
            assert not any("Experts" in type(m).__name__ or type(m).__name__ == "Through" for m in twin.modules())

    def test_unfolded_checkpoint(self):
        model, other = encoder(), encoder()
        for m in (model, other):
            ewa.replace_ffn_(m, init="independent")
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(other.eval()(x()), model.eval()(x()))

    def test_compiled(self):
        torch.compiler.reset()
        model = nn.Sequential(BertLike(), BertLike())
        ewa.replace_ffn_(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled.eval()(x()), model.eval()(x()))
        compiled.train()(x()).sum().backward()

    @pytest.mark.parametrize("act", [nn.functional.gelu, nn.GELU("tanh"), nn.ReLU()])
    def test_activation_of_any_kind(self, act):
        model = nn.Sequential(BertLike(Intermediate(act)), BertLike(Intermediate(act))).eval()
        expected = model(x())
        ewa.replace_ffn_(model)
        assert torch.equal(model(x()), expected)  # the other block, which may share the module, is as it was
        assert ewa.fold_(model)[1].intermediate.intermediate_act_fn is act
        assert torch.equal(model(x()), expected)


class Scales(Intermediate):
    def forward(self, x):
        return 2 * super().forward(x)


class NormsHidden(Output):
    def forward(self, hidden, residual):
        return super().forward(hidden / hidden.norm(dim=-1, keepdim=True), residual)


class AddsHidden(Output):
    def forward(self, hidden, residual):
        return super().forward(hidden, residual) + hidden[..., :16]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (BertLike(Scales()), "does more with its projections"),
        (BertLike(None, NormsHidden()), "does more with its projections"),
        (BertLike(None, AddsHidden()), "does more with its projections"),
        (BertLike(Intermediate(nn.Mish())), r"its output is not down\(act\(up\(x\)\)\)"),
        (BertLike(Intermediate(nn.PReLU())), "has other parameters or buffers: act.weight"),
    ],
    ids=lambda value: (
        None if isinstance(value, str) else type(value.intermediate).__name__ + type(value.output).__name__
    ),
)
def test_what_is_no_plain_ffn_is_skipped(block, reason):
    (site,) = ewa.find_ffns(nn.Sequential(block))
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(site.skip_reason)
