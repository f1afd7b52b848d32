"""Timing diagrams: what is in them, exactly, and that drawings hold all of it."""

import itertools
import random
import struct
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import pytest

from molva.queueing import Model, ParameterError, analyse, events
from molva.queueing.simulate import Job, Stretch
from molva.queueing.timeline import Bar, Stay, Timeline, is_determined

MS = Fraction(1, 1000)

# The adder of the manual: half a millisecond to add two numbers.
ONE = "D(1ms)/D(0.5ms)/1"
TWO = "2*D(1ms)/D(0.5ms)/1"
TWO_SERVERS = "2*D(1ms)/D(0.5ms)/2"
ONE_PLACE = "2*D(1ms)/D(0.5ms)/1/1"


def over(spec: str, begin: int = 0, duration: int = 3, seed: int = 0) -> Timeline:
    return Timeline.of(spec, begin=begin * MS, duration=duration * MS, seed=seed)


def halves(*counts: int) -> tuple[Fraction, ...]:
    """Return instants given in half milliseconds."""
    return tuple(count * MS / 2 for count in counts)


# What is in them.


def test_one_request_a_millisecond_keeps_the_server_busy_half_of_the_time() -> None:
    adder = over(ONE)

    assert adder.road == "exact"
    assert adder.arrivals == halves(0, 2, 4)
    assert adder.bars == (
        Bar(1, 0 * MS, MS / 2, (1,)),
        Bar(1, MS, 3 * MS / 2, (2,)),
        Bar(1, 2 * MS, 5 * MS / 2, (3,)),
    )
    assert adder.departures == halves(1, 3, 5)
    assert (adder.refusals, adder.stays) == ((), ())
    assert adder.busy_shares == (Fraction(1, 2),)


def test_the_second_of_two_requests_is_refused() -> None:
    adder = over(TWO)

    assert adder.arrivals == halves(0, 0, 2, 2, 4, 4)
    assert adder.refusals == halves(0, 2, 4)
    assert [bar.jobs for bar in adder.bars] == [(1,), (3,), (5,)]
    assert adder.departures == halves(1, 3, 5)
    assert adder.busy_shares == (Fraction(1, 2),)


def test_a_second_server_takes_the_second_request() -> None:
    adder = over(TWO_SERVERS)

    assert adder.refusals == ()
    assert [(bar.server, bar.jobs) for bar in adder.bars] == [
        *[(1, (1,)), (1, (3,)), (1, (5,))],
        *[(2, (2,)), (2, (4,)), (2, (6,))],
    ]
    assert adder.departures == halves(1, 1, 3, 3, 5, 5)
    assert adder.busy_shares == (Fraction(1, 2), Fraction(1, 2))


def test_a_waiting_place_holds_the_second_request() -> None:
    adder = over(ONE_PLACE)

    assert adder.refusals == ()
    assert adder.stays == (
        Stay(1, 0 * MS, MS / 2, 2),
        Stay(1, MS, 3 * MS / 2, 4),
        Stay(1, 2 * MS, 5 * MS / 2, 6),
    )
    assert [bar.end - bar.begin for bar in adder.bars] == [MS / 2] * 6
    # The job that departs at 3 ms belongs to the window, those that arrive then do not.
    assert adder.departures == halves(1, 2, 3, 4, 5, 6)
    assert adder.busy_shares == (Fraction(1),)


def test_a_departure_at_the_beginning_belongs_to_the_window_before() -> None:
    first, second = over(ONE_PLACE, 0, 2), over(ONE_PLACE, 2, 2)

    assert first.departures[-1] == 2 * MS
    assert second.departures[0] == 5 * MS / 2
    assert first.arrivals + second.arrivals == over(ONE_PLACE, 0, 4).arrivals
    assert first.departures + second.departures == over(ONE_PLACE, 0, 4).departures


def test_what_crosses_an_edge_of_the_window_is_cut_there() -> None:
    cut = Timeline.of("D(1ms)/D(1.5ms)/1/2", begin=20 * MS, duration=6 * MS)

    assert cut.bars[0].begin == 20 * MS
    assert cut.bars[-1].end == 26 * MS
    assert cut.busy_shares == (Fraction(1),)
    assert all(20 * MS <= stay.begin < stay.end <= 26 * MS for stay in cut.stays)
    assert {job.index + 1 for job in cut.present} >= {bar.jobs[0] for bar in cut.bars}


def test_constant_times_that_no_float_holds_meet_exactly() -> None:
    # A float sum of 0.1 s is not 0.3 s: every third job would be refused.
    meeting = Timeline.of("D(0.1s)/D(0.3s)/3", duration=100)

    assert len(meeting.refusals) == 0
    assert len(meeting.arrivals) == 1000
    assert meeting.bars[0].end == meeting.bars[1].begin == Fraction(3, 10)


def test_jobs_of_a_bulk_share_a_bar() -> None:
    bulks = Timeline.of("3*D(2ms)/bulk(4, 1ms + 0.5ms*k)/1/inf", duration=4 * MS)

    assert bulks.bars[1] == Bar(1, 3 * MS / 2, 7 * MS / 2, (2, 3))
    assert [bar.name for bar in bulks.bars] == ["1", "2–3", "4–6"]


def test_the_lowest_place_that_is_free_is_taken() -> None:
    lifo = over("D(1ms)/D(1.5ms)/1/3/lifo", 0, 8)

    assert [(stay.place, stay.job) for stay in lifo.stays] == [
        *[(1, 2), (1, 3), (1, 4)],
        *[(2, 5), (2, 6), (2, 7)],
        (3, 8),
    ]


def test_a_place_that_was_left_is_taken_again_before_a_higher_one() -> None:
    fifo = over("D(1ms)/D(1.5ms)/1/2", 0, 6)

    # Job 4 leaves place 1 at 4.5 ms, while job 5 is in place 2; job 6 comes at 5 ms.
    assert [(stay.place, stay.job) for stay in fifo.stays] == [
        *[(1, 2), (1, 3), (1, 4), (1, 6)],
        (2, 5),
    ]


def test_jobs_that_gave_up_waited_until_then() -> None:
    short = over("2*D(4ms)/D(3ms)/1/1/patience(D(1ms))", 0, 8)

    assert short.abandonments == (MS, 5 * MS)
    assert short.stays == (Stay(1, 0 * MS, MS, 2), Stay(1, 4 * MS, 5 * MS, 4))
    assert short.departures == (3 * MS, 7 * MS)


def test_an_interrupted_job_waits_again() -> None:
    urgent = Timeline.of("M(3/s)/M(200ms)/1/inf/preemptive(1,1)", duration=30, seed=2)
    parts = [job for job in urgent.jobs if len(job.stretches) > 1]

    assert parts
    job = parts[0]
    waits = [stay for stay in urgent.stays if stay.job == job.index + 1]
    assert Fraction(job.stretches[0].end) in {stay.begin for stay in waits}
    assert sum(job.index + 1 in bar.jobs for bar in urgent.bars) == len(job.stretches)


def test_any_number_of_servers_are_those_that_had_work() -> None:
    many = over("3*D(1ms)/D(2ms)/inf", 0, 4)

    assert many.servers == 6
    assert many.refusals == ()


@pytest.mark.parametrize(
    "spec",
    [
        "M(8/s)/M(200ms)/2/3",
        "E3(8/s)/U(0s,0.4s)/3/inf/lifo",
        "2*M(4/s)/LN(mean=200ms,scv=2)/2/5/random",
        "sin(level=8/s,amplitude=U(2/s,8/s),period=U(2s,3s))/M(200ms)/2/9",
        "M(40/s)/bulk(8, 50ms + 10ms*k)/1/20",
        "M(12/s)/M(200ms)/2/10/patience(M(0.2s))",
        "M(8/s)/M(200ms)/2/10/preemptive(3,7)",
    ],
)
def test_a_simulated_timeline_holds_together(spec: str) -> None:
    found = Timeline.of(spec, duration=40, seed=5)
    model = found.model

    assert found.road == "simulation, seed 5"
    per_server = {n: [bar for bar in found.bars if bar.server == n] for n in range(1, 4)}
    for bars in per_server.values():
        assert all(a.end <= b.begin for a, b in itertools.pairwise(bars))
    places = {stay.place for stay in found.stays}
    assert model.waiting is None or max(places) <= model.waiting
    for place in places:
        mine = [stay for stay in found.stays if stay.place == place]
        assert all(a.end <= b.begin for a, b in itertools.pairwise(mine))
    arrived = len(found.arrivals) - len(found.refusals) - len(found.abandonments)
    there = sum(
        job.fate == "served" and job.departure is not None and job.departure > found.end
        for job in found.present
    ) + sum(job.fate == "abandoned" and (job.departure or 0) > found.end for job in found.present)
    assert arrived == len(found.departures) + there


def test_a_long_timeline_agrees_with_the_analysis() -> None:
    long = Timeline.of("M(8/s)/M(200ms)/2/3", duration=4000, seed=1)
    state = analyse(long.model)

    assert state.utilisation is not None
    assert state.loss_probability is not None
    # Some five standard deviations of 32,000 correlated jobs.
    busy = float(sum(long.busy_shares)) / 2
    assert busy == pytest.approx(state.utilisation, abs=0.03)
    refused = len(long.refusals) / len(long.arrivals)
    assert refused == pytest.approx(state.loss_probability, abs=0.02)


def test_the_same_seed_gives_the_same_timeline() -> None:
    spec = "M(8/s)/M(200ms)/2/3"

    assert Timeline.of(spec, duration=9, seed=4) == Timeline.of(spec, duration=9, seed=4)
    assert Timeline.of(spec, duration=9, seed=4) != Timeline.of(spec, duration=9, seed=5)


def test_a_trace_is_replayed_from_its_first_instant(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("17.000\n17.357\n17.357\n17.400\n18.714\n")
    model = f"trace({tmp_path / 'log'})/D(357ms)/1/1"

    replay = Timeline.of(model, duration=Fraction(1))

    assert replay.road == "exact"
    assert replay.arrivals == tuple(Fraction(ms, 1000) for ms in (0, 357, 357, 400))
    # The first is done when two more come: one is served, one waits, the last is refused.
    assert replay.refusals == (Fraction(2, 5),)
    assert [bar.end for bar in replay.bars] == [Fraction(ms, 1000) for ms in (357, 714, 1000)]


@pytest.mark.parametrize(
    ("spec", "determined"),
    [
        (ONE_PLACE, True),
        ("D(1ms)/D(0.5ms)/1/3/lifo", True),
        ("D(1ms)/bulk(3,1ms)/1/3", True),
        ("D(1ms)/D(0.5ms)/1/3/random", False),
        ("D(1ms)/D(0.5ms)/1/3/priority(1,2)", False),
        ("D(1ms)/D(0.5ms)/1/3/patience(M(1s))", False),
        ("D(1ms)/M(0.5ms)/1", False),
        ("M(1ms)/D(0.5ms)/1", False),
    ],
)
def test_exact_is_what_no_lot_decides(spec: str, determined: bool) -> None:
    assert is_determined(Model.parse(spec)) == determined


def test_recorded_jobs_can_be_drawn() -> None:
    jobs = (
        Job(0, 0.0, "served", 2.0, (Stretch(0.0, 2.0, 0),)),
        Job(1, 1.0, "refused", None),
    )
    own = Timeline(Model.parse("M(1/s)/M(1s)/1"), jobs, Fraction(0), Fraction(4), "measured")

    assert own.text(50).splitlines()[0] == "M(1/s)/M(1s)/1   measured"
    assert own.refusals == (Fraction(1),)


@pytest.mark.parametrize(
    "job",
    [
        Job(0, 1.0, "served", 2.0, (Stretch(0.5, 2.0, 0),)),
        Job(0, 1.0, "served", 1.5, (Stretch(1.0, 2.0, 0),)),
        Job(0, 1.0, "refused", 2.0),
        Job(0, 1.0, "served", None, (Stretch(1.0, 2.0, 0),)),
        Job(0, 1.0, "abandoned", None),
    ],
)
def test_a_job_that_cannot_have_been_is_refused(job: Job) -> None:
    with pytest.raises(ParameterError, match="job 1 "):
        Timeline(Model.parse("M(1/s)/M(1s)/1"), (job,), Fraction(0), Fraction(4))


@pytest.mark.parametrize(
    ("begin", "duration", "words"),
    [
        (0, 0, "ends after it began"),
        (-1, 2, "begins at 0 or later"),
        (0, 1000, r"some 1e\+06 jobs arrive until 1000 s; a timeline is played for at most 100000"),
    ],
)
def test_a_window_that_is_none_or_too_long_is_refused(
    begin: int, duration: int, words: str
) -> None:
    with pytest.raises(ParameterError, match=words):
        Timeline.of(ONE, begin=begin, duration=duration)


# Drawings.


def drawn(spec: str, duration: int = 3) -> list[str]:
    """Return the drawing in 60 columns, without its title."""
    return over(spec, 0, duration).text(60).splitlines()[2:]


def test_the_adder_at_one_request_a_millisecond_in_a_terminal() -> None:
    assert drawn(ONE) == [
        "ms          0             1             2             3",
        "            ┬─────────────┬─────────────┬─────────────┬",
        "arrivals    ↓             ↓             ↓",
        "refused",
        "server 1    1━━━━━━       2━━━━━━       3━━━━━━",
        "departures         ↑             ↑             ↑",
        "",
        "3 arrived, 0 refused, 3 departed, server busy 50 %",
    ]


def test_the_adder_at_two_requests_a_millisecond_in_a_terminal() -> None:
    assert drawn(TWO) == [
        "ms          0             1             2             3",
        "            ┬─────────────┬─────────────┬─────────────┬",
        "arrivals    2             2             2",
        "refused     ×             ×             ×",
        "server 1    1━━━━━━       3━━━━━━       5━━━━━━",
        "departures         ↑             ↑             ↑",
        "",
        "6 arrived, 3 refused, 3 departed, server busy 50 %",
    ]


def test_two_adders_in_a_terminal() -> None:
    assert drawn(TWO_SERVERS) == [
        "ms          0             1             2             3",
        "            ┬─────────────┬─────────────┬─────────────┬",
        "arrivals    2             2             2",
        "refused",
        "server 1    1━━━━━━       3━━━━━━       5━━━━━━",
        "server 2    2━━━━━━       4━━━━━━       6━━━━━━",
        "departures         2             2             2",
        "",
        "6 arrived, 0 refused, 6 departed, each server busy 50 %",
    ]


def test_one_adder_with_a_waiting_place_in_a_terminal() -> None:
    assert drawn(ONE_PLACE) == [
        "ms          0             1             2             3",
        "            ┬─────────────┬─────────────┬─────────────┬",
        "arrivals    2             2             2",
        "refused",
        "place 1     2┄┄┄┄┄┄       4┄┄┄┄┄┄       6┄┄┄┄┄┄",
        "server 1    1━━━━━━2━━━━━━3━━━━━━4━━━━━━5━━━━━━6━━━━━━",
        "departures         ↑      ↑      ↑      ↑      ↑      ↑",
        "",
        "6 arrived, 0 refused, 6 departed, server busy 100 %",
    ]


def test_a_drawing_is_no_wider_than_the_terminal() -> None:
    dice = random.Random(1)
    for _ in range(40):
        spec = f"{dice.randint(1, 3)}*M({dice.randint(1, 30)}/s)/M(200ms)/{dice.randint(1, 20)}/9"
        width = dice.randint(40, 160)
        found = Timeline.of(spec, begin=dice.randint(0, 30), seed=dice.randint(0, 99))
        lines = found.text(width).splitlines()[2:-2]
        assert max(map(len, lines)) <= width, (spec, width)


def test_of_many_servers_a_row_says_how_many_work() -> None:
    lines = Timeline.of("D(1ms)/D(13ms)/13/0", duration=20 * MS).text(60).splitlines()
    [busy] = [line for line in lines if line.startswith("busy")]

    # A place for each millisecond: one more works in each, until all thirteen do.
    assert busy[12:].rstrip() == "112233445566778899" + "+" * 22


def test_an_svg_holds_every_bar_wait_and_mark(tmp_path: Path) -> None:
    found = over(ONE_PLACE, 0, 4)
    found.save(tmp_path / "adder.svg")

    tree = ElementTree.parse(tmp_path / "adder.svg")

    ids = [each.get("id") or "" for each in tree.iter()]
    assert [each for each in ids if each.startswith("busy-")] == [
        f"busy-server-1-job-{job}" for job in range(1, 9)
    ]
    assert [each for each in ids if each.startswith("waiting-")] == [
        f"waiting-place-1-job-{job}" for job in (2, 4, 6, 8)
    ]
    assert marks(tree, "arrivals") == len(set(found.arrivals)) == 4
    assert marks(tree, "departures") == len(set(found.departures)) == 8
    text = "".join(tree.getroot().itertext())
    for word in ("arrivals", "place 1", "server 1", "departures", "time, ms", "server busy 100 %"):
        assert word in text


def test_an_svg_marks_every_refusal(tmp_path: Path) -> None:
    over(TWO, 0, 4).save(tmp_path / "adder.svg")

    tree = ElementTree.parse(tmp_path / "adder.svg")

    assert marks(tree, "refused") == 4
    assert marks(tree, "arrivals") == 4


def marks(tree: "ElementTree.ElementTree[ElementTree.Element]", row: str) -> int:
    """Return how many marks are in the row of this name."""
    [group] = [each for each in tree.iter() if each.get("id") == row]
    return sum(each.tag.endswith("}use") for each in group.iter())


def test_a_png_shows_the_bars_in_their_colours(tmp_path: Path) -> None:
    from PIL import Image

    over(ONE_PLACE, 0, 4).save(tmp_path / "adder.png")

    with Image.open(tmp_path / "adder.png") as picture:
        width, height = picture.size
        colours = {c: n for n, c in picture.convert("RGB").getcolors(1 << 24) or []}
    assert (width, height) > (1000, 300)
    # Half of the bars are of each shade; all of them cover what eight bars of the width do.
    dark, light = colours[(0x2F, 0x5D, 0x8C)], colours[(0x8F, 0xB3, 0xD9)]
    assert dark == pytest.approx(light, rel=0.1)
    assert dark + light > 0.04 * width * height


def test_a_png_of_a_busy_day_is_written(tmp_path: Path) -> None:
    day = Timeline.of("M(300/h)/M(3min)/20/40", duration=24 * 3600)
    day.save(tmp_path / "day.png")

    data = (tmp_path / "day.png").read_bytes()

    assert len(day.arrivals) > 6000
    assert struct.unpack(">II", data[16:24]) > (1000, 300)


def test_a_timeline_is_of_the_jobs_of_the_run() -> None:
    spec = "M(8/s)/M(200ms)/2/3"
    found = Timeline.of(spec, duration=5, seed=3)

    assert list(found.jobs) == events(spec, len(found.jobs), seed=3)
