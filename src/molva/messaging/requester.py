"""Asking: a message that is answered by one, over any broker that has topics.

A requester reads its replies from a topic, by a subscription of its own that begins with what
comes next. One subscription serves all that a process asks, told apart by correlation ids:
joining one for each request would cost more than the request.

All requesters of a reply topic read all of its replies and pass over those of others. That is
the price of needing nothing but topics, and the reason why each broker can do it. Where many
processes ask, give each, or each machine, a reply topic of its own: requests name theirs.

What a killed requester leaves behind is removed by the others (``_inbox``).

Rejected: a queue for each requester, because Kafka has no queues and a killed one would leave
its queue for ever. A time to live on requests and replies: what expires is a dead letter,
which somebody has to look at, and a request that nobody waits for any more is not worth that;
the deadline in its header says the same and leaves nothing. Replies under one subscription
that requesters share: each would get the replies of others.
"""

import asyncio
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, final

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva.messaging._correlation import CORRELATION_ID, as_request, failure_of
from molva.messaging._inbox import Inbox
from molva.messaging._opened import Closing
from molva.messaging._tracing import Tracing
from molva.messaging.delivery import Delivery
from molva.messaging.errors import (
    BrokenBrokerError,
    ClosedError,
    DeadlineExceededError,
    InvalidURLError,
    MessagingError,
    QueueFullError,
)
from molva.messaging.message import Message
from molva.messaging.queue import Queue, open_queue
from molva.messaging.topic import Topic, open_topic
from molva.messaging.url import BrokerURL

__all__ = ["AskCounters", "Requester", "open_requester"]

_logger: Final = logging.getLogger("molva.messaging")

# Requests that may wait for their replies at once. Each holds some 6 KB beside its body. Far
# more, and a responder that stands still fills our memory; fewer, and a busy front end is
# refused what its responders could well answer.
_MAX_PENDING: Final = 10_000

# Overdue requests remembered, so that a reply that comes late is not taken for a second one.
_REMEMBERED: Final = 10_000

# Seconds that anybody waits. More is a unit mistaken, and a deadline that has no date.
_LONGEST: Final = 366 * 86_400.0


@final
@dataclass(slots=True)
class AskCounters:
    """What became of what was asked since the requester was opened; they only ever grow.

    Attributes:
        asked: Requests.
        answered: Those that had their answer.
        failed: Those that the responder answered with an error.
        overdue: Those whose deadline passed.
        late: Replies to requests that nobody waited for any more.
        duplicates: Replies to requests that had been answered: the request was worked on twice.
        others: Replies to other requesters of the topic, which were passed over.
    """

    asked: int = 0
    answered: int = 0
    failed: int = 0
    overdue: int = 0
    late: int = 0
    duplicates: int = 0
    others: int = 0


async def open_requester(
    requests: str,
    replies: str,
    *,
    max_pending: int = _MAX_PENDING,
    require: Iterable[str] = (),
    clock: Clock = SYSTEM_CLOCK,
    tracing: Tracing | None = None,
) -> "Requester":
    """Open one end of request and reply: the one that asks.

    Args:
        requests: Names the queue or topic that takes requests:
            ``sqlite:///var/lib/app/queue.db?queue=sums``.
        replies: Names the topic that replies come by: ``…?topic=replies``. Responders must
            reach it too. It is made if it is missing.
        max_pending: Requests that may wait for their replies at once, ≥ 1.
        require: Features that the broker of the requests must have.
        clock: Where time comes from.
        tracing: Told of each request sent, as ``telemetry.OpenTelemetry`` is.

    Raises:
        InvalidURLError: A URL or one of its options cannot be used.
        UnsupportedFeatureError: A broker has not all that is required, or no topics.
        MissingExtraError: A driver's client library is not installed.
        NotFoundError: Something does not exist, and ``create=never`` was asked for.
        IncompatibleBrokerError: A broker is newer, damaged or something else.
        UnavailableError: A broker cannot be reached now.

    Example:
        >>> import asyncio
        >>> from molva.messaging import Delivery, Message, open_requester, open_responder
        >>> async def shout(request: Delivery) -> Message:
        ...     return Message(request.message.body.upper())
        >>> async def main() -> None:
        ...     requests, replies = "memory://ask?queue=words", "memory://ask?topic=replies"
        ...     async with (
        ...         await open_requester(requests, replies) as requester,
        ...         await open_responder(requests) as responder,
        ...     ):
        ...         answering = asyncio.create_task(responder.run(shout))
        ...         reply = await requester.ask(Message(b"molva"), timeout=5.0)
        ...         print(reply.body)
        ...         responder.stop()
        ...         await answering
        >>> asyncio.run(main())
        b'MOLVA'
    """
    if max_pending < 1:
        raise ValueError(f"max_pending={max_pending} is refused; at least 1 is accepted")
    parsed = BrokerURL.parse(requests)
    if (parsed.topic or parsed.queue) is None or parsed.subscription is not None:
        raise InvalidURLError(
            f"{parsed}: requests are sent to a queue, ?queue=sums, or a topic, ?topic=sums"
        )
    to = BrokerURL.parse(replies)
    if to.topic is None or to.subscription is not None:
        raise InvalidURLError(f"{to}: replies come by a topic; name it, ?topic=replies")
    if "start" in to.options:
        raise InvalidURLError(f"{to}: start= is refused; a requester begins with what comes next")
    sends: Topic | Queue
    if parsed.queue is None:
        sends = await open_topic(requests, require=require, clock=clock, tracing=tracing)
    else:
        sends = await open_queue(requests, require=require, clock=clock, tracing=tracing)
    try:
        inbox = await Inbox.open(replies, clock)
    except BaseException:
        await sends.close()
        raise
    return Requester(sends, inbox, to.topic, max_pending=max_pending, clock=clock)


@final
class Requester(Closing):
    """Asks, and waits for the replies. Open one with ``open_requester``.

    Any number of tasks may ask at once. One of these a process is enough.

    At least once: a request may be worked on twice, after a responder died with it. Whoever
    asked gets the first reply. A request that is made again, because no reply came, should
    carry the same message id, so that the responder can tell.
    """

    def __init__(
        self,
        sends: Topic | Queue,
        inbox: Inbox,
        reply_to: str,
        *,
        max_pending: int,
        clock: Clock,
    ) -> None:
        # Public, for metrics: what requests are sent to.
        self.requests: Final = sends
        self._inbox: Final = inbox
        self._reply_to: Final = reply_to
        self._max_pending: Final = max_pending
        self._clock: Final = clock
        self._numbers: Final = itertools.count(1)
        # By correlation id: what waits, and what has waited in vain, oldest first.
        self._pending: dict[str, asyncio.Future[Message]] = {}
        self._overdue: OrderedDict[str, None] = OrderedDict()
        self._broken: Exception | None = None
        self._closed = False
        self.counters = AskCounters()
        self._listening: Final = asyncio.ensure_future(self._listen())
        self._tidying: Final = asyncio.ensure_future(self._inbox.keep_tidy())

    @property
    def pending(self) -> int:
        """How many requests wait for their replies."""
        return len(self._pending)

    async def ask(self, message: Message, *, timeout: float) -> Message:
        """Send a request; return its reply.

        Codecs make and read bodies as everywhere: ``JSON.decode(await
        requester.ask(JSON.message([2, 3]), timeout=5.0))``. Cancelling leaves nothing
        behind here; the request may be worked on all the same.

        Args:
            message: What is asked. Headers of its own travel along, except those that tie
                the reply to it: ``reply-to``, ``correlation-id``, ``deadline``.
            timeout: Seconds until nobody waits any more, > 0, at most a year. A responder that
                takes the request later does not work on it, as far as the machines' clocks
                agree.

        Raises:
            DeadlineExceededError: No reply came in time, whatever the reason.
            RequestFailedError: The responder answered that it could not.
            QueueFullError: ``max_pending`` requests wait already, or the queue is full;
                nothing was sent.
            MessageTooLargeError: The body is larger than the broker takes.
            UnavailableError: The broker cannot be reached; whether it has the request is
                unknown. BrokenBrokerError: only a new process can ask again.
            ClosedError: It was closed, before or meanwhile.
        """
        if not 0 < timeout <= _LONGEST:
            raise ValueError(f"timeout={timeout} is refused; 0 seconds to a year is accepted")
        self._check_open()
        if len(self._pending) >= self._max_pending:
            raise QueueFullError(self._max_pending)
        self.counters.asked += 1
        correlation_id = f"{self._inbox.address}.{next(self._numbers)}"
        request = as_request(
            message,
            reply_to=self._reply_to,
            correlation_id=correlation_id,
            until_us=self._clock.now_us() + round(timeout * 1_000_000),
        )
        reply = await self._exchange(request, correlation_id, timeout)
        failure = failure_of(reply, message.id)
        if failure is not None:
            self.counters.failed += 1
            raise failure
        self.counters.answered += 1
        return reply

    async def close(self) -> None:
        """Fail what waits, remove the subscription, release the brokers. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._fail_all(lambda: ClosedError("the requester was closed before the reply came"))
        self._tidying.cancel()
        self._inbox.stop()
        await asyncio.wait((self._tidying, self._listening))
        try:
            await self._inbox.close()
        finally:
            await self.requests.close()

    def __repr__(self) -> str:
        return f"<Requester of {self.requests!r}, {len(self._pending):,} pending>"

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the requester was closed")
        if self._broken is not None:
            raise self._broken_error()

    async def _exchange(self, request: Message, correlation_id: str, timeout: float) -> Message:
        """Send a request and wait for what answers it, or for the deadline."""
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._pending[correlation_id] = future

        def sent(sending: asyncio.Task[None]) -> None:
            # Looked at in any case: an error that nobody looks at would be logged.
            error = None if sending.cancelled() else sending.exception()
            if error is not None and not future.done():
                future.set_exception(error)

        def passed(waiting: asyncio.Task[None]) -> None:
            if not waiting.cancelled() and not future.done():
                self.counters.overdue += 1
                future.set_exception(DeadlineExceededError(request.id, timeout=timeout))

        loop = asyncio.get_running_loop()
        # Beside the waiting, not before it: a broker that does not answer must not hold up
        # the deadline, nor a reply that overtakes the confirmation.
        sending = loop.create_task(self.requests.send(request))
        sending.add_done_callback(sent)
        deadline = loop.create_task(self._clock.sleep(timeout))
        deadline.add_done_callback(passed)
        try:
            return await future
        finally:
            sending.cancel()
            deadline.cancel()
            if self._pending.pop(correlation_id, None) is not None:
                self._remember(correlation_id)

    def _remember(self, correlation_id: str) -> None:
        """Note that nobody waits for this reply any more."""
        self._overdue[correlation_id] = None
        if len(self._overdue) > _REMEMBERED:
            self._overdue.popitem(last=False)

    async def _take(self, delivery: Delivery) -> None:
        """Hand a reply to whoever waits for it."""
        correlation_id = delivery.message.headers.get(CORRELATION_ID, "")
        future = self._pending.get(correlation_id)
        if future is not None and not future.done():
            del self._pending[correlation_id]
            future.set_result(delivery.message)
        elif not correlation_id.startswith(f"{self._inbox.address}."):
            self.counters.others += 1
        elif future is not None or correlation_id in self._overdue:
            self._overdue.pop(correlation_id, None)
            self.counters.late += 1
        else:
            self.counters.duplicates += 1

    async def _listen(self) -> None:
        """Take replies until it is closed; where that ends by itself, nobody waits in vain."""
        try:
            await self._inbox.run(self._take)
        except Exception as error:
            _logger.exception("no more replies can be received")
            self._broken = error
            self._fail_all(self._broken_error)

    def _broken_error(self) -> BrokenBrokerError:
        found = BrokenBrokerError(f"no more replies can be received: {self._broken}")
        found.__cause__ = self._broken
        return found

    def _fail_all(self, error: Callable[[], MessagingError]) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(error())
