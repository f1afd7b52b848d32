"""A delivery: one hand-over of a message, or of several taken as one, to be settled once."""

from collections.abc import Sequence
from typing import Protocol, final

from molva.messaging.driver import Action, RawDelivery, Settlement, Token
from molva.messaging.message import Message

__all__ = ["Delivery", "Settles"]


class Settles(Protocol):
    """What a delivery needs of the subscription or queue that it came from."""

    async def settle(
        self,
        settlements: "Sequence[tuple[Delivery, Action]]",
        *,
        delay: float = 0.0,
        reason: str = "",
    ) -> None:
        """Settle deliveries; see ``Subscription.settle``."""
        ...

    async def extend(
        self, deliveries: "Sequence[Delivery]", seconds: float | None = None
    ) -> "list[Delivery]":
        """Hold deliveries for longer; see ``Queue.extend``."""
        ...


@final
class Delivery:
    """One hand-over of one message to this consumer.

    Settle it once: ``ack`` when the work is done and stored, ``nack`` to see the message
    again, ``reject`` to put it among the dead letters. The first of these wins; later
    ones do nothing. A delivery that is never settled comes again, to this consumer or to
    another, when its lease runs out, or its consumer is closed or dies.

    Attributes:
        message: The message; the first one where several were taken as one.
        attempt: The how many-th hand-over of this message this is, from 1, as far as the
            broker counts them: see ``Capabilities.attempts``.
        stored_at_us: When the broker stored it: microseconds, UTC.
        settled: Whether it was settled, or is being settled now.
        lost: Whether its lease was found to have run out. Drop the work: another consumer
            has the message, or will.
    """

    __slots__ = (
        "_rest",
        "_source",
        "attempt",
        "lost",
        "message",
        "settled",
        "stored_at_us",
        "token",
    )

    def __init__(
        self,
        message: Message,
        attempt: int,
        token: Token,
        stored_at_us: int,
        source: Settles,
        rest: Sequence[RawDelivery] = (),
    ) -> None:
        self.message = message
        self.attempt = attempt
        self.token = token
        self.stored_at_us = stored_at_us
        self.settled = False
        self.lost = False
        self._source = source
        self._rest = rest

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages of this hand-over: one, unless ``discipline=aggregated``."""
        return (self.message, *(raw.message for raw in self._rest))

    @property
    def tokens(self) -> list[Token]:
        """The names of what is held: one a message."""
        return [self.token, *(raw.token for raw in self._rest)]

    @property
    def redelivered(self) -> bool:
        """Whether the message was handed over before, as far as the broker knows."""
        return self.attempt > 1

    async def ack(self) -> None:
        """Settle as done.

        Raises:
            LeaseLostError: Another consumer has the message now, or will.
            UnavailableError: The broker cannot be told; the message may come again.
        """
        await self._source.settle([(self, Action.ACK)])

    async def nack(self, *, delay: float = 0.0) -> None:
        """Give the message back, to come again in ``delay`` seconds at the earliest.

        At the last attempt it becomes a dead letter instead.

        Raises:
            LeaseLostError: Another consumer has the message now, or will.
            UnavailableError: The broker cannot be told; the message comes again.
        """
        await self._source.settle([(self, Action.NACK)], delay=delay)

    async def reject(self, reason: str) -> None:
        """Put the message among the dead letters, with the reason.

        Raises:
            LeaseLostError: Another consumer has the message now, or will.
            UnavailableError: The broker cannot be told; the message comes again.
        """
        await self._source.settle([(self, Action.REJECT)], reason=reason)

    async def extend(self, seconds: float | None = None) -> None:
        """Hold the message for ``seconds`` from now; None for another lease.

        ``run`` and iterating do this by themselves while a message is worked on.

        Raises:
            LeaseLostError: Another consumer has the message now, or will.
            UnavailableError: The broker cannot be told.
        """
        await self._source.extend([self], seconds)

    def settlements(
        self, action: Action, *, delay: float = 0.0, reason: str = ""
    ) -> list[Settlement]:
        """Return what tells the driver how this hand-over ends, one a message."""
        attempt = self.attempt
        found = [Settlement(self.token, action, delay, reason, attempt)]
        for raw in self._rest:
            found.append(Settlement(raw.token, action, delay, reason, attempt))
        return found

    def __repr__(self) -> str:
        more = f" and {len(self._rest):,} more" if self._rest else ""
        return f"<Delivery of {self.message}{more}, attempt {self.attempt}>"
