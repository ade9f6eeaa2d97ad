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

    @pytest.mark.parametrize("method", ["_ff_block", "_sa_block", "forward"])
    @pytest.mark.parametrize("where", ["class", "instance"])
    def test_a_method_of_its_own(self, where, method):
        """Which may use the FFN's parts for something else."""
        model = encoder()
        if where == "class":
            model.layers[1].__class__ = type("Other", (nn.TransformerEncoderLayer,), {method: lambda self, x, *_: x})
        else:
            setattr(model.layers[1], method, lambda x, *_: x)
        report = ewa.replace_ffn_(model, **EVERY)
        assert report.replaced == ("layers.0",)
        assert report.skipped == {"layers.1": f"its {method} is not that of torch.nn.TransformerEncoderLayer"}

    def test_fuse_of_a_part(self):
        """A library that fuses what it can would leave a block of stand-ins."""
        model = encoder()
        ewa.replace_ffn_(model)
        with pytest.raises(ValueError, match=r"parts of a block: use ewa_kernels\.fold_\(model\)"):
            model.layers[1].linear1.fuse()

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


class ScalesBetween(BertLike):
    def forward(self, x):
        return self.output(self.intermediate(x) * 3.0, x)


class DetachesBetween(BertLike):
    def forward(self, x):
        return self.output(self.intermediate(x).detach(), x)


class Twice(BertLike):
    def forward(self, x):
        return self.output(self.intermediate(x) + self.intermediate(x.cos()), x)


class BetweenInTraining(BertLike):
    def forward(self, x):
        return self.output(self.intermediate(x) * (2 if self.training else 1), x)


class NeedsMore(BertLike):
    def forward(self, x, scale):
        return self.output(self.intermediate(x * scale), x)


def instance_forward():
    block = BertLike()
    block.forward = lambda x: block.output(block.intermediate(x), x)
    return block


class Attends(BertLike):
    """Attention that does not run on tokens alone."""

    def __init__(self, pair):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        self.pair = pair

    def forward(self, x, mask, height=None):
        y = self.attention(x, mask, mask)
        y = y[0] if self.pair else y.view(x.shape)
        return self.output(self.intermediate(y), y)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (BertLike(Scales()), "does more with its projections"),
        (BertLike(None, NormsHidden()), "does more with its projections"),
        (BertLike(None, AddsHidden()), "does more with its projections"),
        (ScalesBetween(), "its block does more with its projections"),
        (DetachesBetween(), "its block does more with its projections"),
        (Twice(), "its block does more with its projections"),
        (BetweenInTraining(), "its block does more with its projections"),
        (NeedsMore(), r"its block fails on \[2, 16, D\]: TypeError"),
        (instance_forward(), "the forward of its block is not that of the block's class"),
        (BertLike(Intermediate(nn.Mish())), r"its output is not down\(act\(up\(x\)\)\)"),
        (BertLike(Intermediate(nn.PReLU())), "has other parameters or buffers: act.weight"),
    ],
    ids=lambda value: (
        None if isinstance(value, str) else "".join(type(m).__name__ for m in (value, value.intermediate, value.output))
    ),
)
def test_what_is_no_plain_ffn_is_skipped(block, reason):
    (site,) = ewa.find_ffns(nn.Sequential(block))
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(site.skip_reason)


@pytest.mark.parametrize("pair", [False, True])
def test_block_whose_attention_needs_more(pair):
    (site,) = ewa.find_ffns(nn.Sequential(Attends(pair)))
    assert site.skip_reason is None


def test_shared_parts_of_two_blocks():
    model = nn.Sequential(BertLike(), BertLike(), BertLike())
    model[1].intermediate = model[0].intermediate
    report = ewa.replace_ffn_(model, **EVERY)
    assert report.replaced == ("2",)
    assert report.skipped == dict.fromkeys("01", "shares with another module: intermediate")


class ByKeyword(BertLike):
    def forward(self, x):
        dense, act = self.intermediate.dense, self.intermediate.intermediate_act_fn
        return self.output.LayerNorm(self.output.dense(input=act(input=dense(input=x))) + x)


def test_parts_called_by_keyword():
    model = nn.Sequential(ByKeyword()).eval()
    expected = model(x())
    ewa.replace_ffn_(model, **EVERY)
    assert torch.equal(model(x()), expected)


class TestSequentialAfterNorm:
    """As research code has it: LayerNorm, FFN and dropouts in one Sequential."""

    def make(self, *more, dropout=0.1):
        first = (nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU())
        dropouts = (nn.Dropout(dropout),) if dropout else ()
        return nn.Sequential(nn.Sequential(*first, *dropouts, nn.Linear(32, 16), *dropouts, *more))

    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    def test_replaced_and_folded(self, dropout):
        model = self.make(dropout=dropout).eval()
        original, expected = copy.deepcopy(model), model(x())
        (site,) = ewa.find_ffns(model)
        assert (site.name, site.kind, site.layout.dropout) == ("0", "norm_sequential", dropout)
        ewa.replace_ffn_(model, **EVERY)
        assert isinstance(model[0][1], ewa.RandomPartitionMoE)
        assert torch.equal(model(x()), expected)
        model.train()(x()).sum().backward()
        assert repr(ewa.fold_(model).eval()) == repr(original)
        assert torch.equal(model(x()), expected)

    def test_with_something_after_it(self):
        model = self.make(nn.LayerNorm(16)).eval()
        expected = model(x())
        ewa.replace_ffn_(model, **EVERY)
        assert torch.equal(model(x()), expected)

    def test_head(self):
        model = nn.Sequential(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 5)))
        assert [site.skip_reason for site in ewa.find_ffns(model)] == ["maps 16 to 5 features, not to as many"]
