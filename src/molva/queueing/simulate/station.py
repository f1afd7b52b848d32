"""A station that is played by the event loop, and the choice of the kernel for a model."""

from typing import Any, Final, Protocol

import numpy as np

from molva.queueing.model import Bulk, Model, Priority
from molva.queueing.simulate import event_loop
from molva.queueing.simulate.demands import Demand, Demands
from molva.queueing.simulate.draws import Floats
from molva.queueing.simulate.event_loop import Board, Counter, Drawn, Log, Order, Rules
from molva.queueing.simulate.fcfs import PlainLine
from molva.queueing.simulate.tally import NEVER, Sum, Tally, flow_into, jobs_into, least_bin
from molva.queueing.simulate.units import Clock

__all__ = ["Station", "is_first_come", "station_of"]


class Station(Protocol):
    """What plays a model, chunk by chunk."""

    def play(self, gaps: Floats, demand: Demand, tally: Tally) -> None:
        """Let jobs arrive, and count in ``tally`` what becomes of them."""


def station_of(model: Model, clock: Clock, demands: Demands, *, compiled: bool) -> Station:
    """Return an empty station of ``model``."""
    least = least_bin(clock.units(model.service.mean))
    if is_first_come(model):
        assert model.servers is not None
        if not compiled:
            return PlainLine(model.servers, model.waiting, least)
        from molva.queueing.simulate.compiled import CompiledLine

        return CompiledLine(model.servers, model.waiting, least)
    return _Events(model, clock, demands, least, compiled=compiled)


def is_first_come(model: Model) -> bool:
    """Whether the recursion of Kiefer and Wolfowitz plays ``model``; else the event loop does."""
    in_order = model.discipline == "fifo" and model.patience is None
    return in_order and model.servers is not None and not isinstance(model.service, Bulk)


# Columns of the board that hold times; the others hold places.
_TIMES: Final = ("came", "since", "waited", "left", "deadline", "ends")

_ORDERS: Final = {"fifo": Order.FIFO, "lifo": Order.LIFO, "random": Order.RANDOM}


class _Events:
    """A station of the event loop: owns the board, and makes room on it."""

    def __init__(
        self, model: Model, clock: Clock, demands: Demands, least: int, *, compiled: bool
    ) -> None:
        discipline, service = model.discipline, model.service
        self._classes = 0
        if isinstance(discipline, Priority):
            order = Order.PREEMPTIVE if discipline.preemptive else Order.FIFO
            self._classes = len(discipline.shares)
        else:
            order = _ORDERS[discipline]
        self._rules = Rules(
            servers=-1 if model.servers is None else model.servers,
            waiting=-1 if model.waiting is None else model.waiting,
            order=order,
            limit=service.limit if isinstance(service, Bulk) else 0,
            base=clock.units(service.base) if isinstance(service, Bulk) else 0.0,
            each=clock.units(service.per_job) if isinstance(service, Bulk) else 0.0,
        )
        self._demands = demands
        self._least = least
        self._compiled = compiled
        self._play: event_loop.Play = event_loop.play
        if compiled:
            from molva.queueing.simulate.compiled import compiled_play

            self._play = compiled_play()
        self._departed = self._refused = NEVER
        self._picks = np.empty(0)
        self._slots = 0
        none = np.full(max(1, self._classes), -1)
        kept: dict[str, Any] = {"head": self._column(none), "tail": self._column(none.copy())}
        kept |= {"counts": self._whole(Counter.SIZE), "work": self._floats(1)}
        empty = {name: self._floats(0) for name in _TIMES} | {
            name: self._whole(0) for name in Board._fields if name not in _TIMES
        }
        self._board = Board(**(empty | kept))

    def play(self, gaps: Floats, demand: Demand, tally: Tally) -> None:
        """Let jobs arrive, and count what becomes of them."""
        if not gaps.size:
            return
        self._make_room(gaps.size)
        board, jobs = self._board, self._slots
        if self._rules.order == Order.RANDOM and self._picks.size < jobs:
            more = self._demands.order(jobs - self._picks.size)
            self._picks = np.concatenate([self._picks, more])
        drawn = Drawn(
            *(self._column(gaps), self._column(demand.services)),
            *(self._column(demand.ranks), self._column(demand.patience)),
            self._column(self._picks),
        )
        log = Log(
            *(self._floats(jobs), self._floats(jobs), self._floats(jobs)),
            *(self._whole(jobs), self._whole(jobs)),
            refused_at=self._floats(gaps.size),
        )
        now = self._play(self._rules, drawn, board, log)
        self._picks = self._picks[board.counts[Counter.PICKS] :]
        self._count(log, gaps.size, now, tally)
        self._move_origin(now)

    def _count(self, log: Log, arrived: int, now: float, tally: Tally) -> None:
        count, sums = self._board.counts, tally.sums
        left, refused = count[Counter.LOGGED], count[Counter.REFUSED]
        waits, stays = np.array(log.wait[:left]), np.array(log.stay[:left])
        abandoned = np.array(log.abandoned[:left], np.int64)
        sums[Sum.ARRIVED] += arrived
        sums[Sum.REFUSED] += refused
        sums[Sum.ABANDONED] += abandoned.sum()
        sums[Sum.TIME] += now
        sums[Sum.WORK] += self._board.work[0]
        jobs_into(tally, waits, stays, self._least)
        if left:
            sums[Sum.STAY] += np.cumsum(stays)[-1]
        ranks = np.array(log.rank[:left], np.int64)
        for rank in range(self._classes):
            mine = waits[ranks == rank]
            sums[Sum.CLASSES + 2 * rank] += mine.size
            sums[Sum.CLASSES + 2 * rank + 1] += np.cumsum(mine)[-1] if mine.size else 0.0
        served_at = np.array(log.at[:left])[abandoned == 0]
        self._departed = flow_into(tally, Sum.OUTPUT_GAPS, served_at, self._departed)
        refused_at = np.array(log.refused_at[:refused])
        self._refused = flow_into(tally, Sum.REFUSAL_GAPS, refused_at, self._refused)

    def _move_origin(self, now: float) -> None:
        """Let instants count from the end of this chunk; begin new counts."""
        board = self._board
        column: Any
        for column in (board.came, board.since, board.deadline, board.ends):
            if self._compiled:
                np.subtract(column, now, out=column)
            else:
                column[:] = [at - now for at in column]
        self._departed -= now
        self._refused -= now
        board.work[0] = 0.0
        for counter in (Counter.PICKS, Counter.LOGGED, Counter.REFUSED):
            board.counts[counter] = 0

    def _make_room(self, jobs: int) -> None:
        """See that there is a slot for each of ``jobs`` more."""
        board = self._board
        spare = board.counts[Counter.SPARE]
        more = jobs - spare
        if more <= 0:
            return
        old, new = self._slots, self._slots + max(more, self._slots // 2)
        columns: dict[str, Any] = {}
        for name, column in board._asdict().items():
            if name in ("head", "tail", "counts", "work"):
                columns[name] = column
            elif self._compiled:
                columns[name] = np.concatenate([column, np.zeros(new - old, column.dtype)])
            else:
                columns[name] = column + [0] * (new - old)
        self._board = Board(**columns)
        # The spare slots are a stack; the newest go to its top.
        for slot in range(old, new):
            self._board.spare[spare + slot - old] = slot
        self._board.counts[Counter.SPARE] = spare + new - old
        self._slots = new

    def _column(self, array: Any) -> Any:
        return array if self._compiled else array.tolist()

    def _floats(self, size: int) -> Any:
        return np.zeros(size) if self._compiled else [0.0] * size

    def _whole(self, size: int) -> Any:
        return np.zeros(size, np.int64) if self._compiled else [0] * size
