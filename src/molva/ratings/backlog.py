"""What waits at the broker, asked so that a broker that does not answer holds nobody up for long.

Who looks after a service asks often, and has little time: a load balancer that waits for
``/readyz`` longer than its own limit takes the process away from its visitors. A driver gives a
broker up to ten seconds for an answer. So readers wait for a second, and the question goes on
without them: one at a time, however many ask.
"""

import asyncio
from collections.abc import Callable
from typing import Final, final

from molva.messaging import MessagingError, Topic, TopicStat

__all__ = ["PATIENCE", "Backlog"]

# Seconds that a reader waits. Longer, and probes and scrapes give up on the process; much
# shorter, and a broker that is merely busy is not asked successfully any more.
PATIENCE: Final = 1.0


@final
class Backlog:
    """Asks a topic what waits.

    Args:
        topic: Tells the topic; None where it is not to be asked, because it is away.
    """

    def __init__(self, topic: Callable[[], Topic | None]) -> None:
        self._topic = topic
        self._asking: asyncio.Task[TopicStat | None] | None = None
        self._asked = 0
        self._closed = False

    async def stat(self, patience: float | None = PATIENCE) -> TopicStat | None:
        """Return what waits, as of now or later; None where nobody can tell in time.

        Args:
            patience: Seconds for which to wait; None for as long as the driver does.
        """
        loop = asyncio.get_running_loop()
        deadline = None if patience is None else loop.time() + patience
        before = self._asked
        while (topic := self._topic()) is not None:
            asking = self._asking
            if asking is None or asking.done():
                if self._closed:
                    return None
                asking = self._asking = asyncio.ensure_future(topic.stat())
                # Perhaps nobody waits for it any more when it fails.
                asking.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
                self._asked += 1
            # One that was under way when we came may not know of what was accepted since.
            is_ours = self._asked > before
            left = None if deadline is None else max(0.0, deadline - loop.time())
            await asyncio.wait((asking,), timeout=left)
            if not asking.done():
                return None
            if is_ours:
                return _answer(asking)
        return None

    async def close(self) -> None:
        """Give up the question under way, and ask no more."""
        self._closed = True
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait((self._asking,))


def _answer(asking: "asyncio.Task[TopicStat | None]") -> TopicStat | None:
    try:
        return asking.result()
    except (MessagingError, asyncio.CancelledError):
        return None
