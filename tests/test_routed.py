"""`RoutedMoE` and what it is made of, against a loop over tokens and their choices."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, output_and_grads, random_ffn
from torch import nn

import ewa_kernels as ewa
from ewa_kernels.kernels.blocked import blocks, cpp_products
from ewa_kernels.kernels.blocked import moe_ffn as blocked_ffn
from ewa_kernels.kernels.blocked.products import have_cpp

FORMS = ["triton-single", "triton-split", "triton-onchip"]
if not torch.cuda.is_available():
    FORMS.append("cublas")  # there it is for bfloat16, which tests/gpu has
# On a GPU the last one is for 16 bits alone.
FLOAT32_FORMS = FORMS[:2] if torch.cuda.is_available() else FORMS
BACKENDS = ["cpp", "torch", "reference", *FLOAT32_FORMS]


def device_of(backend):
    """Triton's kernels run where there is a GPU, else in its interpreter."""
    return "cuda" if backend.startswith("triton") and torch.cuda.is_available() else "cpu"


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def loop(x, up_weight, up_bias, down_weight, down_bias, router, *, top_k, renormalize=False, activation, gated):
    """Token by token. The k highest logits: of equal ones the first, as Python's sort has it."""
    rows = []
    for token in x:
        logits = router @ token
        chosen = sorted(range(len(logits)), key=lambda e: -logits[e].item())[:top_k]
        weights = logits.softmax(0)[chosen]
        if renormalize:
            weights = weights / weights.sum()
        total = torch.zeros_like(token)
        for weight, e in zip(weights, chosen, strict=True):
            pre = up_weight[e] @ token + (0 if up_bias is None else up_bias[e])
            hidden = ewa.reference.activate(pre, activation, gated)
            total = total + weight * (down_weight[e] @ hidden + (0 if down_bias is None else down_bias[e]))
        rows.append(total)
    return torch.stack(rows) if rows else x * router.sum() * up_weight.sum() * down_weight.sum()


def make(num_experts, top_k, *, dtype=torch.float64, **options):
    torch.manual_seed(3)
    layer = ewa.RoutedMoE(12, 20, num_experts, top_k, dtype=torch.float64, **options)
    nn.init.normal_(layer.router.weight)
    return layer.to(device_of(layer.backend), dtype)


def grads_of(layer, x, grad_y, **options):
    """Output and gradients of the layer, or of the loop with its parameters."""
    leaves = {"x": x.clone().requires_grad_(), **dict(layer.named_parameters())}
    names = ("up.weight", "up.bias", "down.weight", "down.bias", "router.weight")
    y = loop(leaves["x"], *(leaves.get(name) for name in names), **options) if options else layer(leaves["x"])
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y.to(y.dtype), allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
    return {"y": y.detach(), **{n: z if g is None else g for n, g, z in zip(leaves, grads, zeros, strict=True)}}


def check(layer, x, dtype=torch.float64):
    """The layer in `dtype` against the loop in float64, by the measure of the loop in `dtype`."""
    options = {n: getattr(layer, n) for n in ("top_k", "renormalize", "activation", "gated")}
    grad_y = tokens(*x.shape)
    exact = grads_of(layer.double(), x.double(), grad_y, **options)
    baseline = grads_of(layer.to(dtype), x.to(dtype), grad_y, **options)
    for name, ours in grads_of(layer, x.to(dtype), grad_y).items():
        assert_parity(name, ours, exact[name], baseline[name])


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{}, {"gated": True, "activation": "silu", "bias": False}, {"renormalize": True}], ids=str
)
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_is_the_loop(backend, options, top_k):
    if top_k > 1 or not options.get("renormalize"):
        check(make(5, top_k, backend=backend, **options), tokens(37, 12))


def test_is_the_loop_in_float32_by_cpp():
    check(make(5, 2, backend="cpp", gated=True), tokens(37, 12), torch.float32)


def test_another_default_device_changes_nothing():
    layer, x = make(4, 2, dtype=torch.float32), tokens(20, 12, dtype=torch.float32)
    expected = layer(x)
    with torch.device("meta"):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("block_rows", [64, 2048])
def test_groups_of_other_sizes_advance_together(monkeypatch, products_by, backend, block_rows):
    """As far as all have rows; what is left comes by turns."""
    monkeypatch.setattr(blocks, "LOCKSTEP_ROWS", 1)
    monkeypatch.setattr(blocked_ffn, "rows_in_a_block", lambda *_: block_rows)
    products_by("torch")
    passes = []
    monkeypatch.setattr(blocked_ffn, "blocks", lambda *args: passes.append(blocks.blocks(*args)) or passes[-1])
    check(make(3, 2, dtype=torch.float32, backend=backend, gated=True), tokens(200, 12), torch.float32)
    forward, backward = (
        [(block.experts, block.counts, block.beta) for block in of_pass] for of_pass in (passes[0], passes[-1])
    )
    assert forward == backward
    assert forward[0][0] == slice(0, 3)
    assert [beta for *_, beta in forward] == [0] + [1] * (len(forward) - 1)
    counts = [counts for _, counts, _ in forward]
    assert {len(of_block) for of_block in counts} == {1, 3}
    assert all(len(set(of_block)) == 1 for of_block in counts)


@pytest.mark.skipif(not have_cpp(torch.float32), reason="no AVX-512")
@pytest.mark.parametrize("block_rows", [64, 2048])
def test_all_advance_together_by_products_of_our_own(monkeypatch, block_rows):
    """Whatever sizes groups have."""
    monkeypatch.setattr(blocked_ffn, "rows_in_a_block", lambda *_: block_rows)
    passes, make_pass = [], cpp_products._C.LayerPass
    monkeypatch.setattr(cpp_products._C, "LayerPass", lambda *args: passes.append(make_pass(*args)) or passes[-1])
    check(make(3, 2, dtype=torch.float32, backend="cpp", gated=True), tokens(200, 12), torch.float32)
    counts = passes[0].counts
    assert counts == passes[-1].counts
    assert len(counts) == max(round(400 / block_rows), 1)
    assert {len(of_block) for of_block in counts} == {3}
    assert sum(map(sum, counts)) == 400
    assert len(set(map(sum, counts))) <= 3


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize(
    ("form", "dtype"), [*((f, torch.float32) for f in FLOAT32_FORMS), *((f, torch.float16) for f in FORMS)]
)
def test_kernels_are_the_specification(form, top_k, dtype):
    """Triton's interpreter: choices into groups of any size, one of them empty; the gradient of each operand."""
    device = device_of(form)
    x = tokens(41, 16, dtype=dtype).to(device)
    weights = [t.to(device) for t in random_ffn(5, 16, 24, gated=True, dtype=dtype)]
    logits = tokens(41, 5).to(device)
    logits[:, 3] = -9
    routing_weights, choices = ewa.functional.route(logits[:, [0, 1, 2, 4, 3]], top_k)
    permutation, offsets = ewa.functional.partition_by_expert(choices, 5)
    options = {"permutation": permutation, "expert_offsets": offsets, "gated": True, "dropout_p": 0.2, "seed": 4}
    operands = (x, *weights, routing_weights.to(dtype))

    def function(*operands, **more):
        *operands, routing_weights = operands
        return ewa.functional.grouped_ffn(*operands, routing_weights=routing_weights, **options, **more)

    wide = tuple(t.double() for t in operands)
    exact = output_and_grads(function, wide, x.double(), backend="reference")
    baseline = output_and_grads(function, operands, x, backend="reference")
    for name, ours in output_and_grads(function, operands, x, backend=form).items():
        assert_parity(name, ours, exact[name], baseline[name])


@pytest.mark.parametrize("backend", BACKENDS)
class TestCorners:
    def test_ties(self, backend):
        """With equal logits, the first experts; all weights 1/E."""
        layer = make(4, 2, dtype=torch.float32, backend=backend)
        nn.init.zeros_(layer.router.weight)
        x = tokens(11, 12, dtype=torch.float32).to(device_of(backend))
        expected = loop(x, *layer.experts, layer.router.weight, top_k=2, activation="gelu", gated=False)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)

    def test_all_to_one_expert(self, backend):
        """Experts without a token get a gradient of 0."""
        layer = make(4, 1, dtype=torch.float32, backend=backend)
        with torch.no_grad():
            layer.router.weight.zero_()[2, 0] = 9
        x = tokens(11, 12, dtype=torch.float32).to(device_of(backend))
        x[:, 0] = 5
        expected = loop(x, *layer.experts, layer.router.weight, top_k=1, activation="gelu", gated=False)
        y = layer(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        for parameter in (layer.up.weight, layer.up.bias, layer.down.weight, layer.down.bias):
            assert parameter.grad[2].any()
            assert not parameter.grad[[0, 1, 3]].any()

    @pytest.mark.parametrize("top_k", [1, 3])
    def test_no_tokens(self, backend, top_k):
        layer = make(4, top_k, dtype=torch.float32, backend=backend)
        x = torch.zeros(2, 0, 12, device=device_of(backend), requires_grad=True)
        y = layer(x)
        assert y.shape == (2, 0, 12)
        (y.sum() + layer.load_balance_loss + layer.z_loss).backward()
        assert x.grad.shape == x.shape
        assert all(not p.grad.any() for p in layer.parameters())

    def test_same_bits_every_time(self, backend):
        layer = make(4, 2, dtype=torch.float32, backend=backend)
        x, grad_y = tokens(60, 12, dtype=torch.float32).to(device_of(backend)), tokens(60, 12).to(device_of(backend))
        first = grads_of(layer, x, grad_y)
        for _ in range(5):
            again = grads_of(layer, x, grad_y)
            assert all(torch.equal(again[name], first[name]) for name in first)

    def test_nan_stays_in_its_row(self, backend):
        layer = make(4, 2, dtype=torch.float32, backend=backend)
        x = tokens(23, 12, dtype=torch.float32).to(device_of(backend))
        clean = layer(x)
        x[5, 3] = torch.nan
        y = layer(x)
        others = torch.arange(23) != 5
        assert y[5].isnan().all()
        torch.testing.assert_close(y[others], clean[others], rtol=1e-6, atol=1e-6)

    def test_frozen_router_or_experts(self, backend):
        """Each gets the gradient that it gets with all."""
        x = tokens(23, 12, dtype=torch.float32).to(device_of(backend))
        everything = grads_of(make(4, 2, dtype=torch.float32, backend=backend), x, x)
        for trained in ("router.weight", "down.bias", "up.weight"):
            layer = make(4, 2, dtype=torch.float32, backend=backend)
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(name == trained)
            (layer(x) * x).sum().backward()
            parameters = dict(layer.named_parameters())
            torch.testing.assert_close(parameters.pop(trained).grad, everything[trained], rtol=1e-5, atol=1e-5)
            assert all(p.grad is None for p in parameters.values())

    def test_recompute(self, backend):
        x = tokens(23, 12, dtype=torch.float32).to(device_of(backend))
        saved, recomputed = (
            grads_of(make(4, 2, dtype=torch.float32, backend=backend, recompute=r), x, x) for r in (False, True)
        )
        for name in saved:
            torch.testing.assert_close(saved[name], recomputed[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradcheck(top_k):
    x, weights = tokens(9, 6).requires_grad_(), random_ffn(3, 6, 8)
    routing_weights, choices = ewa.functional.route(tokens(9, 3), top_k)
    permutation, offsets = ewa.functional.partition_by_expert(choices, 3)
    leaves = [t.clone().requires_grad_() for t in (x, *weights, routing_weights)]

    def function(*operands):
        *operands, routing_weights = operands
        return ewa.functional.grouped_ffn(
            *operands, permutation=permutation, expert_offsets=offsets, routing_weights=routing_weights, dropout_p=0.3
        )

    assert torch.autograd.gradcheck(function, leaves)


class TestLosses:
    def test_of_even_and_uneven_routing(self):
        """1 if all experts are alike, E if one takes all."""
        layer = make(4, 1)
        nn.init.zeros_(layer.router.weight)
        x = tokens(40, 12)
        layer(x)
        assert layer.load_balance_loss.item() == pytest.approx(1)
        assert layer.z_loss.item() == pytest.approx(torch.tensor(4.0).log().square().item())
        with torch.no_grad():
            layer.router.weight[1, 0] = 100
        x[:, 0] = 5
        layer(x)
        assert layer.load_balance_loss.item() == pytest.approx(4)

    @pytest.mark.parametrize("top_k", [1, 3])
    def test_against_the_definition(self, top_k):
        layer, x = make(5, top_k), tokens(33, 12)
        layer(x)
        logits = x @ layer.router.weight.T
        hits = torch.zeros(5, dtype=torch.float64)
        for row in logits:
            for e in row.topk(top_k).indices:
                hits[e] += 1
        expected = 5 * (hits / (33 * top_k) * logits.softmax(1).mean(0)).sum()
        torch.testing.assert_close(layer.load_balance_loss, expected)
        torch.testing.assert_close(layer.z_loss, logits.logsumexp(1).square().mean())

    @pytest.mark.parametrize("top_k", [1, 3])
    def test_padding_takes_no_part(self, top_k):
        """Whatever it holds: losses and gradients are those of the other tokens alone."""
        layer, x = make(5, top_k), tokens(3, 11, 12)
        mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) < 0.6
        results = []
        for rows, of_rows in ((x[mask], None), (x.masked_fill(~mask[..., None], 1e3), mask)):
            layer(rows, mask=of_rows)
            losses = layer.load_balance_loss, layer.z_loss
            results.append((*losses, *torch.autograd.grad(sum(losses), [layer.router.weight])))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)
        layer(x, mask=torch.zeros(3, 11, dtype=torch.bool))
        assert layer.load_balance_loss == layer.z_loss == 0

    @pytest.mark.parametrize(
        ("mask", "error", "words"),
        [
            ([True], TypeError, "mask must be a bool tensor or None, got list"),
            (torch.ones(33), TypeError, "mask must be torch.bool, got torch.float32"),
            (torch.ones(32, dtype=torch.bool), ValueError, r"mask must be \[33\], one for each token of x, got \[32\]"),
            (torch.ones(33, dtype=torch.bool, device="meta"), TypeError, "mask must be on cpu like x, got meta"),
        ],
    )
    def test_a_mask_that_is_none(self, mask, error, words):
        with pytest.raises(error, match=words):
            make(4, 1)(tokens(33, 12), mask=mask)

    def test_teach_the_router(self):
        layer = make(4, 1)
        layer(tokens(33, 12))
        (layer.load_balance_loss + layer.z_loss).backward()
        assert layer.router.weight.grad.any()
        assert layer.up.weight.grad is None

    def test_only_in_training(self):
        layer = make(4, 1).eval()
        layer(tokens(33, 12))
        assert layer.load_balance_loss is None
        assert layer.z_loss is None


class TestLayer:
    def test_names_shapes_and_options(self):
        layer = ewa.RoutedMoE(8, 12, 4, 2, activation="silu", gated=True, bias=False, renormalize=True)
        assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
            "up.weight": (4, 24, 8),
            "down.weight": (4, 8, 12),
            "router.weight": (4, 8),
        }
        assert repr(layer).count("top_k=2, renormalize=True") == 1

    def test_eval_routes_too(self):
        layer = make(4, 2, dropout=0.5)
        x = tokens(20, 12)
        assert torch.equal(layer.eval()(x), layer(x))
        torch.manual_seed(0)
        dropped = layer.train()(x)
        assert not torch.allclose(dropped, layer(x))
        torch.manual_seed(0)
        assert torch.equal(layer(x), dropped)
        assert torch.equal(layer(x, seed=3), layer(x, seed=torch.tensor(3)))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_copies_after_a_step(self, copied):
        layer, x = make(4, 2), tokens(20, 12)
        layer(x).sum().backward()
        twin = copied(layer)
        assert torch.equal(twin(x), layer(x))
        assert twin.up.weight.data_ptr() != layer.up.weight.data_ptr()

    def test_logits_can_be_read_by_a_hook(self):
        layer, x, seen = make(4, 2), tokens(20, 12), []
        layer.router.register_forward_hook(lambda module, args, output: seen.append(output))
        layer(x)
        torch.testing.assert_close(seen, [x @ layer.router.weight.T])

    @pytest.mark.filterwarnings("ignore:torch.searchsorted")  # copies what vmap expanded
    def test_vmap_is_the_loop(self):
        layer = make(4, 2)
        batch = torch.stack([tokens(9, 12), -tokens(9, 12)])
        torch.testing.assert_close(torch.func.vmap(layer.eval())(batch), torch.stack([layer(x) for x in batch]))

    def test_exports_for_any_number_of_tokens(self):
        layer = make(4, 2).eval()
        dynamic = {"x": {0: torch.export.Dim("tokens", min=2, max=2**30 - 1)}}
        program = torch.export.export(layer, (tokens(5, 12),), dynamic_shapes=dynamic)
        torch.testing.assert_close(program.module()(tokens(9, 12)), layer(tokens(9, 12)))

    def test_compiles_whole(self):
        layer, x = make(4, 2), tokens(20, 12)
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        y = compiled(x)
        (y.sum() + layer.load_balance_loss).backward()
        grad = layer.router.weight.grad
        layer.zero_grad()
        expected = layer(x)
        (expected.sum() + layer.load_balance_loss).backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(grad, layer.router.weight.grad)

    def test_checkpointing_gives_the_same_gradients(self):
        layer, x = make(4, 2, dropout=0.3), tokens(20, 12).requires_grad_()

        def grads(function):
            torch.manual_seed(0)
            (function(x).square().sum() + layer.load_balance_loss).backward()
            grads = [x.grad, *(p.grad for p in layer.parameters())]
            x.grad = None
            layer.zero_grad()
            return grads

        plain = grads(layer)
        for ours, expected in zip(
            grads(lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)), plain, strict=True
        ):
            torch.testing.assert_close(ours, expected)

    def test_autocast_routes_in_float32(self):
        """The experts are computed in bfloat16; who is chosen does not depend on it."""
        layer, x = make(4, 2, dtype=torch.float32), tokens(50, 12, dtype=torch.float32)
        expected = layer(x)
        losses = layer.load_balance_loss, layer.z_loss
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert (layer.load_balance_loss, layer.z_loss) == losses
        torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=3e-2)
        y.sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())

    def test_meta_and_low_precision(self):
        assert ewa.RoutedMoE(8, 12, 4, device="meta")(torch.zeros(3, 8, device="meta")).shape == (3, 8)
        layer = make(4, 2, dtype=torch.bfloat16)
        assert layer(tokens(9, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16

    def test_fuse_is_the_mean_expert(self):
        layer, x = make(4, 2), tokens(20, 12)
        mean = [t.mean(0) for t in layer.experts]
        expected = F.linear(F.gelu(F.linear(x, *mean[:2])), *mean[2:])
        torch.testing.assert_close(layer.fuse()(x), expected)

    def test_averaging_keeps_means_and_contracts_the_spread(self):
        """While training; the router is what it would be without."""
        layer, beta = make(4, 2), 0.3
        averager = ewa.ExpertAverager(layer, share_rate=beta)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        for _ in range(5):
            layer(tokens(30, 12)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            router = layer.router.weight.detach().clone()
            means = {n: p.detach().mean(0) for n, p in ewa.expert_tensors(layer)}
            spread = averager.spread()
            averager.step()
            assert torch.equal(layer.router.weight, router)
            for name, parameter in ewa.expert_tensors(layer):
                torch.testing.assert_close(parameter.detach().mean(0), means[name], rtol=1e-12, atol=1e-14)
                assert averager.spread()[name] == pytest.approx((1 - beta * 4 / 3) * spread[name], rel=1e-9)


class TestRoute:
    def test_ties_go_to_the_first(self):
        logits = torch.tensor([[1.0, 3, 3, 3], [2, 2, 2, 2], [5, 1, 5, 1]])
        weights, choices = ewa.functional.route(logits, 2)
        assert choices.tolist() == [[1, 2], [0, 1], [0, 2]]
        torch.testing.assert_close(weights, logits.softmax(1).gather(1, choices))
        renormalized, _ = ewa.functional.route(logits, 2, renormalize=True)
        torch.testing.assert_close(renormalized.sum(1), torch.ones(3))

    def test_partition_keeps_the_order_of_choices(self):
        choices = torch.tensor([[2, 0], [0, 2], [5, 0]])
        permutation, offsets = ewa.functional.partition_by_expert(choices, 6)
        assert permutation.tolist() == [1, 2, 5, 0, 3, 4]
        assert offsets.tolist() == [0, 3, 3, 5, 5, 5, 6]
        assert permutation.dtype == offsets.dtype == torch.int32
