"""Says which handler blocks the event loop.

A handler that computes for seconds, or calls something that blocks, stops everything on
its loop: other handlers, leases, heartbeats. From within the loop this can only be seen
when it is over, and not who it was. So a thread looks: while any ``run`` is under way, the
loop sets a mark four times a second, and where the mark stays away, the thread reads which
task is running and on which line, and warns once for each time.
"""

import asyncio
import contextlib
import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Final, final

__all__ = ["BLOCKED_SECONDS", "watched"]

_logger: Final = logging.getLogger("molva.messaging")

# Seconds without a sign of life after which we warn. Shorter, and a garbage collection or
# a busy machine warns; longer, and leases of a few seconds are lost before the warning.
BLOCKED_SECONDS: Final = 1.0
_INTERVAL: Final = 0.25


@final
class _Watchdog:
    """Watches one loop for as long as somebody runs handlers on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread_id = threading.get_ident()
        self._users = 0
        self._seen = time.monotonic()
        self._ended = threading.Event()

    def begin(self) -> None:
        self._users += 1
        if self._users == 1:
            self._ended.clear()
            self._mark()
            threading.Thread(target=self._look, name="molva-watchdog", daemon=True).start()

    def end(self) -> bool:
        """Return whether nobody is left."""
        self._users -= 1
        if self._users == 0:
            self._timer.cancel()
            self._ended.set()
        return self._users == 0

    def _mark(self) -> None:
        self._seen = time.monotonic()
        self._timer = self._loop.call_later(_INTERVAL, self._mark)

    def _look(self) -> None:
        warned = 0.0
        ended = self._ended
        while not ended.wait(_INTERVAL):
            seen = self._seen
            if time.monotonic() - seen >= BLOCKED_SECONDS and seen != warned:
                warned = seen
                self._warn()

    def _warn(self) -> None:
        frame = sys._current_frames().get(self._thread_id)
        if frame is None:
            return  # the loop's thread is gone
        # Reading another thread's current task is a look at one pointer; at worst it is
        # one that has just ended.
        task = asyncio.current_task(self._loop)
        name = "something" if task is None else task.get_name()
        where = traceback.extract_stack(frame)[-1]
        _logger.warning(
            "%s has blocked the event loop for %.1f s, at %s:%s in %s; use asyncio.to_thread, "
            "or leases run out",
            name,
            time.monotonic() - self._seen,
            where.filename,
            where.lineno,
            where.name,
        )


# One for each loop that runs handlers now.
_watchdogs: Final[dict[asyncio.AbstractEventLoop, _Watchdog]] = {}


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Watch the running loop inside this block."""
    loop = asyncio.get_running_loop()
    watchdog = _watchdogs.get(loop)
    if watchdog is None:
        watchdog = _watchdogs[loop] = _Watchdog(loop)
    watchdog.begin()
    try:
        yield
    finally:
        if watchdog.end():
            del _watchdogs[loop]
