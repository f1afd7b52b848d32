"""Getting over an outage: tries with growing pauses, a line in the log when it begins and ends.

Who meets an error that passes by itself calls ``wait`` and tries again; who succeeds calls
``over``. There is no limit to the tries: what is away for a minute or a night comes back
without a restart of anything, and whoever must not wait so long stops waiting.
"""

import asyncio
import logging
from typing import Final, final

from molva._base.clock import Clock
from molva._base.seldom import SeldomLog
from molva._base.waiting import first_of

__all__ = ["Outage"]

# Seconds before what is away is tried again: the first time, and at most, doubled in between.
# A shorter first one, and an error that comes at once becomes a busy loop; a longer last one,
# and work lies idle for as long after the end of the outage.
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0


@final
class Outage:
    """Something that is away at times, and is tried again until it is back.

    Args:
        trouble: What cannot be done meanwhile, for the log: "the ledger takes nothing".
        logger: Told when an outage begins, and when it is over.
        stopping: Ends every pause at once, when it is set.
        clock: Where time comes from.
    """

    def __init__(
        self, trouble: str, *, logger: logging.Logger, stopping: asyncio.Event, clock: Clock
    ) -> None:
        self._trouble = trouble
        self._stopping = stopping
        self._clock = clock
        # One for each end: something that comes and goes many times a second fills no disk.
        self._beginnings = SeldomLog(logger, clock)
        self._ends = SeldomLog(logger, clock)
        self._since: float | None = None
        self._told = ""
        self._pause = _FIRST_PAUSE

    async def wait(self, error: Exception) -> bool:
        """Wait for a while after an error; return whether to try again."""
        self.begin(error)
        if not self._stopping.is_set():
            await first_of(self._clock.sleep(self._pause), self._stopping.wait())
            self._pause = min(_LONGEST_PAUSE, 2 * self._pause)
        return not self._stopping.is_set()

    def begin(self, error: Exception) -> None:
        """Take note that it is away, if that is new; or that there is another reason now."""
        if self._since is None:
            self._since = self._clock.monotonic()
        elif type(error).__name__ == self._told:
            return
        self._told = type(error).__name__
        self._beginnings.warning("%s; trying again until it passes: %s", self._trouble, error)

    def over(self) -> None:
        """Take note that it is back, or was never away."""
        if self._since is None:
            return
        seconds = self._clock.monotonic() - self._since
        self._since, self._pause = None, _FIRST_PAUSE
        self._ends.warning("%s: over after %.1f s", self._trouble, seconds)
