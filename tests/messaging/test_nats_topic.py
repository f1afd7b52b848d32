"""What only the NATS driver has: hand-overs that count not, numbers, names, requests that end."""

import asyncio
import secrets
import string
from collections.abc import AsyncIterator
from typing import Any

import nats
import pytest
from nats.js import JetStreamContext

from molva.messaging import (
    Action,
    Delivery,
    InUseError,
    LeaseLostError,
    Message,
    Subscription,
    TopicNotFoundError,
    open_queue,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.conformance import PATIENCE, bodies, take
from molva.messaging.drivers._nats_consumer import NATSConsumer
from molva.messaging.drivers._nats_messages import Names, encoded
from tests.messaging.nats_versions import need_numbers

ALPHABET = [letter.encode() for letter in string.ascii_lowercase]


@pytest.fixture
def url(nats_url: str) -> str:
    return with_options(nats_url, prefix=f"test-{secrets.token_hex(6)}", topic="t")


@pytest.fixture
async def streams(nats_url: str) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(nats_url)
    yield client.jetstream(timeout=PATIENCE)
    await client.close()


def names_of(subscription: Subscription) -> Names:
    return driver_of(subscription)._names


def driver_of(subscription: Subscription) -> NATSConsumer:
    driver = subscription._driver
    assert isinstance(driver, NATSConsumer)
    return driver


def numbered(number: int) -> list[Message]:
    return [Message(b"%d" % n) for n in range(number)]


async def acked(subscription: Subscription, number: int) -> list[bytes]:
    found = await take(subscription, number)
    await subscription.settle([(delivery, Action.ACK) for delivery in found])
    return bodies(found)


async def test_two_subscribers_both_read_the_alphabet_and_nothing_after_they_unsubscribe(
    url: str,
) -> None:
    async with await open_topic(url) as topic:
        subscriptions = [await open_subscription(f"{url}&subscription={n}") for n in "ab"]
        await topic.send_many([Message(letter) for letter in ALPHABET])
        for subscription in subscriptions:
            assert await acked(subscription, 26) == ALPHABET

        for subscription, name in zip(subscriptions, "ab", strict=True):
            await subscription.close()
            assert await topic.remove_subscription(name)
        await topic.send_many([Message(letter) for letter in ALPHABET])

        for name in "ab":
            with pytest.raises(TopicNotFoundError):
                await open_subscription(f"{url}&subscription={name}&create=never")


async def test_a_busy_subscription_is_not_removed(url: str) -> None:
    async with (
        await open_topic(url) as topic,
        await open_subscription(f"{url}&subscription=s") as subscription,
    ):
        handled = 0

        async def handle(delivery: Delivery) -> None:
            nonlocal handled
            handled += 1

        async def send() -> None:
            while True:
                await topic.send_many(numbered(20))

        # It asks for more at few moments, and is away from the server at all others.
        working = [asyncio.create_task(subscription.run(handle)), asyncio.create_task(send())]
        for _ in range(5):
            with pytest.raises(InUseError):
                await topic.remove_subscription("s")
        assert handled
        for task in working:
            task.cancel()
        await asyncio.wait(working)


async def test_what_is_given_back_untouched_is_no_attempt_however_often(url: str) -> None:
    async with await open_topic(url) as topic:
        await topic.send_many(numbered(3))
        for _ in range(4):
            async with await open_subscription(f"{url}&subscription=s") as subscription:
                assert [d.attempt for d in await take(subscription, 3)] == [1, 1, 1]
        async with await open_subscription(f"{url}&subscription=s") as subscription:
            for delivery in await take(subscription, 3):
                await delivery.nack()
            again = await take(subscription, 3)
            assert [d.attempt for d in again] == [2, 2, 2]
            await subscription.settle([(delivery, Action.ACK) for delivery in again])


async def test_nothing_is_kept_of_the_attempts_of_what_is_settled(
    url: str, streams: JetStreamContext
) -> None:
    async with await open_topic(url) as topic:
        await topic.send_many(numbered(3))
        async with await open_subscription(f"{url}&subscription=s") as subscription:
            kept = names_of(subscription).kept_stream
            await take(subscription, 3)
        assert (await streams.stream_info(kept)).state.messages == 3
        async with await open_subscription(f"{url}&subscription=s") as subscription:
            assert len(await acked(subscription, 3)) == 3
        assert (await streams.stream_info(kept)).state.messages == 0


async def test_streams_of_one_name_never_have_a_number_twice(
    nats_url: str, url: str, streams: JetStreamContext
) -> None:
    need_numbers(nats_url)
    seen = []
    for _ in range(2):
        async with (
            await open_topic(url) as topic,
            await open_subscription(f"{url}&subscription=s") as subscription,
        ):
            await topic.send_many(numbered(10))
            stream = names_of(subscription).stream
            state = (await streams.stream_info(stream)).state
            seen.append((state.first_seq, state.last_seq))
            stat = await topic.stat()
            assert stat is not None
            assert stat.stored == 10
        await streams.delete_stream(stream)
    assert seen[0][1] < seen[1][0]


async def test_a_late_ack_settles_nothing_that_another_holds_now(url: str) -> None:
    url = f"{url}&subscription=s&lease=0.5"
    async with (
        await open_topic(url.partition("&subscription")[0]) as topic,
        await open_subscription(url) as slow,
        await open_subscription(url) as quick,
    ):
        await topic.send(Message(b"1"))
        [late] = await take(slow, 1)
        await asyncio.sleep(0.6)
        [held] = await take(quick, 1)
        with pytest.raises(LeaseLostError):
            await late.ack()
        await held.nack()
        [again] = await take(quick, 1)
        assert again.attempt == 3


async def test_extending_beyond_the_lease_holds_for_as_long_as_was_asked(url: str) -> None:
    async with (
        await open_topic(url) as topic,
        await open_subscription(f"{url}&subscription=s&lease=1.5") as one,
        await open_subscription(f"{url}&subscription=s&lease=1.5") as other,
    ):
        await topic.send(Message(b"1"))
        [delivery] = await take(one, 1)
        await delivery.extend(4.0)
        assert await other.receive(1, wait=2.0) == []
        await delivery.ack()
        assert await other.receive(1, wait=2.5) == []


async def test_what_a_cancelled_receive_asked_for_goes_to_others(url: str) -> None:
    async with (
        await open_topic(url) as topic,
        await open_subscription(f"{url}&subscription=s&lease=30") as one,
        await open_subscription(f"{url}&subscription=s") as other,
    ):
        waiting = asyncio.create_task(one.receive(10, wait=PATIENCE))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.wait([waiting])
        await asyncio.sleep(0.5)
        await topic.send_many(numbered(10))
        assert sorted(await acked(other, 10)) == [b"%d" % n for n in range(10)]


async def test_nothing_is_deleted_that_a_slow_subscription_has_not_settled(
    url: str, streams: JetStreamContext
) -> None:
    async with (
        await open_topic(url) as topic,
        await open_subscription(f"{url}&subscription=quick") as quick,
        await open_subscription(f"{url}&subscription=slow") as slow,
    ):
        await topic.send_many(numbered(20))
        await acked(quick, 20)
        first, *rest = await take(slow, 20)
        await slow.settle([(delivery, Action.ACK) for delivery in rest])
        await asyncio.sleep(1.5)
        stream = names_of(slow).stream
        assert (await streams.stream_info(stream)).state.messages == 20
        await first.ack()
        async with asyncio.timeout(PATIENCE):
            while (await streams.stream_info(stream)).state.messages:
                await asyncio.sleep(0.1)


async def test_what_was_given_back_comes_again_at_once_also_where_others_are_deleted(
    url: str,
) -> None:
    async with (
        await open_topic(url) as topic,
        await open_subscription(f"{url}&subscription=s&lease=30") as subscription,
    ):
        await topic.send_many(numbered(3))
        first, second, third = await take(subscription, 3)
        await second.nack()
        await subscription.settle([(first, Action.ACK), (third, Action.ACK)])
        await asyncio.sleep(1.5)
        assert bodies(await subscription.receive(1, wait=2.0)) == [b"1"]


async def test_a_message_that_somebody_else_wrote_becomes_a_dead_letter(
    url: str, streams: JetStreamContext, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        await open_topic(url) as topic,
        await open_subscription(f"{url}&subscription=s") as subscription,
    ):
        subject = names_of(subscription).subject
        await streams.publish(subject, b"plain")
        await streams.publish(subject, b"odd", headers={"Nats-Msg-Id": "7", "Molva": "{"})
        await topic.send(Message(b"1"))
        assert await acked(subscription, 1) == [b"1"]
        letters = await subscription.dead_letters()
        assert [letter.message.body for letter in letters] == [b"plain", b"odd"]
        assert all("undecodable" in letter.reason for letter in letters)
        assert "became a dead letter" in caplog.text


@pytest.mark.parametrize("other", [{"body": b"2"}, {"body": b"1", "key": "k"}])
async def test_another_message_under_an_id_that_was_taken_is_not_dropped(
    url: str, other: dict[str, Any]
) -> None:
    """Whoever stored the first decides about it, and can tell; a server would not."""
    topic = await open_topic(url)
    subscription = await open_subscription(url + "&subscription=s")
    first = Message(b"1")
    await topic.send(first)
    await topic.send(Message(id=first.id, **other))
    found = await take(subscription, 2)
    assert [(d.message.id, d.message.body, d.message.key) for d in found] == [
        (first.id, b"1", None),
        (first.id, other["body"], other.get("key")),
    ]
    await topic.close()
    await subscription.close()


async def test_a_message_sent_twice_is_stored_once(url: str) -> None:
    queue_url = url.replace("topic=t", "queue=q")
    async with await open_queue(queue_url) as queue:
        message = Message(b"1")
        await queue.send_many([message, message])
        await queue.send(message)
        stat = await queue.stat()
        assert stat is not None
        assert stat.pending == 1


async def test_a_traced_message_sent_again_is_the_same_in_another_span(url: str) -> None:
    async with await open_queue(url.replace("topic=t", "queue=q")) as queue:
        spans = [f"00-{digit * 32}-{digit * 16}-01" for digit in "12"]
        first = Message(b"1", headers={"color": "red", "traceparent": spans[0]})
        again = Message(b"1", first.id, headers={"color": "red", "traceparent": spans[1]})
        other = Message(b"1", first.id, headers={"color": "blue", "traceparent": spans[0]})
        for message in (first, again, other):
            await queue.send(message)
        assert [delivery.message for delivery in await take(queue, 2)] == [first, other]


@pytest.mark.parametrize(
    "name",
    ["a.b", "a*", ">", "a b", "λ" * 200, "x" * 200, "=41", "a_b", "$JS", "A/..\\B", "%2E"],
)
async def test_whatever_a_topic_is_called_it_has_a_stream_of_its_own(url: str, name: str) -> None:
    base = url.replace("&topic=t", "")
    named = with_options(base, topic=name)
    async with (
        await open_topic(named) as topic,
        await open_subscription(with_options(named, subscription=name)) as subscription,
    ):
        await topic.send(Message(name.encode()))
        [delivery] = await take(subscription, 1)
        await delivery.reject("no")
        [letter] = await topic.dead_letters(name)
        assert letter.origin == f"topic {name}, subscription {name}"
        stat = await topic.stat()
        assert stat is not None
        assert list(stat.subscriptions) == [name]


def test_no_two_names_are_encoded_alike() -> None:
    names = ["a", "A", "=41", "a=", "a_", "a.", "λ" * 200, "λ" * 199 + "μ", "x" * 200, "x" * 199]
    found = [encoded(name) for name in names]
    assert len(set(found)) == len(names)
    for one in found:
        assert len(one) <= 120
        assert not set(one) & set(". *>/\\_\t\r\n")
