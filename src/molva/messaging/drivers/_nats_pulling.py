"""Asking a server for messages: one request at a time, of which nothing is lost.

A request is *one-shot*: it waits for the first message, brings what is there besides, and ends
with a word. So nothing is taken ahead that nobody has asked for, and no request is left behind
to catch what another consumer should get.

A request is short, too, and made again for as long as somebody waits. It cannot be taken back:
giving up its inbox loses what the server is sending just then, until its lease is over (one in
some hundred times, when it was tried). So one that nobody waits for any more is left to end, and
what it brings is given back. A connection that is dead and does not know it shows by a request
that does not end.
"""

import asyncio
import itertools
import json
from typing import Any, Final, final

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from molva._base.clock import Clock
from molva.messaging.drivers._nats_link import Connection, status_of
from molva.messaging.errors import IncompatibleBrokerError, UnavailableError

__all__ = ["ConsumerGoneError", "Pull", "Pulls"]

# Seconds that a request waits at most. Longer, and closing takes as long, and what comes for
# a receive that was cancelled is kept from others; shorter, and idle consumers keep the server
# busy.
_LONGEST_WAIT: Final = 0.3
# Seconds after its time within which a request must have ended, or the connection is given up.
_SILENCE: Final = 4.0

# Bytes of bodies that one request brings, of which one may be larger: what is asked for is
# held in memory.
_MOST_BYTES: Final = 16_000_000

_NS: Final = 1_000_000_000

_UNSENT: Final = "Nats-Pending-Messages"
_NO_RESPONDERS: Final = "503"
_CONFLICT: Final = "409"


class ConsumerGoneError(Exception):
    """The consumer, or its stream, is not there any more."""


@final
class Pull:
    """What one request has brought."""

    __slots__ = ("ended", "first_at", "left", "messages", "number", "seen_at", "status")

    def __init__(self, number: int, limit: int, now: float) -> None:
        self.number = number
        self.left = limit
        self.messages: list[Msg] = []
        # When the first one came, and when anything did.
        self.first_at = now
        self.seen_at = now
        self.ended = False
        self.status: tuple[str, str] = ("", "")


@final
class Pulls:
    """The requests of one consumer over one connection.

    Args:
        connection: Over which they go.
        stream: The stream's name.
        consumer: The consumer's name.
        max_payload: The largest message that the server takes.
        clock: Where time comes from.
    """

    def __init__(
        self, connection: Connection, stream: str, consumer: str, *, max_payload: int, clock: Clock
    ) -> None:
        self.connection: Final = connection
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._max_bytes = max(_MOST_BYTES, 2 * max_payload)
        self._clock = clock
        self._numbers = itertools.count(1)
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._pull: Pull | None = None
        self._moved = asyncio.Event()

    async def pull(self, limit: int, wait: float) -> Pull:
        """Return what is there, up to ``limit``; wait up to ``wait`` seconds for the first.

        Raises:
            ConsumerGoneError: There is no such consumer.
            UnavailableError: The connection ended, or is dead. What came is lost with it, until
                its lease runs out.
        """
        wait = min(wait, _LONGEST_WAIT)
        if self._subscription is None:
            self._inbox = self.connection.new_inbox() + "."
            self._subscription = await self.connection.subscribe(self._inbox + "*", self._note)
        number = next(self._numbers)
        pull = self._pull = Pull(number, limit, self._clock.monotonic())
        asked: dict[str, Any] = {"batch": limit, "no_wait": True, "max_bytes": self._max_bytes}
        if wait > 0:
            asked["expires"] = max(1_000_000, round(wait * _NS))
        inbox = f"{self._inbox}{number}"
        await self.connection.publish(self._subject, json.dumps(asked).encode(), inbox)
        self.connection.wakes.add(self._moved)
        try:
            await self._until_ended(pull, wait + _SILENCE)
        finally:
            self.connection.wakes.discard(self._moved)
            self._pull = None
        self._check(pull)
        return pull

    async def _until_ended(self, pull: Pull, silence: float) -> None:
        while not pull.ended:
            self._moved.clear()
            if self.connection.ended.is_set():
                if pull.messages:
                    return
                raise UnavailableError("nats: the connection was lost")
            try:
                left = pull.seen_at + silence - self._clock.monotonic()
                async with asyncio.timeout(max(0.0, left)):
                    await self._moved.wait()
            except TimeoutError:
                if self._clock.monotonic() < pull.seen_at + silence:
                    continue
                await self.connection.close()
                if not pull.messages:
                    raise UnavailableError("nats: no sign of life from the server") from None

    async def _note(self, msg: Msg) -> None:
        pull = self._pull
        if pull is None:
            return
        now = self._clock.monotonic()
        pull.seen_at = now
        status = status_of(msg) if not msg.reply else None
        if status is None:
            if not pull.messages:
                pull.first_at = now
            pull.messages.append(msg)
            pull.left -= 1
            if not pull.left:
                pull.ended = True
                self._moved.set()
        elif msg.subject == f"{self._inbox}{pull.number}":
            headers = msg.headers or {}
            pull.status = status, headers.get("Description", "")
            # Of several copies the server hands nothing over before most know of it, and the word
            # may come first: it says how many of what was asked for were not on their way then.
            unsent = headers.get(_UNSENT, "")
            pull.left = max(0, pull.left - int(unsent)) if unsent.isdecimal() else 0
            if not pull.left:
                pull.ended = True
                self._moved.set()

    def _check(self, pull: Pull) -> None:
        """Raise where a request ended because of what the consumer is, and brought nothing."""
        status, text = pull.status
        if pull.messages:
            return
        if status == _NO_RESPONDERS or (status == _CONFLICT and "Deleted" in text):
            raise ConsumerGoneError
        if status == _CONFLICT and "push" in text:
            raise IncompatibleBrokerError(
                f"nats: the consumer was made anew by somebody else, to be sent to ({text}); "
                "delete it, or choose another name for the subscription"
            )
        if status == _CONFLICT and "MaxBytes" not in text:
            raise UnavailableError(f"nats: {text}")
        if status == "400":
            raise IncompatibleBrokerError(f"nats: the server does not understand us: {text}")
