"""The wait behind exponential servers: a mixture over the place that a job takes.

A job that takes place m, from 1, waits for m departures of n busy servers. It is gone when its own
service has ended too: until then it is none of the departures that follow, each with the
probability (n−1)/n.
"""

import math
from collections.abc import Callable
from typing import final

from molva.queueing.analytic import _poisson
from molva.queueing.result import Tail

__all__ = ["Places"]


@final
class Places:
    """The wait and the time in system of a job that takes one of some places, or none.

    Attributes:
        straight: Share that is served at once.
    """

    def __init__(
        self,
        n: int,
        mu: float,
        straight: float,
        places: list[float],
        excess: float | None = None,
    ) -> None:
        """Take who is served at once and who takes each place.

        Args:
            n: Servers.
            mu: Jobs per second that one completes.
            straight: Share that is served at once.
            places: Shares that take place 1, 2 …
            excess: u of a geometric end of ratio 1/(1+u) beyond, where there is one.
        """
        self.n, self.mu, self.straight = n, mu, straight
        self.last = len(places)
        self.places = places
        self.excess = excess
        self.end = places[-1] / excess if excess and places else 0.0
        tail = self.end
        self.tails = [tail]  # P(place > last), …, P(place > 0), reversed below
        for each in reversed(places):
            tail += each
            self.tails.append(tail)
        self.tails.reverse()
        self.stay = (n - 1) / n
        self.holds = [0.0]  # served and not gone when i departures have come
        for each in places:
            self.holds.append(self.holds[-1] * self.stay + each)

    def beyond(self, i: float) -> float:
        """Return P(place > i); between whole numbers only beyond the last."""
        if i < self.last:
            return self.tails[int(i)]
        if self.excess is None:
            return 0.0
        return self.end * math.exp(-(i - self.last) * math.log1p(self.excess))

    def held(self, i: float) -> float:
        """Return the share that, when i departures have come, is served and not gone."""
        if i <= self.last:
            return self.holds[int(i)]
        more = i - self.last
        if self.n == 1:
            return self.places[-1] * (1 + self.excess) ** -more if self.excess else 0.0
        log_stay = math.log1p(-1 / self.n)
        old = self.holds[-1] * math.exp(more * log_stay)
        if self.excess is None:
            return old
        # Σ ratioʲ stay^(more−j) over 1 ≤ j ≤ more.
        log_ratio = -math.log1p(self.excess)
        apart = log_ratio - log_stay
        if abs(apart) * more < 1e-9:
            new = more * math.exp(more * log_stay)
        elif apart > 0:
            new = math.exp(more * log_ratio) * math.expm1(-apart * more) / math.expm1(-apart)
        else:
            new = math.exp((more - 1) * log_stay + log_ratio)
            new *= math.expm1(apart * more) / math.expm1(apart)
        return old + self.places[-1] * new

    def squared(self) -> float:
        """Return E[W²]."""
        total = math.fsum(m * (m + 1) * p for m, p in enumerate(self.places, start=1))
        if self.excess:
            u, m = self.excess, self.last
            # Σ (m+i)(m+i+1) ratioⁱ over i ≥ 1.
            total += self.places[-1] * (
                (m * m + m) / u + (2 * m + 1) * (1 + u) / u**2 + (1 + u) * (2 + u) / u**3
            )
        return total / (self.n * self.mu) ** 2

    def wait(self) -> Tail:
        """Return the distribution of the wait."""
        return Tail(lambda t: self._mixed(t, self.beyond), 1 / (self.n * self.mu))

    def time_in_system(self) -> Tail:
        """Return the distribution of the wait and a service."""

        def tail(t: float) -> float:
            waits = self._mixed(t, lambda i: self.beyond(i) + self.held(i))
            return self.straight * math.exp(-self.mu * t) + waits

        return Tail(tail, 1 / self.mu)

    def _mixed(self, t: float, value: Callable[[float], float]) -> float:
        mean = self.n * self.mu * t
        first, _ = _poisson.window(mean)
        if first > self.last:
            return _poisson.smooth_expectation(mean, value, self.last)
        return _poisson.expectation(mean, value)
