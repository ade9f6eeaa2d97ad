"""The description of a call of the layer: what `functional` finds out once, and every backend takes.

Calls of one kind share one description, from layer to layer and from step to step: a backend keeps in it what it would
find out again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import codec

# What is kept for backward; bits of x and of pre_activation, None where there is none of the latter.
SAVED: dict[str, tuple[int | None, int | None]] = {
    "full": (16, 16),
    "8bit": (8, 8),
    "4bit": (8, 4),
    "recompute": (16, None),
    "recompute-8bit": (8, None),
}

# More kinds of calls than a model has. Of inputs that never have the same length twice, the oldest are forgotten.
MAX_KEPT = 4096


class Inputs(NamedTuple):
    """What there are gradients of. up_weight `[E, F or 2F, D]`, down_weight `[E, D, F]`: as `functional.moe_ffn` says.

    For backends x is `[T, D]`, in the dtype that is computed in, and the parameters are as their `prepared` made them.
    """

    x: Tensor
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    routing_weights: Tensor | None

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """up_weight, up_bias, down_weight and down_bias."""
        return self[1:5]


class Deal(NamedTuple):
    """Which grouped row is whose.

    Attributes:
        seed: of the deal, and of dropout; a tensor where it is on a GPU, or by an operation. None where nothing is
            random.
        permutation: int32 `[R]`. None: rows are dealt by the seed, in equal groups.
        expert_offsets: int32 `[E + 1]`, of groups that are given, or None.
    """

    seed: int | Tensor | None
    permutation: Tensor | None = None
    expert_offsets: Tensor | None = None


class Places(NamedTuple):
    """Which grouped row of a linear layer by experts is whose, and what lies in the order of tokens.

    Attributes:
        permutation: int32 `[R]`, grouped row → token.
        expert_offsets: int32 `[E + 1]`.
        gather: whether x does; else it lies by grouped row.
        scatter: whether the result does.
    """

    permutation: Tensor
    expert_offsets: Tensor
    gather: bool
    scatter: bool


class Options(NamedTuple):
    """As the public functions take them."""

    activation: str
    gated: bool
    dropout_p: float
    backend: str
    saved: str


@dataclass(eq=False)
class Problem:
    """Sizes, options and types; nothing of it changes but `kept`.

    Attributes:
        num_tokens: T.
        top_k: k, grouped rows for each token; 1 without routing weights.
        num_experts, d_model, d_ff: E, D, F.
        is_given: whether the partition is; else rows are dealt, in equal groups, by a seed.
        dtype: what is computed in: x's, under autocast autocast's.
        input_dtypes: of x, the parameters and the routing weights, as autograd knows them; None for what there is none
            of. Gradients are of these.
        operand_dtypes: of the same as they come; others, where they have been cast before.
        saved: what is kept for backward, see `SAVED`; "recompute" where there is none.
        backend: that was found, or asked for.
        kept: the backend's own.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    d_model: int
    d_ff: int
    activation: str
    gated: bool
    dropout_p: float
    is_given: bool
    dtype: torch.dtype
    device: torch.device
    input_dtypes: tuple[torch.dtype | None, ...]
    operand_dtypes: tuple[torch.dtype | None, ...]
    saved: str
    backend: str
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        """R = T·k, grouped rows."""
        return self.num_tokens * self.top_k

    @property
    def save(self) -> bool:
        """Whether pre_activation and the permutation are kept, in whatever form; backward computes them again else."""
        return SAVED[self.saved][1] is not None

    @functools.cached_property
    def x_format(self) -> codec.Format | None:
        """That of x; None if it is kept as it is, or not at all."""
        return format_of_x(self.saved)

    @functools.cached_property
    def pre_format(self) -> codec.Format | None:
        """That of pre_activation, likewise."""
        return format_of_pre(self.saved, self.activation, self.gated)

    def new_pre_activation(self, empty: codec.Empty = codec.new_tensor) -> Tensor | None:
        """Memory, made by `empty`, for what is kept of it: `[num_kept, F or 2F]`, or uint8 in its format; None for
        nothing.
        """
        if not self.save:
            return None
        if self.pre_format is not None:
            return self.pre_format.new(self.num_kept, self.num_up, self.device, empty)
        return empty((self.num_kept, self.num_up), self.dtype, self.device)

    @property
    def num_kept(self) -> int:
        """Rows of pre_activation, see `num_kept`."""
        return num_kept(self.backend, self.is_given, self.num_rows, self.num_experts)

    @property
    def num_up(self) -> int:
        """Columns of pre_activation."""
        return 2 * self.d_ff if self.gated else self.d_ff

    @property
    def dropout(self) -> tuple[int, float]:
        """(32 random bits below which an element is dropped, what the others are multiplied by)."""
        p = self.dropout_p
        return min(round(p * 2**32), 2**32 - 1), 1 / (1 - p) if p < 1 else 0.0

    def zero_gradients(self, inputs: Inputs, needed: Iterable[bool]) -> tuple[Tensor | None, ...]:
        """Where there are no rows; None where not needed."""
        return self.gradients(
            None if t is None or not need else torch.zeros_like(t) for t, need in zip(inputs, needed, strict=True)
        )

    def gradients(self, grads: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs, in the inputs' dtypes."""
        return tuple(
            g if g is None or g.dtype == to else g.to(to) for g, to in zip(grads, self.input_dtypes, strict=True)
        )

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        is_given: bool,
        options: Options,
        saved: str,
        dtype: torch.dtype | None = None,
        parameter_dtype: torch.dtype | None = None,
    ) -> Problem:
        """The same object for calls of the same kind.

        Args:
            inputs: x may be `[..., D]`.
            options: with the backend that was found; its `saved` is not looked at.
            dtype: what is computed in, if not in x's.
            parameter_dtype: the parameters' as autograd knows them, if not their own.
        """
        x, routing_weights = inputs.x, inputs.routing_weights
        num_experts, d_model, d_ff = inputs.down_weight.shape
        top_k = 1 if routing_weights is None else routing_weights.shape[1]
        operand_dtypes = input_dtypes = tuple(None if t is None else t.dtype for t in inputs)
        if parameter_dtype is not None:
            of_parameters = (dtype and parameter_dtype for dtype in input_dtypes[1:5])
            input_dtypes = (input_dtypes[0], *of_parameters, input_dtypes[5])
        key = (
            *(x.numel() // d_model, top_k, num_experts, d_model, d_ff),
            *(options.activation, options.gated, float(options.dropout_p), is_given),
            *(x.dtype if dtype is None else dtype, x.device),
            *(input_dtypes, operand_dtypes, saved, options.backend),
        )
        return _made.get(key) or keep(_made, key, cls(*key))

    @classmethod
    def of_linear(
        cls,
        num_rows: int,
        weight: Tensor,
        backend: str,
        dtype: torch.dtype,
        input_dtypes: tuple[torch.dtype | None, ...],
    ) -> Problem:
        """Of `functional.expert_linear`, likewise: an up projection alone, with D_in = `d_model`, D_out = `d_ff`.

        Args:
            input_dtypes: of x, weight and bias.
        """
        num_experts, d_out, d_in = weight.shape
        key = (
            *(num_rows, 1, num_experts, d_in, d_out, "identity", False, 0.0, True),
            *(dtype, weight.device, input_dtypes, input_dtypes, "recompute", backend),
        )
        return _made.get(key) or keep(_made, key, cls(*key))


_made: dict[Any, Problem] = {}


def keep(among: dict[Any, Problem], key: Any, problem: Problem) -> Problem:
    """Puts it among others; the oldest of too many is forgotten."""
    if len(among) >= MAX_KEPT:
        among.pop(next(iter(among)), None)
    among[key] = problem
    return problem


def format_of_x(saved: str) -> codec.Format | None:
    return codec.ROWS_8BIT if SAVED[saved][0] == 8 else None


def format_of_pre(saved: str, activation: str, gated: bool) -> codec.Format | None:
    bits = SAVED[saved][1]
    return None if bits in (None, 16) else codec.format_of(bits, activation, gated)


def num_kept(backend: str, is_given: bool, num_rows: int, num_experts: int) -> int:
    """Rows of pre_activation: R; on a GPU, where groups are equal, ⌈R/E⌉ for each expert, which only a library's
    batched products need: whether one makes them is known later than how much is kept. Our own kernels for Hopper have
    slots, see `csrc/hopper/groups.cuh`."""
    if is_given:
        return (num_rows // 64 + num_experts) * 64 if backend == "hopper" else num_rows
    is_on_gpu = backend in ("auto", "cublas", "hopper") or backend.startswith("triton")
    return -(-num_rows // num_experts) * num_experts if is_on_gpu else num_rows
