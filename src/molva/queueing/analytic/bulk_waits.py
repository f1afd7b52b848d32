"""The wait and the time in system behind a bulk server, first come first served.

A job comes u seconds into a bulk that takes τ, and finds m waiting: those kept back when it began,
and a Poisson count. All bulks before its own are then full, so it waits τ − u and ⌊m/K⌋ full times.
Its own bulk holds the m mod K jobs before it and those behind it that have come by then.
"""

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]
    Matrix = NDArray[np.float64]

__all__ = ["BulkWaits", "Group"]

# Nodes of Gauss-Legendre for the time that a bulk has been under way when a job arrives: between
# the instants at which some number steps, few or many.
_NODES: Final = 48
_FEW_NODES: Final = 12

# Instants at which numbers step, from which on few nodes lie between two of them.
_MANY_STEPS: Final = 6

# Jobs in a bulk beyond which a percentile of the time in system takes many seconds.
_LARGEST_BULK: Final = 64


class Group:
    """Bulks that are alike to a job that arrives while one is under way.

    Attributes:
        time: Seconds that they take.
        weights: How many there are in a cycle for which 0, 1 … jobs were kept back.
        more: How many for which at least 0, 1 … were.
    """

    def __init__(self, time: float, weights: "Vector") -> None:
        import numpy

        self.time = time
        self.weights = weights
        self.more = numpy.concatenate((numpy.cumsum(weights[::-1])[::-1], [0.0]))


@dataclass(frozen=True, slots=True)
class BulkWaits:
    """What a job meets, over one cycle from the end of a bulk to the next.

    Attributes:
        arrival: Jobs per second.
        limit: Jobs in a full bulk, K.
        base: Seconds of a bulk.
        per_job: Seconds of each job in it.
        places: Waiting places, or None.
        groups: The bulks of a cycle.
        idle: Seconds of a cycle in which nothing is served.
        admitted: Seconds of a cycle, times the share of the arrivals that is admitted.
    """

    arrival: float
    limit: int
    base: float
    per_job: float
    places: int | None
    groups: tuple[Group, ...]
    idle: float
    admitted: float

    @property
    def full(self) -> float:
        """Seconds of a full bulk."""
        return self.base + self.per_job * self.limit

    @property
    def has_times_in_system(self) -> bool:
        """Whether the time in system is computed, which takes long for large bulks."""
        return self.limit <= _LARGEST_BULK or self.per_job == 0

    def wait_tail(self, t: float) -> float:
        """Return P(W > t)."""
        return sum(self._waits_longer(group, t) for group in self.groups) / self.admitted

    def time_in_system_tail(self, t: float) -> float:
        """Return P(T > t)."""
        if self.per_job == 0:
            return 1.0 if t < self.base else self.wait_tail(t - self.base)
        total = self.idle if self.base + self.per_job > t else 0.0
        total += sum(self._stays_longer(group, t) for group in self.groups)
        return total / self.admitted

    def _waits_longer(self, group: Group, t: float) -> float:
        """Return the seconds of a cycle in which a job arrives, is admitted and waits beyond t."""
        # The number of full times that still fit into t steps where τ − u + i·full = t.
        steps = (group.time - t) % self.full
        total = 0.0
        for u, w in _nodes(group.time, [steps, steps - self.full]):
            middle = (float(u[0]) + float(u[-1])) / 2
            fit = math.floor((t - group.time + middle) / self.full)
            total += float(self._at_least(group, self.limit * (fit + 1), u) @ w)
        return total

    def _at_least(self, group: Group, m: int, u: "Vector") -> "Vector":
        """Return how many bulks have m or more waiting, and a free place, after u seconds."""
        reached = self._count(group, m, u)
        if self.places is None:
            return reached
        result: Vector = (
            reached - self._count(group, self.places, u) if m < self.places else 0 * reached
        )
        return result

    def _count(self, group: Group, m: int, u: "Vector") -> "Vector":
        """Return how many bulks have m or more waiting after u seconds."""
        import numpy
        from scipy.special import pdtrc

        # Those that kept back far fewer than m cannot have so many by then.
        mean = self.arrival * group.time
        most = len(group.weights)
        first = min(most, max(0, math.floor(m - mean - 12 * math.sqrt(mean) - 60)))
        last = min(most, max(m, 0))
        needed = m - numpy.arange(float(first), float(last))
        chance = pdtrc(needed[:, None] - 1, self.arrival * u[None, :])
        result: Vector = group.weights[first:last] @ chance + group.more[last]
        return result

    def _stays_longer(self, group: Group, t: float) -> float:
        """Return the seconds of a cycle in which a job arrives and stays beyond t."""
        full, per_job = self.full, self.per_job
        first = max(0, math.floor((t - self.base - per_job * self.limit - group.time) / full))
        last = max(0, math.ceil((t - self.base) / full))
        # The size of its own bulk that keeps it beyond t steps at these instants.
        steps = [
            group.time - t + c * full + self.base + per_job * size
            for c in range(first, last + 1)
            for size in range(self.limit + 1)
        ]
        total = 0.0
        for u, w in _nodes(group.time, steps):
            middle = (float(u[0]) + float(u[-1])) / 2
            for c in range(first, last + 2):
                left = t - (group.time - middle) - c * full - self.base
                enough = math.floor(left / per_job)  # a size beyond this is
                if enough <= 0:
                    total += float(self._at_least(group, c * self.limit, u) @ w)
                    break
                if enough < self.limit:
                    total += float(self._own_bulk(group, c, enough, u) @ w)
        return total

    def _own_bulk(self, group: Group, full_before: int, enough: int, u: "Vector") -> "Vector":
        """Return how many bulks have a job behind ``full_before`` full ones, in a large own one."""
        begin = full_before * self.limit
        # So many before it in its own bulk, and it is large already.
        result = self._at_least(group, begin + enough, u)
        result = result - self._at_least(group, begin + self.limit, u)
        for before in range(enough):
            m = begin + before
            if self.places is not None and m >= self.places:
                break
            here = self._count(group, m, u) - self._count(group, m + 1, u)
            result = result + here * self._behind(group, full_before, m, enough - before, u)
        return result

    def _behind(self, group: Group, full_before: int, m: int, needed: int, u: "Vector") -> "Vector":
        """Return P(``needed`` jobs or more behind place m when its bulk begins)."""
        from scipy.special import pdtr, pdtrc

        now, then = self.arrival * (group.time - u), self.arrival * full_before * self.full
        free = None if self.places is None else self.places - m - 1
        if free is None or needed <= free:
            poisson: Vector = pdtrc(needed - 1, now + then)
            return poisson
        # While this bulk lasts only ``free`` of them are admitted; after it, there is room.
        total: Vector = (
            pdtrc(free - 1, now) * pdtrc(needed - free - 1, then)
            if free
            else (0 * now + pdtrc(needed - 1, then))
        )
        for came in range(free):
            exactly = pdtr(came, now) - (pdtr(came - 1, now) if came else 0.0)
            total = total + exactly * pdtrc(needed - came - 1, then)
        return total


def _nodes(time: float, steps: list[float]) -> list[tuple["Vector", "Vector"]]:
    """Return nodes and weights for an integral over (0, time), between these instants."""
    import numpy

    edges = sorted({0.0, time, *(step for step in steps if 0 < step < time)})
    count = _NODES if len(edges) <= _MANY_STEPS else _FEW_NODES
    x, w = numpy.polynomial.legendre.leggauss(count)
    return [
        (low + (high - low) / 2 * (x + 1), (high - low) / 2 * w)
        for low, high in itertools.pairwise(edges)
        if high - low > 1e-13 * time
    ]
