"""Live totals: one poller for each campaign that somebody watches, shared by all of them.

A ledger is written by other processes, on other machines, and the cheapest thing that all
ledgers can say is the campaign's last sequence number. So while a campaign has listeners,
one task asks for that number a few times a second, and reads a total only when it moved.
The cost follows the campaigns watched, not the listeners, and is nothing where nobody
listens.

What is published is a state, not a queue: a slow listener skips what it was too slow for
and gets the newest. Nothing piles up, whatever the rate of the ratings.

A ledger that fails does not end the streams, or every page would come back at once, again
and again. Listeners are told by a ``trouble`` event, and by a ``total`` when it is over.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator
from typing import Final, NamedTuple, final

import msgspec

from molva.ratings.answers import LiveTotal
from molva.ratings.campaign import Campaign
from molva.ratings.catalog.protocol import CatalogError
from molva.ratings.ledger.protocol import LedgerError
from molva.ratings.problem import problem
from molva.ratings.service import Service

__all__ = ["Listener", "LiveTotals", "StoppingError", "TooManyListenersError"]

_logger: Final = logging.getLogger("molva.ratings")

# Seconds between two looks at a watched campaign. A person cannot tell 0.15 from at once;
# a tenth of it would cost SQLite more than the ratings do.
_POLL: Final = 0.15

# Seconds between two looks while the ledger fails.
_POLL_IN_TROUBLE: Final = 1.0

# Proxies cut a connection that is silent for 30 to 60 s, and a listener that vanished
# without a word is noticed only when something is written to it.
_HEARTBEAT: Final = 15.0

# The browser's own pause before it connects again, in milliseconds.
_HELLO: Final = b"retry: 2000\n\n"
_BEAT: Final = b": still here\n\n"


@final
class TooManyListenersError(Exception):
    """As many listen as this process serves. ``limit`` says how many."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit:,} listeners are served by this process; try again later")
        self.limit = limit


@final
class StoppingError(Exception):
    """The process is stopping: no new streams."""


class _State(NamedTuple):
    """What a channel's listeners should know: compared by identity."""

    seq: int  # the campaign's sequence number that was read, -1 in trouble
    window: int
    event: bytes


@final
class _Channel:
    """One item of a watched campaign, or all of it."""

    def __init__(self) -> None:
        self.listeners = 0
        self.state: _State | None = None
        self.reading = asyncio.Lock()


@final
class _Feed:
    """One watched campaign: its channels and what wakes their listeners."""

    def __init__(self, campaign: Campaign) -> None:
        self.name = campaign.name
        self.window = campaign.window
        self.channels: dict[str | None, _Channel] = {}
        self.beats = 0
        self.ended = False
        self.moved = asyncio.Event()
        self.poller: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Wake all who wait now; who waits next waits for the next wake."""
        moved, self.moved = self.moved, asyncio.Event()
        moved.set()

    def end(self) -> None:
        self.ended = True
        if self.poller is not None:
            self.poller.cancel()
        self.wake()


@final
class Listener:
    """One listener's place. Made by ``LiveTotals.listen``."""

    def __init__(self, live: "LiveTotals", feed: _Feed, item: str | None) -> None:
        self._live = live
        self._feed = feed
        self._item = item

    async def start(self) -> None:
        """Read the current total, unless somebody who listens has it already.

        Raises:
            LedgerError: The ledger failed; there is nothing to begin with.
        """
        channel = self._feed.channels[self._item]
        async with channel.reading:
            if channel.state is None:
                channel.state = await self._live._read(self._feed, self._item)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the current total, then every change, until ``shutdown``. After ``start``."""
        feed, channel = self._feed, self._feed.channels[self._item]
        sent: _State | None = None
        beats = feed.beats
        yield _HELLO
        while not feed.ended:
            moved = feed.moved
            if channel.state is not None and channel.state is not sent:
                sent, beats = channel.state, feed.beats
                yield sent.event
            elif feed.beats != beats:
                beats = feed.beats
                yield _BEAT
            else:
                await moved.wait()


@final
class LiveTotals:
    """Who listens to which campaign, and the tasks that feed them. Lives on one loop."""

    def __init__(self, service: Service, *, max_listeners: int) -> None:
        self._service = service
        self._max_listeners = max_listeners
        self._listeners = 0
        self._feeds: dict[str, _Feed] = {}
        self._stopping = False

    @property
    def listeners(self) -> int:
        """How many listen now."""
        return self._listeners

    @contextlib.contextmanager
    def listen(self, campaign: Campaign, item: str | None) -> Iterator[Listener]:
        """Hold a listener's place for the length of the block.

        Raises:
            TooManyListenersError: All places are taken.
            StoppingError: After ``shutdown``.
        """
        if self._stopping:
            raise StoppingError("the service is stopping")
        if self._listeners >= self._max_listeners:
            raise TooManyListenersError(self._max_listeners)
        feed = self._feeds.get(campaign.name)
        if feed is None:
            feed = self._feeds[campaign.name] = _Feed(campaign)
            feed.poller = asyncio.create_task(self._poll(feed), name=f"live {campaign.name}")
            feed.poller.add_done_callback(lambda task: self._poller_ended(feed, task))
        channel = feed.channels.setdefault(item, _Channel())
        channel.listeners += 1
        self._listeners += 1
        try:
            yield Listener(self, feed, item)
        finally:
            self._listeners -= 1
            channel.listeners -= 1
            if not channel.listeners:
                del feed.channels[item]
            if not feed.channels:
                self._drop(feed)

    def shutdown(self) -> None:
        """End all streams and accept no new ones. Returns at once; idempotent."""
        self._stopping = True
        for feed in list(self._feeds.values()):
            self._drop(feed)

    def _drop(self, feed: _Feed) -> None:
        feed.end()
        # After a poller died, another feed may stand under this name already.
        if self._feeds.get(feed.name) is feed:
            del self._feeds[feed.name]

    def _poller_ended(self, feed: _Feed, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            # A bug. The streams end, the browsers come back, a new feed starts.
            _logger.error("live totals of campaign %r ended", feed.name, exc_info=error)
            self._drop(feed)

    async def _poll(self, feed: _Feed) -> None:
        """Publish what changes, as long as the feed has listeners."""
        clock = self._service.clock
        revision: int | None = None
        beat_at = clock.monotonic() + _HEARTBEAT
        in_trouble = False
        while True:
            await clock.sleep(_POLL_IN_TROUBLE if in_trouble else _POLL)
            try:
                revision = await self._follow_catalog(feed, revision)
                await self._publish_changes(feed)
            except (LedgerError, CatalogError) as error:
                if not in_trouble:
                    _logger.warning("live totals of campaign %r: %s", feed.name, error)
                    self._publish_trouble(feed)
                in_trouble = True
            else:
                if in_trouble:
                    _logger.info("live totals of campaign %r: recovered", feed.name)
                in_trouble = False
            if clock.monotonic() >= beat_at:
                beat_at = clock.monotonic() + _HEARTBEAT
                feed.beats += 1
                feed.wake()

    async def _follow_catalog(self, feed: _Feed, revision: int | None) -> int:
        """Take over a window that was changed; return the catalog's revision."""
        newest = await self._service.catalog.revision()
        if newest != revision:
            campaign = await self._service.catalog.campaign(feed.name)
            if campaign is not None:
                feed.window = campaign.window
        return newest

    async def _publish_changes(self, feed: _Feed) -> None:
        seq = await self._service.ledger.last_seq(feed.name)
        changed = False
        # A copy: listeners come and go while the ledger is read.
        for item, channel in list(feed.channels.items()):
            async with channel.reading:
                state = channel.state
                if state is None or (state.seq, state.window) != (seq, feed.window):
                    channel.state = await self._read(feed, item)
                    changed = True
        if changed:
            feed.wake()

    async def _read(self, feed: _Feed, item: str | None) -> _State:
        ledger, window = self._service.ledger, feed.window
        # In this order: a rating between the two is in the total and not yet in the
        # number, so the next poll can only read once too often, never too seldom.
        seq = await ledger.last_seq(feed.name)
        total = await ledger.total(feed.name, item=item, n=window)
        if total is not None:
            seq = max(seq, total.as_of)
        return _State(seq, window, _event("total", msgspec.json.encode(LiveTotal.of(total))))

    def _publish_trouble(self, feed: _Feed) -> None:
        # What the ledger said stays in the log: it may name files and hosts.
        document = problem(500, "ledger-failed", "the total cannot be read right now")
        for channel in feed.channels.values():
            channel.state = _State(-1, feed.window, _event("trouble", document))
        feed.wake()


def _event(name: str, data: bytes) -> bytes:
    # JSON holds no raw line break, which would end the data.
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
