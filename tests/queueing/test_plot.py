"""Charts: their lines are what the analysis says, and files of them hold all of them."""

import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import pytest

from molva.queueing import Model, NoAnalysisError, ParameterError, analyse, course, simulate
from molva.queueing.plot import Chart, Plot, Point, at_load

DAY = "sin(level=8/h,amplitude=4/h,period=24h)/M(1h)/10/20"


def chart(plot: Plot, title: str) -> Chart:
    [found] = [each for each in plot.charts if each.title == title]
    return found


def value(found: Chart, name: str, x: float) -> float | None:
    [line] = [each for each in found.lines if each.name == name]
    return line.ys[line.xs.index(x)]


def test_a_load_curve_goes_through_the_present_model() -> None:
    plot = Plot.of("M(8/s)/M(200ms)/2/10")
    state = analyse("M(8/s)/M(200ms)/2/10")
    times, shares = chart(plot, "time against load"), chart(plot, "shares against load")

    assert times.y_label == "time, s"
    wait, stay = state.mean_wait, state.mean_time_in_system
    assert wait is not None
    assert stay is not None
    assert times.points == (Point(80.0, wait), Point(80.0, stay))
    assert value(times, "mean wait", 80.0) == state.mean_wait
    assert [point.x for point in shares.points] == [80.0, 80.0]
    assert shares.points[0].y == pytest.approx(100 * (state.utilisation or 0))
    assert shares.points[1].y == pytest.approx(100 * (state.loss_probability or 0))


def test_other_points_of_a_load_curve_are_the_model_under_that_load() -> None:
    times = chart(Plot.of("M(8/s)/M(200ms)/2/10"), "time against load")
    other = analyse("M(15/s)/M(200ms)/2/10")

    assert value(times, "mean wait", 150.0) == pytest.approx(other.mean_wait)
    assert value(times, "mean time in system", 150.0) == pytest.approx(other.mean_time_in_system)


def test_a_load_curve_ends_below_the_full_load_where_all_can_wait() -> None:
    times = chart(Plot.of("M(8/s)/M(200ms)/2/inf"), "time against load")

    assert max(line.xs[-1] for line in times.lines) == 99.0
    assert times.highest < max(y for line in times.lines for y in line.ys if y is not None)


def test_a_station_without_waiting_room_has_no_curve_of_waits() -> None:
    titles = [each.title for each in Plot.of("M(8/s)/M(1s)/10").charts]

    assert titles == ["shares against load", "how long jobs wait and stay"]


@pytest.mark.parametrize(
    "arrivals",
    [
        "M(2s)",
        "2*D(2s)",
        "E3(2s)",
        "H2(mean=2s,scv=4)",
        "LN(mean=2s,scv=2)",
        "U(1s,3s)",
        "G(mean=2s,scv=3)",
        "sin(level=2/s,amplitude=1/s,period=1h)",
        "sin(level=2/s,amplitude=U(1/s,2/s),period=U(1h,2h))",
    ],
)
def test_load_changes_nothing_of_the_arrivals_but_how_fast_they_come(arrivals: str) -> None:
    before = Model.parse(f"{arrivals}/M(3s)/4/5")

    after = at_load(before, Fraction(5, 2))

    assert after.offered_load == pytest.approx(2.5)
    assert (after.service, after.servers, after.waiting) == (before.service, 4, 5)
    assert type(after.arrivals) is type(before.arrivals)
    assert at_load(after, before.arrivals.rate * 3) == before


def test_load_stretches_a_trace(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("10\n11\n14\n")
    before = Model.parse(f"trace({tmp_path / 'trace'})/M(1s)/1/5")

    assert at_load(before, Fraction(1)).offered_load == pytest.approx(1)


def test_a_load_of_nothing_is_refused() -> None:
    with pytest.raises(ParameterError, match="a load is above 0"):
        at_load(Model.parse("M(2s)/M(3s)/4/5"), Fraction(0))


def test_the_distribution_is_that_of_the_state() -> None:
    state = analyse("M(8/s)/M(200ms)/2/inf")
    spread = chart(Plot.of(state), "how long jobs wait and stay")
    wait, stay = spread.lines

    assert spread.x_label == "t, s"
    assert state.wait is not None
    assert state.time_in_system is not None
    for t, y in zip(wait.xs, wait.ys, strict=True):
        assert y == pytest.approx(100 * state.wait.tail(t))
    for t, y in zip(stay.xs, stay.ys, strict=True):
        assert y == pytest.approx(100 * state.time_in_system.tail(t))


def test_times_of_finitely_many_values_are_steps() -> None:
    spread = chart(Plot.of("2*D(1ms)/D(0.5ms)/1/1"), "how long jobs wait and stay")
    wait, stay = spread.lines

    assert wait.steps
    assert stay.steps
    assert spread.x_label == "t, ms"
    assert value(spread, "wait longer", 0.0) == 50
    assert value(spread, "wait longer", 0.5) == 0
    assert value(spread, "stay longer", 0.0) == 100
    assert value(spread, "stay longer", 0.5) == 50
    assert value(spread, "stay longer", 1.0) == 0


def test_a_day_is_that_of_the_forward_equations() -> None:
    model = Model.parse(DAY)
    plot = Plot.of(analyse(model))
    jobs, refused = plot.charts[-2:]
    hours = course(model, points=96)

    assert jobs.x_label == "time, h"
    assert jobs.x_marks == (0, 3, 6, 9, 12, 15, 18, 21, 24)
    assert jobs.lines[0].ys[:-1] == hours.mean_in_system
    assert jobs.lines[1].ys[24] == pytest.approx(12)  # 12/h at six o'clock, an hour each
    assert jobs.lines[2].ys == (10, 10)
    waiting = [y for y in jobs.lines[3].ys[:-1] if y is not None]
    # The mean over the day is known from the probabilities of all states.
    assert sum(waiting) / 96 == pytest.approx(analyse(model).mean_waiting, rel=1e-6)
    assert all(0 <= w <= n for w, n in zip(waiting, hours.mean_in_system, strict=True))
    assert refused.lines[0].ys[36] == pytest.approx(100 * hours.loss_probability[36])
    assert refused.lines[1].ys[0] == pytest.approx(2.42, abs=0.005)
    assert refused.lines[2].ys[0] == pytest.approx(0.095, abs=0.0005)


def test_what_has_no_analysis_has_no_charts() -> None:
    with pytest.raises(NoAnalysisError):
        Plot.of("sin(level=8/h,amplitude=U(1/h,4/h),period=24h)/D(1h)/10/20")


# What was simulated.


def test_a_simulated_point_stands_with_its_interval_on_the_line_of_the_analysis() -> None:
    result = simulate("M(8/s)/M(200ms)/2/10", jobs=20_000, seed=3)
    plot = Plot.of(result)
    times = chart(plot, "time against load (lines: closed form)")
    state = analyse("M(8/s)/M(200ms)/2/10")

    assert plot.title.endswith("simulation, 95 % interval")
    assert result.mean_wait is not None
    point = times.points[0]
    assert (point.x, point.y) == (80.0, result.mean_wait.value)
    assert point.interval == (result.mean_wait.low, result.mean_wait.high)
    assert value(times, "mean wait", 80.0) == state.mean_wait


def test_a_simulated_distribution_has_its_band_and_the_analysis_beside_it() -> None:
    result = simulate("M(8/s)/M(200ms)/2/10", jobs=20_000, seed=3)
    spread = chart(Plot.of(result), "how long jobs wait and stay")

    assert [line.name for line in spread.lines] == [
        *["wait longer", "stay longer"],
        *["wait longer, by analysis", "stay longer, by analysis"],
    ]
    simulated = spread.lines[0]
    assert result.wait is not None
    assert simulated.band is not None
    tail = result.wait.tail(simulated.xs[20])
    assert simulated.ys[20] == pytest.approx(100 * tail.value)
    assert simulated.band[20] == pytest.approx((100 * tail.low, 100 * tail.high))
    assert spread.lines[2].band is None


def test_what_no_analysis_knows_has_the_charts_of_the_simulation() -> None:
    plot = Plot.of(simulate("M(8/s)/M(200ms)/2/10/priority(3,7)", jobs=5000))

    assert [each.title for each in plot.charts] == ["how long jobs wait and stay"]


def test_a_simulated_picture_has_bars_and_bands(tmp_path: Path) -> None:
    plot = Plot.of(simulate("M(8/s)/M(200ms)/2/10", jobs=5000))
    plot.save(tmp_path / "plot.svg")

    ids = [each.get("id") or "" for each in ElementTree.parse(tmp_path / "plot.svg").iter()]

    assert sum(each.startswith("LineCollection") for each in ids) == 4  # bars of intervals
    assert sum(each.startswith("FillBetween") for each in ids) == 2


# Drawings.


def test_a_chart_in_a_terminal_marks_the_present_model() -> None:
    text = Plot.of("M(8/s)/M(1s)/10").text(60)
    shares = text.split("\n\n")[1].splitlines()

    assert shares[0] == "shares against load (share, %)"
    assert sum(line.count("◆") for line in shares[1:-1]) == 2
    # 80 % of an axis that ends at 200 %, 49 columns from its beginning.
    assert {line.index("◆") for line in shares[1:-1] if "◆" in line} == {10 + round(0.4 * 48)}
    assert shares[-1].strip() == "• servers busy   + refused   ◆ this model"
    assert max(map(len, text.splitlines())) <= 60


def test_the_file_has_the_drawing_of_the_terminal(tmp_path: Path) -> None:
    plot = Plot.of("M(8/s)/M(1s)/10")

    plot.save(tmp_path / "plot.txt")

    assert (tmp_path / "plot.txt").read_text() == plot.text() + "\n"


def test_an_svg_holds_every_line_and_every_point(tmp_path: Path) -> None:
    plot = Plot.of("M(8/s)/M(200ms)/2/10")
    plot.save(tmp_path / "plot.svg")

    tree = ElementTree.parse(tmp_path / "plot.svg")

    ids = [each.get("id") or "" for each in tree.iter()]
    for found in plot.charts:
        for line in found.lines:
            assert line.name.replace(" ", "-") in ids
    assert ids.count("present") == sum(len(found.points) for found in plot.charts) == 4
    text = "".join(tree.getroot().itertext())
    for word in ("offered load, % of all servers", "time, s", "mean wait", "closed form"):
        assert word in text


def test_an_svg_is_the_same_on_each_run(tmp_path: Path) -> None:
    plot = Plot.of("M(8/s)/M(1s)/10")

    plot.save(tmp_path / "one.svg")
    plot.save(tmp_path / "two.svg")

    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_a_png_is_a_picture_with_something_on_it(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    Plot.of("M(8/s)/M(200ms)/2/10").save(path)

    data = path.read_bytes()

    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width == round(3 * 4.4 * 150)
    assert height > 500
    assert len(data) > 20_000  # an empty page of this size has some 6,000 bytes


@pytest.mark.parametrize("name", ["plot.gif", "plot", "plot.png/x.png"])
def test_a_file_that_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "plot.png").write_text("a file, no folder")

    with pytest.raises(ParameterError, match=r"ends in \.png, \.svg, \.txt|cannot be written"):
        Plot.of("M(8/s)/M(1s)/10").save(tmp_path / name)


def test_computing_and_drawing_text_need_no_library() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'numpy', 'scipy']))\n"
        "from molva.queueing.plot import Plot\n"
        "from molva.queueing.topology import Topology\n"
        "Plot.of('M(8/s)/M(1s)/10').text(); Topology.of('queue', services=3).text()\n"
        "try: Plot.of('M(8/s)/M(1s)/10').save('x.png')\n"
        "except ImportError: print('none')\n"
        "except ValueError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert result.stdout.strip() == "a picture needs matplotlib: pip install 'molva[plot]'"
