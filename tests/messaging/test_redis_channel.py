"""Topics that keep nothing: ``delivery=at-most-once`` on Redis."""

import secrets

import pytest
import redis

from molva.messaging import (
    InvalidURLError,
    Message,
    TopicNotFoundError,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.conformance import bodies, take
from molva.messaging.drivers import _redis_channel
from tests.brokers import private_redis
from tests.messaging.channels import Channels, come_back_after_a_restart


@pytest.fixture
def url(redis_url: str) -> str:
    return with_options(
        redis_url, prefix=f"test-{secrets.token_hex(6)}", delivery="at-most-once", topic="t"
    )


class TestRedisChannels(Channels):
    """What every channel does."""


async def test_a_subscription_without_the_option_is_told_what_the_topic_is(url: str) -> None:
    async with await open_topic(url):
        plain = url.replace("&delivery=at-most-once", "")
        with pytest.raises(InvalidURLError, match="delivery=at-most-once and keeps nothing"):
            await open_subscription(plain + "&subscription=s")


async def test_create_never_finds_no_channel(url: str) -> None:
    with pytest.raises(TopicNotFoundError, match="create=never"):
        await open_topic(url + "&create=never")


async def test_what_is_no_message_is_passed_over(
    url: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        await open_topic(url) as topic,
        await open_subscription(url + "&subscription=s") as subscription,
    ):
        driver = subscription._driver
        assert isinstance(driver, _redis_channel.RedisChannelSubscription)
        with redis.Redis.from_url(redis_url) as client:
            for text in (b"", b"hello", b"0" + bytes(16) + b"\xff\xff\xff\xff"):
                client.publish(driver._channel, text)
        await topic.send(Message(b"1"))
        assert bodies(await take(subscription, 1)) == [b"1"]
    assert "is no message" in caplog.text


async def test_subscribers_come_back_after_a_restart_of_the_server() -> None:
    with private_redis() as server:
        await come_back_after_a_restart(server)
