"""What the portable classes tell a tracer, and nothing of any tracer.

``telemetry`` has one for OpenTelemetry. Anything with these two methods will do.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, final

from molva.messaging.delivery import Delivery
from molva.messaging.message import Message
from molva.messaging.url import BrokerURL

__all__ = ["Place", "Tracing"]


@final
@dataclass(frozen=True, slots=True)
class Place:
    """Where messages go to or come from.

    Attributes:
        system: The broker's scheme: ``sqlite``.
        name: Of the topic or queue.
        subscription: None for a queue, and for the sending side of a topic.
    """

    system: str
    name: str
    subscription: str | None

    @classmethod
    def of(cls, url: BrokerURL) -> "Place":
        """Return the place that a URL names."""
        return cls(url.scheme, url.queue or url.topic or "", url.subscription)

    def __str__(self) -> str:
        return self.name if self.subscription is None else f"{self.name}/{self.subscription}"


class Tracing(Protocol):
    """Notes what is sent and what is processed, and ties the two together."""

    def sending(
        self, place: Place, messages: Sequence[Message]
    ) -> tuple[Sequence[Message], Callable[[BaseException | None], None]]:
        """Begin to send. Returns what to send instead, and what to call at the end.

        The messages returned are the same ones, with the sender's context in headers.
        """
        ...

    def processing(self, place: Place, delivery: Delivery) -> AbstractContextManager[None]:
        """Return a context in which a handler runs, tied to the sender's."""
        ...
