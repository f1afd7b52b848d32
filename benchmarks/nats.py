"""Molva on JetStream against raw nats-py, on a server that syncs every write."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, StorageType
from nats.js.errors import BadRequestError
from tests.brokers import private_nats

from benchmarks.brokers import IN_FLIGHT, against_raw
from molva.messaging import Message, with_options

__all__ = ["nats"]


def nats() -> None:
    """Measure sending and receiving."""
    with private_nats() as server:
        against_raw(
            "nats",
            "Messaging on JetStream against raw nats-py",
            with_options(server.url, sync="always"),
            _Raw(server.url),
            lambda: f"bench-{uuid.uuid4().hex[:8]}",
            beyond=("batches by hand", _ByHand(server.url)),
        )


class _Raw:
    """nats-py in one asyncio process: ``publish_async`` in flight; ``fetch``, then an ack of each.

    Each message has its id in ``Nats-Msg-Id``, without which a send that is tried again is a
    second message, and its key in a header. Receiving, it takes up to a thousand, takes id, body
    and key of each in hand, acknowledges them and waits for the answer to the last. That asks
    nobody whether they are still its own.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def send(self, topic: str, messages: list[Message]) -> float:
        async def work(client: Client) -> float:
            streams = await _stream(client, topic)
            started = time.perf_counter()
            answers: list[asyncio.Future[Any]] = []
            for message in messages:
                answers.append(
                    await streams.publish_async(topic, message.body, headers=_headers(message))
                )
            for answer in answers:
                await answer
            return len(messages) / (time.perf_counter() - started)

        return self._run(work)

    def send_one_by_one(self, topic: str, messages: list[Message]) -> float:
        async def work(client: Client) -> float:
            streams = await _stream(client, topic)
            started = time.perf_counter()
            for message in messages:
                await streams.publish(topic, message.body, headers=_headers(message))
            return len(messages) / (time.perf_counter() - started)

        return self._run(work)

    def receive(self, topic: str, number: int) -> float:
        async def work(client: Client) -> float:
            streams = client.jetstream()
            config = ConsumerConfig(ack_policy=AckPolicy.EXPLICIT, max_ack_pending=1_000_000)
            await streams.add_consumer(topic, config, durable_name="g")
            taken = await streams.pull_subscribe_bind("g", stream=topic)
            first = await _settle_batch(await taken.fetch(1_000, timeout=5))
            started = time.perf_counter()
            left = number - first
            while left > 0:
                left -= await _settle_batch(await taken.fetch(1_000, timeout=5))
            return (number - first) / (time.perf_counter() - started)

        return self._run(work)

    def _run(self, work: Callable[[Client], Awaitable[float]]) -> float:
        async def run() -> float:
            client = Client()
            await client.connect(self._url)
            try:
                return await work(client)
            finally:
                await client.close()

        return asyncio.run(run())


class _ByHand(_Raw):
    """Batches that the server stores as one, which nats-py has no call for: headers by hand.

    A thousand messages each, the most that a server takes, one behind the other.
    """

    def send(self, topic: str, messages: list[Message]) -> float:
        async def work(client: Client) -> float:
            await _stream(client, topic)
            started = time.perf_counter()
            for at in range(0, len(messages), 1_000):
                batch = uuid.uuid4().hex
                *others, last = messages[at : at + 1_000]
                for place, message in enumerate(others, 1):
                    headers = _headers(message) | _part(batch, place)
                    await client.publish(topic, message.body, headers=headers)
                headers = _headers(last) | _part(batch, len(others) + 1) | {_END: "1"}
                answer = await client.request(topic, last.body, timeout=10, headers=headers)
                assert b'"count":' in answer.data, answer.data
            return len(messages) / (time.perf_counter() - started)

        return self._run(work)


_END = "Nats-Batch-Commit"


def _part(batch: str, place: int) -> dict[str, str]:
    return {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(place)}


async def _stream(client: Client, topic: str) -> JetStreamContext:
    """Make a stream set up as ours is; send a first message ahead."""
    streams = client.jetstream(publish_async_max_pending=IN_FLIGHT)
    with contextlib.suppress(BadRequestError):  # made by an earlier turn
        await streams.add_stream(
            name=topic,
            subjects=[topic],
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            allow_atomic=True,
        )
    await streams.publish(topic, b"warm-up", headers={"Nats-Msg-Id": "0", "key": ""})
    return streams


async def _settle_batch(messages: list[Msg]) -> int:
    *others, last = messages
    for message in messages:
        assert message.headers is not None
        message.data, message.headers["Nats-Msg-Id"], message.headers["key"]
    for message in others:
        await message.ack()
    await last.ack_sync(timeout=5)
    return len(messages)


def _headers(message: Message) -> dict[str, str]:
    return {"Nats-Msg-Id": message.id.hex(), "key": message.key or ""}
