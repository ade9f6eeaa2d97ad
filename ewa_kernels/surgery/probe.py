"""What an FFN computes, found out by running a copy of it with random parameters, in float64 on the CPU.

Nothing is believed of a class by its name: a module is an FFN if it does what an FFN does, on inputs of several
shapes and sizes, in eval and in training mode, forward and backward, and nothing else.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ewa_kernels.activations import ACTIVATIONS
from ewa_kernels.surgery.layout import FFNLayout, copy_with_parameters

# Relative. Rounding is 1e-15 of float64, the two kinds of GELU are 1e-4 apart.
_TOLERANCE = 1e-10

_SEEDS = range(4)

# d_model and d_ff of a narrow copy.
_NARROW = (24, 40)


class NotReplaceableError(Exception):
    """Its text is the reason."""


class _FailsError(NotReplaceableError):
    """The module did not run at all."""


def probe(module: nn.Module, up: tuple[str, ...], down: str) -> FFNLayout:
    """The layout of an FFN whose projections have these names. `module` and the random generators are not touched.

    A large module is examined as a narrow copy; one whose code does not work at another width, at its own. At its own
    width and in its own dtype it is run once, to confirm what was found.

    Raises:
        NotReplaceableError: the module is not a plain token-wise FFN.
    """
    d_model, d_ff = (module.get_parameter(f"{name}.weight").shape[1] for name in (up[0], down))
    narrow = min(d_model, _NARROW[0]), min(d_ff, _NARROW[1])
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), generators_kept():
        torch.default_generator.manual_seed(0)
        try:
            layout = _examine(_Twin(module, up, down, *narrow))
        except NotReplaceableError:
            if narrow == (d_model, d_ff):
                raise
            layout = _examine(_Twin(module, up, down, d_model, d_ff))
        _confirm(module, layout)
        return layout


class _Twin:
    """A copy of a module with random parameters in float64, and with projections of the sizes given."""

    def __init__(self, module: nn.Module, up: tuple[str, ...], down: str, d_model: int, d_ff: int):
        self.up, self.down, self.d_model, self.d_ff = up, down, d_model, d_ff
        # As many times d_ff as the up projections of the module have: 1, or 2 of a GLU.
        rows = sum(len(module.get_parameter(f"{name}.weight")) for name in up)
        self.gated = rows == 2 * module.get_parameter(f"{down}.weight").shape[1]
        per_projection = d_ff * (2 if self.gated and len(up) == 1 else 1)
        sizes = dict.fromkeys(up, (per_projection, d_model)) | {down: (d_model, d_ff)}
        self.parameters = {}
        for name, _ in module.named_parameters():
            projection, _, which = name.rpartition(".")
            out_features, in_features = sizes[projection]
            # Large enough that all parts of an activation's curve count, and that a bias does.
            if which == "weight":
                weight = torch.randn(out_features, in_features, dtype=torch.float64)
                self.parameters[name] = weight.mul_(2 * in_features**-0.5)
            else:
                self.parameters[name] = torch.randn(out_features, dtype=torch.float64)
        self.module = copy_with_parameters(module, self.parameters).eval()
        for name, (out_features, in_features) in sizes.items():
            linear = self.module.get_submodule(name)
            linear.__dict__.update(in_features=in_features, out_features=out_features)

    def tokens(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, self.d_model, dtype=torch.float64)


def _examine(twin: _Twin) -> FFNLayout:
    layout = _find_formula(twin)
    # Shapes that it may refuse, but not treat otherwise; far larger values; and calls after other calls.
    for shape, scale in (((2, 3), 100.0), ((7,), 1.0), ((1, 70), 1.0), ((2, 4, 5), 1.0), ((2, 3), 1.0)):
        _check_input(twin, shape, scale, layout)
    twin.module.train()
    layout, rates = _find_dropouts(twin, layout)
    for training in (False, True):
        twin.module.train(training)
        _check_gradients(twin, layout, training)
    return replace(layout, dropout=rates[layout.dropout], output_dropout=rates[layout.output_dropout])


def _confirm(module: nn.Module, layout: FFNLayout) -> None:
    """Runs it once at its own width and in its own dtype, whose rounding hides small differences."""
    parameters = {}
    for name, parameter in module.named_parameters():
        # Each row is a window on the same random numbers, so that a wide matrix takes no memory.
        numbers = torch.randn(sum(parameter.shape), dtype=torch.float64)
        if parameter.ndim == 2:
            numbers *= 2 * parameter.shape[1] ** -0.5
        parameters[name] = numbers.to(parameter.dtype).as_strided(parameter.shape, (1,) * parameter.ndim)
    weight = module.get_parameter(f"{layout.up[0]}.weight")
    x = torch.randn(2, 3, weight.shape[1], dtype=torch.float64).to(weight.dtype)
    y = _run(copy_with_parameters(module, parameters).eval(), x)
    expected = layout.forward(parameters, x, training=False)
    if not close(y.double(), expected.double(), max(1e-4, 8 * torch.finfo(weight.dtype).eps)):
        raise NotReplaceableError(f"is another FFN at {list(weight.shape)} in {weight.dtype} than as a small copy")


@contextmanager
def generators_kept() -> Iterator[None]:
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        random.setstate(state)


def _find_formula(twin: _Twin) -> FFNLayout:
    x = twin.tokens(2, 3)
    y = _run(twin.module, x)
    gate_places = (False, True) if twin.gated else (False,)
    for activation, gate_last in itertools.product(ACTIVATIONS, gate_places):
        layout = FFNLayout(twin.up, twin.down, twin.gated, gate_last, activation)
        if close(layout.forward(twin.parameters, x, training=False), y):
            return layout
    formula = "down(act(gate) * value)" if twin.gated else "down(act(up(x)))"
    raise NotReplaceableError(f"its output is not {formula} with act any of {', '.join(ACTIVATIONS)}")


def _check_input(twin: _Twin, shape: tuple[int, ...], scale: float, layout: FFNLayout) -> None:
    x = twin.tokens(*shape, scale=scale)
    try:
        y = _run(twin.module, x)
    except _FailsError:
        if len(shape) == 2:
            raise
        return
    if not close(layout.forward(twin.parameters, x, training=False), y):
        raise NotReplaceableError(f"is no plain FFN on every input: not on {list(x.shape)}, scale {scale:g}")


def _find_dropouts(twin: _Twin, layout: FFNLayout) -> tuple[FFNLayout, dict[float, float]]:
    """Tries each rate of dropout on hidden and on the output, until every seed gives the same output.

    The generator must end in the same state too: whatever else is drawn, though rarely used, is noticed.

    Returns:
        The layout with the rates that the twin has now, and the module's own rate for each.
    """
    x = twin.tokens(2, 3)
    # Large and all different, so that one cannot pass for another, or for none.
    rates = {0.0: 0.0}
    for module, name, rate in list(_rates(twin.module)):
        trial = 0.3 + 0.4 / len(rates)
        rates[trial] = rate
        setattr(module, name, trial)
    python_state = random.getstate()
    expected = {}
    for seed in _SEEDS:
        torch.default_generator.manual_seed(seed)
        expected[seed] = _run(twin.module, x), torch.get_rng_state()
    if random.getstate() == python_state:
        for on_hidden, on_output in itertools.product(rates, repeat=2):
            trial_layout = replace(layout, dropout=on_hidden, output_dropout=on_output)
            if all(_same_run(trial_layout, twin.parameters, x, seed, *expected[seed]) for seed in _SEEDS):
                return trial_layout, rates
    raise NotReplaceableError(
        "in training does something else than dropout of hidden and of the output, by nn.Dropout or at a rate that is "
        "an attribute"
    )


def _rates(ffn: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """(module, name of the attribute, value) of all that may be the rate of a dropout."""
    for module in ffn.modules():
        for name, value in vars(module).items():
            if (isinstance(module, nn.Dropout) and name == "p" and value > 0) or (
                isinstance(value, float) and 0 < value < 1
            ):
                yield module, name, value


def _same_run(
    layout: FFNLayout, parameters: Mapping[str, Tensor], x: Tensor, seed: int, y: Tensor, rng_state: Tensor
) -> bool:
    torch.default_generator.manual_seed(seed)
    return close(layout.forward(parameters, x, training=True), y) and torch.equal(torch.get_rng_state(), rng_state)


def _check_gradients(twin: _Twin, layout: FFNLayout, training: bool) -> None:
    x = twin.tokens(2, 3)
    twin.module.requires_grad_(True)
    dense = dict(twin.module.named_parameters())
    names, leaves = ["its input", *dense], [x.requires_grad_(), *dense.values()]
    with torch.enable_grad():
        torch.default_generator.manual_seed(0)
        y = _run(twin.module, x)
        torch.default_generator.manual_seed(0)
        exact = layout.forward(dense, x, training=training)
        if not close(y, exact):
            raise NotReplaceableError("its output is another where gradients are recorded")
        y = y if y.requires_grad else 0 * exact  # no gradient is a gradient of 0
    direction = torch.randn_like(exact)
    ours = torch.autograd.grad(y, leaves, direction, materialize_grads=True)
    for name, grad, expected in zip(names, ours, torch.autograd.grad(exact, leaves, direction), strict=True):
        if not close(grad, expected):
            when = " in training" if training else ""
            raise NotReplaceableError(f"its gradient with respect to {name} is not that of its output{when}")


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
    if not torch.equal(given, x):
        raise NotReplaceableError("writes into its input")
    return y


def close(a: Tensor, b: Tensor, tolerance: float = _TOLERANCE) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())
