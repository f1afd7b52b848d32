"""Answering: handlers whose result travels back to whoever asked.

A request is settled when its reply is stored, so a responder that dies in between leaves the
request to another one, and the handler runs twice: at least once, as everywhere. The request's
id is the same both times.

A handler that raises is answered, not tried again: whoever asked is there, waits, and can
decide better than a schedule of retries whether another try is worth the time that is left.
What it raised is told by the name of its class; its text stays in this side's log, because it
may hold what is nobody else's business. ``RejectError`` is raised for the requester to read, so
its text travels. What cannot be answered because the broker is away is tried again.

A request whose deadline has passed is dropped and counted, not worked on: nobody waits. It is
no dead letter, because there is nothing that somebody should look into.

A request names a topic, never a URL: a message must not be able to send us to another host,
nor to bring credentials along. Topics are never made for a reply. Whoever asked reads it, so
it is there.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final, cast, final
from urllib.parse import parse_qsl, urlsplit

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva._base.ids import format_id
from molva._base.seldom import SeldomLog
from molva.messaging._about import about
from molva.messaging._correlation import ERROR_TYPE, REPLY_TO, as_reply, deadline_us, error_reply
from molva.messaging._opened import Closing
from molva.messaging._tracing import Tracing
from molva.messaging.delivery import Delivery
from molva.messaging.errors import (
    ClosedError,
    InvalidURLError,
    LeaseLostError,
    MessageTooLargeError,
    MessagingError,
    NotFoundError,
    RejectError,
    UnsupportedFeatureError,
)
from molva.messaging.message import Message
from molva.messaging.queue import Queue, open_queue
from molva.messaging.subscription import Subscription, open_subscription
from molva.messaging.topic import Topic, open_topic
from molva.messaging.url import BrokerURL, load_driver, with_options

__all__ = ["AnswerCounters", "Responder", "open_responder"]

_logger: Final = logging.getLogger("molva.messaging")

_Handler = Callable[[Delivery], Awaitable[Message]]


@final
@dataclass(slots=True)
class AnswerCounters:
    """What became of requests since the responder was opened; they only ever grow.

    Attributes:
        answered: Requests whose answer is stored.
        failed: Those that were answered with an error.
        overdue: Those that came after their deadline, and were not worked on.
        unanswerable: Those that name a reply topic that is not there; they are dead letters.
    """

    answered: int = 0
    failed: int = 0
    overdue: int = 0
    unanswerable: int = 0


async def open_responder(
    requests: str,
    replies: str | None = None,
    *,
    max_attempts: int | None = None,
    require: Iterable[str] = (),
    clock: Clock = SYSTEM_CLOCK,
    tracing: Tracing | None = None,
) -> "Responder":
    """Open one end of request and reply: the one that answers.

    Responders of one queue, or of one subscription, share its requests, in any number of
    processes.

    Args:
        requests: Names what requests come by: ``…?queue=sums``, or a topic and a
            subscription, ``…?topic=sums&subscription=adders``.
        replies: The broker of the reply topics: a URL without a topic answers to any topic
            there that a request names; one with a topic answers to that one only. None: the
            broker of the requests.
        max_attempts: Hand-overs of one request before it becomes a dead letter, ≥ 1.
            None: as the URL says, or 5.
        require: Features that the broker of the requests must have.
        clock: Where time comes from.
        tracing: Told of each request worked on and each reply sent, so that both stand in
            the trace of whoever asked.

    Raises:
        InvalidURLError: A URL or one of its options cannot be used.
        UnsupportedFeatureError: The broker has not all that is required.
        MissingExtraError: A driver's client library is not installed.
        NotFoundError: Something does not exist, and ``create=never`` was asked for.
        IncompatibleBrokerError: A broker is newer, damaged or something else.
        UnavailableError: A broker cannot be reached now.
    """
    parsed = BrokerURL.parse(requests)
    if parsed.queue is None and (parsed.topic is None or parsed.subscription is None):
        raise InvalidURLError(
            f"{parsed}: requests come by a queue, ?queue=sums, or by a subscription, "
            "?topic=sums&subscription=adders"
        )
    base = _broker_of(requests, parsed) if replies is None else replies
    to = BrokerURL.parse(base)
    if "create=" in base:
        raise InvalidURLError(f"{to}: create= is refused; reply topics are never made")
    if (to.queue or to.subscription) is not None:
        raise InvalidURLError(f"{to}: replies go to topics; name one, ?topic=replies, or none")
    opened = await (open_subscription if parsed.queue is None else open_queue)(
        requests, max_attempts=max_attempts, require=require, clock=clock, tracing=tracing
    )
    topics = _ReplyTopics(base, only=to.topic, clock=clock, tracing=tracing)
    return Responder(opened, topics, clock=clock)


def _broker_of(requests: str, parsed: BrokerURL) -> str:
    """Return the URL of the same broker, with what its topics understand and no more."""
    known: tuple[str, ...] = getattr(load_driver(parsed), "TOPIC_OPTIONS", ())
    parts = urlsplit(requests)
    kept = [(name, value) for name, value in parse_qsl(parts.query) if name in known]
    return with_options(f"{parts.scheme}://{parts.netloc}{parts.path}", **dict(kept))


@final
class Responder(Closing):
    """Answers requests. Open one with ``open_responder``."""

    def __init__(
        self, requests: Queue | Subscription, topics: "_ReplyTopics", *, clock: Clock
    ) -> None:
        # Public, for metrics: what requests come by.
        self.requests: Final = requests
        self._topics: Final = topics
        self._clock: Final = clock
        self._log: Final = SeldomLog(_logger, clock)
        self._closed = False
        self.counters = AnswerCounters()

    async def run(
        self,
        handler: Callable[[Delivery], Awaitable[Message]],
        *,
        concurrency: int = 1,
        timeout: float | None = None,
    ) -> None:
        """Answer requests with what ``handler`` returns, until ``stop`` or ``close``.

        The handler may run twice for one request, here or in another process: the id of
        ``request.message`` tells. A request that says nothing of a reply is handled as any
        message is, and tried again where the handler raises.

        Args:
            handler: Called with each request; returns the reply.
            concurrency: How many handlers may run at once, ≥ 1.
            timeout: Seconds after which a handler is cancelled, and the request tried again
                until its deadline; None lets it take as long as it takes.

        Raises:
            BrokenBrokerError: This process must not use the broker again; another one goes on.
            IncompatibleBrokerError: What is stored there is damaged.
            NotFoundError: What was opened has been removed.
        """

        async def answer(request: Delivery) -> None:
            await self._answer(handler, request)

        # For the log, which names handlers.
        answer.__qualname__ = getattr(handler, "__qualname__", type(handler).__qualname__)
        await self.requests.run(answer, concurrency=concurrency, timeout=timeout)

    def stop(self, *, timeout: float | None = None) -> None:
        """End ``run``, after the handlers under way.

        Args:
            timeout: Seconds after which handlers that still run are cancelled, and their
                requests given back; None waits for as long as they take.
        """
        self.requests.stop(timeout=timeout)

    async def close(self) -> None:
        """Give back what is not answered, and release the brokers. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            await self.requests.close()
        finally:
            await self._topics.close()

    def __repr__(self) -> str:
        return f"<Responder of {self.requests!r}>"

    async def _answer(self, handler: _Handler, delivery: Delivery) -> None:
        """Work on a request and send its reply; return where it is done with."""
        request = delivery.message
        until_us = deadline_us(request)
        name = request.headers.get(REPLY_TO)
        if until_us is not None and self._clock.now_us() > until_us:
            self.counters.overdue += 1
            late = (self._clock.now_us() - until_us) / 1e6
            self._log.warning(
                "%s: request %s came %.1f s after its deadline and was not worked on",
                self.requests.name,
                format_id(request.id),
                late,
                extra=about(request, delivery.attempt),
            )
            return
        if name is None:
            await handler(delivery)
            return
        try:
            topic = await self._topics.open(name)
        except (NotFoundError, InvalidURLError, UnsupportedFeatureError) as error:
            raise self._unanswerable(name, error) from error
        reply = await self._reply(handler, delivery)
        try:
            sent = await self._send(topic, request, reply)
        except NotFoundError as error:  # it was removed since it was opened
            raise self._unanswerable(name, error) from error
        if ERROR_TYPE in sent.headers:
            self.counters.failed += 1
        else:
            self.counters.answered += 1

    def _unanswerable(self, name: str, error: MessagingError) -> RejectError:
        self.counters.unanswerable += 1
        return RejectError(f"no reply can be sent to topic {name!r}: {error}")

    async def _reply(self, handler: _Handler, delivery: Delivery) -> Message:
        """Return what the handler answers; an error where it raises."""
        try:
            reply = await handler(delivery)
            if not isinstance(cast(object, reply), Message):
                raise TypeError(f"a handler returns a Message, not {type(reply).__name__}")
        except LeaseLostError:
            raise  # another responder has the request, and answers
        except RejectError as error:
            return error_reply("RejectError", str(error))
        except Exception as error:
            fields = about(delivery.message, delivery.attempt)
            _logger.exception("%r failed and was answered so", delivery, extra=fields)
            return error_reply(
                type(error).__name__,
                f"the responder's log says more, of message {format_id(delivery.message.id)}",
            )
        return reply

    async def _send(self, topic: Topic, request: Message, reply: Message) -> Message:
        """Send a reply, or why it cannot be sent; return what was sent."""
        try:
            await topic.send(as_reply(reply, request))
        except MessageTooLargeError as error:
            reply = error_reply("MessageTooLargeError", f"the reply: {error}")
            await topic.send(as_reply(reply, request))
        return reply


@final
class _ReplyTopics:
    """The topics to which requests ask to be answered, each opened once.

    There are never more than the broker has: none is made.
    """

    def __init__(
        self, base: str, *, only: str | None, clock: Clock, tracing: Tracing | None
    ) -> None:
        self._base: Final = base
        self._only: Final = only
        self._clock: Final = clock
        self._tracing: Final = tracing
        self._opened: dict[str, asyncio.Task[Topic]] = {}
        self._closed = False

    async def open(self, name: str) -> Topic:
        """Return the topic of this name.

        Raises:
            NotFoundError: There is none, or it is not the one that may be answered to.
            InvalidURLError: This is no name of a topic.
        """
        if self._closed:
            raise ClosedError("the responder was closed")
        opening = self._opened.get(name)
        if opening is None:
            opening = asyncio.ensure_future(self._open(name))
            self._opened[name] = opening
        try:
            # Several may wait for it, and one that is cancelled takes nothing from the others.
            return await asyncio.shield(opening)
        except Exception:
            if self._opened.get(name) is opening:
                del self._opened[name]  # the next request tries anew
            raise

    async def close(self) -> None:
        """Store what was sent, and release the broker."""
        self._closed = True
        opened = await asyncio.gather(*self._opened.values(), return_exceptions=True)
        for topic in opened:
            if isinstance(topic, Topic):
                await topic.close()

    async def _open(self, name: str) -> Topic:
        url = self._base
        if self._only is None:
            url = with_options(url, topic=name)
        elif name != self._only:
            raise InvalidURLError(f"only {self._only!r} is answered to here")
        return await open_topic(
            with_options(url, create="never"), clock=self._clock, tracing=self._tracing
        )
