"""Whether the modules of a list are experts, found out by running a copy of the module that holds the list.

In the copy a simple function stands for each member, different for each, and all other parameters are random. Experts

- do not see each other: what one gives reaches no other's input;
- are interchangeable together with the router: if they change places, and so do the router's rows, nothing changes;
- are not interchangeable without it;
- see the same tokens;
- do not count alike for all tokens: if each gave the same for every token, their sum would still differ by token.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ewa_kernels.moe.adapters import NotExpertsError
from ewa_kernels.moe.twin import CannotRunError, kind_of, own_tensors_, private_copy

# Of norms. Rounding is 1e-6 in float32.
_TOLERANCE = 1e-4

_SMALL = 1e-3
_ROUNDING = 3e-6

_MAX_TOKENS = 256
_MAX_NUMEL = 2**27  # of all parameters that are no member's
_MAX_TOGETHER = 3  # tensors of a router: weight, bias, correction
_MAX_TENSORS = 16  # that may be a router's


class Trial:
    """A copy of `holder`, in which simple functions stand for `members`: modules inside `experts`, by their names.

    Raises:
        CannotRunError: it cannot be copied, or is too large, or does not run on tokens.
    """

    def __init__(self, holder: nn.Module, experts: nn.Module, d_model: int):
        self._members = list(experts._modules.values())
        num_experts = len(self._members)
        inside = {p for member in self._members if member is not None for p in member.parameters()}
        if sum(p.numel() for p in holder.parameters() if p not in inside) > _MAX_NUMEL:
            raise CannotRunError(f"{kind_of(holder)} is too large to be tried")
        self.num_tokens = min(max(32, 8 * num_experts), _MAX_TOKENS)
        self._x = torch.randn(2, self.num_tokens // 2, d_model)
        self._slopes, self._shifts = torch.rand(num_experts, d_model) + 0.5, torch.randn(num_experts, d_model)
        self._change = torch.randn(d_model)  # not along one direction, which a norm may take away
        self._shifted: Collection[int] = ()
        self._constants: Tensor | None = None  # [E, D], which the stand-ins then give for every token
        self._inputs: list[list[Tensor]] = []

        copies: dict[nn.Module, nn.Module] = {}
        self._twin = private_copy(holder, copies).eval()
        self._experts = copies[experts]
        for module, twin in copies.items():
            own_tensors_(module, twin, inside)
        self._stand_ins = [copies[member] for member in self._members if member is not None]
        for e, stand_in in enumerate(self._stand_ins):
            stand_in.__dict__["forward"] = self._function(e)
        self._run_first()

    def _function(self, e: int) -> Any:
        def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
            self._inputs[e].append(x.detach().clone())
            if self._constants is not None:
                return self._constants[e].to(x.dtype).expand_as(x)
            y = torch.tanh(x * self._slopes[e].to(x.dtype) + self._shifts[e].to(x.dtype))
            return y + self._change.to(x.dtype) if e in self._shifted else y

        return forward

    def _run_first(self) -> None:
        try:
            self._y, self._base = self._run()
        except CannotRunError as error:
            self._x = self._x.flatten(0, 1)
            try:
                self._y, self._base = self._run()
            except CannotRunError:
                raise error from None
        if sum(bool(inputs) for inputs in self._base) < 2:
            raise CannotRunError(f"{kind_of(self._twin)} does not call its modules")

    def _run(self, shifted: Collection[int] = ()) -> tuple[Tensor, list[list[Tensor]]]:
        self._shifted, self._inputs = shifted, [[] for _ in self._stand_ins]
        torch.default_generator.manual_seed(0)
        random.seed(0)
        try:
            output = self._twin(self._x.clone())
        except Exception as error:
            shape = ", ".join(map(str, (*self._x.shape[:-1], "D")))
            raise CannotRunError(
                f"{kind_of(self._twin)} fails on one tensor [{shape}]: {type(error).__name__}: {error}"
            ) from error
        y = next(_tensors_in(output), None)
        if y is None or not y.is_floating_point() or not y.isfinite().all():
            raise CannotRunError(f"{kind_of(self._twin)} gives no tensor of finite numbers for tokens")
        return y, self._inputs

    def check_independent(self) -> None:
        """Of each two members there is a run in which one's output was changed and not the other's.

        Raises:
            NotExpertsError: one's output reaches another's input.
        """
        num_experts = len(self._stand_ins)
        for bit, value in itertools.product(range((num_experts - 1).bit_length()), (0, 1)):
            shifted = {e for e in range(num_experts) if (e >> bit & 1) == value}
            _, inputs = self._run(shifted)
            for e in set(range(num_experts)) - shifted:
                if not _same(inputs[e], self._base[e]):
                    raise NotExpertsError("holds modules that see what others of them give")

    def router(self) -> tuple[str, ...]:
        """Names, in the holder, of the tensors by which it chooses or weighs members.

        Raises:
            NotExpertsError: there are none, or the members do not see the same tokens.
        """
        if _close(self._rotated((), 1), self._y):
            raise NotExpertsError("holds modules whose order does not matter: nothing chooses among them")
        num_experts = len(self._stand_ins)
        members = {p for stand_in in self._stand_ins for p in stand_in.parameters()}
        places = [
            (name, tensor, dim)
            for name, tensor in (*self._twin.named_parameters(), *self._twin.named_buffers())
            if tensor not in members
            for dim in range(tensor.ndim)
            if tensor.shape[dim] == num_experts
        ]
        tries: list[Sequence[tuple[str, Tensor, int]]] = [places]
        if len(places) <= _MAX_TENSORS:
            sizes = range(1, 1 + _MAX_TOGETHER)
            tries += itertools.chain.from_iterable(itertools.combinations(places, size) for size in sizes)
        # By half of them too, which keeps groups together, among which DeepSeek's router chooses first.
        for chosen, shift in itertools.product(filter(None, tries), {1, num_experts // 2}):
            if not _close(self._rotated(chosen, shift), self._y):
                continue
            if self._num_distinct_inputs() > self.num_tokens + 1:  # and padding
                raise NotExpertsError("holds modules that do not see the same tokens")
            without = [(place, [other for other in chosen if other is not place]) for place in chosen]
            needed = [place for place, others in without if not _close(self._rotated(others, shift), self._y)]
            return tuple(name for name, _, _ in needed)
        raise NotExpertsError("holds modules among which nothing chooses: no router was found")

    def check_chosen_by_tokens(self) -> None:
        """What chooses hangs on the token, as what scales branches or weighs an ensemble does not.

        Raises:
            NotExpertsError: the members count alike for all tokens.
        """
        num_experts = len(self._stand_ins)
        # Small, so that what comes after is linear, as a norm is not; of one feature, so that scales are but numbers.
        common = torch.zeros_like(self._shifts)
        common[:, 0] = _SMALL * common.shape[1] ** 0.5
        own = common * torch.arange(1, num_experts + 1).unsqueeze(-1) / num_experts
        outputs = [self._run_constant(self._shifts + change) for change in (0, common, own)]
        # Sequence by sequence: attention, too, treats these alike whose queries are.
        num_sequences = 2 if self._x.ndim == 3 and outputs[0].ndim > 2 and len(outputs[0]) == 2 else 1
        before, *after = (y.reshape(num_sequences, -1, y.shape[-1] if y.ndim else 1) for y in outputs)
        of_common, of_own = (y - before for y in after)
        # How much more of the one there is than of the other: a number per feature, if it is the same for all tokens.
        ratio = (of_own * of_common).sum(1, True) / of_common.square().sum(1, True).clamp_min(1e-30)
        if (of_own - ratio * of_common).norm() <= max(10 * _SMALL * of_own.norm(), _ROUNDING * before.norm()):
            raise NotExpertsError("holds modules that count alike for all tokens: nothing chooses among them")

    def _run_constant(self, constants: Tensor) -> Tensor:
        try:
            self._constants = constants
            return self._run()[0]
        finally:
            self._constants = None

    def check_places(self) -> None:
        """Which token goes where must not depend on its place in the sequence, as that of words and of patches does.

        Raises:
            NotExpertsError: it does, or the holder does not give as many rows as it was given.
        """
        x = self._x
        try:
            self._x = x.flatten(0, -2).flip(0).view(x.shape)
            y = self._run()[0]
        finally:
            self._x = x
        shape = self.num_tokens, -1
        if y.shape[:-1].numel() != self.num_tokens or not _close(y.reshape(shape).flip(0), self._y.reshape(shape)):
            raise NotExpertsError("holds modules among which tokens are dealt by their places")

    def _rotated(self, places: Sequence[tuple[str, Tensor, int]], shift: int) -> Tensor:
        """The output where each member stands `shift` places before its own, and so do rows of these tensors."""
        modules = self._experts._modules
        before = list(modules.items())
        olds = [tensor.clone() for _, tensor, _ in places]
        try:
            for e, (name, _) in enumerate(before):
                modules[name] = before[(e + shift) % len(before)][1]
            for _, tensor, dim in places:
                tensor.copy_(tensor.roll(-shift, dim))
            return self._run()[0]
        finally:
            modules.update(before)
            for (_, tensor, _), old in reversed(list(zip(places, olds, strict=True))):
                tensor.copy_(old)

    def _num_distinct_inputs(self) -> int:
        # Integers, whose sums do not depend on an order.
        factors = torch.randint(2**62, (self._x.shape[-1],))
        rows = [x.float().contiguous().view(torch.int32) for inputs in self._base for x in inputs]
        return len(torch.cat([(row.flatten(0, -2) * factors).sum(-1) for row in rows]).unique())


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (list, tuple, dict)):
        for item in output.values() if isinstance(output, dict) else output:
            yield from _tensors_in(item)


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= _TOLERANCE * b.norm())
