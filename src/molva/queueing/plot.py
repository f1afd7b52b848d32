"""Charts of a steady state: what load does to it, how long jobs wait, how a day goes.

``Plot.of(state)`` chooses which charts say something about the model, and computes their
lines by ``analyse``; ``drawing/`` draws them. Every line carries its numbers, so they can be
read without any picture.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final, final

from molva.queueing.analytic import analyse, course
from molva.queueing.distributions import (
    Deterministic,
    Distribution,
    Erlang,
    Exponential,
    General,
    Hyperexponential,
    LogNormal,
    Trace,
    Uniform,
)
from molva.queueing.drawing.scale import TimeScale
from molva.queueing.errors import ModelError, NoAnalysisError, ParameterError
from molva.queueing.model import Model, Recorded, Renewal, Sinusoid
from molva.queueing.result import Multiset, SteadyState, TimeLaw

__all__ = ["Chart", "Line", "Plot", "at_load"]

# Steps of the offered load up to that of all servers. A curve ends below it where all can wait,
# and at twice as much where the rest is refused. What takes a third of a second a point is
# computed in coarse steps. Round numbers keep the period of D/D/n/q short.
_FINE_STEPS: Final = 100
_COARSE_STEPS: Final = 20
_SLOW_STEPS: Final = 10
_SLOW: Final = frozenset({"periodic", "embedded-chain"})
_COARSE: Final = frozenset({"bulk", "schedule", "crommelin"})

# Points of a distribution, and the share of jobs at which its picture ends.
_TAIL_POINTS: Final = 60
_TAIL_END: Final = 0.999

# Points of a period.
_COURSE_POINTS: Final = 96

# A curve is cut at so many times the present point; see ``Chart.highest``.
_MOST_ABOVE: Final = 4.0

# Most marks on an axis of time, and on that of a period: a day has one every three hours.
_TIME_MARKS: Final = 6
_PERIOD_MARKS: Final = 9


@final
@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        name: What the legend says.
        xs: In the unit of the chart, ascending.
        ys: The same; None where it is not defined.
        steps: Whether a value holds until the next one, as that of finitely many values.
    """

    name: str
    xs: tuple[float, ...]
    ys: tuple[float | None, ...]
    steps: bool = False


@final
@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over one axis.

    Attributes:
        title: What it shows.
        x_label: With its unit.
        y_label: With its unit.
        lines: At least one.
        points: The present model: where it lies on the lines, as (x, y).
        x_marks: Where the axis has marks; None for a choice by whoever draws.
        logarithmic: Whether the upward axis is.
        least: Where the upward axis begins.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    points: tuple[tuple[float, float], ...] = ()
    x_marks: tuple[float, ...] | None = None
    logarithmic: bool = False
    least: float = 0.0

    @property
    def highest(self) -> float:
        """Where the upward axis ends: at the largest value, if it is not far away.

        A curve that rises without bound is cut, or the present point would lie on the axis.
        """
        most = max((y for line in self.lines for y in line.ys if y is not None), default=1.0)
        present = max((y for _, y in self.points), default=0.0)
        if present > 0:
            most = min(most, max(_MOST_ABOVE * present, most / 5))
        return most if most > 0 else 1.0

    @property
    def width(self) -> float:
        """Where the axis ends, which begins at 0."""
        return max(line.xs[-1] for line in self.lines)


@final
@dataclass(frozen=True, slots=True)
class Plot:
    """The charts of one model.

    Attributes:
        title: The model, and by which road it was computed.
        charts: From one to four.
    """

    title: str
    charts: tuple[Chart, ...]

    @classmethod
    def of(cls, state: SteadyState | Model | str) -> "Plot":
        """Return the charts that say something about ``state``.

        Raises:
            ModelError: The model cannot be analysed; see ``analyse``.

        Example:
            >>> [chart.title for chart in Plot.of("M(8/s)/M(200ms)/2/10").charts]
            ['time against load', 'shares against load', 'how long jobs wait and stay']
        """
        if not isinstance(state, SteadyState):
            state = analyse(state)
        charts = [*_against_load(state), *_spread(state), *_period(state)]
        if not charts:
            raise NoAnalysisError(f"there is nothing to draw of {state.model}")
        return cls(f"{state.model}, {state.road}", tuple(charts))

    def text(self, width: int = 80) -> str:
        """Return the drawing for a terminal of ``width`` columns, lines without ends."""
        from molva.queueing.drawing import chart_text

        return chart_text.drawn(self, width)

    def save(self, path: str | Path) -> None:
        """Write the picture to ``path``: .png, .svg or .txt.

        Raises:
            ParameterError: The ending is none of these, or the file cannot be written.
            MissingLibraryError: PNG and SVG need matplotlib, the extra ``plot``.
        """
        from molva.queueing.drawing import chart_figure, files

        files.save(path, text=self.text, figure=lambda: chart_figure.drawn(self))


# What load does.


def at_load(model: Model, load: Fraction) -> Model:
    """Return ``model`` with its arrivals as much faster as makes them offer ``load``.

    Args:
        model: The arrivals keep their form: scv, batch, shape of the day.
        load: Servers that would be busy if nobody were refused, above 0, in erlangs.

    Example:
        >>> str(at_load(Model.parse("E2(1s)/M(2s)/4/inf"), Fraction(3)))
        'E2(2/3s)/M(2s)/4/inf'
    """
    if load <= 0:
        raise ParameterError(f"a load is above 0; it is {float(load):.6g}")
    slower = model.arrivals.rate * model.service.mean / load
    match model.arrivals:
        case Renewal(gap, batch):
            return dataclasses.replace(model, arrivals=Renewal(_stretched(gap, slower), batch))
        case Sinusoid(level, amplitude, period, phase):
            if not isinstance(amplitude, Fraction):
                amplitude = type(amplitude)(amplitude.low / slower, amplitude.high / slower)
            else:
                amplitude /= slower
            wave = Sinusoid(level / slower, amplitude, period, phase)
            return dataclasses.replace(model, arrivals=wave)
        case Recorded(instants, gap):
            both = Recorded(_stretched(instants, slower), _stretched(gap, slower))
            return dataclasses.replace(model, arrivals=both)


def _stretched(law: Distribution, factor: Fraction) -> Distribution:
    """Return the law of a time ``factor`` times as long."""
    match law:
        case Exponential() | Deterministic() | Erlang() | Hyperexponential() | LogNormal():
            return dataclasses.replace(law, mean=law.mean * factor)
        case General():
            return dataclasses.replace(law, mean=law.mean * factor)
        case Uniform(low, high):
            return Uniform(low * factor, high * factor)
        case Trace(path, unit, values):
            return Trace(path, unit, tuple(value * float(factor) for value in values))
    raise NoAnalysisError(f"the times of {law} cannot be stretched")


def _against_load(state: SteadyState) -> list[Chart]:
    """Return how times, and shares, change with the load, the present one marked."""
    model, n = state.model, state.model.servers
    if n is None:
        return []
    present = model.arrivals.rate * model.service.mean / n
    steps = _FINE_STEPS
    if state.method in _SLOW | _COARSE:
        steps = _SLOW_STEPS if state.method in _SLOW else _COARSE_STEPS
    last = steps - 1 if model.waiting is None else 2 * steps
    loads = sorted({Fraction(step, steps) for step in range(1, last + 1)} | {present})
    states = [state if load == present else _state_at(model, load * n) for load in loads]
    xs = tuple(100 * float(load) for load in loads)
    x_label = "offered load, % of all servers"
    here = 100 * float(present)

    times = _lines(_TIMES, xs, states)
    charts: list[Chart] = []
    if any(line.name == "mean wait" and any(line.ys) for line in times):
        size, unit, _ = _time_axis(max(y for line in times for y in line.ys if y is not None))
        lines = tuple(_scaled(line, 1 / size) for line in times)
        marks = _present(_TIMES, here, state, 1 / size)
        charts.append(Chart("time against load", x_label, f"time, {unit}", lines, marks))

    shares = _SHARES_WAITING if model.waiting is None else _SHARES_BOUNDED
    lines = tuple(_scaled(line, 100) for line in _lines(shares, xs, states))
    marks = _present(shares, here, state, 100)
    charts.append(Chart("shares against load", x_label, "share, %", lines, marks))
    return charts


# What a line of a load curve shows.
_Quantity = Callable[[SteadyState], float | None]
_TIMES: Final[dict[str, _Quantity]] = {
    "mean wait": lambda state: state.mean_wait,
    "mean time in system": lambda state: state.mean_time_in_system,
}
_SHARES_WAITING: Final[dict[str, _Quantity]] = {
    "servers busy": lambda state: state.utilisation,
    "wait at all": lambda state: state.probability_of_waiting,
}
_SHARES_BOUNDED: Final[dict[str, _Quantity]] = {
    "servers busy": lambda state: state.utilisation,
    "refused": lambda state: state.loss_probability,
}


def _lines(
    quantities: dict[str, _Quantity], xs: tuple[float, ...], states: Sequence[SteadyState | None]
) -> list[Line]:
    """Return a line for each quantity that is defined somewhere."""
    lines = (
        Line(name, xs, tuple(None if state is None else value(state) for state in states))
        for name, value in quantities.items()
    )
    return [line for line in lines if any(y is not None for y in line.ys)]


def _scaled(line: Line, factor: float) -> Line:
    ys = tuple(None if y is None else factor * y for y in line.ys)
    return dataclasses.replace(line, ys=ys)


def _present(
    quantities: dict[str, _Quantity], x: float, state: SteadyState, factor: float
) -> tuple[tuple[float, float], ...]:
    ys = (value(state) for value in quantities.values())
    return tuple((x, factor * y) for y in ys if y is not None)


def _state_at(model: Model, load: Fraction) -> SteadyState | None:
    """Return the state under ``load``, None where there is none or nothing computes it."""
    try:
        return analyse(at_load(model, load))
    except ModelError:
        return None


def _time_axis(end: float, marks: int = 2) -> tuple[float, str, tuple[float, ...]]:
    """Return seconds in a unit, its name, and marks in it, for an axis from 0 to ``end``."""
    scale = TimeScale.between(Fraction(0), Fraction(end), marks)
    size = float(scale.seconds)
    return size, scale.unit, tuple(float(mark) / size for mark in scale.marks)


# How long jobs wait and stay.


def _spread(state: SteadyState) -> list[Chart]:
    """Return the shares of jobs that wait, and stay, longer than t."""
    laws = [("wait longer", state.wait), ("stay longer", state.time_in_system)]
    known = [(name, law) for name, law in laws if law is not None]
    ends = [law.percentile(_TAIL_END) for _, law in known]
    if not known or max(ends) <= 0:
        return []
    end = 1.05 * max(ends)
    size, unit, marks = _time_axis(end, _TIME_MARKS)
    return [
        Chart(
            "how long jobs wait and stay",
            f"t, {unit}",
            "jobs longer than t, %",
            tuple(_tail(name, law, end, size) for name, law in known),
            x_marks=marks,
            logarithmic=True,
            least=100 * (1 - _TAIL_END),
        )
    ]


def _tail(name: str, law: TimeLaw, end: float, size: float) -> Line:
    """Return P(T > t) in percent up to ``end``, as steps where there are finitely many values."""
    if isinstance(law, Multiset):
        times = sorted({0.0, *(float(value) for value in law.values), end})
    else:
        times = [end * index / _TAIL_POINTS for index in range(_TAIL_POINTS + 1)]
    ys = tuple(100 * law.tail(t) for t in times)
    return Line(name, tuple(t / size for t in times), ys, steps=isinstance(law, Multiset))


# How a day goes.


def _period(state: SteadyState) -> list[Chart]:
    """Return what comes and what is there in the course of one period of a sinusoid."""
    model = state.model
    if not isinstance(model.arrivals, Sinusoid) or model.arrivals.is_random:
        return []
    day = course(model, points=_COURSE_POINTS)
    # The period's end is its beginning.
    period = day.times[1] * len(day.times)
    size, unit, marks = _time_axis(period, _PERIOD_MARKS)
    xs = tuple(t / size for t in (*day.times, period))
    x_label = f"time, {unit}"
    service = float(model.service.mean)

    def line(name: str, ys: Sequence[float], scale: float = 1.0) -> Line:
        return Line(name, xs, tuple(scale * y for y in (*ys, ys[0])))

    def level(name: str, y: float) -> Line:
        return Line(name, (xs[0], xs[-1]), (y, y))

    jobs = [
        line("in the system", day.mean_in_system),
        line("brought by arrivals", day.arrival_rate, service),
    ]
    if model.servers is not None:
        jobs.append(level("servers", model.servers))
    charts = [Chart("jobs in the course of a period", x_label, "jobs", tuple(jobs), x_marks=marks)]
    if model.servers is not None and state.loss_probability:
        refused = [
            line("refused", day.loss_probability, 100),
            level("refused in the mean", 100 * state.loss_probability),
        ]
        flat = _at_mean_rate(model)
        if flat is not None:
            refused.append(level("at the mean rate, by formula", 100 * flat))
        title = "refusals in the course of a period"
        charts.append(Chart(title, x_label, "arrivals, %", tuple(refused), x_marks=marks))
    return charts


def _at_mean_rate(model: Model) -> float | None:
    """Return the share that would be refused if the mean rate held all the time."""
    steady = dataclasses.replace(model, arrivals=Renewal(Exponential(1 / model.arrivals.rate)))
    return analyse(steady).loss_probability
