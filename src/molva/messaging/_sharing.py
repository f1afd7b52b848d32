"""Several receivers of one consumer share one call to the driver.

Sixty-four tasks that each wait for a message would be sixty-four transactions, and each
message that arrives would wake them all. Instead one of them leads: it asks for as many
messages as all who wait want together, hands them out in the order in which they came, and
then the next one that waits leads. A lone receiver leads at once and pays nothing.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, final

from molva._base.clock import Clock
from molva.messaging.driver import RawDelivery

__all__ = ["SharedReceive"]

# Messages that one call asks for. As many as travel in one call when sending.
_MOST: Final = 1_000


@final
class _Follower:
    """A receiver that waits for its share, or (None) for its turn to lead."""

    __slots__ = ("future", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.future: asyncio.Future[Sequence[RawDelivery] | None] = (
            asyncio.get_running_loop().create_future()
        )


@final
class SharedReceive:
    """Combines receives.

    Args:
        receive: The driver's call.
        give_back: Lets messages come again that nobody waits for any more.
        clock: Where time comes from.
    """

    def __init__(
        self,
        receive: Callable[..., Awaitable[Sequence[RawDelivery]]],
        *,
        give_back: Callable[[Sequence[RawDelivery]], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self._receive = receive
        self._give_back = give_back
        self._clock = clock
        self._leading = False
        self._followers: deque[_Follower] = deque()

    async def receive(self, limit: int, *, wait: float) -> Sequence[RawDelivery]:
        """Receive up to ``limit`` messages; wait up to ``wait`` seconds for the first."""
        if self._leading:
            deadline = self._clock.monotonic() + wait
            share = await self._follow(limit, wait)
            if share is not None:
                return share
            wait = max(0.0, deadline - self._clock.monotonic())
        return await self._lead(limit, wait)

    async def _follow(self, limit: int, wait: float) -> Sequence[RawDelivery] | None:
        """Return our share, or None where it is our turn to lead."""
        follower = _Follower(limit)
        self._followers.append(follower)
        timer = asyncio.ensure_future(self._clock.sleep(wait))
        try:
            await asyncio.wait((follower.future, timer), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if follower.future.done():
                share = follower.future.result()
                if share is None:
                    self._leading = False
                    self._pass_on()
                else:
                    await self._give_back(share)
            raise
        finally:
            timer.cancel()
            if not follower.future.done():
                self._followers.remove(follower)
        return follower.future.result() if follower.future.done() else []

    async def _lead(self, limit: int, wait: float) -> Sequence[RawDelivery]:
        self._leading = True
        try:
            wanted = limit + sum(follower.limit for follower in self._followers)
            found = await self._receive(max(limit, min(wanted, _MOST)), wait=wait)
            if len(found) > limit:
                self._hand_out(found[limit:])
                found = found[:limit]
            return found
        finally:
            self._leading = False
            self._pass_on()

    def _hand_out(self, rest: Sequence[RawDelivery]) -> None:
        while rest and self._followers:
            follower = self._followers.popleft()
            share, rest = rest[: follower.limit], rest[follower.limit :]
            follower.future.set_result(share)
        if rest:
            # Who wanted them has been cancelled meanwhile.
            asyncio.ensure_future(self._give_back(rest))  # noqa: RUF006 - ends by itself

    def _pass_on(self) -> None:
        if self._followers:
            # Ours until the next one has begun: whoever comes in between waits behind it.
            self._leading = True
            self._followers.popleft().future.set_result(None)
