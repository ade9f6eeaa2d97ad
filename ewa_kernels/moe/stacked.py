"""Experts as transformers 5 stacks them in one module: what it computes, found by execution, and the same by kernels.

Such a module has `gate_up_proj` `[E, 2F, D]` (or `up_proj` `[E, F, D]`), `down_proj` `[E, D, F]`, both perhaps
transposed or with a bias, flags that say so, and is called with tokens `[T, D]`, choices `[T, k]` and routing weights
`[T, k]`.
"""

from __future__ import annotations

import ctypes
import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ewa_kernels.functional as functional
from ewa_kernels.activations import ACTIVATIONS, activate
from ewa_kernels.modules import forward_mean

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "_is_expert_parallel")

BACKEND = "_ewa_backend"  # attribute that `replace_moe_` sets

# Relative, or absolute below 1. Some activations are computed in float32 always; the two kinds of GELU are 1e-4 apart.
_TOLERANCE = 1e-6


class Formula(NamedTuple):
    """y = down(act(up(x))), or down(act(gate) * value) if gated. Without activation it is none of these."""

    up: str
    gated: bool
    transposed: bool
    activation: str = ""
    reason: str | None = None  # why it is none of these

    def experts(self, module: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """up_weight, up_bias, down_weight and down_bias, as the functions of `ewa_kernels.functional` take them."""
        weights = [getattr(module, name) for name in (self.up, "down_proj")]
        biases = [getattr(module, f"{name}_bias", None) for name in (self.up, "down_proj")]
        up, down = (weight.transpose(1, 2) if self.transposed else weight for weight in weights)
        return up, biases[0], down, biases[1]


# Of every module seen, with what it was found of.
_formulas: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], Formula]] = weakref.WeakKeyDictionary()
_warned: set[str] = set()  # names of classes


def is_stacked(module: nn.Module) -> bool:
    """Whether it is a module as above."""
    return all(hasattr(module, flag) for flag in _FLAGS) and hasattr(type(module).forward, "__wrapped__")


def formula_of(module: nn.Module) -> Formula:
    """What the module computes. Only what lies between its projections is run, on the CPU."""
    return _formula_at(id(module))


def _formula_at(address: int) -> Formula:
    """Of the module there. What compilers take for constant is called with constants, in torch 2.11 with no module."""
    module = ctypes.cast(address, ctypes.py_object).value
    parts = [getattr(module, name, None) for name in ("act_fn", *_FLAGS)]
    found, formula = _formulas.get(module, (None, None))
    if formula is None or found != parts:
        formula = _find_formula(module)
        _formulas[module] = parts, formula
    return formula


def original_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The loop over experts that the module's class was written with."""
    forward: Any = type(module).forward
    return forward.__wrapped__(module, *args, **kwargs)


def routed_forward(module: Any, x: Tensor, choices: Tensor, routing_weights: Tensor) -> Tensor:
    """y[t] = Σ_j routing_weights[t, j] · FFN_e(x[t]) with e = choices[t, j]: `[T, D]` → `[T, D]`, of x's dtype.

    What the kernels cannot express goes through the module's own loop, with one warning for its class.
    """
    formula = formula_of(module)
    if module._is_expert_parallel or _not_expressible(module, formula):
        return original_forward(module, x, choices, routing_weights)
    experts = formula.experts(module)
    permutation, expert_offsets = functional.partition_by_expert(choices, len(experts[0]))
    y = functional.grouped_ffn(
        x,
        *experts,
        permutation=permutation,
        expert_offsets=expert_offsets,
        routing_weights=routing_weights,
        activation=formula.activation,
        gated=formula.gated,
        backend=getattr(module, BACKEND, "auto"),
    )
    return y.to(x.dtype)


def random_partition_forward(module: Any, x: Tensor, choices: Tensor, routing_weights: Tensor) -> Tensor:
    """Training: the tokens are dealt among the experts at random; eval: the mean expert. `[T, D]` → `[T, D]`.

    The router's decision is not used.

    Raises:
        NotImplementedError: the experts are sharded over processes, or compute what the kernels cannot express.
    """
    formula = formula_of(module)
    if module._is_expert_parallel:
        raise NotImplementedError(f"{type(module).__name__}: a random partition over expert parallel processes")
    if formula.reason is not None:
        raise NotImplementedError(f"{type(module).__name__} {formula.reason}")
    experts = formula.experts(module)
    activation, gated = formula.activation, formula.gated
    if module.training:
        backend = getattr(module, BACKEND, "auto")
        seed = functional.draw_seed(x)
        y = functional.moe_ffn(x, *experts, seed=seed, activation=activation, gated=gated, backend=backend)
    else:
        y = forward_mean(x, experts, activation, gated)
    return y.to(x.dtype)


def _not_expressible(module: nn.Module, formula: Formula) -> bool:
    if formula.reason is not None:
        _warn(type(module).__name__, formula.reason)
    return formula.reason is not None


def _warn(name: str, reason: str) -> None:
    if name not in _warned:
        _warned.add(name)
        warnings.warn(f"{name} runs its own loop, not the kernels: it {reason}", stacklevel=4)


# What torch.compiler.assume_constant_result does, without importing the compiler.
_constant: Any
for _constant in (_formula_at, _warn):
    _constant._dynamo_marked_constant = True


def _find_formula(module: Any) -> Formula:
    up, gated = ("gate_up_proj", True) if module.has_gate else ("up_proj", False)

    def formula(activation: str = "", reason: str | None = None) -> Formula:
        return Formula(up, gated, bool(module.is_transposed), activation, reason)

    if module.has_post_expert_norm:
        return formula(reason="has a norm after each expert")
    for name in (up, "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.ndim != 3:
            return formula(reason=f"has no {name} of three dimensions")
        if not weight.is_floating_point() or weight.element_size() < 2:
            return formula(reason=f"has a {name} of {weight.dtype}")
    act_fn = getattr(module, "act_fn", None)
    if isinstance(act_fn, nn.Module) and next(act_fn.parameters(), None) is not None:
        return formula(reason="has an activation with parameters")
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.inference_mode(False), torch.no_grad():
        # Far values too, where some are clamped; and more than one column, which some interleave.
        far = torch.logspace(-3, 3, 61, dtype=torch.float64)
        points = torch.cat([-far, torch.zeros(1, dtype=torch.float64), far])
        gate = torch.stack([points, points.roll(1), points.roll(7)], dim=-1)
        value = torch.stack([points.roll(31), points.flip(0), points.roll(50)], dim=-1)
        pre_activation = torch.cat([gate, value], dim=-1) if gated else gate
        try:
            hidden = module._apply_gate(pre_activation.clone()) if gated else module.act_fn(pre_activation.clone())
        except Exception as error:  # of foreign code
            return formula(reason=f"cannot be examined: {type(error).__name__}: {error}")
        for activation in ACTIVATIONS:
            expected = activate(pre_activation, activation, gated)
            same_shape = isinstance(hidden, Tensor) and hidden.shape == expected.shape
            if same_shape and torch.allclose(hidden.double(), expected, rtol=_TOLERANCE, atol=_TOLERANCE):
                return formula(activation)
    hidden_is = "act(gate) * value" if gated else "act(up(x))"
    return formula(reason=f"does not compute {hidden_is} with act any of {', '.join(ACTIVATIONS)}")
