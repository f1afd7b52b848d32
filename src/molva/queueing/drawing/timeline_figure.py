"""A timing diagram as a figure: the rows of the drawing in a terminal, to scale.

Every bar has an id that says what it is, ``busy-server-1-job-3``, and every row of marks its
name, ``refused``; an SVG keeps them.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from molva.queueing.drawing import colours
from molva.queueing.drawing.files import new_figure
from molva.queueing.drawing.scale import TimeScale
from molva.queueing.drawing.timeline_text import MOST_LANES, places, summary
from molva.queueing.timeline import Bar, Stay, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

__all__ = ["drawn"]

# Inches.
_WIDTH: Final = 9.0
_ROW: Final = 0.42
_AROUND: Final = 1.35  # title and axis

# Height of a bar in its row, and of a row that is a curve, in rows.
_THICK: Final = 0.66
_TALL: Final = 2.5

# Width of the plot in the digits of a bar's name: 7.5 inches of about 0.085. A name is written
# only where it fits.
_DIGITS: Final = 88

# Letters of a line of the title.
_TITLE: Final = 85

# Instants of one row beyond which each is a stroke, so many points wide: other marks touch.
_MANY: Final = 60
_THIN: Final = 0.5


def drawn(timeline: Timeline) -> "Figure":
    """Return the figure."""
    taken, servers = places(timeline), timeline.servers
    bounded = timeline.model.waiting is not None and timeline.model.servers is not None
    rows = ["arrivals", *(["refused"] if bounded else [])]
    rows += ["waiting"] if taken > MOST_LANES else [f"place {i + 1}" for i in range(taken)]
    rows += ["busy"] if servers > MOST_LANES else [f"server {i + 1}" for i in range(servers)]
    impatient = timeline.model.patience is not None
    rows += ["gave up", "departures"] if impatient else ["departures"]
    middles = _middles(rows)

    depth = -min(middles.values()) + 1
    figure = new_figure(_WIDTH, _AROUND + _ROW * depth)
    axes = figure.add_subplot()
    _prepare(axes, timeline, middles)
    draw = _Pen(axes, timeline)
    draw.instants("arrivals", timeline.arrivals, middles["arrivals"], "v", colours.INK)
    if bounded:
        draw.instants("refused", timeline.refusals, middles["refused"], "x", colours.REFUSED)
    if taken > MOST_LANES:
        spans = [(stay.begin, stay.end) for stay in timeline.stays]
        draw.level("waiting", spans, middles["waiting"], colours.WAITING)
    else:
        for stay in timeline.stays:
            draw.stay(stay, middles[f"place {stay.place}"])
    if servers > MOST_LANES:
        spans = [(bar.begin, bar.end) for bar in timeline.bars]
        draw.level("busy", spans, middles["busy"], colours.BUSY[0])
    else:
        shade: Counter[int] = Counter()
        for bar in timeline.bars:
            shade[bar.server] += 1
            draw.bar(bar, middles[f"server {bar.server}"], colours.BUSY[shade[bar.server] % 2])
    if impatient:
        draw.instants("gave up", timeline.abandonments, middles["gave up"], ">", colours.REFUSED)
    draw.instants("departures", timeline.departures, middles["departures"], "^", colours.INK)
    return figure


def _middles(rows: list[str]) -> dict[str, float]:
    """Return where each row lies, from 0 downwards."""
    middles, at = {}, 0.0
    for row in rows:
        height = _TALL if row in ("waiting", "busy") else 1.0
        middles[row] = at - (height - 1) / 2
        at -= height
    return middles


def _prepare(axes: "Axes", timeline: Timeline, middles: dict[str, float]) -> None:
    scale = TimeScale.between(timeline.begin, timeline.end, 11)
    title = textwrap.fill(str(timeline.model), _TITLE)
    axes.set_title(f"{title}\n{timeline.road}: {summary(timeline)}", linespacing=1.5)
    axes.set_xlim(float(timeline.begin), float(timeline.end))
    axes.set_ylim(min(middles.values()) - 0.8, 0.8)
    axes.set_yticks(list(middles.values()), list(middles))
    axes.set_xticks([float(mark) for mark in scale.marks], [scale.label(m) for m in scale.marks])
    axes.set_xlabel(f"time, {scale.unit}")
    axes.tick_params(axis="y", length=0, pad=10)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=colours.GRID, linewidth=0.8)
    axes.set_axisbelow(True)


class _Pen:
    """Draws what happened to jobs on one pair of axes."""

    def __init__(self, axes: "Axes", timeline: Timeline) -> None:
        self.axes, self.timeline = axes, timeline

    def instants(
        self, name: str, instants: Iterable[Fraction], y: float, marker: str, colour: str
    ) -> None:
        counted = Counter(instants)
        many = len(counted) > _MANY
        [line] = self.axes.plot(
            [float(at) for at in counted],
            [y] * len(counted),
            marker="|" if many else marker,
            markersize=10.0 if many else 7.0,
            markeredgewidth=_THIN if many else 1.8 if marker == "x" else 0.8,
            color=colour,
            linestyle="none",
            clip_on=False,
        )
        line.set_gid(name.replace(" ", "-"))
        for at, count in counted.items():
            if count > 1 and not many:
                self.axes.annotate(
                    str(count), (float(at), y), (6, 0), textcoords="offset points", va="center"
                )

    def bar(self, bar: Bar, y: float, colour: str) -> None:
        dark = colour == colours.BUSY[0]
        box = self._box(bar.begin, bar.end, y, facecolor=colour, edgecolor=colours.INK)
        box.set_gid(f"busy-server-{bar.server}-job-{bar.jobs[0]}")
        self._name(bar.name, bar.begin, bar.end, y, "white" if dark else colours.INK)

    def stay(self, stay: Stay, y: float) -> None:
        box = self._box(
            stay.begin, stay.end, y, facecolor="white", edgecolor=colours.WAITING, hatch="////"
        )
        box.set_gid(f"waiting-place-{stay.place}-job-{stay.job}")
        self._name(str(stay.job), stay.begin, stay.end, y, colours.INK, background=True)

    def level(
        self, name: str, spans: list[tuple[Fraction, Fraction]], y: float, colour: str
    ) -> None:
        """Draw how many of ``spans`` are under way, over the height of a tall row."""
        change: Counter[Fraction] = Counter()
        for begin, end in spans:
            change[begin] += 1
            change[end] -= 1
        times, levels, now = [self.timeline.begin], [0], 0
        for at in sorted(change):
            now += change[at]
            times.append(at)
            levels.append(now)
        times.append(self.timeline.end)
        levels.append(0 if self.timeline.end in change else now)
        top, height, bottom = max(levels), _TALL - 0.5, y - (_TALL - 0.5) / 2
        area = self.axes.fill_between(
            [float(at) for at in times],
            bottom,
            [bottom + height * level / max(top, 1) for level in levels],
            step="post",
            color=colour,
            alpha=0.85,
            linewidth=0,
        )
        area.set_gid(f"{name}-level")
        self.axes.annotate(
            f"up to {top}",
            (float(self.timeline.end), bottom + height),
            (4, 0),
            textcoords="offset points",
            va="top",
            annotation_clip=False,
        )

    def _box(
        self,
        begin: Fraction,
        end: Fraction,
        y: float,
        *,
        facecolor: str,
        edgecolor: str,
        hatch: str | None = None,
    ) -> "Rectangle":
        from matplotlib.patches import Rectangle

        box = Rectangle(
            (float(begin), y - _THICK / 2),
            float(end - begin),
            _THICK,
            facecolor=facecolor,
            edgecolor=edgecolor,
            linewidth=0.8,
            hatch=hatch,
        )
        self.axes.add_patch(box)
        return box

    def _name(
        self,
        name: str,
        begin: Fraction,
        end: Fraction,
        y: float,
        colour: str,
        *,
        background: bool = False,
    ) -> None:
        if len(name) + 1 > _DIGITS * (end - begin) / self.timeline.duration:
            return
        self.axes.text(
            float(begin + end) / 2,
            y,
            name,
            ha="center",
            va="center",
            color=colour,
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0} if background else None,
        )
