"""What a block computes that holds a list of experts and a router, proved by running a copy of it."""

from __future__ import annotations

import copy
import itertools
from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import ewa_kernels.functional as functional
from ewa_kernels.moe import traces
from ewa_kernels.moe.adapters import NotExpertsError
from ewa_kernels.surgery.layout import FFNLayout
from ewa_kernels.surgery.probe import generators_kept

# Of norms. Many routers compute in float32 whatever the dtype of the tokens.
_TOLERANCE = 1e-5

_NARROW = 8  # d_ff of the experts of a copy
_FAR = 32.0  # a power of two, by which logits are multiplied without rounding

_OF_EVERY_MODULE = frozenset(dir(nn.Module())) | {"training"}


@dataclass(frozen=True)
class BlockFormula:
    """y[t] = Σ_j w[t, j] · FFN_e(x[t]), perhaps + shared(x) or + sigmoid(shared_gate(x)) · shared(x).

    Attributes:
        experts, router, shared, shared_gate: names of modules inside the block, None of what it does not have.
        top_k: k; the experts are those with the k highest logits, which the router gives, `[..., E]`, and the weights
            w their softmax. None: the router gives choices and weights itself, each `[..., k]`.
        renormalize: the k weights are divided by their sum.
        choices_first: of a router that gives both, which comes first.
        flat: names of the modules that are given the tokens as `[T, D]`; others have the shape of the block's input.
        returns_logits: the block returns (y, what the router gives), not y alone.
        settings: (name of a module inside, "" for the block; an attribute; its value), of all that the block may have
            read of what is not called any more. The formula holds as long as they stay.
    """

    experts: str
    router: str
    top_k: int | None = None
    renormalize: bool = False
    choices_first: bool = True
    shared: str | None = None
    shared_gate: str | None = None
    flat: frozenset[str] = field(default_factory=frozenset)
    returns_logits: bool = False
    settings: tuple[tuple[str, str, Any], ...] = ()

    def check_settings(self, block: nn.Module) -> None:
        """Raises RuntimeError if one of the settings was changed."""
        for name, attribute, value in self.settings:
            now = getattr(block.get_submodule(name), attribute, None)
            if now != value:
                raise RuntimeError(
                    f"{f'{name}.' if name else ''}{attribute} of {type(block).__name__} must be {value!r}, as at "
                    f"replace_moe_, got {now!r}: call restore_moe_ before such a change, and replace_moe_ after it"
                )

    def forward(self, block: nn.Module, x: Tensor, experts: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
        """What the block returns for x `[..., D]`, where `experts` takes tokens `[T, D]`, choices and weights."""
        tokens = x.reshape(-1, x.shape[-1])

        def given(name: str) -> Any:
            return block.get_submodule(name)(tokens if name in self.flat else x)

        routed = given(self.router)
        if self.top_k is None:
            choices, weights = routed if self.choices_first else routed[::-1]
            choices, weights = (t.reshape(-1, t.shape[-1]) for t in (choices, weights))
        else:
            logits = routed.reshape(-1, routed.shape[-1])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            weights, choices = functional.route(logits, self.top_k, renormalize=self.renormalize)
        y = experts(tokens, choices, weights).to(x.dtype).reshape(x.shape)
        if self.shared is not None:
            shared = given(self.shared)
            if self.shared_gate is not None:
                shared = given(self.shared_gate).sigmoid() * shared
            y = y + shared.reshape(x.shape)
        return (y, routed) if self.returns_logits else y


class _FailsError(NotExpertsError):
    """The copy did not run at all."""


def prove(block: nn.Module, experts: str, layout: FFNLayout, router: str) -> BlockFormula:
    """The formula of a block, from the names of its list of experts and of its router.

    A copy of the block with random parameters, in float64 if it runs so, must give the same output and gradients as the
    formula, on several inputs, few tokens and many, in eval and in training mode, with other values in its buffers, and
    keep nothing for itself. Neither the block nor random generators are touched; what it writes into globals and its
    class stays there. `traces` tells what it could keep unnoticed.

    Raises:
        NotExpertsError: it is no such block.
    """
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), generators_kept():
        torch.default_generator.manual_seed(0)
        try:
            return _Twin(block, experts, layout, router, torch.float64).prove()
        except _FailsError:
            return _Twin(block, experts, layout, router, torch.float32).prove()


class _Twin:
    """A copy of a block with random parameters, and experts that are narrow and have no dropout."""

    def __init__(self, block: nn.Module, experts: str, layout: FFNLayout, router: str, dtype: torch.dtype):
        self.experts, self.layout, self.router, self.dtype = experts, layout, router, dtype
        members = block.get_submodule(experts)
        first = next(members.children())
        d_ff, self.d_model = reversed(first.get_parameter(f"{layout.down}.weight").shape)
        narrow = min(d_ff, _NARROW)
        # What deepcopy finds here it does not copy.
        copies: dict[int, Any] = {id(buffer): self._plain(buffer) for buffer in block.buffers()}
        for member in members.children():
            for name in (*layout.up, layout.down):
                for parameter in member.get_submodule(name).parameters():
                    shape = list(parameter.shape)
                    if name in layout.up or len(shape) > 1:  # all but the bias of the down projection
                        dim = 0 if name in layout.up else 1
                        shape[dim] = shape[dim] * narrow // d_ff
                    copies[id(parameter)] = self._random(torch.Size(shape))
        for parameter in block.parameters():
            if id(parameter) not in copies:
                copies[id(parameter)] = self._random(parameter.shape)
        try:
            self.block = copy.deepcopy(block, copies)
        except Exception as error:  # of foreign code
            raise NotExpertsError(f"cannot be copied: {type(error).__name__}: {error}") from error
        for module in self.block.modules():
            for name, value in vars(module).items():
                if name.endswith("_hooks") and isinstance(value, dict):
                    value.clear()
        self.members = list(self.block.get_submodule(experts).children())
        for member in self.members:
            for name in (*layout.up, layout.down):
                out_features, in_features = member.get_parameter(f"{name}.weight").shape
                vars(member.get_submodule(name)).update(in_features=in_features, out_features=out_features)
            for module in member.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        self.block.eval()
        self._before = traces.traces(self.block)
        self._by_parts: set[traces.Place] = set()

    def _random(self, shape: torch.Size) -> nn.Parameter:
        scale = 2 * shape[-1] ** -0.5 if len(shape) > 1 and shape.numel() > 0 else 1.0
        return nn.Parameter(scale * torch.randn(shape, dtype=self.dtype))

    def _plain(self, buffer: Tensor) -> Tensor:
        values = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.detach().clone().cpu()
        return values.to(self.dtype) if values.is_floating_point() else values

    def prove(self) -> BlockFormula:
        x = self._tokens(2, 7)
        try:
            y = self._run(x)
        except _FailsError:
            x = x.flatten(0, 1)
            y = self._run(x)
        formula = next((f for f in self._candidates(x, y) if self._agree(f, x, y)), None)
        if formula is None:
            raise NotExpertsError("does not compute the sum of what the chosen experts give, by their softmax")
        # As many dimensions as it takes.
        one = (1,) * (x.ndim - 2)
        for training, num_tokens, scale in ((False, 3, 10.0), (False, 1, 0.1), (True, 7, 1.0), (True, 5, 3.0)):
            x = self._tokens(*one, num_tokens, scale=scale)
            self._check(formula, x, "in training mode" if training else "on some inputs", training)
        self._check_gradients(formula, x)
        self._check_keeps_nothing(formula, x)
        self._check_no_capacity(formula, one)
        self._check_far_logits(formula, x)
        self._check_other_buffers(formula, x)
        return replace(formula, settings=tuple(self._settings(formula)))

    def _check(self, formula: BlockFormula, x: Tensor, when: str, training: bool) -> None:
        self.block.train(training)
        if not self._agree(formula, x, self._run(x)):
            raise NotExpertsError(f"computes something else {when}")

    def _check_keeps_nothing(self, formula: BlockFormula, x: Tensor) -> None:
        """What the router and other parts keep, they keep in ours too, if the block does not write over it."""
        kept: set[traces.Place] = set()
        with torch.enable_grad():
            for training in (False, True):
                self.block.train(training)
                self.block(x.clone())
                after = traces.traces(self.block)
                formula.forward(self.block, x.clone(), self._experts)
                ours = traces.traces(self.block)
                by_parts = traces.written(after, ours)
                kept |= {place for place in by_parts if _is_another_tensor(after.get(place), ours.get(place))}
                self._by_parts |= by_parts
        kept |= traces.written(self._before, traces.traces(self.block)) - self._by_parts
        if kept:
            names = sorted(".".join(place) for place in kept if place[:-1] not in kept)
            raise NotExpertsError(f"keeps something of each forward in its {', '.join(names)}")

    def _check_no_capacity(self, formula: BlockFormula, one: tuple[int, ...]) -> None:
        """Many tokens, and many that all go to the same experts."""
        num_tokens = max(256, 16 * len(self.members))
        for training in (False, True):
            x = self._tokens(*one, num_tokens)
            self._check(formula, x, "on many tokens", training)
            self._check(formula, self._tokens(*one, 1) + 1e-3 * x, "on many tokens that are alike", training)

    def _check_far_logits(self, formula: BlockFormula, x: Tensor) -> None:
        parameters = list(self.block.get_submodule(self.router).parameters())
        for parameter in parameters:
            parameter.mul_(_FAR)
        self._check(formula, x, "where the router's logits are large", False)
        for parameter in parameters:
            parameter.div_(_FAR)

    def _check_other_buffers(self, formula: BlockFormula, x: Tensor) -> None:
        """A bias that is zero, a temperature that is one and a warm-up that is over may be other ones later."""
        buffers = list(self.block.buffers())
        for buffer in buffers:
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        for steps in (None, 0, 10**6):
            for buffer in buffers:
                if steps is not None and not buffer.is_floating_point():
                    buffer.fill_(steps)
            for training in (False, True):
                try:
                    self._check(formula, x, "with other values in its buffers", training)
                except _FailsError as error:
                    raise NotExpertsError(f"{error}, with other values in its buffers") from error

    def _settings(self, formula: BlockFormula) -> Iterator[tuple[str, str, Any]]:
        """Of the block, and of what is inside of it and that the formula does not call."""
        called = filter(None, (formula.experts, formula.router, formula.shared, formula.shared_gate))
        inside = tuple(f"{name}." for name in called)
        for name, module in self.block.named_modules():
            if not f"{name}.".startswith(inside):
                holders = [cls for cls in type(module).__mro__ if not traces.is_library(cls.__module__)]
                values = ChainMap(*({**vars(holder)} for holder in (module, *holders)))
                for attribute, value in values.items():
                    own = not attribute.startswith(("__", "_is_hf_")) and attribute not in _OF_EVERY_MODULE
                    if own and type(value) in (bool, int, float, str) and value == value:
                        yield name, attribute, value

    def _candidates(self, x: Tensor, y: Any) -> Iterator[BlockFormula]:
        num_tokens = x.numel() // self.d_model
        seen, flat, outputs = self._watched(x)
        num_experts = len(self.members)
        routed = outputs.get(self.router)
        common: dict[str, Any] = {"experts": self.experts, "router": self.router, "flat": flat}
        common["returns_logits"] = isinstance(y, tuple)
        routings: list[dict[str, Any]]
        if isinstance(routed, Tensor) and routed.numel() == num_tokens * num_experts:
            if seen % num_tokens or not seen:
                raise NotExpertsError(f"drops tokens, or adds some: its experts saw {seen} rows of {num_tokens} tokens")
            # All experts may be run where only some of them count.
            sizes = range(num_experts, 0, -1) if seen == num_tokens * num_experts else [seen // num_tokens]
            routings = [{"top_k": k, "renormalize": r} for k in sizes for r in (False, True)]
        elif isinstance(routed, tuple) and len(routed) == 2 and all(isinstance(t, Tensor) for t in routed):
            routings = [{"choices_first": not routed[0].is_floating_point()}]
        else:
            raise NotExpertsError(f"has a router {self.router!r} that gives neither logits nor choices and weights")
        others = {n: t.numel() for n, t in outputs.items() if n != self.router and isinstance(t, Tensor)}
        shared = [name for name, numel in others.items() if numel == x.numel()]
        gates = [name for name, numel in others.items() if numel == num_tokens]
        for routing, s, g in itertools.product(routings, [None, *shared], [None, *gates]):
            if s is not None or g is None:
                yield BlockFormula(**common, **routing, shared=s, shared_gate=g)

    def _watched(self, x: Tensor) -> tuple[int, frozenset[str], dict[str, Any]]:
        """Rows that all experts saw together; which of the block's parts saw `[T, D]`; and what each part gave."""
        rows, flat, outputs = [0], set(), {}
        top = self.experts.partition(".")[0]

        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows[0] += args[0].numel() // self.d_model

        def watch(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
                outputs[name] = output
                if args and args[0].ndim == 2:
                    flat.add(name)

            return hook

        handles = [member.register_forward_pre_hook(count) for member in self.members]
        handles += [m.register_forward_hook(watch(n)) for n, m in self.block.named_children() if n != top]
        try:
            self._run(x)
        finally:
            for handle in handles:
                handle.remove()
        return rows[0], frozenset(flat), outputs

    def _check_gradients(self, formula: BlockFormula, x: Tensor) -> None:
        named = dict(self.block.named_parameters())
        names, leaves = ["its input", *named], [x.requires_grad_(), *named.values()]
        with torch.enable_grad():
            theirs, ours = (_tensors(out) for out in (self.block(x * 1), formula.forward(self.block, x, self._experts)))
            if not all(_same(a, b) for a, b in zip(ours, theirs, strict=True)):
                raise NotExpertsError("computes something else where gradients are needed")
            direction = [torch.randn_like(t) for t in theirs]
            # Some add the gradient of a loss of their own, whatever the gradient of what they give.
            nothing = [torch.zeros_like(t) for t in theirs]
            of_nothing = torch.autograd.grad(theirs, leaves, nothing, retain_graph=True, materialize_grads=True)
            grads = [torch.autograd.grad(outs, leaves, direction, materialize_grads=True) for outs in (theirs, ours)]
        largest = max(float(grad.norm()) for grad in grads[0])
        for name, own, expected, actual in zip(names, of_nothing, *grads, strict=True):
            if own.any():
                raise NotExpertsError(f"adds a gradient of its own with respect to {name}")
            if not (actual - expected).norm() <= _TOLERANCE * (expected.norm() + largest):
                raise NotExpertsError(f"has another gradient with respect to {name}")

    def _experts(self, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        experts = [self.layout.stack(dict(member.named_parameters())) for member in self.members]
        stacked = {name: torch.stack([expert[name] for expert in experts]) for name in experts[0]}
        permutation, expert_offsets = functional.partition_by_expert(choices, len(experts))
        return functional.grouped_ffn(
            x,
            *(stacked.get(name) for name in ("up.weight", "up.bias", "down.weight", "down.bias")),  # type: ignore[arg-type]
            permutation=permutation,
            expert_offsets=expert_offsets,
            routing_weights=weights,
            activation=self.layout.activation,
            gated=self.layout.gated,
            backend="reference",
        )

    def _agree(self, formula: BlockFormula, x: Tensor, y: Any) -> bool:
        try:
            ours = formula.forward(self.block, x, self._experts)
        except Exception:  # of a candidate that does not fit
            return False
        if type(ours) is not type(y) or (isinstance(y, tuple) and len(y) != 2):
            return False
        pairs = zip(_tensors(ours), _tensors(y), strict=True)
        return all(_same(a, b) for a, b in pairs)

    def _run(self, x: Tensor) -> Any:
        given = x.clone()
        try:
            y = self.block(given)
        except Exception as error:  # of foreign code
            shape = ", ".join(map(str, (*x.shape[:-1], "D")))
            raise _FailsError(f"fails on one tensor [{shape}]: {type(error).__name__}: {error}") from error
        if not torch.equal(given, x):
            raise NotExpertsError("writes into its input")
        if any(not isinstance(t, Tensor) for t in (y if isinstance(y, tuple) else (y,))):
            raise NotExpertsError(f"returns a {type(y).__name__}, not y or (y, router logits)")
        return y

    def _tokens(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, self.d_model, dtype=self.dtype)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= _TOLERANCE * b.norm())


def _is_another_tensor(first: traces.Trace | None, second: traces.Trace | None) -> bool:
    """Of tensors that were written anew, not in place, as counters are."""
    values = [trace.value for trace in (first, second) if trace is not None]
    if len(values) < 2 or values[0] is values[1] or not all(isinstance(value, Tensor) for value in values):
        return False
    a, b = (value.detach().double() for value in values)
    return not _same(a, b)


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]
