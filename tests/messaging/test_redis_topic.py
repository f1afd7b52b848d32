"""What only the Redis driver's topics have: groups, pending lists, consumers by name."""

import asyncio
import contextlib
import secrets
import string
from collections.abc import Iterator

import pytest
import redis

from molva._base.redis_server import UnreachableServerError
from molva.messaging import (
    Action,
    LeaseLostError,
    Message,
    Subscription,
    TopicNotFoundError,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.conformance import PATIENCE, bodies, take
from molva.messaging.drivers import _redis_subscription
from molva.messaging.drivers._redis_subscription import RedisSubscription
from tests.brokers import private_redis

ALPHABET = [letter.encode() for letter in string.ascii_lowercase]


@pytest.fixture
def url(redis_url: str) -> str:
    return with_options(redis_url, prefix=f"test-{secrets.token_hex(6)}", topic="t")


@pytest.fixture
def client(redis_url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def driver_of(subscription: Subscription) -> RedisSubscription:
    driver = subscription._driver
    assert isinstance(driver, RedisSubscription)
    return driver


def log_of(subscription: Subscription) -> str:
    return driver_of(subscription)._keys.log


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


# What a consumer holds ------------------------------------------------------------------------


async def test_what_was_read_while_the_reply_was_lost_is_found_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The consumer's own pending list is drained before it reads on."""
    async with (
        await open_topic(url) as topic,
        await open_subscription(url + "&subscription=s&lease=60") as subscription,
    ):
        await topic.send_many(numbered(5))
        driver = driver_of(subscription)
        call = driver._reads.call

        async def lose_the_reply(*command: object, patience: float = 0.0) -> object:
            monkeypatch.setattr(driver._reads, "call", call)
            await call(*command, patience=patience)
            raise UnreachableServerError("the reply was lost")

        monkeypatch.setattr(driver._reads, "call", lose_the_reply)

        found = await take(subscription, 5)

        assert bodies(found) == [b"0", b"1", b"2", b"3", b"4"]
        assert {delivery.attempt for delivery in found} == {1}
        await subscription.settle([(delivery, Action.ACK) for delivery in found])


async def test_a_late_ack_settles_nothing_that_another_holds_now(url: str) -> None:
    url += "&subscription=s&lease=0.3"
    async with (
        await open_topic(url.partition("&subscription")[0]) as topic,
        await open_subscription(url) as slow,
        await open_subscription(url) as quick,
    ):
        await topic.send(Message(b"1"))
        [late] = await take(slow, 1)
        await asyncio.sleep(0.4)
        [again] = await take(quick, 1)
        assert again.attempt == 2
        with pytest.raises(LeaseLostError):
            await late.ack()
        stat = await quick.stat()
        assert stat is not None
        assert stat.pending == 1
        await again.ack()


async def test_a_token_of_an_earlier_turn_settles_nothing_of_the_same_consumer(url: str) -> None:
    async with (
        await open_topic(url) as topic,
        await open_subscription(url + "&subscription=s") as subscription,
    ):
        await topic.send(Message(b"1"))
        [first] = await take(subscription, 1)
        driver = driver_of(subscription)
        for _ in range(3):  # given back untried: the attempt stays, the turn does not
            await subscription._give_back([first])
            [again] = await take(subscription, 1)
            assert again.attempt == 1
            assert again.token != first.token
            lost = await driver._ack([str(first.token)])
            assert lost == {0}
            first = again
        await first.ack()


async def test_a_batch_is_acknowledged_in_any_order_and_each_token_once(url: str) -> None:
    async with (
        await open_topic(url) as topic,
        await open_subscription(url + "&subscription=s") as subscription,
    ):
        await topic.send_many([Message(b"%d" % n) for n in range(6)])
        held = await take(subscription, 6)
        driver = driver_of(subscription)
        tokens = [str(delivery.token) for delivery in held]
        await driver._ack([tokens[4]])

        # From a later one to an earlier one nothing stands, so each is looked at by itself.
        lost = await driver._ack([tokens[5], tokens[0], tokens[4], tokens[0], tokens[1]])
        later = await driver._ack([tokens[1], tokens[3], tokens[3], "9-9", tokens[2]])

        stat = await subscription.stat()
        assert (lost, later) == ({2, 3}, {0, 2, 3})
        assert stat is not None
        assert stat.pending == 0


async def test_taking_over_goes_on_beside_reading(url: str) -> None:
    """A consumer that is never idle still gets what one that died has left."""
    url_s = url + "&subscription=s&lease=0.5"
    async with await open_topic(url) as topic, await open_subscription(url_s) as heir:
        await topic.send(Message(b"left"))
        doomed = await open_subscription(url_s)
        await take(doomed, 1)
        with contextlib.suppress(Exception):
            await driver_of(doomed)._link.close()
        found: list[bytes] = []
        number = 0
        async with asyncio.timeout(PATIENCE):
            while b"left" not in found:
                await topic.send(Message(b"%d" % number))
                number += 1
                found += await acked(heir, 1)
        found += [d.message.body for d in await heir.receive(1_000, wait=0.3)]
        assert {b"%d" % n for n in range(number)} <= set(found)
        assert found.count(b"left") == 1
        await doomed.close()


async def test_extending_beyond_the_lease_holds_for_as_long_as_was_asked(url: str) -> None:
    url_s = url + "&subscription=s&lease=0.3"
    async with (
        await open_topic(url) as topic,
        await open_subscription(url_s) as owner,
        await open_subscription(url_s) as other,
    ):
        await topic.send(Message(b"1"))
        [delivery] = await take(owner, 1)
        await delivery.extend(4.0)
        assert await other.receive(wait=1.0) == []
        [again] = await take(other, 1)
        assert again.attempt == 2


async def test_a_long_delay_is_not_cut_short_by_the_lease(url: str) -> None:
    url_s = url + "&subscription=s&lease=0.2"
    async with (
        await open_topic(url) as topic,
        await open_subscription(url_s) as one,
        await open_subscription(url_s) as two,
    ):
        await topic.send(Message(b"1"))
        [delivery] = await take(one, 1)
        await delivery.nack(delay=4.0)
        early = await asyncio.gather(one.receive(wait=1.0), two.receive(wait=1.0))
        assert not any(early)
        [late] = await take(two, 1)
        assert late.attempt == 2


async def test_what_a_cancelled_receive_read_is_given_to_others_soon(url: str) -> None:
    url_s = url + "&subscription=s&lease=60"
    async with (
        await open_topic(url) as topic,
        await open_subscription(url_s) as gone,
        await open_subscription(url_s) as stays,
    ):
        receiving = asyncio.create_task(gone.receive(10))
        await asyncio.sleep(0.1)
        await topic.send_many(numbered(10))
        await asyncio.sleep(0)
        receiving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone._give_back(await receiving)
        found = await take(stays, 10)
        assert {delivery.attempt for delivery in found} == {1}


# Consumers by name ----------------------------------------------------------------------------


def consumers(client: "redis.Redis", log: str) -> set[str]:
    return {found["name"].decode() for found in client.xinfo_consumers(log, "s")} - {"~"}


async def test_a_consumer_that_left_leaves_no_name_behind(url: str, client: "redis.Redis") -> None:
    async with (
        await open_topic(url) as topic,
        await open_subscription(url + "&subscription=s") as stays,
    ):
        leaves = await open_subscription(url + "&subscription=s")
        await topic.send_many(numbered(4))
        await take(leaves, 4)
        names = consumers(client, log_of(stays))
        await leaves.close()
        assert consumers(client, log_of(stays)) == names - {driver_of(leaves)._consumer}
        assert len(await take(stays, 4)) == 4


async def test_a_dead_consumer_is_forgotten_only_when_it_holds_nothing(
    url: str, client: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_redis_subscription, "_ALIVE", 0.2)
    monkeypatch.setattr(_redis_subscription, "_BEAT", 60.0)
    url_s = url + "&subscription=s&lease=1"
    async with await open_topic(url) as topic:
        await topic.send_many(numbered(3))
        doomed = await open_subscription(url_s)
        await take(doomed, 3)
        await driver_of(doomed)._link.close()
        await asyncio.sleep(0.3)

        async with await open_subscription(url_s) as heir:
            name = driver_of(doomed)._consumer
            await driver_of(heir).join()
            # Forgetting it now would forget three messages with it.
            assert name in consumers(client, log_of(heir))
            assert len(await acked(heir, 3)) == 3
            await driver_of(heir).join()
            assert name not in consumers(client, log_of(heir))
        await doomed.close()


# What is kept ---------------------------------------------------------------------------------


async def test_nothing_is_deleted_that_a_slow_group_has_not_settled(
    url: str, client: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_redis_subscription, "_LOOK", 0.01)
    async with (
        await open_topic(url) as topic,
        await open_subscription(url + "&subscription=quick") as quick,
        await open_subscription(url + "&subscription=slow") as slow,
    ):
        await topic.send_many(numbered(2_000))
        [held] = await take(slow, 1)
        assert len(await acked(quick, 2_000)) == 2_000
        await quick.receive(wait=0.1)
        assert client.xlen(log_of(quick)) == 2_000

        rest = await take(slow, 1_999)
        await slow.settle([(delivery, Action.ACK) for delivery in rest])
        await slow.receive(wait=0.1)
        assert client.xlen(log_of(quick)) == 2_000  # the first one is still open

        await held.ack()
        await slow.receive(wait=0.1)
        assert client.xlen(log_of(quick)) <= 100  # a node of the stream
        await topic.send(Message(b"after"))
        assert await acked(slow, 1) == [b"after"]


async def test_an_entry_that_somebody_else_wrote_becomes_a_dead_letter(
    url: str, client: "redis.Redis"
) -> None:
    async with (
        await open_topic(url) as topic,
        await open_subscription(url + "&subscription=s") as subscription,
    ):
        client.xadd(log_of(subscription), {"temperature": "21"})
        client.xadd(log_of(subscription), {"id": bytes(16), "body": "1", "meta": "{"})
        await topic.send(Message(b"ours"))
        assert await acked(subscription, 1) == [b"ours"]
        first, second = await subscription.dead_letters()
        assert first.message.body == b'{"temperature": "21"}'
        assert "undecodable" in first.reason
        assert "meta cannot be read" in second.reason
        stat = await subscription.stat()
        assert stat is not None
        assert stat.pending == 0


@pytest.mark.parametrize("name", ["a", "a}:dead:x", "{", "%7D", "a:b", "}{"])
async def test_names_with_braces_share_no_keys(url: str, name: str) -> None:
    base = url.partition("&topic")[0]
    async with (
        await open_topic(with_options(base, topic=name)) as topic,
        await open_subscription(with_options(base, topic=name, subscription=name)) as subscription,
        await open_subscription(with_options(base, topic=name + "x", subscription="s")) as other,
    ):
        await topic.send(Message(b"1"))
        assert await acked(subscription, 1) == [b"1"]
        assert await other.receive(wait=0.0) == []
        keys = driver_of(subscription)._keys
        slots = {
            key.partition("}")[0]
            for key in (keys.log, keys.info, keys.later, keys.tries, keys.wake, keys.dead)
        }
        assert len(slots) == 1  # one hash tag: one node of a cluster


async def test_a_wiped_server_is_an_empty_topic() -> None:
    with private_redis() as server:
        url = with_options(server.url, topic="t")
        async with (
            await open_topic(url) as topic,
            await open_subscription(url + "&subscription=s") as subscription,
        ):
            await topic.send_many(numbered(3))
            [held, *_] = await take(subscription, 2)
            strict = await open_subscription(url + "&subscription=s&create=never")
            waiting = asyncio.create_task(subscription.receive(10, wait=PATIENCE))
            await asyncio.sleep(0.1)
            with redis.Redis.from_url(server.url) as client:
                client.flushall()

            await topic.send(Message(b"first after"))
            await topic.send(Message(bytes(100_000)))  # large ones take another way

            assert b"first after" in [*bodies(await waiting), *bodies(await subscription.receive())]
            with pytest.raises(LeaseLostError):
                await held.ack()
            with redis.Redis.from_url(server.url) as client:
                client.flushall()
            with pytest.raises(TopicNotFoundError, match="create=never"):
                await strict.receive(wait=1.0)
            await strict.close()
