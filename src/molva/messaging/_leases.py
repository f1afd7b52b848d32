"""Leases are kept alive while somebody works, or a message waits for its turn.

A lease is short, so that the messages of a consumer that died come again soon. Work may
take long all the same: what is held is extended each time a third of the lease has passed,
so that two attempts may fail before anything runs out.

The keeper's task lives on the same loop as the handlers. A handler that blocks the loop
for longer than a lease loses it, which is right: nobody can tell it from a dead one. The
watchdog names it (``_watchdog``).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, final

from molva._base.clock import Clock
from molva.messaging._about import about, about_many
from molva.messaging.delivery import Delivery
from molva.messaging.errors import MessagingError

__all__ = ["LeaseKeeper"]

_logger: Final = logging.getLogger("molva.messaging")

# The part of a lease after which it is extended.
_PART: Final = 1 / 3


@final
class LeaseKeeper:
    """Extends the leases of what is held, until it is let go.

    Args:
        extend: Extends deliveries, and returns those that were lost.
        lease: Seconds; None where nothing runs out, and nothing is done.
        clock: Where time comes from.
    """

    def __init__(
        self,
        extend: Callable[[Sequence[Delivery]], Awaitable[list[Delivery]]],
        *,
        lease: float | None,
        clock: Clock,
    ) -> None:
        self._extend = extend
        self._lease = lease
        self._clock = clock
        self._held: dict[int, Delivery] = {}
        self._task: asyncio.Task[None] | None = None

    def hold(self, delivery: Delivery) -> None:
        """Keep a delivery's lease alive from now on."""
        if self._lease is None:
            return
        self._held[id(delivery)] = delivery
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep(self._lease))

    def let_go(self, delivery: Delivery) -> None:
        """Leave a delivery to its fate, or because it was settled."""
        self._held.pop(id(delivery), None)

    async def close(self) -> None:
        """Stop."""
        self._held.clear()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _keep(self, lease: float) -> None:
        while True:
            await self._clock.sleep(lease * _PART)
            held = [delivery for delivery in self._held.values() if not delivery.settled]
            if not held:
                continue
            try:
                lost = await self._extend(held)
            except MessagingError as error:
                _logger.warning(
                    "%d leases could not be extended: %s",
                    len(held),
                    error,
                    extra=about_many(delivery.message for delivery in held),
                )
                continue
            for delivery in lost:
                self.let_go(delivery)
                if not delivery.settled:
                    delivery.lost = True
                    _logger.warning(
                        "the lease of %r ran out while it was held; it comes again",
                        delivery,
                        extra=about(delivery.message, delivery.attempt),
                    )
