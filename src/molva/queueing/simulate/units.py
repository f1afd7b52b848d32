"""The unit of time in which a model is played, so that instants that should meet do meet.

Sums of floats lose one tie in twenty: 0.4 s ten times is not 4 s. So constant times are whole
numbers of one unit, and whole numbers add up exactly in floats, up to 2⁵³.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from molva.queueing.distributions import Trace, as_deterministic
from molva.queueing.model import Bulk, Model, Recorded, Renewal

__all__ = ["Clock", "clock_of"]

# Units in one constant time. Above, sums over a chunk of them leave the range in which floats
# are exact; such times have no common measure to speak of.
_MOST_TICKS: Final = 2**36

# Decimals of a second to which the numbers of a trace are looked at. What has more was no
# reading of a clock.
_TRACE_DECIMALS: Final = 9


@dataclass(frozen=True, slots=True)
class Clock:
    """A unit of time.

    Attributes:
        unit: Seconds.
        is_exact: Whether every time of the model is a whole number of units.
    """

    unit: Fraction
    is_exact: bool

    def units(self, seconds: Fraction) -> float:
        """Return how many units ``seconds`` are."""
        return float(seconds / self.unit)

    def round(self, seconds: tuple[float, ...]) -> NDArray[np.float64]:
        """Return how many units each of ``seconds`` is, whole numbers where all times are."""
        units = np.asarray(seconds) * float(1 / self.unit)
        return np.rint(units) if self.is_exact else units


def clock_of(model: Model) -> Clock:
    """Return the unit in which ``model`` is played."""
    laws: list[object] = [] if model.patience is None else [model.patience]
    constant: list[Fraction] = []
    if isinstance(model.service, Bulk):
        constant += [model.service.base, model.service.per_job]
    else:
        laws.append(model.service)
    if isinstance(model.arrivals, Renewal):
        laws.append(model.arrivals.gap)
    elif isinstance(model.arrivals, Recorded):
        laws.append(model.arrivals.instants)
    else:
        laws.append(None)  # a rate that varies: its gaps have no common measure
    varies = False
    for law in laws:
        fixed = as_deterministic(law)
        step = None
        if isinstance(law, Trace):
            # Times are multiples of a step themselves, instants only from the first on.
            instants = isinstance(model.arrivals, Recorded) and law is model.arrivals.instants
            step = _trace_step(law.values, law.values[0] if instants else 0.0)
        if fixed is not None:
            constant.append(fixed.mean)
        elif step is not None:
            constant.append(step)
        else:
            varies = True
    constant = [time for time in constant if time > 0]
    tick = _common_measure(constant)
    if tick is not None and max(constant) / tick <= _MOST_TICKS:
        return Clock(tick, is_exact=not varies)
    # Nothing can meet: any unit will do, and that of the service saves a multiplication.
    return Clock(model.service.mean, is_exact=False)


def _common_measure(times: list[Fraction]) -> Fraction | None:
    if not times:
        return None
    below = math.lcm(*(time.denominator for time in times))
    return Fraction(math.gcd(*(int(time * below) for time in times)), below)


def _trace_step(values: tuple[float, ...], first: float) -> Fraction | None:
    """Return the largest step in which all ``values`` lie from ``first``, if there is one."""
    array = np.asarray(values)
    largest = float(np.abs(array).max())
    array = array - first
    for decimals in range(_TRACE_DECIMALS + 1):
        scaled = array * 10.0**decimals
        # What rounding leaves of a difference, and of the unit in the file.
        noise = largest * 10.0**decimals * 2.0**-50
        if noise > 0.1:
            return None
        whole = np.rint(scaled)
        if np.abs(scaled - whole).max() <= noise:
            step = int(np.gcd.reduce(np.abs(whole).astype(np.int64)))
            return Fraction(step, 10**decimals) if step else None
    return None
