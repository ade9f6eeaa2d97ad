"""What a block computes that holds a list of experts and a router: its formula, the forward by it, and the one test."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .execution import layout_of, sandbox
from .experts_adapters import ExpertsAdapter, NotExpertsError
from .ffn_adapters import NotReplaceableError
from .layout import FFNLayout, is_default

_TOLERANCE = 1e-5  # of norms; many routers compute in float32 whatever the dtype of the tokens
_NARROW = 8  # d_ff of the experts of a copy
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"forward"}
_OF_ANY_MODULE = frozenset((*dir(nn.Module()), "__qualname__", "__orig_bases__", "__parameters__"))
_PLAIN = (bool, int, float, str)
_OUTPUT = "computes something else"


@dataclass(frozen=True)
class BlockFormula:
    """y[t] = Σ_j w[t, j] · FFN_e(x[t]), perhaps + shared(x) or + sigmoid(shared_gate(x)) · shared(x).

    Attributes:
        experts, router, shared, shared_gate: names of modules inside the block, None of what it does not have.
        top_k: k, of a router that gives logits `[..., E]`: the experts are those of the k highest, the weights w their
            softmax. Another router gives choices and weights, in either order, each `[..., k]`.
        renormalize: the k weights are divided by their sum.
        flat: the router and the others are given the tokens as `[T, D]`, not in the shape of the block's input.
        returns_logits: the block returns (y, what the router gives), not y alone.
    """

    experts: str
    router: str
    top_k: int | None = None
    renormalize: bool = False
    shared: str | None = None
    shared_gate: str | None = None
    flat: bool = True
    returns_logits: bool = False

    def forward(self, block: nn.Module, x: Tensor, experts: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
        """What the block returns for x `[..., D]`, where `experts` takes tokens `[T, D]`, choices and weights."""
        tokens = x.reshape(-1, x.shape[-1])
        given = tokens if self.flat else x
        router = block.get_submodule(self.router)
        dtype = next((p.dtype for p in router.parameters()), x.dtype)
        routed = router(given.to(torch.promote_types(x.dtype, dtype)))  # a router in float32 beside 16-bit experts
        if isinstance(routed, tuple):
            choices, weights = (t.reshape(-1, t.shape[-1]) for t in routed)
            if choices.is_floating_point():
                choices, weights = weights, choices
        else:
            logits = routed.reshape(-1, routed.shape[-1])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            assert self.top_k is not None
            weights, choices = functional.route(logits, self.top_k, renormalize=self.renormalize)
        y = experts(tokens, choices, weights).to(x.dtype).reshape(x.shape)
        if self.shared is not None:
            shared = block.get_submodule(self.shared)(given)
            if self.shared_gate is not None:
                shared = block.get_submodule(self.shared_gate)(given).sigmoid() * shared
            y = y + shared.reshape(x.shape)
        return (y, routed) if self.returns_logits else y


class BlockForward:
    """The `forward` of one block, as an attribute of it: its formula, with the experts that stand in it.

    The block's own numbers and flags, and those of its class, must stay what they were when this was made.
    """

    def __init__(self, block: nn.Module, formula: BlockFormula):
        self.block, self.formula = block, formula
        named = {k: v for of in (*reversed(type(block).__mro__), block) for k, v in getattr(of, "__dict__", {}).items()}
        self.settings = {k: v for k, v in named.items() if k not in _OF_ANY_MODULE and _is_plain(v)}
        parameters = list(inspect.signature(block.forward).parameters.values())[1:]  # but for the tokens
        self.names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What the block's own code would be given anyway says nothing.
        named = [*kwargs.items(), *zip(self.names, args[1:], strict=False)]
        others = [v for k, v in named if k not in self.defaults or not is_default(v, self.defaults[k])]
        given, kind = [*args[:1], *others, *args[1 + len(self.names) :]], type(self.block).__name__
        if len(given) != 1 or not isinstance(given[0], Tensor):
            kinds = ", ".join(type(value).__name__ for value in given)
            raise TypeError(f"{kind} must get one Tensor after replace_moe_, got {kinds or 'nothing'}")
        for name, value in self.settings.items():
            if (now := getattr(self.block, name, None)) != value:
                raise RuntimeError(
                    f"{name} of {kind} must be {value!r}, as at replace_moe_, got {now!r}: call restore_moe_ before "
                    "such a change, and replace_moe_ after it"
                )
        return self.formula.forward(self.block, given[0], self.block.get_submodule(self.formula.experts))


def _is_plain(value: object) -> bool:
    """Whether it is a number, a flag, a word, or a tuple of such, that equals itself."""
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return type(value) in _PLAIN and value == value


def layout_of_expert(member: nn.Module) -> FFNLayout:
    """What one expert computes, which has two `nn.Linear`, or three of a GLU, and no other parameters.

    Raises:
        NotExpertsError: it is no such FFN.
    """
    linears = {name: module for name, module in member.named_modules() if type(module) is nn.Linear}
    known = {f"{name}.{which}" for name, linear in linears.items() for which, _ in linear.named_parameters()}
    reason = "is no FFN of two or three nn.Linear alone, from D features to D"
    is_known = len(linears) in (2, 3) and known == {n for n, _ in (*member.named_parameters(), *member.named_buffers())}
    for down in reversed(linears if is_known else {}):
        up = tuple(name for name in linears if name != down)
        d_ff, rows = linears[down].in_features, sum(linears[name].out_features for name in up)
        if linears[down].out_features == linears[up[0]].in_features and rows in {len(up) * d_ff, 2 * d_ff}:
            try:
                layout = layout_of(member, up, down)
            except NotReplaceableError as error:
                reason = str(error)
            else:  # with the gate first, so that each projection's rows are one block of those that are stacked
                is_last = layout.gate_last and len(up) == 2
                return replace(layout, up=up[::-1], gate_last=False) if is_last else layout
    raise NotExpertsError(f"holds modules each of which {reason}")


class _FailsError(NotExpertsError):
    """The copy did not run at all."""


def prove(block: nn.Module, experts: str, layout: FFNLayout, adapter: ExpertsAdapter) -> BlockFormula:
    """The formula of a block, from the names of its experts and of its router: the one that passes the test.

    A copy of the block with random parameters, in float64 if it runs so, else in float32, must give the same output and
    gradients as the formula, on few tokens and many, in eval and in training mode, and keep nothing in its attributes.
    Neither the block nor random generators are touched.

    Raises:
        NotExpertsError: there is none.
    """
    with sandbox(), torch.enable_grad():
        try:
            return _Twin(block, experts, layout, torch.float64).prove(experts, adapter)
        except _FailsError:
            return _Twin(block, experts, layout, torch.float32).prove(experts, adapter)


class _Twin:
    """A copy of a block with random parameters, and experts that are narrow and have no dropout."""

    def __init__(self, block: nn.Module, experts: str, layout: FFNLayout, dtype: torch.dtype):
        torch.default_generator.manual_seed(0)
        self.layout, self.dtype, members = layout, dtype, list(block.get_submodule(experts).children())
        shapes = {parameter: list(parameter.shape) for parameter in block.parameters()}
        self.d_model, d_ff = shapes[members[0].get_parameter(f"{layout.down}.weight")]
        for member in members:
            for parameter in (p for name in layout.up for p in member.get_submodule(name).parameters()):
                shapes[parameter][0] = shapes[parameter][0] * min(d_ff, _NARROW) // d_ff
            shapes[member.get_parameter(f"{layout.down}.weight")][1] = min(d_ff, _NARROW)
        # What deepcopy finds here it does not copy.
        copies: dict[int, Any] = {id(buffer): self._random(buffer) for buffer in block.buffers()}
        for parameter, shape in shapes.items():
            scale = 2 * max(shape[-1], 1) ** -0.5 if len(shape) > 1 else 1.0
            copies[id(parameter)] = nn.Parameter(scale * torch.randn(shape, dtype=dtype))
        try:
            self.block = copy.deepcopy(block, copies)
        except Exception as error:  # of foreign code
            raise NotExpertsError(f"cannot be copied: {type(error).__name__}: {error}") from error
        for hooks in [v for m in self.block.modules() for k, v in vars(m).items() if k.endswith("_hooks")]:
            hooks.clear()
        self.members = list(self.block.get_submodule(experts).children())
        for module in (module for member in self.members for module in member.modules()):
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape
            elif isinstance(module, nn.Dropout):
                module.p = 0.0

    def _random(self, buffer: Tensor) -> Tensor:
        if not buffer.is_floating_point():
            return torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.cpu().clone()
        return torch.rand(buffer.shape, dtype=self.dtype) + 0.5  # what is zero, or one, may be another later

    def prove(self, experts: str, adapter: ExpertsAdapter) -> BlockFormula:
        self.block.eval()
        before, x = self._attributes(), torch.randn(2, 7, self.d_model, dtype=self.dtype)
        try:
            self._outputs(self.block, x)
        except _FailsError:
            x = x.flatten(0, 1)
            self._outputs(self.block, x)
        formula = next((f for f in self._candidates(experts, adapter) if self._difference(f, x) != _OUTPUT), None)
        if formula is None:
            raise NotExpertsError("does not compute the sum of what the chosen experts give, by their softmax")
        one, many = (1,) * (x.ndim - 2), max(256, 16 * len(self.members))
        for training, num_tokens in itertools.product((False, True), (3, 1, 7, many)):
            self.block.train(training)
            x = 3 * torch.randn(*one, num_tokens, self.d_model, dtype=self.dtype)
            alike = x[..., :1, :] + 1e-3 * x  # all to the same experts
            for inputs in (x, alike) if num_tokens == many else (x,):
                if (difference := self._difference(formula, inputs)) is not None:
                    when = " in training mode" if training else ""
                    raise NotExpertsError(f"{difference} on {num_tokens} tokens{when}")
        called = tuple(f"{name}." for name in (formula.router, formula.shared, formula.shared_gate) if name is not None)
        after = {key: value for key, value in self._attributes().items() if not key.startswith(called)}
        kept = [k for k, v in after.items() if k not in before or v[0] is not before[k][0] or v[1] != before[k][1]]
        if kept:
            raise NotExpertsError(f"keeps something of each forward in its {', '.join(sorted(kept))}")
        return formula

    def _candidates(self, experts: str, adapter: ExpertsAdapter) -> Iterator[BlockFormula]:
        k, router = adapter.top_k, str(adapter.router)
        k = getattr(self.block, k, None) if isinstance(k, str) else k
        if adapter.top_k is not None and (type(k) is not int or not 1 <= k <= len(self.members)):
            raise NotExpertsError(f"has {len(self.members)} experts, of which top_k={adapter.top_k!r} chooses {k!r}")
        others = [name for name, _ in self.block.named_children() if name not in (experts.partition(".")[0], router)]
        parts = [(None, None), *((s, g) for s in others for g in (None, *others) if s != g)]
        flags = itertools.product((True, False), repeat=3)
        for (renormalize, flat, returns_logits), (shared, gate) in itertools.product(flags, parts):
            yield BlockFormula(experts, router, k, renormalize, shared, gate, flat, returns_logits)

    def _attributes(self) -> dict[str, tuple[Any, Any]]:
        """Values, and how often or how far they were written."""
        every = ((n, *item) for n, m in self.block.named_modules() for item in (*vars(m).items(), *m._buffers.items()))
        ours = {f"{name}.{key}".removeprefix("."): v for name, key, v in every if key not in _OF_EVERY_MODULE}
        return {k: (v, len(v) if isinstance(v, (list, dict)) else getattr(v, "_version", 0)) for k, v in ours.items()}

    def _difference(self, formula: BlockFormula, x: Tensor) -> str | None:
        leaves = [x.requires_grad_(), *self.block.parameters()]
        with torch.no_grad():
            unrecorded = self._outputs(self.block, x)
        theirs = self._outputs(self.block, x)
        try:
            ours = self._outputs(lambda x: formula.forward(self.block, x, self._grouped), x)
        except Exception:  # of a candidate that does not fit
            return _OUTPUT
        if not (_close(ours, unrecorded) and _close(ours, theirs)):
            return _OUTPUT
        options = {"retain_graph": True, "materialize_grads": True}
        for scale in (0, 1):  # some add the gradient of a loss of their own, whatever the gradient of what they give
            direction = [scale * torch.randn_like(t) for t in ours]
            expected, actual = (
                torch.autograd.grad(outputs, leaves, direction, **options) for outputs in (theirs, ours)
            )
            if not _close(actual, expected, floor=scale * max(float(grad.norm()) for grad in expected)):
                return "has gradients of its own"
        return None

    def _outputs(self, forward: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
        torch.default_generator.manual_seed(1)
        given = x * 1
        try:
            output = forward(given)
        except Exception as error:  # of foreign code
            shape = ", ".join(map(str, (*x.shape[:-1], "D")))
            raise _FailsError(f"fails on one tensor [{shape}]: {type(error).__name__}: {error}") from error
        tensors = list(output) if isinstance(output, tuple) else [output]
        if len(tensors) > 2 or not all(isinstance(t, Tensor) for t in tensors):
            raise NotExpertsError(f"returns a {type(output).__name__}, not y or (y, router logits)")
        if not torch.equal(given, x):
            raise NotExpertsError("writes into its input")
        return [t + 0 * given.sum() for t in tensors]  # so that each has a gradient

    def _grouped(self, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        experts = [self.layout.stack(dict(member.named_parameters())) for member in self.members]
        names = ("up.weight", "up.bias", "down.weight", "down.bias")
        tensors: list[Any] = [torch.stack([e[n] for e in experts]) if n in experts[0] else None for n in names]
        permutation, expert_offsets = functional.partition_by_expert(choices, len(experts))
        options: dict[str, Any] = {"activation": self.layout.activation, "gated": self.layout.gated}
        options |= {"permutation": permutation, "expert_offsets": expert_offsets, "routing_weights": weights}
        return functional.grouped_ffn(x, *tensors, **options, backend="reference")


def _close(ours: Sequence[Tensor], theirs: Sequence[Tensor], floor: float = 0.0) -> bool:
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and bool((a - b).norm() <= _TOLERANCE * (floor + b.norm()))
        for a, b in zip(ours, theirs, strict=True)
    )
