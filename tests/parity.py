"""How results are compared: an implementation may err at most twice as much as torch does in the same dtype.

The floor, for results that torch happens to get exactly, is a few roundings of the result's own scale, so that
an all-zero output, a NaN or a missing row never passes (`test_parity.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

import ewa_kernels as ewa

# Roundings of the result's scale that are allowed in any case. In 16 bits a result is rounded once, and products are
# accumulated in float32; in 32 and 64 bits the order of a sum shows, and how an activation is computed.
FLOOR_ROUNDINGS = {torch.float16: 0.5, torch.bfloat16: 0.5, torch.float32: 8, torch.float64: 8}


def assert_parity(name: str, actual: Tensor, exact: Tensor, baseline: Tensor, slack: float = 1.0) -> None:
    """`actual` against `exact` (float64), measured by the error of `baseline` (torch, dtype of `actual`).

    slack: the bound is so many times what it is else.
    """
    assert actual.dtype == baseline.dtype, f"{name}: dtype {actual.dtype}, not {baseline.dtype}"
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, not {list(exact.shape)}"
    if exact.numel() == 0:
        return
    rounding = torch.finfo(actual.dtype).eps
    for what, norm in (("largest", lambda t: t.abs().max()), ("mean square", lambda t: t.square().mean().sqrt())):
        scale = norm(exact)
        assert scale > 0, f"{name}: the exact result is all zero, so nothing could fail"
        error = norm(actual.double() - exact)
        bound = slack * (2 * norm(baseline.double() - exact) + FLOOR_ROUNDINGS[actual.dtype] * rounding * scale)
        # Written so that a NaN fails.
        assert error <= bound, f"{name}: {what} error {error / scale:.2e}, bound {bound / scale:.2e}, of the scale"


def random_ffn(
    num_experts: int,
    d_model: int,
    d_ff: int,
    *,
    gated: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """up_weight, up_bias, down_weight, down_bias, of such a size that activations stay of order 1."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    num_up = 2 * d_ff if gated else d_ff
    up_weight = random(num_experts, num_up, d_model, scale=d_model**-0.5)
    up_bias = random(num_experts, num_up) if bias else None
    down_weight = random(num_experts, d_model, d_ff, scale=d_ff**-0.5)
    down_bias = random(num_experts, d_model) if bias else None
    return up_weight, up_bias, down_weight, down_bias


def output_and_grads(
    function: Callable[..., Tensor], operands: tuple[Tensor | None, ...], grad_y: Tensor, **options: object
) -> dict[str, Tensor]:
    """`function`'s output, and the gradient of each operand for the upstream gradient `grad_y`."""
    names = ("x", "up_weight", "up_bias", "down_weight", "down_bias", "routing_weights")[: len(operands)]
    leaves = [t.detach().clone(memory_format=torch.preserve_format) if t is not None else None for t in operands]
    given = {name: leaf.requires_grad_() for name, leaf in zip(names, leaves, strict=True) if leaf is not None}
    y = function(*leaves, **options)
    grads = torch.autograd.grad(y, list(given.values()), grad_y.to(y.dtype))
    return {"y": y.detach(), **{f"grad of {name}": grad for name, grad in zip(given, grads, strict=True)}}


def check_ffn(
    x: Tensor,
    parameters: tuple[Tensor | None, ...],
    *,
    backend: str = "auto",
    slack: float = 1.0,
    **options: object,
) -> None:
    """Output and all gradients of `moe_ffn`, against the specification in float64."""
    operands = (x, *parameters)
    grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x)
    wide = tuple(t.double() if t is not None else None for t in operands)
    exact = output_and_grads(ewa.reference.moe_ffn, wide, grad_y.double(), **options)
    baseline = output_and_grads(ewa.reference.moe_ffn, operands, grad_y, **options)
    actual = output_and_grads(ewa.functional.moe_ffn, operands, grad_y, backend=backend, **options)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        if exact[name].any() or exact[name].numel() == 0:
            assert_parity(name, value, exact[name], baseline[name], slack)
        else:  # the gradient of an expert without tokens, or of a layer without any
            assert torch.equal(value, torch.zeros_like(value)), f"{name} must be zero"


def check_frozen(run: Callable[..., Tensor], values: Mapping[str, Tensor], frozen: str) -> None:
    """Operands named `frozen`, or "all but" it, get no gradient, and those of the others have the same bits.

    Args:
        run: of the operands, in the order of `values`.
    """
    off = [n for n in values if n != frozen[8:]] if frozen.startswith("all but") else [frozen]

    def grads(off: Collection[str]) -> dict[str, Tensor | None]:
        leaves = {n: t.clone().requires_grad_(n not in off) for n, t in values.items()}
        y = run(*leaves.values())
        (y * y.detach()).sum().backward()
        return {n: t.grad for n, t in leaves.items()}

    everything = grads([])
    for name, grad in grads(off).items():
        if name in off:
            assert grad is None
        else:
            assert torch.equal(grad, everything[name])


def check_grouped(
    operands: tuple[Tensor | None, ...], grad_y: Tensor, *, backend: str, exact_by: str = "reference", **options: object
) -> None:
    """Output and all gradients of `grouped_ffn`, routing weights being the last operand, likewise."""
    wide = tuple(None if t is None else t.double() for t in operands)
    exact = output_and_grads(weighted, wide, grad_y.double(), backend=exact_by, **options)
    baseline = output_and_grads(weighted, operands, grad_y, backend="reference", **options)
    for name, ours in output_and_grads(weighted, operands, grad_y, backend=backend, **options).items():
        assert_parity(name, ours, exact[name], baseline[name])


def weighted(*operands: Tensor | None, **options: object) -> Tensor:
    """`grouped_ffn` with the routing weights as one more operand."""
    return ewa.functional.grouped_ffn(*operands[:5], routing_weights=operands[5], **options)
