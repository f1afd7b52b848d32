"""The lane reader against a model: nothing lost, nothing settled twice, order kept."""

import string
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock
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

from molva.messaging import _lanes
from molva.messaging._lanes import LaneReader, LaneToken, Scan, Watermark, lane_of
from molva.messaging.driver import Outcome

_LANES = 3
# Messages, so few that a lane is often trusted again.
_CAREFUL = 5
_GROUP = 2


class LaneReaderMachine(RuleBasedStateMachine):
    """One consumer over a log, its disk, and what a model says it may do."""

    @initialize(
        max_open=st.integers(1, 6),
        deaths=st.lists(st.integers(0, 4), min_size=_LANES, max_size=_LANES),
    )
    def begin(self, max_open: int, deaths: list[int]) -> None:
        self.patch = mock.patch.multiple(_lanes, CAREFUL_MESSAGES=_CAREFUL, GROUP_MESSAGES=_GROUP)
        self.patch.start()
        self.max_open = max_open
        self.reader = LaneReader(max_open=max_open)
        self.log: list[int] = []  # the lane of each offset, from 1
        self.disk = {lane: Watermark(lane, 0, 0) for lane in range(_LANES)}
        self.deaths = dict(enumerate(deaths))  # on disk
        self.counted: set[int] = set()  # lanes whose deaths this ownership has raised
        self.careful: dict[int, int] = {}  # lane to messages that are still to settle
        self.alone: set[int] = set()  # of them, those whose messages come alone
        self.unwritten: set[int] = set()  # careful lanes that settled since they were written
        self.now = 0.0
        self.handed: dict[int, LaneToken] = {}  # offset to what we hold of it
        self.nacked: dict[int, tuple[float, int]] = {}  # offset to (due, attempt)
        self.settled: set[int] = set()  # since the lane was owned, or written
        self.stale: list[LaneToken] = []

    def _own(self, lane: int) -> None:
        self.reader.own(self.disk[lane], deaths=self.deaths[lane])
        if self.deaths[lane] >= 3:
            self.careful[lane] = _GROUP
            self.alone.add(lane)
        elif self.deaths[lane] == 2:
            self.careful[lane] = _CAREFUL

    def _lose(self, lane: int) -> None:
        """Forget what the memory of a lane held; only what was written is known now."""
        self.counted.discard(lane)
        self._trust(lane)
        for offset in [o for o in self.handed if self.log[o - 1] == lane]:
            self.stale.append(self.handed.pop(offset))
        for offset in [o for o in self.nacked if self.log[o - 1] == lane]:
            del self.nacked[offset]
        self.settled -= {
            o for o in self.settled if self.log[o - 1] == lane and o > self.disk[lane].offset
        }

    def _trust(self, lane: int) -> None:
        self.careful.pop(lane, None)
        self.alone.discard(lane)
        self.unwritten.discard(lane)

    def _write(self, *, begin: Iterable[int] = (), let_go: Iterable[int] = ()) -> None:
        """Write as a driver does: watermarks, then what is let go of, then what begins."""
        marks, survived = self.reader.unwritten(), self.reader.survived(let_go)
        begun = {lane: self.reader.next_deaths(lane) for lane in begin}
        for mark in marks:
            if mark.settled != self.disk[mark.lane].settled:
                self.deaths[mark.lane] = 0
            self.disk[mark.lane] = mark
        for lane in survived:
            assert lane in self.counted
            self.deaths[lane] = 0
        for lane, deaths in begun.items():
            least = 3 if lane in self.alone else 2 if lane in self.careful else 0
            assert deaths == max(self.deaths[lane], least) + 1
            self.deaths[lane] = deaths
            self.counted.add(lane)
        self.reader.written(marks)
        self.reader.counted(begin)
        self.unwritten.clear()
        assert self.reader.unwritten() == []
        assert not self.reader.must_write

    @rule(lanes=st.lists(st.integers(0, _LANES - 1), min_size=1, max_size=8))
    def store(self, lanes: list[int]) -> None:
        self.log += lanes

    @rule(lane=st.integers(0, _LANES - 1))
    def own(self, lane: int) -> None:
        if lane not in self.reader.lanes:
            self._own(lane)

    @rule(limit=st.integers(1, 6))
    def read(self, limit: int) -> None:
        for next_scan, most in self.reader.ways:
            self._read_on(next_scan, min(limit, self.reader.room, most))

    def _read_on(self, next_scan: Callable[[], Scan | None], limit: int) -> None:
        while limit > 0 and (scan := next_scan()) is not None:
            upto = len(self.log) if scan.upto is None else scan.upto
            rows = [
                (offset, self.log[offset - 1])
                for offset in range(scan.after + 1, upto + 1)
                if scan.lanes >> self.log[offset - 1] & 1
            ][:limit]
            end = rows[-1][0] if len(rows) == limit else upto
            if uncounted := self.reader.uncounted(lane for _, lane in rows):
                self._write(begin=uncounted)
                continue
            for lane in {lane for _, lane in rows} & self.careful.keys():
                assert self._rests(lane), "before the last group was settled and written"
            for token in self.reader.deliver(scan, rows, end):
                alone = token.lane in self.alone
                self._handed(token, attempt=self.deaths[token.lane] - 2 if alone else 1)
                assert token.turn == 1
                assert token.lane in self.counted
            limit -= len(rows)
            if scan.upto is None or end < scan.upto:
                break

    @rule(limit=st.integers(1, 6))
    def come_again(self, limit: int) -> None:
        could = self._could_come_again()
        tokens = self.reader.due(self.now, limit)

        alone = [o for o in could if self.log[o - 1] in self.alone]
        most = len(could) - len(alone) + min(1, len(alone))
        assert len(tokens) == min(limit, max(0, self.max_open - len(self.handed)), most)
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
            and (self.log[offset - 1] not in self.alone or self._may_be_alone())
            and all(
                self.nacked[other][0] <= self.now
                for other in self.nacked
                if other < offset and self.log[other - 1] == self.log[offset - 1]
            )
        ]

    def _may_be_alone(self) -> bool:
        return all(self._rests(lane) for lane in self.alone)

    def _rests(self, lane: int) -> bool:
        return lane not in self.unwritten and not self._of(lane, self.handed)

    def _of(self, lane: int, offsets: Iterable[int]) -> list[int]:
        return [offset for offset in offsets if self.log[offset - 1] == lane]

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
        if lane in self.alone:
            assert self._may_be_alone(), "two at once, or one before the last was written"
        if lane in self.careful:
            assert len(self._of(lane, self.handed)) < _GROUP
        self.handed[offset] = token

    @precondition(lambda self: self.handed)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.handed)))
        token = self.handed.pop(offset)
        assert self.reader.holds(token)
        assert self.reader.settle(token) is Outcome.SETTLED
        self.stale.append(token)
        self._settled(offset)
        moved = self.reader.advance()
        assert moved == bool(self.reader.unwritten())

    def _settled(self, offset: int) -> None:
        self.settled.add(offset)
        lane = self.log[offset - 1]
        if lane in self.careful:
            self.careful[lane] -= 1
            self.unwritten.add(lane)
            if not self._under_way(lane):
                self.counted.discard(lane)
                if self.careful[lane] <= 0:
                    self._trust(lane)
                    self.counted.add(lane)
        assert self.reader.must_write == any(not self._under_way(n) for n in self.unwritten)

    def _under_way(self, lane: int) -> bool:
        """Return whether anything of a lane is handed over, or is to come again."""
        return bool(self._of(lane, self.handed) or self._of(lane, self.nacked))

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
            counted = lane in self.counted
            self._write(let_go=[lane])
            assert not (counted and self.deaths[lane]), "it was let go of, nobody died"
            self.reader.disown(lane)
            self._lose(lane)

    @rule(others=st.lists(st.integers(0, _LANES - 1), max_size=6))
    def crash(self, others: list[int]) -> None:
        """Die, as others do that had a lane before it comes back."""
        owned = self.reader.lanes
        for lane in owned:
            self.reader.disown(lane)
            self._lose(lane)
        for lane in others:
            self.deaths[lane] += 1
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
        try:
            self._settle_everything()
        finally:
            self.patch.stop()

    def _settle_everything(self) -> None:
        for lane in range(_LANES):
            self.own(lane)
            self.reader.stay(lane)
        for _ in range(3 * len(self.log) + 3):
            self.now += 10.0
            for offset in sorted(self.handed):
                assert self.reader.settle(self.handed.pop(offset)) is Outcome.SETTLED
                self._settled(offset)
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


def test_a_lane_that_is_a_log_of_its_own_is_handed_over_and_settled_by_the_batch() -> None:
    reader = LaneReader(max_open=10)
    reader.own(Watermark(0, 4, 0))
    reader.own(Watermark(1, -1, 0))
    tokens = reader.deliver_of(0, [5, 6, 8])
    others = reader.deliver_of(1, [0])
    stale = LaneToken(0, 99, 5, 1, 1)

    lost = reader.settle_many([tokens[0], tokens[2], tokens[2], stale])
    moved = reader.advance()

    assert lost == [2, 3]
    assert moved
    assert reader.open == 2
    assert reader.unwritten() == [Watermark(0, 5, 1)]  # 6 is open, and 8 behind it
    reader.settle_many([tokens[1], *others])
    assert reader.advance()
    assert reader.unwritten() == [Watermark(0, 8, 3), Watermark(1, 0, 1)]


def test_a_batch_with_one_that_is_held_anew_settles_all_others() -> None:
    reader = LaneReader(max_open=10)
    reader.own(Watermark(0, -1, 0))
    reader.own(Watermark(1, -1, 0))
    first = reader.deliver_of(0, [0, 1, 2], "abc")
    other = reader.deliver_of(1, [0], "d")
    reader.give_back(LaneToken(*first[1][:5]), due=0.0, attempt=1)
    [again] = reader.due(now=1.0, limit=5)

    lost = reader.settle_many([first[0], other[0], first[1], first[2]])

    assert [token[5] for token in first] == ["a", "b", "c"]
    assert lost == [2]
    assert reader.open == 1
    assert reader.settle_many([again]) == []
    assert reader.open == 0


def test_what_is_settled_makes_room_before_anybody_writes_it_down() -> None:
    reader = LaneReader(max_open=4)
    reader.own(Watermark(0, -1, 0))
    tokens = reader.deliver_of(0, [0, 1, 2, 3])
    before = reader.allowed(0)

    reader.settle_many(tokens)

    assert (before, reader.allowed(0)) == (0, 4)


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


class _Disk:
    """A log, its disk, and consumers of it that one message kills."""

    def __init__(self, log: list[int], poison: int, *, max_attempts: int = 5) -> None:
        self.log, self.poison, self.max_attempts = log, poison, max_attempts
        lanes = set(log)
        self.marks = {lane: Watermark(lane, 0, 0) for lane in lanes}
        self.deaths = dict.fromkeys(lanes, 0)
        self.attempts: dict[int, list[int]] = {}  # of each offset that was looked at
        self.dead: list[int] = []

    def consume(self, *, batch: int, dies_at_once: bool = False) -> bool:
        """Go on until the log is settled (True) or the process dies (False)."""
        reader = LaneReader(max_open=10_000)
        for mark in self.marks.values():
            reader.own(mark, deaths=self.deaths[mark.lane])
        while True:
            if reader.must_write:
                self._write(reader)
            tokens = []
            for next_scan, most in reader.ways:
                tokens += self._read(reader, next_scan, min(most, batch))
            if dies_at_once:
                return False
            if not tokens and not reader.must_write:
                self._write(reader)
                return True
            for token in tokens:
                self.attempts.setdefault(token.offset, []).append(token.attempt)
                if token.attempt > self.max_attempts:
                    self.dead.append(token.offset)
                elif token.offset == self.poison:
                    return False
            for token in tokens:
                reader.settle(token)
            reader.advance()

    def _read(
        self, reader: LaneReader, next_scan: Callable[[], Scan | None], limit: int
    ) -> list[LaneToken]:
        while (scan := next_scan()) is not None:
            upto = len(self.log) if scan.upto is None else scan.upto
            rows = [
                (offset, self.log[offset - 1])
                for offset in range(scan.after + 1, upto + 1)
                if scan.lanes >> self.log[offset - 1] & 1
            ][:limit]
            uncounted = reader.uncounted(lane for _, lane in rows)
            if uncounted:
                self._write(reader, begin=uncounted)
            tokens = reader.deliver(scan, rows, rows[-1][0] if len(rows) == limit else upto)
            if tokens or scan.upto is None:
                return tokens
        return []

    def _write(self, reader: LaneReader, begin: Iterable[int] = ()) -> None:
        marks = reader.unwritten()
        begun = {lane: reader.next_deaths(lane) for lane in begin}
        for mark in marks:
            if mark.settled != self.marks[mark.lane].settled:
                self.deaths[mark.lane] = 0
            self.marks[mark.lane] = mark
        self.deaths |= begun
        reader.written(marks)
        reader.counted(begin)


@pytest.mark.parametrize("batch", [1, 10, 100])
@pytest.mark.parametrize("poison", [1, 2, 37, 60])
def test_a_message_that_kills_each_consumer_is_the_only_one_given_up(
    batch: int, poison: int
) -> None:
    disk = _Disk([n * 7 % 4 for n in range(60)], poison)

    consumers = 1
    while not disk.consume(batch=batch):
        consumers += 1
        assert consumers < 40

    assert disk.dead == [poison]
    assert sum(mark.settled for mark in disk.marks.values()) == 60
    # One that was alone in its lane while the poison killed in another is suspected for a while.
    assert all(max(tries) <= 3 for offset, tries in disk.attempts.items() if offset != poison)
    # Alone it is looked at as often as it may be.
    assert disk.attempts[poison][-5:] == [2, 3, 4, 5, 6]


def test_a_consumer_that_dies_with_nothing_handed_over_is_no_death() -> None:
    disk = _Disk([], poison=0)
    disk.marks, disk.deaths = {0: Watermark(0, 0, 0)}, {0: 0}
    for _ in range(20):
        disk.consume(batch=10, dies_at_once=True)
    disk.log.append(0)

    assert disk.consume(batch=10)

    assert disk.attempts == {1: [1]}


@pytest.mark.parametrize(
    ("deaths", "group", "careful"),
    [
        (2, _lanes.GROUP_MESSAGES, _lanes.CAREFUL_MESSAGES),
        (3, 1, _lanes.GROUP_MESSAGES),
        (5, 1, _lanes.GROUP_MESSAGES),
    ],
)
def test_a_lane_is_trusted_again_when_what_may_have_killed_is_behind_it(
    deaths: int, group: int, careful: int
) -> None:
    disk = _Disk([0] * (_lanes.CAREFUL_MESSAGES + 200), poison=0)
    reader = LaneReader(max_open=1_000)
    reader.own(disk.marks[0], deaths=deaths)
    settled = 0
    while settled < careful:
        disk._write(reader)
        tokens = [t for scan, most in reader.ways for t in disk._read(reader, scan, most)]
        assert len(tokens) == group
        reader.settle_many(tokens)
        reader.advance()
        settled += group

    assert len(disk._read(reader, reader.next_scan, 100)) == 100


def test_two_consumers_that_died_cost_some_dozens_of_writes() -> None:
    disk = _Disk([0] * 1_000, poison=1_000)
    for _ in range(2):
        assert not disk.consume(batch=1_000)
    disk.poison = 0

    writes = 0
    write = disk._write

    def count(*arguments: Any, **named: Any) -> None:
        nonlocal writes
        writes += 1
        write(*arguments, **named)

    with mock.patch.object(disk, "_write", count):
        assert disk.consume(batch=1_000)

    assert writes < 3 * 1_000 / _lanes.GROUP_MESSAGES


def test_of_what_comes_alone_one_message_comes_again_at_a_time() -> None:
    disk = _Disk([0, 1], poison=0)
    reader = LaneReader(max_open=100)
    for lane in (0, 1):
        reader.own(Watermark(lane, 0, 0), deaths=3)
    for _ in range(2):
        [token] = disk._read(reader, reader.next_alone_scan, 1)
        reader.give_back(token, due=0.0, attempt=token.attempt + 1)

    [first] = reader.due(0.0, 10)
    assert reader.due(0.0, 10) == []
    assert reader.next_due() is None
    reader.settle(first)
    reader.advance()
    assert reader.due(0.0, 10) == [], "the first is not written down"
    disk._write(reader)
    [second] = reader.due(0.0, 10)

    assert [(t.lane, t.attempt) for t in (first, second)] == [(0, 3), (1, 3)]


def test_a_careful_lane_holds_up_no_other() -> None:
    disk = _Disk([0, 1, 0, 1, 0, 1], poison=0)
    reader = LaneReader(max_open=100)
    reader.own(Watermark(0, 0, 0), deaths=3)
    reader.own(Watermark(1, 0, 0))

    careful = disk._read(reader, reader.next_alone_scan, 1)
    others = disk._read(reader, reader.next_scan, 100)

    assert [(t.offset, t.attempt) for t in careful] == [(1, 2)]
    assert [(t.offset, t.attempt) for t in others] == [(2, 1), (4, 1), (6, 1)]


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


# Lanes that are logs of their own -----------------------------------------------------------


def _deliver(reader: LaneReader, lane: int, *offsets: int) -> list[LaneToken]:
    """Hand over messages of one lane, as a driver does whose lanes are read one by one."""
    scan = Scan(offsets[0] - 1, None, 1 << lane)
    return reader.deliver(scan, [(offset, lane) for offset in offsets], offsets[-1])


def test_offsets_of_one_lane_say_nothing_of_another() -> None:
    reader = LaneReader(max_open=10)
    for lane, offset in ((0, -1), (70, 99)):
        reader.own(Watermark(lane, offset, 0))
    low, high = _deliver(reader, 0, 0, 1), _deliver(reader, 70, 100, 105)

    for token in (low[0], *high):
        reader.settle(token)
    reader.advance()

    marks = {mark.watermark.lane: mark.watermark.offset for mark in reader.marks()}
    assert marks == {0: 0, 70: 105}


def test_so_much_of_a_lane_may_be_handed_over_as_there_is_room() -> None:
    reader = LaneReader(max_open=5)
    reader.own(Watermark(0, 0, 0))
    reader.own(Watermark(1, 0, 0))

    tokens = _deliver(reader, 0, 1, 2, 3)
    assert (reader.allowed(0), reader.allowed(1), reader.allowed(2)) == (2, 2, 0)

    # Behind a message that is not settled a lane goes on for so long only.
    for token in tokens[1:]:
        reader.settle(token)
    reader.advance()
    assert (reader.allowed(0), reader.allowed(1)) == (2, 4)

    reader.give_back(tokens[0], due=9.0, attempt=2)
    assert (reader.allowed(0), reader.allowed(1)) == (0, 5)

    reader.leave(1)
    assert reader.allowed(1) == 0


def test_of_all_that_comes_alone_one_message_is_allowed() -> None:
    reader = LaneReader(max_open=5)
    reader.own(Watermark(0, 0, 0), deaths=3)
    reader.own(Watermark(1, 0, 0), deaths=4)
    assert (reader.allowed(0), reader.allowed(1)) == (1, 1)

    _deliver(reader, 0, 1)

    assert (reader.allowed(0), reader.allowed(1)) == (0, 0)


def test_a_mark_carries_the_deaths_that_stand_beside_it() -> None:
    reader = LaneReader(max_open=5)
    reader.own(Watermark(0, 0, 0), deaths=1)

    [begun] = reader.marks(begin=[0])
    assert (begun.watermark.offset, begun.deaths) == (0, 2)
    reader.wrote([begun], begin=[0])
    assert not reader.uncounted([0])
    assert reader.marks() == []

    [token] = _deliver(reader, 0, 1)
    [let_go] = reader.marks(let_go=[0])
    reader.settle(token)
    reader.advance()
    [settled] = reader.marks()
    assert (let_go.deaths, settled.deaths, settled.watermark.offset) == (0, 0, 1)


def test_a_mark_that_was_written_for_a_lane_of_before_notes_nothing() -> None:
    reader = LaneReader(max_open=5)
    reader.own(Watermark(0, 0, 0))
    [begun] = reader.marks(begin=[0])
    reader.disown(0)
    reader.own(Watermark(0, 0, 0))

    reader.wrote([begun], begin=[0])

    assert reader.uncounted([0])


def test_every_lane_has_a_mark_where_all_are_asked_for() -> None:
    reader = LaneReader(max_open=5)
    reader.own(Watermark(0, 3, 0), deaths=1)

    [mark] = reader.marks(every=True)

    assert (mark.watermark.offset, mark.deaths) == (3, 1)
