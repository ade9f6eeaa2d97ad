"""What an FFN computes, found out by running a copy of it with random parameters, in float64 on the CPU.

Nothing is believed of a class by its name: a module is an FFN if its output equals that of an FFN.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewa_kernels import reference
from ewa_kernels.surgery.layout import FFNLayout, copy_with_parameters

# Relative; float64 rounding is 1e-15, the two kinds of GELU are 1e-4 apart.
_TOLERANCE = 1e-6


class NotReplaceableError(Exception):
    """Its text is the reason."""


def probe(module: nn.Module, up: tuple[str, ...], down: str) -> FFNLayout:
    """The layout of an FFN whose projections have these names. `module` and torch's generators are not touched.

    Raises:
        NotReplaceableError: the module is not a plain token-wise FFN.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        # Large enough that all parts of an activation's curve count, and that a bias does.
        parameters = {
            name: torch.randn(p.shape, dtype=torch.float64) * (2 * p.shape[-1] ** -0.5 if p.ndim == 2 else 1)
            for name, p in module.named_parameters()
        }
        twin = copy_with_parameters(module, parameters)
        x = torch.randn(2, 3, parameters[f"{up[0]}.weight"].shape[1], dtype=torch.float64)
        layout = _find_formula(twin.eval(), x, parameters, up, down)
        return _find_dropouts(twin.train(), x, parameters, layout)


def _find_formula(
    twin: nn.Module, x: Tensor, parameters: Mapping[str, Tensor], up: tuple[str, ...], down: str
) -> FFNLayout:
    y = _run(twin, x)
    num_rows = sum(len(parameters[f"{name}.weight"]) for name in up)
    gated = num_rows == 2 * parameters[f"{down}.weight"].shape[1]
    for activation, gate_last in itertools.product(reference.ACTIVATIONS, (False, True) if gated else (False,)):
        layout = FFNLayout(up, down, gated, gate_last, activation)
        if _close(_ffn(x, parameters, layout), y):
            return layout
    formula = "down(act(gate) * value)" if gated else "down(act(up(x)))"
    raise NotReplaceableError(f"its output is not {formula} with act any of {', '.join(reference.ACTIVATIONS)}")


def _find_dropouts(twin: nn.Module, x: Tensor, parameters: Mapping[str, Tensor], layout: FFNLayout) -> FFNLayout:
    """Tries each nn.Dropout on hidden and on the output, until the same seed gives the same output."""
    # Rate to try → rate it has: large and all different, so that one cannot pass for another, or for none.
    rates = {0.0: 0.0}
    for i, dropout in enumerate(m for m in twin.modules() if isinstance(m, nn.Dropout) and m.p > 0):
        trial = 0.3 + 0.4 / (i + 1)
        rates[trial], dropout.p = dropout.p, trial
    torch.manual_seed(0)
    y = _run(twin, x)
    for on_hidden, on_output in itertools.product(rates, repeat=2):
        torch.manual_seed(0)
        if _close(_ffn(x, parameters, replace(layout, dropout=on_hidden, output_dropout=on_output)), y):
            return replace(layout, dropout=rates[on_hidden], output_dropout=rates[on_output])
    raise NotReplaceableError("in training does something else than dropout of hidden and of the output")


def _ffn(x: Tensor, parameters: Mapping[str, Tensor], layout: FFNLayout) -> Tensor:
    stacked = layout.stack(parameters)
    pre = F.linear(x, stacked["up.weight"], stacked.get("up.bias"))
    hidden = F.dropout(reference.activate(pre, layout.activation, layout.gated), layout.dropout)
    return F.dropout(F.linear(hidden, stacked["down.weight"], stacked.get("down.bias")), layout.output_dropout)


def _run(module: nn.Module, x: Tensor) -> Tensor:
    try:
        with torch.autocast("cpu", enabled=False):
            y = module(x.clone())
    except Exception as error:
        raise NotReplaceableError(f"fails on one tensor [2, 3, D]: {type(error).__name__}: {error}") from error
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise NotReplaceableError(f"gives {got} for a tensor {list(x.shape)}")
    return y


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= _TOLERANCE * b.norm())
