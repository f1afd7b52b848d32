"""What only Kafka has: other programs' records, partitions, groups, what stands in a position."""

import asyncio
import os
import signal
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import pytest
from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewTopic

from molva.messaging import (
    Action,
    Delivery,
    ForkedError,
    LeaseLostError,
    Message,
    MessageTooLargeError,
    SendManyError,
    Subscription,
    TopicNotFoundError,
    UnsupportedFeatureError,
    open_queue,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.conformance import PATIENCE, bodies, eventually, take
from molva.messaging.conformance.actors import Actor, Start, starting
from molva.messaging.conformance.waiting import numbered, running_with
from molva.messaging.drivers import _kafka_consumer, _kafka_subscription
from molva.messaging.drivers._kafka_records import TOMBSTONE
from tests.messaging.test_kafka import KafkaHarness, murmur2_lane


@pytest.fixture
async def h(kafka_url: str) -> AsyncIterator[KafkaHarness]:
    harness = KafkaHarness(kafka_url)
    yield harness
    await harness.close()


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    async with starting() as start:
        yield start


def _servers(h: KafkaHarness) -> dict[str, Any]:
    return {"bootstrap.servers": h.base_url().partition("://")[2].partition("?")[0]}


async def _put(h: KafkaHarness, topic: str, *records: dict[str, Any]) -> None:
    """Store records as a program would that knows nothing of Molva."""
    producer = Producer({**_servers(h), "acks": "all"})
    for record in records:
        producer.produce(h.prefix + topic, **record)
    assert await asyncio.to_thread(producer.flush, 10) == 0


def _position(h: KafkaHarness, topic: str, partition: int = 0) -> TopicPartition:
    admin = AdminClient(_servers(h))
    group = f"{h.prefix}{topic}/s"
    [future] = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)]).values()
    found: TopicPartition
    [found] = [
        at
        for at in future.result().topic_partitions or ()
        if (at.topic, at.partition) == (h.prefix + topic, partition)
    ]
    return found


async def _moved(h: KafkaHarness, topic: str, offset: int) -> None:
    """Wait until a position is committed."""
    async with asyncio.timeout(PATIENCE):
        while (await asyncio.to_thread(_position, h, topic)).offset != offset:
            await asyncio.sleep(0.05)


async def _spoke(actor: Actor) -> None:
    await eventually(lambda: actor.lines)


# Other programs ---------------------------------------------------------------------------


async def test_records_of_other_programs_are_messages(h: KafkaHarness) -> None:
    await h.topic(lanes=1)
    subscription = await h.subscription()
    await _put(
        h,
        "t",
        {"value": b"plain"},
        {"value": b"keyed", "key": b"\xff\0", "headers": {"type": b"x"}},
        {"value": None, "key": b"gone"},
    )

    plain, keyed, gone = await take(subscription, 3)

    assert (plain.message.body, plain.message.key, plain.message.headers) == (b"plain", None, {})
    assert (keyed.message.key, keyed.message.headers) == ("\\xff\0", {"type": "x"})
    assert (gone.message.body, gone.message.headers) == (b"", {TOMBSTONE: "true"})
    assert len({d.message.id for d in (plain, keyed, gone)}) == 3


async def test_a_foreign_record_keeps_its_id_when_it_comes_again(h: KafkaHarness) -> None:
    await h.topic(lanes=1)
    subscription = await h.subscription()
    await _put(h, "t", {"value": None, "key": b"k"})
    [first] = await take(subscription, 1)
    await first.nack()
    [second] = await take(subscription, 1)
    await second.reject("bad")
    assert await subscription.replay() == 1

    [third] = await take(subscription, 1)

    assert first.message == second.message == third.message


async def test_other_programs_find_key_body_and_headers(h: KafkaHarness) -> None:
    topic = await h.topic(lanes=1)
    message = Message(b"\0body", key="ключ", headers={"type": "λ"})
    await topic.send(message)

    consumer = Consumer({**_servers(h), "group.id": "looks", "auto.offset.reset": "earliest"})
    consumer.assign([TopicPartition(f"{h.prefix}t", 0, 0)])
    record = await asyncio.to_thread(consumer.poll, 10)
    consumer.close()

    assert record is not None
    assert (record.key(), record.value()) == ("ключ".encode(), b"\0body")
    assert record.headers() == [("molva-id", message.id), ("type", "λ".encode())]


async def test_a_key_goes_where_javas_clients_send_it(h: KafkaHarness) -> None:
    topic, subscription = await h.topic(lanes=7), await h.subscription()
    keys = [*map(str, range(40)), "ключ", "a longer key, of several words"]
    await topic.send_many([Message(b"", key=key) for key in keys])

    found = {d.message.key: d.token[0] for d in await take(subscription, len(keys))}

    assert found == {key: 2 * murmur2_lane(key, 7) for key in keys}


# Limits and names -------------------------------------------------------------------------


async def test_one_message_over_the_brokers_limit_fails_alone(h: KafkaHarness) -> None:
    topic, subscription = await h.topic(lanes=1), await h.subscription()
    limit = topic.capabilities.max_body_bytes
    # What is over the limit here is the headers, of which nobody above knows.
    large = Message(b"x" * (limit - 100), headers={"h": "y" * 1_000})

    with pytest.raises(SendManyError) as caught:
        await topic.send_many([Message(b"1"), large, Message(b"2")])

    assert {at: type(e) for at, e in caught.value.failures.items()} == {1: MessageTooLargeError}
    assert sorted(bodies(await take(subscription, 2))) == [b"1", b"2"]


async def test_a_message_of_the_largest_size_arrives(h: KafkaHarness) -> None:
    topic, subscription = await h.topic(lanes=1), await h.subscription()

    await topic.send(Message(b"x" * topic.capabilities.max_body_bytes, key="k"))

    [delivery] = await take(subscription, 1)
    await delivery.reject("too much")
    [letter] = await subscription.dead_letters()
    assert len(letter.message.body) == topic.capabilities.max_body_bytes


async def test_a_topic_that_was_removed_is_not_there(h: KafkaHarness) -> None:
    topic = await h.topic()
    await topic.send(Message(b"1"))
    admin = AdminClient(_servers(h))
    [future] = admin.delete_topics([f"{h.prefix}t"]).values()
    await asyncio.to_thread(future.result)
    # The controller has removed it; the broker may take a moment longer.
    await eventually(lambda: f"{h.prefix}t" not in admin.list_topics(timeout=5.0).topics)

    with pytest.raises(TopicNotFoundError, match="is not there"):
        await topic.send(Message(b"2"))


async def test_queues_are_left_to_brokers_that_have_leases(kafka_url: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match="sqlite://"):
        await open_queue(with_options(kafka_url, queue="q"))


async def test_what_is_survived_is_what_the_topic_says(h: KafkaHarness) -> None:
    assert (await h.topic("plain")).capabilities.survives == {"kill"}
    admin = AdminClient(_servers(h))
    new = NewTopic(f"{h.prefix}flushed", 1, 1, config={"flush.messages": "1"})
    [future] = admin.create_topics([new]).values()
    await asyncio.to_thread(future.result)

    assert (await h.topic("flushed")).capabilities.survives == {"kill", "power"}
    with pytest.raises(UnsupportedFeatureError, match="power"):
        await h.topic("plain", require="power")


# Positions and deaths ---------------------------------------------------------------------


async def test_a_position_is_the_first_that_is_not_settled(h: KafkaHarness) -> None:
    topic, subscription = await h.topic(lanes=1), await h.subscription()
    await topic.send_many(numbered(5))
    deliveries = await take(subscription, 5)
    for place in (0, 1, 3):
        await deliveries[place].ack()

    await _moved(h, "t", 2)

    await asyncio.sleep(h.settle_interval)
    assert _position(h, "t").offset == 2  # and no further


async def test_what_retention_deleted_unread_is_an_error_in_the_log(
    h: KafkaHarness, caplog: pytest.LogCaptureFixture
) -> None:
    topic = await h.topic(lanes=1)
    subscription = await h.subscription()
    await topic.send_many(numbered(5))
    [first] = await take(subscription, 1)
    await first.ack()
    await subscription.close()
    admin = AdminClient(_servers(h))
    [future] = admin.delete_records([TopicPartition(f"{h.prefix}t", 0, 3)]).values()
    await asyncio.to_thread(future.result)

    heir = await h.subscription()

    assert bodies(await take(heir, 2)) == [b"4", b"5"]
    assert "offsets 1 to 2 of partition 0 were not there any more" in caplog.text
    stat = await heir.stat()
    assert stat is not None
    assert stat.pending == 2


async def test_a_topic_that_was_made_anew_is_read_from_its_beginning(h: KafkaHarness) -> None:
    topic, subscription = await h.topic(lanes=1), await h.subscription()
    await topic.send_many(numbered(5))
    await subscription.settle([(d, Action.ACK) for d in await take(subscription, 5)])
    await subscription.close()
    await topic.close()
    admin = AdminClient(_servers(h))
    [future] = admin.delete_topics([f"{h.prefix}t"]).values()
    await asyncio.to_thread(future.result)
    # Kafka removes a group's positions along with the topic; they may come back from a backup.
    topic = await h.topic(lanes=1)
    await topic.send_many(numbered(2))
    consumer = Consumer({**_servers(h), "group.id": f"{h.prefix}t/s"})
    consumer.commit(offsets=[TopicPartition(f"{h.prefix}t", 0, 5)], asynchronous=False)
    consumer.close()

    heir = await h.subscription()

    assert bodies(await take(heir, 2)) == [b"1", b"2"]


async def test_a_consumer_at_work_is_counted_beside_its_position(h: KafkaHarness) -> None:
    topic, subscription = await h.topic(lanes=1), await h.subscription()
    await topic.send_many(numbered(2))
    [first] = await take(subscription, 1)
    at_work = _position(h, "t")

    await first.ack()
    await _moved(h, "t", 1)
    settled = _position(h, "t")
    await subscription.close()

    assert (at_work.offset, at_work.metadata) == (0, "molva deaths=1")
    assert (settled.offset, settled.metadata) == (1, "")
    assert _position(h, "t").metadata == ""


async def test_a_message_that_kills_its_consumers_becomes_a_dead_letter(
    h: KafkaHarness, start: Start
) -> None:
    topic = await h.topic(lanes=1)
    await (await h.subscription(max_attempts=3)).close()
    await topic.send_many(numbered(3))
    for _ in range(5):  # twice with anything, with a group, and twice alone
        holder = await (await start("hold", h.url("t", "s"))).ready()
        await _spoke(holder)
        await holder.kill()
        await asyncio.sleep(h.death_interval)

    heir = await h.subscription(max_attempts=3)

    assert bodies(await take(heir, 1)) == [b"2"]
    [letter] = await heir.dead_letters()
    assert (letter.message.body, letter.attempts) == (b"1", 3)
    assert "died of it" in letter.reason


async def test_a_zombie_cannot_settle_what_another_has(h: KafkaHarness, start: Start) -> None:
    topic = await h.topic(lanes=1)
    await (await h.subscription()).close()
    await topic.send_many(numbered(3))
    # It works a while on each, and is stopped with messages in its hands.
    zombie = await (await start("handle", h.url("t", "s"), "0.3")).ready()
    await eventually(lambda: zombie.lines)
    zombie.signal(signal.SIGSTOP)
    heir = await h.subscription()
    held = await take(heir, 1)
    held += await h.rest(heir)

    zombie.signal(signal.SIGCONT)
    await asyncio.sleep(2.0)
    before = _position(h, "t").offset
    for delivery in held:
        await delivery.ack()

    # What the zombie settled late moved nothing, and all of the heir's was the heir's.
    assert before == 3 - len(held)
    await _moved(h, "t", 3)


# Flow -------------------------------------------------------------------------------------


async def test_a_slow_consumer_pauses_and_goes_on_without_a_gap(
    h: KafkaHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_kafka_subscription, "_MOST_WAITING", 100)
    monkeypatch.setattr(_kafka_consumer, "_MOST_UNHEARD", 200)
    monkeypatch.setattr(_kafka_consumer, "_BATCH", 100)
    topic, subscription = await h.topic(lanes=2), await h.subscription(max_open=50)
    sent = [Message(b"%d" % n, key=str(n % 8)) for n in range(5_000)]
    await topic.send_many(sent)
    driver: Any = subscription._driver
    got: dict[str | None, list[int]] = defaultdict(list)
    paused, most = False, 0

    while sum(map(len, got.values())) < len(sent):
        for delivery in await subscription.receive(50, wait=5.0):
            got[delivery.message.key].append(int(delivery.message.body))
            await delivery.ack()
        if sum(map(len, got.values())) in range(1_000, 1_060):
            # As one that works for long: the thread asks for a pause.
            await eventually(lambda: any(part.paused for part in driver._partitions.values()))
            paused = True
        most = max(most, sum(len(part.waiting) for part in driver._partitions.values()))

    assert got == {str(k): list(range(k, len(sent), 8)) for k in range(8)}
    assert paused
    assert most < 2_000


async def test_a_loop_that_stands_still_is_not_flooded(
    h: KafkaHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_kafka_consumer, "_MOST_UNHEARD", 100)
    monkeypatch.setattr(_kafka_consumer, "_BATCH", 50)
    topic = await h.topic(lanes=2)
    sent = [Message(b"%d" % n, key=str(n % 8)) for n in range(5_000)]
    await topic.send_many(sent)
    subscription = await h.subscription()
    driver: Any = subscription._driver
    poller = driver._poller

    time.sleep(1.0)  # as a handler that computes does
    told = poller._records_told - poller._records_heard
    got = await take(subscription, len(sent))

    # Up to two batches over, and a record for each time it looked for a pause.
    assert told < 250
    order: dict[str | None, list[int]] = defaultdict(list)
    for delivery in got:
        order[delivery.message.key].append(int(delivery.message.body))
    assert order == {str(k): list(range(k, len(sent), 8)) for k in range(8)}


async def test_brokers_collect_for_as_long_as_they_are_told(h: KafkaHarness) -> None:
    topic = await h.topic()
    at_once, patient = await h.subscription("a"), await h.subscription("b", fetch_wait=1.0)

    async def receive(subscription: Subscription, limit: int) -> int:
        found = await subscription.receive(limit, wait=PATIENCE)
        await subscription.settle([(delivery, Action.ACK) for delivery in found])
        return len(found)

    # Two of five will do: the machine may stand still, but does not always.
    came: list[tuple[int, int]] = []
    good = 0
    while good < 2:
        assert len(came) < 5, came
        sooner, later = (asyncio.create_task(receive(s, 5)) for s in (at_once, patient))
        for n in range(5):
            await topic.send(Message(b"%d" % n, key="k"))
            await asyncio.sleep(0.02)
        came.append((await sooner, await later))
        good += came[-1][0] < came[-1][1] == 5
        for consumer, got in zip((at_once, patient), came[-1], strict=True):
            while got < 5:
                got += await receive(consumer, 5 - got)

    # What is plenty does not wait.
    took: list[float] = []
    for _ in range(5):
        began = time.monotonic()
        await topic.send_many([Message(bytes(1_000), key="k")] * 200)
        left = 200 - await receive(patient, 200)
        took.append(time.monotonic() - began)
        while left:
            left -= await receive(patient, left)
    assert min(took) < 0.4, took


async def test_lanes_begin_at_once_while_more_than_there_is_room_for_waits(
    h: KafkaHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each lane is counted before anything of it is handed over. The answer must not wait
    # until what fills the room is paused: here that is for ever.
    monkeypatch.setattr(_kafka_consumer, "_FULL", 600.0)
    # Nor is it given up here, as it would be after five seconds: what waits for it never comes.
    commit: Any = _kafka_subscription.KafkaSubscription._commit
    monkeypatch.setitem(commit.__kwdefaults__, "timeout", 3 * PATIENCE)
    monkeypatch.setattr(_kafka_consumer, "_BATCH", 500)
    monkeypatch.setattr(_kafka_subscription, "_MOST_WAITING", 100)
    topic = await h.topic(lanes=4)
    await topic.send_many([Message(b"%d" % n, key=str(n % 16)) for n in range(4_000)])
    subscription = await h.subscription()

    assert len(await take(subscription, 4_000)) == 4_000


async def test_a_lane_that_waits_for_a_retry_holds_up_no_other(
    h: KafkaHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_kafka_subscription, "_MOST_WAITING", 200)
    topic, subscription = await h.topic(lanes=2), await h.subscription()
    stuck, other = h.key_in_lane(0, 2), h.key_in_lane(1, 2)
    await topic.send(Message(b"stuck", key=stuck))
    [delivery] = await take(subscription, 1)
    await delivery.nack(delay=60)

    await topic.send_many([Message(b"behind", key=stuck) for _ in range(1_000)])
    await topic.send_many([Message(b"%d" % n, key=other) for n in range(1_000)])
    got = await take(subscription, 1_000)

    assert bodies(got) == [b"%d" % n for n in range(1_000)]


async def test_consumers_that_come_and_go_all_the_time_lose_nothing(h: KafkaHarness) -> None:
    topic = await h.topic(lanes=8)
    staying = await h.subscription()
    handled: dict[bytes, int] = defaultdict(int)
    order: dict[str | None, list[int]] = defaultdict(list)
    sent: list[Message] = []
    stop = asyncio.Event()

    async def handle(delivery: Delivery) -> None:
        await asyncio.sleep(0.002)
        handled[delivery.message.id] += 1
        order[delivery.message.key].append(int(delivery.message.body))

    async def send() -> None:
        while not stop.is_set():
            batch = [Message(b"%d" % (len(sent) + n), key=str(n)) for n in range(16)]
            await topic.send_many(batch)
            sent.extend(batch)
            await asyncio.sleep(0.01)

    async def visit() -> None:
        while not stop.is_set():
            async with (
                await open_subscription(h.url("t", "s")) as visitor,
                running_with(visitor, handle, concurrency=4),
            ):
                await asyncio.sleep(1.0)

    sending = asyncio.create_task(send())
    async with running_with(staying, handle, concurrency=4):
        visits = [asyncio.create_task(visit()) for _ in range(2)]
        await asyncio.sleep(15.0)
        stop.set()
        await asyncio.gather(sending, *visits)
        await eventually(lambda: handled.keys() >= {m.id for m in sent})

    assert handled.keys() == {m.id for m in sent}
    # What a leaving consumer gives back may stand before what it has settled of another key,
    # and that comes again; but never before what stands in front of it.
    assert sum(handled.values()) < 1.1 * len(sent)
    assert all(_in_order(numbers) for numbers in order.values())


def _in_order(numbers: list[int]) -> bool:
    """Whether every number comes for the first time behind all that are smaller."""
    first_times = list(dict.fromkeys(numbers))
    return first_times == sorted(first_times)


async def test_a_fork_is_told_to_open_anew(
    h: KafkaHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic, subscription = await h.topic(), await h.subscription()
    pid = os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: pid + 1)
        with pytest.raises(ForkedError, match="open it anew"):
            await subscription.receive(wait=0.0)
        with pytest.raises(ForkedError, match="open it anew"):
            await topic.send(Message(b"1"))


async def test_late_settlements_after_a_lost_lane_are_lost(h: KafkaHarness) -> None:
    topic, subscription = await h.topic(lanes=1), await h.subscription()
    await topic.send_many(numbered(2))
    first, second = await take(subscription, 2)
    driver: Any = subscription._driver

    driver.on_lost([(f"{h.prefix}t", 0)])

    with pytest.raises(LeaseLostError):
        await first.ack()
    with pytest.raises(LeaseLostError):
        await second.reject("bad")
    assert await subscription.dead_letters() == []


async def test_a_new_topic_name_needs_no_server_of_its_own(h: KafkaHarness) -> None:
    name = f"λ {uuid.uuid4().hex[:6]}"
    async with await open_topic(h.url(name)) as topic:
        await topic.send(Message(b"1"))
    listed = AdminClient(_servers(h)).list_topics(timeout=10).topics
    assert any(each.startswith("molva-x-") and "_ce_bb_20" in each for each in listed)


async def test_a_producer_that_met_a_fatal_error_is_replaced(h: KafkaHarness) -> None:
    topic, subscription = await h.topic(lanes=1), await h.subscription()
    await topic.send(Message(b"1"))
    publisher: Any = topic._driver
    publisher = publisher._publisher
    first = publisher._polled

    # As librdkafka reports it: this producer stores nothing more.
    first.note(KafkaError(KafkaError._FATAL, "out of order", True))
    await topic.send_many(numbered(2))

    assert publisher._polled is not first
    assert bodies(await take(subscription, 3)) == [b"1", b"1", b"2"]
