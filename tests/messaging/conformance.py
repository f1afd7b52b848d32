"""What every driver's topics and subscriptions do, written once.

A driver's own test file is a harness and a subclass:

    class TestMemory(TopicConformance):
        @pytest.fixture
        def harness(self) -> TopicHarness: ...

Time is real unless a test asks the harness for a ``ManualClock`` before it opens anything.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from typing import ClassVar, Final

import pytest

from molva._base.clock import SYSTEM_CLOCK, Clock, ManualClock
from molva.messaging import (
    Action,
    ClosedError,
    Delivery,
    InvalidURLError,
    LeaseLostError,
    Message,
    MessageTooLargeError,
    QueueFullError,
    SendManyError,
    Subscription,
    Topic,
    TopicNotFoundError,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging._lanes import lane_of

__all__ = ["TopicConformance", "TopicHarness", "bodies", "eventually", "key_in_lane", "take"]

# Seconds after which a test that waits for something gives up. Nothing here takes long;
# a busy machine may.
_PATIENCE: Final = 20.0


class TopicHarness(ABC):
    """What the suite needs of a driver: URLs of one fresh broker, and its time."""

    # Seconds after which a settled message has made room for another.
    settle_interval: ClassVar[float]
    # Seconds after which lanes have moved to a consumer that joined or whose peer left.
    share_interval: ClassVar[float]

    def __init__(self) -> None:
        self.clock: Clock = SYSTEM_CLOCK
        self._opened: list[Topic | Subscription] = []

    @abstractmethod
    def base_url(self) -> str:
        """Return the URL of one broker, which is empty at first."""

    @abstractmethod
    async def kept(self, topic: str = "t") -> int:
        """Return how many messages of a topic are stored, settled or not."""

    def url(self, topic: str = "t", subscription: str | None = None, **options: object) -> str:
        named = {"topic": topic, **options}
        if subscription is not None:
            named["subscription"] = subscription
        return with_options(self.base_url(), **{name: str(named[name]) for name in named})

    def use_manual_clock(self) -> ManualClock:
        """Let time stand still for whatever is opened from now on."""
        self.clock = clock = ManualClock()
        return clock

    async def topic(self, topic: str = "t", **options: object) -> Topic:
        opened = await open_topic(self.url(topic, None, **options), clock=self.clock)
        self._opened.append(opened)
        return opened

    async def subscription(
        self, name: str = "s", *, topic: str = "t", max_attempts: int = 5, **options: object
    ) -> Subscription:
        url = self.url(topic, name, **options)
        opened = await open_subscription(url, max_attempts=max_attempts, clock=self.clock)
        self._opened.append(opened)
        return opened

    async def close(self) -> None:
        for opened in self._opened:
            await opened.close()


async def take(subscription: Subscription, number: int) -> list[Delivery]:
    """Receive exactly ``number`` deliveries, however many calls that takes."""
    found: list[Delivery] = []
    async with asyncio.timeout(_PATIENCE):
        while len(found) < number:
            found += await subscription.receive(number - len(found), wait=0.5)
    return found


async def eventually(holds: Callable[[], object]) -> None:
    """Wait until ``holds()`` is true."""
    async with asyncio.timeout(_PATIENCE):
        while not holds():
            await asyncio.sleep(0.001)


def bodies(deliveries: list[Delivery]) -> list[bytes]:
    return [delivery.message.body for delivery in deliveries]


def key_in_lane(lane: int, lanes: int) -> str:
    """Return a key whose messages travel in ``lane``."""
    return next(key for key in map(str, itertools.count()) if lane_of(key, b"", lanes) == lane)


def _numbered(number: int, *, key: str | None = "k") -> list[Message]:
    return [Message(b"%d" % n, key=key) for n in range(1, number + 1)]


@contextlib.asynccontextmanager
async def _running(
    subscription: Subscription,
    handler: Callable[[Delivery], object],
    *,
    concurrency: int = 1,
) -> AsyncIterator["asyncio.Task[None]"]:
    """Run a handler for the length of the block. It may be a plain function."""

    async def handle(delivery: Delivery) -> None:
        result = handler(delivery)
        if asyncio.iscoroutine(result):
            await result

    task = asyncio.create_task(subscription.run(handle, concurrency=concurrency))
    try:
        yield task
    finally:
        subscription.stop()
        if not task.done():
            async with asyncio.timeout(_PATIENCE):
                await asyncio.wait([task])
        if not task.cancelled():
            task.result()


class TopicConformance:
    """The suite. Subclasses bring the fixture ``harness``."""

    @pytest.fixture
    async def h(self, harness: TopicHarness) -> AsyncIterator[TopicHarness]:
        yield harness
        await harness.close()

    # Basics -----------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"\0",
            b"\xff\xfe not UTF-8 \x80",
            bytes(range(256)),
            json.dumps({"body": "7", "id": "x", "headers": {}}).encode(),
            os.urandom(256 * 1024),
        ],
        ids=["empty", "one byte", "no UTF-8", "every byte", "like an envelope", "256 KiB"],
    )
    async def test_a_body_arrives_as_it_was_sent(self, h: TopicHarness, body: bytes) -> None:
        topic, subscription = await h.topic(), await h.subscription()

        await topic.send(Message(body))

        [delivery] = await take(subscription, 1)
        assert delivery.message.body == body

    @pytest.mark.parametrize(
        "text",
        [
            "",
            " ",
            "ключ λ 🎈",
            'it\'s "quoted" \\ and; DROP TABLE topic --',
            "a\0b",
            "\n\r\t\x1b\x7f",
            "x" * 5_000,
        ],
        ids=["empty", "blank", "unicode", "quotes", "null", "control", "long"],
    )
    async def test_odd_keys_and_headers_arrive_as_they_were_sent(
        self, h: TopicHarness, text: str
    ) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        message = Message(b"1", key=text, headers={text: text, "other": ""})

        await topic.send(message)

        [delivery] = await take(subscription, 1)
        assert delivery.message.key == text
        assert delivery.message.headers == {text: text, "other": ""}

    async def test_a_message_without_a_key_arrives_without_one(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()

        await topic.send(Message(b"1"))

        [delivery] = await take(subscription, 1)
        assert delivery.message.key is None
        assert delivery.message.headers == {}

    @pytest.mark.parametrize(
        ("message", "error"),
        [
            (Message("text"), TypeError),  # type: ignore[arg-type]
            (Message(bytearray(b"1")), TypeError),  # type: ignore[arg-type]
            (Message(b"1", headers={"n": 1}), TypeError),  # type: ignore[dict-item]
            (Message(b"1", headers={1: "n"}), TypeError),  # type: ignore[dict-item]
            (Message(b"1", key=7), TypeError),  # type: ignore[arg-type]
            (Message(b"1", headers={"n": "\ud800"}), ValueError),
            (Message(b"1", key="\udfff"), ValueError),
            (Message(b"1", id=b"short"), ValueError),
        ],
    )
    async def test_what_no_broker_can_carry_is_refused(
        self, h: TopicHarness, message: Message, error: type[Exception]
    ) -> None:
        topic, subscription = await h.topic(), await h.subscription()

        with pytest.raises(error):
            await topic.send(message)
        with pytest.raises(error):
            await topic.send_many([Message(b"good"), message])

        assert await subscription.receive(wait=0.0) == []

    async def test_a_body_over_the_limit_is_refused(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        limit = topic.capabilities.max_body_bytes

        with pytest.raises(MessageTooLargeError) as caught:
            await topic.send(Message(bytes(limit + 1)))

        assert (caught.value.size_bytes, caught.value.limit_bytes) == (limit + 1, limit)
        assert await subscription.receive(wait=0.0) == []

    async def test_a_body_over_the_limit_fails_alone_in_its_batch(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        huge = Message(bytes(topic.capabilities.max_body_bytes + 1))

        with pytest.raises(SendManyError) as caught:
            await topic.send_many([Message(b"1", key="k"), huge, Message(b"3", key="k")])

        assert list(caught.value.failures) == [1]
        assert isinstance(caught.value.failures[1], MessageTooLargeError)
        assert bodies(await take(subscription, 2)) == [b"1", b"3"]

    async def test_the_senders_headers_may_change_after_sending(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        headers = {"n": "1"}
        sending = asyncio.create_task(topic.send(Message(b"1", headers=headers)))
        await asyncio.sleep(0)
        headers["n"] = "2"
        await sending
        headers["n"] = "3"

        [delivery] = await take(subscription, 1)

        assert delivery.message.headers == {"n": "1"}

    async def test_one_consumers_headers_are_not_the_others(self, h: TopicHarness) -> None:
        topic = await h.topic()
        first, second = await h.subscription("a"), await h.subscription("b")
        await topic.send(Message(b"1", headers={"n": "1"}))

        [delivery] = await take(first, 1)
        with contextlib.suppress(TypeError):
            delivery.message.headers["n"] = "2"  # type: ignore[index]

        [other] = await take(second, 1)
        assert other.message.headers == {"n": "1"}

    async def test_an_id_stays_through_every_hand_over(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        messages = _numbered(3)
        await topic.send_many(messages)

        first = await take(subscription, 3)
        await subscription.settle([(delivery, Action.NACK) for delivery in first])
        second = await take(subscription, 3)
        await subscription.close()
        third = await take(await h.subscription(), 3)

        for deliveries in (first, second, third):
            assert [d.message.id for d in deliveries] == [m.id for m in messages]

    async def test_topics_of_one_broker_are_isolated(self, h: TopicHarness) -> None:
        first, second = await h.topic("a"), await h.topic("b")
        reads_first, reads_second = (
            await h.subscription(topic="a"),
            await h.subscription(topic="b"),
        )

        await first.send(Message(b"1"))
        await second.send(Message(b"2"))

        assert bodies(await take(reads_first, 1)) == [b"1"]
        assert bodies(await take(reads_second, 1)) == [b"2"]
        assert await reads_first.receive(wait=0.0) == []
        assert await reads_second.receive(wait=0.0) == []

    @pytest.mark.parametrize(
        "name", ["a b", "a/b", "../x", "λ🎈", "a&b=c?#%", "'; DROP TABLE topic --", '"', "x" * 200]
    )
    async def test_odd_names_are_names(self, h: TopicHarness, name: str) -> None:
        topic, other = await h.topic(name), await h.topic(name[:-1] + "y")
        subscription = await h.subscription(name, topic=name)
        await other.send(Message(b"2"))

        await topic.send(Message(b"1"))

        assert bodies(await subscription.receive(10)) == [b"1"]
        assert set((await topic.stat()).subscriptions) == {name}  # type: ignore[union-attr]

    @pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "a\0b"])
    async def test_a_name_that_cannot_be_shown_is_refused(self, h: TopicHarness, name: str) -> None:
        with pytest.raises(InvalidURLError, match="1 to 200 printable"):
            await open_topic(h.url(name))
        with pytest.raises(InvalidURLError, match="1 to 200 printable"):
            await open_subscription(h.url("t", name))

    async def test_a_url_without_a_topic_is_refused_with_an_example(self, h: TopicHarness) -> None:
        with pytest.raises(InvalidURLError, match=r"\?topic="):
            await open_topic(h.base_url())

    async def test_a_url_without_a_subscription_is_refused_with_an_example(
        self, h: TopicHarness
    ) -> None:
        with pytest.raises(InvalidURLError, match="&subscription="):
            await open_subscription(h.url())

    async def test_create_never_refuses_a_missing_topic_at_once(self, h: TopicHarness) -> None:
        await h.topic("there")

        async with asyncio.timeout(1.0):
            with pytest.raises(TopicNotFoundError, match=r"'missing'.*create=never"):
                await open_topic(h.url("missing", create="never"))
            with pytest.raises(TopicNotFoundError, match=r"'missing'.*create=never"):
                await open_subscription(h.url("missing", "s", create="never"))

    async def test_create_never_refuses_a_missing_subscription_at_once(
        self, h: TopicHarness
    ) -> None:
        await h.topic()

        async with asyncio.timeout(1.0):
            with pytest.raises(TopicNotFoundError, match=r"'missing'.*create=never"):
                await open_subscription(h.url("t", "missing", create="never"))

        assert (await (await h.topic()).stat()).subscriptions == {}  # type: ignore[union-attr]

    async def test_create_never_opens_what_is_there(self, h: TopicHarness) -> None:
        await (await h.topic()).close()
        await (await h.subscription()).close()

        topic, subscription = await h.topic(create="never"), await h.subscription(create="never")
        await topic.send(Message(b"1"))

        assert bodies(await take(subscription, 1)) == [b"1"]

    async def test_a_closed_topic_says_that_it_was_closed(self, h: TopicHarness) -> None:
        topic = await h.topic()
        await topic.close()

        with pytest.raises(ClosedError, match="closed"):
            await topic.send(Message(b"1"))
        with pytest.raises(ClosedError, match="closed"):
            await topic.send_many([Message(b"1")])
        with pytest.raises(ClosedError, match="closed"):
            await topic.stat()

    async def test_a_closed_subscription_says_that_it_was_closed(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)
        await subscription.close()

        with pytest.raises(ClosedError, match="closed"):
            await subscription.receive()
        with pytest.raises(ClosedError, match="closed"):
            await delivery.ack()
        with pytest.raises(ClosedError, match="closed"):
            await subscription.stat()
        with pytest.raises(ClosedError, match="closed"):
            await subscription.dead_letters()

    async def test_closing_twice_is_closing_once(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()

        for _ in range(2):
            await topic.close()
            await subscription.close()

    async def test_closing_ends_a_receive_that_waits(self, h: TopicHarness) -> None:
        subscription = await h.subscription()
        waiting = asyncio.create_task(subscription.receive(wait=60.0))
        await asyncio.sleep(0.02)

        await subscription.close()

        async with asyncio.timeout(0.2):
            with pytest.raises(ClosedError):
                await waiting

    async def test_closing_stores_what_was_sent(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        sends = [asyncio.create_task(topic.send(message)) for message in _numbered(50)]
        await asyncio.sleep(0)

        await topic.close()
        await asyncio.gather(*sends)

        assert len(await take(subscription, 50)) == 50

    async def test_closing_stores_the_whole_of_a_large_batch(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        sending = asyncio.create_task(topic.send_many(_numbered(3_500)))
        await asyncio.sleep(0)

        await topic.close()
        async with asyncio.timeout(_PATIENCE):
            await sending

        assert len(await take(subscription, 3_500)) == 3_500

    async def test_an_unknown_option_suggests_the_nearest(self, h: TopicHarness) -> None:
        with pytest.raises(InvalidURLError, match=r"'capasity'; did you mean 'capacity'\?"):
            await open_topic(h.url(capasity=5))
        with pytest.raises(InvalidURLError, match=r"'max_opn'; did you mean 'max_open'\?"):
            await open_subscription(h.url("t", "s", max_opn=5))

    async def test_an_option_given_twice_is_refused(self, h: TopicHarness) -> None:
        with pytest.raises(InvalidURLError, match="'capacity' is given twice"):
            await open_topic(h.url(capacity=1) + "&capacity=2")

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("capacity", "0"),
            ("capacity", "many"),
            ("max_open", "-1"),
            ("lanes", "63"),
            ("lanes", "0"),
            ("start", "now"),
            ("create", "maybe"),
        ],
    )
    async def test_an_option_that_makes_no_sense_is_refused(
        self, h: TopicHarness, option: str, value: str
    ) -> None:
        with pytest.raises(InvalidURLError, match=value):
            await open_subscription(h.url("t", "s", **{option: value}))

    async def test_options_do_not_leak_into_the_next_open(self, h: TopicHarness) -> None:
        bounded = await h.topic(capacity=1)
        unbounded = await h.topic()
        await h.subscription("a", max_open=1)
        wide = await h.subscription("b")

        await unbounded.send_many(_numbered(3))

        assert (bounded.capacity, unbounded.capacity) == (1, None)
        assert len(await wide.receive(10)) == 3

    async def test_lanes_of_an_existing_topic_cannot_change(self, h: TopicHarness) -> None:
        await h.topic(lanes=4)
        await h.topic(lanes=4)

        with pytest.raises(InvalidURLError, match=r"lanes=5 is refused.*made with 4"):
            await h.topic(lanes=5)
        with pytest.raises(InvalidURLError, match=r"lanes=5 is refused.*made with 4"):
            await h.subscription(lanes=5)

    async def test_a_subscription_needs_at_least_one_attempt(self, h: TopicHarness) -> None:
        with pytest.raises(ValueError, match="max_attempts=0"):
            await h.subscription(max_attempts=0)

    async def test_a_receive_of_nothing_is_refused(self, h: TopicHarness) -> None:
        subscription = await h.subscription()

        with pytest.raises(ValueError, match="limit=0"):
            await subscription.receive(0)
        with pytest.raises(ValueError, match="concurrency=0"):
            await subscription.run(_no_handler, concurrency=0)

    # Groups -----------------------------------------------------------------------------

    async def test_two_subscriptions_each_get_everything(self, h: TopicHarness) -> None:
        topic = await h.topic()
        first, second = await h.subscription("a"), await h.subscription("b")

        await topic.send_many(_numbered(20))

        expected = [b"%d" % n for n in range(1, 21)]
        assert bodies(await take(first, 20)) == expected
        assert bodies(await take(second, 20)) == expected

    async def test_what_was_sent_before_a_consumer_came_waits_for_it(self, h: TopicHarness) -> None:
        topic = await h.topic()
        await (await h.subscription()).close()

        await topic.send_many(_numbered(20))

        assert len(await take(await h.subscription(), 20)) == 20

    async def test_start_earliest_gets_what_was_stored_before(self, h: TopicHarness) -> None:
        topic = await h.topic()
        await topic.send_many(_numbered(3))

        subscription = await h.subscription(start="earliest")
        await topic.send(Message(b"4", key="k"))

        assert bodies(await take(subscription, 4)) == [b"1", b"2", b"3", b"4"]

    async def test_start_latest_gets_only_what_is_stored_after(self, h: TopicHarness) -> None:
        topic = await h.topic()
        await topic.send_many(_numbered(3))

        subscription = await h.subscription(start="latest")
        await topic.send(Message(b"4", key="k"))

        assert bodies(await subscription.receive(10)) == [b"4"]
        stat = await subscription.stat()
        assert stat is not None
        assert stat.pending == 1

    async def test_start_matters_only_where_the_subscription_is_made(self, h: TopicHarness) -> None:
        topic = await h.topic()
        await (await h.subscription()).close()
        await topic.send_many(_numbered(3))

        again = await h.subscription(start="latest")

        assert len(await take(again, 3)) == 3

    async def test_consumers_of_one_subscription_share_without_overlap(
        self, h: TopicHarness
    ) -> None:
        topic = await h.topic()
        consumers = [await h.subscription() for _ in range(3)]
        messages = [Message(b"%d" % n, key=str(n)) for n in range(300)]
        await topic.send_many(messages)
        got: dict[int, list[bytes]] = defaultdict(list)

        async with contextlib.AsyncExitStack() as stack:
            for number, consumer in enumerate(consumers):
                handler = _collector(got[number])
                await stack.enter_async_context(_running(consumer, handler))
            await eventually(lambda: sum(map(len, got.values())) >= 300)

        assert Counter(itertools.chain(*got.values())) == Counter(m.id for m in messages)
        assert all(len(ids) > 30 for ids in got.values())

    async def test_nothing_is_lost_while_consumers_come_and_go(self, h: TopicHarness) -> None:
        topic = await h.topic()
        staying = await h.subscription()
        sent: set[bytes] = set()
        handled: set[bytes] = set()
        before: list[int] = []
        enough = asyncio.Event()

        async def handle(delivery: Delivery) -> None:
            await asyncio.sleep(0.001)
            handled.add(delivery.message.id)

        async def send() -> None:
            while not enough.is_set():
                batch = [Message(b"1", key=str(n)) for n in range(20)]
                await topic.send_many(batch)
                sent.update(message.id for message in batch)
                await asyncio.sleep(0.01)

        sending = asyncio.create_task(send())
        async with _running(staying, handle, concurrency=4):
            for _ in range(3):
                visitor = await h.subscription()
                seen = len(handled)
                async with _running(visitor, handle, concurrency=4):
                    await asyncio.sleep(h.share_interval + 0.05)
                await visitor.close()
                before.append(seen)
                await eventually(lambda: len(handled) > before[-1])
            enough.set()
            await sending
            await eventually(lambda: handled >= sent)

        assert handled == sent

    async def test_stat_counts_what_waits(self, h: TopicHarness) -> None:
        clock = h.use_manual_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(5))
        await clock.pass_time(2.0)
        deliveries = await take(subscription, 5)
        await deliveries[0].ack()
        await deliveries[1].reject("bad")
        await clock.pass_time(h.settle_interval)

        stat = await subscription.stat()

        assert stat is not None
        assert (stat.pending, stat.dead) == (3, 1)
        assert stat.oldest_seconds == pytest.approx(2.0 + h.settle_interval)
        whole = await topic.stat()
        assert whole is not None
        assert (whole.stored, whole.subscriptions) == (5, {"s": stat})

    async def test_stat_of_an_empty_subscription_is_zero(self, h: TopicHarness) -> None:
        clock = h.use_manual_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"%d" % n, key=str(n)) for n in range(50)])
        await subscription.settle([(d, Action.ACK) for d in await take(subscription, 50)])
        await clock.pass_time(h.settle_interval)

        stat = await subscription.stat()

        assert stat is not None
        assert (stat.pending, stat.dead, stat.oldest_seconds) == (0, 0, None)

    # Acknowledging ----------------------------------------------------------------------

    async def test_what_was_acked_stays_settled_after_reopening(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(3))
        for delivery in await take(subscription, 3):
            await delivery.ack()
        await subscription.close()

        again = await h.subscription()
        await topic.send(Message(b"4", key="k"))

        assert bodies(await again.receive(10)) == [b"4"]

    async def test_what_was_not_acked_comes_again_after_closing(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(3))
        deliveries = await take(subscription, 3)
        await deliveries[0].ack()
        await subscription.close()

        again = await h.subscription()

        assert bodies(await take(again, 2)) == [b"2", b"3"]

    async def test_an_open_message_is_handed_over_once(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(3))

        first, second = await subscription.receive(10), await subscription.receive(10, wait=0.0)

        assert bodies(first) == [b"1", b"2", b"3"]
        assert second == []

    @pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
    async def test_acks_in_any_order_lose_nothing(
        self, h: TopicHarness, order: tuple[int, ...]
    ) -> None:
        topic = await h.topic(lanes=2)
        sent = [Message(b"%d" % n, key=key_in_lane(lane, 2)) for n, lane in enumerate((0, 0, 1, 0))]
        await (await h.subscription()).close()
        await topic.send_many(sent)
        left = {message.id for message in sent}

        for place in order:
            consumer = await h.subscription()
            deliveries = {d.message.id: d for d in await consumer.receive(10, wait=1.0)}
            assert deliveries.keys() >= left
            await deliveries[sent[place].id].ack()
            left.discard(sent[place].id)
            # Others of its lane may still be in front of it, and then it comes again.
            for settled in deliveries.keys() - left - {sent[place].id}:
                await deliveries[settled].ack()
            await consumer.close()

        assert await (await h.subscription()).receive(10, wait=0.0) == []

    async def test_acks_in_any_order_within_one_consumer_lose_nothing(
        self, h: TopicHarness
    ) -> None:
        for name, order in enumerate(itertools.permutations(range(5), 3)):
            topic = await h.topic(str(name), lanes=1)
            subscription = await h.subscription(topic=str(name))
            await topic.send_many(_numbered(5))
            deliveries = await take(subscription, 5)

            for place in order:
                await deliveries[place].ack()
            await subscription.close()

            again = bodies(await (await h.subscription(topic=str(name))).receive(10, wait=0.0))
            # Only what stands behind the first unsettled one may come twice.
            first = next(n for n in range(6) if n not in order)
            assert again == [b"%d" % n for n in range(first + 1, 6)]

    async def test_a_nacked_message_comes_again_with_its_attempt_counted(
        self, h: TopicHarness
    ) -> None:
        topic, subscription = await h.topic(), await h.subscription(max_attempts=10)
        await topic.send(Message(b"1"))
        attempts = []

        for _ in range(4):
            [delivery] = await take(subscription, 1)
            attempts.append(delivery.attempt)
            await delivery.nack()

        assert attempts == [1, 2, 3, 4]

    async def test_a_delayed_nack_does_not_come_early(self, h: TopicHarness) -> None:
        clock = h.use_manual_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)
        await delivery.nack(delay=30.0)

        await clock.pass_time(29.9)
        early = await subscription.receive(wait=0.0)
        await clock.pass_time(0.2)
        late = await subscription.receive(wait=0.0)

        assert early == []
        assert bodies(late) == [b"1"]

    async def test_a_delayed_nack_wakes_a_receive_that_waits(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)
        await delivery.nack(delay=0.05)

        async with asyncio.timeout(2.0):
            [again] = await subscription.receive(wait=60.0)

        assert again.attempt == 2

    async def test_a_nack_wakes_another_task_that_waits(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)
        waiting = asyncio.create_task(subscription.receive(wait=60.0))
        await asyncio.sleep(0.02)

        await delivery.nack()

        async with asyncio.timeout(0.15):
            [again] = await waiting
        assert again.attempt == 2

    async def test_nacked_messages_respect_the_limit_of_a_receive(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(5))
        first = await take(subscription, 5)
        await subscription.settle([(delivery, Action.NACK) for delivery in first])

        again = [bodies(await subscription.receive(2, wait=0.0)) for _ in range(3)]

        assert again == [[b"1", b"2"], [b"3", b"4"], [b"5"]]

    async def test_a_rejected_message_is_a_dead_letter_with_its_reason(
        self, h: TopicHarness
    ) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        message = Message(b"1\xff", key="k\0", headers={"h": "λ"})
        await topic.send(message)
        [delivery] = await take(subscription, 1)
        await delivery.nack()
        [delivery] = await take(subscription, 1)

        await delivery.reject("unreadable: 🎈")

        [dead] = await subscription.dead_letters()
        assert (dead.message, dead.reason, dead.attempts) == (message, "unreadable: 🎈", 2)
        assert abs(dead.died_at_us - h.clock.now_us()) < 60_000_000
        assert await subscription.receive(wait=0.0) == []

    async def test_a_dead_letter_stays_after_reopening(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(2))
        first, second = await take(subscription, 2)
        await first.reject("bad")
        await second.ack()
        await subscription.close()

        again = await h.subscription()

        assert await again.receive(wait=0.0) == []
        assert [d.message.body for d in await again.dead_letters()] == [b"1"]

    async def test_dead_letters_are_kept_for_each_subscription(self, h: TopicHarness) -> None:
        topic = await h.topic()
        first, second = await h.subscription("a"), await h.subscription("b")
        await topic.send(Message(b"1"))

        [delivery] = await take(first, 1)
        await delivery.reject("bad")

        assert len(await first.dead_letters()) == 1
        assert await second.dead_letters() == []
        assert bodies(await take(second, 1)) == [b"1"]

    async def test_dead_letters_come_oldest_first_up_to_a_limit(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(4))
        for delivery in await take(subscription, 4):
            await delivery.reject("bad")

        dead = await subscription.dead_letters(3)

        assert [letter.message.body for letter in dead] == [b"1", b"2", b"3"]

    async def test_the_last_attempt_that_is_nacked_is_a_dead_letter(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription(max_attempts=2)
        await topic.send_many(_numbered(2))
        await (await take(subscription, 2))[0].nack()
        [again] = await take(subscription, 1)

        await again.nack()

        [dead] = await subscription.dead_letters()
        assert (dead.message.body, dead.attempts) == (b"1", 2)
        assert "the last one" in dead.reason
        assert await subscription.receive(wait=0.0) == []

    @pytest.mark.parametrize("first", ["ack", "nack", "reject"])
    @pytest.mark.parametrize("second", ["ack", "nack", "reject"])
    async def test_the_first_settlement_wins(
        self, h: TopicHarness, first: str, second: str
    ) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)

        for action in (first, second):
            await _settle(delivery, action)

        again = await subscription.receive(wait=0.0)
        dead = await subscription.dead_letters()
        assert (len(again), len(dead)) == (int(first == "nack"), int(first == "reject"))

    async def test_the_first_of_two_settlements_at_once_wins(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)

        await asyncio.gather(delivery.reject("bad"), delivery.ack())
        await subscription.settle([(delivery, Action.ACK), (delivery, Action.NACK)])

        assert len(await subscription.dead_letters()) == 1

    async def test_a_late_ack_cannot_settle_a_later_hand_over(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)
        late = _copy(delivery, subscription)
        await delivery.nack()
        [again] = await take(subscription, 1)

        with pytest.raises(LeaseLostError):
            await late.ack()

        await again.nack()
        assert bodies(await take(subscription, 1)) == [b"1"]

    @pytest.mark.parametrize("action", ["ack", "nack", "reject"])
    async def test_a_token_is_stale_once_its_lane_has_moved(
        self, h: TopicHarness, action: str
    ) -> None:
        clock = h.use_manual_clock()
        topic, slow = await h.topic(lanes=2), await h.subscription()
        await topic.send(Message(b"1", key=key_in_lane(1, 2)))
        [delivery] = await take(slow, 1)
        late = _copy(delivery, slow)
        await delivery.nack()
        quick = await h.subscription()
        await clock.pass_time(h.share_interval)
        assert await slow.receive(wait=0.0) == []
        [taken_over] = await quick.receive(wait=0.0)

        with pytest.raises(LeaseLostError):
            await _settle(late, action)

        assert await quick.dead_letters() == []
        await taken_over.nack()
        assert bodies(await quick.receive(wait=0.0)) == [b"1"]

    async def test_a_token_stays_stale_when_its_lane_comes_back(self, h: TopicHarness) -> None:
        clock = h.use_manual_clock()
        topic, slow = await h.topic(lanes=2), await h.subscription()
        await topic.send(Message(b"1", key=key_in_lane(1, 2)))
        [delivery] = await take(slow, 1)
        late = _copy(delivery, slow)
        await delivery.nack()
        quick = await h.subscription()
        await clock.pass_time(h.share_interval)
        assert await slow.receive(wait=0.0) == []
        [_] = await quick.receive(wait=0.0)
        await quick.close()
        await clock.pass_time(h.share_interval)
        [again] = await slow.receive(wait=0.0)

        with pytest.raises(LeaseLostError):
            await late.ack()

        await again.nack()
        assert bodies(await slow.receive(wait=0.0)) == [b"1"]

    async def test_stale_ones_do_not_hold_up_the_others_of_a_batch(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(3))
        first, second, third = await take(subscription, 3)
        stale = _copy(second, subscription)
        await second.nack()

        with pytest.raises(LeaseLostError) as caught:
            await subscription.settle([(d, Action.ACK) for d in (first, stale, third)])

        assert caught.value.message_id == second.message.id
        await subscription.close()
        assert bodies(await (await h.subscription()).receive(10, wait=0.0))[0] == b"2"

    # Order ------------------------------------------------------------------------------

    async def test_messages_of_one_lane_come_in_the_order_sent(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()

        for message in _numbered(30):
            await topic.send(message)

        assert bodies(await take(subscription, 30)) == [b"%d" % n for n in range(1, 31)]

    async def test_concurrent_sends_of_one_task_keep_their_order(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()

        await asyncio.gather(*(topic.send(message) for message in _numbered(2_500)))

        assert bodies(await take(subscription, 2_500)) == [b"%d" % n for n in range(1, 2_501)]

    async def test_what_was_nacked_together_comes_again_in_order(self, h: TopicHarness) -> None:
        clock = h.use_manual_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(4))
        deliveries = await subscription.receive(3, wait=0.0)
        for delivery, delay in zip(deliveries, (3.0, 1.0, 2.0), strict=True):
            await delivery.nack(delay=delay)

        order = []
        for _ in range(4):
            order += bodies(await subscription.receive(10, wait=0.0))
            await clock.pass_time(1.0)

        assert order == [b"1", b"2", b"3", b"4"]

    async def test_a_nacked_message_is_not_overtaken_by_what_follows_it(
        self, h: TopicHarness
    ) -> None:
        clock = h.use_manual_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(2))
        [delivery] = await subscription.receive(1, wait=0.0)
        await delivery.nack(delay=5.0)
        await topic.send_many([Message(b"3", key="k")])

        meanwhile = await subscription.receive(10, wait=0.0)
        await clock.pass_time(5.0)
        afterwards = await subscription.receive(10, wait=0.0)

        assert meanwhile == []
        assert bodies(afterwards) == [b"1", b"2", b"3"]

    async def test_keys_keep_their_order_over_consumers_of_any_speed(self, h: TopicHarness) -> None:
        topic = await h.topic()
        consumers = [await h.subscription() for _ in range(2)]
        seen: dict[str | None, list[int]] = defaultdict(list)
        rng = random.Random(1)

        async def handle(delivery: Delivery) -> None:
            await asyncio.sleep(rng.random() * 0.004)
            seen[delivery.message.key].append(int(delivery.message.body))

        await topic.send_many([Message(b"%d" % n, key=str(n % 10)) for n in range(200)])
        async with (
            _running(consumers[0], handle, concurrency=4),
            _running(consumers[1], handle, concurrency=4),
        ):
            await eventually(lambda: sum(map(len, seen.values())) >= 200)

        assert seen == {str(k): list(range(k, 200, 10)) for k in range(10)}

    # Running handlers -------------------------------------------------------------------

    async def test_run_acks_what_its_handler_returned_from(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(3))
        got: list[bytes] = []

        async with _running(subscription, _collector(got)):
            await eventually(lambda: len(got) == 3)
        await subscription.close()

        assert await (await h.subscription()).receive(wait=0.0) == []

    async def test_run_leaves_alone_what_its_handler_settled(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        attempts: list[int] = []

        async def handle(delivery: Delivery) -> None:
            attempts.append(delivery.attempt)
            if delivery.attempt < 3:
                await delivery.nack()

        async with _running(subscription, handle):
            await eventually(lambda: len(attempts) == 3)

        assert attempts == [1, 2, 3]

    async def test_run_does_not_retry_what_was_settled_before_its_handler_raised(
        self, h: TopicHarness
    ) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(2))
        got: list[bytes] = []

        async def handle(delivery: Delivery) -> None:
            got.append(delivery.message.body)
            await delivery.ack()
            raise RuntimeError("after the ack")

        async with _running(subscription, handle):
            await eventually(lambda: len(got) == 2)

        assert got == [b"1", b"2"]
        assert await subscription.dead_letters() == []

    async def test_run_works_keys_side_by_side(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"1", key=str(n)) for n in range(3)])
        together = asyncio.Barrier(4)

        async with _running(subscription, lambda _: together.wait(), concurrency=3):
            async with asyncio.timeout(_PATIENCE):
                await together.wait()

    async def test_run_never_works_on_more_than_was_asked_for(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"1", key=str(n)) for n in range(60)])
        running, most, done = 0, 0, 0

        async def handle(_: Delivery) -> None:
            nonlocal running, most, done
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            done += 1

        async with _running(subscription, handle, concurrency=3):
            await eventually(lambda: done == 60)

        assert most == 3

    async def test_run_works_one_key_one_after_the_other(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(10))
        running, most, done = 0, 0, 0

        async def handle(_: Delivery) -> None:
            nonlocal running, most, done
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            done += 1

        async with _running(subscription, handle, concurrency=8):
            await eventually(lambda: done == 10)

        assert most == 1

    async def test_run_tries_again_with_growing_delays(self, h: TopicHarness) -> None:
        clock = h.use_manual_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"1"))
        tried_at: list[float] = []

        def handle(_: Delivery) -> None:
            tried_at.append(clock.monotonic())
            raise RuntimeError("no")

        async with _running(subscription, handle):
            await _pass_until(clock, lambda: len(tried_at) == 5)

        gaps = [later - earlier for earlier, later in itertools.pairwise(tried_at)]
        for gap, longest in zip(gaps, (0.5, 1.0, 2.0, 4.0), strict=True):
            assert 0.75 * longest <= gap <= longest + 0.1

    async def test_run_gives_up_after_the_last_attempt(self, h: TopicHarness) -> None:
        clock = h.use_manual_clock()
        topic, subscription = await h.topic(), await h.subscription(max_attempts=3)
        await topic.send_many(_numbered(2))
        attempts: list[tuple[bytes, int]] = []

        def handle(delivery: Delivery) -> None:
            attempts.append((delivery.message.body, delivery.attempt))
            if delivery.message.body == b"1":
                raise RuntimeError("poison 🎈")

        async with _running(subscription, handle):
            await _pass_until(clock, lambda: len(attempts) >= 4)

        assert attempts == [(b"1", 1), (b"1", 2), (b"1", 3), (b"2", 1)]
        [dead] = await subscription.dead_letters()
        assert (dead.message.body, dead.attempts) == (b"1", 3)
        assert dead.reason == "RuntimeError: poison 🎈"

    async def test_run_counts_its_own_attempts_towards_a_nack(self, h: TopicHarness) -> None:
        clock = h.use_manual_clock()
        topic, subscription = await h.topic(), await h.subscription(max_attempts=4)
        await topic.send(Message(b"1"))
        attempts: list[int] = []

        async def handle(delivery: Delivery) -> None:
            attempts.append(delivery.attempt)
            if len(attempts) == 2:
                await delivery.nack()
            elif len(attempts) < 4:
                raise RuntimeError("no")

        async with _running(subscription, handle):
            await _pass_until(clock, lambda: len(attempts) >= 4)

        assert attempts == [1, 2, 3, 4]

    async def test_run_keeps_the_order_of_a_key_over_retries(self, h: TopicHarness) -> None:
        clock = h.use_manual_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"%d" % n, key=str(n % 3)) for n in range(30)])
        failures = Counter({n: random.Random(n).choice((0, 0, 1, 2)) for n in range(30)})
        done: dict[str | None, list[int]] = defaultdict(list)

        def handle(delivery: Delivery) -> None:
            number = int(delivery.message.body)
            if failures[number]:
                failures[number] -= 1
                raise RuntimeError("not yet")
            done[delivery.message.key].append(number)

        async with _running(subscription, handle, concurrency=3):
            await _pass_until(clock, lambda: sum(map(len, done.values())) >= 30)

        assert done == {str(k): list(range(k, 30, 3)) for k in range(3)}

    async def test_run_does_not_hold_up_other_keys_while_one_waits_to_be_retried(
        self, h: TopicHarness
    ) -> None:
        h.use_manual_clock()  # time stands still: a retry would never come
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send(Message(b"bad", key="a"))
        await topic.send_many([Message(b"good", key=str(n)) for n in range(20)])
        done = 0

        def handle(delivery: Delivery) -> None:
            nonlocal done
            if delivery.message.body == b"bad":
                raise RuntimeError("no")
            done += 1

        async with _running(subscription, handle, concurrency=1):
            await eventually(lambda: done == 20)

    async def test_stop_ends_run_after_the_handlers_under_way(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"%d" % n, key=str(n)) for n in range(20)])
        started, finished = asyncio.Event(), 0
        go_on = asyncio.Event()

        async def handle(_: Delivery) -> None:
            nonlocal finished
            started.set()
            await go_on.wait()
            finished += 1

        async with _running(subscription, handle, concurrency=2) as running:
            await started.wait()
            await asyncio.sleep(0)
            subscription.stop()
            await asyncio.sleep(0.02)
            assert not running.done()
            go_on.set()
            async with asyncio.timeout(_PATIENCE):
                await running

        assert finished == 2
        await subscription.close()
        assert len(await take(await h.subscription(), 18)) == 18

    async def test_stop_does_not_wait_for_a_retry(self, h: TopicHarness) -> None:
        h.use_manual_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(3))
        tried = asyncio.Event()

        def handle(_: Delivery) -> None:
            tried.set()
            raise RuntimeError("no")

        async with _running(subscription, handle) as running:
            await tried.wait()
            await asyncio.sleep(0.01)
            subscription.stop()
            async with asyncio.timeout(_PATIENCE):
                await running

        again = await subscription.receive(10, wait=0.0)
        assert bodies(again) == [b"1", b"2", b"3"]
        assert again[0].attempt == 2

    async def test_a_cancelled_run_gives_everything_back(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"%d" % n, key="ab"[n % 2]) for n in range(10)])
        started = asyncio.Event()

        async def handle(_: Delivery) -> None:
            started.set()
            await asyncio.Event().wait()

        running = asyncio.create_task(subscription.run(handle, concurrency=2))
        await started.wait()
        running.cancel()
        async with asyncio.timeout(_PATIENCE):
            await asyncio.wait([running])

        again = await subscription.receive(20, wait=0.0)
        assert running.cancelled()
        assert {d.attempt for d in again} == {1}
        for key in ("a", "b"):
            numbers = [int(d.message.body) for d in again if d.message.key == key]
            assert numbers == list(range("ab".index(key), 10, 2))

    async def test_a_run_cancelled_at_any_moment_gives_everything_back(
        self, h: TopicHarness
    ) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        handled: Counter[bytes] = Counter()
        sent = 0

        async def handle(delivery: Delivery) -> None:
            await asyncio.sleep(0)
            handled[delivery.message.body] += 1

        for steps in range(60):
            running = asyncio.create_task(subscription.run(handle, concurrency=2))
            await asyncio.sleep(0)
            sending = asyncio.create_task(topic.send(Message(b"%d" % sent, key=str(sent % 3))))
            sent += 1
            for _ in range(steps % 15):
                await asyncio.sleep(0)
            running.cancel()
            await asyncio.wait([running, sending])

        handled.update(d.message.body for d in await subscription.receive(1_000, wait=0.0))
        assert handled.keys() == {b"%d" % n for n in range(sent)}

    async def test_a_handler_that_was_cancelled_gives_its_message_back(
        self, h: TopicHarness
    ) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(5))
        got: list[bytes] = []

        def handle(delivery: Delivery) -> None:
            got.append(delivery.message.body)
            if len(got) == 1:
                raise asyncio.CancelledError

        async with _running(subscription, handle):
            await eventually(lambda: len(got) == 6)

        assert got == [b"1", b"1", b"2", b"3", b"4", b"5"]

    async def test_iterating_yields_one_after_the_other_until_stopped(
        self, h: TopicHarness
    ) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many(_numbered(5))
        got = []

        async with asyncio.timeout(_PATIENCE):
            async for delivery in subscription:
                got.append(delivery.message.body)
                await delivery.ack()
                if len(got) == 3:
                    subscription.stop()

        assert got == [b"1", b"2", b"3"]
        assert bodies(await subscription.receive(10, wait=0.0)) == [b"4", b"5"]

    async def test_close_ends_an_iteration(self, h: TopicHarness) -> None:
        subscription = await h.subscription()

        async def iterate() -> None:
            async for _ in subscription:
                pass

        iterating = asyncio.create_task(iterate())
        await asyncio.sleep(0.01)
        await subscription.close()

        async with asyncio.timeout(_PATIENCE):
            await iterating

    # Flow -------------------------------------------------------------------------------

    async def test_a_full_topic_refuses_exactly_what_is_beyond_its_capacity(
        self, h: TopicHarness
    ) -> None:
        topic, subscription = await h.topic(capacity=3), await h.subscription()
        for message in _numbered(3):
            await topic.send(message)

        with pytest.raises(QueueFullError) as caught:
            await topic.send(Message(b"4"))

        assert caught.value.capacity == 3
        assert topic.counters.refused_full == 1
        assert topic.counters.stored == 3
        assert len(await subscription.receive(10, wait=0.0)) == 3

    async def test_a_batch_that_fits_in_part_is_stored_in_part(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(capacity=3), await h.subscription()

        with pytest.raises(SendManyError) as caught:
            await topic.send_many(_numbered(5))

        assert list(caught.value.failures) == [3, 4]
        assert {type(error) for error in caught.value.failures.values()} == {QueueFullError}
        assert bodies(await subscription.receive(10, wait=0.0)) == [b"1", b"2", b"3"]

    async def test_settling_makes_room_again(self, h: TopicHarness) -> None:
        clock = h.use_manual_clock()
        topic, subscription = await h.topic(capacity=3), await h.subscription()
        for _ in range(4):
            await topic.send_many(_numbered(3))
            first, second, third = await subscription.receive(10, wait=0.0)
            await first.ack()
            await second.reject("bad")
            await third.ack()
            await clock.pass_time(h.settle_interval)

        with pytest.raises(SendManyError) as caught:
            await topic.send_many(_numbered(4))

        assert list(caught.value.failures) == [3]

    async def test_the_slowest_subscription_decides_what_fits(self, h: TopicHarness) -> None:
        clock = h.use_manual_clock()
        topic = await h.topic(capacity=3)
        quick, slow = await h.subscription("quick"), await h.subscription("slow")
        await topic.send_many(_numbered(3))
        await quick.settle([(d, Action.ACK) for d in await quick.receive(10, wait=0.0)])
        await (await slow.receive(10, wait=0.0))[0].ack()
        await clock.pass_time(h.settle_interval)

        await topic.send(Message(b"4"))
        with pytest.raises(QueueFullError):
            await topic.send(Message(b"5"))

    async def test_a_consumer_never_holds_more_than_max_open(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription(max_open=3)
        await topic.send_many([Message(b"%d" % n, key=str(n)) for n in range(20)])

        first = await subscription.receive(10)
        none = await subscription.receive(10, wait=0.0)
        await first[0].ack()
        one = await subscription.receive(10, wait=0.0)

        assert (len(first), len(none), len(one)) == (3, 0, 1)

    async def test_nacked_messages_count_towards_max_open(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription(max_open=3)
        await topic.send_many([Message(b"%d" % n, key=str(n)) for n in range(20)])
        await subscription.settle([(d, Action.NACK) for d in await subscription.receive(10)])

        held = await subscription.receive(2, wait=0.0)
        held += await subscription.receive(10, wait=0.0)

        assert len(held) == 3
        assert await subscription.receive(10, wait=0.0) == []

    async def test_settling_lets_a_receive_go_on_that_waits_for_room(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription(max_open=1)
        await topic.send_many(_numbered(2))
        [first] = await subscription.receive(10)
        waiting = asyncio.create_task(subscription.receive(10, wait=60.0))
        await asyncio.sleep(0.02)

        await first.ack()

        async with asyncio.timeout(0.15):
            assert bodies(await waiting) == [b"2"]

    async def test_a_waiting_receive_burns_no_processor(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(lanes=1), await h.subscription(max_open=2)
        await topic.send_many(_numbered(4))
        [first, _] = await subscription.receive(10)
        await first.nack()
        [_] = await subscription.receive(10, wait=0.0)
        calls = 0
        clock = h.clock

        class Counting:
            def now_us(self) -> int:
                return clock.now_us()

            def monotonic(self) -> float:
                nonlocal calls
                calls += 1
                return clock.monotonic()

            async def sleep(self, seconds: float) -> None:
                await clock.sleep(seconds)

        subscription._driver._clock = Counting()  # type: ignore[attr-defined]
        assert await subscription.receive(10, wait=0.3) == []

        assert calls < 30

    async def test_what_everybody_has_settled_is_deleted(self, h: TopicHarness) -> None:
        clock = h.use_manual_clock()
        topic = await h.topic()
        subscriptions = [await h.subscription("a"), await h.subscription("b")]
        for _ in range(30):
            await topic.send_many(_numbered(100))
            for subscription in subscriptions:
                deliveries = await subscription.receive(1_000, wait=0.0)
                await subscription.settle([(d, Action.ACK) for d in deliveries])
            await clock.pass_time(1.1)

        assert await h.kept() <= 500

    async def test_nothing_is_deleted_that_a_slow_subscription_needs(self, h: TopicHarness) -> None:
        clock = h.use_manual_clock()
        topic = await h.topic()
        quick, slow = await h.subscription("quick"), await h.subscription("slow")
        sent, got = 0, []
        for turn in range(30):
            await topic.send_many([Message(b"%d" % n, key="k") for n in range(sent, sent + 50)])
            sent += 50
            await quick.settle([(d, Action.ACK) for d in await quick.receive(100, wait=0.0)])
            deliveries = await slow.receive(10 + turn, wait=0.0)
            got += [int(d.message.body) for d in deliveries]
            # The last of them stays open, and what is open must stay as well.
            await slow.settle([(d, Action.ACK) for d in deliveries])
            await clock.pass_time(1.1)

        while deliveries := await slow.receive(1_000, wait=0.0):
            got += [int(d.message.body) for d in deliveries]
        assert got == list(range(sent))

    async def test_an_open_message_outlives_what_was_settled_around_it(
        self, h: TopicHarness
    ) -> None:
        clock = h.use_manual_clock()
        topic, subscription = await h.topic(), await h.subscription()
        await topic.send_many([Message(b"%d" % n, key=str(n)) for n in range(100)])
        held, *others = await subscription.receive(100, wait=0.0)
        await subscription.settle([(d, Action.ACK) for d in others])
        for _ in range(10):
            await clock.pass_time(1.1)
            await topic.send_many([Message(b"later", key=str(n)) for n in range(100)])
            later = await subscription.receive(1_000, wait=0.0)
            await subscription.settle([(d, Action.ACK) for d in later])

        await held.nack()

        assert bodies(await subscription.receive(wait=0.0)) == [held.message.body]

    async def test_a_subscription_made_while_messages_are_deleted_misses_none(
        self, h: TopicHarness
    ) -> None:
        clock = h.use_manual_clock()
        topic, first = await h.topic(), await h.subscription("first")
        await topic.send_many(_numbered(1_000))
        while deliveries := await first.receive(1_000, wait=0.0):
            await first.settle([(d, Action.ACK) for d in deliveries])
        await clock.pass_time(1.1)
        await topic.send(Message(b"1001", key="k"))

        second = await h.subscription("second", start="earliest")
        stat = await second.stat()
        for n in range(1_002, 1_030):
            await topic.send(Message(b"%d" % n, key="k"))
        got = [int(body) for body in bodies(await second.receive(2_000, wait=0.0))]

        assert stat is not None
        assert got == list(range(1_030 - 28 - stat.pending, 1_030))

    async def test_a_message_sent_after_all_were_deleted_arrives(self, h: TopicHarness) -> None:
        clock = h.use_manual_clock()
        topic, subscription = await h.topic(), await h.subscription()
        for turn in range(5):
            await topic.send(Message(b"%d" % turn))
            [delivery] = await subscription.receive(10, wait=0.0)
            assert delivery.message.body == b"%d" % turn
            await delivery.ack()
            await clock.pass_time(1.1)
            if turn % 2:
                await topic.close()
                await subscription.close()
                topic, subscription = await h.topic(), await h.subscription()

    async def test_more_cannot_wait_in_this_process_than_it_can_hold(self, h: TopicHarness) -> None:
        topic = await h.topic()
        sends = [asyncio.create_task(topic.send(Message(b"1"))) for _ in range(10_500)]

        outcomes = await asyncio.gather(*sends, return_exceptions=True)

        refused = [outcome for outcome in outcomes if outcome is not None]
        assert {type(outcome) for outcome in refused} == {QueueFullError}
        assert len(refused) == topic.counters.refused_full == 500
        assert topic.counters.stored == 10_000

    # Cancelling -------------------------------------------------------------------------

    async def test_cancelling_a_receive_loses_nothing(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        rng = random.Random(7)
        got: list[bytes] = []
        over = asyncio.Event()

        async def send() -> int:
            sent = 0
            while not over.is_set():
                await topic.send(Message(b"%d" % sent, key=str(sent)))
                sent += 1
                await asyncio.sleep(rng.random() * 0.0006)
            return sent

        sending = asyncio.create_task(send())
        for _ in range(500):
            receiving = asyncio.create_task(subscription.receive(wait=5.0))
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.001)
            else:
                for _ in range(rng.randrange(6)):
                    await asyncio.sleep(0)
            receiving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                got += bodies(await receiving)
        over.set()
        sent = await sending
        got += bodies(await subscription.receive(10_000, wait=0.0))

        assert sorted(map(int, got)) == list(range(sent))

    async def test_a_topic_stays_usable_when_sends_are_cancelled(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        rng = random.Random(8)
        confirmed: set[bytes] = set()
        messages = [Message(b"%d" % n, key=str(n)) for n in range(300)]

        async def send(message: Message) -> None:
            await topic.send(message)
            confirmed.add(message.id)

        for message in messages:
            sending = asyncio.create_task(send(message))
            for _ in range(rng.randrange(6)):
                await asyncio.sleep(0)
            sending.cancel()
            await asyncio.wait([sending])
        await topic.send(Message(b"last", key="k"))

        arrived = [d.message for d in await subscription.receive(1_000, wait=0.0)]
        assert {message.id for message in arrived} >= confirmed
        assert len({message.id for message in arrived}) == len(arrived)
        assert b"last" in {message.body for message in arrived}

    async def test_a_cancelled_batch_leaves_the_topic_usable(self, h: TopicHarness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        sending = asyncio.create_task(topic.send_many(_numbered(5_000)))
        await asyncio.sleep(0)
        sending.cancel()
        await asyncio.wait([sending])

        async with asyncio.timeout(_PATIENCE):
            await topic.send(Message(b"last"))
            await topic.close()

        assert b"last" in bodies(await subscription.receive(10_000, wait=0.0))


async def _no_handler(_: Delivery) -> None:
    raise AssertionError("nothing was sent")


def _collector(got: list[bytes]) -> Callable[[Delivery], object]:
    def handle(delivery: Delivery) -> None:
        got.append(delivery.message.id)

    return handle


def _copy(delivery: Delivery, subscription: Subscription) -> Delivery:
    """Return what a consumer holds that does not know yet how its delivery ended."""
    return Delivery(delivery.message, delivery.attempt, delivery.token, subscription)


async def _settle(delivery: Delivery, action: str) -> None:
    if action == "ack":
        await delivery.ack()
    elif action == "nack":
        await delivery.nack()
    else:
        await delivery.reject("bad")


async def _pass_until(clock: ManualClock, holds: Callable[[], object]) -> None:
    """Move time on in small steps until ``holds()`` is true."""
    async with asyncio.timeout(_PATIENCE):
        while not holds():
            await asyncio.sleep(0.001)
            await clock.pass_time(0.05)
