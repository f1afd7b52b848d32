"""A broker that does everything a broker may do, when the seed says so.

It is the server: one journal of all that was ever done, and the state that the journal gives.
Its clients are in ``drivers``; between them and it lies a network. By the seed

    a request    is late, refused, or lost and never executed;
    an answer    is late, or lost after all was done: the client is told of an error;
    a settlement is confirmed and forgotten;
    a message    is stored twice;
    the broker   restarts and forgets who its consumers are, or loses its power.

A power cut leaves a prefix of the journal: all that was synced, and perhaps some more. A broker
that is power-safe syncs before it confirms what it stored; one that is not syncs every now and
then, and says so: what it loses then, it has not promised.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, final

from molva.messaging import BrokenBrokerError, Message, UnavailableError
from molva.messaging._lanes import lane_of
from molva.messaging.driver import DeadLetter
from tests.faults.simulation.loop import Process, SimulatedLoop
from tests.faults.simulation.plan import BrokerPlan

__all__ = ["Broker", "Mark", "Row"]

T = TypeVar("T")

# Virtual seconds after which a client gives up waiting for an answer.
_PATIENCE: Final = 1.0
# Virtual seconds between two syncs of a broker that is not power-safe.
_SYNC_INTERVAL: Final = 0.7


@final
@dataclass(slots=True)
class Row:
    """A message in the log or in the queue.

    Attributes:
        due: When it can be taken: None at once. While it is held, when its lease runs out.
        turn, attempt: Hand-overs, and those that count.
        gone: Whether it was settled for good; only a queue's rows go one by one.
    """

    offset: int
    lane: int
    message: Message
    stored_at_us: int
    due: float | None = None
    held: bool = False
    turn: int = 0
    attempt: int = 0
    gone: bool = False


@final
@dataclass(slots=True)
class Mark:
    """The watermark of a lane, as the broker keeps it."""

    offset: int = 0
    settled: int = 0
    deaths: int = 0


@final
class _State:
    """What a journal gives. Each method is one kind of line in it."""

    def __init__(self, lanes: int) -> None:
        self.rows: list[Row] = []  # offset n stands at n - 1
        self.marks = [Mark() for _ in range(lanes)]
        self.dead: dict[tuple[int, bytes], DeadLetter] = {}

    def store(self, message: Message, at_us: int) -> None:
        offset = len(self.rows) + 1
        lane = lane_of(message.key, message.id, len(self.marks))
        self.rows.append(Row(offset, lane, message, at_us))

    def mark(self, lane: int, offset: int, settled: int) -> None:
        mark = self.marks[lane]
        if offset > mark.offset:
            if settled != mark.settled:
                mark.deaths = 0
            mark.offset, mark.settled = offset, settled

    def deaths(self, lane: int, deaths: int) -> None:
        self.marks[lane].deaths = deaths

    def bury(self, offset: int, letter: DeadLetter) -> None:
        # A crash may bring one here twice. An offset alone may name another message by now.
        self.dead.setdefault((offset, letter.message.id), letter)

    def take(self, offset: int, due: float) -> None:
        row = self.rows[offset - 1]
        row.held, row.due = True, due
        row.turn += 1
        row.attempt += 1

    def extend(self, offset: int, due: float) -> None:
        self.rows[offset - 1].due = due

    def give(self, offset: int, due: float, attempt: int) -> None:
        row = self.rows[offset - 1]
        row.held, row.due, row.attempt = False, due, attempt

    def remove(self, offset: int) -> None:
        self.rows[offset - 1].gone = True

    def again(self) -> None:
        """Deliver everything once more: all watermarks back, all settled rows back."""
        self.marks = [Mark() for _ in self.marks]
        for row in self.rows:
            if (row.offset, row.message.id) not in self.dead:
                row.gone = row.held = False
                row.due = None


@final
@dataclass(slots=True)
class Session:
    """A consumer, as the broker knows it. ``lanes``: which it owns, under which generation."""

    process: Process
    wake: Callable[[], None]
    seen: float
    lanes: dict[int, int] = field(default_factory=dict)


@final
class Broker:
    """The server.

    Attributes:
        down: Whether it cannot be reached at all.
        rough: Whether it does everything that it may do; else it is merely late.
        incarnation: How often it lost its power or its memory of its consumers.
    """

    def __init__(self, loop: SimulatedLoop, plan: BrokerPlan, trace: Callable[..., None]) -> None:
        self.loop: Final = loop
        self.plan: Final = plan
        self._trace = trace
        self._process: Final = Process("broker")
        self._journal: list[tuple[str, tuple[Any, ...]]] = []
        self._synced = 0
        self.state = _State(plan.lanes)
        self.incarnation = 1
        self.down = False
        self.rough = True
        self.ended = False
        self.sessions: dict[int, Session] = {}
        self._generation = 0
        # Ids of which every stored copy was lost in a power cut that it need not survive.
        self.unpromised: set[bytes] = set()
        # What it did, for the verdict on whether a run proved anything.
        self.counts: dict[str, int] = {}
        self._handed: set[int] = set()
        if not plan.power_safe:
            self._process.context.run(loop.call_later, _SYNC_INTERVAL, self._sync_now_and_then)

    # What the state is ------------------------------------------------------------------

    def do(self, kind: str, *arguments: Any) -> None:
        """Write a line of the journal."""
        self._journal.append((kind, arguments))
        getattr(self.state, kind)(*arguments)

    def sync(self) -> None:
        """Make all that was done outlive a power cut."""
        self._synced = len(self._journal)

    def handed_over(self, row: Row) -> None:
        """Note that a message is on its way to a consumer."""
        if row.offset in self._handed:
            self.count("redelivered")
        self._handed.add(row.offset)

    def count(self, what: str) -> None:
        """Note that something happened."""
        self.counts[what] = self.counts.get(what, 0) + 1

    @property
    def pending(self) -> int:
        """How many messages are not settled."""
        if self.plan.holding == "lease":
            return sum(not row.gone for row in self.state.rows)
        marks = self.state.marks
        return sum(row.offset > marks[row.lane].offset for row in self.state.rows)

    def chance(self, probability: float) -> bool:
        """Decide, while it is rough."""
        return self.rough and self.loop.chance.random() < probability

    def latency(self) -> float:
        """Return how long something takes: mostly little, now and then long."""
        chance = self.loop.chance.random
        return self.plan.latency * (chance() if chance() < 0.9 or not self.rough else 40 * chance())

    def soon(self, what: Callable[[], None]) -> None:
        """Do something in about the time in which a call is sent and answered."""
        seconds = 3 * self.plan.latency * self.loop.chance.random()
        self._process.context.run(self.loop.call_later, seconds, what)

    def wake(self) -> None:
        """Tell every consumer that there may be something."""
        for session in self.sessions.values():
            self._process.context.run(self.loop.call_later, self.latency(), session.wake)

    # What happens to it -----------------------------------------------------------------

    def restart(self, seconds: float, *, power: bool) -> None:
        """Go down for a while; come back without one's consumers, or without power's worth."""
        self._trace("broker", "loses its power" if power else "restarts", seconds)
        self.down = True
        self.incarnation += 1
        self.sessions.clear()
        if power:
            self.count("power")
            self._lose_power()
        self._process.context.run(self.loop.call_later, seconds, self._come_back)

    def _lose_power(self) -> None:
        kept = self.loop.chance.randint(self._synced, len(self._journal))
        lost = self._journal[kept:]
        self._journal = self._journal[:kept]
        self.state = _State(self.plan.lanes)
        for kind, arguments in self._journal:
            getattr(self.state, kind)(*arguments)
        self._synced = kept
        # Leases do not outlive it: they were of a clock that stood still.
        if not self.plan.power_safe:
            self.unpromised |= {arguments[0].id for kind, arguments in lost if kind == "store"}
        self._trace("broker", "has lost", len(lost))

    def _come_back(self) -> None:
        self.down = False
        self._trace("broker", "is back")

    def _sync_now_and_then(self) -> None:
        if not self.down:
            self.sync()
        self.loop.call_later(_SYNC_INTERVAL, self._sync_now_and_then)

    # What is asked of it ----------------------------------------------------------------

    async def ask(
        self,
        what: str,
        work: Callable[[], T],
        *,
        forgettable: T | None = None,
        stores: bool = False,
    ) -> T:
        """Have something done; raise where no answer comes, whether it was done or not.

        Args:
            what: What is asked, for the trace.
            work: Does it, at the server.
            forgettable: The answer, where it may be confirmed without being done.
            stores: Whether it is confirmed only when it is synced, and may be done twice.
        """
        loop = self.loop
        if self.ended:
            raise BrokenBrokerError("the run is over")
        reply: asyncio.Future[T] = loop.create_future()
        incarnation = self.incarnation

        def fail(after: float, error: Exception) -> None:
            self._process.context.run(loop.call_later, after, _raise, reply, error)

        def answer(result: T) -> None:
            if self.incarnation != incarnation or self.chance(self.plan.reply_lost):
                self.count("answers lost")
                self._trace("broker", "no answer to", what)
                fail(_PATIENCE, UnavailableError("no answer"))
                return
            self._process.context.run(loop.call_later, self.latency(), _resolve, reply, result)

        def arrive() -> None:
            if self.down or self.chance(self.plan.refused):
                self._trace("broker", "refuses", what)
                fail(self.latency(), UnavailableError("connection refused"))
                return
            if self.incarnation != incarnation or self.chance(self.plan.request_lost):
                self._trace("broker", "never gets", what)
                fail(_PATIENCE, UnavailableError("no answer"))
                return
            if forgettable is not None and self.chance(self.plan.forgets):
                self.count("forgotten")
                self._trace("broker", "forgets", what)
                answer(forgettable)
                return
            self._trace("broker", "does", what)
            result = work()
            if stores and self.chance(self.plan.stores_twice):
                self.count("stored twice")
                work()
            if not stores or not self.plan.power_safe:
                answer(result)
                return

            def synced() -> None:
                if self.incarnation == incarnation:
                    self.sync()
                answer(result)

            self._process.context.run(loop.call_later, self.latency(), synced)

        self._process.context.run(loop.call_later, self.latency(), arrive)
        return await reply

    # Who owns which lanes ---------------------------------------------------------------

    def meet(self, member: int, process: Process, wake: Callable[[], None]) -> None:
        """Know a consumer from now on, or still."""
        session = self.sessions.get(member)
        if session is None:
            self.sessions[member] = session = Session(process, wake, self.loop.now)
            self.wake()
        session.seen = self.loop.now
        for number, other in list(self.sessions.items()):
            # A lock is free the moment its process dies; a session, when it was not heard of.
            if self.plan.locks:
                gone = not other.process.alive
            else:
                gone = self.loop.now - other.seen > self.plan.session
            if gone:
                self._trace("broker", "gives up consumer", number)
                self.leave(number)

    def leave(self, member: int) -> None:
        """Forget a consumer, and what it owns."""
        if self.sessions.pop(member, None) is not None:
            self.wake()

    def share(self, member: int) -> dict[int, tuple[int, int, int, int]]:
        """Return the lanes that a consumer owns: generation, offset, settled, deaths."""
        session = self.sessions[member]
        members = sorted(self.sessions)
        rank = members.index(member)
        owned = {lane for other in self.sessions.values() for lane in other.lanes}
        for lane in range(self.plan.lanes):
            if lane % len(members) == rank and lane not in owned:
                self._generation += 1
                session.lanes[lane] = self._generation
        found = {}
        for lane, generation in session.lanes.items():
            mark = self.state.marks[lane]
            found[lane] = (generation, mark.offset, mark.settled, mark.deaths)
        return found

    def meant(self, member: int) -> set[int]:
        """Return the lanes that a consumer should own, once others let go of them."""
        members = sorted(self.sessions)
        if member not in members:
            return set()
        rank = members.index(member)
        return {lane for lane in range(self.plan.lanes) if lane % len(members) == rank}

    def owns(self, member: int, lane: int, generation: int) -> bool:
        """Whether a lane is still a consumer's: what fences those that come late."""
        session = self.sessions.get(member)
        return session is not None and session.lanes.get(lane) == generation

    def rows_between(self, after: int, upto: int, lanes: int, limit: int) -> Sequence[Row]:
        """Return rows of a log, ascending."""
        found = []
        for row in self.state.rows[after:upto]:
            if lanes >> row.lane & 1:
                found.append(row)
                if len(found) == limit:
                    break
        return found


def _resolve(reply: "asyncio.Future[T]", result: T) -> None:
    if not reply.done():
        reply.set_result(result)


def _raise(reply: "asyncio.Future[Any]", error: Exception) -> None:
    if not reply.done():
        reply.set_exception(error)
