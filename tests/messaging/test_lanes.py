"""The lane reader against a model: nothing lost, nothing settled twice, order kept."""

import string
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from molva.messaging._lanes import LaneReader, LaneToken, Watermark, lane_of
from molva.messaging.driver import Outcome

_LANES = 3


class LaneReaderMachine(RuleBasedStateMachine):
    """One consumer over a log, its disk, and what a model says it may do."""

    @initialize(max_open=st.integers(1, 6))
    def begin(self, max_open: int) -> None:
        self.max_open = max_open
        self.reader = LaneReader(max_open=max_open)
        self.log: list[int] = []  # the lane of each offset, from 1
        self.disk = {lane: Watermark(lane, 0, 0) for lane in range(_LANES)}
        self.now = 0.0
        self.handed: dict[int, LaneToken] = {}  # offset to what we hold of it
        self.nacked: dict[int, tuple[float, int]] = {}  # offset to (due, attempt)
        self.settled: set[int] = set()  # since the lane was owned, or written
        self.stale: list[LaneToken] = []

    def _own(self, lane: int) -> None:
        self.reader.own(self.disk[lane])

    def _lose(self, lane: int) -> None:
        """Forget what the memory of a lane held; only what was written is known now."""
        for offset in [o for o in self.handed if self.log[o - 1] == lane]:
            self.stale.append(self.handed.pop(offset))
        for offset in [o for o in self.nacked if self.log[o - 1] == lane]:
            del self.nacked[offset]
        self.settled -= {
            o for o in self.settled if self.log[o - 1] == lane and o > self.disk[lane].offset
        }

    def _write(self) -> None:
        marks = self.reader.unwritten()
        for mark in marks:
            self.disk[mark.lane] = mark
        self.reader.written(marks)
        assert self.reader.unwritten() == []

    @rule(lanes=st.lists(st.integers(0, _LANES - 1), min_size=1, max_size=8))
    def store(self, lanes: list[int]) -> None:
        self.log += lanes

    @rule(lane=st.integers(0, _LANES - 1))
    def own(self, lane: int) -> None:
        if lane not in self.reader.lanes:
            self._own(lane)

    @rule(limit=st.integers(1, 6))
    def read(self, limit: int) -> None:
        limit = min(limit, self.reader.room)
        while limit > 0 and (scan := self.reader.next_scan()) is not None:
            upto = len(self.log) if scan.upto is None else scan.upto
            rows = [
                (offset, self.log[offset - 1])
                for offset in range(scan.after + 1, upto + 1)
                if scan.lanes >> self.log[offset - 1] & 1
            ][:limit]
            end = rows[-1][0] if len(rows) == limit else upto
            for token in self.reader.deliver(scan, rows, end):
                self._handed(token, attempt=1)
                assert token.turn == 1
            limit -= len(rows)
            if scan.upto is None or end < scan.upto:
                break

    @rule(limit=st.integers(1, 6))
    def come_again(self, limit: int) -> None:
        could = self._could_come_again()
        tokens = self.reader.due(self.now, limit)

        assert len(tokens) == min(limit, max(0, self.max_open - len(self.handed)), len(could))
        for token in tokens:
            _, attempt = self.nacked.pop(token.offset)
            self._handed(token, attempt=attempt)

    def _could_come_again(self) -> list[int]:
        """Return what is due and stands behind nothing of its lane that is not."""
        return [
            offset
            for offset, (due, _) in self.nacked.items()
            if due <= self.now
            and self.log[offset - 1] not in self.leaving
            and all(
                self.nacked[other][0] <= self.now
                for other in self.nacked
                if other < offset and self.log[other - 1] == self.log[offset - 1]
            )
        ]

    @property
    def leaving(self) -> set[int]:
        return {n for n, lane in self.reader._lanes.items() if lane.leaving}

    def _handed(self, token: LaneToken, *, attempt: int) -> None:
        lane, offset = token.lane, token.offset
        assert self.log[offset - 1] == lane
        assert offset not in self.handed, "handed over twice"
        assert offset not in self.settled, "was settled"
        assert offset > self.disk[lane].offset, "was settled, written"
        assert token.attempt == attempt
        ahead = [o for o in self.nacked if self.log[o - 1] == lane]
        assert all(o > offset for o in ahead), "overtook one that is to come again"
        assert lane not in self.leaving
        self.handed[offset] = token

    @precondition(lambda self: self.handed)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.handed)))
        token = self.handed.pop(offset)
        assert self.reader.holds(token)
        assert self.reader.settle(token) is Outcome.SETTLED
        self.stale.append(token)
        self.settled.add(offset)
        moved = self.reader.advance()
        assert moved == bool(self.reader.unwritten())

    @precondition(lambda self: self.handed)
    @rule(data=st.data(), delay=st.sampled_from([0.0, 1.0, 5.0]), counts=st.booleans())
    def give_back(self, data: st.DataObject, delay: float, counts: bool) -> None:
        offset = data.draw(st.sampled_from(sorted(self.handed)))
        token = self.handed.pop(offset)
        attempt, due = token.attempt + counts, self.now + delay
        assert self.reader.give_back(token, due=due, attempt=attempt) is Outcome.SETTLED
        self.stale.append(token)
        self.nacked[offset] = (due, attempt)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def settle_late(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(self.stale))
        before = self.reader.open
        assert not self.reader.holds(token)
        assert self.reader.settle(token) is Outcome.LEASE_LOST
        assert self.reader.give_back(token, due=0.0, attempt=1) is Outcome.LEASE_LOST
        assert self.reader.open == before

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def write(self) -> None:
        self.reader.advance()
        self._write()

    @rule(lane=st.integers(0, _LANES - 1), stay=st.booleans())
    def leave(self, lane: int, stay: bool) -> None:
        if lane in self.reader.lanes:
            (self.reader.stay if stay else self.reader.leave)(lane)

    @rule()
    def hand_on_what_was_left(self) -> None:
        for lane in self.reader.left():
            assert not [o for o in self.handed if self.log[o - 1] == lane]
            self.reader.advance()
            self._write()
            self.reader.disown(lane)
            self._lose(lane)

    @rule()
    def crash(self) -> None:
        owned = self.reader.lanes
        for lane in owned:
            self.reader.disown(lane)
            self._lose(lane)
        for lane in owned:
            self._own(lane)

    @invariant()
    def no_watermark_passes_what_is_not_settled(self) -> None:
        if not hasattr(self, "reader"):
            return
        for mark in [*self.disk.values(), *self.reader.unwritten()]:
            mine = [o for o in range(1, mark.offset + 1) if self.log[o - 1] == mark.lane]
            assert mark.settled == len(mine)
            assert not set(mine) & (self.handed.keys() | self.nacked.keys())
            assert set(mine) <= self.settled

    @invariant()
    def what_is_open_is_counted(self) -> None:
        if hasattr(self, "reader"):
            assert self.reader.open == len(self.handed)
            assert self.reader.room == max(0, self.max_open - len(self.handed))

    @invariant()
    def the_next_due_time_is_one_at_which_something_comes(self) -> None:
        if not hasattr(self, "reader"):
            return
        due = self.reader.next_due()
        if due is not None:
            assert self.reader.room
            assert bool(self._could_come_again()) == (due <= self.now)

    def teardown(self) -> None:
        """Whatever happened, a consumer that goes on settles everything, in order."""
        if not hasattr(self, "reader"):
            return
        for lane in range(_LANES):
            self.own(lane)
            self.reader.stay(lane)
        for _ in range(3 * len(self.log) + 3):
            self.now += 10.0
            for offset in sorted(self.handed):
                assert self.reader.settle(self.handed.pop(offset)) is Outcome.SETTLED
                self.settled.add(offset)
            self.write()
            self.come_again(self.max_open)
            self.read(self.max_open)
        assert self.settled == set(range(1, len(self.log) + 1))
        assert sum(mark.settled for mark in self.disk.values()) == len(self.log)


TestLaneReader = LaneReaderMachine.TestCase
TestLaneReader.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_acks_out_of_order_wait_for_the_one_in_front() -> None:
    reader = LaneReader(max_open=10)
    reader.own(Watermark(0, 0, 0))
    scan = reader.next_scan()
    assert scan is not None
    first, second, third = reader.deliver(scan, [(1, 0), (2, 0), (3, 0)], 3)

    reader.settle(third)
    reader.settle(second)
    moved_early = reader.advance()
    reader.settle(first)
    moved = reader.advance()

    assert (moved_early, moved) == (False, True)
    assert reader.unwritten() == [Watermark(0, 3, 3)]


def test_a_lane_without_messages_follows_the_others() -> None:
    reader = LaneReader(max_open=10)
    reader.own(Watermark(0, 0, 0))
    reader.own(Watermark(1, 0, 0))
    scan = reader.next_scan()
    assert scan is not None
    [token] = reader.deliver(scan, [(1, 0)], 5)

    assert reader.unwritten() == [Watermark(1, 5, 0)]
    reader.settle(token)
    reader.advance()
    assert reader.unwritten() == [Watermark(0, 5, 1), Watermark(1, 5, 0)]


@given(st.text(string.printable), st.binary(min_size=16, max_size=16), st.integers(1, 62))
def test_a_lane_is_the_keys_alone(key: str, message_id: bytes, lanes: int) -> None:
    assert lane_of(key, message_id, lanes) == lane_of(key, bytes(16), lanes)
    assert 0 <= lane_of(None, message_id, lanes) < lanes


def test_a_lane_never_changes_between_versions() -> None:
    # Consumers and senders of different versions share files: these are for ever.
    assert [lane_of(key, b"", 16) for key in ("", "a", "λ", "42")] == [0, 3, 11, 8]
    assert lane_of(None, bytes(range(16)), 16) == crc32(bytes(range(16))) % 16


@pytest.mark.parametrize("lanes", [2, 16, 62])
def test_keys_spread_over_all_lanes(lanes: int) -> None:
    counts = [0] * lanes
    for number in range(200 * lanes):
        counts[lane_of(str(number), b"", lanes)] += 1

    assert min(counts) > 100
    assert max(counts) < 400
