"""What an FFN computes, found out by running a copy of it with random parameters, in float64 on the CPU.

Nothing is believed of a class by its name: a module is an FFN if its output equals that of an FFN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ewa_kernels import reference
from ewa_kernels.surgery.layout import FFNLayout, copy_with_parameters

# Relative; float64 rounding is 1e-15, the two kinds of GELU are 1e-4 apart.
_TOLERANCE = 1e-6


class NotReplaceableError(Exception):
    """Its text is the reason."""


def probe(module: nn.Module, up: tuple[str, ...], down: str) -> FFNLayout:
    """The layout of an FFN whose projections have these names.

    Raises:
        NotReplaceableError: the module is not a plain token-wise FFN.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    # Large enough that all parts of an activation's curve count, and that a bias does.
    parameters = {
        name: random(*p.shape) * (2 * p.shape[-1] ** -0.5 if p.ndim == 2 else 1)
        for name, p in module.named_parameters()
    }
    twin = copy_with_parameters(module, parameters).eval()
    dropouts = [m for m in twin.modules() if isinstance(m, nn.Dropout)]
    rates = [m.p for m in dropouts]
    for dropout in dropouts:
        dropout.p = 0.0
    x = random(2, 3, parameters[f"{up[0]}.weight"].shape[1])

    y = _run(twin, x)
    layout = _match(x, y, parameters, up, down)
    if not _close(_run(twin.train(), x), y):
        raise NotReplaceableError("does more in training than in eval mode besides nn.Dropout")
    for dropout, rate in zip(dropouts, rates, strict=True):
        if rate > 0:
            layout = _place(dropout, rate, twin, x, parameters, layout)
    return layout


def _match(x: Tensor, y: Tensor, parameters: dict[str, Tensor], up: tuple[str, ...], down: str) -> FFNLayout:
    """The layout that explains the output y at x."""
    num_rows = sum(len(parameters[f"{name}.weight"]) for name in up)
    gated = num_rows == 2 * parameters[f"{down}.weight"].shape[1]
    for activation in reference.ACTIVATIONS:
        for gate_last in (False, True) if gated else (False,):
            layout = FFNLayout(up, down, gated, gate_last, activation)
            if _close(_ffn(x, layout.stack(parameters), layout), y):
                return layout
    formula = "down(act(gate) * value)" if gated else "down(act(up(x)))"
    raise NotReplaceableError(f"its output is not {formula} with act any of {', '.join(reference.ACTIVATIONS)}")


def _ffn(x: Tensor, parameters: dict[str, Tensor], layout: FFNLayout) -> Tensor:
    pre = nn.functional.linear(x, parameters["up.weight"], parameters.get("up.bias"))
    hidden = reference.activate(pre, layout.activation, layout.gated)
    return nn.functional.linear(hidden, parameters["down.weight"], parameters.get("down.bias"))


def _place(
    dropout: nn.Dropout,
    rate: float,
    twin: nn.Module,
    x: Tensor,
    parameters: dict[str, Tensor],
    layout: FFNLayout,
) -> FFNLayout:
    """Finds where a dropout acts: dropping everything leaves the down bias if on hidden, 0 if on the output."""
    calls: list[None] = []
    with _counting(dropout, calls):
        dropout.p = 1.0
        y = _run(twin, x)
        dropout.p = 0.0
    down_bias = parameters.get(f"{layout.down}.bias")
    on_output = not y.any()
    on_hidden = down_bias is not None and _close(y, down_bias.expand_as(y))
    if down_bias is None:
        # 0 either way: hidden is what the down projection then gets.
        on_hidden = not _input_of(twin.get_submodule(layout.down), dropout, twin, x).any()
        on_output = not on_hidden
    if len(calls) == 2 and (on_output or on_hidden):  # one module for both, as in Point-MAE
        on_output = on_hidden = True
    elif len(calls) != 1 or not (on_output or on_hidden):
        raise NotReplaceableError("has an nn.Dropout that is neither on hidden nor on the output")
    if (on_hidden and layout.dropout > 0) or (on_output and layout.output_dropout > 0):
        raise NotReplaceableError("has two dropouts in one place")
    return replace(
        layout,
        dropout=rate if on_hidden else layout.dropout,
        output_dropout=rate if on_output else layout.output_dropout,
    )


def _input_of(inner: nn.Module, dropout: nn.Dropout, twin: nn.Module, x: Tensor) -> Tensor:
    """What `inner` gets while `dropout` drops everything."""
    seen: list[Tensor] = []
    with inner.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        dropout.p = 1.0
        _run(twin, x)
        dropout.p = 0.0
    return seen[0]


@contextmanager
def _counting(module: nn.Module, calls: list[None]) -> Iterator[None]:
    with module.register_forward_hook(lambda *_: calls.append(None)):
        yield


@torch.no_grad()
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
