"""Other libraries' kernels, where they are installed, called as their own layers call them.

Written against ScatterMoE of October 2025, Liger 0.8, SonicMoE 0.1.2, quack 0.5 and MegaBlocks 0.10; what another
version does differently, the parity gate or its own error tells.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.parity import Function
from benchmarks.peer import Peer, activate, choices_of
from benchmarks.problem import Problem

Rule = Callable[[Case], str | None]


def _library(
    name: str,
    module: str,
    build: Callable[[Case], Function],
    rules: tuple[Rule, ...] = (),
    capability: int = 8,
    prepare: Callable[[Problem], Problem] = lambda problem: problem,
) -> Peer:
    def why_not(case: Case, device: str) -> str | None:
        for rule in rules:
            reason = rule(case)
            if reason is not None:
                return reason
        if importlib.util.find_spec(module.split(".")[0]) is None:
            return "not installed"
        if device != "cuda":
            return "for CUDA devices"
        if torch.cuda.get_device_capability()[0] < capability:
            return f"for compute capability {capability}.0 and later"
        try:
            importlib.import_module(module)
        except Exception as error:  # of whatever a library's import may raise
            return f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
        return None

    return Peer(name, build, why_not, prepare)


def _gated_only(case: Case) -> str | None:
    return None if case.gated and case.activation == "silu" else "gated only (SwiGLU)"


def _plain_only(case: Case) -> str | None:
    return "its gate and value are two tensors, ours is one" if case.gated else None


def _no_bias(case: Case) -> str | None:
    return "no bias" if case.bias else None


def _16_bits(case: Case) -> str | None:
    return None if torch.finfo(case.dtype).bits == 16 else "16-bit types only"


def _scattermoe(case: Case) -> Function:
    api: Any = importlib.import_module("scattermoe.parallel_experts")

    def function(p: Problem, seed: int | None) -> Tensor:
        choices = choices_of(p, seed)
        expert, order, offsets = api.flatten_sort_count(choices, num_experts=case.num_experts)
        where = (expert, order, offsets)
        up, down = p.up_weight.mT, p.down_weight.mT
        pre = api.parallel_linear(p.x, up, choices.shape[1], *where, expert_biases=p.up_bias, grouped_out=True)
        hidden = activate(pre, case)
        return api.parallel_linear(
            hidden, down, 1, *where, expert_biases=p.down_bias, gates=p.routing_weights, grouped_in=True
        )

    return function


def _weights_of(p: Problem, choices: Tensor) -> Tensor:
    """Routing weights, 1 for a token that is dealt."""
    return torch.ones_like(choices, dtype=p.x.dtype) if p.routing_weights is None else p.routing_weights


def _liger(case: Case) -> Function:
    api: Any = importlib.import_module("liger_kernel.ops.fused_moe")

    def function(p: Problem, seed: int | None) -> Tensor:
        choices = choices_of(p, seed)
        weights = _weights_of(p, choices)
        return api.LigerFusedMoEFunction.apply(p.x, p.up_weight, p.down_weight, choices.to(torch.int32), weights)

    return function


def _sonicmoe(case: Case) -> Function:
    api: Any = importlib.import_module("sonicmoe")
    kind = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU

    def function(p: Problem, seed: int | None) -> Tensor:
        choices = choices_of(p, seed)
        token = torch.arange(len(p.x), dtype=torch.int32, device=p.device).repeat_interleave(choices.shape[1])
        y, _ = api.moe_general_routing_inputs(
            p.x,
            _weights_of(p, choices).flatten(),
            token,
            choices.flatten().to(torch.int32),
            p.up_weight.permute(1, 2, 0),
            p.up_bias,
            p.down_weight.permute(1, 2, 0),
            p.down_bias,
            E=case.num_experts,
            activation_type=kind,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,
            stream_id=None,
        )
        return y

    return function


QUACK_ACTIVATIONS = {("silu", True): "swiglu", ("gelu_tanh", False): "gelu_tanh_approx", ("silu", False): "silu"}


def _quack_activation(case: Case) -> str | None:
    known = (case.activation, case.gated) in QUACK_ACTIVATIONS
    return None if known else f"no {case.activation}{' gate' if case.gated else ''}"


def _quack_dense(case: Case) -> str | None:
    return None if case.top_k is None else "a dense FFN, without experts"


def _quack(case: Case) -> Function:
    api: Any = importlib.import_module("quack.mlp")
    activation = QUACK_ACTIVATIONS[case.activation, case.gated]

    def function(p: Problem, seed: int | None) -> Tensor:
        up, down = p.up_weight.squeeze(0), p.down_weight.squeeze(0)
        return api.mlp_func(p.x, up, down, activation, concat_layout=case.gated)

    return function


def _megablocks(case: Case) -> Function:
    """Its layer, with our parameters in place of its own."""
    dmoe: Any = importlib.import_module("megablocks.layers.dmoe")
    arguments: Any = importlib.import_module("megablocks.layers.arguments")
    k = case.top_k or 1
    layer = dmoe.ParallelDroplessMLP(
        arguments.Arguments(
            hidden_size=case.d_model,
            ffn_hidden_size=case.d_ff,
            moe_num_experts=case.num_experts,
            moe_top_k=k,
            bias=False,
            return_bias=False,
            activation_fn=lambda pre: activate(pre, case),
            mlp_impl="grouped",
            fp16=case.dtype == torch.float16,
            bf16=case.dtype == torch.bfloat16,
        )
    )

    def function(p: Problem, seed: int | None) -> Tensor:
        choices = choices_of(p, seed)
        weights = {"mlp.w1": p.up_weight.flatten(0, 1), "mlp.w2": p.down_weight.mT.flatten(0, 1)}
        shape = (len(p.x), case.num_experts)
        scores = torch.full(
            shape, 1 / case.num_experts, dtype=p.x.dtype, device=p.device
        )  # of a loss that is not taken
        rows = p.x.unsqueeze(1)
        result = torch.func.functional_call(layer, weights, (rows, scores, _weights_of(p, choices), choices))
        return (result[0] if isinstance(result, tuple) else result).view_as(p.x)

    return function


LIBRARIES = [
    _library("ScatterMoE", "scattermoe", _scattermoe),
    _library("Liger fused MoE", "liger_kernel.ops.fused_moe", _liger, (_gated_only, _no_bias)),
    _library("SonicMoE", "sonicmoe", _sonicmoe, (_gated_only, _16_bits), capability=9),
    _library(
        "quack MLP", "quack.mlp", _quack, (_quack_dense, _no_bias, _quack_activation, _16_bits), 9, Problem.as_dense
    ),
    _library(
        "MegaBlocks",
        "megablocks.layers.dmoe",
        _megablocks,
        (_plain_only, _no_bias, _16_bits),
        prepare=Problem.with_transposed_down,
    ),
]
