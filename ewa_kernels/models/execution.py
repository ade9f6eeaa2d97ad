"""The execution test: a model's module, run before and after, on random tokens and with random parameters, is equal.

A module is an FFN if it does what an FFN does, on inputs of several shapes and sizes, in eval and in training mode,
forward and backward, and nothing else. Nothing is believed of a class by its name. In float64 or, where that fails (a
float32 constant, a cast), in float32, at its precision. For projections inside a block see `pair_execution`.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS
from .ffn_adapters import NotReplaceableError
from .layout import FFNLayout, Rate, copy_with_parameters, has_forward_of_its_own

_SEEDS = range(4)

# d_model and d_ff of a narrow copy.
_NARROW = (24, 40)


class Precision(NamedTuple):
    """`tolerance` is of norms: rounding is 1e-15 in float64, 1e-7 in float32; the two kinds of GELU are 1e-4 apart."""

    dtype: torch.dtype
    tolerance: float

    def check_close(self, a: Tensor, b: Tensor, reason: str) -> None:
        if not self.close(a, b):
            raise (NotReplaceableError if self._replace(tolerance=_FAR).close(a, b) else FarOffError)(reason)

    def close(self, a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and bool((a - b).norm() <= self.tolerance * b.norm())


PRECISIONS = (Precision(torch.float64, 1e-10), Precision(torch.float32, 1e-5))


class FarOffError(NotReplaceableError):
    """What the module computes is another function: less precision would not help."""


class _FailsError(NotReplaceableError):
    """The module did not run at all."""


_FAR = 1e-2  # of norms


@contextmanager
def sandbox() -> Iterator[None]:
    """On the CPU, without autocast and gradients; the states of random generators are put back, numpy's too."""
    state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        with (
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            seed_all(0)
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


def window(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A random tensor in which each row is a window on the same numbers, so that a wide matrix takes no memory.

    Large enough that all parts of an activation's curve count, and that a bias does.
    """
    numbers = torch.randn(max(1, sum(shape)), dtype=torch.float64)
    if len(shape) > 1 and shape.numel() > 0:
        numbers *= 2 * (shape.numel() // shape[0]) ** -0.5
    return numbers.to(dtype).as_strided(shape, (1,) * len(shape))


def layout_of(module: nn.Module, up: tuple[str, ...], down: str) -> FFNLayout:
    """The layout of an FFN whose projections have these names. `module` and the random generators are not touched.

    A large module is examined as a narrow copy; one whose code does not work at another width, at its own. At its own
    width and in its own dtype it is run once, to confirm what was found.

    Raises:
        NotReplaceableError: the module is not a plain token-wise FFN.
    """
    if has_forward_of_its_own(module):
        raise NotReplaceableError("has a forward of its own, in its attributes")
    d_model, d_ff = (module.get_parameter(f"{name}.weight").shape[1] for name in (up[0], down))
    sizes = sorted({(min(d_model, _NARROW[0]), min(d_ff, _NARROW[1])), (d_model, d_ff)})
    refusal: NotReplaceableError | None = None
    with sandbox():
        for size, precision in itertools.product(sizes, PRECISIONS):
            try:
                layout = _Twin(module, up, down, *size, precision).examined()
            except NotReplaceableError as error:
                refusal = refusal or error
                if isinstance(error, FarOffError):
                    break
            else:
                _confirm(module, layout)
                return layout
    assert refusal is not None
    raise refusal


def _confirm(module: nn.Module, layout: FFNLayout) -> None:
    """Runs it once at its own width and in its own dtype, whose rounding hides small differences."""
    parameters = {name: window(p.shape, p.dtype) for name, p in module.named_parameters()}
    weight = parameters[f"{layout.up[0]}.weight"]
    x = torch.randn(2, 3, weight.shape[1], dtype=torch.float64).to(weight.dtype)
    y = _run(copy_with_parameters(module, parameters).eval(), x)
    own = Precision(torch.float64, max(1e-4, 8 * torch.finfo(weight.dtype).eps))
    reason = f"is another FFN at {list(weight.shape)} in {weight.dtype} than as a small copy"
    own.check_close(y.double(), layout.forward(parameters, x).double(), reason)


class _Twin:
    """A copy of a module with random parameters, and with projections of the sizes given."""

    def __init__(
        self, module: nn.Module, up: tuple[str, ...], down: str, d_model: int, d_ff: int, precision: Precision
    ):
        self.up, self.down, self.d_model, self.precision = up, down, d_model, precision
        # As many times d_ff as the up projections of the module have: 1, or 2 of a GLU.
        rows = sum(len(module.get_parameter(f"{name}.weight")) for name in up)
        self.gated = rows == 2 * module.get_parameter(f"{down}.weight").shape[1]
        per_projection = d_ff * (2 if self.gated and len(up) == 1 else 1)
        sizes = dict.fromkeys(up, (per_projection, d_model)) | {down: (d_model, d_ff)}
        self.parameters = {}
        for name, _ in module.named_parameters():
            projection, _, which = name.rpartition(".")
            size = sizes[projection] if which == "weight" else sizes[projection][:1]
            scale = 2 * size[-1] ** -0.5 if which == "weight" else 1.0
            self.parameters[name] = scale * torch.randn(*size, dtype=precision.dtype)
        self.module = copy_with_parameters(module, self.parameters).eval()
        for name, (out_features, in_features) in sizes.items():
            linear = self.module.get_submodule(name)
            linear.__dict__.update(in_features=in_features, out_features=out_features)

    def tokens(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, self.d_model, dtype=self.precision.dtype)

    def examined(self) -> FFNLayout:
        layout = self._formula()
        # Shapes that it may refuse, but not treat otherwise; far larger values; and calls after other calls.
        for shape, scale in (((2, 3), 100.0), ((7,), 1.0), ((1, 70), 1.0), ((2, 4, 5), 1.0), ((2, 3), 1.0)):
            self._check_input(shape, scale, layout)
        self.module.train()
        layout, trials = self._dropouts(layout)
        for training in (False, True):
            self.module.train(training)
            self._check_gradients(layout, trials if training else {})
        return layout

    def _formula(self) -> FFNLayout:
        x = self.tokens(2, 3)
        y = _run(self.module, x)
        gate_places = (False, True) if self.gated else (False,)
        ours: list[Tensor] = []
        for activation, gate_last in itertools.product(ACTIVATIONS, gate_places):
            layout = FFNLayout(self.up, self.down, self.gated, gate_last, activation)
            ours.append(layout.forward(self.parameters, x))
            if self.precision.close(ours[-1], y):
                return layout
        formula = "down(act(gate) * value)" if self.gated else "down(act(up(x)))"
        nearest = min(ours, key=lambda each: float((each - y).norm()))
        reason = f"its output is not {formula} with act any of {', '.join(ACTIVATIONS)}"
        self.precision.check_close(nearest, y, reason)
        raise AssertionError

    def _check_input(self, shape: tuple[int, ...], scale: float, layout: FFNLayout) -> None:
        x = self.tokens(*shape, scale=scale)
        try:
            y = _run(self.module, x)
        except _FailsError:
            if len(shape) == 2:
                raise
            return
        reason = f"is no plain FFN on every input: not on {list(x.shape)}, scale {scale:g}"
        self.precision.check_close(layout.forward(self.parameters, x), y, reason)

    def _dropouts(self, layout: FFNLayout) -> tuple[FFNLayout, dict[Rate | None, float]]:
        """Tries each rate of dropout on hidden and on the output, until every seed gives the same output.

        The generator must end in the same state too: whatever else is drawn, though rarely used, is noticed.

        Returns:
            The layout with its dropouts, and the rate that each has in the twin now.
        """
        x = self.tokens(2, 3)
        trials: dict[Rate | None, float] = {None: 0.0}
        for rate in list(_rates(self.module)):
            # Large and all different, so that one cannot pass for another, or for none.
            trials[rate] = 0.3 + 0.4 / len(trials)
            setattr(self.module.get_submodule(rate[0]), rate[1], trials[rate])
        python_state = random.getstate()
        expected = {}
        for seed in _SEEDS:
            torch.default_generator.manual_seed(seed)
            expected[seed] = _run(self.module, x), torch.get_rng_state()
        if random.getstate() == python_state:
            for on_hidden, on_output in itertools.product(trials, repeat=2):
                found = replace(layout, dropout=on_hidden, output_dropout=on_output)
                if all(self._same_run(found, trials, x, seed, *expected[seed]) for seed in _SEEDS):
                    return found, trials
        raise NotReplaceableError(
            "in training does something else than dropout of hidden and of the output, by nn.Dropout or at a rate that "
            "is an attribute"
        )

    def _same_run(
        self, layout: FFNLayout, trials: Mapping[Rate | None, float], x: Tensor, seed: int, y: Tensor, rng_state: Tensor
    ) -> bool:
        torch.default_generator.manual_seed(seed)
        ours = _forward(layout, self.parameters, x, trials)
        return self.precision.close(ours, y) and torch.equal(torch.get_rng_state(), rng_state)

    def _check_gradients(self, layout: FFNLayout, trials: Mapping[Rate | None, float]) -> None:
        x = self.tokens(2, 3)
        self.module.requires_grad_(True)
        dense = dict(self.module.named_parameters())
        names, leaves = ["its input", *dense], [x.requires_grad_(), *dense.values()]
        with torch.enable_grad():
            torch.default_generator.manual_seed(0)
            y = _run(self.module, x)
            torch.default_generator.manual_seed(0)
            exact = _forward(layout, dense, x, trials)
            self.precision.check_close(y, exact, "its output is another where gradients are recorded")
            y = y if y.requires_grad else 0 * exact  # no gradient is a gradient of 0
        direction = torch.randn_like(exact)
        ours = torch.autograd.grad(y, leaves, direction, materialize_grads=True)
        when = " in training" if trials else ""
        for name, grad, expected in zip(names, ours, torch.autograd.grad(exact, leaves, direction), strict=True):
            reason = f"its gradient with respect to {name} is not that of its output{when}"
            self.precision.check_close(grad, expected, reason)


def _forward(layout: FFNLayout, dense: Mapping[str, Tensor], x: Tensor, trials: Mapping[Rate | None, float]) -> Tensor:
    rates = trials.get(layout.dropout, 0.0), trials.get(layout.output_dropout, 0.0)
    return layout.forward(dense, x, dropout=rates[0], output_dropout=rates[1])


def _rates(ffn: nn.Module) -> Iterator[Rate]:
    """Of all that may be the rate of a dropout."""
    for name, module in ffn.named_modules():
        for attribute, value in vars(module).items():
            if (isinstance(module, nn.Dropout) and attribute == "p") or (isinstance(value, float) and 0 < value < 1):
                yield name, attribute


def _run(module: nn.Module, x: Tensor) -> Tensor:
    given = x.clone()
    try:
        y = module(given)
    except Exception as error:
        shape = [*x.shape[:-1], "D"]
        raise _FailsError(
            f"fails on one tensor [{', '.join(map(str, shape))}]: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise NotReplaceableError(f"gives {got} for a tensor {list(x.shape)}")
    if y.dtype != x.dtype:
        raise NotReplaceableError(f"gives {y.dtype} for {x.dtype}")
    if not torch.equal(given, x):
        raise NotReplaceableError("writes into its input")
    return y
