"""Bodies, keys, names, options, opening and closing."""

import asyncio
import contextlib
import json
import os
from typing import Final

import pytest

from molva.messaging import (
    Action,
    ClosedError,
    InvalidURLError,
    Message,
    MessageTooLargeError,
    SendManyError,
    TopicNotFoundError,
    UnsupportedFeatureError,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.conformance.harness import Harness, Suite, lacks, needs
from molva.messaging.conformance.waiting import PATIENCE, bodies, no_handler, numbered, take
from molva.messaging.driver import ALL_FEATURES

__all__ = ["Basics"]

# Seconds within which an open is refused. Much less than a driver gives a server that does not
# answer and tries again; the rest is for a busy machine.
_AT_ONCE: Final = 15.0


class Basics(Suite):
    """Bodies, keys, names, options, opening and closing."""

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
    async def test_a_body_arrives_as_it_was_sent(self, h: Harness, body: bytes) -> None:
        topic, subscription = await h.topic(), await h.subscription()

        await topic.send(Message(body))

        [delivery] = await take(subscription, 1)
        assert delivery.message.body == body

    async def test_a_body_of_the_largest_size_arrives(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        # Where the limit is that of memory, as far as a test should go.
        body = bytes(min(topic.capabilities.max_body_bytes, 8 * 1024 * 1024))

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
        self, h: Harness, text: str
    ) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        message = Message(b"1", key=text, headers={text: text, "other": ""})

        await topic.send(message)

        [delivery] = await take(subscription, 1)
        assert delivery.message.key == text
        assert delivery.message.headers == {text: text, "other": ""}

    async def test_a_message_without_a_key_arrives_without_one(self, h: Harness) -> None:
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
        self, h: Harness, message: Message, error: type[Exception]
    ) -> None:
        topic, subscription = await h.topic(), await h.subscription()

        with pytest.raises(error):
            await topic.send(message)
        with pytest.raises(error):
            await topic.send_many([Message(b"good"), message])

        assert await h.rest(subscription) == []

    async def test_a_body_over_the_limit_is_refused(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        limit = topic.capabilities.max_body_bytes

        with pytest.raises(MessageTooLargeError) as caught:
            await topic.send(Message(bytes(limit + 1)))

        assert (caught.value.size_bytes, caught.value.limit_bytes) == (limit + 1, limit)
        assert await h.rest(subscription) == []

    async def test_a_body_over_the_limit_fails_alone_in_its_batch(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        huge = Message(bytes(topic.capabilities.max_body_bytes + 1))

        with pytest.raises(SendManyError) as caught:
            await topic.send_many([Message(b"1", key="k"), huge, Message(b"3", key="k")])

        assert list(caught.value.failures) == [1]
        assert isinstance(caught.value.failures[1], MessageTooLargeError)
        assert bodies(await take(subscription, 2)) == [b"1", b"3"]

    async def test_the_senders_headers_may_change_after_sending(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        headers = {"n": "1"}
        sending = asyncio.create_task(topic.send(Message(b"1", headers=headers)))
        await asyncio.sleep(0)
        headers["n"] = "2"
        await sending
        headers["n"] = "3"

        [delivery] = await take(subscription, 1)

        assert delivery.message.headers == {"n": "1"}

    async def test_one_consumers_headers_are_not_the_others(self, h: Harness) -> None:
        topic = await h.topic()
        first, second = await h.subscription("a"), await h.subscription("b")
        await topic.send(Message(b"1", headers={"n": "1"}))

        [delivery] = await take(first, 1)
        with contextlib.suppress(TypeError):
            delivery.message.headers["n"] = "2"  # type: ignore[index]

        [other] = await take(second, 1)
        assert other.message.headers == {"n": "1"}

    async def test_an_id_stays_through_every_hand_over(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        messages = numbered(3)
        await topic.send_many(messages)

        first = await take(subscription, 3)
        await subscription.settle([(delivery, Action.NACK) for delivery in first])
        second = await take(subscription, 3)
        await subscription.close()
        third = await take(await h.subscription(), 3)

        for deliveries in (first, second, third):
            assert {d.message.id for d in deliveries} == {m.id for m in messages}

    async def test_topics_of_one_broker_are_isolated(self, h: Harness) -> None:
        first, second = await h.topic("a"), await h.topic("b")
        reads_first, reads_second = (
            await h.subscription(topic="a"),
            await h.subscription(topic="b"),
        )

        await first.send(Message(b"1"))
        await second.send(Message(b"2"))

        assert bodies(await take(reads_first, 1)) == [b"1"]
        assert bodies(await take(reads_second, 1)) == [b"2"]
        assert await h.rest(reads_first) == []
        assert await h.rest(reads_second) == []

    @pytest.mark.parametrize(
        "name", ["a b", "a/b", "../x", "λ🎈", "a&b=c?#%", "'; DROP TABLE topic --", '"', "x" * 200]
    )
    async def test_odd_names_are_names(self, h: Harness, name: str) -> None:
        name = name[: 200 - len(h.prefix)]
        topic, other = await h.topic(name), await h.topic(name[:-1] + "y")
        subscription = await h.subscription(name, topic=name)
        await other.send(Message(b"2"))

        await topic.send(Message(b"1"))

        assert bodies(await h.rest(subscription, least=1)) == [b"1"]

    @needs("stat")
    @pytest.mark.parametrize("name", ["a b", "a/b", "λ🎈", "'; DROP TABLE topic --"])
    async def test_stat_calls_subscriptions_by_their_names(self, h: Harness, name: str) -> None:
        topic, _ = await h.topic(), await h.subscription(name)

        stat = await topic.stat()

        assert stat is not None
        assert set(stat.subscriptions) == {name}

    @pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "a\0b"])
    async def test_a_name_that_cannot_be_shown_is_refused(self, h: Harness, name: str) -> None:
        with pytest.raises(InvalidURLError, match="1 to 200 printable"):
            await open_topic(with_options(h.base_url(), topic=name))
        with pytest.raises(InvalidURLError, match="1 to 200 printable"):
            await open_subscription(h.url("t", name))

    async def test_a_url_without_a_topic_is_refused_with_an_example(self, h: Harness) -> None:
        with pytest.raises(InvalidURLError, match=r"\?topic="):
            await open_topic(h.base_url())

    async def test_a_url_without_a_subscription_is_refused_with_an_example(
        self, h: Harness
    ) -> None:
        with pytest.raises(InvalidURLError, match="&subscription="):
            await open_subscription(h.url())

    async def test_create_never_refuses_a_missing_topic_at_once(self, h: Harness) -> None:
        await h.topic("there")

        with pytest.raises(TopicNotFoundError, match=r"missing'.*create=never"):
            async with asyncio.timeout(_AT_ONCE):
                await open_topic(h.url("missing", create="never"))
        with pytest.raises(TopicNotFoundError, match=r"missing'.*create=never"):
            async with asyncio.timeout(_AT_ONCE):
                await open_subscription(h.url("missing", "s", create="never"))

    async def test_create_never_refuses_a_missing_subscription_at_once(self, h: Harness) -> None:
        await h.topic()

        for _ in range(2):  # the first did not make it
            with pytest.raises(TopicNotFoundError, match=r"'missing'.*create=never"):
                async with asyncio.timeout(_AT_ONCE):
                    await open_subscription(h.url("t", "missing", create="never"))

    async def test_create_never_opens_what_is_there(self, h: Harness) -> None:
        await (await h.topic()).close()
        await (await h.subscription()).close()

        topic, subscription = await h.topic(create="never"), await h.subscription(create="never")
        await topic.send(Message(b"1"))

        assert bodies(await take(subscription, 1)) == [b"1"]

    async def test_a_closed_topic_says_that_it_was_closed(self, h: Harness) -> None:
        topic = await h.topic()
        await topic.close()

        with pytest.raises(ClosedError, match="closed"):
            await topic.send(Message(b"1"))
        with pytest.raises(ClosedError, match="closed"):
            await topic.send_many([Message(b"1")])
        with pytest.raises(ClosedError, match="closed"):
            await topic.stat()

    async def test_a_closed_subscription_says_that_it_was_closed(self, h: Harness) -> None:
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

    async def test_closing_twice_is_closing_once(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()

        for _ in range(2):
            await topic.close()
            await subscription.close()

    async def test_closing_ends_a_receive_that_waits(self, h: Harness) -> None:
        h.let_only_wake_ups_wake()
        subscription = await h.subscription()
        waiting = asyncio.create_task(subscription.receive(wait=3 * PATIENCE))
        await asyncio.sleep(0.02)

        await subscription.close()

        async with asyncio.timeout(PATIENCE):
            with pytest.raises(ClosedError):
                await waiting

    async def test_closing_stores_what_was_sent(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        sends = [asyncio.create_task(topic.send(message)) for message in numbered(50)]
        await asyncio.sleep(0)

        await topic.close()
        await asyncio.gather(*sends)

        assert len(await take(subscription, 50)) == 50

    async def test_closing_stores_the_whole_of_a_large_batch(self, h: Harness) -> None:
        topic, subscription = await h.topic(), await h.subscription()
        sending = asyncio.create_task(topic.send_many(numbered(3_500)))
        await asyncio.sleep(0)

        await topic.close()
        async with asyncio.timeout(PATIENCE):
            await sending

        assert len(await take(subscription, 3_500)) == 3_500

    async def test_an_unknown_option_suggests_the_nearest(self, h: Harness) -> None:
        with pytest.raises(InvalidURLError, match=r"'capasity'; did you mean 'capacity'\?"):
            await open_topic(h.url(capasity=5))
        for option in h.options("topic"):
            wrong = option[:-1] + "q" + option[-1]
            with pytest.raises(InvalidURLError, match=rf"'{wrong}'; did you mean '{option}'\?"):
                await open_subscription(h.url("t", "s", **{wrong: 5}))

    async def test_what_is_missing_is_refused_when_it_is_required(self, h: Harness) -> None:
        missing = sorted(ALL_FEATURES.keys() - h.capabilities("topic").features)

        for feature in missing:
            with pytest.raises(UnsupportedFeatureError) as refused:
                await h.subscription(require=feature)
            assert refused.value.feature == feature

    async def test_an_option_given_twice_is_refused(self, h: Harness) -> None:
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
        self, h: Harness, option: str, value: str
    ) -> None:
        with pytest.raises(InvalidURLError, match=f"{value}|unknown option|one of"):
            await open_subscription(h.url("t", "s", **{option: value}))

    async def test_options_do_not_leak_into_the_next_open(self, h: Harness) -> None:
        narrow, wide = await h.subscription("a", prefetch=1), await h.subscription("b")
        once = await h.subscription("c", delivery="at-most-once")
        topic = await h.topic()

        await topic.send_many(numbered(3))

        assert len(await take(narrow, 3)) == len(await take(once, 3)) == 3
        assert not any(delivery.settled for delivery in await take(wide, 3))

    @needs("capacity")
    async def test_a_bound_does_not_leak_into_the_next_open(self, h: Harness) -> None:
        bounded, unbounded = await h.topic(capacity=1), await h.topic()
        subscription = await h.subscription()

        await unbounded.send_many(numbered(3))

        assert (bounded.capacity, unbounded.capacity) == (1, None)
        assert len(await take(subscription, 3)) == 3

    @lacks("capacity")
    async def test_a_bound_that_cannot_be_kept_is_refused(self, h: Harness) -> None:
        with pytest.raises(UnsupportedFeatureError, match="'capacity'"):
            await h.topic(capacity=5)

    @needs("lanes")
    async def test_lanes_of_an_existing_topic_cannot_change(self, h: Harness) -> None:
        await h.topic(lanes=4)
        await h.topic(lanes=4)

        with pytest.raises(InvalidURLError, match=r"lanes=5 is refused.*made with 4"):
            await h.topic(lanes=5)
        with pytest.raises(InvalidURLError, match=r"lanes=5 is refused.*made with 4"):
            await h.subscription(lanes=5)

    async def test_a_subscription_needs_at_least_one_attempt(self, h: Harness) -> None:
        with pytest.raises(ValueError, match="max_attempts=0"):
            await h.subscription(max_attempts=0)

    async def test_a_receive_of_nothing_is_refused(self, h: Harness) -> None:
        subscription = await h.subscription()

        with pytest.raises(ValueError, match="limit=0"):
            await subscription.receive(0)
        with pytest.raises(ValueError, match="concurrency=0"):
            await subscription.run(no_handler, concurrency=0)
