"""A tail from its Laplace transform, by Euler summation on a line to the right of 0.

The line needs the transform only where it surely exists, which a log-normal service time has
nowhere else. Where it exists further left, up to the rate at which the tail decays, the tail
is inverted with that decay taken out: the error is then relative, however small the tail.
"""

import cmath
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Complex = NDArray[np.complex128]

__all__ = ["tail_by_inversion", "tail_of_array"]

# e^−A is the error of the trapezoid rule, e^(A/2)·1e-16 that of rounding. At 24 both are 1e-10
# and below; smaller, the first shows, larger, the second.
_A: Final = 24.0

# Terms summed plainly before those that are averaged with binomial weights. Fewer, and times
# near a kink of the tail lose digits.
_PLAIN: Final = 60
_AVERAGED: Final = 14
_WEIGHTS: Final = [math.comb(_AVERAGED, k) / 2**_AVERAGED for k in range(_AVERAGED + 1)]


def tail_by_inversion(
    transform: Callable[[complex], complex],
    t: float,
    *,
    decay: float = 0.0,
    plain: int = _PLAIN,
) -> float:
    """Return f(t), t > 0, for a tail f that is smooth at t.

    Args:
        transform: The Laplace transform of f, defined for Re s > −decay.
        t: Seconds.
        decay: A rate at which f is known to fall at least, per second.
        plain: Terms summed before the averaged ones. A tail with kinks needs more of them:
            the error of those in its second derivative falls with the square of their number.

    Source:
        Abate and Whitt, "Numerical inversion of Laplace transforms of probability
        distributions", ORSA Journal on Computing 7 (1995).
    """
    half = _A / (2 * t)
    total = 0.5 * transform(complex(half - decay, 0.0)).real
    averaged = 0.0
    for k in range(1, plain + _AVERAGED + 1):
        total += (-1) ** k * transform(complex(half - decay, k * math.pi / t)).real
        if k >= plain:
            averaged += _WEIGHTS[k - plain] * total
    return (cmath.exp(_A / 2 - decay * t) * averaged / t).real


def tail_of_array(
    transform: "Callable[[Complex], Complex]", t: float, plain: int | None = None
) -> float:
    """Return the same, for a transform that is computed at many points at once."""
    import numpy

    terms = plain or _PLAIN
    k = numpy.arange(terms + _AVERAGED + 1)
    points = (_A / (2 * t) + 1j * math.pi / t * k).astype(numpy.complex128)
    values = transform(points).real * numpy.where(k % 2, -1.0, 1.0)
    values[0] /= 2
    sums = numpy.cumsum(values)[terms:]
    return math.exp(_A / 2) * float(sums @ _WEIGHTS) / t
