"""The reply topic as one requester sees it: its own subscription, and what others left there.

``close`` removes the subscription. A requester that was killed cannot, so the others of the topic
remove what it left: each looks when it has opened, and about one of them a minute after that.
They know by the broker whether somebody still consumes it, and by its name, which is
time-ordered, that it is not just being opened. Until then it keeps every reply that comes, whoever
asked: it is a subscription of the whole topic. A topic that keeps nothing
(``delivery=at-most-once``) keeps not even these.

Where a broker cannot tell what subscriptions there are, nobody is in a position to tidy up. One
that can be told to remove what nobody consumes (``expires``) is told so.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final, Self, final

from molva._base.clock import Clock
from molva._base.ids import IdFactory
from molva._base.outage import Outage
from molva.messaging.delivery import Delivery
from molva.messaging.errors import (
    BrokenBrokerError,
    InUseError,
    MessagingError,
    NotFoundError,
    UnavailableError,
)
from molva.messaging.subscription import Subscription, open_subscription
from molva.messaging.topic import Topic, open_topic
from molva.messaging.url import BrokerURL, load_driver, with_options

__all__ = ["Inbox"]

_logger: Final = logging.getLogger("molva.messaging")

# Replies taken over side by side. Where each is acknowledged by itself, the acknowledgements
# of so many travel together; where not, it changes nothing.
_TAKEN_AT_ONCE: Final = 64

# Seconds between two looks for what killed requesters left, whoever looks: with ten of them,
# each does every tenth time, because a look asks the broker of every subscription.
_SWEEP: Final = 60.0
# Seconds for which a subscription is left alone, whether or not anybody consumes it: it may
# just be being opened. Longer than any open takes, and than clocks of machines differ.
_GRACE: Final = 60.0

# Seconds after which a broker that removes subscriptions by itself removes one that nobody
# consumes. Longer, and that of a killed requester keeps more replies of the others; shorter, and a
# server that is started again takes those of the living for dead.
_EXPIRES: Final = 300.0

_PREFIX: Final = "requester-"


@final
class Inbox:
    """Takes the replies of one requester. Open one with ``Inbox.open``.

    Attributes:
        address: What the correlation ids of this requester begin with.
    """

    def __init__(self, url: str, topic: Topic, clock: Clock) -> None:
        # By the clock that was given, since others tell from it how old the name is.
        self.address: Final = IdFactory(clock)().hex()
        self._url: Final = url
        self._topic: Final = topic
        self._clock: Final = clock
        self._subscription: Subscription | None = None
        self._stopping: Final = asyncio.Event()
        self._outage: Final = Outage(
            "no replies can be received", logger=_logger, stopping=self._stopping, clock=clock
        )

    @classmethod
    async def open(cls, url: str, clock: Clock) -> Self:
        """Open the reply topic and a subscription of it, whose position is fixed then."""
        topic = await open_topic(url, clock=clock)
        try:
            inbox = cls(url, topic, clock)
            inbox._subscription = await inbox._subscribe()
        except BaseException:
            await topic.close()
            raise
        return inbox

    async def run(self, take: Callable[[Delivery], Awaitable[None]]) -> None:
        """Hand over replies until ``stop``, also after the subscription was removed."""
        while not self._stopping.is_set():
            try:
                if self._subscription is None:
                    self._subscription = await self._subscribe()
                    self._outage.over()
                    if self._stopping.is_set():  # meanwhile, when there was nothing to stop
                        return
                await self._subscription.run(take, concurrency=_TAKEN_AT_ONCE)
            except NotFoundError as error:
                # This process stood still for so long that others took it for dead.
                _logger.warning("replies may be missing, it is subscribed anew: %s", error)
                with contextlib.suppress(MessagingError):  # there is nothing left to give back
                    await self._unsubscribe()
            except BrokenBrokerError:
                raise  # passes only with this process
            except UnavailableError as error:
                await self._outage.wait(error)

    def stop(self) -> None:
        """End ``run``."""
        self._stopping.set()
        if self._subscription is not None:
            self._subscription.stop()

    async def keep_tidy(self) -> None:
        """Remove what killed requesters leave, until cancelled.

        Beside the asking: some brokers take seconds to tell who lives.
        """
        while True:
            living = await self._tidy()
            await self._clock.sleep(_SWEEP * max(1, living))

    async def close(self) -> None:
        """Remove the subscription and release the broker."""
        try:
            await self._unsubscribe()
            await self._topic.remove_subscription(_PREFIX + self.address)
        except MessagingError as error:
            _logger.warning("%r: another requester has to tidy up: %s", self._topic, error)
        finally:
            await self._topic.close()

    async def _tidy(self) -> int:
        """Remove the subscriptions of requesters that died; return how many live."""
        living = 0
        try:
            stat = await self._topic.stat()
            for name in stat.subscriptions if stat is not None else ():
                if not self._is_old(name):
                    living += name.startswith(_PREFIX)
                    continue
                try:
                    if await self._topic.remove_subscription(name):
                        _logger.info("%r: removed %s, whose requester died", self._topic, name)
                except InUseError:
                    living += 1
        except MessagingError as error:
            _logger.warning("what killed requesters left was not looked for: %s", error)
        return living

    async def _subscribe(self) -> Subscription:
        named = {"subscription": _PREFIX + self.address}
        url = BrokerURL.parse(self._url)
        if "expires" in getattr(load_driver(url), "TOPIC_OPTIONS", ()):
            # Such a broker keeps what is sent while nobody is subscribed, until somebody is who
            # begins with it: replies that nobody waits for, which are passed over then.
            if "expires" not in url.options:
                named["expires"] = str(_EXPIRES)
        elif "latest" in self._topic.capabilities.starts:
            named["start"] = "latest"
        return await open_subscription(with_options(self._url, **named), clock=self._clock)

    async def _unsubscribe(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.close()

    def _is_old(self, name: str) -> bool:
        """Tell whether this is a requester's subscription, and was not made just now."""
        address = name.removeprefix(_PREFIX)
        if address in (name, self.address):
            return False
        try:
            # The first 48 bits of a time-ordered id: milliseconds (RFC 9562, UUID version 7).
            made_ms = int(address[:12], 16)
        except ValueError:
            return False
        # Made in the future by as much, it is of a machine whose clock was wrong.
        return abs(self._clock.now_us() // 1_000 - made_ms) > _GRACE * 1_000
