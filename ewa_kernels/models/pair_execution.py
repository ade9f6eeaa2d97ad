"""The execution test of a pair: a block, run before and after the rows between its projections are dealt, is equal."""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .execution import PRECISIONS, FarOffError, Precision, sandbox, seed_all, window
from .ffn_adapters import NotReplaceableError, Projections
from .layout import copy_modules, has_forward_of_its_own


class _NotCalledError(NotReplaceableError):
    """The block did not call the projections: its code may lead to the original, as a closure does."""


def check_pair(block: nn.Module, projections: Projections) -> None:
    """Runs a copy of a block with random parameters; or the block itself with borrowed ones, where its code needs it.

    Raises:
        NotReplaceableError: it computes something else then, or cannot be run on tokens.
    """
    if has_forward_of_its_own(block):
        raise NotReplaceableError("has a forward of its own, in its attributes")
    refusals: list[NotReplaceableError] = []
    with sandbox():
        # The same arithmetic on the same rows: float32 has to do, unless its rounding grows.
        for precision, make in itertools.product(reversed(PRECISIONS), (_copied, _borrowed)):
            if make is _borrowed and not isinstance(refusals[-1], _NotCalledError):
                continue
            with make(block) as twin:
                try:
                    _Trial(twin, projections, precision).check()
                except FarOffError:
                    raise
                except NotReplaceableError as error:
                    refusals.append(error)
                else:
                    return
    raise refusals[0]


@contextmanager
def _copied(block: nn.Module) -> Iterator[nn.Module]:
    yield copy_modules(block)


@contextmanager
def _borrowed(block: nn.Module) -> Iterator[nn.Module]:
    """The block itself, which is as it was afterwards."""
    before = {
        module: {name: copy.copy(v) if isinstance(v, dict) else v for name, v in vars(module).items()}
        for module in block.modules()
    }
    try:
        yield block
    finally:
        for module, attributes in before.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)


class _Gathers(nn.Module):
    """Gives the rows of an nn.Linear dealt, or puts dealt rows back behind it."""

    def __init__(self, linear: nn.Linear, is_up: bool):
        super().__init__()
        self.linear, self.is_up = linear, is_up
        self.weight, self.bias = linear.weight, linear.bias  # which the block may look at

    def forward(self, input: Tensor) -> Tensor:
        y = self.linear(input)
        deal = torch.randperm(y.numel() // y.shape[-1], generator=torch.Generator().manual_seed(7))
        return y.reshape(-1, y.shape[-1])[deal if self.is_up else deal.argsort()].reshape(y.shape)


class _NoDropout(TorchFunctionMode):
    """In which no function of torch drops anything."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "native_dropout":
            return func(args[0], 0.0, False)
        if "dropout" in name:
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs | {"dropout_p": 0.0} if "dropout_p" in kwargs else kwargs))


class _Attention(nn.Module):
    """Stands for an attention that needs more than tokens, and gives its weights too, or does not."""

    def __init__(self, gives_weights: bool):
        super().__init__()
        self.gives_weights = gives_weights

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (x, None) if self.gives_weights else x


class _Way(NamedTuple):
    """How a block is called: shape of its input, and what stands for its attention."""

    shape: tuple[int, ...]  # 0 for D
    attention: bool | None

    @property
    def num_tokens(self) -> int:
        return torch.Size([size or 1 for size in self.shape]).numel()


# Sequences, rows, an image of 4 · 4 with its channels last or first, a short sequence, a long one, a video.
_SHAPES = ((2, 16, 0), (32, 0), (2, 4, 4, 0), (2, 0, 4, 4), (2, 4, 0), (2, 70, 0), (2, 2, 2, 2, 0))


class _Trial:
    def __init__(self, block: nn.Module, projections: Projections, precision: Precision):
        self.block, self.names, self.precision = block, (*projections.up, projections.down), precision
        for module in block.modules():
            for name, value in vars(module).items():
                if name.endswith("_hooks") and isinstance(value, dict):  # what they see is not meant for them
                    module.__dict__[name] = type(value)()
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    # Contiguous, or each product would make a copy that is.
                    values = window(parameter.shape, precision.dtype).contiguous()
                    module._parameters[name] = nn.Parameter(values, requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    dtype = precision.dtype if buffer.is_floating_point() else buffer.dtype
                    zeros = torch.zeros(buffer.shape, dtype=dtype)
                    module._buffers[name] = zeros if buffer.is_meta else zeros.copy_(buffer)
        self.linears = [block.get_submodule(name) for name in self.names]
        self.d_model: int = self.linears[0].in_features  # type: ignore[assignment]

    def check(self) -> None:
        """In every way in which the block runs: on an image it may do what it does not on a sequence."""
        first, *others = self._ways()
        for training in (False, True):
            self._compare(first, training, has_grad=True)
        for way in others:
            self._compare(way, False)
        for name, value in self._optional(first):
            try:
                self._compare(first, False, {name: value})
            except NotReplaceableError as error:
                raise FarOffError(f"{error}, when {name} is given") from None
            except Exception:  # of foreign code, which takes something else
                continue

    def _compare(self, way: _Way, training: bool, more: dict[str, Any] | None = None, has_grad: bool = False) -> None:
        self.block.train(training)
        x = self._tokens(way)

        def results(seed: int) -> list[Tensor]:
            return self._results(way, x, seed, more or {}, has_grad)

        before = results(1)
        if training and not self._equal(results(2), before):
            return  # it draws numbers other than dropouts', and those for another row are others
        self._place(dealt=True)
        try:
            after = results(1)
        finally:
            self._place(dealt=False)
        reason = "computes something else where the rows between its projections are dealt"
        if len(after) != len(before):
            raise FarOffError(reason)
        for ours, its in zip(after, before, strict=True):
            self.precision.check_close(ours, its, reason)

    def _optional(self, way: _Way) -> Iterator[tuple[str, Any]]:
        """What may be given and is not: masks of the tokens, other tokens, a row for each input, the other flag."""
        x = self._tokens(way)
        if x.ndim == 3:
            for parameter in list(inspect.signature(self.block.forward).parameters.values())[1:]:
                if isinstance(parameter.default, bool):
                    yield parameter.name, not parameter.default
                if parameter.default is None:
                    yield parameter.name, torch.rand(x.shape[:-1], dtype=x.dtype)
                    yield parameter.name, torch.rand(x.shape[:-1]) < 0.5
                    for width in {self.d_model, self._width(-1)}:
                        yield parameter.name, torch.randn(len(x), width, dtype=x.dtype)
                    yield parameter.name, torch.randn_like(x)

    def _ways(self) -> list[_Way]:
        self.block.eval()
        errors: list[Exception] = []
        counts: dict[_Way, list[list[int]]] = {}
        for attention in (None, True, False):
            for shape in _SHAPES:
                way = _Way(shape, attention)
                try:
                    counts[way] = self._counted(way)
                except Exception as error:  # of foreign code
                    errors.append(error)
            right = [way for way, each in counts.items() if all(rows == [way.num_tokens] for rows in each)]
            if right:
                return right
        if not counts:
            shape_in_words = f"[{', '.join(str(size or 'D') for size in _SHAPES[0])}]"
            raise NotReplaceableError(f"fails on {shape_in_words}: {type(errors[0]).__name__}: {errors[0]}")
        if not any(rows for each in counts.values() for rows in each):
            raise _NotCalledError("does not call its projections")
        raise NotReplaceableError("does not call its projections once for each token")

    def _counted(self, way: _Way) -> list[list[int]]:
        """The numbers of rows with which each projection was called."""
        rows: list[list[int]] = [[] for _ in self.linears]

        def count(number: int) -> Any:
            return lambda _, args, kwargs: rows[number].append(
                (*args, *kwargs.values())[0].numel() // self._width(number)
            )

        handles = [m.register_forward_pre_hook(count(i), with_kwargs=True) for i, m in enumerate(self.linears)]
        try:
            with torch.enable_grad():  # without, some take other ways
                self._run(way, self._tokens(way))
        finally:
            for handle in handles:
                handle.remove()
        return rows

    def _tokens(self, way: _Way) -> Tensor:
        return torch.randn([size or self.d_model for size in way.shape], dtype=self.precision.dtype)

    def _width(self, number: int) -> int:
        return self.linears[number].in_features  # type: ignore[return-value]

    def _place(self, *, dealt: bool) -> None:
        for name, linear in zip(self.names, self.linears, strict=True):
            parent, _, leaf = name.rpartition(".")
            stand_in = _Gathers(linear, linear is not self.linears[-1]) if dealt else linear  # type: ignore[arg-type]
            self.block.get_submodule(parent)._modules[leaf] = stand_in

    def _run(self, way: _Way, x: Tensor, **more: Any) -> Any:
        instead: dict[tuple[nn.Module, str], nn.Module | None] = {}
        if way.attention is not None:
            used = {name.partition(".")[0] for name in self.names}
            for name, child in self.block._modules.items():
                if re.search("att", name, re.IGNORECASE) and name not in used:
                    instead[self.block, name] = child
                    self.block._modules[name] = _Attention(way.attention)
        _, *others = inspect.signature(self.block.forward).parameters.values()
        required = [p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        # What the blocks of Swin and of torch's decoder need; a mask may be None.
        known: dict[str, Any] = {"input_dimensions": (4, 4), "memory": x}
        try:
            return self.block(x, *(known.get(name) for name in required), **more)
        finally:
            for (module, name), child in instead.items():
                module._modules[name] = child

    def _results(self, way: _Way, x: Tensor, seed: int, more: dict[str, Any], has_grad: bool) -> list[Tensor]:
        """Output, and perhaps the input's gradient; in the same state of everything random, without dropout."""
        seed_all(seed)
        buffers = {
            (m, name): b.clone() for m in self.block.modules() for name, b in m._buffers.items() if b is not None
        }
        leaf = x.clone().requires_grad_()
        with torch.enable_grad(), _NoDropout():
            outputs = list(_tensors_in(self._run(way, leaf * 1, **more)))
            total = sum((y.cos() * (y + 1)).sum() for y in outputs if y.requires_grad)
        for (module, name), buffer in buffers.items():
            module._buffers[name] = buffer
        outputs += (
            torch.autograd.grad(total, [leaf], materialize_grads=True) if has_grad and isinstance(total, Tensor) else ()
        )
        return [y.detach() for y in outputs]

    def _equal(self, ours: list[Tensor], its: list[Tensor]) -> bool:
        return len(ours) == len(its) and all(self.precision.close(a, b) for a, b in zip(ours, its, strict=True))


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from itertools.chain.from_iterable(map(_tensors_in, output.values()))
    elif isinstance(output, (tuple, list)):
        yield from itertools.chain.from_iterable(map(_tensors_in, output))
