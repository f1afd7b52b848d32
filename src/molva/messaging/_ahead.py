"""How many messages to take ahead of those that work on them.

Where a consumer owns lanes, taking ahead costs nobody anything: no other could have the
messages. Under leases it does: what one consumer has taken ahead, an idle one cannot take.
So there the number follows the work: a tenth of a second's worth, measured, beginning with
what can run at once. Slow handlers then take one at a time, fast ones travel in batches.
"""

from typing import Final, final

__all__ = ["Ahead"]

# Seconds of work that are taken ahead. Less, and a fast handler waits for the broker
# between batches; more, and an idle consumer waits beside a pile.
_SECONDS: Final = 0.1
# Messages taken ahead for each handler at most.
_MOST: Final = 64


@final
class Ahead:
    """The number of messages that may be held: worked on, or taken ahead.

    Args:
        concurrency: How many handlers run at once.
        leased: Whether what is held is held under leases.
        limit: At most so many; None leaves it to the measurement.
    """

    def __init__(self, concurrency: int, *, leased: bool, limit: int | None) -> None:
        self._least = concurrency
        self._leased = leased
        self._most = max(concurrency, concurrency * _MOST if limit is None else limit)
        self._average: float | None = None
        self.size = concurrency if leased else self._most

    def note(self, seconds: float) -> None:
        """Take note that a handler took so long."""
        if not self._leased:
            return
        average = self._average
        self._average = seconds if average is None else average + 0.2 * (seconds - average)
        worth = _SECONDS * self._least / max(self._average, 1e-6)
        self.size = round(min(self._most, self._least + worth))
