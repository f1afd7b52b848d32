"""What a driver implements: a small protocol under the portable classes.

A driver moves bytes. It never retries, never batches by itself, and returns a result for
each item of a batch; where the whole call failed it lets the exception through. All that
brokers have in common (validation, batching, retries, closing, telemetry) is done once,
above it. What they do not have in common is a field of ``Capabilities``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, Protocol, final

from molva.messaging.message import Message

__all__ = [
    "Action",
    "Capabilities",
    "DeadLetter",
    "Outcome",
    "RawDelivery",
    "Settlement",
    "SubscriptionDriver",
    "SubscriptionStat",
    "Token",
    "TopicDriver",
    "TopicStat",
]

# Names one hand-over of one message, with an epoch in it, so that a late settlement never
# reaches what somebody else now holds. Only the driver that made it looks inside.
Token = tuple[int, ...] | str


@final
class Outcome(Enum):
    """What became of one item of a batch."""

    STORED = "stored"
    FULL = "full"
    SETTLED = "settled"
    LEASE_LOST = "lease lost"


@final
class Action(Enum):
    """How a delivery is settled.

    NACK and RETURN both give the message back. A nack is a failed attempt and counts; a
    message that was taken ahead and never looked at is returned, and that does not count.
    """

    ACK = "ack"
    NACK = "nack"
    RETURN = "return"
    REJECT = "reject"


class RawDelivery(NamedTuple):
    """One hand-over of one message. ``attempt`` counts from 1."""

    message: Message
    attempt: int
    token: Token


class Settlement(NamedTuple):
    """How one hand-over ends.

    ``delay``: seconds before a nacked message comes again. ``reason``: why a rejected one
    goes to the dead letters. ``attempt``: as far as the consumer counted, which may have
    tried more than once during this hand-over.
    """

    token: Token
    action: Action
    delay: float = 0.0
    reason: str = ""
    attempt: int = 1

    @property
    def gives_back(self) -> bool:
        """Whether the message comes again."""
        return self.action in (Action.NACK, Action.RETURN)

    @property
    def next_attempt(self) -> int:
        """The attempt as which a message that is given back comes again."""
        return self.attempt + (self.action is Action.NACK)


@final
@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a broker can do, with the settings it was opened with.

    Attributes:
        delivery: ``at-least-once`` or ``at-most-once``.
        ordering: Whether messages of one key are processed in the order in which they
            were sent: not at all, by the consumers of one process, or by all consumers.
        capacity: Whether the number of waiting messages can be bounded, and how sharply.
        survives: What a stored message outlives, out of ``kill`` (of any process),
            ``power`` (a cut) and ``node`` (loss of a machine).
        max_body_bytes: The largest body that is taken.
        shared: Whether other processes reach what this one stores.
    """

    delivery: Literal["at-least-once", "at-most-once"]
    ordering: Literal["none", "in-process", "per-key"]
    capacity: Literal["exact", "approximate", "none"]
    survives: frozenset[str]
    max_body_bytes: int
    shared: bool = True


@final
@dataclass(frozen=True, slots=True)
class SubscriptionStat:
    """What waits in a subscription. Never fewer than really wait; see the driver's header.

    Attributes:
        pending: Messages stored and not yet settled.
        dead: Dead letters kept.
        oldest_seconds: Age of the oldest pending message; None where there is none or the
            broker cannot tell.
    """

    pending: int
    dead: int
    oldest_seconds: float | None


@final
@dataclass(frozen=True, slots=True)
class TopicStat:
    """What a topic holds: how many messages were ever stored, and each subscription."""

    stored: int
    subscriptions: Mapping[str, SubscriptionStat]


@final
@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was given up, and why. ``died_at_us``: microseconds, UTC."""

    message: Message
    reason: str
    attempts: int
    died_at_us: int


class TopicDriver(Protocol):
    """The sending side of a topic."""

    @property
    def capabilities(self) -> Capabilities:
        """What this broker can do as it was opened."""
        ...

    @property
    def capacity(self) -> int | None:
        """How many messages may wait; None where nothing bounds them."""
        ...

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome]:
        """Store messages in their order; STORED or FULL for each, in that order.

        STORED means that the message has reached what ``survives`` says.
        """
        ...

    async def stat(self) -> TopicStat | None:
        """Return what the topic holds; None where the broker cannot tell."""
        ...

    async def dead_letters(self, subscription: str, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters of a subscription, oldest first."""
        ...

    async def close(self) -> None:
        """Release everything. Called once."""
        ...


class SubscriptionDriver(Protocol):
    """One consumer of a named subscription."""

    @property
    def capabilities(self) -> Capabilities:
        """What this broker can do as it was opened."""
        ...

    async def receive_batch(self, limit: int, *, wait: float) -> list[RawDelivery]:
        """Take up to ``limit`` messages, oldest first.

        Returns at once with what is there; waits up to ``wait`` seconds for the first
        one. May be cancelled at any point without losing a message.
        """
        ...

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle hand-overs; SETTLED or LEASE_LOST for each, in that order."""
        ...

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters, oldest first."""
        ...

    async def stat(self) -> SubscriptionStat | None:
        """Return what waits; None where the broker cannot tell."""
        ...

    async def close(self) -> None:
        """Give back what is held and release everything. Called once."""
        ...
