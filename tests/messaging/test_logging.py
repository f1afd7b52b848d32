"""What is logged about a message carries its id as a field, for whoever reads logs as data."""

import ast
import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import molva.messaging
from molva._base.ids import format_id
from molva.messaging import (
    Delivery,
    Message,
    Queue,
    RejectError,
    UnavailableError,
    open_queue,
)
from molva.messaging.conformance.waiting import eventually

_names = itertools.count()

# Lines that are about no message in particular: a handler, a file, a subscription.
_ABOUT_NO_MESSAGE = (
    "%d handlers %s did not end within",
    "%s has blocked the event loop",
    "watermarks are not written",
    "hand-overs are not counted",
    "%s: %d consumers in a row died with messages of lane",
    # Channels: of subscribing, and of what cannot be handed over.
    "%s: not subscribed",
    "%s: %s: its consumer is too slow",
    "%s: something was published that is no message",
    # Redis: of entries that are no messages, and what is gone from the server.
    "nats: %s was changed by somebody else and throws away",
    "redis: an entry of topic",
    "redis: subscription %r of topic %r was gone",
    "redis: queue %r is gone",
    # NATS: of messages that are none of ours, and what others made, changed or removed.
    "nats: stream %r takes no batches",
    "nats: a message of %s became a dead letter",
    "nats: consumer %r of %s was",
    "nats: %s was gone",
    "nats: the lease of consumer",
    "%s: NATS %s, when it is killed, empties the stream",
    # RabbitMQ: of queues, and messages that are none of ours.
    "%s: a message of %s became a dead letter",
    "%s: %s had been removed and is made anew",
    "%s: %s has messages and sends none",
    # Requesters: of replies as a whole, and of subscriptions.
    "no more replies can be received",
    "replies may be missing",
    "%r: another requester has to tidy up",
    "%r: removed %s, whose requester died",
    "what killed requesters left was not looked for",
    # Kafka: of partitions and positions.
    "a Kafka consumer's thread ended",
    "lanes go before it was known",
    "positions are not committed",
    "%s: positions are not committed",
    "%s: partition %d of %s went back",
    "%s: offsets %d to %d of partition",
    "%s: %s consumers in a row died with messages of partition",
    "%s: hand-overs are not counted",
    "%s: this process stood still",
)


def _url(**options: object) -> str:
    extra = "".join(f"&{name}={value}" for name, value in options.items())
    return f"memory://logging-{next(_names)}?queue=q{extra}"


def _fields(caplog: pytest.LogCaptureFixture, text: str) -> tuple[object, object]:
    [record] = [r for r in caplog.records if text in r.getMessage()]
    return getattr(record, "message_id", None), getattr(record, "attempt", None)


async def _run(
    queue: Queue, message: Message, handler: Callable[[Delivery], Awaitable[None]]
) -> None:
    async def once(delivery: Delivery) -> None:
        queue.stop()
        await handler(delivery)

    await queue.send(message)
    await queue.run(once)


async def _raise(_: Delivery) -> None:
    raise OSError("bad")


async def _reject(_: Delivery) -> None:
    raise RejectError("bad")


async def _settle_then_raise(delivery: Delivery) -> None:
    await delivery.ack()
    raise OSError("bad")


@pytest.mark.parametrize(
    ("handler", "max_attempts", "text"),
    [
        (_raise, 2, "next try in"),
        (_raise, 1, "failed for the last time"),
        (_reject, 2, "was rejected"),
        (_settle_then_raise, 2, "then raised"),
    ],
)
async def test_a_handler_that_fails_is_logged_with_the_message(
    caplog: pytest.LogCaptureFixture,
    handler: Callable[[Delivery], Awaitable[None]],
    max_attempts: int,
    text: str,
) -> None:
    message = Message(b"1")
    async with await open_queue(_url(), max_attempts=max_attempts) as queue:
        await _run(queue, message, handler)
    assert _fields(caplog, text) == (format_id(message.id), 1)


async def test_what_is_buried_unseen_is_logged_with_the_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    expired, poison = Message(b"1", ttl=0.001), Message(b"2")
    async with await open_queue(_url(lease=0.05), max_attempts=1) as queue:
        await queue.send_many([expired, poison])
        await asyncio.sleep(0.01)
        for _ in range(3):  # once with others, twice alone
            [_] = await queue.receive(2)
            await asyncio.sleep(0.1)
        assert await queue.receive(1, wait=0.0) == []
    assert _fields(caplog, "expired")[0] == format_id(expired.id)
    assert _fields(caplog, "never settled") == (format_id(poison.id), 3)


async def test_leases_that_cannot_be_kept_are_logged_with_their_messages(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = Message(b"1")
    async with await open_queue(_url(lease=0.1)) as queue:

        async def fail(*_: object) -> None:
            raise UnavailableError("gone")

        monkeypatch.setattr(queue._driver, "extend_batch", fail)

        async def slow(_: Delivery) -> None:
            await eventually(lambda: "could not be extended" in caplog.text)

        await _run(queue, message, slow)
    record = next(r for r in caplog.records if "could not be extended" in r.getMessage())
    assert record.__dict__["message_ids"] == [format_id(message.id)]


async def test_a_lost_lease_is_logged_with_the_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    message = Message(b"1")
    async with await open_queue(_url(lease=0.2)) as queue:

        async def purged(_: Delivery) -> None:
            await queue.purge()
            await eventually(lambda: "ran out while it was held" in caplog.text)

        await _run(queue, message, purged)
    assert _fields(caplog, "ran out while it was held") == (format_id(message.id), 1)


async def test_a_settlement_that_fails_is_logged_with_the_message(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = Message(b"1")
    async with await open_queue(_url()) as queue:

        async def fail(*_: object) -> None:
            raise UnavailableError("gone")

        with monkeypatch.context() as patched:

            async def handle(_: Delivery) -> None:
                patched.setattr(queue._driver, "settle_batch", fail)

            await _run(queue, message, handle)
    assert _fields(caplog, "could not be settled") == (format_id(message.id), 1)


def test_no_line_about_a_message_is_without_fields() -> None:
    root = Path(molva.messaging.__file__).parent
    bare = []
    for path in root.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr in ("debug", "info", "warning", "error", "exception")
                and ast.unparse(call.func.value) in ("_logger", "self._log", "logger")
                and not any(keyword.arg == "extra" for keyword in call.keywords)
            ):
                text = ast.literal_eval(call.args[0])
                # "%s" alone: what the broker's client says of its connections.
                if text != "%s" and not str(text).startswith(_ABOUT_NO_MESSAGE):
                    bare.append(f"{path.name}:{call.lineno}: {text}")
    assert bare == []
