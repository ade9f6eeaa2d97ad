"""Torch's private names mean what `private_torch.py` takes them for, and stand nowhere else in the package."""

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ewa_kernels
from ewa_kernels import private_torch

PACKAGE = Path(ewa_kernels.__file__).parent
# What has an issue of its own: other people's models; and optimizers, whose hooks torch calls private.
ELSEWHERE = {"models", "train", "integrations"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_private_name_of_torch_elsewhere(path):
    if path.name == "private_torch.py" or path.relative_to(PACKAGE).parts[0] in ELSEWHERE:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert not re.match(r"torch\.(\w+\.)*_[a-zA-Z]", ast.unparse(node)), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not any(re.match(r"torch\.(\w+\.)*_[a-zA-Z]", name) for name in names), names


class TestIsWatched:
    """`test_watchers.py` says who sees the operation."""

    @pytest.mark.parametrize("like", [torch.Tensor, torch.nn.Parameter, torch.nn.Buffer])
    def test_plain_tensors_are_not(self, like):
        assert not private_torch.is_watched((like(torch.randn(3)), None))

    def test_nor_are_views_and_what_inference_mode_makes(self):
        with torch.inference_mode():
            inside = torch.randn(3)
            assert not private_torch.is_watched((inside, torch.randn(4)[1:]))
        assert not private_torch.is_watched((inside, torch.randn(4)[::2], torch.randn(2, requires_grad=True) * 2))
        with torch.no_grad(), torch.autocast("cpu"):
            assert not private_torch.is_watched((torch.randn(3),))

    def test_gpus_have_the_keys_of_cpus(self):
        """No GPU is needed to know those of its tensors."""
        with FakeTensorMode():
            keys = torch._C._dispatch_keys(torch.empty(3, device="cuda"))
        for name in ("AutogradCUDA", "AutocastCUDA", "ADInplaceOrView"):
            assert keys.has(getattr(torch._C.DispatchKey, name))
        assert len(private_torch._PLAIN_KEYS) == 4
        plain = torch._C._dispatch_keys(torch.empty(3)).raw_repr()
        assert plain in private_torch._PLAIN_KEYS

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.empty(3, device="meta"),
            torch._neg_view(torch.ones(3)),
            torch._efficientzerotensor(3),
            torch.ones(3).to_sparse(),
            torch.ones(3, dtype=torch.complex64).conj(),
            torch._to_functional_tensor(torch.ones(3)),
        ],
        ids=["meta", "negated", "zero", "sparse", "conjugated", "functional"],
    )
    def test_others_are(self, tensor):
        assert private_torch.is_watched((torch.randn(3), tensor))

    def test_modes_and_transforms(self):
        x, seen = torch.randn(3), []

        def look(x):
            seen.append(private_torch.is_watched((x,)))
            return x

        with FlopCounterMode(display=False), FakeTensorMode(allow_non_fake_inputs=True):
            look(x)
        with torch.device("cpu"):
            look(x)
        with forward_ad.dual_level():
            look(x)
        torch.func.vmap(look)(x)
        torch.func.grad(lambda x: look(x).sum())(x)
        make_fx(look)(x)
        assert seen == [True] * 6
        look(x)
        assert not seen[-1]


def test_guards_tell_what_has_changed():
    x, y = torch.randn(3, 4), torch.nn.Parameter(torch.randn(2))
    guards = private_torch.tensor_guards([x, y])
    assert guards.check(x, y)
    assert guards.check(torch.ones(3, 4), y), "values and addresses are not looked at"
    for other in (x.mT.contiguous().mT, x.double(), x[:2], torch._neg_view(x), x.requires_grad_()):
        assert not guards.check(other, y)
    assert not guards.check(x.detach(), torch.randn(2)), "a parameter has a class of its own"


def test_transforms_are_told_apart():
    found = []

    def look(x):
        found.append((private_torch.is_batched(x), private_torch.is_differentiated(x), private_torch.has_values(x)))
        return x.sum()

    x = torch.ones(2, 3)
    look(x)
    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.func.vmap(torch.func.grad(look))(x)
    assert found == [(False, False, True), (True, False, False), (False, True, False), (False, True, False)]


def test_backward_is_known():
    seen = []

    def look(x):
        seen.append(private_torch.is_in_backward())
        return x.sin()

    checkpoint(look, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True]


def test_steps_in_backward_are_known():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(4)]
    hook = parameters[1].register_post_accumulate_grad_hook(lambda p: None)
    parameters[2].register_post_accumulate_grad_hook(lambda p: None)
    _apply_optimizer_in_backward(torch.optim.SGD, parameters[3:], {"lr": 0.1})
    hook.remove()
    assert [*map(private_torch.steps_in_backward, parameters)] == [False, False, True, True]


def test_parameters_being_reduced():
    """By FSDP2, as `distributed/exchange_on_ranks.py` shows; elsewhere nobody knows."""
    assert private_torch.parameters_being_reduced() is None

    def foreach_reduce(fsdp_params):
        return private_torch.parameters_being_reduced()

    assert foreach_reduce([]) is None


def test_tracing_is_known():
    seen = [private_torch.is_traced()]
    make_fx(lambda x: seen.append(private_torch.is_traced()) or x)(torch.ones(2))
    assert seen == [False, True]
    assert 0 <= private_torch.activation_memory_budget() <= 1


def test_applied_straight():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sin()

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = torch.ones(3, requires_grad=True)
    private_torch.apply_straight(Double)(x).sum().backward()
    assert x.grad.tolist() == [2.0] * 3


def test_no_carveout_without_asking():
    assert private_torch.multiprocessor_carveout() == 0
