"""Forward computed again in backward, by checkpointing or by the compiler, must make the same deal of the tokens."""

import functools

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from training import same

import ewa_kernels as ewa
from ewa_kernels import calls, ops, seeds
from ewa_kernels.problem import Deal, Inputs, Options, Problem


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.ffn = ewa.RandomPartitionMoE(8, 12, 4, dropout=0.2)

    def forward(self, x):
        return x + self.ffn(self.norm(x)).tanh()


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), Block())


def grads_of(blocks, function):
    """Of x and all parameters; `function` is `blocks`, run in another way."""
    torch.manual_seed(1)
    seeds._drawn.clear()  # what the tests before have drawn from this very seed
    blocks.zero_grad()
    x = torch.randn(30, 8, requires_grad=True)
    function(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in blocks.parameters())]


def checkpointed(blocks, **options):
    """Each block by itself."""
    return lambda x: functools.reduce(lambda y, block: checkpoint(block, y, **options), blocks, x)


def test_a_seed_that_changes_before_backward():
    """As one on a GPU may: it would be another deal there, and another dropout."""
    x, seed = torch.randn(20, 8, requires_grad=True), torch.tensor(3)
    layer = ewa.RandomPartitionMoE(8, 12, 4, dropout=0.5)
    inputs, options = Inputs(x, *layer.experts, None), Options("gelu", False, 0.5, "torch", "recompute")
    results = []
    for given in (3, seed):
        y = calls._apply(Problem.of(inputs, False, options, saved="recompute"), Deal(given), *inputs)
        results.append(torch.autograd.grad(y.sum(), x, retain_graph=True)[0])
    assert torch.equal(*results)
    seed.fill_(4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class TestActivationCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_several_layers(self, blocks, use_reentrant):
        plain = grads_of(blocks, blocks)
        assert same(plain, grads_of(blocks, checkpointed(blocks, use_reentrant=use_reentrant)))
        assert same(plain, grads_of(blocks, checkpointed(blocks, use_reentrant=use_reentrant, preserve_rng_state=True)))

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_without_the_state_of_the_generator_raises(self, blocks, use_reentrant):
        """Another deal would be made in backward, and give wrong gradients silently."""
        with pytest.raises(RuntimeError, match="computed again in backward with another deal"):
            grads_of(blocks, checkpointed(blocks, use_reentrant=use_reentrant, preserve_rng_state=False))

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_a_given_seed_needs_no_generator(self, use_reentrant):
        layer, x = ewa.RandomPartitionMoE(8, 12, 4, dropout=0.2), torch.randn(30, 8, requires_grad=True)
        layer(x, seed=5).square().sum().backward()
        expected, x.grad = x.grad, None
        options = {"use_reentrant": use_reentrant, "preserve_rng_state": False}
        checkpoint(lambda x: layer(x, seed=5), x, **options).square().sum().backward()
        assert torch.equal(x.grad, expected)

    @pytest.mark.parametrize("op", [ops.draw_seed, ops.moe_ffn, None], ids=["seed", "layer", "all"])
    @pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
    def test_selective(self, blocks, policy, op):
        def policy_fn(context, operation, *args, **kwargs):
            return policy if op in (None, operation) else CheckpointPolicy.PREFER_RECOMPUTE

        context_fn = functools.partial(create_selective_checkpoint_contexts, policy_fn)
        assert same(
            grads_of(blocks, blocks), grads_of(blocks, checkpointed(blocks, use_reentrant=False, context_fn=context_fn))
        )

    @pytest.mark.parametrize("whole", [True, False], ids=["checkpoint in compile", "compile in checkpoint"])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_compiled(self, blocks, use_reentrant, whole):
        torch.compiler.reset()
        compile_ = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
        if whole:
            function = compile_(checkpointed(blocks, use_reentrant=use_reentrant))
        else:
            function = checkpointed([compile_(block) for block in blocks], use_reentrant=use_reentrant)
        assert same(grads_of(blocks, blocks), grads_of(blocks, function))

    @pytest.mark.parametrize("where", ["hook", "backward of checkpointing"])
    def test_rounding_in_backward_is_no_deal(self, blocks, where):
        """16-bit experts that are averaged while backward runs draw a seed of their own."""
        experts, calls = torch.randn(4, 8).bfloat16(), []

        def average(parameter):
            calls.append(1)
            ewa.functional.average_experts_([experts], 0.3)

        blocks[0].norm.weight.register_post_accumulate_grad_hook(average)
        grads_of(blocks, blocks if where == "hook" else checkpointed(blocks, use_reentrant=False))
        assert calls == [1]

    def test_forward_that_runs_between_forward_and_backward(self, blocks):
        """Seeds of other batches do not count as those of this one."""
        first = grads_of(blocks, blocks)
        torch.manual_seed(1)
        blocks.zero_grad()
        x = torch.randn(30, 8, requires_grad=True)
        y = checkpoint(blocks, x, use_reentrant=False)
        blocks(x.detach())
        y.square().sum().backward()
        assert same(first, [x.grad, *(p.grad for p in blocks.parameters())])


def in_region_of_budget_0(blocks):
    def function(x):
        with torch.autograd.graph.region_activation_memory_budget(0.0):
            return blocks(x)

    return function


RECOMPUTE_ALL = {
    f"ban_recompute_{what}": False
    for what in ("used_far_apart", "long_fusible_chains", "materialized_backward", "not_in_allowlist", "reductions")
}


class TestCompilerThatRecomputes:
    """torch.compile may keep less for backward than it needs, and compute the rest again from the inputs."""

    def compiled(self, blocks, backend, function=None, **config):
        torch.compiler.reset()
        with functorch_config.patch(config):
            return grads_of(blocks, torch.compile(function or blocks, backend=backend, fullgraph=True))

    @pytest.mark.parametrize("budget", [0.001, 0.1, 0.5, 0.9])
    def test_memory_budget(self, blocks, budget):
        """Also if the solver wants everything to be computed again."""

        def nothing_is_saved(memory, joint_graph, max_memory, node_info, all_recomputable_banned_nodes):
            return [], list(range(len(all_recomputable_banned_nodes)))

        expected = grads_of(blocks, blocks)
        assert same(expected, self.compiled(blocks, "aot_eager", activation_memory_budget=budget))
        greedy = {"activation_memory_budget": budget, "activation_memory_budget_solver": nothing_is_saved}
        assert same(expected, self.compiled(blocks, "aot_eager", **greedy))

    @pytest.mark.parametrize("config", [RECOMPUTE_ALL, {"aggressive_recomputation": True}], ids=["all", "aggressive"])
    def test_recomputation_of_what_is_cheap(self, blocks, config):
        assert same(grads_of(blocks, blocks), self.compiled(blocks, "aot_eager", **config))

    @pytest.mark.slow
    @pytest.mark.parametrize("config", [RECOMPUTE_ALL, {"activation_memory_budget": 0.1}], ids=["all", "budget"])
    def test_inductor(self, blocks, config):
        for ours, eager in zip(self.compiled(blocks, "inductor", **config), grads_of(blocks, blocks), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)

    def test_budget_of_0_raises(self, blocks):
        """Then the compiler keeps the inputs alone, whatever it is told: wrong gradients, were it not noticed."""
        with pytest.raises(RuntimeError, match="needs an activation_memory_budget above 0"):
            self.compiled(blocks, "aot_eager", activation_memory_budget=0.0)

    @pytest.mark.skipif(
        not hasattr(torch.autograd.graph, "region_activation_memory_budget"), reason="this torch has no regions"
    )
    def test_region_of_budget_0_raises(self, blocks):
        with pytest.raises(RuntimeError, match="needs an activation_memory_budget above 0"):
            self.compiled(blocks, "aot_eager", in_region_of_budget_0(blocks), activation_memory_budget=0.5)

    def test_budget_of_0_without_backward(self, blocks):
        torch.compiler.reset()
        with functorch_config.patch(activation_memory_budget=0.0), torch.no_grad():
            x, compiled = torch.randn(30, 8), torch.compile(blocks, backend="aot_eager", fullgraph=True)
            torch.manual_seed(1)
            y = compiled(x)
            torch.manual_seed(1)
            assert torch.equal(y, blocks(x))

    def test_budget_of_0_with_a_given_seed(self):
        torch.compiler.reset()
        layer, x = ewa.RandomPartitionMoE(8, 12, 4, dropout=0.2), torch.randn(30, 8, requires_grad=True)
        seed = torch.tensor(5)
        layer(x, seed=seed).square().sum().backward()
        expected, x.grad = x.grad, None
        with functorch_config.patch(activation_memory_budget=0.0):
            torch.compile(layer, backend="aot_eager", fullgraph=True)(x, seed=seed).square().sum().backward()
        assert torch.equal(x.grad, expected)

    def test_seeds_are_forgotten_after_many(self, monkeypatch):
        """The record does not grow for ever, and keeps the newest."""
        monkeypatch.setattr(seeds, "_MAX_DRAWN", 10)
        seeds._drawn.clear()
        drawn = [int(ops.draw_seed(torch.empty(0))) for _ in range(30)]
        assert list(seeds._drawn) == drawn[-10:]
