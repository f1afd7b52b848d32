"""Times, rates and counts as text: exact in, exact out.

    time     250ms   1.5s   7/3s   2min   24h
    rate     8/s     90/min 1/3/h  2/ms

Numbers are fractions, so ``0.1ms`` is a tenth and not the double next to it, and what is
printed is read back as the same number. A number without a unit is refused: whether 8 is
eight seconds or eight a second is what people get wrong.
"""

import re
from fractions import Fraction
from typing import Final, Literal

__all__ = ["NUMBER", "UNITS", "Form", "exact", "number_text", "rate_text", "time_text"]

# Seconds in each unit. Printed are those from ns to h; d is only read.
UNITS: Final = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}

# A decimal, or a ratio of two: 7/3. In 8/s the slash belongs to the unit, because no digit
# follows it.
NUMBER: Final = re.compile(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d{1,3})?(?:/\d+(?:\.\d+)?)?")

_TIME_UNITS: Final = ("s", "ms", "us", "ns", "min", "h")
_RATE_UNITS: Final = ("s", "min", "h", "ms")

# How a mean was written, and is printed again: as a time or as its inverse.
Form = Literal["time", "rate"]


def exact(number: str | float | Fraction) -> Fraction:
    """Return ``number`` as the fraction that a reader sees: 0.1 is a tenth."""
    if isinstance(number, str):
        above, _, below = number.partition("/")
        return Fraction(above) / Fraction(below) if below else Fraction(above)
    return Fraction(repr(float(number))) if isinstance(number, float) else Fraction(number)


def number_text(number: Fraction) -> str:
    """Return the shortest exact text: a decimal where it ends, else a ratio."""
    below = number.denominator
    twos = fives = 0
    while below % 2 == 0:
        below, twos = below // 2, twos + 1
    while below % 5 == 0:
        below, fives = below // 5, fives + 1
    if below != 1:
        return f"{number.numerator}/{number.denominator}"
    places = max(twos, fives)
    digits = str(abs(number.numerator) * 10**places // number.denominator).rjust(places + 1, "0")
    sign = "-" if number < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def time_text(seconds: Fraction) -> str:
    """Return ``seconds`` with the unit that makes it shortest."""
    return _shortest([number_text(seconds / UNITS[unit]) + unit for unit in _TIME_UNITS])


def rate_text(per_second: Fraction) -> str:
    """Return ``per_second`` with the unit that makes it shortest."""
    return _shortest([f"{number_text(per_second * UNITS[unit])}/{unit}" for unit in _RATE_UNITS])


def _shortest(texts: list[str]) -> str:
    """Prefer decimals to ratios, then few characters of the number, then the first unit."""
    return min(texts, key=lambda text: (bool(re.search(r"\d/\d", text)), len(text)))
