"""What a driver implements: a small protocol under the portable classes.

A driver moves bytes. It never retries, never batches by itself, and returns a result for
each item of a batch; where the whole call failed it lets the exception through. All that
brokers have in common (validation, batching, retries, leases, expiry, closing, telemetry)
is done once, above it. What they do not have in common is a field of ``Capabilities``.

A driver is a module with ``open_topic``, ``open_subscription`` and ``open_queue``, each
``async (url: BrokerURL, *, clock: Clock)``, and beside each kind what it can do at best
(``TOPIC_CAPABILITIES``, ``QUEUE_CAPABILITIES``) and which options it reads
(``TOPIC_OPTIONS``, ``QUEUE_OPTIONS``). A broker that has only one kind leaves the names of
the other one out.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, NamedTuple, Protocol, final, overload, runtime_checkable

from molva._base.clock import Clock
from molva.messaging.errors import MessagingError
from molva.messaging.message import Message

__all__ = [
    "ALL_FEATURES",
    "AcksMany",
    "Action",
    "Capabilities",
    "Clock",
    "ConsumerDriver",
    "DeadLetter",
    "DearCalls",
    "FirstDeliveries",
    "HasDearCalls",
    "Outcome",
    "Peeked",
    "QueueDriver",
    "QueueStat",
    "RawDelivery",
    "Settlement",
    "SubscriptionDriver",
    "SubscriptionStat",
    "TellsRoom",
    "Token",
    "TopicDriver",
    "TopicStat",
]

# Names one hand-over of one message, with an epoch in it, so that a late settlement never
# reaches what somebody else now holds. Only the driver that made it looks inside.
Token = tuple[object, ...] | str


@final
class Outcome(Enum):
    """What became of one item of a batch."""

    STORED = "stored"
    FULL = "full"
    DROPPED = "dropped"
    SETTLED = "settled"
    EXTENDED = "extended"
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
    """One hand-over of one message.

    ``attempt`` counts from 1. ``stored_at_us``: when the broker stored it, microseconds,
    UTC.
    """

    message: Message
    attempt: int
    token: Token
    stored_at_us: int


@final
class FirstDeliveries(Sequence[RawDelivery]):
    """First hand-overs of many messages, column by column: the attempt of each is 1.

    What a driver returns that has messages by the thousand: a ``RawDelivery`` is made of one
    only where somebody looks at it.

    Args:
        messages: The messages.
        tokens: What names each hand-over.
        stored_at_us: When the broker stored each: microseconds, UTC.
    """

    __slots__ = ("messages", "stored_at_us", "tokens")

    def __init__(
        self, messages: Sequence[Message], tokens: Sequence[Token], stored_at_us: Sequence[int]
    ) -> None:
        self.messages: Final = messages
        self.tokens: Final = tokens
        self.stored_at_us: Final = stored_at_us

    def __len__(self) -> int:
        return len(self.messages)

    @overload
    def __getitem__(self, place: int) -> RawDelivery: ...

    @overload
    def __getitem__(self, place: slice) -> "FirstDeliveries": ...

    def __getitem__(self, place: int | slice) -> "RawDelivery | FirstDeliveries":
        messages, tokens, stored = self.messages, self.tokens, self.stored_at_us
        if isinstance(place, slice):
            return FirstDeliveries(messages[place], tokens[place], stored[place])
        return RawDelivery(messages[place], 1, tokens[place], stored[place])


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


# Every name that ``require`` understands, and what it asks for.
ALL_FEATURES: Final[Mapping[str, str]] = {
    "at-least-once": "a message is handed over until it is settled",
    "at-most-once": "a message is handed over once, or never (``delivery=at-most-once``)",
    "per-key": "order per key, across all consumers",
    "in-process": "order per key, among the consumers of one process",
    "capacity": "a bound on what waits, perhaps not to the message",
    "exact-capacity": "a bound on what waits, to the message",
    "kill": "stored messages outlive the death of any process",
    "power": "stored messages outlive a power cut",
    "node": "stored messages outlive the loss of a machine",
    "shared": "other processes reach what this one stores",
    "leases": "each message is held for a time of its own, which can be extended",
    "lanes": "a consumer owns parts of the keys for as long as it lives",
    "by-message": "each message is settled by itself, and nothing else comes again",
    "in-place": "a message that comes again stays before what was sent after it",
    "exact-attempts": "failed attempts are counted across the death of a consumer",
    "earliest": "a new subscription can begin with what is stored (``start=earliest``)",
    "latest": "a new subscription can begin with what comes next (``start=latest``)",
    "deletes": "what everybody has settled is deleted",
    "delay": "a message can be sent to come later",
    "fifo": "oldest first",
    "lifo": "newest first",
    "priority": "highest priority first, then oldest",
    "random": "any order, each as likely",
    "aggregated": "several messages taken as one",
    "reject": "what does not fit is refused",
    "wait": "what does not fit waits",
    "drop-newest": "what does not fit is dropped, and counted",
    "drop-oldest": "what waited longest makes room, and is counted",
    "stat": "it is told how much waits, never too little",
    "exact-stat": "it is told how much waits, to the message",
    "peek": "what waits can be looked at without being taken",
    "purge": "what waits can be removed at once",
    "replay": "dead letters can be sent back",
}

# The features that are a field of the same name.
_YES_OR_NO: Final = ("delay", "deletes", "peek", "purge", "replay", "shared")


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
        holding: How a consumer holds what was handed over to it. ``lease``: each message
            for a time of its own, which can be extended and can run out. ``connection``:
            each message until it is settled or the connection ends. ``lane``: it owns
            parts of the keys for as long as it lives, and acknowledgements advance a
            watermark, so that after a kill the tail behind it comes again too.
        disciplines: In which orders messages can be taken. ``aggregated`` is made of
            ``fifo`` above every driver.
        overflows: What can become of a message that does not fit. ``wait`` and
            ``drop-newest`` are made of ``reject`` above every driver.
        delay: Whether a message can be sent to come later. (A nacked one always can.)
        attempts: Whether failed attempts are counted across the death of a consumer, or
            only as long as one holds the message.
        keeps_place: Whether a message that comes again stays before what was sent after
            it; where not, it may come behind.
        starts: Where a new subscription can begin, out of ``earliest`` and ``latest``.
        deletes: Whether what everybody has settled is deleted; where not, time decides.
        stat: How sharply it is told what waits. ``approximate`` is never too little.
        peek: Whether what waits can be looked at without being taken.
        purge: Whether what waits can be removed at once.
        replay: Whether dead letters can be sent back.
    """

    delivery: Literal["at-least-once", "at-most-once"]
    ordering: Literal["none", "in-process", "per-key"]
    capacity: Literal["exact", "approximate", "none"]
    survives: frozenset[str]
    max_body_bytes: int
    shared: bool = True
    holding: Literal["lease", "connection", "lane"] = "lane"
    disciplines: frozenset[str] = frozenset({"fifo"})
    overflows: frozenset[str] = frozenset({"reject"})
    delay: bool = False
    attempts: Literal["exact", "approximate"] = "approximate"
    keeps_place: bool = True
    starts: frozenset[str] = frozenset({"earliest", "latest"})
    deletes: bool = True
    stat: Literal["exact", "approximate", "none"] = "exact"
    peek: bool = True
    purge: bool = True
    replay: bool = True

    @property
    def features(self) -> frozenset[str]:
        """What ``require`` may ask for and gets here: names of ``ALL_FEATURES``."""
        # Acknowledging before handing over makes at-most-once of anything.
        found = {"at-most-once", self.delivery} | self.survives | self.disciplines
        if self.ordering != "none":
            found |= {"in-process", self.ordering}
        if self.capacity != "none":
            found |= {"capacity", "wait", "drop-newest"} | self.overflows
        if self.capacity == "exact":
            found.add("exact-capacity")
        if self.holding == "lease":
            found.add("leases")
        found.add("lanes" if self.holding == "lane" else "by-message")
        if self.keeps_place:
            found.add("in-place")
        if self.attempts == "exact":
            found.add("exact-attempts")
        found |= self.starts
        if self.stat != "none":
            found.add("stat")
        if self.stat == "exact":
            found.add("exact-stat")
        found |= {name for name in _YES_OR_NO if getattr(self, name)}
        if "fifo" in self.disciplines:
            found.add("aggregated")
        return frozenset(found)


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
class QueueStat:
    """What a queue holds.

    Attributes:
        pending: Messages stored and not yet settled: ``ready``, ``held`` and ``delayed``.
        ready: Those that a consumer would get now.
        held: Those that a consumer holds under a lease.
        delayed: Those that come later: sent so, or nacked with a delay.
        dead: Dead letters kept.
        dropped: Messages that ``overflow=drop-oldest`` ever dropped.
        oldest_seconds: Age of the oldest pending message; None where there is none or the
            broker cannot tell.
    """

    pending: int
    ready: int
    held: int
    delayed: int
    dead: int
    dropped: int
    oldest_seconds: float | None


@final
@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was given up, and why.

    Attributes:
        message: The message.
        reason: Why it was given up.
        attempts: Hand-overs that it had.
        died_at_us: When it was given up: microseconds, UTC.
        origin: Where it waited: ``queue mails``, ``topic ratings, subscription process``.
        stored_at_us: When it was stored: microseconds, UTC.
    """

    message: Message
    reason: str
    attempts: int
    died_at_us: int
    origin: str
    stored_at_us: int


@final
@dataclass(frozen=True, slots=True)
class Peeked:
    """A waiting message that was looked at without being taken.

    Attributes:
        message: The message.
        state: ``ready``, ``held`` by a consumer, or ``delayed``.
        attempts: Hand-overs so far, as far as the broker knows.
        stored_at_us: When it was stored: microseconds, UTC.
    """

    message: Message
    state: Literal["ready", "held", "delayed"]
    attempts: int
    stored_at_us: int


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

    async def send_batch(self, messages: Sequence[Message]) -> "Sequence[Outcome | MessagingError]":
        """Store messages in their order; STORED, FULL or its error for each, in that order.

        STORED means that the message has reached what ``survives`` says. What is FULL
        stands behind what is STORED: room is given to the first.
        """
        ...

    async def stat(self) -> TopicStat | None:
        """Return what the topic holds; None where the broker cannot tell."""
        ...

    async def dead_letters(self, subscription: str, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters of a subscription, oldest first."""
        ...

    async def remove_subscription(self, subscription: str) -> bool:
        """Remove a subscription, what waits in it and its dead letters.

        Returns False where there is none. Raises InUseError where somebody consumes it.
        """
        ...

    async def close(self) -> None:
        """Release everything. Called once."""
        ...


@runtime_checkable
class TellsRoom(Protocol):
    """What a sender's driver may have besides: it tells when what is full has room again.

    Where a driver cannot tell, a sender that waits for room looks now and then.
    """

    async def wait_for_room(self, *, wait: float) -> bool:
        """Return True as soon as a message may fit, or False after ``wait`` seconds.

        May be cancelled at any point.
        """
        ...


class DearCalls(NamedTuple):
    """What makes it worth waiting for more before a call is made.

    ``fewest``: messages of a call from which on it is. ``seconds``: for how long at most;
    what a call costs beside what is in it.
    """

    fewest: int
    seconds: float


@runtime_checkable
class HasDearCalls(Protocol):
    """What a sender's driver may have besides: it says that its calls are dear."""

    @property
    def dear_calls(self) -> DearCalls | None:
        """Return from when on waiting pays, as the place was found; None where it does not."""
        ...


class ConsumerDriver(Protocol):
    """One consumer: of a named subscription, or of a queue."""

    @property
    def capabilities(self) -> Capabilities:
        """What this broker can do as it was opened."""
        ...

    @property
    def lease(self) -> float | None:
        """Seconds that a message is held without being extended; None where for ever."""
        ...

    async def receive_batch(self, limit: int, *, wait: float) -> Sequence[RawDelivery]:
        """Take up to ``limit`` messages, in the order of the discipline: a list, or columns.

        Returns at once with what is there; waits up to ``wait`` seconds for the first
        one. May be cancelled at any point without losing a message.
        """
        ...

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle hand-overs; SETTLED or LEASE_LOST for each, in that order."""
        ...

    async def extend_batch(self, tokens: Sequence[Token], seconds: float) -> list[Outcome]:
        """Hold for ``seconds`` from now; EXTENDED or LEASE_LOST for each, in that order.

        Where lanes are owned there is nothing to extend: it tells what is still held.
        """
        ...

    async def flush(self) -> None:
        """Return when all that was settled outlives what the messages outlive."""
        ...

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters, oldest first."""
        ...

    async def replay(self, ids: Collection[bytes] | None, limit: int) -> int:
        """Send up to ``limit`` dead letters back, oldest first; return how many.

        ``ids``: only these messages; None: any. Each waits again as a message that was
        never tried, for this subscription or queue only, and is no dead letter any more:
        at every moment it is one or the other.
        """
        ...

    async def purge(self, *, dead: bool) -> int:
        """Remove all that waits, or all dead letters; return how many.

        Raises InUseError where other consumers hold what waits, and that cannot be undone.
        """
        ...

    async def peek(self, limit: int) -> list[Peeked]:
        """Return up to ``limit`` waiting messages without taking them, next first."""
        ...

    async def close(self) -> None:
        """Give back what is held and release everything. Called once."""
        ...


@runtime_checkable
class AcksMany(Protocol):
    """What a consumer's driver may have besides: it settles a whole batch as done at once.

    Where a driver has it not, ``settle_batch`` is told of each.
    """

    async def ack_batch(self, tokens: Sequence[Token]) -> Sequence[int]:
        """Settle hand-overs as done; return the places of those that are lost, ascending.

        Does what ``settle_batch`` does with an ACK of each.
        """
        ...


class SubscriptionDriver(ConsumerDriver, Protocol):
    """One consumer of a named subscription."""

    async def stat(self) -> SubscriptionStat | None:
        """Return what waits; None where the broker cannot tell."""
        ...


class QueueDriver(ConsumerDriver, Protocol):
    """Both ends of a queue: each message goes to one consumer, under a lease."""

    @property
    def capacity(self) -> int | None:
        """How many messages may wait; None where nothing bounds them."""
        ...

    async def send_batch(self, messages: Sequence[Message]) -> "Sequence[Outcome | MessagingError]":
        """Store messages in their order; see ``TopicDriver.send_batch``.

        With ``overflow=drop-oldest`` nothing is FULL: what waited longest, and is held by
        nobody, makes room.
        """
        ...

    async def stat(self) -> QueueStat | None:
        """Return what waits; None where the broker cannot tell."""
        ...
