"""Topics that keep nothing: ``delivery=at-most-once`` on NATS."""

import asyncio
import contextlib
import secrets

import nats
import pytest

from molva.messaging import (
    Message,
    UnavailableError,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.conformance import PATIENCE, bodies, take
from molva.messaging.drivers import _nats_channel
from tests.brokers import private_nats
from tests.messaging.channels import Channels


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
