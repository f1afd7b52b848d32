"""The kernels for the compiler numba, the extra ``[fast]``: a hundred times as fast.

They do what ``fcfs.py`` and ``event_loop.py`` do, to the last bit; a test compares them. The
number of servers is a constant of the compiled code up to ``_MOST_CONSTANT``, because the
loops over them are then unrolled. The place of a new end among the sorted ones is found by
moving minima and maxima only: a branch there is guessed wrong every second time, and costs
three times as much as it saves.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, TypeVar

import numba
import numpy as np

from molva.queueing.simulate import event_loop
from molva.queueing.simulate.demands import Demand
from molva.queueing.simulate.draws import Floats
from molva.queueing.simulate.tally import BIN_SHIFT, NEVER, Sum, Tally

__all__ = ["CompiledLine", "compiled_play"]

F = TypeVar("F", bound=Callable[..., Any])

# Servers up to which each number has code of its own. Each takes a second to compile, once.
_MOST_CONSTANT: Final = 4

# Servers up to which ends are kept sorted; above, in a heap, which takes a branch a level.
_MOST_SORTED: Final = 64

_NO_LIMIT: Final = 0
_NO_ROOM: Final = 1
_ROOM: Final = 2

# Places in the sums, as constants of the compiled code.
_ARRIVED: Final = int(Sum.ARRIVED)
_REFUSED: Final = int(Sum.REFUSED)
_LEFT: Final = int(Sum.LEFT)
_WAITED: Final = int(Sum.WAITED)
_WAIT: Final = int(Sum.WAIT)
_WAIT_SQUARED: Final = int(Sum.WAIT_SQUARED)
_STAY: Final = int(Sum.STAY)
_WORK: Final = int(Sum.WORK)
_TIME: Final = int(Sum.TIME)
_OUTPUT: Final = int(Sum.OUTPUT_GAPS)
_REFUSALS: Final = int(Sum.REFUSAL_GAPS)


class CompiledLine:
    """A first-come line before n servers, with q waiting places or any number of them."""

    def __init__(self, servers: int, waiting: int | None, least: int) -> None:
        self._free = np.full(servers, NEVER)
        self._starts = np.full(waiting or 0, NEVER)
        self._marks = np.array([NEVER, NEVER, 0.0])
        self._pair = np.zeros(2)
        self._bits = self._pair.view(np.int64)
        self._least = least
        room = _NO_LIMIT if waiting is None else _ROOM if waiting else _NO_ROOM
        self._kernel = _kernel(
            servers if servers <= _MOST_CONSTANT else 0, room, servers > _MOST_SORTED
        )

    def play(self, gaps: Floats, demand: Demand, tally: Tally) -> None:
        """Let jobs arrive, and count what becomes of them."""
        self._kernel(
            *(gaps, demand.services, self._free, self._starts, self._marks),
            *(self._pair, self._bits, self._least, tally.sums, tally.waits, tally.stays),
        )


@lru_cache
def _kernel(servers: int, room: int, heap: bool) -> Callable[..., None]:
    """Return the compiled kernel for a number of servers; 0 for any number."""

    def kernel(
        gaps: Any,
        services: Any,
        free: Any,
        starts: Any,
        marks: Any,
        pair: Any,
        bits: Any,
        least: Any,
        sums: Any,
        wait_bins: Any,
        stay_bins: Any,
    ) -> None:
        n = servers if servers else free.size
        q = starts.size
        top = wait_bins.size - 1
        departed, last_refused, head = marks[0], marks[1], int(marks[2])
        left = waited = outputs = refused = refusals = 0
        wait_sum = squares = work = out_sum = out_squares = off_sum = off_squares = 0.0
        now = 0.0
        for i in range(gaps.size):
            now += gaps[i]
            first = free[0]
            if room != _NO_LIMIT and (first if room == _NO_ROOM else starts[head]) > now:
                refused += 1
                if last_refused != NEVER:
                    gap = now - last_refused
                    refusals += 1
                    off_sum += gap
                    off_squares += gap * gap
                last_refused = now
                continue
            service = services[i]
            start = first if first > now else now
            wait = start - now
            if room == _ROOM:
                starts[head] = start
                head += 1
                if head == q:
                    head = 0
            # The server that was free first takes the job, and is put where its end belongs.
            end = start + service
            if heap:
                at = 0
                child = 1
                while child < n:
                    if child + 1 < n and free[child + 1] < free[child]:
                        child += 1
                    if free[child] >= end:
                        break
                    free[at] = free[child]
                    at = child
                    child = 2 * at + 1
                free[at] = end
            else:
                for j in range(n - 1):
                    after = free[j + 1]
                    free[j] = after if after < end else end
                    end = end if after < end else after
                free[n - 1] = end
            left += 1
            waited += wait > 0.0
            wait_sum += wait
            squares += wait * wait
            work += service
            if departed != NEVER:
                gap = first - departed
                outputs += 1
                out_sum += gap
                out_squares += gap * gap
            departed = first
            pair[0] = wait
            wait_bins[min(max((bits[0] >> BIN_SHIFT) - least, 0), top)] += 1
            pair[1] = wait + service
            stay_bins[min(max((bits[1] >> BIN_SHIFT) - least, 0), top)] += 1
        # The end of the chunk becomes the origin of time.
        for j in range(n):
            free[j] -= now
        for j in range(q):
            starts[j] -= now
        marks[0] = departed - now
        marks[1] = last_refused - now
        marks[2] = head
        sums[_ARRIVED] += gaps.size
        sums[_REFUSED] += refused
        sums[_LEFT] += left
        sums[_WAITED] += waited
        sums[_WAIT] += wait_sum
        sums[_WAIT_SQUARED] += squares
        sums[_STAY] += wait_sum + work
        sums[_WORK] += work
        sums[_TIME] += now
        sums[_OUTPUT] += outputs
        sums[_OUTPUT + 1] += out_sum
        sums[_OUTPUT + 2] += out_squares
        sums[_REFUSALS] += refusals
        sums[_REFUSALS + 1] += off_sum
        sums[_REFUSALS + 2] += off_squares

    return _jit(kernel)


@lru_cache
def compiled_play() -> "event_loop.Play":
    """Return the event loop, compiled."""
    for function in event_loop.PARTS:
        numba.extending.register_jitable(function)
    return _jit(event_loop.play)


def _jit(function: F) -> F:
    """Return ``function`` compiled at its first call, and kept for later processes."""
    # What numba says of its types changes from version to version.
    njit: Any = numba.njit
    try:
        compiled: F = njit(nogil=True, cache=True)(function)
    except RuntimeError:
        # No folder can be written to, beside this file or in a home.
        compiled = njit(nogil=True)(function)
    return compiled
