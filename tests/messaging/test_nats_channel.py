"""Topics that keep nothing: ``delivery=at-most-once`` on NATS."""

import asyncio
import contextlib
import secrets
import string

import nats
import pytest

from molva.messaging import (
    Message,
    UnavailableError,
    UnsupportedFeatureError,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.conformance import PATIENCE, bodies, eventually, take
from molva.messaging.drivers import _nats_channel
from tests.brokers import private_nats

ALPHABET = [letter.encode() for letter in string.ascii_lowercase]


@pytest.fixture
def url(nats_url: str) -> str:
    return with_options(
        nats_url, prefix=f"test-{secrets.token_hex(6)}", delivery="at-most-once", topic="t"
    )


async def test_two_subscribers_both_read_the_alphabet_and_nothing_after_they_unsubscribe(
    url: str,
) -> None:
    topic = await open_topic(url)
    first = await open_subscription(url + "&subscription=first")
    second = await open_subscription(url + "&subscription=second")
    await topic.send_many([Message(letter) for letter in ALPHABET])
    assert bodies(await take(first, 26)) == ALPHABET
    assert bodies(await take(second, 26)) == ALPHABET

    await first.close()
    await second.close()
    await topic.send_many([Message(letter) for letter in ALPHABET])

    again = await open_subscription(url + "&subscription=first")
    assert await again.receive(wait=0.2) == []
    await topic.send(Message(b"new", key="k", headers={"a": "λ"}))
    [delivery] = await take(again, 1)
    assert (delivery.message.body, delivery.message.key) == (b"new", "k")
    assert delivery.message.headers == {"a": "λ"}
    assert delivery.settled
    await again.close()
    await topic.close()


async def test_the_consumers_of_one_subscription_share_what_is_published(url: str) -> None:
    topic = await open_topic(url)
    both = [await open_subscription(url + "&subscription=s") for _ in range(2)]
    await topic.send_many([Message(b"%d" % n) for n in range(200)])

    found: list[list[bytes]] = [[], []]
    async with asyncio.timeout(PATIENCE):
        while sum(map(len, found)) < 200:
            for place, subscription in enumerate(both):
                found[place] += bodies(await subscription.receive(200, wait=0.1))

    assert sorted(int(body) for part in found for body in part) == list(range(200))
    assert all(found)
    for opened in (topic, *both):
        await opened.close()


async def test_it_says_that_it_keeps_nothing(url: str) -> None:
    async with await open_topic(url) as topic:
        assert topic.capabilities.delivery == "at-most-once"
        assert topic.capabilities.survives == frozenset()
        assert await topic.stat() is None
    async with await open_subscription(url + "&subscription=s") as subscription:
        with pytest.raises(UnsupportedFeatureError, match="peek"):
            await subscription.peek()
    for feature in ("at-least-once", "kill", "earliest", "replay", "capacity"):
        with pytest.raises(UnsupportedFeatureError):
            await open_topic(url, require=[feature])


async def test_a_topic_that_is_a_log_stays_one(url: str) -> None:
    plain = url.replace("&delivery=at-most-once", "")
    async with (
        await open_topic(plain) as topic,
        await open_subscription(url + "&subscription=s") as subscription,
    ):
        await topic.send(Message(b"1"))
        assert subscription.capabilities.delivery == "at-least-once"
        assert bodies(await take(subscription, 1)) == [b"1"]


async def test_a_waiting_subscriber_has_a_message_within_50_ms(url: str) -> None:
    async with (
        await open_topic(url) as topic,
        await open_subscription(url + "&subscription=s") as subscription,
    ):
        loop = asyncio.get_running_loop()
        quickest = 1.0
        for _ in range(5):
            waiting = asyncio.create_task(subscription.receive(wait=PATIENCE))
            await asyncio.sleep(0.05)
            began = loop.time()
            await topic.send(Message(b"1"))
            await waiting
            quickest = min(quickest, loop.time() - began)
        assert quickest < 0.05


async def test_a_subscriber_that_is_too_slow_loses_the_newest(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_nats_channel, "_MOST_MESSAGES", 5)
    async with (
        await open_topic(url) as topic,
        await open_subscription(url + "&subscription=s") as subscription,
    ):
        await topic.send_many([Message(b"%d" % n) for n in range(8)])
        driver = subscription._driver
        assert isinstance(driver, _nats_channel.NATSChannelSubscription)
        await eventually(lambda: driver.dropped == 3)
        assert bodies(await subscription.receive(10)) == [b"0", b"1", b"2", b"3", b"4"]
    assert "too slow" in caplog.text


async def test_what_is_no_message_is_passed_over(
    url: str, nats_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        await open_topic(url) as topic,
        await open_subscription(url + "&subscription=s") as subscription,
    ):
        driver = subscription._driver
        assert isinstance(driver, _nats_channel.NATSChannelSubscription)
        client = await nats.connect(nats_url)
        await client.publish(driver._names.channel, b"hello")
        await client.publish(driver._names.channel, b"", headers={"Nats-Msg-Id": "zz"})
        await client.close()
        await topic.send(Message(b"1"))
        assert bodies(await take(subscription, 1)) == [b"1"]
    assert "is no message" in caplog.text


async def test_subscribers_come_back_after_a_restart_of_the_server() -> None:
    with private_nats() as server:
        url = with_options(server.url, delivery="at-most-once", topic="t")
        async with (
            await open_topic(url) as topic,
            await open_subscription(url + "&subscription=s") as subscription,
        ):
            server.kill()
            await asyncio.to_thread(server.restart)
            got: list[bytes] = []
            async with asyncio.timeout(PATIENCE):
                while not got:
                    # Neither end can do anything until it is connected again.
                    with contextlib.suppress(UnavailableError):
                        await topic.send(Message(b"1"))
                        got = bodies(await subscription.receive(wait=0.1))
