"""Spans and metrics of messaging."""

import asyncio
import itertools
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry, generate_latest

from molva._base.clock import SYSTEM_CLOCK, ManualClock
from molva.messaging import (
    DeadlineExceededError,
    Delivery,
    Message,
    QueueFullError,
    RequestFailedError,
    open_queue,
    open_requester,
    open_responder,
    open_subscription,
    open_topic,
)
from molva.messaging.conformance import eventually
from molva.messaging.metrics import MessagingCollector
from molva.messaging.telemetry import OpenTelemetry

_names = itertools.count()
MANUAL = Path(__file__).parent.parent.parent / "docs" / "metrics.md"


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exported: InMemorySpanExporter) -> OpenTelemetry:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    return OpenTelemetry(provider)


def by_name(exported: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exported.get_finished_spans()}


async def test_a_handlers_span_is_below_the_senders(
    exported: InMemorySpanExporter, tracing: OpenTelemetry
) -> None:
    url = f"memory://telemetry-{next(_names)}?topic=orders"
    message = Message(b"1", headers={"own": "kept"})
    async with (
        await open_topic(url, tracing=tracing) as topic,
        await open_subscription(f"{url}&subscription=billing", tracing=tracing) as subscription,
    ):
        await topic.send(message)
        headers: dict[str, str] = {}

        async def handle(delivery: Delivery) -> None:
            headers.update(delivery.message.headers)
            assert delivery.message.id == message.id
            subscription.stop()

        await subscription.run(handle)

    spans = by_name(exported)
    send, process = spans["send orders"], spans["process orders"]
    assert headers["own"] == "kept"
    assert process.context is not None
    assert send.context is not None
    assert process.context.trace_id == send.context.trace_id
    assert process.parent is not None
    assert process.parent.span_id == send.context.span_id
    assert dict(process.attributes or {})["messaging.destination.subscription.name"] == "billing"
    assert dict(send.attributes or {})["messaging.system"] == "memory"


async def test_many_sent_at_once_are_one_span(
    exported: InMemorySpanExporter, tracing: OpenTelemetry
) -> None:
    url = f"memory://telemetry-{next(_names)}?queue=q"
    async with await open_queue(url, tracing=tracing) as queue:
        await queue.send_many([Message(b"1"), Message(b"2")])
        deliveries = await queue.receive(2)
    [span] = exported.get_finished_spans()
    assert dict(span.attributes or {})["messaging.batch.message_count"] == 2
    assert span.kind is SpanKind.PRODUCER
    assert span.context is not None
    [parent] = {d.message.headers["traceparent"] for d in deliveries}
    assert f"{span.context.span_id:016x}" in parent


async def test_many_sent_at_once_keep_what_is_theirs(tracing: OpenTelemetry) -> None:
    url = f"memory://telemetry-{next(_names)}?queue=q&discipline=priority"
    sent = [
        Message(b"1", key="k", headers={"own": "kept"}, priority=3, delay=0.0, ttl=60.0),
        Message(b"2"),
    ]
    async with await open_queue(url, tracing=tracing) as queue:
        await queue.send_many(sent)
        got = [delivery.message for delivery in await queue.receive(2)]
    assert dict(sent[1].headers) == {}  # the sender's own is as it was
    for before, after in zip(sent, got, strict=True):
        assert set(after.headers) == {*before.headers, "traceparent"}
        own = {name: after.headers[name] for name in before.headers}
        assert after.with_headers(own) == before


async def test_what_fails_is_an_error_in_its_span(
    exported: InMemorySpanExporter, tracing: OpenTelemetry
) -> None:
    url = f"memory://telemetry-{next(_names)}?queue=q&capacity=1"
    async with await open_queue(url, tracing=tracing, max_attempts=1) as queue:
        await queue.send(Message(b"1"))
        with pytest.raises(QueueFullError):
            await queue.send(Message(b"2"))

        async def fail(_: Delivery) -> None:
            queue.stop()
            raise OSError("bad")

        await queue.run(fail)
    statuses = [(s.name, s.status.status_code) for s in exported.get_finished_spans()]
    assert ("send q", StatusCode.ERROR) in statuses
    assert ("process q", StatusCode.ERROR) in statuses


async def test_every_metric_is_collected_and_in_the_manual() -> None:
    url = f"memory://telemetry-{next(_names)}"
    collector = MessagingCollector()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    async with (
        await open_queue(f"{url}?queue=mails") as queue,
        await open_topic(f"{url}?topic=orders") as topic,
        await open_subscription(f"{url}?topic=orders&subscription=billing") as subscription,
    ):
        for opened in (queue, topic, subscription):
            collector.add(opened)
        await queue.send_many([Message(b"1"), Message(b"2"), Message(b"3")])
        first, second, _ = await queue.receive(3)
        await first.ack()
        await second.reject("bad")
        await topic.send(Message(b"1"))
        await collector.refresh()
        text = generate_latest(registry).decode()
        collector.remove(topic)
        collector.remove(subscription)

    def value(name: str, of: str) -> str:
        return f'{name}{{name="{of}",system="memory"}}'

    assert f"{value('molva_messaging_stored_total', 'mails')} 3.0" in text
    assert f"{value('molva_messaging_acked_total', 'mails')} 1.0" in text
    assert f"{value('molva_messaging_rejected_total', 'mails')} 1.0" in text
    assert f"{value('molva_messaging_pending', 'mails')} 1.0" in text
    assert f"{value('molva_messaging_pending', 'orders/billing')} 1.0" in text
    manual = MANUAL.read_text()
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            assert f"`{line.split()[2]}`" in manual, line


async def test_requests_are_collected_at_both_ends() -> None:
    url = f"memory://telemetry-{next(_names)}"
    collector = MessagingCollector()
    # Stands still, so that the slow request is overdue when this test says so.
    clock = ManualClock(SYSTEM_CLOCK.now_us())
    held = asyncio.Event()

    async def answer(request: Delivery) -> Message:
        if request.message.body == b"bad":
            raise ValueError("it was bad")
        if request.message.body == b"slow":
            await held.wait()
        return request.message

    async with (
        await open_requester(f"{url}?queue=sums", f"{url}?topic=replies", clock=clock) as requester,
        await open_responder(f"{url}?queue=sums") as responder,
    ):
        collector.add(requester)
        collector.add(responder)
        answering = asyncio.create_task(responder.run(answer))
        await requester.ask(Message(b"good"), timeout=60)
        with pytest.raises(RequestFailedError):
            await requester.ask(Message(b"bad"), timeout=60)
        slow = asyncio.create_task(requester.ask(Message(b"slow"), timeout=60))
        await eventually(lambda: responder.requests.received.received == 3)
        during = collected(collector, "sums")
        await clock.pass_time(61)
        with pytest.raises(DeadlineExceededError):
            await slow
        held.set()
        await eventually(lambda: requester.counters.late == 1)
        responder.stop()
        await answering
        await collector.refresh()
        after = collected(collector, "sums")
        collector.remove(requester)
        collector.remove(responder)
        gone = collected(collector, "sums")

    assert during["asks_pending"] == 1
    assert {name: value for name, value in after.items() if value and "seconds" not in name} == {
        "asks_total": 3,
        "asks_answered_total": 1,
        "asks_failed_total": 1,
        "asks_overdue_total": 1,
        "replies_late_total": 1,
        "requests_answered_total": 2,
        "requests_failed_total": 1,
        # Of the queue, which both ends have open.
        "stored_total": 3,
        "send_batches_total": 3,
        "received_total": 3,
        "acked_total": 3,
        "handled_total": 3,
    }
    assert after["pending"] == 0
    assert gone == {}


def collected(collector: MessagingCollector, name: str) -> dict[str, float]:
    """Return what Prometheus would store of one name; a sample that comes twice is refused."""
    found: dict[str, float] = {}
    for family in collector.collect():
        for sample in family.samples:
            if sample.labels["name"] == name:
                short = sample.name.removeprefix("molva_messaging_")
                assert short not in found, f"{sample.name} comes twice"
                found[short] = sample.value
    return found
