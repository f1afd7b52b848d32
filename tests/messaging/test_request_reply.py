"""Request and reply: what the shared suite does not ask of every broker."""

import _weakrefset
import asyncio
import contextlib
import gc
import itertools
import linecache
import secrets
import threading
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from molva._base.clock import SYSTEM_CLOCK, ManualClock
from molva._base.ids import IdFactory, new_id
from molva.messaging import (
    DeadlineExceededError,
    Delivery,
    InvalidURLError,
    Message,
    MessageTooLargeError,
    RequestFailedError,
    Responder,
    Subscription,
    UnavailableError,
    _inbox,
    open_queue,
    open_requester,
    open_responder,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging import sync as blocking
from molva.messaging._inbox import Inbox
from molva.messaging.codecs import JSON, TEXT, JSONValue
from molva.messaging.conformance import PATIENCE, eventually
from molva.messaging.telemetry import OpenTelemetry
from tests.brokers import private_redis

_names = itertools.count()


@pytest.fixture
def base() -> str:
    return f"memory://request-reply-{next(_names)}"


@contextlib.asynccontextmanager
async def answering(
    url: str, handler: Callable[[Delivery], Awaitable[Message]], replies: str | None = None
) -> AsyncIterator[Responder]:
    async with await open_responder(url, replies) as responder:
        running = asyncio.create_task(responder.run(handler))
        yield responder
        responder.stop()
        await running


async def echo(request: Delivery) -> Message:
    return Message(request.message.body)


# URLs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requests", "replies", "what"),
    [
        ("", "?topic=r", "requests are sent to a queue"),
        ("?topic=q&subscription=s", "?topic=r", "requests are sent to a queue"),
        ("?queue=q", "", "replies come by a topic"),
        ("?queue=q", "?queue=r", "replies come by a topic"),
        ("?queue=q", "?topic=r&subscription=s", "replies come by a topic"),
        ("?queue=q", "?topic=r&start=earliest", "start= is refused"),
    ],
)
async def test_a_requester_says_which_urls_it_needs(
    base: str, requests: str, replies: str, what: str
) -> None:
    with pytest.raises(InvalidURLError, match=what):
        await open_requester(base + requests, base + replies)


@pytest.mark.parametrize(
    ("requests", "replies", "what"),
    [
        ("", None, "requests come by a queue"),
        ("?topic=q", None, "requests come by a queue"),
        ("?queue=q", "?queue=r", "replies go to topics"),
        ("?queue=q", "?create=auto", "create= is refused"),
    ],
)
async def test_a_responder_says_which_urls_it_needs(
    base: str, requests: str, replies: str | None, what: str
) -> None:
    with pytest.raises(InvalidURLError, match=what):
        await open_responder(base + requests, None if replies is None else base + replies)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e300])
async def test_a_timeout_has_an_end(base: str, timeout: float) -> None:
    async with await open_requester(f"{base}?queue=q", f"{base}?topic=r") as requester:
        with pytest.raises(ValueError, match="0 seconds to a year"):
            await requester.ask(Message(b""), timeout=timeout)


# Where a reply may go ---------------------------------------------------------------------


async def test_a_request_for_a_reply_to_nowhere_is_a_dead_letter_and_not_worked_on(
    base: str,
) -> None:
    worked_on: list[bytes] = []

    async def note(request: Delivery) -> Message:
        worked_on.append(request.message.body)
        return Message(b"")

    async with await open_queue(f"{base}?queue=q") as queue:
        await queue.send(Message(b"1", headers={"reply-to": "nowhere"}))
        async with answering(f"{base}?queue=q", note) as responder:
            await eventually(lambda: responder.counters.unanswerable)
        [dead] = await queue.dead_letters()

    assert "no reply can be sent to topic 'nowhere'" in dead.reason
    assert worked_on == []


async def test_a_responder_of_one_reply_topic_answers_to_no_other(base: str) -> None:
    async with (
        await open_topic(f"{base}?topic=ratings"),
        await open_queue(f"{base}?queue=q") as queue,
        await open_requester(f"{base}?queue=q", f"{base}?topic=mine") as requester,
        answering(f"{base}?queue=q", echo, f"{base}?topic=mine"),
    ):
        await queue.send(Message(b"1", headers={"reply-to": "ratings"}))

        assert (await requester.ask(Message(b"2"), timeout=5.0)).body == b"2"

        [dead] = await queue.dead_letters()
        assert "only 'mine' is answered to here" in dead.reason


async def test_a_responder_reaches_replies_by_what_the_url_of_requests_says_of_topics(
    tmp_path: Path,
) -> None:
    base = f"sqlite://{tmp_path}/queue.db?commit=thread"
    requests = f"{base}&queue=q&lease=3&discipline=lifo&max_attempts=2"
    async with (
        await open_requester(requests, f"{base}&topic=replies") as requester,
        answering(requests, echo),
    ):
        assert (await requester.ask(Message(b"1"), timeout=PATIENCE)).body == b"1"


async def test_a_message_that_asks_for_no_reply_is_handled_as_any_other(base: str) -> None:
    tried: list[int] = []

    async def fail(request: Delivery) -> Message:
        tried.append(request.attempt)
        raise ValueError("no")

    async with await open_queue(f"{base}?queue=q&max_attempts=2") as queue:
        await queue.send(Message(b"1"))
        async with answering(f"{base}?queue=q&max_attempts=2", fail):
            await eventually(lambda: len(tried) == 2)
        [dead] = await queue.dead_letters()

    assert (tried, dead.reason) == ([1, 2], "ValueError: no")


async def test_a_deadline_that_is_no_instant_is_a_dead_letter(base: str) -> None:
    async with await open_queue(f"{base}?queue=q") as queue:
        for deadline in ("soon", "2026-01-31T12:00:00"):
            await queue.send(Message(b"", headers={"deadline": deadline}))
        async with answering(f"{base}?queue=q", echo):
            async with asyncio.timeout(PATIENCE):
                while len(await queue.dead_letters()) < 2:
                    await asyncio.sleep(0.01)


# Sizes, and brokers that do not answer ----------------------------------------------------


async def test_a_request_that_is_too_large_is_refused_and_not_pending(base: str) -> None:
    async with await open_requester(f"{base}?queue=q", f"{base}?topic=r") as requester:
        large = Message(bytes(500_000_001))
        with pytest.raises(MessageTooLargeError):
            await requester.ask(large, timeout=5.0)
        assert requester.pending == 0


async def test_a_reply_that_is_too_large_is_an_error_that_says_so(base: str) -> None:
    async def much(request: Delivery) -> Message:
        return Message(bytes(500_000_001))

    async with (
        await open_requester(f"{base}?queue=q", f"{base}?topic=r") as requester,
        answering(f"{base}?queue=q", much) as responder,
    ):
        with pytest.raises(RequestFailedError, match="the reply: a body of") as refused:
            await requester.ask(Message(b""), timeout=10.0)
        assert refused.value.kind == "MessageTooLargeError"
        assert (responder.counters.answered, responder.counters.failed) == (0, 1)


async def test_a_handler_that_returns_no_message_is_an_error(base: str) -> None:
    async def nothing(request: Delivery) -> Message:
        return None  # type: ignore[return-value]

    async with (
        await open_requester(f"{base}?queue=q", f"{base}?topic=r") as requester,
        answering(f"{base}?queue=q", nothing),
    ):
        with pytest.raises(RequestFailedError) as refused:
            await requester.ask(Message(b""), timeout=5.0)
    assert refused.value.kind == "TypeError"


async def test_a_send_that_finds_no_room_ends_with_the_deadline(base: str) -> None:
    full = f"{base}?queue=q&capacity=1&overflow=wait"
    async with (
        await open_queue(full) as queue,
        await open_requester(full, f"{base}?topic=r") as requester,
    ):
        await queue.send(Message(b"in the way"))
        with pytest.raises(DeadlineExceededError):
            await requester.ask(Message(b"2"), timeout=0.2)
        [delivery] = await queue.receive()
        await delivery.ack()
        # Who gave up waiting for room sends nothing when there is some.
        assert await queue.receive(wait=0.3) == []


async def test_asking_a_broker_that_is_away_ends_in_time_and_goes_on_when_it_is_back() -> None:
    with private_redis(appendonly="yes", appendfsync="always") as server:
        requests = with_options(server.url, queue="q", lease="1")
        replies = with_options(server.url, topic="r")
        loop = asyncio.get_running_loop()
        async with (
            await open_requester(requests, replies) as requester,
            answering(requests, echo),
        ):
            assert (await requester.ask(Message(b"1"), timeout=PATIENCE)).body == b"1"
            await asyncio.to_thread(server.kill)
            asked_at = loop.time()
            with pytest.raises((UnavailableError, DeadlineExceededError)):
                await requester.ask(Message(b"2"), timeout=2.0)
            assert loop.time() - asked_at < 10.0
            assert requester.pending == 0

            await asyncio.to_thread(server.start)
            async with asyncio.timeout(PATIENCE):
                while True:
                    with contextlib.suppress(UnavailableError, DeadlineExceededError):
                        reply = await requester.ask(Message(b"3"), timeout=2.0)
                        break
                    await asyncio.sleep(0.1)
            assert reply.body == b"3"


# Subscriptions ----------------------------------------------------------------------------


async def test_a_requester_that_others_took_for_dead_goes_on(redis_url: str) -> None:
    prefix = f"test-{secrets.token_hex(6)}"
    url = with_options(redis_url, prefix=prefix)
    requests = with_options(url, queue="q")
    async with (
        await open_requester(requests, with_options(url, topic="r")) as requester,
        answering(requests, echo),
    ):
        assert (await requester.ask(Message(b"1"), timeout=PATIENCE)).body == b"1"
        with redis.Redis.from_url(redis_url) as client:
            log = f"{prefix}:{{topic:r}}:log"
            [group] = client.xinfo_groups(log)
            client.xgroup_destroy(log, group["name"])

        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(DeadlineExceededError):
                    reply = await requester.ask(Message(b"2"), timeout=1.0)
                    break
        assert reply.body == b"2"


async def test_replies_by_a_topic_that_keeps_nothing_leave_nothing(redis_url: str) -> None:
    prefix = f"test-{secrets.token_hex(6)}"
    base = with_options(redis_url, prefix=prefix)
    kept_nowhere = with_options(base, delivery="at-most-once")
    requests = with_options(base, queue="q")
    async with (
        await open_requester(requests, with_options(kept_nowhere, topic="r")) as requester,
        answering(requests, echo, kept_nowhere),
    ):
        for body in (b"1", b"2"):
            assert (await requester.ask(Message(body), timeout=PATIENCE)).body == body
    with redis.Redis.from_url(redis_url) as client:
        assert not list(client.scan_iter(f"{prefix}:{{topic:r}}:log*"))


async def test_only_what_dead_requesters_left_is_removed(base: str) -> None:
    replies = f"{base}?topic=r"
    an_hour_ago = ManualClock(SYSTEM_CLOCK.now_us() - 3_600_000_000)
    old = f"requester-{IdFactory(an_hour_ago)().hex()}"
    kept = {
        "billing",
        "requester-of-the-month",
        old.removeprefix("requester-"),  # anybody may call a subscription so
        f"requester-{new_id().hex()}",  # somebody may just be opening it
    }
    for name in (old, *kept):
        await (await open_subscription(f"{replies}&subscription={name}")).close()
    async with (
        await open_topic(replies) as topic,
        await open_requester(f"{base}?queue=q", replies),
    ):
        async with asyncio.timeout(PATIENCE):
            while (stat := await topic.stat()) is None or old in stat.subscriptions:
                await asyncio.sleep(0.01)

        assert kept < set(stat.subscriptions)
        assert len(stat.subscriptions) == len(kept) + 1


# Many at once -----------------------------------------------------------------------------


def _held_by_us() -> int:
    """Return the bytes in use, less what is no requester's.

    That is asyncio's table of all tasks, which doubles by 2 MiB at one round or another, and
    the source files that are read for the log of a loop that was slow.
    """
    others = [
        tracemalloc.Filter(False, file) for file in (_weakrefset.__file__, linecache.__file__)
    ]
    traces = tracemalloc.take_snapshot().filter_traces(others).traces
    return sum(trace.size for trace in traces)


async def test_ten_thousand_pending_asks_are_bounded_and_leave_nothing(base: str) -> None:
    async with await open_requester(f"{base}?queue=q&discipline=fifo", f"{base}?topic=r") as asker:

        async def round_of(number: int) -> int:
            asking = [
                asyncio.create_task(asker.ask(Message(b"1"), timeout=60.0)) for _ in range(number)
            ]
            await eventually(lambda: asker.pending == number)
            held = tracemalloc.get_traced_memory()[0]
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)
            asking.clear()
            async with await open_queue(f"{base}?queue=q") as queue:
                await queue.purge()
                await queue.receive(wait=0.0)  # the driver forgets what was purged when it looks
            gc.collect()
            return held

        await round_of(10_000)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            held = await round_of(10_000) - before
            after_one = _held_by_us()
            await round_of(10_000)
            after_two = _held_by_us()
        finally:
            tracemalloc.stop()

    assert asker.pending == 0
    assert held < 10_000 * 10_000, f"{held / 10_000:,.0f} bytes each"
    # What is remembered of those that were given up is bounded, and was full after the first.
    assert after_two - after_one < 300_000, (after_one, after_two)


# Bodies, traces, threads ------------------------------------------------------------------


async def test_codecs_make_typed_handlers_of_both_ends(base: str) -> None:
    async def count(words: str, request: Delivery) -> JSONValue:
        return len(words.split())

    async with (
        await open_requester(f"{base}?queue=q", f"{base}?topic=r") as requester,
        answering(f"{base}?queue=q", TEXT.answering(count, JSON)),
    ):
        reply = await requester.ask(TEXT.message("to be or not"), timeout=5.0)
        assert JSON.decode(reply) == 4
        with pytest.raises(RequestFailedError, match="cannot be decoded") as refused:
            await requester.ask(Message(b"\xff"), timeout=5.0)
        assert refused.value.kind == "RejectError"


async def test_request_handler_and_reply_stand_in_one_trace(base: str) -> None:
    exported = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    tracing = OpenTelemetry(provider)
    requests = f"{base}?queue=q"
    async with (
        await open_requester(requests, f"{base}?topic=r", tracing=tracing) as requester,
        await open_responder(requests, tracing=tracing) as responder,
    ):
        running = asyncio.create_task(responder.run(echo))
        reply = await requester.ask(Message(b"1"), timeout=5.0)
        responder.stop()
        await running

    spans = {span.name: span for span in exported.get_finished_spans()}
    assert spans.keys() == {"send q", "process q", "send r"}
    traces = {span.context.trace_id for span in spans.values() if span.context is not None}
    assert len(traces) == 1
    assert f"{traces.pop():032x}" in reply.headers["traceparent"]


def test_blocking_code_asks_and_answers_too(base: str) -> None:
    threads: set[str] = set()

    def shout(request: blocking.Delivery) -> Message:
        threads.add(threading.current_thread().name)
        return Message(request.message.body.upper())

    requests = f"{base}?queue=q"
    with (
        blocking.open_requester(requests, f"{base}?topic=r") as requester,
        blocking.open_responder(requests) as responder,
    ):
        running = threading.Thread(target=responder.run, args=(shout,))
        running.start()
        assert requester.ask(Message(b"molva"), timeout=5.0).body == b"MOLVA"
        assert (requester.counters.answered, responder.counters.answered) == (1, 1)
        responder.stop()
        running.join()
    assert all(name.startswith("molva-handler") for name in threads)


async def test_an_inbox_that_is_stopped_while_it_is_subscribed_anew_ends(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = await Inbox.open(with_options(base, topic="r"), SYSTEM_CLOCK)
    await inbox._unsubscribe()  # as where others removed it
    asked, goes_on = asyncio.Event(), asyncio.Event()

    async def slowly(*arguments: Any, **named: Any) -> Subscription:
        asked.set()
        await goes_on.wait()
        return await open_subscription(*arguments, **named)

    monkeypatch.setattr(_inbox, "open_subscription", slowly)

    async def take(_: Delivery) -> None:
        raise AssertionError("nobody asked")

    running = asyncio.create_task(inbox.run(take))
    await asked.wait()
    inbox.stop()
    goes_on.set()
    async with asyncio.timeout(PATIENCE):
        await running
    await inbox.close()
