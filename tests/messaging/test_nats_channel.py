"""Topics that keep nothing: ``delivery=at-most-once`` on NATS."""

import asyncio
import secrets

import nats
import pytest

from molva.messaging import (
    InvalidURLError,
    Message,
    MessageTooLargeError,
    SendManyError,
    UnavailableError,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.conformance import PATIENCE, bodies, take
from molva.messaging.drivers import _nats_channel, _nats_link
from tests.brokers import private_nats
from tests.faults.live.proxy import Proxy
from tests.messaging.channels import Channels, come_back_after_a_restart


@pytest.fixture
def url(nats_url: str) -> str:
    return with_options(
        nats_url, prefix=f"test-{secrets.token_hex(6)}", delivery="at-most-once", topic="t"
    )


class TestNATSChannels(Channels):
    """What every channel does."""


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
        await come_back_after_a_restart(server)


async def test_who_may_not_publish_or_subscribe_is_told_so() -> None:
    nobody = '{ deny: "molva.channel.>" }'
    users = (
        "{ users: [{ user: molva, password: pw }, "
        f"{{ user: mute, password: pw, permissions: {{ publish: {nobody} }} }}, "
        f"{{ user: deaf, password: pw, permissions: {{ subscribe: {nobody} }} }}] }}"
    )
    with private_nats(no_auth_user="molva", authorization=users) as server:

        def url(user: str) -> str:
            at = f"nats://{user}:pw@127.0.0.1:{server.port}"
            return with_options(at, delivery="at-most-once", topic="t")

        async with await open_topic(url("mute")) as topic:
            with pytest.raises(InvalidURLError, match="ermissions"):
                await topic.send(Message(b"1"))
        with pytest.raises(InvalidURLError, match="ermissions"):
            await open_subscription(url("deaf") + "&subscription=s")


async def test_a_message_that_the_server_does_not_take_fails_alone() -> None:
    with private_nats(max_payload=65_536) as server:
        url = with_options(server.url, delivery="at-most-once", topic="t")
        async with (
            await open_topic(url) as topic,
            await open_subscription(url + "&subscription=s") as subscription,
        ):
            most = topic.capabilities.max_body_bytes
            long = Message(bytes(most), headers={"long": "x" * 9_000})
            with pytest.raises(SendManyError) as failed:
                await topic.send_many([Message(b"1"), long, Message(b"2")])
            assert list(failed.value.failures) == [1]
            assert isinstance(failed.value.failures[1], MessageTooLargeError)
            assert bodies(await take(subscription, 2)) == [b"1", b"2"]


async def test_a_connection_that_died_without_a_word_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_nats_channel, "_PING", 0.2)
    proxy = Proxy(0, seed=1)
    with private_nats() as server:
        proxy.upstream = server.port
        await proxy.start()
        options = {"delivery": "at-most-once", "topic": "t", "subscription": "s"}
        url = with_options(f"nats://127.0.0.1:{proxy.port}", **options)
        async with await open_subscription(url) as subscription:
            # Not while it opens, which may take longer.
            monkeypatch.setattr(_nats_link, "_TIMEOUT", 1.0)
            proxy.faults.drop = True

            async def receive() -> None:
                while True:
                    assert await subscription.receive(wait=0.1) == []

            with pytest.raises(UnavailableError, match="not subscribed"):
                await asyncio.wait_for(receive(), PATIENCE)
        await proxy.close()
