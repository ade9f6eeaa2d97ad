"""Share-rate schedules: β, equation 6 of arXiv 2308.06093, as a function of the step.

That there is a schedule is the paper's; shapes and defaults are choices of this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .. import checks


@dataclass(frozen=True, kw_only=True)
class ShareRate:
    """β as a function of the step: `schedule(step)`, step = 0 for the first averaging.

    Args:
        start_step: first step of the window; the schedule's own steps are counted from it.
        stop_step: first step after the window, None for no end. Outside the window β = 0.
    """

    start_step: int = 0
    stop_step: int | None = None

    def __post_init__(self) -> None:
        self._integer("start_step", minimum=0)
        if self.stop_step is not None:
            self._integer("stop_step", minimum=self.start_step)

    # Numbers are stored as Python's own, so that schedules which are equal have equal words.

    def _integer(self, name: str, minimum: int) -> None:
        checks.integer(name, getattr(self, name), minimum=minimum)
        object.__setattr__(self, name, int(getattr(self, name)))

    def _probability(self, name: str) -> None:
        checks.probability(name, getattr(self, name))
        object.__setattr__(self, name, float(getattr(self, name)))

    def __call__(self, step: int) -> float:
        if step < self.start_step or (self.stop_step is not None and step >= self.stop_step):
            return 0.0
        return self._inside(step - self.start_step)

    @property
    def is_endless(self) -> bool:
        """Whether every step is in the window."""
        return self.start_step == 0 and self.stop_step is None

    def _inside(self, step: int) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class ConstantShareRate(ShareRate):
    """β = value."""

    value: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._probability("value")

    def _inside(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class _Ramp(ShareRate):
    end: float
    num_steps: int
    start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._probability("end")
        self._probability("start")
        self._integer("num_steps", minimum=1)

    def _inside(self, step: int) -> float:
        if step >= self.num_steps:
            return self.end
        return self.start + (self.end - self.start) * self._progress(step / self.num_steps)

    def _progress(self, fraction: float) -> float:
        raise NotImplementedError


class LinearShareRate(_Ramp):
    """β goes from `start` to `end` on a straight line in `num_steps` steps, and stays there."""

    def _progress(self, fraction: float) -> float:
        return fraction


class CosineShareRate(_Ramp):
    """β goes from `start` to `end` on half a cosine in `num_steps` steps, and stays there."""

    def _progress(self, fraction: float) -> float:
        return (1 - math.cos(math.pi * fraction)) / 2


def share_rate_for(half_life: float, num_experts: int) -> float:
    """The constant β by which an expert's distance from the mean is halved in `half_life` averagings, while no gradient
    moves it: (1 − βE/(E−1))^half_life = 1/2.

    Args:
        half_life: above 0, in steps. What an expert learned by itself lasts about so long.
        num_experts: E, 2 or more.

    Returns:
        in (0, (E−1)/E]. E = 4: 0.0052 for 100 steps, 0.00052 for 1,000.

    Raises:
        TypeError, ValueError: out of these ranges.

    Source: equation 6 of arXiv 2308.06093, solved for β.
    """
    checks.integer("num_experts", num_experts, minimum=2)
    checks.nonnegative("half_life", half_life)
    if half_life == 0:
        raise ValueError("half_life must be above 0, got 0")
    return -math.expm1(-math.log(2) / half_life) * (num_experts - 1) / num_experts


def as_schedule(share_rate: object) -> Callable[[int], float]:
    """A schedule as it is, a number as one that is constant.

    Raises:
        TypeError, ValueError: it is neither a number in [0, 1] nor a function of the step whose first value is one.
    """
    if isinstance(share_rate, type):
        raise TypeError(
            f"share_rate must be a number in [0, 1] or a schedule, got the class {share_rate.__name__}: "
            f"make one, {share_rate.__name__}(…)"
        )
    if not callable(share_rate):
        checks.probability("share_rate", share_rate)
        return ConstantShareRate(share_rate)  # type: ignore[arg-type]
    checks.probability("share_rate", share_rate(0))
    return share_rate
