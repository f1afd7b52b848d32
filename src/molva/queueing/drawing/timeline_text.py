"""A timing diagram for a terminal: a row for whatever a job can meet, a column for a time.

    arrivals    2       2          two come at once
    refused     ×       ×          one finds no server
    server 1    1━━━    3━━━       jobs 1 and 3, each until the next is due
    departures      ↑       ↑

Where all instants are multiples of one tick and the terminal is wide enough, every tick has
the same number of columns, so the drawing is exact.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Final

from molva.queueing.drawing.scale import TimeScale, common_tick
from molva.queueing.timeline import Timeline

__all__ = ["MOST_LANES", "drawn", "places", "summary"]

# Servers, and waiting places, that get a row each. Of more, a row says how many are taken.
MOST_LANES: Final = 12

# Waiting places that get a row although nobody is in them.
_EMPTY_LANES: Final = 4

# Columns of the narrowest drawing in which a row is still one.
_NARROWEST: Final = 40

# Columns left free on the right, where the last number of the axis ends.
_AIR: Final = 4

# Columns between two marks of the axis: a label and some air.
_MARK_COLUMNS: Final = 8


def drawn(timeline: Timeline, width: int) -> str:
    """Return the drawing, at most ``width`` columns wide."""
    lanes = _lanes(timeline)
    margin = max(len(name) for name, _ in lanes) + 2
    columns = _columns(timeline, max(width, _NARROWEST) - margin - _AIR)

    def column(at: Fraction) -> int:
        return math.floor((at - timeline.begin) * columns / timeline.duration)

    rows = [f"{name:<{margin}}{paint(column, columns)}" for name, paint in lanes]
    title = f"{timeline.model}   {timeline.road}"
    parts = [title, "", *_axis(timeline, margin, columns, column), *rows, "", summary(timeline)]
    return "\n".join(part.rstrip() for part in parts)


def places(timeline: Timeline) -> int:
    """Return how many waiting places are drawn: those taken, and a few that are not."""
    taken = max((stay.place for stay in timeline.stays), default=0)
    there = timeline.model.waiting
    return taken if there is None else max(taken, min(there, _EMPTY_LANES))


def summary(timeline: Timeline) -> str:
    """Return what happened in the window, in one line."""
    arrived, refused = len(timeline.arrivals), len(timeline.refusals)
    parts = [f"{arrived} arrived"]
    if timeline.model.waiting is not None and timeline.model.servers is not None:
        parts.append(f"{refused} refused")
    if timeline.model.patience is not None:
        parts.append(f"{len(timeline.abandonments)} gave up")
    parts.append(f"{len(timeline.departures)} departed")
    shares = timeline.busy_shares
    if shares and timeline.model.servers is not None:
        busy = f"busy {100 * float(sum(shares, Fraction(0)) / len(shares)):.4g} %"
        if len(set(shares)) > 1:
            parts.append(f"servers {busy} in the mean")
        else:
            parts.append(f"{'server' if len(shares) == 1 else 'each server'} {busy}")
    return ", ".join(parts)


Column = Callable[[Fraction], int]
Paint = Callable[[Column, int], str]


def _lanes(timeline: Timeline) -> list[tuple[str, Paint]]:
    """Return the rows from top to bottom, the way that a job takes."""
    bars, stays = timeline.bars, timeline.stays
    lanes = [("arrivals", _marks(timeline.arrivals, "↓"))]
    if timeline.model.waiting is not None and timeline.model.servers is not None:
        lanes.append(("refused", _marks(timeline.refusals, "×")))
    if places(timeline) > MOST_LANES:
        lanes.append(("waiting", _level([(stay.begin, stay.end) for stay in stays])))
    else:
        for place in range(1, places(timeline) + 1):
            mine = [(str(s.job), s.begin, s.end) for s in stays if s.place == place]
            lanes.append((f"place {place}", _spans(mine, "├", "┄")))
    if timeline.servers > MOST_LANES:
        lanes.append(("busy", _level([(bar.begin, bar.end) for bar in bars])))
    else:
        for server in range(1, timeline.servers + 1):
            work = [(b.name, b.begin, b.end) for b in bars if b.server == server]
            lanes.append((f"server {server}", _spans(work, "┣", "━")))
    if timeline.model.patience is not None:
        lanes.append(("gave up", _marks(timeline.abandonments, "↗")))
    lanes.append(("departures", _marks(timeline.departures, "↑")))
    return lanes


def _columns(timeline: Timeline, room: int) -> int:
    """Return the columns of the window: as many as make every tick a whole number of them."""
    instants = [timeline.end, *timeline.arrivals, *timeline.departures, *timeline.abandonments]
    instants += [bar.begin for bar in timeline.bars]
    tick = common_tick(at - timeline.begin for at in instants)
    assert tick is not None  # the window has a length
    ticks = int(timeline.duration / tick)
    return ticks * (room // ticks) if ticks <= room else room


def _axis(timeline: Timeline, margin: int, columns: int, column: Column) -> list[str]:
    """Return two lines: the unit with numbers, and marks."""
    scale = TimeScale.between(timeline.begin, timeline.end, columns // _MARK_COLUMNS + 1)
    longest = len(scale.label(timeline.end)) + 2
    if longest > _MARK_COLUMNS:
        scale = TimeScale.between(timeline.begin, timeline.end, columns // longest + 1)
    room = columns + _AIR
    labels, marks = [" "] * room, ["─"] * (columns + 1)
    for mark in scale.marks:
        at, text = column(mark), scale.label(mark)
        marks[at] = "┬"
        first = min(at, room - len(text))
        labels[first : first + len(text)] = text
    return [f"{scale.unit:<{margin}}{''.join(labels)}", " " * margin + "".join(marks)]


def _marks(instants: Iterable[Fraction], sign: str) -> Paint:
    """Return what puts ``sign`` at each instant; a number where several share a column."""
    counted = list(instants)

    def paint(column: Column, columns: int) -> str:
        row = [" "] * (columns + 1)
        for at, count in Counter(map(column, counted)).items():
            row[at] = sign if count == 1 else str(count) if count <= 9 else "+"
        return "".join(row)

    return paint


def _spans(spans: Iterable[tuple[str, Fraction, Fraction]], start: str, fill: str) -> Paint:
    """Return what draws each span, its name first, or ``start`` where there is no room for it."""
    named = list(spans)

    def paint(column: Column, columns: int) -> str:
        row = [" "] * (columns + 1)
        for name, begin, end in named:
            first, last = column(begin), max(column(end), column(begin) + 1)
            room = last - first
            fits = len(name) < room or len(name) == room == 1
            head = name if fits else start if room > 1 else fill
            row[first:last] = head + fill * (room - len(head))
        return "".join(row)

    return paint


def _level(spans: Iterable[tuple[Fraction, Fraction]]) -> Paint:
    """Return what says how many spans hold the beginning of each column: 0 to 9, then +."""
    both = list(spans)

    def paint(column: Column, columns: int) -> str:
        change = [0] * (columns + 2)
        for begin, end in both:
            change[column(begin)] += 1
            change[column(end)] -= 1
        row, now = [], 0
        for step in change[:columns]:
            now += step
            row.append(" " if now == 0 else str(now) if now <= 9 else "+")
        return "".join(row)

    return paint
