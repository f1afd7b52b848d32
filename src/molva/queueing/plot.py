"""Charts of a result: what load does to it, how long jobs wait, how a day goes.

``Plot.of(result)`` chooses which charts say something about the model, and computes their
lines by ``analyse``; what was simulated stands beside them with its intervals. ``drawing/``
draws them. Every line carries its numbers, so they can be read without any picture.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final, final

from molva.queueing.analytic import Course, analyse, course
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
from molva.queueing.simulate.estimate import Estimate, SampledLaw, Simulation

__all__ = ["Chart", "Line", "Plot", "Point", "at_load"]

# Steps of the offered load up to that of all servers. A curve ends below it where all can wait,
# and at twice as much where the rest is refused. What takes a third of a second a point is
# computed in coarse steps. Round numbers keep the period of D/D/n/q short.
_FINE_STEPS: Final = 100
_COARSE_STEPS: Final = 20
_SLOW_STEPS: Final = 10
_SLOW: Final = frozenset({"periodic", "embedded-chain"})
_COARSE: Final = frozenset({"bulk", "schedule", "crommelin"})

# Servers beyond which a closed form takes a tenth of a second a point.
_MANY_SERVERS: Final = 10_000

# The method of a steady state that was simulated: no curve is drawn of such.
_SIMULATION: Final = "simulation"

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
        band: Of a simulated line, the interval of each value, as (low, high).
    """

    name: str
    xs: tuple[float, ...]
    ys: tuple[float | None, ...]
    steps: bool = False
    band: tuple[tuple[float, float], ...] | None = None


@final
@dataclass(frozen=True, slots=True)
class Point:
    """Where the model lies on a line.

    Attributes:
        x: In the unit of the chart.
        y: The same.
        interval: Of a simulated value, from low to high.
    """

    x: float
    y: float
    interval: tuple[float, float] | None = None


@final
@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over one axis.

    Attributes:
        title: What it shows.
        x_label: With its unit.
        y_label: With its unit.
        lines: At least one.
        points: The present model, on each line where it lies on one.
        x_marks: Where the axis has marks; None for a choice by whoever draws.
        logarithmic: Whether the upward axis is.
        least: Where the upward axis begins.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    points: tuple[Point, ...] = ()
    x_marks: tuple[float, ...] | None = None
    logarithmic: bool = False
    least: float = 0.0

    @property
    def highest(self) -> float:
        """Where the upward axis ends: at the largest value, if it is not far away.

        A curve that rises without bound is cut, or the present point would lie on the axis.
        """
        most = max((y for line in self.lines for y in line.ys if y is not None), default=1.0)
        present = max((point.y for point in self.points), default=0.0)
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
    def of(cls, result: SteadyState | Simulation | Model | str) -> "Plot":
        """Return the charts that say something about ``result``.

        Args:
            result: What was computed or simulated; of a model, what ``analyse`` says.

        Raises:
            ModelError: A model that cannot be analysed; or nothing of it can be drawn.

        Example:
            >>> [chart.title for chart in Plot.of("M(8/s)/M(200ms)/2/10").charts]
            ['time against load', 'shares against load', 'how long jobs wait and stay']
        """
        if isinstance(result, Model | str):
            result = analyse(result)
        state = _analysed(result)
        charts: list[Chart] = []
        if state is not None:
            charts += _against_load(state, result)
        charts += _spread(state, result)
        if state is not None:
            charts += _period(state)
        if not charts:
            raise NoAnalysisError(f"there is nothing to draw of {result.model}")
        return cls(f"{result.model}, {result.road}", tuple(charts))

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


def _analysed(result: SteadyState | Simulation) -> SteadyState | None:
    """Return the analysis beside which a simulation is drawn, None where there is none."""
    if isinstance(result, SteadyState) and result.method != _SIMULATION:
        return result
    try:
        return analyse(result.model)
    except ModelError:
        return None


def _against_load(state: SteadyState, result: SteadyState | Simulation) -> list[Chart]:
    """Return how times, and shares, change with the load; ``result`` is marked."""
    model, n = state.model, state.model.servers
    if n is None:
        return []
    present = model.arrivals.rate * model.service.mean / n
    steps = _FINE_STEPS
    if state.method in _SLOW:
        steps = _SLOW_STEPS
    elif state.method in _COARSE or n > _MANY_SERVERS:
        steps = _COARSE_STEPS
    last = steps - 1 if model.waiting is None else 2 * steps
    loads = sorted({Fraction(step, steps) for step in range(1, last + 1)} | {present})
    states = [
        state if load == present else _state_at(model, load * n, state.method) for load in loads
    ]
    xs = tuple(100 * float(load) for load in loads)
    x_label = "offered load, % of all servers"
    lines_by = "" if state is result else f" (lines: {state.road})"
    here = 100 * float(present)

    times = _lines(_TIMES, xs, states)
    charts: list[Chart] = []
    if any(line.name == "mean wait" and any(line.ys) for line in times):
        size, unit, _ = _time_axis(max(y for line in times for y in line.ys if y is not None))
        lines = tuple(_scaled(line, 1 / size) for line in times)
        marks = _present(_TIMES, here, result, 1 / size)
        charts.append(Chart(f"time against load{lines_by}", x_label, f"time, {unit}", lines, marks))

    shares = _SHARES_WAITING if model.waiting is None else _SHARES_BOUNDED
    lines = tuple(_scaled(line, 100) for line in _lines(shares, xs, states))
    marks = _present(shares, here, result, 100)
    charts.append(Chart(f"shares against load{lines_by}", x_label, "share, %", lines, marks))
    return charts


# What a line of a load curve shows, by the name of the attribute.
_TIMES: Final = {"mean wait": "mean_wait", "mean time in system": "mean_time_in_system"}
_SHARES_WAITING: Final = {"servers busy": "utilisation", "wait at all": "probability_of_waiting"}
_SHARES_BOUNDED: Final = {"servers busy": "utilisation", "refused": "loss_probability"}


def _lines(
    quantities: dict[str, str], xs: tuple[float, ...], states: Sequence[SteadyState | None]
) -> list[Line]:
    """Return a line for each quantity that is defined somewhere."""
    lines = (
        Line(name, xs, tuple(None if state is None else getattr(state, of) for state in states))
        for name, of in quantities.items()
    )
    return [line for line in lines if any(y is not None for y in line.ys)]


def _scaled(line: Line, factor: float) -> Line:
    ys = tuple(None if y is None else factor * y for y in line.ys)
    return dataclasses.replace(line, ys=ys)


def _present(
    quantities: dict[str, str], x: float, result: SteadyState | Simulation, factor: float
) -> tuple[Point, ...]:
    """Return where ``result`` lies, for each quantity that it has."""
    points = []
    for of in quantities.values():
        value: float | Estimate | None = getattr(result, of)
        if isinstance(value, Estimate):
            interval = (factor * value.low, factor * value.high)
            points.append(Point(x, factor * value.value, interval))
        elif value is not None:
            points.append(Point(x, factor * value))
    return tuple(points)


def _state_at(model: Model, load: Fraction, method: str) -> SteadyState | None:
    """Return the state under ``load``, None where there is none or nothing computes it."""
    try:
        return analyse(at_load(model, load), method=method)
    except ModelError:
        return None


def _time_axis(end: float, marks: int = 2) -> tuple[float, str, tuple[float, ...]]:
    """Return seconds in a unit, its name, and marks in it, for an axis from 0 to ``end``."""
    scale = TimeScale.between(Fraction(0), Fraction(end), marks)
    size = float(scale.seconds)
    return size, scale.unit, tuple(float(mark) / size for mark in scale.marks)


# How long jobs wait and stay.


def _spread(state: SteadyState | None, result: SteadyState | Simulation) -> list[Chart]:
    """Return the shares of jobs that wait, and stay, longer than t."""
    values = result.steady_state() if isinstance(result, Simulation) else result
    laws = [("wait longer", values.wait), ("stay longer", values.time_in_system)]
    if state is not None and state is not result:
        laws += [
            ("wait longer, by analysis", state.wait),
            ("stay longer, by analysis", state.time_in_system),
        ]
    known = [(name, law) for name, law in laws if law is not None]
    end = 1.05 * max((law.percentile(_TAIL_END) for _, law in known), default=0.0)
    if end <= 0:
        return []
    size, unit, marks = _time_axis(end, _TIME_MARKS)
    lines = [_tail(name, law, end, size) for name, law in known]
    if isinstance(result, Simulation):
        bands = {"wait longer": result.wait, "stay longer": result.time_in_system}
        lines = [_with_band(line, bands.get(line.name), size) for line in lines]
    return [
        Chart(
            "how long jobs wait and stay",
            f"t, {unit}",
            "jobs longer than t, %",
            tuple(lines),
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


def _with_band(line: Line, law: SampledLaw | None, size: float) -> Line:
    if law is None:
        return line
    tails = [law.tail(x * size) for x in line.xs]
    band = tuple((100 * tail.low, 100 * tail.high) for tail in tails)
    return dataclasses.replace(line, band=band)


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
        line("offered load", day.arrival_rate, service),
    ]
    if model.servers is not None:
        jobs += [level("servers", model.servers), line("waiting", _waiting(day, period, service))]
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


def _waiting(day: Course, period: float, service: float) -> list[float]:
    """Return how many wait at each time of ``day``: those in the system but not on a server.

    What comes and is admitted, less what the system holds more, is what servers complete; and
    each busy server completes 1/service a second. The change of a smooth periodic function is
    that of its Fourier sum.
    """
    import numpy

    present = numpy.array(day.mean_in_system)
    turns = 2j * numpy.pi * numpy.fft.rfftfreq(present.size, period / present.size)
    change = numpy.fft.irfft(turns * numpy.fft.rfft(present), present.size)
    admitted = numpy.array(day.arrival_rate) * (1 - numpy.array(day.loss_probability))
    busy = (admitted - change) * service
    waiting: list[float] = numpy.maximum(present - busy, 0.0).tolist()
    return waiting


def _at_mean_rate(model: Model) -> float | None:
    """Return the share that would be refused if the mean rate held all the time."""
    steady = dataclasses.replace(model, arrivals=Renewal(Exponential(1 / model.arrivals.rate)))
    return analyse(steady).loss_probability
