"""Queues under leases against other queues in a file, and what the portable layer costs."""

import asyncio
import gc
import itertools
import statistics
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import litequeue
import persistqueue
from opentelemetry import propagate
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind, set_span_in_context

from benchmarks.report import Report
from molva.messaging import Action, Delivery, Message, open_queue, open_subscription, open_topic
from molva.messaging import sync as blocking
from molva.messaging.driver import Settlement
from molva.messaging.telemetry import OpenTelemetry

TURNS = 5
CONSUMERS = 64
BODY = b'{"kind":"rating/1","campaign":"default","accepted_at_us":1700000000000000,"rate":7}'
_names = itertools.count()


def queues() -> None:
    """Measure queues."""
    report = Report(
        "queues",
        "Queues, fan-out, and what the portable layer costs",
        f"Bodies of {len(BODY)} bytes; {TURNS} turns, one after the other in each; a fresh file "
        "each turn; WAL and synchronous=FULL everywhere.",
    )
    ours, lite, persist = [], [], []
    for _ in range(TURNS):
        with tempfile.TemporaryDirectory() as folder:
            ours.append(asyncio.run(_consume(Path(folder), 20_000)))
        with tempfile.TemporaryDirectory() as folder:
            lite.append(_litequeue(Path(folder), 1_500))
        with tempfile.TemporaryDirectory() as folder:
            persist.append(_persistqueue(Path(folder), 1_500))
    report.ratio(f"{CONSUMERS} consumers, take and settle, messages/s / litequeue", ours, lite, "5")
    report.ratio(
        f"{CONSUMERS} consumers, take and settle, messages/s / persist-queue", ours, persist, "5"
    )
    _layer(report)
    _blocking(report)
    _compare(report, "a delivery, 10 subscriptions / 1", _fan_out, 10, 1)
    _compare(report, "a message taken and settled, 10⁶ waiting / 10⁴", _deep, 1_000_000, 10_000)
    _compare(report, "a message through run(64), 10⁵ keys / 10", _keys, 100_000, 10)
    report.add(
        "peak of Python's memory meanwhile, 10⁵ keys and 10",
        f"{asyncio.run(_memory(100_000)):.0f} and {asyncio.run(_memory(10)):.0f} MiB",
        "sending in batches of 10,000 among it",
    )
    report.write()


def _layer(report: Report) -> None:
    """Add what the portable layer costs, without a tracer and with one, in turns."""
    measures: tuple[tuple[str, str, Callable[[OpenTelemetry | None], Awaitable[float]]], ...] = (
        ("a single awaited send", "4", _send_one),
        ("send_many, 1,000 at once", "1", _send_many),
        ("receive, 1,000 at once", "1", _receive),
    )
    costs: dict[tuple[str, bool], list[float]] = {}
    spans = []

    async def run(
        measure: Callable[[OpenTelemetry | None], Awaitable[float]], traced: bool
    ) -> float:
        return await measure(OpenTelemetry(TracerProvider()) if traced else None)

    for _ in range(TURNS):
        for name, _limit, measure in measures:
            for traced in (False, True):
                found = asyncio.run(run(measure, traced))
                costs.setdefault((name, traced), []).append(found)
        spans.append(_bare_span())
    for name, limit, _measure in measures:
        for traced in (False, True):
            found_all = costs[name, traced]
            report.add(
                f"portable layer over the bare driver: {name}"
                + (", traced by OpenTelemetry" if traced else ""),
                f"{statistics.median(found_all):.2f} µs",
                f"{min(found_all):.2f} to {max(found_all):.2f}; "
                f"asked: under {limit}{' untraced' if traced else ''}",
            )
    report.add(
        "of it OpenTelemetry's own: a span with as many attributes, its context injected",
        f"{statistics.median(spans):.2f} µs",
        f"{min(spans):.2f} to {max(spans):.2f}; once a send, once a send_many",
    )


def _blocking(report: Report) -> None:
    """Add what a call costs from blocking code, from one thread and eight, and from a task."""
    costs: dict[tuple[str, str], list[float]] = {}
    for _ in range(TURNS):
        turn = {"a task": asyncio.run(_calls_of_a_task())}
        turn |= {f"{n} threads" if n > 1 else "1 thread": _calls_of_threads(n) for n in (1, 8)}
        for who, found in turn.items():
            for what, cost in found.items():
                costs.setdefault((what, who), []).append(cost)
    for (what, who), found_all in costs.items():
        beside = statistics.median(costs[what, "a task"])
        report.add(
            f"{what}, memory, {'awaited by' if who == 'a task' else 'blocking, from'} {who}",
            f"{statistics.median(found_all):.2f} µs",
            f"{min(found_all):.2f} to {max(found_all):.2f}; "
            f"{statistics.median(found_all) / beside:.1f} times a task's",
        )


async def _calls_of_a_task(number: int = 2_000) -> dict[str, float]:
    """Return µs a message for each kind of call."""
    url = f"memory://bench-{next(_names)}?queue=q"
    async with await open_queue(url) as queue:
        started = time.perf_counter()
        for _ in range(number):
            await queue.send(Message(BODY))
        sent = time.perf_counter()
        for _ in range(number):
            [delivery] = await queue.receive(1)
            await delivery.ack()
        taken = time.perf_counter()
        for _ in range(number // 1_000):
            await queue.send_many([Message(BODY) for _ in range(1_000)])
        ended = time.perf_counter()
    return _by_call(number, started, sent, taken, ended)


def _calls_of_threads(threads: int, number: int = 2_000) -> dict[str, float]:
    """Return µs a message for each kind of call, all threads together."""
    url = f"memory://bench-{next(_names)}?queue=q"
    with blocking.open_queue(url) as queue, ThreadPoolExecutor(threads) as pool:

        def send(_: int) -> None:
            for _ in range(number // threads):
                queue.send(Message(BODY))

        def take(_: int) -> None:
            for _ in range(number // threads):
                [delivery] = queue.receive(1)
                delivery.ack()

        def send_many(_: int) -> None:
            for _ in range(number // 1_000):
                queue.send_many([Message(BODY) for _ in range(1_000 // threads)])

        times = [time.perf_counter()]
        for work in (send, take, send_many):
            list(pool.map(work, range(threads)))
            times.append(time.perf_counter())
    return _by_call(number, *times)


def _by_call(number: int, *times: float) -> dict[str, float]:
    names = ("a single send", "a single receive and its ack", "send_many, a message of 1,000")
    return {
        name: (end - start) / number * 1e6
        for name, (start, end) in zip(names, itertools.pairwise(times), strict=True)
    }


def _compare(
    report: Report, what: str, measure: Callable[[int], Awaitable[float]], many: int, few: int
) -> None:
    """Compare the cost of many with that of few, in turns."""

    async def run(number: int) -> float:
        return await measure(number)

    costs: dict[int, list[float]] = {many: [], few: []}
    for _ in range(3):
        for number, found in costs.items():
            found.append(asyncio.run(run(number)))
    ours, theirs = (statistics.median(costs[number]) for number in (many, few))
    report.add(f"cost of {what}", f"{ours / theirs:.2f}", f"{ours:.1f} µs against {theirs:.1f} µs")


async def _consume(folder: Path, messages: int) -> float:
    """64 tasks, each taking one message, settling it, taking the next."""
    async with await open_queue(f"sqlite://{folder}/queue.db?queue=q") as queue:
        await queue.send_many([Message(BODY) for _ in range(messages)])
        left = messages

        async def consume() -> None:
            nonlocal left
            while left > 0:
                for delivery in await queue.receive(1, wait=0.01):
                    await delivery.ack()
                    left -= 1

        started = time.perf_counter()
        await asyncio.gather(*(consume() for _ in range(CONSUMERS)))
        return messages / (time.perf_counter() - started)


def _threads(take: Callable[[], object], messages: int) -> float:
    def consume(number: int) -> None:
        for _ in range(number):
            take()

    threads = [
        threading.Thread(target=consume, args=(messages // CONSUMERS,)) for _ in range(CONSUMERS)
    ]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return messages // CONSUMERS * CONSUMERS / (time.perf_counter() - started)


def _litequeue(folder: Path, messages: int) -> float:
    queue = litequeue.LiteQueue(str(folder / "queue.db"))
    queue.conn.execute("PRAGMA synchronous = FULL")
    lock = threading.Lock()  # one connection for all threads, as its documentation asks for
    text = BODY.decode()
    for _ in range(messages):
        queue.put(text)

    def take() -> None:
        with lock:
            task = queue.pop()
            assert task is not None
            queue.done(task.message_id)

    found = _threads(take, messages)
    queue.close()
    return found


def _persistqueue(folder: Path, messages: int) -> float:
    queue = persistqueue.SQLiteAckQueue(str(folder), multithreading=True, auto_commit=True)
    for _ in range(messages):
        queue.put(BODY)
    found = _threads(lambda: queue.ack(queue.get()), messages)
    queue.close()
    return found


# What the portable layer costs: the same calls on the memory driver, with and without it.


async def _send_one(tracing: OpenTelemetry | None, number: int = 10_000) -> float:
    messages = [Message(BODY) for _ in range(number)]
    url = f"memory://bench-{next(_names)}?topic=t"
    async with await open_topic(url, tracing=tracing) as topic:
        driver = topic._driver
        started = time.perf_counter()
        for message in messages:
            await driver.send_batch([message])
        bare = time.perf_counter() - started
        # As many tasks as a busy service has: a send waits for its batch, not for the loop.
        started = time.perf_counter()

        async def send(part: list[Message]) -> None:
            for message in part:
                await topic.send(message)

        await asyncio.gather(*(send(messages[at::64]) for at in range(64)))
        return (time.perf_counter() - started - bare) / number * 1e6


def _bare_span(number: int = 10_000) -> float:
    """Return µs for what no tracer of a send can do without, and nothing else."""
    tracer = TracerProvider().get_tracer("bench")
    attributes = {f"messaging.attribute_{n}": "memory" for n in range(5)}
    started = time.perf_counter()
    for _ in range(number):
        span = tracer.start_span("send t", kind=SpanKind.PRODUCER, attributes=attributes)
        propagate.inject({}, set_span_in_context(span))
        span.end()
    return (time.perf_counter() - started) / number * 1e6


async def _send_many(tracing: OpenTelemetry | None, number: int = 50_000) -> float:
    spent = {True: 0.0, False: 0.0}
    for at in range(number // 1_000):
        # A topic of its own each time, so that neither finds more memory in use.
        url = f"memory://bench-{next(_names)}?topic=t"
        for portable in (at % 2 == 0, at % 2 == 1):
            messages = [Message(BODY) for _ in range(1_000)]
            async with await open_topic(url, tracing=tracing) as topic:
                await topic.send(messages[0])  # its batcher has begun
                send = topic.send_many if portable else topic._driver.send_batch
                gc.collect()
                started = time.perf_counter()
                await send(messages)
                spent[portable] += time.perf_counter() - started
    return (spent[True] - spent[False]) / number * 1e6


async def _receive(tracing: OpenTelemetry | None, number: int = 50_000) -> float:
    url = f"memory://bench-{next(_names)}?queue=q"
    async with await open_queue(url, tracing=tracing) as queue:
        driver = queue._driver
        costs = []
        for portable in (False, True):
            await queue.send_many([Message(BODY) for _ in range(number)])
            started = time.perf_counter()
            for _ in range(number // 1_000):
                if portable:
                    deliveries = await queue.receive(1_000)
                    costs_of_settling = time.perf_counter()
                    await queue.settle([(d, Action.ACK) for d in deliveries])
                else:
                    raw = await driver.receive_batch(1_000, wait=0.0)
                    costs_of_settling = time.perf_counter()
                    await driver.settle_batch([Settlement(r.token, Action.ACK) for r in raw])
                started += time.perf_counter() - costs_of_settling
            costs.append(time.perf_counter() - started)
        return (costs[1] - costs[0]) / number * 1e6


async def _fan_out(subscriptions: int, number: int = 20_000) -> float:
    """Return µs a delivery, sending aside."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite://{folder}/queue.db?topic=t"
        async with await open_topic(url) as topic:
            readers = [
                await open_subscription(f"{url}&subscription=s{n}") for n in range(subscriptions)
            ]
            await topic.send_many([Message(BODY, key=f"k{n % 100}") for n in range(number)])
            started = time.perf_counter()
            for reader in readers:
                left = number
                while left:
                    deliveries = await reader.receive(1_000)
                    await reader.settle([(d, Action.ACK) for d in deliveries])
                    left -= len(deliveries)
            cost = (time.perf_counter() - started) / (number * subscriptions) * 1e6
            for reader in readers:
                await reader.close()
            return cost


async def _deep(waiting: int, number: int = 5_000) -> float:
    """Return µs to take and settle a message while so many wait."""
    with tempfile.TemporaryDirectory() as folder:
        async with await open_queue(f"sqlite://{folder}/queue.db?queue=q") as queue:
            for _ in range(waiting // 10_000):
                await queue.send_many([Message(BODY) for _ in range(10_000)])
            started = time.perf_counter()
            for _ in range(number // 100):
                deliveries = await queue.receive(100)
                await queue.settle([(d, Action.ACK) for d in deliveries])
            return (time.perf_counter() - started) / number * 1e6


async def _keys(keys: int, number: int = 100_000) -> float:
    """Return µs a message through ``run``, all of them waiting at first."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite://{folder}/queue.db?topic=t"
        async with (
            await open_topic(url) as topic,
            await open_subscription(f"{url}&subscription=s") as subscription,
        ):
            for at in range(0, number, 10_000):
                await topic.send_many(
                    [Message(BODY, key=f"k{n % keys}") for n in range(at, at + 10_000)]
                )
            done = 0

            async def handle(_: Delivery) -> None:
                nonlocal done
                done += 1
                if done == number:
                    subscription.stop()

            started = time.perf_counter()
            await subscription.run(handle, concurrency=64)
            return (time.perf_counter() - started) / number * 1e6


async def _memory(keys: int) -> float:
    """Return the peak of what Python holds meanwhile, in MiB."""
    tracemalloc.start()
    await _keys(keys, 100_000)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return peak
