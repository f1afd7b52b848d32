"""The sending side: what topics and queues have in common."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, final

from molva._base.ids import ID_BYTES
from molva._base.waiting import first_of, is_being_cancelled
from molva.messaging._batching import Batcher
from molva.messaging._opened import Opened
from molva.messaging.driver import Capabilities, HasDearCalls, Outcome, TellsRoom
from molva.messaging.errors import (
    MessageTooLargeError,
    MessagingError,
    QueueFullError,
    SendManyError,
    UnavailableError,
    UnsupportedFeatureError,
)
from molva.messaging.message import Message
from molva.messaging.url import drivers_with

__all__ = ["SendCounters", "Sending"]

# Messages that may wait in this process for the call under way. At 50,000 messages a
# second this is a fifth of a second's worth: more would only wait longer, and a broker that
# has stopped must not fill our memory.
_MAX_WAITING: Final = 10_000

# Messages that travel in one call. Larger batches gain nothing measurable on SQLite, and
# hold up whoever comes next.
_MAX_BATCH: Final = 1_000

# Seconds between two looks whether a full queue has room (``overflow=wait``), where the
# driver cannot tell: the first time, and at most. Longer, and a consumer that made room
# waits for the sender; shorter, and a sender that waits for hours keeps the broker busy.
_FIRST_PAUSE: Final = 0.002
_LONGEST_PAUSE: Final = 0.05

# Seconds that a driver which tells is waited for before it is asked anew. Drivers wake at
# once; this bounds nothing that a user sees.
_ROOM_WAIT: Final = 60.0


@final
@dataclass(slots=True)
class SendCounters:
    """What a topic or queue has sent since it was opened; numbers only ever grow.

    ``stored``, ``refused_full``, ``dropped`` (``overflow=drop-newest``) and ``failed``
    count messages, ``batches`` the driver's calls and ``busy_seconds`` the time spent in
    them.
    """

    stored: int = 0
    refused_full: int = 0
    dropped: int = 0
    failed: int = 0
    batches: int = 0
    busy_seconds: float = 0.0


class _SendingDriver(Protocol):
    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def capacity(self) -> int | None: ...

    async def send_batch(
        self, messages: Sequence[Message]
    ) -> Sequence[Outcome | MessagingError]: ...


class Sending(Opened):
    """Checks messages, collects them into batches, and says what became of each."""

    def _begin_sending(self, driver: _SendingDriver) -> None:
        self._sends_to = driver
        self._overflow = self._url.overflow
        capabilities = driver.capabilities
        self._max_body_bytes = capabilities.max_body_bytes
        self._delays = capabilities.delay
        self._priorities = self._url.discipline == "priority"
        self._sends = Batcher(
            self._send_batch,
            max_items=_MAX_BATCH,
            linger=self._url.linger,
            dear=driver.dear_calls if isinstance(driver, HasDearCalls) else None,
            give_up=self._give_up,
            clock=self._clock,
        )
        self._tells_room = driver if isinstance(driver, TellsRoom) else None
        # Set when nobody may wait for room any more.
        self._ending = asyncio.Event()
        self.counters = SendCounters()

    async def _end_sending(self) -> None:
        """Store what was sent; what waits for room is refused."""
        self._ending.set()
        await self._sends.drain()

    @property
    def capacity(self) -> int | None:
        """How many messages may wait; None where nothing bounds them."""
        return self._sends_to.capacity

    @property
    def sending(self) -> bool:
        """Whether something was sent that has no answer of the broker yet."""
        return self._sends.busy

    @property
    def sending_seconds(self) -> float:
        """How long the call to the broker under way has taken so far; 0 where none is."""
        return self._sends.call_seconds

    async def give_up(self) -> int:
        """Stop waiting for a broker that does not answer; return how many messages that are.

        Every send under way raises UnavailableError now, in the order in which they were
        sent: what was in the call under way may be stored, what waited behind it is not. The
        call goes on to its own end, and what is sent from now on waits behind it.
        """
        given_up = UnavailableError(
            f"{self._url}: no answer for {self.sending_seconds:.1f} s; whether it was stored is "
            "unknown"
        )
        self.counters.failed += self._sends.waiting
        return self._sends.fail(given_up)

    async def send(self, message: Message) -> None:
        """Store one message. When this returns, it outlives ``capabilities.survives``.

        Any number of tasks may send at once: what is sent while a call to the broker is
        under way travels together in the next one. Cancelling leaves open whether the
        message is stored; sending it again with the same id lets the consumer tell.

        Raises:
            QueueFullError: There is no room; the message was not stored.
            MessageTooLargeError: The body is larger than the broker takes.
            UnsupportedFeatureError: The message has a priority or a delay that the broker
                would not heed.
            UnavailableError: The broker cannot store now; whether it did is unknown.
            ClosedError: It was closed.
        """
        self._check(message)
        if self._tracing is not None or self._overflow != "reject":
            await self._send_otherwise(message)
            return
        outcome = await self._sends.submit(message)
        if outcome is not Outcome.STORED:
            raise self._full()

    async def send_many(self, messages: Iterable[Message]) -> None:
        """Store many messages, in their order; faster than one at a time.

        Raises:
            SendManyError: Some were not stored, all others were; ``failures`` tells which
                and why. A body that is too large fails alone.
            ClosedError: It was closed; nothing was stored.
        """
        every: Sequence[Message] = list(messages)
        failures: dict[int, MessagingError] = {}
        for place, message in enumerate(every):
            try:
                self._check(message, queueing=False)
            except (MessageTooLargeError, UnsupportedFeatureError) as error:
                failures[place] = error
        if self._tracing is not None and every:
            every, finish = self._tracing.sending(self._place, every)
            try:
                await self._send_all(every, failures)
            except BaseException as error:
                finish(error)
                raise
            finish(None)
        else:
            await self._send_all(every, failures)

    async def _send_all(
        self, every: Sequence[Message], failures: dict[int, MessagingError]
    ) -> None:
        good = [m for place, m in enumerate(every) if place not in failures] if failures else every
        try:
            results = await self._sends.submit_many(good)
        except asyncio.CancelledError:
            self._note_cancelled()
            raise
        if not failures and results.count(Outcome.STORED) == len(every):
            return
        places = [place for place in range(len(every)) if place not in failures]
        for place, result in zip(places, results, strict=True):
            if isinstance(result, MessagingError):
                failures[place] = result
            elif isinstance(result, BaseException):
                raise result
            elif result is Outcome.FULL:
                failures[place] = self._full()
        if failures:
            raise SendManyError(dict(sorted(failures.items())), len(every))

    async def _send_otherwise(self, message: Message) -> None:
        """Send with a tracer, or where a full queue is more than a refusal."""
        finish = None
        if self._tracing is not None:
            [message], finish = self._tracing.sending(self._place, [message])
        try:
            if await self._sends.submit(message) is Outcome.FULL:
                raise self._full()
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                self._note_cancelled()
            if finish is not None:
                finish(error)
            raise
        if finish is not None:
            finish(None)

    def _note_cancelled(self) -> None:
        # Who gives up waiting for room, perhaps again and again, leaves nothing behind.
        if self._overflow == "wait":
            self._sends.drop_cancelled()

    def _check(self, message: Message, *, queueing: bool = True) -> None:
        if self._closed:
            self._check_open()
        key = message.key
        if (
            type(message.body) is not bytes
            or type(message.id) is not bytes
            or len(message.id) != ID_BYTES
            or (key is not None and not (type(key) is str and key.isascii()))
            or message.headers
            or message.priority
            or message.delay
            or message.ttl is not None
        ):
            # Not plainly right; the long way round says what is wrong, if anything is.
            message.check()
            self._check_supported(message)
        if len(message.body) > self._max_body_bytes:
            raise MessageTooLargeError(len(message.body), self._max_body_bytes)
        # With overflow=wait each sender holds its message anyway, here or there.
        if queueing and self._sends.waiting >= _MAX_WAITING and self._overflow != "wait":
            self.counters.refused_full += 1
            raise QueueFullError(_MAX_WAITING)

    def _check_supported(self, message: Message) -> None:
        """Refuse what this broker would silently ignore."""
        if message.priority and not self._priorities:
            raise UnsupportedFeatureError(
                f"{self._url}: a message with priority={message.priority} was refused, because "
                "nobody would heed it: open a queue with discipline=priority",
                feature="priority",
                drivers=drivers_with("priority", "queue"),
            )
        if message.delay and not self._delays:
            raise UnsupportedFeatureError(
                f"{self._url}: a message with delay={message.delay} was refused: a {self._kind} "
                "there hands over at once",
                feature="delay",
                drivers=drivers_with("delay", self._kind),
            )

    def _full(self) -> QueueFullError:
        return QueueFullError(self._sends_to.capacity or 0)

    async def _send_batch(self, messages: list[Message]) -> Sequence[Outcome | MessagingError]:
        counters = self.counters
        started = self._clock.monotonic()
        try:
            outcomes = await self._sends_to.send_batch(messages)
            if self._overflow != "reject" and Outcome.FULL in outcomes:
                outcomes = await self._overflowing(messages, outcomes)
        except MessagingError:
            counters.failed += len(messages)
            raise
        except (Exception, asyncio.CancelledError) as error:
            counters.failed += len(messages)
            if isinstance(error, asyncio.CancelledError) and is_being_cancelled():
                raise
            problem = str(error) or "the connection was closed"
            raise UnavailableError(f"{self._url}: {problem}") from error
        finally:
            counters.batches += 1
            counters.busy_seconds += self._clock.monotonic() - started
        stored = outcomes.count(Outcome.STORED)
        counters.stored += stored
        if stored < len(outcomes):
            full, dropped = outcomes.count(Outcome.FULL), outcomes.count(Outcome.DROPPED)
            counters.refused_full += full
            counters.dropped += dropped
            counters.failed += len(outcomes) - stored - full - dropped
        return outcomes

    def _give_up(
        self, results: Sequence[Outcome | MessagingError | BaseException]
    ) -> BaseException | None:
        """Return what fails the messages that piled up behind a call that took long.

        Where the broker has not answered for as long as it is given, what waited behind that
        call has waited nearly as long. Its senders are told now: in a call of its own it
        would wait the same time again, and twice what a caller was promised. One message
        that met this is enough: others of the call were stored before the broker went.
        """
        for result in results:
            if isinstance(result, UnavailableError):
                self.counters.failed += self._sends.waiting
                return result
        return None

    async def _overflowing(
        self, messages: list[Message], found: Sequence[Outcome | MessagingError]
    ) -> list[Outcome | MessagingError]:
        """Decide about what did not fit."""
        outcomes = list(found)
        if self._overflow == "drop-newest":
            return [Outcome.DROPPED if o is Outcome.FULL else o for o in outcomes]
        pause = _FIRST_PAUSE
        while self._overflow == "wait" and Outcome.FULL in outcomes and not self._closed:
            if not await self._wait_for_room(pause):
                continue
            pause = min(2 * pause, _LONGEST_PAUSE)
            gone = self._sends.abandoned()
            places = [at for at, o in enumerate(outcomes) if o is Outcome.FULL and at not in gone]
            if not places:
                break
            found = await self._sends_to.send_batch([messages[at] for at in places])
            for at, outcome in zip(places, found, strict=True):
                outcomes[at] = outcome
            if found[0] is Outcome.STORED:
                pause = _FIRST_PAUSE
        return outcomes

    async def _wait_for_room(self, pause: float) -> bool:
        """Return whether to try again, as soon as there may be room or it was closed."""
        if self._tells_room is None:
            await first_of(self._clock.sleep(pause), self._ending.wait())
            return True
        waiting = asyncio.ensure_future(self._tells_room.wait_for_room(wait=_ROOM_WAIT))
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait((waiting, ending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            ending.cancel()
            await asyncio.wait((waiting, ending))
        return waiting.cancelled() or waiting.result()
