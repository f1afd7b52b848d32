"""Messages that are written to a channel as one: each answered, and the channel sound after all."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiormq
import pytest
from aiormq.channel import Channel
from aiormq.exceptions import (
    AMQPError,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    DeliveryError,
    PublishError,
)

from molva.messaging import Message
from molva.messaging.conformance import PATIENCE
from molva.messaging.drivers._amqp_batch import Batch, Parcel
from molva.messaging.drivers._amqp_messages import pack
from tests.faults.live.proxy import Proxy


@pytest.fixture
async def channel(rabbitmq_url: str) -> AsyncIterator[Channel]:
    async with aiormq.connect(rabbitmq_url) as connection:
        yield await opened(connection)


async def opened(connection: aiormq.abc.AbstractConnection) -> Channel:
    channel = await connection.channel(publisher_confirms=True)
    assert isinstance(channel, Channel)
    return channel


async def own_queue(channel: Channel, **arguments: Any) -> str:
    made = await channel.queue_declare(exclusive=True, arguments=arguments)
    assert made.queue is not None
    return made.queue


def to(queue: str, *contents: bytes) -> list[Parcel]:
    return [Parcel(pack(Message(body), 1), "", queue) for body in contents]


async def published(
    channel: Channel, parcels: Sequence[Parcel], *, drained: bool = False
) -> list[Any]:
    batch = Batch(channel, parcels)
    async with asyncio.timeout(PATIENCE):
        await batch.publish(drained=drained)
    return batch.answers


async def stored(channel: Channel, queue: str) -> list[bytes]:
    found: list[bytes] = []
    while True:
        got = await channel.basic_get(queue, no_ack=True)
        if got.delivery_tag is None:
            return found
        found.append(bytes(got.body))


def assert_nothing_is_left(channel: Channel) -> None:
    assert not channel.confirmations
    assert not channel.message_id_delivery_tag


@pytest.mark.parametrize("drained", [False, True])
async def test_messages_of_any_size_are_stored_in_order(channel: Channel, drained: bool) -> None:
    queue = await own_queue(channel)
    frame = channel.max_content_size
    sizes = [0, 1, frame - 1, frame, frame + 1, 2 * frame, 3 * frame + 7, *range(300)]
    contents = [bytes([n % 251]) * size for n, size in enumerate(sizes)]

    answers = await published(channel, to(queue, *contents), drained=drained)

    assert answers == [None] * len(sizes)
    assert await stored(channel, queue) == contents
    assert_nothing_is_left(channel)


async def test_batches_at_once_are_each_answered(channel: Channel) -> None:
    queue = await own_queue(channel)

    answers = await asyncio.gather(
        *(published(channel, to(queue, *[b"%d" % n] * size)) for n, size in enumerate((1, 500, 70)))
    )

    assert [len(each) for each in answers] == [1, 500, 70]
    assert not any(any(each) for each in answers)
    assert await stored(channel, queue) == [b"0"] + [b"1"] * 500 + [b"2"] * 70
    assert_nothing_is_left(channel)


async def test_what_goes_nowhere_is_told_of_itself_alone(channel: Channel) -> None:
    queue = await own_queue(channel)
    parcels = to(queue, b"1", b"2", b"3")
    parcels[1] = parcels[1]._replace(routing_key="there is none")

    one, two, three = await published(channel, parcels)

    assert (one, three) == (None, None)
    assert isinstance(two, PublishError)
    assert await stored(channel, queue) == [b"1", b"3"]
    assert_nothing_is_left(channel)


async def test_what_a_full_queue_refuses_is_told(channel: Channel) -> None:
    queue = await own_queue(channel, **{"x-max-length": 2, "x-overflow": "reject-publish"})

    answers = await published(channel, to(queue, b"1", b"2", b"3", b"4"))

    assert answers[:2] == [None, None]
    assert all(isinstance(answer, DeliveryError) for answer in answers[2:])
    assert_nothing_is_left(channel)


async def test_a_batch_cut_off_before_it_is_written_takes_no_number(channel: Channel) -> None:
    queue = await own_queue(channel)
    usual = channel.write_queue
    channel.write_queue = asyncio.Queue(maxsize=1)
    channel.write_queue.put_nowait("full")
    cut_off = asyncio.create_task(published(channel, to(queue, b"never", b"sent")))
    await asyncio.sleep(0.05)

    cut_off.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cut_off
    channel.write_queue = usual

    assert_nothing_is_left(channel)
    assert await published(channel, to(queue, b"1", b"2")) == [None, None]
    assert await stored(channel, queue) == [b"1", b"2"]


async def test_a_batch_cut_off_after_it_was_written_disturbs_nobody(
    channel: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    queue = await own_queue(channel)
    cut_off = asyncio.create_task(published(channel, to(queue, *[b"sent"] * 900)))
    while not channel.confirmations:
        await asyncio.sleep(0)

    cut_off.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cut_off

    assert await published(channel, to(queue, b"1")) == [None]
    assert await stored(channel, queue) == [b"sent"] * 900 + [b"1"]
    assert_nothing_is_left(channel)
    assert not caplog.records


async def test_a_channel_that_the_server_closes_answers_all(channel: Channel) -> None:
    queue = await own_queue(channel)
    parcels = to(queue, *[b"x"] * 50)
    parcels[30] = parcels[30]._replace(exchange="there is none")

    answers = await published(channel, parcels)

    # Those before may have been confirmed; nobody waits for ever.
    assert all(
        answer is None or isinstance(answer, ChannelNotFoundEntity) for answer in answers[:30]
    )
    assert all(isinstance(answer, ChannelNotFoundEntity) for answer in answers[30:])
    with pytest.raises(ChannelInvalidStateError):
        await published(channel, to(queue, b"too late"))


@pytest.mark.parametrize("drained", [False, True])
async def test_a_connection_that_is_lost_answers_all(rabbitmq_url: str, drained: bool) -> None:
    port = urlsplit(rabbitmq_url).port
    assert port is not None
    proxy = Proxy(port, seed=1)
    await proxy.start()
    connection = await aiormq.connect(rabbitmq_url.replace(f":{port}", f":{proxy.port}"))
    channel = await opened(connection)
    queue = await own_queue(channel)
    proxy.mute()
    # Drained, it fills the socket: the writer waits in the middle, and who comes next for it.
    contents = [bytes(1_000_000)] * 60 if drained else [b"x"] * 50
    first = asyncio.create_task(published(channel, to(queue, *contents), drained=drained))
    behind = asyncio.create_task(published(channel, to(queue, b"behind")))
    await asyncio.sleep(0.3)
    assert not first.done()
    assert not behind.done()

    proxy.reset()

    answers = await first
    assert all(isinstance(answer, AMQPError | OSError) for answer in answers), answers[0]
    try:
        assert isinstance((await behind)[0], AMQPError | OSError)
    except (AMQPError, ChannelInvalidStateError):
        assert drained, "it was still to be written"
    await connection.close()
    await proxy.close()


async def test_what_cannot_be_written_fails_alone(channel: Channel) -> None:
    queue = await own_queue(channel)
    parcels = to(queue, b"1", b"2", b"3", b"4")
    parcels[1].packed.properties.headers = {"number": 1e300}
    parcels[3] = parcels[3]._replace(routing_key="k" * 300)

    one, two, three, four = await published(channel, parcels)

    assert (one, three) == (None, None)
    assert isinstance(two, OverflowError)
    assert isinstance(four, TypeError)
    assert await stored(channel, queue) == [b"1", b"3"]
    assert_nothing_is_left(channel)
    assert [type(answer) for answer in await published(channel, parcels[1:2])] == [OverflowError]
    assert await published(channel, []) == []


async def test_a_server_without_a_limit_to_frames_gets_one(channel: Channel) -> None:
    queue = await own_queue(channel)
    channel.max_content_size = -8  # what the client library makes of "no limit"

    assert await published(channel, to(queue, b"", bytes(1_000))) == [None, None]
    assert await stored(channel, queue) == [b"", bytes(1_000)]
