"""What a block computes that holds a list of experts and a router, proved by running a copy of it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ewa_kernels import functional
from ewa_kernels.moe.adapters import NotExpertsError
from ewa_kernels.surgery.layout import FFNLayout
from ewa_kernels.surgery.probe import generators_kept

# Of norms. Many routers compute in float32 whatever the dtype of the tokens.
_TOLERANCE = 1e-5

_NARROW = 8  # d_ff of the experts of a copy


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
    formula, on several inputs, in eval and in training mode, and keep nothing for itself. Neither the block nor random
    generators are touched.

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
        self._before = self._attributes()

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
            self.block.train(training)
            x = self._tokens(*one, num_tokens, scale=scale)
            if not self._agree(formula, x, self._run(x)):
                when = "in training mode" if training else "on some inputs"
                raise NotExpertsError(f"computes something else {when}")
        self._check_gradients(formula, x)
        before = self._before
        changed = [
            name
            for name, (value, version) in self._attributes().items()
            if name not in before or value is not before[name][0] or version != before[name][1]
        ]
        if changed:
            raise NotExpertsError(f"keeps something of each forward in its {', '.join(changed)}")
        return formula

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
        return all(a.shape == b.shape and bool((a - b).norm() <= _TOLERANCE * b.norm()) for a, b in pairs)

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

    def _attributes(self) -> dict[str, tuple[Any, int]]:
        """To tell whether the block's own forward wrote something."""
        values = {}
        for name, value in (*vars(self.block).items(), *self.block._buffers.items()):
            sized = isinstance(value, (list, dict, set))
            version = len(value) if sized else value._version if isinstance(value, Tensor) else 0
            values[name] = value, version
        values.pop("training")
        return values


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]
