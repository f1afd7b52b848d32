"""The SQLite driver among real processes: killed, stopped, idle, many at once."""

import asyncio
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from molva._base import sqlite_writer
from molva.messaging import (
    Delivery,
    Message,
    Topic,
    UnavailableError,
    open_subscription,
    open_topic,
)
from molva.messaging.conformance import PATIENCE, bodies, eventually, key_in_lane, take
from molva.messaging.conformance.actors import Actor, Start, starting

_LOCK = (str(Path(__file__).with_name("lock_file.py")),)


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    async with starting() as start:
        yield start


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queue.db"


def _url(path: Path, **options: object) -> str:
    extra = "".join(f"&{name}={value}" for name, value in options.items())
    return f"sqlite://{path}?topic=t{extra}"


async def test_a_killed_publisher_has_stored_all_that_was_confirmed(
    path: Path, start: Start
) -> None:
    confirmed: set[str] = set()
    for killed in (1, 2, 3):
        publisher = await start("publish", _url(path))
        while len(publisher.lines) < 200:
            await asyncio.sleep(0.001)
        await publisher.kill()
        confirmed.update(line for line in publisher.lines if len(line) == 32)

        async with await open_subscription(_url(path, subscription="s")) as subscription:
            arrived = {d.message.id.hex() for d in await subscription.receive(10_000)}

        assert arrived >= confirmed
        assert len(arrived) <= len(confirmed) + 8 * killed  # what was under way when it died


@pytest.mark.timed
async def test_a_killed_consumers_lanes_are_taken_over_within_a_second(
    path: Path, start: Start
) -> None:
    url = _url(path, subscription="s", lanes=2)
    holder = await (await start("hold", url)).ready()
    async with await open_topic(_url(path)) as topic, await open_subscription(url) as survivor:
        survivors_receiving = asyncio.create_task(take(survivor, 2))
        await asyncio.sleep(0.6)  # until the lanes are shared
        await topic.send_many([Message(b"%d" % n, key=key_in_lane(n % 2, 2)) for n in range(4)])
        mine = await survivors_receiving
        await eventually(lambda: len(holder.lines) == 2)

        await holder.kill()
        killed_at = time.monotonic()
        others = await take(survivor, 2)

        assert time.monotonic() - killed_at < 1.0
        assert {d.message.body for d in mine + others} == {b"0", b"1", b"2", b"3"}


async def test_a_killed_consumer_repeats_only_what_was_not_written(
    path: Path, start: Start
) -> None:
    url = _url(path, subscription="s", lanes=1)
    consumer = await (await start("consume", url, "0")).ready()
    async with await open_topic(_url(path)) as topic:
        await topic.send_many([Message(b"%d" % n, key="k") for n in range(300)])
        await consumer.said("k 299")
        async with asyncio.timeout(PATIENCE):
            while await _pending(topic):  # until the watermark is written
                await asyncio.sleep(0.05)
        await topic.send(Message(b"300", key="k"))
        await consumer.said("k 300")
        await consumer.kill()

    async with await open_subscription(url) as subscription:
        assert bodies(await subscription.receive(1_000, wait=0.5)) in ([b"300"], [])


async def _pending(topic: Topic) -> int:
    stat = await topic.stat()
    assert stat is not None
    return stat.subscriptions["s"].pending


async def test_a_stopped_consumer_keeps_its_lanes(path: Path, start: Start) -> None:
    url = _url(path, subscription="s", lanes=1)
    holder = await (await start("hold", url)).ready()
    async with await open_topic(_url(path)) as topic, await open_subscription(url) as other:
        await topic.send(Message(b"1"))
        await eventually(lambda: len(holder.lines) == 1)
        holder.signal(signal.SIGSTOP)
        await topic.send(Message(b"2"))

        while_stopped = await other.receive(10, wait=1.0)
        holder.signal(signal.SIGCONT)

        assert while_stopped == []
        await eventually(lambda: len(holder.lines) == 2)


@pytest.mark.timed
async def test_an_idle_consumer_in_another_process_gets_a_message_at_once(
    path: Path, start: Start
) -> None:
    receiver = await (await start("time", _url(path, subscription="s"))).ready()
    sender = await (await start("send", _url(path), *(str(n) for n in range(20)))).ready()
    await eventually(lambda: len(receiver.lines) == 1)
    delays = []
    for number in range(20):
        # Idle means idle: not on the heels of the one before.
        await asyncio.sleep(0.02)
        sender.go()
        while len(sender.lines) <= number or len(receiver.lines) <= number + 1:
            await asyncio.sleep(0.001)
        delays.append(float(receiver.lines[-1]) - float(sender.lines[-1]))

    assert statistics.median(delays) < 0.050
    assert max(delays) < 0.250


async def test_consumers_in_two_processes_keep_the_order_of_each_key(
    path: Path, start: Start
) -> None:
    url = _url(path, subscription="s")
    consumers = [await (await start("consume", url, "0.002")).ready() for _ in range(2)]
    async with await open_topic(_url(path)) as topic:
        async with asyncio.timeout(PATIENCE):
            while not all(consumer.lines for consumer in consumers):  # until lanes are shared
                await topic.send_many([Message(b"-1", key=str(key)) for key in range(9)])
                await asyncio.sleep(0.05)
        for first in range(0, 600, 20):
            await topic.send_many(
                [Message(b"%d" % n, key=str(n % 9)) for n in range(first, first + 20)]
            )
            await asyncio.sleep(0.01)
        await eventually(lambda: sum(map(len, map(_numbered_lines, consumers))) >= 600)

    seen: dict[str, list[list[int]]] = defaultdict(lambda: [[], []])
    for number, consumer in enumerate(consumers):
        for line in _numbered_lines(consumer):
            key, body = line.split()
            seen[key][number].append(int(body))
    assert all(numbers == sorted(numbers) for both in seen.values() for numbers in both)
    assert sum(len(set(both[0]) | set(both[1])) for both in seen.values()) == 600
    assert all(map(_numbered_lines, consumers))


def _numbered_lines(consumer: Actor) -> list[str]:
    return [line for line in consumer.lines if not line.endswith(" -1")]


async def test_the_order_of_a_key_survives_the_kill_of_its_consumer(
    path: Path, start: Start
) -> None:
    url = _url(path, subscription="s")
    victim = await (await start("consume", url, "0.002")).ready()
    survivor = await (await start("consume", url, "0.002")).ready()
    async with await open_topic(_url(path)) as topic:
        for first in range(0, 800, 20):
            await topic.send_many(
                [Message(b"%d" % n, key=str(n % 9)) for n in range(first, first + 20)]
            )
            await asyncio.sleep(0.01)
            if first == 400:
                await victim.kill()
        await eventually(
            lambda: len({line.split()[1] for line in victim.lines + survivor.lines}) >= 800
        )

    for key in map(str, range(9)):
        # A tail may come again, and then in order too: going back is going back to the
        # first that may not have been settled, never skipping forward.
        mine = [int(line.split()[1]) for line in survivor.lines if line.split()[0] == key]
        assert mine == sorted(mine)
        both = {int(line.split()[1]) for line in victim.lines if line.split()[0] == key}
        assert sorted(both | set(mine)) == list(range(int(key), 800, 9))


@pytest.mark.timed
async def test_nothing_is_written_while_nothing_happens(path: Path, start: Start) -> None:
    sender = await (await start("send", _url(path), "never")).ready()
    receiver = await (await start("time", _url(path, subscription="s"))).ready()
    await eventually(lambda: receiver.lines)
    await asyncio.sleep(0.7)  # until the watermark is written

    def state() -> object:
        files = sorted(path.parent.glob("queue.db*"))
        stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        written = [psutil.Process(a.pid).io_counters().write_chars for a in (sender, receiver)]
        return stats, written

    before = state()
    busy = psutil.Process(receiver.pid).cpu_times().user
    await asyncio.sleep(2.0)

    assert state() == before
    assert psutil.Process(receiver.pid).cpu_times().user - busy < 0.3


async def test_processes_that_make_one_file_at_once_all_succeed(path: Path, start: Start) -> None:
    actors = [await start("open", _url(path, subscription="s")) for _ in range(8)]
    for each in actors:
        await each.ready()

    for each in actors:
        each.go()

    assert [await each.end() for each in actors] == [0] * 8
    async with await open_topic(_url(path)) as topic:
        stat = await topic.stat()
    assert stat is not None
    assert stat.stored == 8
    assert list(stat.subscriptions) == ["s"]


@pytest.mark.timed
@pytest.mark.parametrize("commit", ["loop", "thread"])
async def test_a_send_waits_for_another_writer_without_blocking_the_loop(
    path: Path, start: Start, commit: str
) -> None:
    async with await open_topic(_url(path, commit=commit)) as topic:
        writer = await (await start(str(path), program=_LOCK)).ready()
        sending = asyncio.create_task(topic.send(Message(b"1")))
        longest, last, end = 0.0, time.monotonic(), time.monotonic() + 1.0
        while (now := time.monotonic()) < end:
            longest, last = max(longest, now - last), now
            await asyncio.sleep(0.001)
        assert not sending.done()
        writer.go()
        await sending

        assert longest < 0.2
        assert topic.counters.stored == 1


async def test_a_writer_that_holds_the_file_too_long_makes_sends_fail(
    path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_writer, "_BUSY_TIMEOUT", 0.1)
    async with await open_topic(_url(path)) as topic:
        writer = await (await start(str(path), program=_LOCK)).ready()

        outcomes = await asyncio.gather(*(_try(topic) for _ in range(3)))
        writer.go()
        assert await writer.end() == 0
        await topic.send(Message(b"afterwards"))

        assert {type(outcome) for outcome in outcomes} == {UnavailableError}
        assert "another process held the file" in str(outcomes[0])
        assert topic.counters.stored == 1


async def test_watermarks_are_written_later_when_another_writer_held_the_file(
    path: Path, start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqlite_writer, "_BUSY_TIMEOUT", 0.05)
    url = _url(path, subscription="s")
    async with await open_topic(_url(path)) as topic, await open_subscription(url) as consumer:
        await topic.send(Message(b"1"))
        [delivery] = await take(consumer, 1)
        writer = await (await start(str(path), program=_LOCK)).ready()
        await delivery.ack()
        await eventually(lambda: "watermarks are not written" in caplog.text)
        writer.go()
        assert await writer.end() == 0

        async def pending() -> int:
            stat = await consumer.stat()
            assert stat is not None
            return stat.pending

        async with asyncio.timeout(5):
            while await pending():
                await asyncio.sleep(0.01)


async def test_a_fork_of_a_consumer_does_not_keep_its_lanes_through_exec(
    path: Path, start: Start
) -> None:
    url = _url(path, subscription="s")
    async with await open_topic(_url(path)) as topic:
        await topic.send(Message(b"1"))
        first = await open_subscription(url)
        [_] = await take(first, 1)
        # A child that outlives the consumer, as a handler may start one.
        child = await asyncio.create_subprocess_exec("sleep", "30", close_fds=False)
        await first.close()

        async with await open_subscription(url) as second:
            again = await second.receive(wait=1.0)
        child.kill()
        await child.wait()

    assert bodies(again) == [b"1"]


async def test_offsets_go_on_where_they_stood_after_a_kill(path: Path, start: Start) -> None:
    """Offsets go on where they stood, even when the newest messages were deleted."""
    url = _url(path, subscription="s")
    consumer = await (await start("consume", url, "0")).ready()
    publisher = await start("publish", _url(path))
    await eventually(lambda: len(consumer.lines) > 300)
    await publisher.kill()
    await consumer.kill()
    async with await open_topic(_url(path)) as topic, await open_subscription(url) as subscription:
        before = await topic.stat()
        assert before is not None
        tail: list[Delivery] = await subscription.receive(100_000, wait=0.0)
        await topic.send(Message(b"last"))
        after = await topic.stat()
        assert after is not None

        [last] = await take(subscription, 1)

    assert last.message.body == b"last"
    assert after.stored == before.stored + 1
    assert len({d.message.id for d in tail}) == len(tail)


async def _try(topic: Topic) -> BaseException | None:
    try:
        await topic.send(Message(b"1"))
    except UnavailableError as error:
        return error
    return None
