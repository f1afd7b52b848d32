"""A delivery: one hand-over of a message, to be settled once."""

from collections.abc import Sequence
from typing import Protocol, final

from molva.messaging.driver import Action, Token
from molva.messaging.message import Message

__all__ = ["Delivery", "Settles"]


class Settles(Protocol):
    """What a delivery needs of the subscription that it came from."""

    async def settle(
        self,
        settlements: "Sequence[tuple[Delivery, Action]]",
        *,
        delay: float = 0.0,
        reason: str = "",
    ) -> None:
        """Settle deliveries; see ``Subscription.settle``."""
        ...


@final
class Delivery:
    """One hand-over of one message to this consumer.

    Settle it once: ``ack`` when the work is done and stored, ``nack`` to see the message
    again, ``reject`` to put it among the dead letters. The first of these wins; later
    ones do nothing. A delivery that is never settled comes again, to this consumer or to
    another, when the subscription is closed or its process ends.

    Attributes:
        message: The message.
        attempt: The how many-th hand-over of this message this is, from 1, as far as the
            broker counts them: a topic's owner counts since it took the lane.
    """

    __slots__ = ("_subscription", "attempt", "message", "settled", "token")

    def __init__(self, message: Message, attempt: int, token: Token, subscription: Settles) -> None:
        self.message = message
        self.attempt = attempt
        self.token = token
        self.settled = False
        self._subscription = subscription

    async def ack(self) -> None:
        """Settle as done.

        Raises:
            LeaseLostError: Another consumer has the message now, or will.
            UnavailableError: The broker cannot be told; the message may come again.
        """
        await self._subscription.settle([(self, Action.ACK)])

    async def nack(self, *, delay: float = 0.0) -> None:
        """Give the message back, to come again in ``delay`` seconds at the earliest.

        At the subscription's last attempt it becomes a dead letter instead.

        Raises:
            LeaseLostError: Another consumer has the message now, or will.
            UnavailableError: The broker cannot be told; the message comes again.
        """
        await self._subscription.settle([(self, Action.NACK)], delay=delay)

    async def reject(self, reason: str) -> None:
        """Put the message among the dead letters, with the reason.

        Raises:
            LeaseLostError: Another consumer has the message now, or will.
            UnavailableError: The broker cannot be told; the message comes again.
        """
        await self._subscription.settle([(self, Action.REJECT)], reason=reason)

    def __repr__(self) -> str:
        return f"<Delivery of {self.message}, attempt {self.attempt}>"
