"""Molva on Kafka against raw confluent-kafka, with the settings that lose nothing."""

import time
import uuid
from typing import Any, Final

from confluent_kafka import Consumer, Producer
from tests.brokers import private_kafka

from benchmarks.brokers import IN_FLIGHT, against_raw
from molva.messaging import Message

__all__ = ["kafka"]

# Body size to messages a turn. librdkafka fetches ahead: of fewer it has a good part before
# anybody asks, and then it is memory that is measured, not receiving.
_NUMBERS: Final = {16: 150_000, 1_024: 75_000, 65_536: 2_000}


def kafka() -> None:
    """Measure sending and receiving."""
    with private_kafka() as server:
        against_raw(
            "kafka",
            "Messaging on Kafka against raw confluent-kafka",
            server.url,
            _Raw(server.url.partition("://")[2]),
            lambda: f"bench-{uuid.uuid4().hex[:8]}",
            _NUMBERS,
        )


class _Raw:
    """confluent-kafka in one thread: produce, poll; consume, commit.

    Receiving, it is told of what is there at once, takes up to a thousand, takes value, key
    and headers (the id is one) of each in hand, and commits behind them without waiting. It
    decodes no key, checks no header, and does not know one message from the other: what fails
    is not tried again, and a commit covers all of the batch or nothing.
    """

    def __init__(self, servers: str) -> None:
        self._servers = {"bootstrap.servers": servers}

    def send(self, topic: str, messages: list[Message], in_flight: int = IN_FLIGHT) -> float:
        under_way = 0
        failed: list[object] = []

        def report(error: object, _: object) -> None:
            nonlocal under_way
            under_way -= 1
            if error is not None:
                failed.append(error)

        producer = self._producer(topic)
        started = time.perf_counter()
        for message in messages:
            while under_way >= in_flight:
                producer.poll(0.1)
            under_way += 1
            producer.produce(
                topic,
                message.body,
                message.key,
                headers=[("molva-id", message.id)],
                on_delivery=report,
            )
            producer.poll(0)
        producer.flush()
        assert not failed
        return len(messages) / (time.perf_counter() - started)

    def send_one_by_one(self, topic: str, messages: list[Message]) -> float:
        return self.send(topic, messages, in_flight=1)

    def receive(self, topic: str, number: int) -> float:
        consumer = Consumer(
            {
                **self._servers,
                "group.id": f"{topic}/s",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "partition.assignment.strategy": "cooperative-sticky",
            }
        )
        consumer.subscribe([topic])
        first_batch, started = 0, 0.0
        left = number
        while left > 0:
            # As we: what is there at once, rather than a full batch late.
            first = consumer.poll(1.0)
            if first is None:
                continue
            batch = [first, *consumer.consume(999, 0)]
            for record in batch:
                assert record.error() is None
                record.value(), record.key(), record.headers()
            consumer.commit(asynchronous=True)
            left -= len(batch)
            if not started:
                started, first_batch = time.perf_counter(), len(batch)
        found = (number - first_batch) / (time.perf_counter() - started)
        consumer.close()
        return found

    def _producer(self, topic: str) -> Producer:
        settings: dict[str, Any] = {
            **self._servers,
            "acks": "all",
            "enable.idempotence": True,
            "partitioner": "murmur2_random",
            "linger.ms": 0,
        }
        producer = Producer(settings)
        # A new idempotent producer first asks for a number, up to half a second: not measured
        # of ours, and so not of this one.
        producer.produce(topic, b"warm-up")
        producer.flush()
        return producer
