"""What only the SQLite driver's topics have, at the driver's own level: a file, its lanes."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import apsw
import pytest

from molva._base.clock import ManualClock
from molva.messaging import (
    Action,
    IncompatibleBrokerError,
    InUseError,
    Message,
    TopicNotFoundError,
    open_subscription,
    open_topic,
)
from molva.messaging._lanes import GROUP_MESSAGES
from molva.messaging.conformance import PATIENCE, key_in_lane
from molva.messaging.driver import Outcome, RawDelivery, Settlement
from molva.messaging.drivers import _sqlite_subscription, sqlite
from molva.messaging.drivers._sqlite_file import checksum_of
from molva.messaging.drivers._sqlite_subscription import SQLiteSubscription
from molva.messaging.url import BrokerURL
from tests.messaging.faults import FaultyVFS


class _Broker:
    """One file, and driver objects on it that share a clock which stands still."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "queue.db"
        self.clock = ManualClock()
        self.opened: list[sqlite.SQLiteTopic | SQLiteSubscription] = []

    def url(self, **options: object) -> BrokerURL:
        extra = "".join(f"&{name}={value}" for name, value in options.items())
        return BrokerURL.parse(f"sqlite://{self.path}?topic=t{extra}")

    async def topic(self, **options: object) -> sqlite.SQLiteTopic:
        opened = await sqlite.open_topic(self.url(**options), clock=self.clock)
        self.opened.append(opened)
        return opened

    async def subscription(self, name: str = "s", **options: object) -> SQLiteSubscription:
        url = self.url(subscription=name, **options)
        opened = await sqlite.open_subscription(url, clock=self.clock)
        self.opened.append(opened)
        return opened

    async def close(self, side: sqlite.SQLiteTopic | SQLiteSubscription) -> None:
        self.opened.remove(side)
        await side.close()

    async def die(self, subscription: SQLiteSubscription) -> None:
        """Leave as a killed process does: locks are free, and nothing is written."""
        self.opened.remove(subscription)
        if subscription._upkeep is not None:
            subscription._upkeep.cancel()
            await asyncio.wait([subscription._upkeep])
        subscription._closed = True
        subscription._members.close()
        subscription._waker.close()
        subscription._reads.close()
        await subscription._writer.close()

    def sql(self, text: str, *values: object) -> list[tuple[object, ...]]:
        connection = apsw.Connection(str(self.path))
        try:
            return connection.execute(text, values).fetchall()
        finally:
            connection.close()

    def deaths(self) -> list[object]:
        return [row[0] for row in self.sql("SELECT deaths FROM watermark ORDER BY lane")]


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[_Broker]:
    broker = _Broker(tmp_path)
    yield broker
    for side in broker.opened:
        await side.close()


def _messages(number: int, key: str | None = "k") -> list[Message]:
    return [Message(b"%d" % n, key=key) for n in range(1, number + 1)]


def _bodies(deliveries: Sequence[RawDelivery]) -> list[bytes]:
    return [delivery.message.body for delivery in deliveries]


async def _settle(
    subscription: SQLiteSubscription,
    deliveries: Sequence[RawDelivery],
    action: Action = Action.ACK,
) -> list[Outcome]:
    return await subscription.settle_batch(
        [Settlement(d.token, action, 0.0, "bad", d.attempt) for d in deliveries]
    )


async def _pending(subscription: SQLiteSubscription) -> int:
    return (await subscription.stat()).pending


# What is stored -------------------------------------------------------------------------


async def test_a_message_comes_back_with_its_time_to_live_and_when_it_was_stored(
    broker: _Broker,
) -> None:
    topic, subscription = await broker.topic(), await broker.subscription()
    message = Message(b"1", key="k", headers={"a": "b"}, ttl=2.5)
    stored_at_us = broker.clock.now_us()
    await topic.send_batch([message])
    await broker.clock.pass_time(7.0)

    [delivery] = await subscription.receive_batch(9, wait=0.0)
    await _settle(subscription, [delivery], Action.NACK)
    [again] = await subscription.receive_batch(9, wait=0.0)

    assert (delivery.message, delivery.stored_at_us) == (message, stored_at_us)
    assert (again.message, again.stored_at_us, again.attempt) == (message, stored_at_us, 2)


@pytest.mark.parametrize("column", ["id", "key", "headers", "body"])
async def test_a_flipped_bit_is_an_error_that_names_file_and_offset(
    broker: _Broker, column: str
) -> None:
    topic, subscription = await broker.topic(), await broker.subscription()
    await topic.send_batch([Message(b"1", key="k", headers={"a": "b"})] * 2)
    new = {"id": bytes(16), "key": "l", "headers": '{"a": "c"}', "body": b"0"}[column]
    broker.sql(f"UPDATE message_1 SET {column} = ? WHERE offset = 2", new)

    assert len(await subscription.receive_batch(9, wait=0.0)) == 1
    with pytest.raises(IncompatibleBrokerError, match=r"queue\.db: message 2 of topic 't' is dam"):
        await subscription.receive_batch(9, wait=0.0)


async def test_a_message_that_is_damaged_before_it_comes_again_is_not_forgotten(
    broker: _Broker,
) -> None:
    topic, subscription = await broker.topic(), await broker.subscription()
    await topic.send_batch(_messages(1))
    await _settle(subscription, await subscription.receive_batch(9, wait=0.0), Action.NACK)
    broker.sql("UPDATE message_1 SET body = x'00'")
    for _ in range(2):
        with pytest.raises(IncompatibleBrokerError, match="message 1"):
            await subscription.receive_batch(9, wait=0.0)
    broker.sql("UPDATE message_1 SET body = x'31'")

    assert _bodies(await subscription.receive_batch(9, wait=0.0)) == [b"1"]


@pytest.mark.parametrize("headers", ['{"a": ', "[1]", "7"])
async def test_headers_that_cannot_be_read_are_the_same_error(
    broker: _Broker, headers: str
) -> None:
    topic, subscription = await broker.topic(), await broker.subscription()
    await topic.send_batch(_messages(1))
    broker.sql("UPDATE message_1 SET headers = ?, checksum = NULL", headers)

    with pytest.raises(IncompatibleBrokerError, match=r"message 1 .* headers cannot be read"):
        await subscription.receive_batch(9, wait=0.0)


async def test_a_row_that_is_older_than_checksums_is_not_checked(broker: _Broker) -> None:
    topic, subscription = await broker.topic(), await broker.subscription()
    await topic.send_batch(_messages(1))
    broker.sql("UPDATE message_1 SET checksum = NULL, body = x'00'")

    assert _bodies(await subscription.receive_batch(9, wait=0.0)) == [b"\0"]


def test_a_checksum_never_changes_between_versions() -> None:
    assert checksum_of(bytes(16), None, None, b"7") == 1_901_221_042
    assert checksum_of(bytes(16), "k", '{"a": "b"}', b"7") == 3_652_705_617


# Holding --------------------------------------------------------------------------------


async def test_extending_tells_what_is_held(broker: _Broker) -> None:
    topic, subscription = await broker.topic(), await broker.subscription()
    await topic.send_batch(_messages(2))
    deliveries = await subscription.receive_batch(9, wait=0.0)
    await _settle(subscription, deliveries[:1])

    outcomes = await subscription.extend_batch([d.token for d in deliveries], 30.0)

    assert subscription.lease is None
    assert outcomes == [Outcome.LEASE_LOST, Outcome.EXTENDED]


async def test_flushing_syncs_what_is_not_synced_once(broker: _Broker) -> None:
    vfs = FaultyVFS()
    topic = await broker.topic(vfs=vfs.vfs_name, commit="loop")
    subscription = await broker.subscription(vfs=vfs.vfs_name)
    await topic.send_batch(_messages(2))
    first, second = await subscription.receive_batch(9, wait=0.0)

    await _settle(subscription, [first])
    syncs = vfs.syncs
    await subscription.flush()
    assert vfs.syncs == syncs + 1
    await subscription.flush()
    assert vfs.syncs == syncs + 1, "nothing was written since"

    await _settle(subscription, [second])
    await broker.clock.pass_time(0.3)
    assert await _pending(subscription) == 0
    assert vfs.syncs == syncs + 1, "watermarks are written, not synced"
    await subscription.flush()
    assert vfs.syncs == syncs + 2


# Keeping --------------------------------------------------------------------------------


async def test_a_replayed_message_comes_once_more_to_its_own_subscription_only(
    broker: _Broker,
) -> None:
    topic = await broker.topic()
    one, two = await broker.subscription("one"), await broker.subscription("two")
    await topic.send_batch(_messages(3))
    deliveries = await one.receive_batch(9, wait=0.0)
    await _settle(one, deliveries[1:2], Action.REJECT)
    await _settle(one, [deliveries[0], deliveries[2]])
    await _settle(two, await two.receive_batch(9, wait=0.0))

    assert await one.replay(None, 100) == 1

    [again] = await one.receive_batch(9, wait=0.0)
    assert (again.message, again.attempt) == (deliveries[1].message, 1)
    assert await two.receive_batch(9, wait=0.0) == []
    await _settle(one, [again])
    await one.flush()
    await two.flush()
    stat = await topic.stat()
    assert {n: (s.pending, s.dead) for n, s in stat.subscriptions.items()} == {
        "one": (0, 0),
        "two": (0, 0),
    }


async def test_messages_behind_another_subscriptions_replay_come_in_order(
    broker: _Broker,
) -> None:
    topic = await broker.topic()
    one, two = await broker.subscription("one"), await broker.subscription("two")
    await topic.send_batch(_messages(500))
    await _settle(one, await one.receive_batch(500, wait=0.0), Action.REJECT)
    await topic.send_batch([Message(b"before", key="k")])
    assert await one.replay(None, 1_000) == 500
    await topic.send_batch([Message(b"behind", key="k")])

    got: list[bytes] = []
    while found := await two.receive_batch(7, wait=0.0):
        got += _bodies(found)
        await _settle(two, found)

    assert got == [*(b"%d" % n for n in range(1, 501)), b"before", b"behind"]
    await two.flush()
    assert await _pending(two) == 0


async def test_replaying_asks_for_no_room(broker: _Broker) -> None:
    topic, subscription = await broker.topic(capacity=2), await broker.subscription()
    await topic.send_batch(_messages(2))
    await _settle(subscription, await subscription.receive_batch(9, wait=0.0), Action.REJECT)
    await subscription.flush()
    assert await topic.send_batch(_messages(2)) == [Outcome.STORED] * 2

    assert await subscription.replay(None, 9) == 2
    assert await _pending(subscription) == 4
    assert await topic.send_batch(_messages(1)) == [Outcome.FULL]


async def test_purging_returns_how_many_were_not_settled(broker: _Broker) -> None:
    topic, subscription = await broker.topic(), await broker.subscription()
    await topic.send_batch(_messages(20))
    held = await subscription.receive_batch(5, wait=0.0)
    await _settle(subscription, [held[0], held[3]])

    assert await subscription.purge(dead=False) == 18

    assert await _settle(subscription, [held[1]]) == [Outcome.LEASE_LOST]
    assert await _pending(subscription) == 0
    await topic.send_batch([Message(b"new", key="k")])
    assert await _pending(subscription) == 1
    assert _bodies(await subscription.receive_batch(9, wait=0.0)) == [b"new"]


async def test_purging_outlives_the_consumer_that_asked(broker: _Broker) -> None:
    topic, subscription = await broker.topic(), await broker.subscription()
    await topic.send_batch(_messages(3))
    await subscription.purge(dead=False)
    await broker.die(subscription)

    again = await broker.subscription()
    assert await again.receive_batch(9, wait=0.0) == []


async def test_purging_waits_for_its_fsync(broker: _Broker) -> None:
    vfs = FaultyVFS()
    topic, subscription = await broker.topic(), await broker.subscription(vfs=vfs.vfs_name)
    await topic.send_batch(_messages(3))
    syncs = vfs.syncs

    await subscription.purge(dead=False)

    assert vfs.syncs == syncs + 1


async def test_purging_counts_nothing_that_was_replayed_for_another(broker: _Broker) -> None:
    topic, other = await broker.topic(), await broker.subscription("other")
    subscription = await broker.subscription()
    await topic.send_batch(_messages(3))
    await _settle(other, await other.receive_batch(2, wait=0.0), Action.REJECT)
    await other.replay(None, 9)

    assert await subscription.purge(dead=False) == 3
    assert await _pending(subscription) == 0


async def test_one_that_consumes_without_a_lane_keeps_others_from_purging(
    broker: _Broker,
) -> None:
    await broker.topic(lanes=1)
    subscription = await broker.subscription()
    await subscription.receive_batch(1, wait=0.0)
    await broker.subscription()

    with pytest.raises(InUseError, match="1 other consumers"):
        await subscription.purge(dead=False)


async def test_purging_says_how_many_others_consume(broker: _Broker) -> None:
    topic, subscription = await broker.topic(), await broker.subscription()
    await topic.send_batch(_messages(1))
    [held] = await subscription.receive_batch(9, wait=0.0)
    await broker.subscription()
    await broker.subscription()

    with pytest.raises(InUseError, match="2 other consumers"):
        await subscription.purge(dead=False)

    assert await _settle(subscription, [held]) == [Outcome.SETTLED]


async def test_purging_dead_letters_leaves_what_waits(broker: _Broker) -> None:
    topic, subscription = await broker.topic(), await broker.subscription()
    await topic.send_batch(_messages(3))
    held = await subscription.receive_batch(2, wait=0.0)
    await _settle(subscription, held, Action.REJECT)

    assert await subscription.purge(dead=True) == 2

    assert await subscription.dead_letters(9) == []
    assert (await subscription.stat()).dead == 0
    assert _bodies(await subscription.receive_batch(9, wait=0.0)) == [b"3"]


async def test_peeking_tells_what_this_consumer_does_with_it(broker: _Broker) -> None:
    topic, subscription = await broker.topic(), await broker.subscription()
    keys = [key_in_lane(lane, 16) for lane in range(4)]
    await topic.send_batch([Message(key.encode(), key=key) for key in keys])
    settled, nacked, held = await subscription.receive_batch(3, wait=0.0)
    await _settle(subscription, [settled])
    await subscription.settle_batch([Settlement(nacked.token, Action.NACK, 60.0)])

    mine = await subscription.peek(9)
    others = await (await broker.subscription()).peek(9)

    assert [(p.message.body, p.state) for p in mine] == [
        (nacked.message.body, "delayed"),
        (held.message.body, "held"),
        (keys[3].encode(), "ready"),
    ]
    assert [p.state for p in others] == ["ready"] * 4, "the watermark is not written yet"
    assert len(await subscription.peek(1)) == 1


# Removing a subscription ----------------------------------------------------------------


async def test_a_removed_subscription_leaves_nothing(broker: _Broker) -> None:
    topic = await broker.topic()
    used, unused = await broker.subscription("used"), await broker.subscription("unused")
    await topic.send_batch(_messages(3))
    await _settle(unused, (await unused.receive_batch(1, wait=0.0)), Action.REJECT)
    await _settle(used, (await used.receive_batch(9, wait=0.0)))
    await used.flush()
    with pytest.raises(InUseError, match="1 consumers of subscription 'unused'"):
        await topic.remove_subscription("unused")
    await broker.close(unused)

    assert await topic.remove_subscription("unused")

    assert not await topic.remove_subscription("unused")
    assert broker.sql("SELECT count(*) FROM dead_letter") == [(0,)]
    assert broker.sql("SELECT DISTINCT subscription_id FROM watermark") == [(1,)]
    await broker.clock.pass_time(2.0)
    await topic.send_batch(_messages(1))
    assert broker.sql("SELECT min(offset) FROM message_1") == [(4,)], "the rest can go"


async def test_what_was_replayed_for_a_removed_subscription_is_nobodys(broker: _Broker) -> None:
    topic = await broker.topic()
    keeps, old = await broker.subscription("keeps"), await broker.subscription("old")
    await topic.send_batch(_messages(2))
    await _settle(old, (await old.receive_batch(1, wait=0.0)), Action.REJECT)
    await old.replay(None, 9)
    await broker.close(old)
    await topic.remove_subscription("old")

    new = await broker.subscription("new")

    assert broker.sql("SELECT max(subscription_id) FROM subscription") == [(2,)], "used again"
    assert _bodies(await new.receive_batch(9, wait=0.0)) == [b"1", b"2"]
    assert _bodies(await keeps.receive_batch(9, wait=0.0)) == [b"1", b"2"]


async def test_a_topic_without_subscriptions_has_room_for_what_it_keeps(broker: _Broker) -> None:
    topic, subscription = await broker.topic(capacity=5), await broker.subscription()
    for _ in range(3):
        await topic.send_batch(_messages(3))
        await _settle(subscription, await subscription.receive_batch(9, wait=0.0))
        await subscription.flush()
        await broker.clock.pass_time(2.0)
    await broker.close(subscription)
    await topic.remove_subscription("s")

    [(kept,)] = broker.sql("SELECT count(*) FROM message_1")

    assert kept == 3
    assert await topic.send_batch(_messages(3)) == [Outcome.STORED] * 2 + [Outcome.FULL]


async def test_who_joins_while_it_is_removed_is_told(broker: _Broker) -> None:
    topic, subscription = await broker.topic(), await broker.subscription()
    for table in ("watermark", "subscription"):
        broker.sql(f"DELETE FROM {table}")
    await topic.send_batch(_messages(1))

    with pytest.raises(TopicNotFoundError, match="was removed"):
        await subscription.receive_batch(9, wait=0.0)
    with pytest.raises(TopicNotFoundError, match="was removed"):
        await subscription.stat()


# A message that kills -------------------------------------------------------------------


async def test_the_first_hand_over_of_a_lane_is_counted_and_progress_takes_it_back(
    broker: _Broker,
) -> None:
    topic, subscription = await broker.topic(lanes=2), await broker.subscription()
    key = key_in_lane(1, 2)
    await topic.send_batch(_messages(2, key))
    assert await subscription.receive_batch(9, wait=0.0)
    assert broker.deaths() == [0, 1]
    await broker.die(subscription)

    subscription = await broker.subscription()
    first, _ = await subscription.receive_batch(9, wait=0.0)
    assert broker.deaths() == [0, 2]
    await _settle(subscription, [first])
    await broker.clock.pass_time(0.3)

    assert broker.deaths() == [0, 0]


async def test_a_consumer_that_closes_has_not_died(broker: _Broker) -> None:
    topic, subscription = await broker.topic(lanes=1), await broker.subscription()
    await topic.send_batch(_messages(2))
    for _ in range(4):
        assert await subscription.receive_batch(9, wait=0.0)
        await broker.close(subscription)
        assert broker.deaths() == [0]
        subscription = await broker.subscription()

    assert [d.attempt for d in await subscription.receive_batch(9, wait=0.0)] == [1, 1]


async def test_who_handed_over_nothing_leaves_what_others_counted(broker: _Broker) -> None:
    await broker.topic(lanes=2)
    one = await broker.subscription()
    broker.sql("UPDATE watermark SET deaths = 2")
    assert await one.receive_batch(9, wait=0.0) == []
    await broker.subscription()
    await broker.clock.pass_time(0.3)
    assert await one.receive_batch(9, wait=0.0) == []  # lets go of a lane
    await broker.close(one)

    assert broker.deaths() == [2, 2]


async def test_a_lane_that_is_handed_to_another_consumer_was_survived(broker: _Broker) -> None:
    topic, one = await broker.topic(lanes=2), await broker.subscription()
    await topic.send_batch(_messages(1, key_in_lane(1, 2)))
    await _settle(one, await one.receive_batch(9, wait=0.0), Action.NACK)
    assert broker.deaths() == [0, 1]
    two = await broker.subscription()
    await broker.clock.pass_time(0.3)

    # Leaving hands over nothing more of it, so nothing is open.
    assert await one.receive_batch(9, wait=0.0) == []
    assert broker.deaths() == [0, 0]
    await broker.clock.pass_time(0.3)
    assert len(await two.receive_batch(9, wait=0.0)) == 1


async def test_consumers_that_die_before_handing_over_anything_count_for_nothing(
    broker: _Broker,
) -> None:
    topic = await broker.topic(lanes=1)
    for _ in range(4):
        subscription = await broker.subscription()
        assert await subscription.receive_batch(9, wait=0.0) == []
        await broker.die(subscription)
    await topic.send_batch(_messages(2))

    subscription = await broker.subscription()

    assert [d.attempt for d in await subscription.receive_batch(9, wait=0.0)] == [1, 1]


async def test_after_two_deaths_messages_come_in_groups_and_after_three_alone(
    broker: _Broker,
) -> None:
    topic = await broker.topic(lanes=2)
    await topic.send_batch([Message(b"%d" % n, key=key_in_lane(n % 2, 2)) for n in range(100)])
    for expected, deaths in ((99, [1, 1]), (99, [2, 2]), (GROUP_MESSAGES, [3, 3])):
        subscription = await broker.subscription()
        assert len(await subscription.receive_batch(99, wait=0.0)) == expected
        assert broker.deaths() == deaths
        await broker.die(subscription)

    subscription = await broker.subscription()
    [first] = await subscription.receive_batch(9, wait=0.0)
    assert await subscription.receive_batch(9, wait=0.0) == []
    assert (first.message.body, first.attempt, broker.deaths()) == (b"0", 2, [4, 3])
    await _settle(subscription, [first])
    [second] = await subscription.receive_batch(9, wait=0.0)
    assert (second.message.body, second.attempt, broker.deaths()) == (b"1", 2, [0, 4])
    await broker.die(subscription)

    # Only the message that its consumer died with alone has been tried.
    subscription = await broker.subscription()
    [again] = await subscription.receive_batch(9, wait=0.0)
    assert (again.message.body, again.attempt, broker.deaths()) == (b"1", 3, [0, 5])
    others = await subscription.receive_batch(9, wait=0.0)
    assert [(d.message.body, d.attempt) for d in others[:2]] == [(b"2", 1), (b"4", 1)]


async def test_a_receive_that_waits_gets_the_next_when_a_careful_one_is_settled(
    broker: _Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sqlite_subscription, "_SHARE_INTERVAL", 100.0)
    topic = await broker.topic(lanes=1)
    subscription = await broker.subscription()
    await topic.send_batch(_messages(2))
    broker.sql("UPDATE watermark SET deaths = 3")
    [first] = await subscription.receive_batch(9, wait=0.0)
    waiting = asyncio.create_task(subscription.receive_batch(9, wait=100.0))
    await asyncio.sleep(0.05)
    assert not waiting.done()

    await _settle(subscription, [first])

    async with asyncio.timeout(PATIENCE):
        assert _bodies(await waiting) == [b"2"]


async def test_another_subscriptions_replay_in_a_careful_lane_is_passed_over(
    broker: _Broker,
) -> None:
    topic = await broker.topic(lanes=1)
    one, two = await broker.subscription("one"), await broker.subscription("two")
    await topic.send_batch(_messages(1))
    await _settle(one, await one.receive_batch(9, wait=0.0), Action.REJECT)
    await one.replay(None, 9)
    await topic.send_batch([Message(b"2", key="k")])
    broker.sql("UPDATE watermark SET deaths = 3")

    got = []
    while found := await two.receive_batch(9, wait=0.0):
        got += [(d.message.body, d.attempt) for d in found]
        await _settle(two, found)

    assert got == [(b"1", 2), (b"2", 2)]
    await two.flush()
    assert await _pending(two) == 0


async def test_consuming_goes_on_where_a_hand_over_cannot_be_counted(broker: _Broker) -> None:
    vfs = FaultyVFS()
    topic = await broker.topic()
    subscription = await broker.subscription(vfs=vfs.vfs_name)
    await topic.send_batch(_messages(2))
    vfs.fail_write = lambda: True

    found = await subscription.receive_batch(9, wait=0.0)

    vfs.fail_write = lambda: False
    assert len(found) == 2
    assert await _settle(subscription, found) == [Outcome.SETTLED] * 2


_VICTIM = """
import asyncio, os, signal, sys
from molva.messaging import open_subscription

async def handle(delivery):
    if delivery.message.body == b"poison":
        os.kill(os.getpid(), signal.SIGSEGV)
    print(delivery.message.body.decode(), flush=True)

async def main():
    async with await open_subscription(sys.argv[1]) as subscription:
        running = asyncio.create_task(subscription.run(handle, concurrency=4))
        while (await subscription.stat()).pending:
            await asyncio.sleep(0.05)
        subscription.stop()
        await running

asyncio.run(main())
"""


async def test_a_message_that_kills_its_worker_becomes_a_dead_letter(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/queue.db?topic=t"
    sent = [b"%d" % n for n in range(300)]
    async with (
        await open_topic(url) as topic,
        await open_subscription(f"{url}&subscription=s") as watching,
    ):
        await topic.send_many([Message(body, key=str(int(body) % 40)) for body in sent[:150]])
        await topic.send(Message(b"poison", key="5"))
        await topic.send_many([Message(body, key=str(int(body) % 40)) for body in sent[150:]])
        await watching.close()

        done: set[bytes] = set()
        codes: list[int] = []
        while not codes or codes[-1] != 0:
            assert len(codes) < 30, codes
            victim = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-c", _VICTIM, f"{url}&subscription=s"],
                stdout=subprocess.PIPE,
                timeout=60,
                check=False,
            )
            codes.append(victim.returncode)
            done |= set(victim.stdout.split())

        [letter] = await topic.dead_letters("s")
        assert (letter.message.body, letter.attempts) == (b"poison", 5)
        assert "may have died of it" in letter.reason
        assert set(codes) == {-signal.SIGSEGV, 0}
        assert done == set(sent)
