"""Senders that wait for room (``overflow=wait``): woken at once, in order, nothing left behind."""

import asyncio
import contextlib
import itertools
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from molva._base.clock import SYSTEM_CLOCK, Clock, ManualClock
from molva.messaging import (
    Delivery,
    Message,
    Queue,
    QueueFullError,
    SendManyError,
    Subscription,
    Topic,
    open_queue,
    open_subscription,
    open_topic,
)
from molva.messaging.drivers._sqlite_members import Waker
from molva.messaging.drivers._sqlite_room import room_folder

pytestmark = pytest.mark.timed

_names = itertools.count()
_PROGRAM = Path(__file__).with_name("room_program.py")
PATIENCE = 20.0


@dataclass
class Place:
    """A full broker: what sends to it and waits, and what makes room in it."""

    url: str
    sender: Queue | Topic
    consumer: Queue | Subscription


@contextlib.asynccontextmanager
async def full_place(
    url: str, clock: Clock = SYSTEM_CLOCK, capacity: int = 1
) -> AsyncIterator[Place]:
    """Open both ends of what a URL names, and fill it."""
    bounded = f"{url}&capacity={capacity}&overflow=wait"
    if "queue=" in url:
        async with (
            await open_queue(bounded, clock=clock) as sender,
            await open_queue(url, clock=clock) as consumer,
        ):
            await sender.send_many([Message(b"full") for _ in range(capacity)])
            yield Place(url, sender, consumer)
    else:
        async with (
            await open_topic(bounded, clock=clock) as topic,
            await open_subscription(f"{url}&subscription=s", clock=clock) as subscription,
        ):
            await topic.send_many([Message(b"full", key="k") for _ in range(capacity)])
            yield Place(url, topic, subscription)


@pytest.fixture(params=["memory queue", "memory topic", "sqlite queue", "sqlite topic"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    system, kind = request.param.split()
    name = f"room-{next(_names)}" if system == "memory" else f"{tmp_path}/queue.db"
    return f"{system}://{name}?{kind}=q"


@pytest.fixture(params=["sqlite queue", "sqlite topic"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite://{tmp_path}/queue.db?{request.param.split()[1]}=q"


async def next_one(consumer: Queue | Subscription) -> Delivery:
    async with asyncio.timeout(PATIENCE):
        while True:
            for delivery in await consumer.receive(1, wait=0.5):
                return delivery


async def waits(task: "asyncio.Task[None]", seconds: float = 0.03) -> None:
    """Let a sender begin to wait, and see that it does."""
    await asyncio.sleep(seconds)
    assert not task.done()


async def test_room_wakes_the_sender_without_any_time_passing(url: str) -> None:
    clock = ManualClock()
    async with full_place(url, clock) as place:
        sending = asyncio.create_task(place.sender.send(Message(b"waits", key="k")))
        await waits(sending)
        [delivery] = await place.consumer.receive(1, wait=0.0)
        await delivery.ack()
        if url.startswith("sqlite:") and "topic=" in url:
            # Its watermarks make the room, and are written a moment later.
            await asyncio.sleep(0)
            await clock.pass_time(0.004)
        async with asyncio.timeout(PATIENCE):
            await sending


async def test_room_is_told_within_milliseconds(url: str) -> None:
    late, usual = [], []
    async with (
        full_place(url) as place,
        full_place(url.replace("=q", "=other"), capacity=100) as roomy,
    ):
        for _ in range(9):
            await (await next_one(roomy.consumer)).ack()
        await asyncio.sleep(0.3)  # past any watermark
        for _ in range(9):
            # What a send takes by itself, on this disk and under this load.
            began = time.monotonic()
            await roomy.sender.send(Message(b"no need to wait", key="k"))
            usual.append(time.monotonic() - began)

            sending = asyncio.create_task(place.sender.send(Message(b"waits", key="k")))
            await waits(sending, 0.07)  # long enough for any growing pause to have grown
            await (await next_one(place.consumer)).ack()
            made_at = time.monotonic()
            await sending
            late.append(time.monotonic() - made_at)
    assert statistics.median(late) < 0.005 + 2 * statistics.median(usual), (late, usual)


async def test_room_made_by_another_process_is_told_within_fifty_milliseconds(
    shared_url: str,
) -> None:
    late = []
    consumer_url = shared_url if "queue=" in shared_url else f"{shared_url}&subscription=s"
    # The subscription must be there before, or what was sent would be nobody's.
    async with full_place(shared_url) as place:
        await place.consumer.close()
        async with started("make", consumer_url) as other:
            for _ in range(7):
                sending = asyncio.create_task(place.sender.send(Message(b"waits", key="k")))
                await waits(sending, 0.07)
                made_at = float(await asked(other))
                await sending
                late.append(time.monotonic() - made_at)
    assert statistics.median(late) < 0.05, late


async def test_who_waits_longest_goes_first(url: str) -> None:
    async with full_place(url) as place:
        sending = []
        for number in range(20):
            message = Message(b"%d" % number, key="k")
            sending.append(asyncio.create_task(place.sender.send(message)))
            await asyncio.sleep(0.0005 if number < 5 else 0)
        found = []
        for _ in range(21):
            delivery = await next_one(place.consumer)
            found.append(delivery.message.body)
            await delivery.ack()
        await asyncio.gather(*sending)
    assert found == [b"full", *(b"%d" % number for number in range(20))]


async def test_a_sender_that_gives_up_leaves_nothing_behind(url: str) -> None:
    async with full_place(url) as place:
        first, second, third = (
            asyncio.create_task(place.sender.send(Message(body, key="k")))
            for body in (b"first", b"second", b"third")
        )
        await waits(first)
        many = asyncio.create_task(place.sender.send_many([Message(b"m", key="k")] * 3))
        await waits(many)
        for task in (first, third, many):
            task.cancel()
        await asyncio.wait((first, third, many))

        found = []
        for _ in range(2):
            delivery = await next_one(place.consumer)
            found.append(delivery.message.body)
            await delivery.ack()
        await second

        assert found == [b"full", b"second"]
        assert await place.consumer.receive(1, wait=0.3) == []
        assert place.sender._sends.waiting == 0


async def test_senders_that_give_up_again_and_again_fill_no_memory(url: str) -> None:
    async with full_place(url) as place:
        most = 0
        for _ in range(300):
            sending = [
                asyncio.create_task(place.sender.send(Message(b"x", key="k"))) for _ in range(10)
            ]
            await asyncio.sleep(0)
            for task in sending:
                task.cancel()
            await asyncio.wait(sending)
            most = max(most, place.sender._sends.waiting)
    assert most <= 20


async def test_a_sender_that_waits_does_not_look(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with full_place(url) as place:
        sending = asyncio.create_task(place.sender.send(Message(b"waits", key="k")))
        await waits(sending)
        batches = 0
        send_batch = place.sender._driver.send_batch

        async def counted(messages: list[Message]) -> object:
            nonlocal batches
            batches += 1
            return await send_batch(messages)

        monkeypatch.setattr(place.sender._driver, "send_batch", counted)
        await waits(sending, 0.5)
        assert batches == 0
        await (await next_one(place.consumer)).ack()
        await sending
        assert batches == 1


@pytest.mark.parametrize("how", ["reject", "expire", "purge"])
async def test_whatever_makes_room_wakes(url: str, how: str) -> None:
    async with full_place(url) as place:
        if how == "expire":
            await (await next_one(place.consumer)).ack()
            await place.sender.send(Message(b"short-lived", key="k", ttl=0.01))
        sending = asyncio.create_task(place.sender.send(Message(b"waits", key="k")))
        await waits(sending)
        if how == "reject":
            await (await next_one(place.consumer)).reject("bad")
        elif how == "expire":
            assert await place.consumer.receive(1, wait=0.0) == []
        else:
            assert await place.consumer.purge() == 1
        async with asyncio.timeout(0.9):  # before it would look for itself
            await sending


@pytest.mark.parametrize("url", ["memory topic", "sqlite topic"], indirect=True)
async def test_removing_a_subscription_that_was_behind_wakes(url: str) -> None:
    async with full_place(url) as place:
        slow = await open_subscription(f"{url}&subscription=slow&start=earliest")
        await slow.close()
        await (await next_one(place.consumer)).ack()
        sending = asyncio.create_task(place.sender.send(Message(b"waits", key="k")))
        await waits(sending, 0.35)  # past any watermark
        assert isinstance(place.sender, Topic)
        assert await place.sender.remove_subscription("slow")
        async with asyncio.timeout(0.9):
            await sending


async def test_closing_refuses_who_waits(url: str) -> None:
    async with full_place(url) as place:
        one = asyncio.create_task(place.sender.send(Message(b"1", key="k")))
        many = asyncio.create_task(place.sender.send_many([Message(b"2"), Message(b"3")]))
        await waits(one)
        began = time.monotonic()
        await place.sender.close()
        assert time.monotonic() - began < 0.5
        with pytest.raises(QueueFullError):
            await one
        with pytest.raises(SendManyError) as failed:
            await many
        assert len(failed.value.failures) == 2


async def test_where_a_driver_cannot_tell_a_sender_looks() -> None:
    async with full_place(f"memory://room-{next(_names)}?queue=q") as place:
        place.sender._tells_room = None
        sending = asyncio.create_task(place.sender.send(Message(b"waits")))
        await waits(sending)
        await (await next_one(place.consumer)).ack()
        async with asyncio.timeout(PATIENCE):
            await sending


async def test_pipes_are_there_only_while_somebody_waits(shared_url: str, tmp_path: Path) -> None:
    folder = room_folder(tmp_path / "queue.db")
    waker = Waker(folder)
    async with full_place(shared_url) as place:
        assert not waker.anybody()
        sending = asyncio.create_task(place.sender.send(Message(b"waits", key="k")))
        await waits(sending)
        assert waker.anybody()
        await (await next_one(place.consumer)).ack()
        await sending
        assert not waker.anybody()
        assert [name for name in folder.iterdir() if ".wake." in name.name] == []
    waker.close()


async def test_a_sender_killed_while_it_waits_is_in_nobodys_way(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/queue.db?queue=q"
    waker = Waker(room_folder(tmp_path / "queue.db"))
    async with started("wait", f"{url}&capacity=1") as other, await open_queue(url) as queue:
        async with asyncio.timeout(PATIENCE):
            while not waker.anybody():
                await asyncio.sleep(0.01)
        other.kill()
        await other.wait()
        waker.wake()
        assert not waker.anybody()  # nothing reads its pipe any more
        await (await next_one(queue)).ack()
        async with await open_queue(f"{url}&capacity=1&overflow=wait") as sender:
            await sender.send(Message(b"1"))
            sending = asyncio.create_task(sender.send(Message(b"2")))  # in the dead one's place
            await waits(sending)
            await (await next_one(queue)).ack()
            async with asyncio.timeout(0.9):
                await sending
    waker.close()


@contextlib.asynccontextmanager
async def started(*arguments: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(_PROGRAM), *arguments, stdin=PIPE, stdout=PIPE
    )
    try:
        assert await answer(process) == "ready"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def asked(process: Process) -> str:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    return await answer(process)


async def answer(process: Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        return (await process.stdout.readline()).decode().strip()
