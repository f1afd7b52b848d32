"""Consuming: one thread that polls, whatever the loop is doing.

librdkafka wants to be polled, or its consumer is taken for dead; and its callbacks for
lanes that come and go must not return before that is done. So a thread of its own polls,
hands records over many at a time, and asks the loop what to commit when lanes go. A handler
that blocks the loop for minutes then costs no membership.

What it tells waits in one line, in order, records among it. The loop is called to hear it,
and who receives while there is plenty hears it without that, and without going to sleep.

Nothing is lost that is "on the way" into the loop: a record counts as read only once the
loop has noted it, and only what was settled is ever committed.

Back-pressure has two steps. Where the loop holds enough, the thread stops taking, for a
moment: librdkafka goes on keeping what it has fetched. Where that takes longer, the loop
pauses what is full, and the thread goes on polling; to resume then costs a fetch.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol, final

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

__all__ = ["FENCED", "Poller", "PollerEvents", "Position"]

_logger: Final = logging.getLogger("molva.messaging")

# Records that are handed over at a time. Fewer, and each costs a larger share of a call into
# the loop; more, and the loop is held up while it notes them.
_BATCH: Final = 1_000
# Seconds that the thread waits for a record at a time. It wakes at once when one comes, but
# not for what the loop asks of it, and confluent-kafka lets one thread at a time use a
# consumer. So it waits briefly while something happens, when an answer is likely to be
# wanted soon, and longer and longer while nothing does: how long closing an idle one takes.
_SHORTEST_POLL: Final = 0.001
_LONGEST_POLL: Final = 0.05
# Seconds for which the thread stops taking before the loop is asked to pause what is full.
_FULL: Final = 0.2
_FULL_WAIT: Final = 0.005
# Records that may wait for the loop to hear of them. Fewer, and a busy loop runs dry; more,
# and one that stands still, and so pauses nothing, fills our memory.
_MOST_UNHEARD: Final = 5_000
# Seconds that the brokers have for an answer about positions.
_ANSWER: Final = 10.0

# What Kafka answers to who was taken for dead: it must forget all that it holds.
FENCED: Final = frozenset(
    {
        # Not ILLEGAL_GENERATION: a commit that crosses a rebalance gets it too, and then the
        # lanes that stay are still ours.
        KafkaError.UNKNOWN_MEMBER_ID,
        KafkaError.FENCED_INSTANCE_ID,
    }
)

# (topic, partition, next offset, metadata)
Position = tuple[str, int, int, str]


class PollerEvents(Protocol):
    """What the thread tells the loop. All of it runs in the loop."""

    def on_records(self, records: list[Any]) -> None:
        """Records were read."""
        ...

    def on_owned(self, positions: Sequence[Position]) -> None:
        """Partitions are ours now, from where they were committed; -1: from the beginning."""
        ...

    async def on_leaving(self, partitions: Sequence[tuple[str, int]]) -> list[Position]:
        """Partitions are about to go; end what is under way, return what to commit."""
        ...

    def on_lost(self, partitions: Sequence[tuple[str, int]]) -> None:
        """Partitions are somebody else's already."""
        ...

    def on_full(self) -> None:
        """There has been no room for a while: pause what is full."""
        ...

    def on_error(self, error: KafkaError) -> None:
        """Something went wrong, perhaps for a moment only."""
        ...


@final
class Poller:
    """A consumer, and the thread that polls it.

    Args:
        config: librdkafka's settings of the consumer.
        topics: What to consume.
        grace: Seconds that ``on_leaving`` may take.
        events: Who is told.
    """

    def __init__(
        self, config: dict[str, Any], topics: Sequence[str], *, grace: float, events: PollerEvents
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._events = events
        self._topics = list(topics)
        self._grace = grace
        # Cleared while the loop has no room.
        self.room: Final = threading.Event()
        self.room.set()
        # Whether this process stood still for longer than a session lasts: others may have
        # been given what it holds. Whoever has found out sets it back.
        self._still = False
        self._session = config["session.timeout.ms"] / 1_000
        # When the thread last went round; None while it waits for an answer.
        self._seen_at: float | None = time.monotonic()
        # Done when the consumer has joined its group, or could not.
        self.joined: Final[asyncio.Future[None]] = self._loop.create_future()
        self._closed = False
        self._ended: asyncio.Future[None] = self._loop.create_future()
        # What the thread has told and the loop has not heard, in order; and whether the
        # loop was called to hear it.
        self._told: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._called = False
        # Records told of, counted by the thread; records heard of, counted by the loop.
        self._records_told = 0
        self._records_heard = 0
        # What the loop wants done, by the thread.
        self._asked: deque[Callable[[], object]] = deque()
        self._committing: tuple[dict[tuple[str, int], int], asyncio.Future[None]] | None = None
        self._consumer = Consumer(
            {**config, "on_commit": self._on_commit, "error_cb": self._on_error}
        )
        self._thread = threading.Thread(target=self._run, name="molva-kafka-polls", daemon=True)
        self._thread.start()

    @property
    def stood_still(self) -> bool:
        """Whether this process stood still for longer than a session lasts."""
        seen_at = self._seen_at
        return self._still or (seen_at is not None and time.monotonic() - seen_at > self._session)

    @stood_still.setter
    def stood_still(self, still: bool) -> None:
        self._still = still

    async def commit(self, positions: Sequence[Position], *, timeout: float) -> None:
        """Write positions down, one call at a time.

        Raises:
            KafkaException: They were not, or in part.
            TimeoutError: No answer came.
        """
        expected = {(topic, partition): offset for topic, partition, offset, _ in positions}
        answered = self._loop.create_future()
        self._committing = (expected, answered)
        offsets = list(map(_at, positions))
        consumer = self._consumer

        def commit() -> None:
            try:
                consumer.commit(offsets=offsets, asynchronous=True)
            except KafkaException as error:
                self._post(_answer, answered, error.args[0])

        self._asked.append(commit)
        try:
            async with asyncio.timeout(timeout):
                await answered
        finally:
            self._committing = None

    def pause(self, partitions: Sequence[tuple[str, int]]) -> None:
        """Read nothing more of these."""
        self._asked.append(partial(self._toggle, self._consumer.pause, partitions))

    def resume(self, partitions: Sequence[tuple[str, int]]) -> None:
        """Go on reading these."""
        self._asked.append(partial(self._toggle, self._consumer.resume, partitions))

    async def seek(self, positions: Sequence[Position]) -> None:
        """Go on reading from these positions; nothing that was read before comes after this."""
        sought: asyncio.Future[None] = self._loop.create_future()

        def seek() -> None:
            try:
                for position in positions:
                    self._consumer.seek(_at(position))
            except KafkaException as error:
                self._post(_answer, sought, error.args[0])
            else:
                self._post(_answer, sought, None)

        self._asked.append(seek)
        await sought

    async def close(self, *, timeout: float) -> None:
        """Leave the group; what is not committed goes to others at once."""
        self._closed = True
        self.room.set()
        await asyncio.wait([self._ended], timeout=timeout)

    def hear(self) -> None:
        """Take note of what the thread has told: the loop does so by itself, but later."""
        told = self._told
        while told:
            call, values = told.popleft()
            call(*values)

    def _hear_called(self) -> None:
        # Set back first: what is told from now on calls again.
        self._called = False
        self.hear()

    def _hear_of(self, records: list[Any]) -> None:
        self._records_heard += len(records)
        self._events.on_records(records)

    async def _leaving(self, partitions: Sequence[tuple[str, int]]) -> list[Position]:
        self.hear()
        return await self._events.on_leaving(partitions)

    # In the thread ----------------------------------------------------------------------

    def _run(self) -> None:
        consumer = self._consumer
        try:
            consumer.subscribe(
                self._topics,
                on_assign=self._on_assign,
                on_revoke=self._on_revoke,
                on_lost=self._on_lost,
            )
            poll = _SHORTEST_POLL
            full_since: float | None = None
            while not self._closed:
                now = time.monotonic()
                if self._seen_at is not None and now - self._seen_at > self._session:
                    self._still = True
                self._seen_at = now
                while self._asked:
                    self._asked.popleft()()
                    poll = _SHORTEST_POLL
                most = _BATCH
                if self._has_room(0 if full_since is None else _FULL_WAIT):
                    if full_since is not None:
                        full_since = None
                        continue  # there is room because of a pause: that comes first
                else:
                    full_since = full_since or now
                    if now - full_since >= _FULL:
                        if not self._post(self._events.on_full):
                            return
                        full_since, most = None, 0
                    elif self._committing is None:
                        continue
                    else:
                        # What there is no room for may wait for this very commit: lanes are
                        # counted before anything of them is handed over. And librdkafka
                        # tells its answer only to who takes records.
                        most = 1
                # Where there is plenty, one call: each may have to wait for the interpreter
                # as long as its switch interval lasts.
                records = consumer.consume(most, 0.0) if most else []
                if not records:
                    first = consumer.poll(poll)
                    if first is None:
                        poll = min(2 * poll, _LONGEST_POLL)
                        continue
                    records = [first]
                poll = _SHORTEST_POLL
                if not self._hand_over(records):
                    return
        except Exception:
            _logger.exception("a Kafka consumer's thread ended; open the subscription anew")
        finally:
            consumer.close()
            self._post(_resolve, self._ended)

    def _has_room(self, wait: float) -> bool:
        """Return whether the loop takes more records; wait so many seconds for it."""
        if self._records_told - self._records_heard < _MOST_UNHEARD:
            return self.room.wait(wait)
        time.sleep(wait)
        return False

    def _hand_over(self, records: list[Any]) -> bool:
        """Hand records over, and errors among them; return whether there is a loop."""
        if any(map(Message.error, records)):
            for error in filter(None, map(Message.error, records)):
                self._on_error(error)
            records = [record for record in records if record.error() is None]
        self._records_told += len(records)
        return self._post(self._hear_of, records)

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._seen_at = None
        found = self._committed(consumer, partitions)
        if found is None:
            return  # closed meanwhile
        positions = [
            (at.topic, at.partition, max(-1, at.offset), at.metadata or "") for at in found
        ]
        self._post(self._events.on_owned, positions)
        consumer.incremental_assign(
            [TopicPartition(t, p, offset if offset >= 0 else -2) for t, p, offset, _ in positions]
        )
        self._post(_resolve, self.joined)

    def _committed(
        self, consumer: Consumer, partitions: list[TopicPartition]
    ) -> list[TopicPartition] | None:
        """Return where partitions were committed; ask until it is known, or we are closed."""
        if not partitions:
            return []
        while not self._closed:
            try:
                return consumer.committed(partitions, timeout=_ANSWER)
            except KafkaException as error:
                self._on_error(error.args[0])
                time.sleep(_LONGEST_POLL)
        return None

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if self._closed:
            return  # what there was to commit was committed before
        self._seen_at = None
        names = [(at.topic, at.partition) for at in partitions]
        leaving = self._leaving(names)
        try:
            asked = asyncio.run_coroutine_threadsafe(leaving, self._loop)
        except RuntimeError:
            leaving.close()
            return  # the loop was closed: others begin where we last committed
        try:
            positions = asked.result(self._grace + 5.0)
        except Exception:
            # The loop is stuck. It forgets these when it goes on; nothing was committed for
            # them, so what it holds comes again.
            _logger.exception("lanes go before it was known what of them is settled")
            self._post(self._events.on_lost, names)
            return
        if positions:
            try:
                consumer.commit(offsets=list(map(_at, positions)), asynchronous=False)
            except KafkaException as error:
                _logger.warning("positions are not committed, messages repeat: %s", error)

    def _on_lost(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        self._post(self._events.on_lost, [(at.topic, at.partition) for at in partitions])

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        committing = self._committing
        if committing is None:
            return
        expected, answered = committing
        if {(at.topic, at.partition): at.offset for at in partitions} != expected:
            return  # an earlier one, which nobody waits for any more
        failed = error or next((at.error for at in partitions if at.error is not None), None)
        self._post(_answer, answered, failed)

    def _on_error(self, error: KafkaError) -> None:
        self._post(self._events.on_error, error)

    def _post(self, call: Callable[..., object], *values: object) -> bool:
        """Let the loop run ``call``; return whether there is a loop."""
        self._told.append((call, values))
        if not self._called:
            self._called = True
            try:
                self._loop.call_soon_threadsafe(self._hear_called)
            except RuntimeError:
                return False
        return True

    @staticmethod
    def _toggle(
        toggle: Callable[[list[TopicPartition]], None], partitions: Sequence[tuple[str, int]]
    ) -> None:
        try:
            toggle([TopicPartition(topic, partition) for topic, partition in partitions])
        except KafkaException:
            return  # they went meanwhile


def _at(position: Position) -> TopicPartition:
    topic, partition, offset, metadata = position
    return TopicPartition(topic, partition, offset, metadata)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _answer(answered: "asyncio.Future[None]", failed: KafkaError | None) -> None:
    if answered.done():
        return
    if failed is None:
        answered.set_result(None)
    else:
        answered.set_exception(KafkaException(failed))
