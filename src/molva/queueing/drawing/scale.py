"""Axes of time: the unit that a reader would choose, and round instants to mark."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, final

__all__ = ["TimeScale", "common_tick"]

# Units of an axis, from the largest: name, seconds, and the length from which it is taken. Few
# days are read better as hours, and few minutes as seconds.
_UNITS: Final = (
    ("d", Fraction(86400), Fraction(5 * 86400)),
    ("h", Fraction(3600), Fraction(3600)),
    ("min", Fraction(60), Fraction(120)),
    ("s", Fraction(1), Fraction(1)),
    ("ms", Fraction(1, 10**3), Fraction(1, 10**3)),
    ("µs", Fraction(1, 10**6), Fraction(1, 10**6)),
    ("ns", Fraction(1, 10**9), Fraction(0)),
)

# Hours and minutes that divide a day and an hour; everything else counts in tens.
_STEPS: Final = {
    "h": (1, 2, 3, 4, 6, 12, 24),
    "min": (1, 2, 5, 10, 15, 20, 30, 60),
}


@final
@dataclass(frozen=True, slots=True)
class TimeScale:
    """Marks on an axis from ``begin`` to ``end``.

    Attributes:
        unit: Its name, ``ms``.
        seconds: Seconds in one unit.
        step: Seconds between two marks.
        marks: Instants of the marks, in seconds, ascending.
    """

    unit: str
    seconds: Fraction
    step: Fraction
    marks: tuple[Fraction, ...]

    @classmethod
    def between(cls, begin: Fraction, end: Fraction, most: int) -> "TimeScale":
        """Return a scale with at most ``most`` marks, two at least."""
        duration = end - begin
        unit, seconds, _ = next(each for each in _UNITS if duration >= each[2])
        step = _round_step(duration / seconds / max(most - 1, 1), _STEPS.get(unit)) * seconds
        first = math.ceil(begin / step)
        marks = [index * step for index in range(first, math.floor(end / step) + 1)]
        return cls(unit, seconds, step, tuple(marks))

    def label(self, mark: Fraction) -> str:
        """Return ``mark`` in the unit, with the digits that the step needs."""
        step = self.step / self.seconds
        places = 0 if step >= 1 else -math.floor(math.log10(step))
        return f"{float(mark / self.seconds):.{places}f}"


def common_tick(instants: Iterable[Fraction]) -> Fraction | None:
    """Return the longest time of which all ``instants`` are multiples; None where all are 0."""
    above, below = 0, 1
    for at in instants:
        below_now = math.lcm(below, at.denominator)
        above = math.gcd(above * (below_now // below), at.numerator * (below_now // at.denominator))
        below = below_now
    return Fraction(above, below) if above else None


def _round_step(least: Fraction, steps: tuple[int, ...] | None) -> Fraction:
    """Return the smallest round number that is at least ``least``."""
    for step in steps or ():
        if step >= least:
            return Fraction(step)
    power = Fraction(10) ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= least)
