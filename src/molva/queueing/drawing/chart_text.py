"""Charts for a terminal: one below the other, a sign for each line, ◆ where the model stands.

time against load
  2 s ┤                                    +
      │                                 + •
    1 ┤                          + + ◆
      │        + + + +   +  + +    •
    0 ┼────────────────────────────────────
"""

import bisect
import math
from typing import Final

from molva.queueing.plot import Chart, Line, Plot

__all__ = ["drawn"]

_SIGNS: Final = "•+·-"
_PRESENT: Final = "◆"

# Rows of a chart, and columns left of its axis.
_ROWS: Final = 12
_MARGIN: Final = 9

# Columns of the narrowest chart in which a line is still one.
_NARROWEST: Final = 40


def drawn(plot: Plot, width: int) -> str:
    """Return the charts, at most ``width`` columns wide."""
    return "\n\n".join(
        [plot.title, *(_chart(chart, max(width, _NARROWEST)) for chart in plot.charts)]
    )


def _chart(chart: Chart, width: int) -> str:
    columns = width - _MARGIN - 2
    grid = [[" "] * columns for _ in range(_ROWS)]
    for line, sign in reversed(list(zip(chart.lines, _SIGNS, strict=False))):
        for column in range(columns):
            y = _value(line, chart.width * column / (columns - 1))
            row = None if y is None else _row(chart, y)
            if row is not None:
                grid[row][column] = sign
    for point in chart.points:
        row = _row(chart, point.y)
        if row is not None:
            grid[row][round(point.x / chart.width * (columns - 1))] = _PRESENT
    marks = {_row(chart, y): text for y, text in _y_marks(chart)}
    lines = [
        f"{marks.get(row, ''):>{_MARGIN - 1}} {'┤' if row in marks else '│'}{''.join(cells)}"
        for row, cells in enumerate(grid)
    ]
    names = [f"{sign} {line.name}" for line, sign in zip(chart.lines, _SIGNS, strict=False)]
    legend = _legend(names + [f"{_PRESENT} this model"] * bool(chart.points), columns)
    head = f"{chart.title} ({chart.y_label})"
    shown = [head, *lines, *_x_axis(chart, columns), *legend]
    return "\n".join(each.rstrip() for each in shown)


def _legend(names: list[str], columns: int) -> list[str]:
    """Return the names side by side, on as many lines as they need."""
    rows = [""]
    for name in names:
        longer = f"{rows[-1]}   {name}" if rows[-1] else name
        if rows[-1] and len(longer) > columns:
            rows.append(name)
        else:
            rows[-1] = longer
    return [f"{'':<{_MARGIN}} {row}" for row in rows]


def _value(line: Line, x: float) -> float | None:
    """Return the line at ``x``, between its points straight or as the last step."""
    at = bisect.bisect_right(line.xs, x) - 1
    if at < 0 or x > line.xs[-1]:
        return None
    left = line.ys[at]
    if line.steps or at + 1 == len(line.xs):
        return left
    right = line.ys[at + 1]
    if left is None or right is None:
        return left
    return left + (right - left) * (x - line.xs[at]) / (line.xs[at + 1] - line.xs[at])


def _row(chart: Chart, y: float) -> int | None:
    """Return the row of ``y``, from 0 at the top; None where it lies outside."""
    low, high = chart.least, chart.highest
    if chart.logarithmic:
        if y <= 0:
            return None
        low, high, y = math.log10(low), math.log10(high), math.log10(y)
    row = round((high - y) / (high - low) * (_ROWS - 1))
    return row if 0 <= row < _ROWS else None


def _y_marks(chart: Chart) -> list[tuple[float, str]]:
    low, high = chart.least, chart.highest
    if chart.logarithmic:
        powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high)) + 1)
        return [(10.0**power, f"{10.0**power:g}") for power in powers]
    return [(y, f"{y:.3g}") for y in (low, (low + high) / 2, high)]


def _x_axis(chart: Chart, columns: int) -> list[str]:
    """Return the axis with its marks, and their numbers with the label."""
    xs = chart.x_marks or tuple(chart.width * index / 4 for index in range(5))
    axis, numbers = ["─"] * columns, [" "] * (columns + _MARGIN)
    for x in xs:
        at = round(x / chart.width * (columns - 1))
        axis[at] = "┬"
        text = f"{x:.3g}"
        first = min(at, columns - len(text))
        numbers[first : first + len(text)] = text
    pad = " " * _MARGIN
    return [
        f"{pad}└{''.join(axis)}",
        f"{pad} {''.join(numbers).rstrip()}",
        f"{pad} {chart.x_label}",
    ]
