"""The SQLite driver on a disk that fails: fsync errors, no space, and what is synced."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from molva.messaging import (
    BrokenBrokerError,
    Message,
    SendManyError,
    Topic,
    UnavailableError,
    open_subscription,
    open_topic,
)
from molva.messaging.conformance import PATIENCE, bodies, eventually, take
from tests.messaging.faults import FaultyVFS


@pytest.fixture
def vfs() -> Iterator[FaultyVFS]:
    faulty = FaultyVFS()
    yield faulty
    faulty.unregister()


@pytest.fixture(params=["loop", "thread"])
def url(tmp_path: Path, vfs: FaultyVFS, request: pytest.FixtureRequest) -> str:
    return f"sqlite://{tmp_path}/q.db?topic=t&vfs={vfs.vfs_name}&commit={request.param}"


@pytest.fixture
async def topic(url: str) -> AsyncIterator[Topic]:
    async with await open_topic(url) as topic:
        yield topic


def _healthy(url: str) -> str:
    """Return the URL of the same file for somebody whose disk is well."""
    return url.partition("&vfs=")[0] + "&subscription=s"


async def test_every_send_is_synced_before_it_returns(topic: Topic, vfs: FaultyVFS) -> None:
    for _ in range(5):
        before = vfs.syncs
        await topic.send(Message(b"1"))
        assert vfs.syncs >= before + 1


async def test_a_batch_is_synced_once(topic: Topic, vfs: FaultyVFS) -> None:
    await topic.send(Message(b"warm-up"))
    before = vfs.syncs

    await topic.send_many([Message(b"1") for _ in range(500)])

    assert vfs.syncs == before + 1


async def test_consuming_syncs_nothing(topic: Topic, url: str, vfs: FaultyVFS) -> None:
    async with await open_subscription(url + "&subscription=s") as subscription:
        await topic.send_many([Message(b"1") for _ in range(50)])
        before = vfs.syncs

        for delivery in await take(subscription, 50):
            await delivery.ack()
        async with asyncio.timeout(PATIENCE):
            # Until the watermarks are written.
            while (stat := await subscription.stat()) is None or stat.pending:
                await asyncio.sleep(0.05)

        assert vfs.syncs == before


async def test_an_fsync_error_fails_every_send_that_waits(topic: Topic, vfs: FaultyVFS) -> None:
    await topic.send(Message(b"confirmed"))
    vfs.fail_sync = lambda: True

    outcomes = await asyncio.gather(
        *(topic.send(Message(b"refused")) for _ in range(20)), return_exceptions=True
    )

    assert {type(outcome) for outcome in outcomes} == {BrokenBrokerError}
    assert topic.counters.stored == 1
    assert topic.counters.failed == 20


async def test_nothing_is_written_behind_an_fsync_error(topic: Topic, vfs: FaultyVFS) -> None:
    await topic.send(Message(b"confirmed"))
    vfs.fail_sync = lambda: True
    with pytest.raises(BrokenBrokerError):
        await topic.send(Message(b"refused"))
    vfs.fail_sync = lambda: False
    before = vfs.writes

    for _ in range(3):
        with pytest.raises(BrokenBrokerError):
            await topic.send(Message(b"later"))
    with pytest.raises(SendManyError):
        await topic.send_many([Message(b"later")])
    await topic.close()

    assert vfs.writes == before


async def test_an_fsync_error_behind_a_cancelled_send_ends_all_writing(
    topic: Topic, vfs: FaultyVFS
) -> None:
    met: list[bool] = []

    def fail() -> bool:
        met.append(True)
        return True

    vfs.fail_sync = fail
    sending = asyncio.create_task(topic.send(Message(b"refused")))
    await asyncio.sleep(0)
    sending.cancel()
    await asyncio.wait([sending])
    await eventually(lambda: met)
    vfs.fail_sync = lambda: False

    with pytest.raises(BrokenBrokerError):
        await topic.send(Message(b"later"))


async def test_a_new_open_has_everything_that_was_confirmed(
    topic: Topic, url: str, vfs: FaultyVFS
) -> None:
    confirmed = [Message(b"%d" % n, key="k") for n in range(50)]
    await topic.send_many(confirmed)
    vfs.fail_sync = lambda: True
    with pytest.raises(BrokenBrokerError):
        await topic.send(Message(b"refused", key="k"))
    await topic.close()

    async with (
        await open_topic(_healthy(url)) as again,
        await open_subscription(_healthy(url)) as subscription,
    ):
        await again.send(Message(b"last", key="k"))
        arrived = bodies(await subscription.receive(1_000))

    # The refused one may have reached the disk, or not.
    expected = [message.body for message in confirmed]
    assert arrived in ([*expected, b"last"], [*expected, b"refused", b"last"])


async def test_a_full_disk_fails_every_send_that_waits(topic: Topic, vfs: FaultyVFS) -> None:
    await topic.send(Message(b"confirmed"))
    vfs.fail_write = lambda: True

    outcomes = await asyncio.gather(
        *(topic.send(Message(b"refused")) for _ in range(20)), return_exceptions=True
    )

    assert {type(outcome) for outcome in outcomes} == {UnavailableError}
    assert "the disk is full" in str(outcomes[0])


async def test_sending_goes_on_once_there_is_room_again(
    topic: Topic, url: str, vfs: FaultyVFS
) -> None:
    await topic.send(Message(b"1", key="k"))
    # Not at the first write of a commit: part of it is in the WAL already.
    calls = iter([False, False, True])
    vfs.fail_write = lambda: next(calls, False)
    with pytest.raises(UnavailableError):
        await topic.send(Message(bytes(20_000), key="k"))

    await topic.send(Message(b"2", key="k"))

    async with await open_subscription(_healthy(url)) as subscription:
        assert bodies(await subscription.receive(10)) == [b"1", b"2"]


async def test_a_message_whose_dead_letter_cannot_be_stored_comes_again(
    topic: Topic, url: str, vfs: FaultyVFS
) -> None:
    async with await open_subscription(url + "&subscription=s") as subscription:
        await topic.send(Message(b"1"))
        [delivery] = await take(subscription, 1)
        vfs.fail_write = lambda: True
        with pytest.raises(UnavailableError):
            await delivery.reject("bad")
        vfs.fail_write = lambda: False

        assert not delivery.settled
        await delivery.reject("bad")

        assert len(await subscription.dead_letters()) == 1


async def test_run_hands_over_again_what_it_could_not_reject(
    topic: Topic, url: str, vfs: FaultyVFS
) -> None:
    subscribed = await open_subscription(url + "&subscription=s", max_attempts=1)
    async with subscribed as subscription:
        await topic.send(Message(b"1"))
        handled = 0

        async def handle(_: object) -> None:
            nonlocal handled
            handled += 1
            vfs.fail_write = lambda: handled == 1
            if handled < 3:
                raise RuntimeError("bad")

        running = asyncio.create_task(subscription.run(handle))
        async with asyncio.timeout(10):
            while not await subscription.dead_letters():
                await asyncio.sleep(0.01)
        subscription.stop()
        await running

        assert handled == 2


async def test_closing_says_so_when_the_watermark_cannot_be_written(
    topic: Topic, url: str, vfs: FaultyVFS
) -> None:
    subscription = await open_subscription(url + "&subscription=s")
    await topic.send(Message(b"1"))
    [delivery] = await take(subscription, 1)
    await delivery.ack()
    vfs.fail_write = lambda: True

    with pytest.raises(UnavailableError):
        await subscription.close()

    vfs.fail_write = lambda: False
    async with await open_subscription(_healthy(url)) as again:
        assert bodies(await again.receive(10, wait=0.0)) == [b"1"]


async def test_a_consumer_whose_watermarks_cannot_be_written_says_so(
    topic: Topic, url: str, vfs: FaultyVFS
) -> None:
    subscription = await open_subscription(f"{url}&subscription=s")
    try:
        await topic.send_many([Message(b"1") for _ in range(50)])
        for delivery in await take(subscription, 10):
            await delivery.ack()
        vfs.fail_io = lambda: True

        async def receive_on() -> None:
            while True:  # until the watermarks have met the error
                await subscription.receive(10, wait=0.01)

        with pytest.raises(BrokenBrokerError):
            await asyncio.wait_for(receive_on(), PATIENCE)
    finally:
        vfs.fail_io = lambda: False
        await subscription.close()

    # Another process goes on where the watermarks were last written, and loses nothing.
    async with await open_subscription(_healthy(url)) as again:
        assert len(await take(again, 50)) == 50


async def test_who_comes_after_an_io_error_copies_the_wal_before_it_writes(
    topic: Topic, url: str, vfs: FaultyVFS, tmp_path: Path
) -> None:
    await topic.send(Message(b"confirmed"))
    vfs.fail_sync = lambda: True
    with pytest.raises(BrokenBrokerError):
        await topic.send(Message(b"refused"))
    vfs.fail_sync = lambda: False
    marker = tmp_path / "q.db-ioerror"
    assert marker.exists()
    await topic.close()

    async with await open_topic(_healthy(url).replace("&subscription=s", "")):
        assert not marker.exists()
        assert (tmp_path / "q.db-wal").stat().st_size == 0
