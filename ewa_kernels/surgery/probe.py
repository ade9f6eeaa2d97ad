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

from ewa_kernels import reference
from ewa_kernels.surgery.layout import FFNLayout, copy_with_parameters

# Relative. Rounding is 1e-15 of float64, the two kinds of GELU are 1e-4 apart.
_TOLERANCE = 1e-10

_SEEDS = range(4)


class NotReplaceableError(Exception):
    """Its text is the reason."""


def probe(module: nn.Module, up: tuple[str, ...], down: str) -> FFNLayout:
    """The layout of an FFN whose projections have these names. `module` and the random generators are not touched.

    Raises:
        NotReplaceableError: the module is not a plain token-wise FFN.
    """
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), _generators_kept():
        torch.manual_seed(0)
        # Large enough that all parts of an activation's curve count, and that a bias does.
        parameters = {
            name: torch.randn(p.shape, dtype=torch.float64) * (2 * p.shape[-1] ** -0.5 if p.ndim == 2 else 1)
            for name, p in module.named_parameters()
        }
        twin = copy_with_parameters(module, parameters)
        d_model = parameters[f"{up[0]}.weight"].shape[1]
        x = torch.randn(2, 3, d_model, dtype=torch.float64)
        layout = _find_formula(twin.eval(), x, parameters, up, down)
        _check_other_inputs(twin, d_model, parameters, layout)
        layout = _find_dropouts(twin.train(), x, parameters, layout)
        _check_gradients(twin.eval(), x, layout)
        return layout


@contextmanager
def _generators_kept() -> Iterator[None]:
    state = random.getstate()
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        yield
    random.setstate(state)


def _find_formula(
    twin: nn.Module, x: Tensor, parameters: Mapping[str, Tensor], up: tuple[str, ...], down: str
) -> FFNLayout:
    y = _run(twin, x)
    num_rows = sum(len(parameters[f"{name}.weight"]) for name in up)
    gated = num_rows == 2 * parameters[f"{down}.weight"].shape[1]
    for activation, gate_last in itertools.product(reference.ACTIVATIONS, (False, True) if gated else (False,)):
        layout = FFNLayout(up, down, gated, gate_last, activation)
        if _close(layout.forward(parameters, x, training=False), y):
            return layout
    formula = "down(act(gate) * value)" if gated else "down(act(up(x)))"
    raise NotReplaceableError(f"its output is not {formula} with act any of {', '.join(reference.ACTIVATIONS)}")


def _check_other_inputs(twin: nn.Module, d_model: int, parameters: Mapping[str, Tensor], layout: FFNLayout) -> None:
    """Shapes that it may refuse, but not treat otherwise; far larger values; and calls after other calls."""
    for shape, scale in (
        ((2, 3), 100.0),
        ((7,), 1.0),
        ((1, 70), 1.0),
        ((2, 4, 5), 1.0),
        ((2, 3), 1.0),
    ):
        x = scale * torch.randn(*shape, d_model, dtype=torch.float64)
        try:
            y = _run(twin, x)
        except NotReplaceableError:
            if len(shape) == 2:
                raise
            continue
        if not _close(layout.forward(parameters, x, training=False), y):
            raise NotReplaceableError(f"is no plain FFN on every input: not on {list(x.shape)}, scale {scale:g}")


def _find_dropouts(twin: nn.Module, x: Tensor, parameters: Mapping[str, Tensor], layout: FFNLayout) -> FFNLayout:
    """Tries each nn.Dropout on hidden and on the output, until every seed gives the same output.

    The generator must end in the same state too: whatever else is drawn, though rarely used, is noticed.
    """
    # Rate to try → rate it has: large and all different, so that one cannot pass for another, or for none.
    rates = {0.0: 0.0}
    for i, dropout in enumerate(m for m in twin.modules() if isinstance(m, nn.Dropout) and m.p > 0):
        trial = 0.3 + 0.4 / (i + 1)
        rates[trial], dropout.p = dropout.p, trial
    python_state = random.getstate()
    expected = {}
    for seed in _SEEDS:
        torch.manual_seed(seed)
        expected[seed] = _run(twin, x), torch.get_rng_state()
    if random.getstate() == python_state:
        for on_hidden, on_output in itertools.product(rates, repeat=2):
            trial_layout = replace(layout, dropout=on_hidden, output_dropout=on_output)
            if all(_same_run(trial_layout, parameters, x, seed, *expected[seed]) for seed in _SEEDS):
                return replace(layout, dropout=rates[on_hidden], output_dropout=rates[on_output])
    raise NotReplaceableError("in training does something else than dropout of hidden and of the output")


def _same_run(
    layout: FFNLayout, parameters: Mapping[str, Tensor], x: Tensor, seed: int, y: Tensor, rng_state: Tensor
) -> bool:
    torch.manual_seed(seed)
    return _close(layout.forward(parameters, x, training=True), y) and torch.equal(torch.get_rng_state(), rng_state)


def _check_gradients(twin: nn.Module, x: Tensor, layout: FFNLayout) -> None:
    twin.requires_grad_(True)
    dense = dict(twin.named_parameters())
    names, leaves = ["its input", *dense], [x.requires_grad_(), *dense.values()]
    with torch.enable_grad():
        y, exact = _run(twin, x), layout.forward(dense, x, training=False)
        y = y if y.requires_grad else 0 * exact  # no gradient is a gradient of 0
    direction = torch.randn_like(exact)
    ours = torch.autograd.grad(y, leaves, direction, materialize_grads=True)
    for name, grad, expected in zip(names, ours, torch.autograd.grad(exact, leaves, direction), strict=True):
        if not _close(grad, expected):
            raise NotReplaceableError(f"its gradient with respect to {name} is not that of its output")


def _run(module: nn.Module, x: Tensor) -> Tensor:
    given = x.clone()
    try:
        y = module(given)
    except Exception as error:
        shape = [*x.shape[:-1], "D"]
        raise NotReplaceableError(
            f"fails on one tensor [{', '.join(map(str, shape))}]: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise NotReplaceableError(f"gives {got} for a tensor {list(x.shape)}")
    if not torch.equal(given, x):
        raise NotReplaceableError("writes into its input")
    return y


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= _TOLERANCE * b.norm())
