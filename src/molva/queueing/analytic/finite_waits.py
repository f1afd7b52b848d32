"""M/G/1/q, first come first served: the whole wait of those who are admitted.

An arrival that finds n present waits for what is left of the service under way and for n − 1
more. A service that began with m present has had i = n − m arrivals after u seconds, so all
follows from Gᵢ(s) = E ∫ P(i arrivals by u) exp(−s(S−u)) du over one service S.
"""

import math
from typing import TYPE_CHECKING, Final

from molva.queueing.analytic._inversion import tail_of_array
from molva.queueing.analytic.counts import Counts, arrivals_during
from molva.queueing.distributions import (
    Distribution,
    LogNormal,
    Trace,
    Uniform,
    as_deterministic,
)
from molva.queueing.result import Shifted, Tail, TimeLaw, nothing_waits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]
    Complex = NDArray[np.complex128]

__all__ = ["RoomWaits"]

# Waiting places beyond which one percentile takes seconds: then only means are given.
_MOST_PLACES: Final = 2000

# The same where each count is a sum over many nodes, as behind a log-normal time or a trace.
_MOST_PLACES_OF_NODES: Final = 60

# Terms of the inversion where the edges of a uniform time put kinks into the second derivative.
_TERMS_OF_EDGES: Final = 1000

# Growth of a rounding error in the recursion of G that is still taken: the inversion multiplies
# it with 1e5. And counts, in multiples of the places, at which the other way round has come from
# far enough: 0.1¹⁷ is lost in rounding.
_GROWTH: Final = 10.0
_FAR: Final = 18


class RoomWaits:
    """The wait and the time in system of M/G/1/q.

    Attributes:
        squared: E[W²], in seconds².
        wait: None where it is not computed.
        time_in_system: None where it is not computed.
    """

    def __init__(
        self, arrival: float, service: Distribution, starts: "Vector", loss: float
    ) -> None:
        """Compute them.

        Args:
            arrival: Jobs per second.
            service: Its transform is known.
            starts: Services per second that begin with 1, 2 … q present.
            loss: Share of the arrivals that is refused.
        """
        self.arrival, self.service, self.starts = arrival, service, starts
        self.mean, self.places = float(service.mean), len(starts)
        self.admitted = 1 - loss
        self.squared: float | None = None
        self.wait: TimeLaw | None = None
        self.time_in_system: TimeLaw | None = None
        if not self.places:
            self.squared, self.wait = 0.0, nothing_waits()
            self.time_in_system = Tail(lambda t: 1 - (service.cdf(t) or 0.0), self.mean)
            return
        by_nodes = isinstance(service, LogNormal | Trace)
        if self.places > (_MOST_PLACES_OF_NODES if by_nodes else _MOST_PLACES):
            return
        # As many counts as the recursion of G needs when it runs backwards.
        self.counts = arrivals_during(service, arrival, _FAR * self.places + 60)
        self.found = self._found()  # P(an arrival finds n), n from 1
        self.squared = self._squared()
        constant = as_deterministic(service)
        if constant is not None:
            self.wait = Tail(self._constant_tail, self.mean)
            self.time_in_system = Shifted(self.wait, self.mean)
            return
        plain = _TERMS_OF_EDGES if isinstance(service, Uniform) else None
        waits = float(self.found.sum()) / self.admitted
        self.wait = Tail(
            lambda t: tail_of_array(self._wait_transform, t, plain) if t > 0 else waits, self.mean
        )
        self.time_in_system = Tail(
            lambda t: tail_of_array(self._sojourn_transform, t, plain) if t > 0 else 1.0, self.mean
        )

    def _found(self) -> "Vector":
        import numpy

        spent = self.counts.above[: self.places] / self.arrival
        found: Vector = numpy.convolve(self.starts, spent)[: self.places]
        return found

    def _squared(self) -> float:
        import numpy

        once, twice = _residual_sums(self.counts, self.arrival, self.service, self.places)
        left = numpy.convolve(self.starts, once)[: self.places]
        left_squared = numpy.convolve(self.starts, twice)[: self.places]
        full = numpy.arange(float(self.places))
        variance = float(self.service.scv) * self.mean**2
        squares = left_squared + 2 * full * self.mean * left
        squares += (full * variance + (full * self.mean) ** 2) * self.found
        return float(squares.sum()) / self.admitted

    def _constant_tail(self, t: float) -> float:
        import numpy
        from scipy.special import pdtrc

        whole = math.floor(t / self.mean)
        if whole >= self.places:
            return 0.0
        longer = float(self.found[whole + 1 :].sum())
        # It finds whole + 1 present, and more than the rest of t is left of the service.
        until = self.arrival * max(0.0, self.mean * (whole + 1) - t)
        arrived = numpy.arange(float(whole), -1.0, -1.0)
        equal = float(self.starts[: whole + 1] @ pdtrc(arrived, until)) / self.arrival
        return (longer + equal) / self.admitted

    def _waited(self, s: "Complex") -> tuple["Complex", "Complex"]:
        """Return E[exp(−sW); W > 0] of the admitted, and the transform of a service."""
        import numpy

        one = _transform_at(self.service, s)
        g = self._g(s, one)
        total = numpy.zeros_like(s)
        so_far = numpy.zeros_like(s)
        power = numpy.ones_like(s)
        for i in range(self.places):
            so_far = so_far + g[i] * power
            power = power * one
            m = self.places - i  # a service that began with m has room for up to i more
            total = total + self.starts[m - 1] * one ** (m - 1) * so_far
        return total / self.admitted, one

    def _g(self, s: "Complex", one: "Complex") -> "Complex":
        """Return G₀, G₁ … at each s, by (λ−s) Gᵢ = λ Gᵢ₋₁ − P(i arrivals), G₋₁ = B(s)/λ."""
        import numpy

        pmf, rate = self.counts.pmf, self.arrival
        apart = (rate - s) / rate
        g = numpy.empty((self.places, len(s)), dtype=complex)
        # Upwards a rounding error is divided by ``apart`` each time; where that is small,
        # downwards from nothing, far beyond.
        upwards = numpy.abs(apart) > _GROWTH ** (-1 / self.places)
        up, before = apart[upwards], one[upwards]
        for i in range(self.places):
            before = (before - pmf[i]) / up
            g[i, upwards] = before / rate
        down = apart[~upwards]
        after = numpy.zeros_like(down)
        for i in range(len(pmf) - 1, 0, -1):
            after = pmf[i] + down * after
            if i <= self.places:
                g[i - 1, ~upwards] = after / rate
        return g

    def _wait_transform(self, s: "Complex") -> "Complex":
        waited, _ = self._waited(s)
        result: Complex = (float(self.found.sum()) / self.admitted - waited) / s
        return result

    def _sojourn_transform(self, s: "Complex") -> "Complex":
        waited, one = self._waited(s)
        at_once = 1 - float(self.found.sum()) / self.admitted
        result: Complex = (1 - (at_once + waited) * one) / s
        return result


def _transform_at(service: Distribution, s: "Complex") -> "Complex":
    """Return E[exp(−sS)] at each s."""
    import numpy

    if isinstance(service, LogNormal | Trace):
        times, weights = service.nodes()
        result: Complex = numpy.exp(-numpy.outer(s, times)) @ weights
        return result
    return numpy.array([service.lst(complex(each)) for each in s])


def _residual_sums(
    counts: Counts, arrival: float, service: Distribution, last: int
) -> tuple["Vector", "Vector"]:
    """Return E ∫ P(i arrivals by u) (S−u)ᵏ du over a service, for k = 1 and 2 and i < last."""
    import numpy

    once = counts.excess[1 : last + 1] / arrival**2
    # Σ E[(A−j)⁺] over j > i + 1, from that over all j, which is E[A(A+1)]/2.
    second = service.moment(2)
    assert second is not None
    every = arrival * arrival * second / 2 + arrival * float(service.mean)
    beyond = every - numpy.cumsum(counts.excess)[1 : last + 1]
    return once, 2 * numpy.maximum(beyond, 0.0) / arrival**3
