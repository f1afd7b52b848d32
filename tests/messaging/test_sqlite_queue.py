"""What only the SQLite driver's queues have: a file, other processes, a reboot."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from molva._base.clock import ManualClock
from molva.messaging import (
    IncompatibleBrokerError,
    Message,
    open_queue,
    open_subscription,
    open_topic,
)
from molva.messaging.conformance import PATIENCE, bodies
from molva.messaging.drivers import _sqlite_file, _sqlite_queue
from tests.messaging.faults import FaultyVFS

_CONSUMER = """
import asyncio, sys
from molva.messaging import open_queue

async def main():
    queue = await open_queue(sys.argv[1])
    deliveries = await queue.receive(3)
    print(*(d.message.body.decode() for d in deliveries), flush=True)
    await deliveries[0].ack()
    print("acked", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_what_a_killed_consumer_held_comes_again_and_what_it_acked_does_not(
    tmp_path: Path,
) -> None:
    url = f"sqlite://{tmp_path}/queue.db?queue=q&lease=0.5"
    async with await open_queue(url) as queue:
        await queue.send_many([Message(b"%d" % n) for n in range(5)])
        with subprocess.Popen(
            [sys.executable, "-c", _CONSUMER, url], stdout=subprocess.PIPE, text=True
        ) as consumer:
            assert consumer.stdout is not None
            assert await asyncio.to_thread(consumer.stdout.readline) == "0 1 2\n"
            assert await asyncio.to_thread(consumer.stdout.readline) == "acked\n"
            os.kill(consumer.pid, signal.SIGKILL)
        found: dict[bytes, int] = {}
        async with asyncio.timeout(PATIENCE):
            while len(found) < 4:
                for delivery in await queue.receive(10):
                    found[delivery.message.body] = delivery.attempt
                    await delivery.ack()
        assert found == {b"1": 2, b"2": 2, b"3": 1, b"4": 1}


async def test_a_consumer_in_another_process_is_woken_by_a_send(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/queue.db?queue=q"
    async with await open_queue(url) as queue:
        with subprocess.Popen(
            [sys.executable, "-c", _CONSUMER, url], stdout=subprocess.PIPE, text=True
        ) as consumer:
            try:
                await asyncio.sleep(1.0)
                await queue.send(Message(b"x"))
                assert consumer.stdout is not None
                line = await asyncio.wait_for(asyncio.to_thread(consumer.stdout.readline), 10)
                assert line == "x\n"
            finally:
                os.kill(consumer.pid, signal.SIGKILL)


async def test_leases_and_delays_go_on_after_a_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite://{tmp_path}/queue.db?queue=q&lease=100"
    before = ManualClock()
    await before.pass_time(5_000.0)
    async with await open_queue(url, clock=before) as queue:
        await queue.send_many([Message(b"held"), Message(b"later", delay=300.0)])
        [held] = await queue.receive(1, wait=0.0)
        # Killed, not closed: what it holds stays held.
        queue._driver._held.clear()  # type: ignore[attr-defined]
        assert held.message.body == b"held"
    boot = tmp_path / "boot_id"
    boot.write_text("another boot\n")
    monkeypatch.setattr(_sqlite_queue, "_BOOT_ID", boot)

    # Sixty seconds later by the wall clock, and the monotonic one begins anew.
    after = ManualClock(before.now_us() + 60_000_000)
    async with await open_queue(url, clock=after) as queue:
        assert await queue.receive(9, wait=0.0) == []
        await after.pass_time(41.0)
        assert bodies(await queue.receive(9, wait=0.0)) == [b"held"]
        await after.pass_time(200.0)
        assert b"later" in bodies(await queue.receive(9, wait=0.0))


async def test_consuming_syncs_nothing_and_flushing_does(tmp_path: Path) -> None:
    vfs = FaultyVFS()
    url = f"sqlite://{tmp_path}/queue.db?queue=q&vfs={vfs.vfs_name}&commit=loop"
    async with await open_queue(url) as queue:
        await queue.send_many([Message(b"%d" % n) for n in range(50)])
        syncs = vfs.syncs
        for _ in range(50):
            [delivery] = await queue.receive(1)
            await delivery.ack()
        assert vfs.syncs == syncs
        await queue._driver.flush()
        assert vfs.syncs == syncs + 1


async def test_flushing_a_subscription_syncs_what_was_written_before(tmp_path: Path) -> None:
    vfs = FaultyVFS()
    url = f"sqlite://{tmp_path}/queue.db?topic=t&vfs={vfs.vfs_name}&commit=loop"
    async with (
        await open_topic(url) as topic,
        await open_subscription(f"{url}&subscription=s") as subscription,
    ):
        await topic.send(Message(b"1"))
        [delivery] = await subscription.receive()
        await delivery.ack()
        await asyncio.sleep(0.4)  # the watermark is written now, and not synced
        syncs = vfs.syncs
        await subscription._driver.flush()
        assert vfs.syncs == syncs + 1


async def test_every_send_is_synced(tmp_path: Path) -> None:
    vfs = FaultyVFS()
    url = f"sqlite://{tmp_path}/queue.db?queue=q&vfs={vfs.vfs_name}&commit=loop"
    async with await open_queue(url) as queue:
        for number in range(5):
            syncs = vfs.syncs
            await queue.send(Message(b"%d" % number))
            assert vfs.syncs > syncs
            [delivery] = await queue.receive(1)
            await delivery.ack()


@pytest.mark.parametrize("kind", ["queue", "topic"])
async def test_a_changed_body_is_an_error_and_nothing_before_it_is_lost(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "queue.db"
    base = f"sqlite://{path}"
    messages = [Message(b"%d" % n, key="k") for n in range(3)]
    if kind == "queue":
        async with await open_queue(f"{base}?queue=q") as queue:
            await queue.send_many(messages)
    else:
        async with await open_topic(f"{base}?topic=t") as topic:
            await topic.send_many(messages)
    connection = apsw.Connection(str(path))
    table = "queue_1" if kind == "queue" else "message_1"
    connection.execute(f"UPDATE {table} SET body = x'FF' WHERE offset = 2")
    connection.close()

    opened = await (
        open_queue(f"{base}?queue=q")
        if kind == "queue"
        else open_subscription(f"{base}?topic=t&subscription=s")
    )
    async with opened as consumer:
        [first] = await consumer.receive(10)
        assert first.message.body == b"0"
        for _ in range(2):
            with pytest.raises(IncompatibleBrokerError, match=r"message 2 .* is damaged"):
                await consumer.receive(10)
        await consumer.purge()
        assert await consumer.receive(10, wait=0.0) == []


async def test_a_file_of_the_first_version_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "queue.db"
    connection = apsw.Connection(str(path))
    connection.pragma("journal_mode", "wal")
    connection.execute(_sqlite_file._VERSION_1)
    connection.execute(
        """
        CREATE TABLE message_1 (offset INTEGER PRIMARY KEY, lane INTEGER NOT NULL,
            id BLOB NOT NULL, key TEXT, headers TEXT, body BLOB NOT NULL,
            stored_at_us INTEGER NOT NULL) STRICT;
        INSERT INTO topic VALUES (1, 't', 1, 3, 0);
        INSERT INTO subscription VALUES (1, 1, 's', 0, 1, 0);
        INSERT INTO watermark VALUES (1, 0, 1, 1);
        INSERT INTO message_1 VALUES (2, 0, zeroblob(16), 'k', '{"a": "b"}', x'32', 5);
        INSERT INTO message_1 VALUES (3, 0, zeroblob(16), NULL, NULL, x'33', 5);
        INSERT INTO dead_letter VALUES (7, 1, 1, zeroblob(16), NULL, NULL, x'31', 'bad', 5, 9);
        PRAGMA user_version = 1;
        """
    )
    connection.pragma("application_id", _sqlite_file._APPLICATION_ID)
    connection.close()

    url = f"sqlite://{path}?topic=t"
    async with (
        await open_topic(url) as topic,
        await open_subscription(f"{url}&subscription=s") as subscription,
    ):
        await topic.send(Message(b"4"))
        deliveries = await subscription.receive(10)
        assert bodies(deliveries) == [b"2", b"3", b"4"]
        assert dict(deliveries[0].message.headers) == {"a": "b"}
        [dead] = await subscription.dead_letters()
        assert (dead.message.body, dead.reason, dead.attempts) == (b"1", "bad", 5)
        assert await subscription.replay() == 1
        assert bodies(await subscription.receive(10)) == [b"1"]


@pytest.mark.parametrize("commit", ["loop", "thread"])
async def test_two_senders_and_two_consumers_on_one_file_lose_and_repeat_nothing(
    tmp_path: Path, commit: str
) -> None:
    url = f"sqlite://{tmp_path}/queue.db?queue=q&commit={commit}"
    queues = [await open_queue(url) for _ in range(4)]
    got: list[int] = []

    async def send(part: int) -> None:
        for number in range(part, 400, 2):
            await queues[part].send(Message(b"%d" % number))

    async def consume(queue: int) -> None:
        while len(got) < 400:
            for delivery in await queues[queue].receive(7, wait=0.05):
                await delivery.ack()
                got.append(int(delivery.message.body))

    async with asyncio.timeout(60):
        await asyncio.gather(send(0), send(1), consume(2), consume(3))
    assert sorted(got) == list(range(400))
    for queue in queues:
        await queue.close()
