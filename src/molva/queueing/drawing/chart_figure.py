"""Charts as a figure: up to three beside each other, the present point marked.

Each line of an SVG has its name as id, ``mean-wait``.
"""

import math
import textwrap
from typing import TYPE_CHECKING, Final

from molva.queueing.drawing import colours
from molva.queueing.drawing.files import new_figure
from molva.queueing.plot import Chart, Plot, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["drawn"]

# Inches of one chart.
_WIDTH: Final = 4.4
_HEIGHT: Final = 3.7

# Charts beside each other.
_MOST_ACROSS: Final = 3

# Letters of a line of the title, for each chart beside another.
_TITLE: Final = 50

# Lines differ in dash as well as in colour.
_LOOKS: Final = (
    (colours.BUSY[0], "-", 2.0),
    (colours.SECOND, "--", 2.0),
    (colours.INK, ":", 1.8),
    ("#777777", "-.", 1.8),
)

# Where the upward axis ends, as a multiple of the highest value: a line at 100 % is seen whole.
_HEADROOM: Final = 1.08


def drawn(plot: Plot) -> "Figure":
    """Return the figure."""
    across = min(_MOST_ACROSS, len(plot.charts))
    down = math.ceil(len(plot.charts) / across)
    figure = new_figure(_WIDTH * across, _HEIGHT * down + 0.4)
    figure.suptitle(textwrap.fill(plot.title, _TITLE * across), x=0.01, ha="left", fontsize=12)
    for index, chart in enumerate(plot.charts, start=1):
        _draw(figure.add_subplot(down, across, index), chart)
    return figure


def _draw(axes: "Axes", chart: Chart) -> None:
    for line, (colour, dash, width) in zip(chart.lines, _LOOKS, strict=False):
        [drawn] = axes.plot(
            line.xs,
            [math.nan if y is None else y for y in line.ys],
            color=colour,
            linestyle=dash,
            linewidth=width,
            drawstyle="steps-post" if line.steps else "default",
            label=line.name,
        )
        drawn.set_gid(line.name.replace(" ", "-"))
        if line.band is not None:
            low, high = zip(*line.band, strict=True)
            axes.fill_between(line.xs, low, high, color=colour, alpha=0.2, linewidth=0)
    for point in chart.points:
        _mark(axes, point)
    if chart.points:
        axes.plot([], [], marker="o", linestyle="none", color=colours.MARK, label="this model")
    axes.set_title(chart.title)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.set_xlim(0, chart.width)
    if chart.x_marks is not None:
        axes.set_xticks(chart.x_marks)
    _limit(axes, chart)
    axes.grid(color=colours.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    # Below the axis, where it hides no line.
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=2,
        frameon=False,
        fontsize=9,
        handlelength=2.6,
    )


def _mark(axes: "Axes", point: Point) -> None:
    """Mark the model, and the interval of a simulated value by a bar with ends."""
    [mark] = axes.plot(
        [point.x], [point.y], marker="o", markersize=6, color=colours.MARK, clip_on=False
    )
    mark.set_gid("present")
    if point.interval is not None:
        low, high = point.interval
        axes.errorbar(
            [point.x],
            [point.y],
            yerr=[[max(point.y - low, 0.0)], [max(high - point.y, 0.0)]],
            color=colours.MARK,
            capsize=6,
            linestyle="none",
        )


def _limit(axes: "Axes", chart: Chart) -> None:
    """Fit the upward axis."""
    if chart.logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(chart.least, 100 * 1.15)
        axes.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
        axes.minorticks_off()
        return
    axes.set_ylim(chart.least, chart.highest * _HEADROOM)
