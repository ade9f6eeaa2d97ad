"""Who is measured: this package in its forms, what one would write in PyTorch, and other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ewa_kernels as ewa
from benchmarks.cases import Case
from benchmarks.libraries import LIBRARIES
from benchmarks.parity import Function
from benchmarks.peer import Peer, activate, deal
from benchmarks.problem import Problem
from ewa_kernels import backends

OURS = "ewa_kernels"
BMM = "gather, bmm, scatter"
DENSE = "dense FFN"
LOOP = "loop over experts"


# --- this package ---


def _ours(backend: str) -> Callable[[Case], Function]:
    def build(case: Case) -> Function:
        options: dict[str, Any] = {"activation": case.activation, "gated": case.gated, "backend": backend}

        def function(p: Problem, seed: int | None) -> Tensor:
            operands = (p.x, p.up_weight, p.up_bias, p.down_weight, p.down_bias)
            if p.choices is None:
                drawn = ewa.functional.draw_seed(p.x) if seed is None else seed
                return ewa.functional.moe_ffn(*operands, seed=drawn, **options)
            permutation, offsets = ewa.functional.partition_by_expert(p.choices, case.num_experts)
            return ewa.functional.grouped_ffn(
                *operands,
                permutation=permutation,
                expert_offsets=offsets,
                routing_weights=p.routing_weights,
                **options,
            )

        return function

    return build


def _form(name: str, backend: str) -> Peer:
    def why_not(case: Case, device: str) -> str | None:
        if backend.startswith("triton") and device == "cpu":
            return "for CUDA devices"
        if backend == "triton-onchip" and case.d_model > 128:
            return "for D ≤ 128"
        return backends.why_not("moe_ffn", backend, torch.device(device), case.dtype)

    return Peer(f"{OURS}, {name}", _ours(backend), why_not)


# --- what one would write in PyTorch ---


def dense(case: Case) -> Function:
    return _dense_by(_dense_core, case)


def _dense_core(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, c: Case
) -> Tensor:
    return F.linear(activate(F.linear(x, up, up_bias), c), down, down_bias)


def _dense_by(core: Callable[..., Tensor], case: Case) -> Function:
    def function(p: Problem, seed: int | None) -> Tensor:
        parameters = (p.up_weight, p.up_bias, p.down_weight, p.down_bias)
        return core(p.x, *(None if t is None else t.squeeze(0) for t in parameters), case)

    return function


def _no_dense(case: Case, device: str) -> str | None:
    return None if case.top_k is None else "an FFN has not the work of k chosen experts"


Parameters = tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # up_weight, up_bias, down_weight, down_bias


def _bmm_ffn(grouped: Tensor, parameters: Parameters, case: Case) -> Tensor:
    """`[E, rows, D]` → `[E, rows, D]`."""
    up_weight, up_bias, down_weight, down_bias = parameters

    def product(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.bmm(a, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), a, weight.mT)

    return product(activate(product(grouped, up_weight, up_bias), case), down_weight, down_bias)


def _bmm_core(x: Tensor, parameters: Parameters, permutation: Tensor, case: Case) -> Tensor:
    """For equal groups."""
    y = _bmm_ffn(x[permutation].view(case.num_experts, -1, case.d_model), parameters, case)
    return torch.empty_like(x).index_copy(0, permutation, y.flatten(0, 1))


def _padded_bmm_core(
    x: Tensor, parameters: Parameters, choices: Tensor, routing_weights: Tensor, capacity: int, case: Case
) -> Tensor:
    """For groups of any size, each padded to the largest one."""
    order = choices.flatten().argsort(stable=True)
    expert = choices.flatten()[order]
    counts = torch.zeros(case.num_experts, dtype=torch.long, device=x.device)
    counts = counts.scatter_add(0, expert, torch.ones_like(expert))
    first = counts.cumsum(0) - counts
    slot = expert * capacity + torch.arange(len(order), device=x.device) - first[expert]
    token = order // choices.shape[1]
    padded = x.new_zeros(case.num_experts * capacity, case.d_model).index_copy(0, slot, x[token])
    y = _bmm_ffn(padded.view(case.num_experts, capacity, -1), parameters, case).flatten(0, 1)[slot]
    return torch.zeros_like(x).index_add(0, token, y * routing_weights.flatten()[order, None])


def _bmm(case: Case, compiled: bool = False) -> Function:
    equal, padded = _bmm_core, _padded_bmm_core
    if compiled:
        equal, padded = (torch.compile(core, dynamic=False) for core in (equal, padded))

    def function(p: Problem, seed: int | None) -> Tensor:
        parameters = (p.up_weight, p.up_bias, p.down_weight, p.down_bias)
        if p.choices is None or p.routing_weights is None:
            return equal(p.x, parameters, deal(p, seed), case)
        capacity = int(p.choices.flatten().bincount(minlength=case.num_experts).max())  # waits for the device
        return padded(p.x, parameters, p.choices, p.routing_weights, capacity, case)

    return function


def _equal_groups(case: Case, device: str) -> str | None:
    if case.top_k is None and case.num_tokens % case.num_experts:
        return "T must be a multiple of E"
    return None


def _grouped_rows(p: Problem, seed: int | None) -> tuple[Tensor, Tensor]:
    """(order, ends): choices in the order of their experts, and where each expert's end."""
    num_experts = p.case.num_experts
    if p.choices is None:
        ends = ewa.functional.expert_offsets(len(p.x), num_experts)[1:]
        return deal(p, seed), torch.tensor(ends, dtype=torch.int32, device=p.device)
    flat = p.choices.flatten()
    ends_of = flat.bincount(minlength=num_experts).cumsum(0, dtype=torch.int32)
    return flat.argsort(stable=True), ends_of


def _grouped_mm(case: Case) -> Function:
    def function(p: Problem, seed: int | None) -> Tensor:
        order, ends = _grouped_rows(p, seed)
        token = order if p.choices is None else order // p.choices.shape[1]
        row = torch.arange(len(order), dtype=torch.int32, device=p.device)
        expert = torch.bucketize(row, ends, right=True)
        # Biases by a product: the backward of bias[expert] sums up in 16 bits, and would not pass the gate.
        one_hot = (expert[:, None] == torch.arange(case.num_experts, device=p.device)).to(p.x.dtype)

        def product(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = F.grouped_mm(a, weight.mT, offs=ends)
            return y if bias is None else torch.addmm(y, one_hot, bias)

        y = product(activate(product(p.x[token], p.up_weight, p.up_bias), case), p.down_weight, p.down_bias)
        if p.routing_weights is None:
            return torch.empty_like(p.x).index_copy(0, token, y)
        return torch.zeros_like(p.x).index_add(0, token, y * p.routing_weights.flatten()[order, None])

    return function


def _loop(case: Case) -> Function:
    """The paper's plain implementation."""

    def function(p: Problem, seed: int | None) -> Tensor:
        order, ends = _grouped_rows(p, seed)
        groups = order.tensor_split(ends[:-1].tolist())
        stacked = (p.up_weight, p.up_bias, p.down_weight, p.down_bias)
        parameters = ([None] * case.num_experts if t is None else t.unbind() for t in stacked)
        y = torch.zeros_like(p.x)
        for group, up, up_bias, down, down_bias in zip(groups, *parameters, strict=True):
            token = group if p.choices is None else group // p.choices.shape[1]
            rows = _dense_core(p.x[token], up, up_bias, down, down_bias, case)
            if p.routing_weights is not None:
                rows = rows * p.routing_weights.flatten()[group, None]
            y.index_add_(0, token, rows)
        return y

    return function


def _no_grouped_mm(case: Case, device: str) -> str | None:
    return None if hasattr(F, "grouped_mm") else "this PyTorch has no grouped_mm"


def peers() -> list[Peer]:
    """All, in the order of the tables."""
    return [
        Peer(OURS, _ours("auto")),
        _form("one launch", "triton-single"),
        _form("split form", "triton-split"),
        _form("on chip", "triton-onchip"),
        _form("PyTorch calls", "torch"),
        Peer(DENSE, dense, _no_dense, Problem.as_dense),
        Peer(
            f"{DENSE}, compiled",
            lambda case: _dense_by(torch.compile(_dense_core, dynamic=False), case),
            _no_dense,
            Problem.as_dense,
            compiled=True,
        ),
        Peer(BMM, _bmm, _equal_groups),
        Peer(f"{BMM}, compiled", lambda case: _bmm(case, compiled=True), _equal_groups, compiled=True),
        Peer("grouped_mm", _grouped_mm, _no_grouped_mm),
        Peer(LOOP, _loop),
        *LIBRARIES,
    ]
