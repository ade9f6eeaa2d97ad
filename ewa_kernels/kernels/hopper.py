"""The layer by our own kernels for sm_90a, csrc/hopper: forward a launch for each of two products, unless rows must be
gathered or groups tabulated before; backward one for rows, four products, and the sums of what these make in parts.

Gradients and what is kept for backward lie in slots, see csrc/hopper/groups.cuh. What these kernels are not for, other
types and sizes, is Triton's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import Deal, Inputs, Problem
from . import codec, multiprocessors
from .choices import grad_of_routing_weights, sum_of_choices
from .counters import give_back, zeroed_counters
from .devices import on_device
from .triton import moe_ffn as triton_ffn
from .triton.configs import aligned, ceil_div
from .triton.layer import check_sizes
from .triton.permutation import radices

with contextlib.suppress(ImportError):
    from .. import _C

# Two choices to be measured; results are the same. Whether a launch begins while the one before it ends; and whether
# forward is one launch, in which the products hand over rows by flags, in place of two. Neither is made where
# multiprocessors are left free: early launches would wait on just these, and one launch needs all its clusters at once.
OVERLAPS = True
ONE_LAUNCH = False

_NUMBER_TYPES = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # of csrc/hopper/layer.h
# For these, and up to so many elements of x by row, the up projection finds its rows by itself.
_GATHERING, _MAX_GATHERED = ("gelu", "silu"), 2**35 - 64


def is_for(problem: Problem) -> bool:
    """Whether these kernels are for such calls."""
    is_16bit = problem.dtype in (torch.bfloat16, torch.float16)
    return is_16bit and problem.d_model % 8 == 0 and problem.d_ff % 8 == 0


def prepared(problem: Problem, inputs: Inputs) -> Inputs:
    """As Triton's; biases and routing weights in types that the kernels know."""
    inputs = triton_ffn.prepared(problem, inputs)
    if not is_for(problem):
        return inputs
    up_bias, down_bias = (
        bias if bias is None or bias.dtype in _NUMBER_TYPES else bias.float()
        for bias in (inputs.up_bias, inputs.down_bias)
    )
    routing_weights = None if inputs.routing_weights is None else inputs.routing_weights.float()
    return inputs._replace(up_bias=up_bias, down_bias=down_bias, routing_weights=routing_weights)


def forward(problem: Problem, inputs: Inputs, deal: Deal) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `kernels/moe_ffn.py`; pre_activation is by slot."""
    if not is_for(problem):
        return triton_ffn.forward(problem, inputs, deal)
    x = inputs.x
    with on_device(x):
        call = _Call(problem, inputs, deal)
        y = x.new_empty(problem.num_rows, problem.d_model)
        pre_activation = call.new_by_slot(problem.num_up) if problem.save else None
        if problem.num_rows > 0:
            if ONE_LAUNCH and call.gathers and call.has_all:
                call.up_and_down(pre_activation, y)
            else:
                hidden = call.up(pre_activation)
                call.scatter("down", hidden, inputs.down_weight, y, inputs.down_bias, inputs.routing_weights)
        if pre_activation is not None and problem.pre_format is not None:
            # By a pass of its own: the up projection's epilogue has no code for it.
            pre_activation = codec.encode(pre_activation, problem.pre_format, problem.backend)
    return sum_of_choices(y, problem.top_k), pre_activation, call.permutation


def backward(
    problem: Problem, grad_y: Tensor, inputs: Inputs, deal: Deal, pre_activation: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """See `kernels/moe_ffn.py`."""
    if not is_for(problem):
        return triton_ffn.backward(problem, grad_y, inputs, deal, pre_activation, needed)
    if problem.num_rows == 0 or not any(needed):
        return problem.zero_gradients(inputs, needed)
    x, up_weight, up_bias, _, down_bias, routing_weights = inputs
    need_x, need_up_weight, need_up_bias, need_down_weight, need_down_bias, need_routing = needed
    need_down = need_down_weight or need_down_bias
    _, up_dtype, _, down_dtype, _, _ = problem.input_dtypes
    need_pre = need_x or need_up_weight or need_up_bias or need_down_weight or need_routing
    grad_x = grad_routing = pieces = hidden = None
    of_up: tuple[Tensor | None, Tensor | None] = (None, None)
    with on_device(x):
        call, grad_y = _Call(problem, inputs, deal), aligned(grad_y.contiguous())
        if pre_activation is not None and problem.pre_format is not None and need_pre:
            shape = problem.num_kept, problem.num_up
            pre_activation = codec.decode(pre_activation, shape, problem.pre_format, problem.dtype, problem.backend)
        is_computed_again = need_pre and pre_activation is None
        need_slots = need_up_weight or (is_computed_again and not call.gathers)
        slots = call.gather(need_slots, grad_y, routing_weights if need_down else None)
        if is_computed_again:
            pre_activation = call.new_by_slot(problem.num_up)
            call.up(pre_activation, slots.x)
        if need_pre and pre_activation is not None:
            grad_pre, hidden, pieces = call.grad_pre(slots.of_grad_y, aligned(pre_activation), need_routing)
            of_up = call.grad_weight(
                grad_pre, slots.x, problem.d_model, need_up_weight, up_bias if need_up_bias else None, up_dtype
            )
            if need_x:
                grad_x = torch.empty(problem.num_rows, problem.d_model, dtype=x.dtype, device=x.device)
                call.scatter("grad_x", grad_pre, up_weight, grad_x)
                grad_x = sum_of_choices(grad_x, problem.top_k)
        of_down = call.grad_weight(
            slots.weighted, hidden, problem.d_ff, need_down_weight, down_bias if need_down_bias else None, down_dtype
        )
        if pieces is not None:
            grad_routing = grad_of_routing_weights(
                pieces.sum(0), problem, grad_y, down_bias, call.permutation, deal.expert_offsets
            )
    return problem.gradients((grad_x, *of_up, *of_down, grad_routing))


class _Slots(NamedTuple):
    """Rows by slot `[slots, D]`, or None; `weighted` is of_grad_y where there are no routing weights."""

    x: Tensor | None
    of_grad_y: Tensor | None
    weighted: Tensor | None


class _Call:
    """One call of the layer: its launches, and what they have in common.

    Attributes:
        permutation: int32 `[R]`, which is filled by the first launch that needs it, unless it is given.
        has_all: whether no multiprocessor is left free.
    """

    def __init__(self, problem: Problem, inputs: Inputs, deal: Deal):
        self._problem, self._inputs = problem, inputs
        if "hopper" not in problem.kept:
            problem.kept["hopper"] = _layer(problem)
        self._layer = problem.kept["hopper"]
        assert self._layer.slots == problem.num_kept
        self._is_filled = deal.permutation is not None
        self.permutation = (
            self._new(problem.num_rows, dtype=torch.int32) if deal.permutation is None else aligned(deal.permutation)
        )
        device, seed = problem.device, deal.seed
        # Read on the device, where it is there.
        self._seed = aligned(seed) if isinstance(seed, Tensor) and seed.device.type != "cpu" else None
        value = int(seed) if seed is not None and self._seed is None else 0
        left_free = multiprocessors.left_free(device)
        may_be_used = max(2, multiprocessors.count(device) - left_free)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        self.has_all = left_free == 0
        of_launches = (device.index or 0, may_be_used, stream, OVERLAPS and self.has_all)
        self._of_call = (value, _at(self._seed), 0, *of_launches)
        if deal.expert_offsets is not None and problem.num_rows > 0:
            self._table = self._new(self._layer.table_size, dtype=torch.int32)
            _C.hopper_tabulate(self._layer, self._of_call, _at(deal.expert_offsets), _at(self._table))
            self._of_call = (value, _at(self._seed), _at(self._table), *of_launches)

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self._problem.dtype, device=self._problem.device)

    def new_by_slot(self, columns: int) -> Tensor:
        return self._new(self._layer.slots, columns)

    def _rows(self, x: Tensor, by_token: bool) -> tuple[int, bool, int, int]:
        """x for a launch that finds its rows, which also deals them if nobody has."""
        is_filled, self._is_filled = self._is_filled, True
        permutation = _at(self.permutation)
        return (_at(x), by_token, *((permutation, 0) if is_filled else (0, permutation)))

    def _product(self, call: str, **operands: Any) -> None:
        _C.hopper_product(getattr(_C.HopperCall, call), self._layer, self._of_call, **operands)

    @property
    def gathers(self) -> bool:
        """Whether the up projection finds its rows of x by itself."""
        problem = self._problem
        return problem.activation in _GATHERING and problem.num_rows * problem.d_model < _MAX_GATHERED

    def up_and_down(self, pre_activation: Tensor | None, y: Tensor) -> None:
        """`up` and `scatter` in one launch, where the up projection finds its rows."""
        x, up_weight, up_bias, down_weight, down_bias, routing_weights = self._inputs
        hidden, rows = self.new_by_slot(self._problem.d_ff), self._rows(x, True)
        flags, whose = zeroed_counters(self._layer.num_flags, x.device)
        _C.hopper_forward(
            self._layer, self._of_call, rows, _at(up_weight), _number(up_bias), _at(pre_activation), _at(hidden),
            _at(down_weight), _number(down_bias), _at(self.permutation), _at(routing_weights), _number(y), _at(flags),
        )  # fmt: skip
        give_back(flags, whose)

    def up(self, pre_activation: Tensor | None, grouped_x: Tensor | None = None) -> Tensor:
        """hidden `[slots, F]`; fills pre_activation `[slots, F or 2F]`. grouped_x: x by slot, if that is there."""
        problem, (x, up_weight, up_bias, *_) = self._problem, self._inputs
        if grouped_x is None and not self.gathers:
            grouped_x = self.gather(True, None, None).x
        rows = self._rows(x, True) if grouped_x is None else (_at(grouped_x), False, 0, 0)
        hidden = self.new_by_slot(problem.d_ff)
        self._product(
            "up", rows=rows, b=_at(up_weight), bias=_number(up_bias), hidden=_at(hidden),
            pre_activation=_at(pre_activation),
        )  # fmt: skip
        return hidden

    def gather(self, need_x: bool, grad_y: Tensor | None, routing_weights: Tensor | None) -> _Slots:
        """What is needed by slot, and grad_y times routing weights."""
        columns = self._problem.d_model
        grouped_x = self.new_by_slot(columns) if need_x else None
        of_grad_y = None if grad_y is None else self.new_by_slot(columns)
        weighted = None if routing_weights is None else self.new_by_slot(columns)
        _C.hopper_gather(
            self._layer, self._of_call, self._rows(self._inputs.x, False), _at(grouped_x), _at(grad_y), _at(of_grad_y),
            _at(weighted), _at(routing_weights),
        )  # fmt: skip
        return _Slots(grouped_x, of_grad_y, of_grad_y if weighted is None else weighted)

    def grad_pre(
        self, of_grad_y: Tensor | None, pre_activation: Tensor, need_routing: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """grad_pre `[slots, F or 2F]`, hidden `[slots, F]`, and by row what routing weights' gradients are sums of."""
        problem, (_, _, _, down_weight, _, routing_weights) = self._problem, self._inputs
        grad_pre, hidden = self.new_by_slot(problem.num_up), self.new_by_slot(problem.d_ff)
        pieces = self._new(ceil_div(problem.d_ff, 64), problem.num_rows, dtype=torch.float32) if need_routing else None
        self._product(
            "grad_pre", a=_at(of_grad_y), b=_at(down_weight), pre_activation=_at(pre_activation),
            permutation=_at(self.permutation), routing_weights=_at(routing_weights), partial_routing=_at(pieces),
            hidden=_at(hidden), out=_number(grad_pre),
        )  # fmt: skip
        return grad_pre, hidden, pieces

    def scatter(
        self,
        call: str,
        a: Tensor,
        weight: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        routing_weights: Tensor | None = None,
    ) -> None:
        """ "down" or "grad_x"."""
        self._product(
            call, a=_at(a), b=_at(weight), bias=_number(bias), permutation=_at(self.permutation),
            routing_weights=_at(routing_weights), out=_number(out),
        )  # fmt: skip

    def grad_weight(
        self,
        a: Tensor | None,
        b: Tensor | None,
        size_n: int,
        need_weight: bool,
        bias: Tensor | None,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """aᵀ b of each expert `[E, M, N]`, and a summed over its rows `[E, M]`, if the bias is not None.

        dtype: of the weight, as autograd knows it.
        """
        if a is None or not (need_weight or bias is not None):
            return None, None
        size_m, experts = a.shape[1], self._problem.num_experts
        splits = self._layer.splits_of(size_m, size_n)
        if not need_weight or b is None:
            # The sums, to the same bits, come with a product of the narrowest b, whatever that holds.
            b, size_n = a, 8
        # Under autocast parameters are float32, and so is what they get.
        out = self._new(experts, size_m, size_n, dtype=torch.float32 if dtype == torch.float32 else None)
        parts = self._new(experts, splits, size_m, size_n, dtype=torch.float32) if splits > 1 else None
        part_sums = None if bias is None else self._new(experts, splits, size_m, dtype=torch.float32)
        sums = None if bias is None else torch.empty_like(bias)
        self._product(
            "grad_weight", a=_at(a), b=_at(b), out=_number(out), size_m=size_m, size_n=size_n, splits=splits,
            parts=_at(parts), part_sums=_at(part_sums), sums=_number(sums),
        )  # fmt: skip
        return (out if need_weight else None), sums


def _layer(problem: Problem) -> Any:
    """`csrc/hopper/layer.h`'s, kept for all calls of the kind."""
    check_sizes(problem)
    return _C.HopperLayer(
        problem.dtype == torch.bfloat16, problem.num_rows, problem.num_experts, problem.d_model, problem.d_ff,
        problem.top_k, problem.is_given, getattr(_C.HopperActivation, problem.activation), problem.gated,
        radices(max(problem.num_rows, 1)), *problem.dropout,
    )  # fmt: skip


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _number(tensor: Tensor | None) -> tuple[int, int]:
    """Address and type."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), _NUMBER_TYPES[tensor.dtype])
