"""First come, first served, in plain Python: the kernel of Kiefer and Wolfowitz.

The state is when each server will be free. A job begins at the least of these or when it
arrives, whichever is later; nothing else has to be known. Start times of admitted jobs never
descend, so all q waiting places are taken exactly if the q-th last of them has yet to begin:
one ring of q start times replaces a list of events. And servers become free in ascending
order, so the departures come out sorted.

``compiled.py`` holds the same for the compiler. Both give the same bits: each adds from left to
right, within a chunk from 0, and moves the origin of time to the end of each chunk, where the
digits of a clock that runs for long would be lost.
"""

import heapq
from collections import deque

import numpy as np

from molva.queueing.simulate.demands import Demand
from molva.queueing.simulate.draws import Floats
from molva.queueing.simulate.tally import NEVER, Sum, Tally, flow_into, jobs_into

__all__ = ["PlainLine"]


class PlainLine:
    """A first-come line before n servers, with q waiting places or any number of them."""

    def __init__(self, servers: int, waiting: int | None, least: int) -> None:
        self._free = [NEVER] * servers
        self._waiting = waiting
        self._starts = deque([NEVER] * (waiting or 0), maxlen=waiting or 0)
        self._departed = self._refused = NEVER
        self._least = least

    def play(self, gaps: Floats, demand: Demand, tally: Tally) -> None:
        """Let jobs arrive, and count what becomes of them."""
        free, starts, waiting = self._free, self._starts, self._waiting
        replace = heapq.heapreplace
        now = 0.0
        waits: list[float] = []
        departures: list[float] = []
        served: list[float] = []
        refusals: list[float] = []
        for gap, service in zip(gaps.tolist(), demand.services.tolist(), strict=True):
            now += gap
            first = free[0]
            if waiting is not None:
                if (starts[0] if waiting else first) > now:
                    refusals.append(now)
                    continue
                served.append(service)
            start = first if first > now else now
            if waiting:
                starts.append(start)
            waits.append(start - now)
            departures.append(first)
            replace(free, start + service)
        services = demand.services if waiting is None else np.array(served)
        self._count(gaps.size, np.array(waits), services, departures, refusals, tally)
        # A heap stays one when the same is taken off all of it.
        self._free = [at - now for at in free]
        self._starts = deque([at - now for at in starts], maxlen=starts.maxlen)
        self._departed -= now
        self._refused -= now
        tally.sums[Sum.TIME] += now

    def _count(
        self,
        arrived: int,
        waits: Floats,
        services: Floats,
        departures: list[float],
        refusals: list[float],
        tally: Tally,
    ) -> None:
        sums = tally.sums
        sums[Sum.ARRIVED] += arrived
        sums[Sum.REFUSED] += len(refusals)
        jobs_into(tally, waits, waits + services, self._least)
        work = float(np.cumsum(services)[-1]) if services.size else 0.0
        wait = float(np.cumsum(waits)[-1]) if waits.size else 0.0
        sums[Sum.WORK] += work
        sums[Sum.STAY] += wait + work
        ends = np.array(departures)
        # A server that has not worked yet was free from the beginning.
        ends = ends[ends > NEVER]
        self._departed = flow_into(tally, Sum.OUTPUT_GAPS, ends, self._departed)
        self._refused = flow_into(tally, Sum.REFUSAL_GAPS, np.array(refusals), self._refused)
