"""How ``run`` shares its slots among keys, the loop and the handlers' contexts."""

import asyncio
import contextvars
from collections import Counter

import pytest

from molva.messaging import (
    Delivery,
    Message,
    Subscription,
    open_queue,
    open_subscription,
    open_topic,
)

URL = "memory://{}?topic=t"


async def opened(name: str, messages: list[Message], prefetch: int = 0) -> Subscription:
    topic = await open_topic(URL.format(name))
    ahead = f"&prefetch={prefetch}" if prefetch else ""
    subscription = await open_subscription(f"{URL.format(name)}&subscription=s{ahead}")
    await topic.send_many(messages)
    await topic.close()
    return subscription


async def test_a_key_that_never_runs_dry_does_not_starve_the_others() -> None:
    hot = [Message(b"hot", key="hot") for _ in range(100)]
    others = [Message(b"1", key="a"), Message(b"2", key="b")]
    async with await opened("starve", [*hot, *others], prefetch=200) as s:
        order: list[str | None] = []

        async def handle(delivery: Delivery) -> None:
            order.append(delivery.message.key)
            if len(order) == 102:
                s.stop()

        await s.run(handle, concurrency=1)

    # One each in turns, however much of the hot key waits.
    assert order[:4] == ["hot", "a", "b", "hot"]


async def test_every_key_gets_its_turn_within_one_round() -> None:
    messages = [Message(b"%d" % n, key=f"k{n % 10}") for n in range(100)]
    async with await opened("round", messages) as s:
        order: list[str | None] = []

        async def handle(delivery: Delivery) -> None:
            order.append(delivery.message.key)
            await asyncio.sleep(0)
            if len(order) == 100:
                s.stop()

        await s.run(handle, concurrency=4)

    # Four at once and ten in line: nobody is ever two turns ahead of anybody else.
    for at in range(10, 100):
        counts = Counter(order[:at])
        assert max(counts.values()) - min(counts[f"k{n}"] for n in range(10)) <= 2, order[:at]


async def test_what_a_handler_leaves_in_its_context_reaches_no_other() -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    messages = [Message(b"%d" % n, key=f"k{n % 5}") for n in range(50)]
    async with await opened("context", messages) as s:
        found: list[str] = []

        async def handle(delivery: Delivery) -> None:
            found.append(request.get())
            request.set(delivery.message.body.decode())  # and never reset
            if len(found) == 50:
                s.stop()

        request.set("before")
        await s.run(handle, concurrency=2)

    assert set(found) == {"before"}


async def test_handlers_that_never_wait_let_the_loop_go_round() -> None:
    messages = [Message(b"x", key=f"k{n}") for n in range(5_000)]
    async with await opened("round-the-loop", messages) as s:
        handled = ticks = 0

        async def handle(_: Delivery) -> None:
            nonlocal handled
            handled += 1
            if handled == len(messages):
                s.stop()

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        await s.run(handle, concurrency=64)
        ticking.cancel()

    # Less than a tick for every thousand handlers, and heartbeats would come late.
    assert ticks > len(messages) / 1_000


async def test_no_more_handlers_run_than_slots_and_nothing_of_a_key_is_left() -> None:
    messages = [Message(b"%d" % n, key=f"k{n % 300}") for n in range(900)]
    async with await opened("slots", messages) as s:
        running = most = done = 0

        async def handle(delivery: Delivery) -> None:
            nonlocal running, most, done
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001 if done % 7 else 0)
            running -= 1
            if delivery.attempt == 1 and delivery.message.body == b"450":
                raise ValueError("once")
            done += 1
            if done == len(messages):
                s.stop()

        tasks_before = len(asyncio.all_tasks())
        await s.run(handle, concurrency=7)

        assert most == 7
        assert len(asyncio.all_tasks()) <= tasks_before


async def test_a_second_cancel_as_the_last_handler_ends_is_a_cancel() -> None:
    async with await opened("cancelled", [Message(b"1")]) as s:
        begun, release = asyncio.Event(), asyncio.Event()

        async def handle(delivery: Delivery) -> None:
            begun.set()
            await release.wait()
            asyncio.get_running_loop().call_soon(running.cancel)

        running = asyncio.create_task(s.run(handle))
        await begun.wait()
        s.stop()
        await asyncio.sleep(0.01)
        release.set()

        with pytest.raises(asyncio.CancelledError):
            await running


async def test_what_may_have_killed_others_runs_alone() -> None:
    url = "memory://alone?queue=q&lease=0.2"
    async with await open_queue(url, max_attempts=1) as queue:
        await queue.send_many([Message(b"%d" % n) for n in range(6)])
        assert len(await queue.receive(6)) == 6
        await asyncio.sleep(0.3)
        await queue.send_many([Message(b"new") for _ in range(20)])
        running = alone = done = 0

        async def handle(delivery: Delivery) -> None:
            nonlocal running, alone, done
            running += 1
            if delivery.attempt > 1:
                alone += running == 1
            await asyncio.sleep(0.01)
            if delivery.attempt > 1:
                alone += running == 1
            running -= 1
            done += 1
            if done == 26:
                queue.stop()

        async with asyncio.timeout(20.0):
            await queue.run(handle, concurrency=4)
        assert alone == 12
        assert await queue.dead_letters() == []
