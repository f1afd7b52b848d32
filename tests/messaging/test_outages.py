"""Brokers that go away for longer than one call waits: under ``run``, ``async for`` and sends."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from molva._base.clock import SYSTEM_CLOCK, ManualClock
from molva.messaging import (
    BrokenBrokerError,
    Delivery,
    IncompatibleBrokerError,
    Message,
    MessageTooLargeError,
    MessagingError,
    Queue,
    SendManyError,
    Subscription,
    Topic,
    UnavailableError,
    open_queue,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging._retry import Retries
from molva.messaging.conformance import PATIENCE, bodies, eventually, take
from molva.messaging.conformance.waiting import numbered
from molva.messaging.drivers import memory
from molva.messaging.url import BrokerURL
from tests.brokers import (
    Server,
    private_kafka,
    private_nats,
    private_rabbitmq,
    private_redis,
)

# Seconds for which a server is away here: longer than any receive waits by itself.
AWAY = 7.0


class GoingAway:
    """A driver in memory that fails at receiving or settling for as long as ``error`` is set."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.error: Exception | None = None
        self.receives = 0

    async def receive_batch(self, limit: int, *, wait: float) -> Any:
        self.receives += 1
        if self.error is not None:
            raise self.error
        return await self._driver.receive_batch(limit, wait=wait)

    async def settle_batch(self, settlements: Sequence[Any]) -> Any:
        if self.error is not None:
            raise self.error
        return await self._driver.settle_batch(settlements)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)


class Place:
    """A topic in memory, and one consumer of it whose broker can be taken away."""

    def __init__(self, name: str, clock: ManualClock | None = None) -> None:
        self.url = f"memory://{name}?topic=t"
        self.clock = clock or SYSTEM_CLOCK
        self.got: list[bytes] = []

    async def __aenter__(self) -> "Place":
        url = BrokerURL.parse(f"{self.url}&subscription=s")
        self.topic = await open_topic(self.url, clock=self.clock)
        driver = await memory.open_subscription(url, clock=self.clock)
        self.driver: Any = GoingAway(driver)
        self.subscription = Subscription(
            self.driver, url, retries=Retries(5), clock=self.clock, tracing=None
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self.driver.error = None
        await self.subscription.close()
        await self.topic.close()

    async def handle(self, delivery: Delivery) -> None:
        self.got.append(delivery.message.body)

    async def iterate(self) -> None:
        async for delivery in self.subscription:
            self.got.append(delivery.message.body)
            await delivery.ack()

    def start(self, way: str) -> "asyncio.Task[None]":
        running = self.iterate() if way == "iterating" else self.subscription.run(self.handle)
        return asyncio.create_task(running)


both_ways = pytest.mark.parametrize("way", ["run", "iterating"])


@both_ways
@pytest.mark.parametrize("error", [UnavailableError("gone"), OSError("connection refused")])
async def test_a_broker_away_for_a_minute_is_tried_some_twenty_times_and_met_again(
    way: str, error: Exception
) -> None:
    clock = ManualClock()
    async with Place(f"minute-{way}-{type(error).__name__}", clock) as place:
        running = place.start(way)
        await clock.pass_time(6.0)
        place.driver.error = error
        before = place.driver.receives
        for _ in range(600):
            await clock.pass_time(0.1)
            await asyncio.sleep(0)

        tries = place.driver.receives - before
        assert 10 <= tries <= 25, "a busy loop, or hardly a try"
        assert place.subscription.received.unavailable in (tries, tries - 1)
        assert not running.done()

        place.driver.error = None
        await place.topic.send_many(numbered(3))
        for _ in range(60):
            await clock.pass_time(0.1)
            await asyncio.sleep(0)
        assert place.got == [b"1", b"2", b"3"]
        place.subscription.stop()
        async with asyncio.timeout(1.0):
            await running


@both_ways
async def test_a_stop_ends_the_waiting_for_a_broker_at_once(way: str) -> None:
    clock = ManualClock()
    async with Place(f"stop-{way}", clock) as place:
        place.driver.error = UnavailableError("gone")
        running = place.start(way)
        await clock.pass_time(20.0)
        assert not running.done()

        place.subscription.stop()

        async with asyncio.timeout(1.0):
            await running


@both_ways
async def test_a_close_ends_the_waiting_for_a_broker_at_once(way: str) -> None:
    async with Place(f"close-{way}") as place:
        place.driver.error = UnavailableError("gone")
        running = place.start(way)
        await eventually(lambda: place.driver.receives > 1)

        await place.subscription.close()

        async with asyncio.timeout(1.0):
            await running


@both_ways
@pytest.mark.parametrize(
    "error", [BrokenBrokerError("fsync failed"), IncompatibleBrokerError("damaged")]
)
async def test_what_no_waiting_mends_is_raised(way: str, error: MessagingError) -> None:
    async with Place(f"broken-{way}-{type(error).__name__}") as place:
        running = place.start(way)
        await eventually(lambda: place.driver.receives > 0)
        place.driver.error = error
        await place.topic.send(Message(b"wakes it"))
        async with asyncio.timeout(10.0):
            with pytest.raises(type(error)):
                await running


async def test_handlers_go_on_while_the_broker_is_away_and_their_messages_come_again() -> None:
    async with Place("handlers") as place:
        begun, may_end = asyncio.Event(), asyncio.Event()
        ended: list[int] = []

        async def handle(delivery: Delivery) -> None:
            begun.set()
            await may_end.wait()
            ended.append(delivery.attempt)

        running = asyncio.create_task(place.subscription.run(handle, concurrency=2))
        await place.topic.send(Message(b"7"))
        await begun.wait()
        place.driver.error = UnavailableError("gone")
        may_end.set()
        await eventually(lambda: len(ended) == 1)
        assert not running.done()

        # It could not be settled: whoever owns the lane next gets it again.
        place.subscription.stop()
        await running
        place.driver.error = None
        await place.subscription.close()
        async with await open_subscription(f"{place.url}&subscription=s") as heir:
            [again] = await take(heir, 1)
            assert again.message.body == b"7"
            await again.ack()


async def test_the_log_tells_once_that_a_broker_went_and_once_that_it_came(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "molva.messaging")
    clock = ManualClock()
    async with Place("log", clock) as place:
        place.driver.error = UnavailableError("connection refused")
        running = place.start("run")
        for _ in range(300):
            await clock.pass_time(0.1)
        place.driver.error = None
        for _ in range(120):
            await clock.pass_time(0.1)
        place.subscription.stop()
        await running
    told = [record.message for record in caplog.records]
    assert len(told) == 2
    assert "connection refused" in told[0]
    assert "t/s" in told[0]
    assert "over after" in told[1]


class Slow:
    """A driver in memory whose sends take ``seconds`` and then fail, while ``error`` is set."""

    def __init__(self, driver: Any, clock: ManualClock, seconds: float) -> None:
        self._driver = driver
        self._clock = clock
        self.seconds = seconds
        self.error: Exception | None = None

    async def send_batch(self, messages: Sequence[Message]) -> Any:
        if self.error is None:
            return await self._driver.send_batch(messages)
        # The broker goes while it stores: some of a call may have been confirmed before.
        if len(messages) > 1:
            [stored] = await self._driver.send_batch(messages[:1])
            await self._clock.sleep(self.seconds)
            return [stored, *[self.error] * (len(messages) - 1)]
        await self._clock.sleep(self.seconds)
        raise self.error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)


async def _sends_during_an_outage(
    name: str, seconds: float, error: Exception
) -> tuple["asyncio.Task[None]", "asyncio.Task[None]", Topic, Any, ManualClock]:
    """Send one message into an outage, and another half way through its call."""
    clock = ManualClock()
    url = BrokerURL.parse(f"memory://{name}?topic=t")
    driver: Any = Slow(await memory.open_topic(url, clock=clock), clock, seconds)
    topic = Topic(driver, url, clock=clock, tracing=None)
    driver.error = error
    first = asyncio.create_task(topic.send(Message(b"first")))
    await asyncio.sleep(0.01)
    await clock.pass_time(seconds / 2)
    behind = asyncio.create_task(topic.send(Message(b"behind")))
    await asyncio.sleep(0.01)
    await clock.pass_time(seconds / 2 + 0.01)
    await asyncio.sleep(0.01)
    assert first.done()
    return first, behind, topic, driver, clock


async def test_what_waits_behind_a_call_that_ran_out_of_time_does_not_wait_as_long_again() -> None:
    gone = UnavailableError("no answer in time")
    first, behind, topic, driver, _ = await _sends_during_an_outage("behind", 10.0, gone)

    assert behind.done(), "it would wait for another ten seconds"
    for sent in (first, behind):
        with pytest.raises(UnavailableError):
            sent.result()
    assert topic.counters.failed == 2
    driver.error = None
    await topic.send(Message(b"after"))
    await topic.close()


async def test_a_call_that_was_stored_in_part_holds_up_nobody_twice() -> None:
    clock = ManualClock()
    url = BrokerURL.parse("memory://in-part?topic=t")
    driver: Any = Slow(await memory.open_topic(url, clock=clock), clock, 10.0)
    topic = Topic(driver, url, clock=clock, tracing=None)
    driver.error = UnavailableError("no answer in time")
    many = asyncio.create_task(topic.send_many(numbered(3)))
    await asyncio.sleep(0.01)
    await clock.pass_time(1.0)
    behind = asyncio.create_task(topic.send(Message(b"behind")))
    await asyncio.sleep(0.01)
    await clock.pass_time(9.01)
    await asyncio.sleep(0.01)

    with pytest.raises(SendManyError) as failed:
        many.result()
    assert sorted(failed.value.failures) == [1, 2]
    assert behind.done(), "it would wait for another ten seconds"
    with pytest.raises(UnavailableError):
        behind.result()
    await topic.close()


@pytest.mark.parametrize(
    ("seconds", "error"),
    [(0.5, UnavailableError("refused")), (10.0, MessageTooLargeError(2, 1))],
)
async def test_what_waits_behind_another_failure_has_a_try_of_its_own(
    seconds: float, error: MessagingError
) -> None:
    name = f"own-{seconds:g}"
    first, behind, topic, _, clock = await _sends_during_an_outage(name, seconds, error)

    with pytest.raises(type(error)):
        first.result()
    assert not behind.done()
    await clock.pass_time(seconds)
    await asyncio.wait([behind])
    with pytest.raises(type(error)):
        behind.result()
    await topic.close()


# Real servers -------------------------------------------------------------------------------


async def ride_out(
    consumer: Subscription | Queue, sender: Any, server: Server, how: str, number: int = 50
) -> Counter[bytes]:
    """Handle messages while the server goes away for AWAY seconds; return what was handled."""
    got: Counter[bytes] = Counter()

    async def handle(delivery: Delivery) -> None:
        got[delivery.message.body] += 1

    running = asyncio.create_task(consumer.run(handle, concurrency=4))
    await sender.send_many(numbered(number))
    async with asyncio.timeout(PATIENCE):
        while len(got) < number:
            await asyncio.sleep(0.02)
    await asyncio.to_thread(server.kill if how == "killed" else server.pause)
    await asyncio.sleep(AWAY)
    assert not running.done(), "run ended while the broker was away"
    await asyncio.to_thread(server.start if how == "killed" else server.resume)
    async with asyncio.timeout(90.0):
        await send_surely(sender, Message(b"after"))
        while not got[b"after"]:
            await asyncio.sleep(0.02)
    consumer.stop()
    await running
    return got


async def send_surely(sender: Any, message: Message) -> None:
    while True:
        with contextlib.suppress(UnavailableError):
            await sender.send(message)
            return
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("how", ["killed", "paused"])
@pytest.mark.parametrize("kind", ["topic", "queue"])
async def test_run_goes_on_by_itself_when_redis_is_back(kind: str, how: str) -> None:
    with private_redis() as server:
        consumer: Subscription | Queue
        if kind == "topic":
            url = with_options(server.url, topic="t")
            sender: Any = await open_topic(url)
            consumer = await open_subscription(f"{url}&subscription=s")
        else:
            sender = consumer = await open_queue(with_options(server.url, queue="q"))
        got = await ride_out(consumer, sender, server, how)
        assert len(got) == 51
        assert consumer.received.unavailable >= 1, "it was not away for long enough to matter"
        assert await consumer.dead_letters() == []
        await consumer.close()
        await sender.close()


@pytest.mark.parametrize("how", ["killed", "paused"])
@pytest.mark.parametrize("kind", ["topic", "queue"])
async def test_run_goes_on_by_itself_when_rabbitmq_is_back(kind: str, how: str) -> None:
    with private_rabbitmq(hurried=True) as server:
        consumer: Subscription | Queue
        if kind == "topic":
            url = with_options(server.url, topic="t", timeout="3")
            sender: Any = await open_topic(url)
            consumer = await open_subscription(f"{url}&subscription=s")
        else:
            sender = consumer = await open_queue(with_options(server.url, queue="q", timeout="3"))
        got = await ride_out(consumer, sender, server, how)
        assert len(got) == 51
        assert await consumer.dead_letters() == []
        await consumer.close()
        await sender.close()


@pytest.mark.parametrize("how", ["killed", "paused"])
async def test_run_goes_on_by_itself_when_nats_is_back(how: str) -> None:
    with private_nats() as server:
        url = with_options(server.url, topic="t")
        async with (
            await open_topic(url) as topic,
            await open_subscription(f"{url}&subscription=s") as subscription,
        ):
            got = await ride_out(subscription, topic, server, how)
            assert len(got) == 51
            # One that hangs is given up after four seconds, and waited for once more.
            assert subscription.received.unavailable >= (how == "killed")
            assert await subscription.dead_letters() == []


async def test_run_goes_on_by_itself_when_kafka_is_back() -> None:
    with private_kafka() as server:
        url = with_options(server.url, topic="t")
        async with (
            await open_topic(with_options(url, timeout="3")) as topic,
            await open_subscription(f"{url}&subscription=s") as subscription,
        ):
            got = await ride_out(subscription, topic, server, "paused")
            assert len(got) == 51


async def test_what_is_kept_is_held_for_many_leases() -> None:
    with private_redis() as server:
        url = with_options(server.url, topic="t", subscription="s", lease="1.5")
        async with (
            await open_topic(with_options(server.url, topic="t")) as topic,
            await open_subscription(url) as one,
            await open_subscription(url) as other,
        ):
            await topic.send_many(numbered(20))
            held = await take(one, 20)
            async with one.keeping(held):
                assert await other.receive(20, wait=4.0) == []
            again: list[Delivery] = []
            async with asyncio.timeout(PATIENCE):
                while len(again) < 20:
                    again += await other.receive(20, wait=1.0)
            assert sorted(bodies(again)) == sorted(bodies(held))
