"""Lanes: what a consumer of a log holds, how far it has read, what may be acknowledged.

A topic's keys are spread over a fixed number of lanes. A consumer owns some of them
exclusively. In each it delivers messages in the order of their offsets and keeps a
watermark: everything up to it is settled. Only watermarks are written down, so consuming
costs no write a message; after a crash the tail behind the last written one comes again.
Kafka works in the same way, with partitions.

``LaneReader`` is the whole of this logic and nothing else: no I/O, no clock of its own, no
locks. A driver feeds it rows and writes down what it says.

The watermark moves only over a contiguous run of settled offsets. Taking the highest
settled one instead is the classic way to lose a message: it jumps over those that are
still being worked on.

A message can kill the process that works on it, and what is only counted in memory dies
with it: the message would come for ever, and kill each time. So ``deaths`` is written down
with each watermark: consumers in a row that have handed over a message of the lane and
neither settled its first one nor let go of the lane in an orderly way. (A watermark that
moves over messages of other lanes proves nothing.) A consumer counts itself in before its
first hand-over, not when it takes the lane: one that dies without having handed over
anything (a restart loop, an idle lane) proves nothing against the message that happens to
be next.

Behind two deaths a lane is read *carefully*, and each further one narrows down what can have
been its cause. First, messages are handed over in groups: a group is counted, and what was
settled before it is written down, before it begins. Then the messages of one group are handed
over alone: of all lanes that are read so, one message is open at a time. From then on a death
names the message that caused it, and is an attempt of that one only. So what is written as
``deaths`` says how the last one died: 0 nobody did, 1 or 2 with anything, 3 with a group, 3 + k
with this message alone, for the k-th time. (One death proves little: a deployment kills, and
who comes next may want to take many messages before it settles any.)

Groups are what makes a kill without a cause cheap: a few dozen writes instead of a thousand,
and most deaths have nothing to do with any message.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Final, Literal, NamedTuple, cast, final
from zlib import crc32

from molva.messaging.driver import Outcome, Settlement, Token

__all__ = [
    "CAREFUL_MESSAGES",
    "GROUP_MESSAGES",
    "MAX_LANES",
    "LaneReader",
    "LaneToken",
    "Mark",
    "PlainToken",
    "Scan",
    "Watermark",
    "lane_of",
    "named",
]

# What is written as deaths once two died with anything, and so messages come in groups. Fewer,
# and every kill under load is followed by a slow while; more, and a poison kills more often.
_WITH_ANYTHING: Final = 2

# And once one died with a group, and so its messages come alone.
_WITH_A_GROUP: Final = _WITH_ANYTHING + 1

# Messages of a group. Fewer, and a lane is slow for longer behind a kill; more, and so it is
# behind a second one.
GROUP_MESSAGES: Final = 32

# Messages that are settled in groups before a lane is trusted again: as many as a consumer may
# have had open when it died. Fewer, and the poison may stand behind them; more, and a consumer
# that was killed by something else goes on slowly for longer.
CAREFUL_MESSAGES: Final = 1_000

# A set of lanes is one signed 64-bit integer, so that SQL can test for membership.
MAX_LANES: Final = 62


def lane_of(key: str | None, message_id: bytes, lanes: int) -> int:
    """Return the lane of a message: by its key, or by its id where there is none.

    The same on every machine and in every version: who shares a topic must agree.
    """
    return crc32(message_id if key is None else key.encode()) % lanes


class LaneToken(NamedTuple):
    """Names one hand-over. A lane that was lost and owned again has another epoch.

    ``turn`` counts every hand-over of the message, ``attempt`` leaves out those that were
    returned unlooked at.
    """

    lane: int
    epoch: int
    offset: int
    turn: int
    attempt: int


# The same without names: made by the thousand, in a fifth of the time. What a driver wants to
# find in a token again may stand behind.
PlainToken = tuple[Any, ...]


def named(token: Token) -> LaneToken:
    """Return a lane's token with names, without what stands behind it."""
    return LaneToken._make(cast(PlainToken, token)[:5])


class Watermark(NamedTuple):
    """How far a lane is settled: all up to ``offset``, ``settled`` messages so far."""

    lane: int
    offset: int
    settled: int


class Mark(NamedTuple):
    """What is to be written of a lane: its watermark, and its deaths beside it.

    ``epoch`` tells whether the lane is still the same one when the write is over.
    """

    watermark: Watermark
    deaths: int
    epoch: int


class Scan(NamedTuple):
    """What to read next: offsets in (after, upto] of these lanes; upto None is no bound."""

    after: int
    upto: int | None
    lanes: int


@dataclass(slots=True)
class _Lane:
    """One owned lane."""

    epoch: int
    read_to: int  # every message up to here was delivered, or is of another lane
    watermark: int
    settled: int
    written: int  # the watermark as it was last written down
    settled_written: int  # and how many messages it said were settled
    open: dict[int, int] = field(default_factory=dict)  # offset to turn: not yet settled
    delivered: deque[int] = field(default_factory=deque)  # above the watermark, ascending
    # (offset, due, turn, attempt) of what is to come again: a heap. By offset, because
    # what comes again comes in order too, each behind those before it.
    nacked: list[tuple[int, float, int, int]] = field(default_factory=list)
    leaving: bool = False
    deaths: int = 0  # as written down, this consumer included once it has ``counted``
    counted: bool = False  # whether a hand-over is written down as begun
    careful: int = 0  # so many messages more are handed over in groups
    group: int = 0  # careful: so many messages of it may be open; 1 is alone
    dirty: bool = False  # careful, and something was settled that is not written down

    def rests(self, *, once_written: bool = False) -> bool:
        """Whether nothing of a careful lane is open, and all that was settled is written."""
        return not self.open and (once_written or not self.dirty)

    @property
    def next_deaths(self) -> int:
        """What is to be written as its deaths before more of it is handed over."""
        proven = self.settled != self.settled_written
        least = {0: 0, 1: _WITH_A_GROUP}.get(self.group, _WITH_ANYTHING)
        return max(0 if proven else self.deaths, least) + 1

    def advance(self) -> None:
        """Move the watermark over the settled messages at its head."""
        delivered, open_ = self.delivered, self.open
        if delivered and not open_ and not self.nacked:
            # As it is after most batches: all that was handed over is settled.
            self.watermark = delivered[-1]
            self.settled += len(delivered)
            delivered.clear()
        nacked = self.nacked[0][0] if self.nacked else None
        while delivered and delivered[0] not in open_ and delivered[0] != nacked:
            self.watermark = delivered.popleft()
            self.settled += 1
        if not delivered:
            # Nothing is being worked on: what was read and was not ours is behind us too.
            self.watermark = max(self.watermark, self.read_to)


@final
class LaneReader:
    """Which lanes are owned, what to read next, what is settled.

    Args:
        max_open: The most messages handed over and not settled, over all lanes; beyond
            it nothing is read, so a slow consumer's memory is bounded.
    """

    def __init__(self, *, max_open: int) -> None:
        self._max_open = max_open
        self._lanes: dict[int, _Lane] = {}
        self._epoch = 0
        self._open = 0
        # Sets of lanes. Nearly always all are empty, and then cost nothing.
        self._uncounted = 0
        self._careful = 0
        self._alone = 0  # of the careful ones, those whose messages come alone

    @property
    def open(self) -> int:
        """How many messages are handed over and not settled."""
        return self._open

    @property
    def room(self) -> int:
        """How many more messages may be handed over now."""
        return max(0, self._max_open - self._open)

    @property
    def settled(self) -> int:
        """How many messages of the owned lanes are settled, also those behind a gap."""
        return sum(
            lane.settled + len(lane.delivered) - len(lane.open) - len(lane.nacked)
            for lane in self._lanes.values()
        )

    @property
    def lanes(self) -> frozenset[int]:
        """The lanes that are owned."""
        return frozenset(self._lanes)

    def own(self, watermark: Watermark, *, deaths: int = 0) -> None:
        """Begin with a lane at what was written down of it."""
        self._epoch += 1
        offset = watermark.offset
        alone = deaths >= _WITH_A_GROUP
        lane = self._lanes[watermark.lane] = _Lane(
            self._epoch,
            offset,
            offset,
            watermark.settled,
            written=offset,
            settled_written=watermark.settled,
            deaths=deaths,
        )
        bit = 1 << watermark.lane
        self._uncounted |= bit
        if deaths >= _WITH_ANYTHING:
            lane.careful = GROUP_MESSAGES if alone else CAREFUL_MESSAGES
            lane.group = 1 if alone else GROUP_MESSAGES
            self._careful |= bit
        if alone:
            self._alone |= bit

    def leave(self, lane: int) -> None:
        """Hand over nothing more of a lane, so that it can soon be disowned."""
        self._lanes[lane].leaving = True

    def stay(self, lane: int) -> None:
        """Take a ``leave`` back."""
        self._lanes[lane].leaving = False

    def left(self) -> list[int]:
        """Return the lanes that can be disowned: leaving, with nothing being worked on."""
        return [number for number, lane in self._lanes.items() if lane.leaving and not lane.open]

    def disown(self, lane: int) -> None:
        """Forget a lane. Tokens of it are stale from now on."""
        self._open -= len(self._lanes.pop(lane).open)
        self._uncounted &= ~(1 << lane)
        self._careful &= ~(1 << lane)
        self._alone &= ~(1 << lane)

    # Deaths -----------------------------------------------------------------------------

    def uncounted(self, lanes: Iterable[int]) -> frozenset[int]:
        """Return those of the lanes that must be counted before anything is handed over.

        Write down ``next_deaths`` of each, together with what is unwritten; then call
        ``counted``.
        """
        uncounted = self._uncounted
        if not uncounted:
            return frozenset()
        return frozenset(lane for lane in set(lanes) if uncounted >> lane & 1)

    def next_deaths(self, lane: int) -> int:
        """Return what to write as the deaths of an uncounted lane, before ``written``."""
        return self._lanes[lane].next_deaths

    def counted(self, lanes: Iterable[int]) -> None:
        """Take note that the next deaths of each of these lanes were written down."""
        for number in lanes:
            lane = self._lanes.get(number)
            if lane is not None:
                lane.deaths = lane.next_deaths
                lane.counted = True
                self._uncounted &= ~(1 << number)

    def survived(self, lanes: Iterable[int]) -> list[int]:
        """Return the lanes whose deaths are to be written as 0 when they are let go of.

        Those that were counted here. What others counted stays, where this consumer has
        handed over nothing that could prove them wrong.
        """
        return [
            number
            for number in lanes
            if (lane := self._lanes.get(number)) is not None and lane.counted and lane.deaths
        ]

    def alone(self, lanes: Iterable[int]) -> bool:
        """Return whether the messages of any of the lanes are handed over alone."""
        return any(self._alone >> number & 1 for number in lanes)

    @property
    def must_write(self) -> bool:
        """Whether no careful lane goes on before what is unwritten was written down."""
        return bool(self._careful) and any(
            lane.dirty and not lane.open and not lane.nacked for lane in self._lanes.values()
        )

    @property
    def ways(self) -> tuple[tuple[Callable[[], Scan | None], int], ...]:
        """What to read by, in turn, and how many messages at most: alone, in groups, freely."""
        return (
            (self.next_alone_scan, 1),
            (self.next_group_scan, GROUP_MESSAGES),
            (self.next_scan, self._max_open),
        )

    def next_alone_scan(self) -> Scan | None:
        """Return what to read next of what comes alone, one message at most; or None."""
        if not self._alone or not self._may_be_alone():
            return None
        return _lowest(self._positions(group=1))

    def next_group_scan(self) -> Scan | None:
        """Return what to read next in groups, ``GROUP_MESSAGES`` at most; or None."""
        if self._careful == self._alone:
            return None
        return _lowest(self._positions(group=GROUP_MESSAGES))

    def _may_be_alone(self, *, once_written: bool = False) -> bool:
        """Return whether a message may be handed over alone."""
        alone = (lane for lane in self._lanes.values() if lane.group == 1)
        return all(lane.rests(once_written=once_written) for lane in alone)

    def _may_come_again(self, lane: _Lane) -> bool:
        """Return whether nacked messages of a lane may be handed over."""
        return not lane.leaving and (lane.group != 1 or self._may_be_alone())

    # Reading ----------------------------------------------------------------------------

    def allowed(self, lane: int, *, once_written: bool = False) -> int:
        """Return how many more messages of a lane may be handed over now.

        For drivers whose lanes are logs of their own, each read by itself; the others read
        by ``next_scan``. Bounded for each lane too: behind a message that is not settled
        the watermark stands still, and all that was settled meanwhile comes again after a
        crash.

        Args:
            lane: Its number.
            once_written: As if all that is settled were written down.
        """
        owned = self._lanes.get(lane)
        if owned is None or owned.leaving or owned.nacked:
            return 0
        if owned.group:
            may_go_on = self._may_be_alone if owned.group == 1 else owned.rests
            return min(owned.group, self.room) if may_go_on(once_written=once_written) else 0
        if 2 * len(owned.delivered) > self._max_open:
            owned.advance()
        return max(0, min(self.room, self._max_open - len(owned.delivered)))

    def next_scan(self) -> Scan | None:
        """Return what to read next, or None where no lane may be read; but no careful one.

        Lanes that stand at different offsets, because they were owned later or waited for
        a message to come again, catch up by themselves: the one furthest behind is read
        up to where the next one stands, and from there on they are read together.
        """
        return _lowest(self._positions(group=0))

    def _positions(self, *, group: int) -> dict[int, int]:
        """Return where the lanes stand that are read in such groups: offset to set of lanes."""
        positions: dict[int, int] = {}
        for number, lane in self._lanes.items():
            # A nacked message holds up its lane: what follows it must not overtake it.
            may = lane.group == group and not lane.leaving and not lane.nacked
            if may and (not group or lane.rests()):
                positions[lane.read_to] = positions.get(lane.read_to, 0) | 1 << number
        return positions

    def deliver(self, scan: Scan, rows: Sequence[tuple[int, int]], end: int) -> list[LaneToken]:
        """Take note of messages read by ``scan``; return the token of each hand-over.

        Args:
            scan: As ``next_scan``, ``next_group_scan`` or ``next_alone_scan`` gave it, with
                nothing in between.
            rows: (offset, lane) of each message, ascending.
            end: The offset up to which the scan has seen everything.
        """
        tokens = []
        lanes = self._lanes
        for offset, number in rows:
            lane = lanes[number]
            lane.open[offset] = 1
            lane.delivered.append(offset)
            tokens.append(LaneToken(number, lane.epoch, offset, 1, 1))
        self._open += len(rows)
        if scan.lanes & self._alone:
            tokens = [t._replace(attempt=_attempt(lanes[t.lane])) for t in tokens]
        for number, lane in lanes.items():
            if scan.lanes >> number & 1:
                lane.read_to = max(lane.read_to, end)
                if not lane.delivered:
                    lane.advance()
        return tokens

    def deliver_of(
        self, number: int, offsets: Sequence[int], *beside: Iterable[object]
    ) -> list[PlainToken]:
        """Take note of a lane's next messages; return the token of each hand-over.

        For drivers whose lanes are logs of their own; see ``allowed``.

        Args:
            number: The lane.
            offsets: Those of the messages, ascending, at least one.
            beside: What stands behind in each token.
        """
        lane = self._lanes[number]
        lane.open.update(dict.fromkeys(offsets, 1))
        lane.delivered.extend(offsets)
        lane.read_to = offsets[-1]
        self._open += len(offsets)
        attempt = _attempt(lane)
        head = repeat(number), repeat(lane.epoch), offsets, repeat(1), repeat(attempt)
        return list(zip(*head, *beside))  # noqa: B905 - what repeats has no end

    def due(self, now: float, limit: int) -> list[LaneToken]:
        """Hand over up to ``limit`` nacked messages that are to come again by ``now``."""
        limit = min(limit, self.room)
        tokens: list[LaneToken] = []
        for number, lane in self._lanes.items():
            # What comes alone is one such message at most, since that one holds up its lane.
            if not self._may_come_again(lane):
                continue
            while lane.nacked and lane.nacked[0][1] <= now and len(tokens) < limit:
                offset, _, turn, attempt = heapq.heappop(lane.nacked)
                lane.open[offset] = turn
                self._open += 1
                tokens.append(LaneToken(number, lane.epoch, offset, turn, attempt))
        return tokens

    def next_due(self) -> float | None:
        """Return when the next nacked message can come again; None where none can."""
        if not self.room:
            return None
        waiting = (
            lane.nacked[0][1]
            for lane in self._lanes.values()
            if lane.nacked and self._may_come_again(lane)
        )
        return min(waiting, default=None)

    # Settling ---------------------------------------------------------------------------

    def holds(self, token: PlainToken) -> bool:
        """Return whether the token names a hand-over that is still ours to settle."""
        lane = self._lanes.get(token[0])
        return lane is not None and lane.epoch == token[1] and lane.open.get(token[2]) == token[3]

    def state(self, lane: int, offset: int) -> Literal["ready", "held", "delayed", "settled"]:
        """Return what is known here of a message."""
        owned = self._lanes.get(lane)
        if owned is None or offset > owned.read_to:
            return "ready"
        if offset in owned.open:
            return "held"
        if any(nacked[0] == offset for nacked in owned.nacked):
            return "delayed"
        return "settled"

    def settle(self, token: PlainToken) -> Outcome:
        """Settle a hand-over as done. Call ``advance`` after the last one of a batch."""
        if not self.holds(token):
            return Outcome.LEASE_LOST
        number, offset = token[0], token[2]
        lane = self._lanes[number]
        del lane.open[offset]
        self._open -= 1
        if lane.group:
            self._settled_with_care(number, lane)
        return Outcome.SETTLED

    def _settled_with_care(self, number: int, lane: _Lane) -> None:
        lane.careful -= 1
        lane.dirty = True
        if lane.open or lane.nacked:
            return  # a death is still one with this group
        if lane.careful > 0:
            # Each group is counted, not just the first.
            lane.counted = False
            self._uncounted |= 1 << number
        else:
            lane.group, lane.dirty = 0, False
            self._careful &= ~(1 << number)
            self._alone &= ~(1 << number)

    def settle_many(self, tokens: Sequence[PlainToken]) -> list[int]:
        """Settle hand-overs as done, as ``settle`` does each; return the places of the lost."""
        by_lane: dict[int, list[PlainToken]] = {}
        for token in tokens:
            by_lane.setdefault(token[0], []).append(token)
        one_by_one = {number for number, those in by_lane.items() if not self._settle_all(those)}
        if not one_by_one:
            return []
        return [
            place
            for place, token in enumerate(tokens)
            if token[0] in one_by_one and self.settle(token) is Outcome.LEASE_LOST
        ]

    def _settle_all(self, tokens: list[PlainToken]) -> bool:
        """Settle all of these, which are of one lane; or none where any needs a closer look.

        Column by column: this is run for every message.
        """
        lane = self._lanes.get(tokens[0][0])
        if lane is None or lane.group:
            return False
        if [token[1] for token in tokens].count(lane.epoch) != len(tokens):
            return False
        offsets, turns = [token[2] for token in tokens], [token[3] for token in tokens]
        open_ = lane.open
        found = list(map(open_.pop, offsets, repeat(0)))
        if found != turns:
            # Some are settled already, or held anew: all as it was.
            open_.update((at, turn) for at, turn in zip(offsets, found, strict=True) if turn)
            return False
        self._open -= len(tokens)
        return True

    def give_back(self, token: LaneToken, *, due: float, attempt: int) -> Outcome:
        """Let a message come again at ``due``, as ``attempt``; its lane waits for it."""
        if not self.holds(token):
            return Outcome.LEASE_LOST
        lane = self._lanes[token.lane]
        del lane.open[token.offset]
        self._open -= 1
        heapq.heappush(lane.nacked, (token.offset, due, token.turn + 1, attempt))
        return Outcome.SETTLED

    def apply(self, settlement: Settlement, *, now: float) -> Outcome:
        """Settle a hand-over, or let its message come again, as the settlement asks."""
        token = named(settlement.token)
        if settlement.gives_back:
            due = now + settlement.delay
            return self.give_back(token, due=due, attempt=settlement.next_attempt)
        return self.settle(token)

    def advance(self) -> bool:
        """Move all watermarks; return whether any differs from what is written down."""
        moved = False
        for lane in self._lanes.values():
            if lane.delivered:
                lane.advance()
            moved = moved or lane.watermark != lane.written
        return moved

    def unwritten(self, lanes: Iterable[int] | None = None) -> list[Watermark]:
        """Return the watermarks that differ from what is written down."""
        chosen = self._lanes if lanes is None else lanes
        return [
            Watermark(number, lane.watermark, lane.settled)
            for number in chosen
            if (lane := self._lanes[number]).watermark != lane.written
        ]

    def marks(
        self, *, begin: Iterable[int] = (), let_go: Iterable[int] = (), every: bool = False
    ) -> list[Mark]:
        """Return what to write, for drivers that write a lane's mark as a whole.

        Args:
            begin: Lanes to count a hand-over of; see ``uncounted``.
            let_go: Lanes that are about to be let go of.
            every: Also lanes of which nothing has changed.
        """
        begin, survived = self.uncounted(begin), set(self.survived(let_go))
        found = []
        for number, lane in self._lanes.items():
            moved = lane.watermark != lane.written
            if not (every or moved or number in begin or number in survived):
                continue
            proven = number in survived or lane.settled != lane.settled_written
            deaths = lane.next_deaths if number in begin else 0 if proven else lane.deaths
            mark = Watermark(number, lane.watermark, lane.settled)
            found.append(Mark(mark, deaths, lane.epoch))
        return found

    def wrote(self, marks: Iterable[Mark], *, begin: Iterable[int] = ()) -> None:
        """Take note that these marks were written; lanes lost meanwhile are passed over."""
        same = [
            mark.watermark
            for mark in marks
            if (lane := self._lanes.get(mark.watermark.lane)) is not None
            and lane.epoch == mark.epoch
        ]
        self.written(same)
        lanes = {mark.lane for mark in same}
        self.counted(lane for lane in begin if lane in lanes)

    def written(self, watermarks: Iterable[Watermark]) -> None:
        """Take note that these were written down, with no deaths where more is settled."""
        for watermark in watermarks:
            lane = self._lanes.get(watermark.lane)
            if lane is None:
                continue
            lane.written = watermark.offset
            if watermark.settled == lane.settled_written:
                continue
            lane.settled_written = watermark.settled
            lane.deaths = 0
            if lane.group:
                lane.advance()  # over what was settled while this was written
                lane.dirty = lane.dirty and watermark.offset != lane.watermark


def _lowest(positions: dict[int, int]) -> Scan | None:
    """Return the scan of the lanes that stand furthest behind: up to where others stand."""
    if not positions:
        return None
    after, *later = sorted(positions)
    return Scan(after, later[0] if later else None, positions[after])


def _attempt(lane: _Lane) -> int:
    """Return the attempt of what is read next: how often it was alone, and once before."""
    return lane.deaths - _WITH_A_GROUP + 1 if lane.group == 1 else 1
