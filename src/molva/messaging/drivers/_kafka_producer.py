"""Producing: librdkafka does the work, one thread waits for its reports.

``produce`` only enqueues, so it is called straight from the loop. A thread polls for the
delivery reports, each of which counts its batch down; the last one of a batch wakes whoever
waits for it, with one call into the loop for all batches that ended in one poll.

confluent-kafka's own asyncio producer was rejected: it cannot send headers, and a lone
message waits for its timer.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, final

from confluent_kafka import KafkaError, KafkaException, Producer

from molva.messaging.drivers._kafka_records import PlainRecord

__all__ = ["Publisher"]

# Seconds that the polling thread waits for a report at a time: how long it outlives a close.
_POLL: Final = 0.25
# Seconds that closing waits for what is under way.
_CLOSE: Final = 3.0


@final
class _Batch:
    """What became of the records of one ``publish``: None for each that was stored."""

    __slots__ = ("future", "produced", "reported", "results")

    def __init__(self, size: int, future: "asyncio.Future[None]") -> None:
        self.results: list[KafkaError | None] = [None] * size
        self.future = future
        # Written by the loop once, by the polling thread only. Each looks at the other's
        # after having written its own, so the batch's end is never missed.
        self.produced: int | None = None
        self.reported = 0


@final
class Publisher:
    """Stores records, and says for each whether it was stored.

    A producer that met a fatal error is replaced by a new one at the next ``publish``.

    Args:
        config: librdkafka's settings of the producer.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._polled: _Polled | None = None
        # Set when something was reported, for a publish that waits for room.
        self._freed = asyncio.Event()
        self._closed = False

    async def publish(self, records: Sequence[PlainRecord]) -> list[KafkaError | None]:
        """Store records in their order; return None or an error for each.

        Raises:
            KafkaException: No producer could be made.
        """
        polled = self._polled
        if polled is None or polled.broken:
            if polled is not None:
                polled.stop()
            polled = self._polled = _Polled(self._config, self._loop, self._freed.set)
        batch = _Batch(len(records), self._loop.create_future())
        # As Any: its own types want headers that may also be text, in a list, which is invariant.
        produce: Any = polled.producer.produce
        report = polled.report
        failed = 0
        for place, (topic, key, value, headers) in enumerate(records):
            while True:
                try:
                    produce(
                        topic,
                        value,
                        key,
                        headers=headers,
                        on_delivery=partial(report, batch, place),
                    )
                except BufferError:
                    # Back-pressure: librdkafka holds as much as it may.
                    self._freed.clear()
                    if not polled.broken:
                        await self._freed.wait()
                        continue
                    batch.results[place] = KafkaError(KafkaError._FATAL)
                    failed += 1
                except KafkaException as error:
                    batch.results[place] = error.args[0]
                    polled.note(error.args[0])
                    failed += 1
                break
        batch.produced = len(records) - failed
        if batch.reported < batch.produced:
            await batch.future
        return batch.results

    async def close(self) -> None:
        """Wait a while for what is under way, then let go. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._polled is not None:
            if len(self._polled.producer):
                await asyncio.to_thread(self._polled.producer.flush, _CLOSE)
            self._polled.stop()


@final
class _Polled:
    """A producer, and the thread that polls it."""

    def __init__(
        self, config: dict[str, Any], loop: asyncio.AbstractEventLoop, freed: Callable[[], None]
    ) -> None:
        self.broken = False
        self._loop = loop
        self._freed = freed
        self._ended: list[_Batch] = []
        self._stop = False
        self.producer = Producer({**config, "error_cb": self.note})
        threading.Thread(target=self._poll, name="molva-kafka-reports", daemon=True).start()

    def report(self, batch: _Batch, place: int, error: KafkaError | None, _: object) -> None:
        """Take note of what became of one record. Called by the polling thread."""
        if error is not None:
            batch.results[place] = error
            self.note(error)
        batch.reported = reported = batch.reported + 1
        if reported == batch.produced:
            self._ended.append(batch)

    def note(self, error: KafkaError) -> None:
        """Take note of an error: after a fatal one, this producer stores nothing more."""
        if error.fatal() or error.code() == KafkaError._FATAL:
            self.broken = True

    def stop(self) -> None:
        """Let the thread end, and the producer with it."""
        self._stop = True

    def _poll(self) -> None:
        producer = self.producer
        while not self._stop:
            if producer.poll(_POLL) and not self._tell():
                return
        # What is still under way was given up: its reports say so, and end the waiting.
        producer.purge()
        producer.poll(0)
        self._tell()

    def _tell(self) -> bool:
        ended, self._ended = self._ended, []
        try:
            self._loop.call_soon_threadsafe(self._hand_over, ended)
        except RuntimeError:
            return False  # the loop was closed, and nobody waits any more
        return True

    def _hand_over(self, ended: list[_Batch]) -> None:
        self._freed()
        for batch in ended:
            if not batch.future.done():
                batch.future.set_result(None)
