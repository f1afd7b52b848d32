"""Dead letters: a compacted topic of one partition for each subscription.

A dead letter is a record whose key names the message and where it stood, so that one which a
crash brings here twice is kept once. To forget it is to write a tombstone of that key, and
Kafka's compaction deletes both in time. What is dead is therefore found by reading the topic
from its beginning; what was read before is remembered (the offset of each, not its body), so
that asking again costs only what is new.
"""

import asyncio
from collections.abc import Collection, Iterable, Sequence
from typing import Final, final

from confluent_kafka import KafkaException

from molva._base.clock import Clock
from molva.messaging.driver import DeadLetter
from molva.messaging.drivers._kafka_broker import Broker, explained
from molva.messaging.drivers._kafka_producer import Publisher
from molva.messaging.drivers._kafka_records import (
    Record,
    dead_letter_of,
    record_of,
    record_of_dead,
)

__all__ = ["DEAD_SETTINGS", "RETRY_SETTINGS", "DeadLetters", "publish_all"]

# Kept for ever; a tombstone for as long as Kafka keeps one unless told otherwise: a day.
DEAD_SETTINGS: Final = {"cleanup.policy": "compact"}
# Replayed messages are few, and must not be deleted by age before they were tried.
RETRY_SETTINGS: Final = {"retention.ms": "-1", "retention.bytes": "-1"}

# Seconds after which all is read anew: well before a tombstone that we have not read is gone
# and the letter that it forgot seems to live on.
_READ_ANEW: Final = 3_600.0


async def publish_all(broker: Broker, publisher: Publisher, records: Sequence[Record]) -> None:
    """Store records; raise where one of them was not."""
    for error in await publisher.publish(records):
        if error is not None:
            raise explained(broker.url, error, broker.options) from KafkaException(error)


@final
class DeadLetters:
    """The dead letters of one subscription.

    Args:
        broker: Where they are.
        topic: The topic that holds them.
        origin: Where their messages waited.
        clock: Where time comes from.
    """

    def __init__(self, broker: Broker, topic: str, origin: str, clock: Clock) -> None:
        self._broker = broker
        self._topic = topic
        self._origin = origin
        self._clock = clock
        # Key to offset of each that is not forgotten, oldest first.
        self._living: dict[bytes, int] = {}
        self._read_to = 0
        self._read_anew_at = 0.0
        self._refreshing = asyncio.Lock()

    def records(self, letters: Iterable[tuple[str, DeadLetter]]) -> list[Record]:
        """Return the records that bury these, each with the place where it stood."""
        return [
            record_of_dead(self._topic, letter.message.id + place.encode(), letter)
            for place, letter in letters
        ]

    async def count(self) -> int:
        """Return how many there are."""
        await self._refresh()
        return len(self._living)

    async def look(self, limit: int) -> list[DeadLetter]:
        """Return up to ``limit``, oldest first."""
        return [letter for _, letter in await self._first(None, limit)]

    async def replay(
        self, publisher: Publisher, retry: str, ids: Collection[bytes] | None, limit: int
    ) -> int:
        """Store up to ``limit`` in the topic ``retry``, then forget them; return how many."""
        chosen = await self._first(ids, limit)
        if chosen:
            again = [record_of(retry, letter.message) for _, letter in chosen]
            await publish_all(self._broker, publisher, again)
            await self._forget(publisher, [key for key, _ in chosen])
        return len(chosen)

    async def purge(self, publisher: Publisher) -> int:
        """Forget all; return how many there were."""
        await self._refresh()
        keys = list(self._living)
        await self._forget(publisher, keys)
        return len(keys)

    async def _forget(self, publisher: Publisher, keys: Sequence[bytes]) -> None:
        gone = [Record(self._topic, key, None, []) for key in keys]
        await publish_all(self._broker, publisher, gone)

    async def _first(
        self, ids: Collection[bytes] | None, limit: int
    ) -> list[tuple[bytes, DeadLetter]]:
        await self._refresh()
        # A key begins with the id of its message.
        keys = [key for key in self._living if ids is None or key[:16] in ids][:limit]
        if not keys:
            return []
        offsets = {self._living[key] for key in keys}
        read = await self._broker.read({(self._topic, 0): (min(offsets), max(offsets) + 1)})
        return [
            (record.key(), dead_letter_of(record, self._origin))
            for record in read
            if record.offset() in offsets
        ]

    async def _refresh(self) -> None:
        """Read what is new."""
        async with self._refreshing:
            now = self._clock.monotonic()
            if now >= self._read_anew_at:
                self._living, self._read_to = {}, 0
                self._read_anew_at = now + _READ_ANEW
            end = (await self._broker.ends({self._topic: 1}))[self._topic, 0]
            for record in await self._broker.read({(self._topic, 0): (self._read_to, end)}):
                if record.value() is None:
                    self._living.pop(record.key(), None)
                else:
                    self._living[record.key()] = record.offset()
            self._read_to = max(end, self._read_to)
