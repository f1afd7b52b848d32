"""The bound on what waits, where the broker has none."""

from molva._base.clock import SYSTEM_CLOCK, ManualClock
from molva.messaging import Topic, open_topic
from molva.ratings.admission import Admission


class Backlog:
    def __init__(self, pending: int | None) -> None:
        self.pending = pending
        self.looks = 0

    async def look(self) -> int | None:
        self.looks += 1
        return self.pending


async def test_it_is_full_while_as_many_wait_as_may() -> None:
    clock, backlog = ManualClock(), Backlog(9)
    admission = Admission(10, lambda: None, backlog.look, clock)

    async with admission.watching():
        found = []
        for pending in (9, 10, 11, 9):
            backlog.pending = pending
            await clock.pass_time(1.0)
            found.append(admission.is_full)

    assert found == [False, True, True, False]


async def test_a_broker_that_cannot_tell_changes_nothing() -> None:
    clock, backlog = ManualClock(), Backlog(10)
    admission = Admission(10, lambda: None, backlog.look, clock)

    async with admission.watching():
        await clock.pass_time(1.0)
        backlog.pending = None
        await clock.pass_time(5.0)

        assert admission.is_full


async def test_nobody_looks_where_the_broker_bounds_what_waits() -> None:
    backlog = Backlog(10)
    async with await open_topic("memory://bounded?topic=t&capacity=5") as topic:
        admission = Admission(10, lambda: topic, backlog.look, SYSTEM_CLOCK)
        async with admission.watching():
            pass

        assert admission.capacity is None
    assert backlog.looks == 0


async def test_somebody_looks_where_it_does_not() -> None:
    backlog = Backlog(10)
    async with await open_topic("memory://unbounded?topic=t") as topic:
        admission = Admission(10, lambda: topic, backlog.look, SYSTEM_CLOCK)

        assert admission.capacity == 10


async def test_a_broker_that_is_reached_late_is_asked_whether_it_bounds_what_waits() -> None:
    clock, backlog = ManualClock(), Backlog(15)
    reached: list[Topic] = []
    async with await open_topic("memory://late?topic=t&capacity=20") as topic:
        admission = Admission(10, lambda: reached[0] if reached else None, backlog.look, clock)
        async with admission.watching():
            await clock.pass_time(2.0)
            assert (admission.is_full, admission.capacity) == (True, 10)
            reached.append(topic)
            await clock.pass_time(2.0)

            assert (admission.is_full, admission.capacity) == (False, None)
