"""Random operations on the real thing, beside a plain model that says what must come of them.

Hypothesis chooses the operations, and when an answer differs from the model's it finds the
shortest way there. What runs is the product's own: queues and topics of the drivers that are
embedded, over their public API, and the ledger. Time is a clock that stands still until a rule
moves it.
"""

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, final

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from molva._base.clock import ManualClock
from molva.messaging import (
    Action,
    Delivery,
    LeaseLostError,
    Message,
    Queue,
    Subscription,
    Topic,
    open_queue,
    open_subscription,
    open_topic,
)
from molva.ratings.ledger import Ledger, Outcome, open_ledger
from molva.ratings.rating import Rating, Submission, decode_entry, encode_entry
from tests.faults.live.ledgers.sqlite import read_file

__all__ = ["LeaseMachine", "PathMachine", "check"]

T = TypeVar("T")

_names: Final = itertools.count()

_SHM: Final = "/dev/shm" if Path("/dev/shm").is_dir() else None

# Seconds. No sum of the times that pass equals one of these: what happens at the very moment
# in which a lease ends is left open.
_LEASE: Final = 10.25
_LONGER: Final = 30.25
_DELAY: Final = 3.5
_MAX_ATTEMPTS: Final = 3
# How often what was never settled comes beyond these, alone.
_ALONE: Final = 2

# Operations in one example.
_STEPS: Final = 40


def check(
    machine: "type[_Machine]", scheme: str, *, seed: int, examples: int, shrink: bool = True
) -> None:
    """Run a machine on the queues and topics of a scheme: for a seed always the same operations.

    Raises:
        AssertionError: The model disagrees; what it took is shown, as short as it gets.
    """
    chosen = type(f"{scheme.title()}{machine.__name__}", (machine,), {"scheme": scheme})
    run_state_machine_as_test(
        seeded(seed)(chosen),
        settings=settings(
            max_examples=examples,
            stateful_step_count=_STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        ),
    )


class _Machine(RuleBasedStateMachine):
    """What both have: a loop, a clock, a folder."""

    scheme = "memory"

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        self.clock = ManualClock()
        self.folder = Path(tempfile.mkdtemp(dir=_SHM))
        self._number = next(_names)
        self._opened: list[Any] = []

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(coroutine)

    def open(self, coroutine: Coroutine[Any, Any, T]) -> T:
        opened = self.do(coroutine)
        self._opened.append(opened)
        return opened

    @property
    def base(self) -> str:
        if self.scheme == "memory":
            return f"memory://machine-{self._number}?"
        return f"sqlite://{self.folder}/queue.db?commit=loop&"

    def end(self) -> None:
        """Check what must hold at the end."""

    def teardown(self) -> None:
        try:
            self.end()
        finally:
            for opened in self._opened:
                self.do(opened.close())
            self._loop.close()
            shutil.rmtree(self.folder)


# Leases -----------------------------------------------------------------------------------


@final
@dataclass(slots=True)
class _Waiting:
    """What the model knows of a message.

    Attributes:
        ready_at: When it can be taken; while it is held, when its lease runs out.
        holder: The hand-over that holds it.
    """

    number: int
    ready_at: float = 0.0
    attempt: int = 0
    holder: Delivery | None = None


class LeaseMachine(_Machine):
    """A queue, two consumers, and every way to settle too early, too late, or twice."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[bytes, _Waiting] = {}
        self.dead: set[bytes] = set()
        self.done: set[bytes] = set()
        self.deliveries: list[Delivery] = []
        self._count = itertools.count(1)

    @initialize()
    def begin(self) -> None:
        """Begin with two consumers, and something to do."""
        self.consumers = [self._open(), self._open()]
        # Whether the last that a consumer got may have killed others: then it takes one.
        self.careful = [False, False]
        for _ in range(4):
            self.publish(0.0)
        self.deliver(0, 3)

    def _open(self) -> Queue:
        url = f"{self.base}queue=mails&lease={_LEASE}&max_attempts={_MAX_ATTEMPTS}"
        return self.open(open_queue(url, clock=self.clock))

    @property
    def now(self) -> float:
        return self.clock.monotonic()

    def _held(self, waiting: _Waiting) -> bool:
        return waiting.holder is not None and waiting.ready_at > self.now

    @rule(delay=st.sampled_from((0.0, 0.0, _DELAY)))
    def publish(self, delay: float) -> None:
        """Send a message, to come at once or later."""
        number = next(self._count)
        message = Message(b"%d" % number, number.to_bytes(16, "big"), delay=delay)
        self.do(self.consumers[0].send(message))
        self.waiting[message.id] = _Waiting(number, self.now + delay)

    @rule(consumer=st.integers(0, 1), limit=st.integers(1, 3))
    def deliver(self, consumer: int, limit: int) -> None:
        """Receive: what is ready, oldest first; what was tried too often comes alone, then dies."""
        found = self.do(self.consumers[consumer].receive(limit, wait=0.0))
        if self.careful[consumer]:
            limit_now, self.careful[consumer] = 1, False
        else:
            limit_now = limit
        ready = sorted((w.number, id_) for id_, w in self.waiting.items() if w.ready_at <= self.now)
        expected: list[bytes] = []
        # A batch of which every message was tried too often is buried, and the next one read.
        while ready and not expected:
            batch, ready = ready[:limit_now], ready[limit_now:]
            limit_now = limit
            suspects = [
                id_ for _, id_ in batch if 0 <= self.waiting[id_].attempt - _MAX_ATTEMPTS < _ALONE
            ]
            if suspects:
                expected = suspects[:1]
                self.careful[consumer] = True
                for _, id_ in batch:
                    # Taken, and given back: whoever held it has lost it.
                    self.waiting[id_].holder = None
                continue
            for _, id_ in batch:
                if self.waiting[id_].attempt >= _MAX_ATTEMPTS:
                    del self.waiting[id_]
                    self.dead.add(id_)
                else:
                    expected.append(id_)
        assert [delivery.message.id for delivery in found] == expected
        for delivery in found:
            waiting = self.waiting[delivery.message.id]
            waiting.attempt += 1
            assert delivery.attempt == waiting.attempt
            waiting.holder, waiting.ready_at = delivery, self.now + _LEASE
            self.deliveries.append(delivery)

    def _settle(self, delivery: Delivery, settling: Coroutine[Any, Any, object]) -> bool:
        """Settle, and compare with the model; return whether it took effect."""
        waiting = self.waiting.get(delivery.message.id)
        ours = waiting is not None and waiting.holder is delivery and not delivery.settled
        already = delivery.settled
        try:
            self.do(settling)
        except LeaseLostError:
            # Run out and not yet taken by another, it may be either way.
            assert not ours or (waiting is not None and not self._held(waiting))
            return False
        assert ours or already, "a late settlement took effect"
        return not already

    @precondition(lambda self: self.deliveries)
    @rule(data=st.data(), how=st.sampled_from(("ack", "nack", "nack later", "reject", "extend")))
    def settle(self, data: st.DataObject, how: str) -> None:
        """Settle a hand-over: in time, late, or (what stays in the list) a second time."""
        delivery = data.draw(st.sampled_from(self.deliveries))
        if how == "extend" and delivery.settled:
            return
        delay = _DELAY if how == "nack later" else 0.0
        settling: Coroutine[Any, Any, object]
        if how == "ack":
            settling = delivery.ack()
        elif how == "reject":
            settling = delivery.reject("why not")
        elif how == "extend":
            settling = delivery.extend(_LONGER)
        else:
            settling = delivery.nack(delay=delay)
        if not self._settle(delivery, settling):
            if delivery.settled:
                self.deliveries.remove(delivery)
            return
        id_ = delivery.message.id
        waiting = self.waiting[id_]
        if how == "extend":
            waiting.ready_at = self.now + _LONGER
        elif how == "ack":
            del self.waiting[id_]
            self.done.add(id_)
        elif how == "reject" or delivery.attempt >= _MAX_ATTEMPTS:
            del self.waiting[id_]
            self.dead.add(id_)
        else:
            waiting.holder, waiting.ready_at = None, self.now + delay

    @rule(seconds=st.sampled_from((1.0, 4.0, 11.0, 11.0)))
    def pass_time(self, seconds: float) -> None:
        self.do(self.clock.pass_time(seconds))

    @rule(consumer=st.integers(0, 1), orderly=st.booleans())
    def leave(self, consumer: int, orderly: bool) -> None:
        """Crash, and leave everything as it is; or close: what is held is another's at once."""
        closed = self.consumers[consumer]
        if orderly:
            self.do(closed.close())
        self.consumers[consumer] = self._open()
        self.careful[consumer] = False
        if not orderly:
            return
        for waiting in self.waiting.values():
            if waiting.holder is not None and waiting.holder._source is closed:
                if self._held(waiting):
                    waiting.attempt -= 1
                    waiting.ready_at = self.now
                elif waiting.ready_at <= self.now:
                    self._after_late_close(waiting)
                waiting.holder = None
        self.deliveries = [d for d in self.deliveries if d._source is not closed]

    def _after_late_close(self, waiting: _Waiting) -> None:
        """Learn whether a lease that had run out was given back, or was lost already."""
        for each in self.do(self.consumers[0].peek(1_000)):
            if int(each.message.body) == waiting.number:
                assert each.attempts in (waiting.attempt, waiting.attempt - 1)
                waiting.attempt = each.attempts

    @precondition(lambda self: self.dead)
    @rule()
    def replay(self) -> None:
        """Send all dead letters back: as messages that were never tried, behind all others."""
        assert self.do(self.consumers[0].replay()) == len(self.dead)
        letters = [id_ for id_ in self.dead_in_order if id_ in self.dead]
        self.dead.clear()
        for id_ in letters:
            self.waiting[id_] = _Waiting(next(self._count), self.now)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "consumers"):
            return
        stat = self.do(self.consumers[0].stat())
        assert stat is not None
        held = sum(self._held(waiting) for waiting in self.waiting.values())
        ready = sum(waiting.ready_at <= self.now for waiting in self.waiting.values())
        assert (stat.pending, stat.ready, stat.held, stat.dead) == (
            len(self.waiting), ready, held, len(self.dead),
        )  # fmt: skip
        letters = self.do(self.consumers[0].dead_letters(1_000))
        self.dead_in_order = [letter.message.id for letter in letters]
        assert set(self.dead_in_order) == self.dead

    def end(self) -> None:
        """Work off everything: each message is done or dead, once."""
        if not hasattr(self, "consumers"):
            return
        self.do(self.clock.pass_time(_LONGER + 1))
        while found := self.do(self.consumers[1].receive(10, wait=0.0)):
            for delivery in found:
                self.do(delivery.ack())
                assert delivery.message.id not in self.done
                self.done.add(delivery.message.id)
        stat = self.do(self.consumers[1].stat())
        assert stat is not None
        assert stat.pending == 0
        letters = {letter.message.id for letter in self.do(self.consumers[1].dead_letters(1_000))}
        assert not letters & self.done
        assert len(letters | self.done) == len(self.waiting.keys() | self.dead | self.done)


# The whole path ---------------------------------------------------------------------------


class PathMachine(_Machine):
    """A topic, the consumers of two subscriptions, and a ledger; any of them may stop anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[bytes, Rating] = {}
        self.rejected: set[bytes] = set()
        self.audited: set[bytes] = set()
        self.taken: list[Delivery] = []
        self.applied: list[Delivery] = []
        self.paused: list[Delivery] = []
        # Whether the ledger may have moved since it was looked at.
        self.moved = False

    @initialize()
    def begin(self) -> None:
        self.topic: Topic = self.open(open_topic(self._url(), clock=self.clock))
        self.process = self._consume("process")
        self.audit = self._consume("audit")
        self._open_ledger()

    def _url(self) -> str:
        return f"{self.base}topic=ratings&lanes=2"

    def _consume(self, name: str) -> Subscription:
        url = f"{self._url()}&subscription={name}&max_attempts=1000"
        return self.open(open_subscription(url, clock=self.clock))

    def _open_ledger(self) -> None:
        self.ledger: Ledger = self.open(
            open_ledger(f"sqlite://{self.folder}/ledger.db?commit=loop")
        )

    @rule(rate=st.integers(0, 10), item=st.sampled_from("ab"))
    def publish(self, rate: int, item: str) -> None:
        id_ = (len(self.sent) + 1).to_bytes(16, "big")
        self.sent[id_] = Rating("default", 1, rate, item)
        self._send(id_)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def publish_again(self, data: st.DataObject) -> None:
        """A client that was told nothing tries again, under the same id."""
        self._send(data.draw(st.sampled_from(sorted(self.sent))))

    def _send(self, id_: bytes) -> None:
        rating = self.sent[id_]
        message = Message(encode_entry(rating), id_, f"default/{rating.item}")
        self.do(self.topic.send(message))

    @rule(limit=st.integers(1, 4))
    def deliver(self, limit: int) -> None:
        self.taken += self.do(self.process.receive(limit, wait=0.0))

    @rule()
    def apply(self) -> None:
        batch, self.taken = self.taken, []
        self._apply(batch)
        self.applied += batch

    def _apply(self, batch: list[Delivery]) -> None:
        self.moved = True
        submissions = []
        for delivery in batch:
            entry = decode_entry(delivery.message.body)
            assert entry == self.sent[delivery.message.id]
            submissions.append(Submission(delivery.message.id, entry))
        outcomes = self.do(self.ledger.apply(submissions, applied_at_us=1))
        assert set(outcomes) <= {Outcome.APPLIED, Outcome.DUPLICATE}

    @precondition(lambda self: self.applied)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        """Acknowledge some of what was applied, in any order."""
        chosen = data.draw(st.permutations(self.applied))
        chosen = chosen[: data.draw(st.integers(1, len(chosen)))]
        self.do(self.process.settle([(delivery, Action.ACK) for delivery in chosen]))
        self.applied = [delivery for delivery in self.applied if not delivery.settled]

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), delay=st.sampled_from((0.0, _DELAY)))
    def nack(self, data: st.DataObject, delay: float) -> None:
        delivery = data.draw(st.sampled_from(self.taken))
        self.do(delivery.nack(delay=delay))
        self.taken.remove(delivery)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def reject(self, data: st.DataObject) -> None:
        delivery = data.draw(st.sampled_from(self.taken))
        self.do(delivery.reject("why not"))
        self.taken.remove(delivery)
        self.rejected.add(delivery.message.id)

    @rule()
    def ack_lost(self) -> None:
        """Apply what was taken, and die before word of it is out."""
        self.apply()
        self.crash()

    @rule()
    def crash(self) -> None:
        """End a consumer with what it holds, and begin anew: all of it comes again."""
        self.do(self.process.close())
        self.taken.clear()
        self.applied.clear()
        self.process = self._consume("process")

    @rule()
    def pause(self) -> None:
        """A zombie: it holds what it has taken, while its place goes to another consumer."""
        self.paused += self.taken
        self.crash()

    @precondition(lambda self: self.paused)
    @rule()
    def resume(self) -> None:
        """The zombie goes on with what it held, and acknowledges nobody's messages."""
        batch, self.paused = self.paused, []
        self._apply(batch)

    @rule(seconds=st.sampled_from((0.3, 4.0)))
    def pass_time(self, seconds: float) -> None:
        self.do(self.clock.pass_time(seconds))

    @rule(limit=st.integers(1, 3))
    def read_the_other(self, limit: int) -> None:
        """The other subscription reads a little, far behind."""
        self._audit(limit)

    def _audit(self, limit: int) -> bool:
        found = self.do(self.audit.receive(limit, wait=0.0))
        self.audited |= {delivery.message.id for delivery in found}
        self.do(self.audit.settle([(delivery, Action.ACK) for delivery in found]))
        return bool(found)

    @rule()
    def redeliver_all(self) -> None:
        """Everything comes once more, from its beginning."""
        for id_ in list(self.sent):
            self._send(id_)

    @precondition(lambda self: self.scheme == "sqlite")
    @rule()
    def power_cut(self) -> None:
        """All stops at once; what is in the files goes on in another place."""
        left = Path(tempfile.mkdtemp(dir=_SHM))
        for path in self.folder.iterdir():
            # Nothing is under way between two rules, so that all is synced; locks and pipes
            # do not outlive the machine.
            if path.is_file() and path.name.endswith((".db", "-wal")):
                shutil.copyfile(path, left / path.name)
        for opened in self._opened:
            self.do(opened.close())
        self._opened.clear()
        shutil.rmtree(self.folder)
        self.folder = left
        self.taken.clear()
        self.applied.clear()
        self.paused.clear()
        self.moved = True
        self.begin()

    @invariant()
    def agrees(self) -> None:
        """Nothing twice, nothing from nowhere, nothing garbled; totals as the rows give."""
        if not hasattr(self, "ledger") or not self.moved:
            return
        self.moved = False
        ledger = read_file(self.folder / "ledger.db")
        rows, totals = ledger.rows, ledger.totals
        assert len({row.id for row in rows}) == len(rows)
        assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
        for row in rows:
            assert (row.item, row.rate) == (self.sent[row.id].item, self.sent[row.id].rate)
        for item in (None, "a", "b"):
            rates = [row.rate for row in rows if item in (None, row.item)]
            kept = totals.get(("default", item), (0, 0, {}))
            assert kept == (len(rates), sum(rates), {r: rates.count(r) for r in set(rates)})
            total = self.do(self.ledger.total("default", item=item, n=3))
            found = None if total is None else (total.sum, total.n)
            assert found == ((sum(rates[-3:]), len(rates[-3:])) if rates else None)

    def end(self) -> None:
        """Work off everything: each rating is counted or was rejected; both readers saw all."""
        if not hasattr(self, "ledger"):
            return
        self.crash()
        self.do(self.clock.pass_time(10.0))
        while True:
            self.deliver(10)
            if not self.taken:
                break
            self.apply()
            self.do(self.process.settle([(d, Action.ACK) for d in self.applied]))
            self.applied.clear()
        while self._audit(10):
            pass
        assert self.audited == self.sent.keys()
        rows = read_file(self.folder / "ledger.db").rows
        letters = {letter.message.id for letter in self.do(self.process.dead_letters(1_000))}
        assert letters == self.rejected
        assert {row.id for row in rows} | letters == self.sent.keys()
