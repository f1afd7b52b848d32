"""The jobs of a short run, one by one."""

from fractions import Fraction

import pytest

from molva.queueing import Model, ParameterError, events
from molva.queueing.analytic.schedule import schedule


def test_the_adder_refuses_every_second_of_two_at_each_instant() -> None:
    jobs = events("2*D(1ms)/D(0.5ms)/1", 6)

    assert [job.fate for job in jobs] == ["served", "refused"] * 3
    assert [job.arrival for job in jobs] == [Fraction(i, 1000) for i in (0, 0, 1, 1, 2, 2)]


def test_a_waiting_place_lets_the_second_follow_the_first() -> None:
    first, second, third = events("2*D(1ms)/D(0.5ms)/1/1", 3)

    assert (first.start, first.departure) == (0, Fraction(1, 2000))
    assert (second.start, second.departure) == (Fraction(1, 2000), Fraction(1, 1000))
    assert third.start == Fraction(1, 1000)


def test_a_departure_comes_before_an_arrival_at_the_same_instant() -> None:
    jobs = events("D(0.1s)/D(0.3s)/3", 1000)

    assert {job.fate for job in jobs} == {"served"}
    assert [job.server for job in jobs[:7]] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("spec", ["D(0.4s)/D(1s)/2/5", "3*D(0.7s)/D(1/3s)/1/4", "D(1s)/D(7/3s)/2"])
def test_constant_times_give_the_schedule_exactly(spec: str) -> None:
    plan = schedule(Model.parse(spec))
    period = len(plan.waits)
    jobs = events(spec, 40 * period)

    # The schedule starts with the first instant that comes again, wherever that is.
    turns = {plan.waits[at:] + plan.waits[:at] for at in range(period)}
    assert tuple(job.wait for job in jobs[-period:]) in turns


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    spec = "E2(2/s)/LN(mean=1s,scv=1.5)/2/5"

    assert events(spec, 500, seed=7)[:100] == [
        *events(spec, 100, seed=7)[:90],
        *events(spec, 500, seed=7)[90:100],
    ]


def test_a_bulk_is_served_as_one() -> None:
    first, second, third, fourth = events("4*D(1s)/bulk(2, 0.1s + 0.1s*k)/1/inf", 4)

    assert (first.start, first.departure) == (0, Fraction(1, 5))
    assert second.start == third.start == Fraction(1, 5)
    assert second.departure == third.departure == fourth.start == Fraction(1, 2)
    assert fourth.departure == Fraction(7, 10)


def test_an_interrupted_job_goes_on_where_it_was() -> None:
    jobs = events("M(0.9/s)/D(1s)/1/inf/preemptive(1,1)", 200, seed=3)
    interrupted = [job for job in jobs if len(job.stretches) > 1]

    assert interrupted
    for job in interrupted:
        assert job.rank == 1
        assert sum(s.end - s.begin for s in job.stretches) == pytest.approx(1)


def test_who_loses_patience_has_waited_as_long_as_it_lasted() -> None:
    jobs = events("M(2/s)/M(1s)/1/inf/patience(D(1.5s))", 500, seed=2)
    left = [job for job in jobs if job.fate == "abandoned"]

    assert len(left) > 100
    assert all(job.wait == pytest.approx(1.5) and job.start is None for job in left)


def test_the_newest_or_the_most_urgent_goes_first() -> None:
    first, *others = events("4*D(9s)/D(1s)/1/inf/lifo", 4)
    urgent = events("40*D(90s)/D(1s)/1/inf/priority(1,2,3)", 40, seed=5)

    assert first.start == 0
    assert [job.start for job in others] == [3, 2, 1]
    ranks = [job.rank for job in sorted(urgent[1:], key=lambda job: job.start or 0)]
    assert ranks == sorted(ranks)
    assert set(ranks) == {0, 1, 2}


@pytest.mark.parametrize("jobs", [0, -1, 1_000_001])
def test_a_number_of_jobs_outside_the_range_is_refused(jobs: int) -> None:
    with pytest.raises(ParameterError, match="from 1 to 1000000"):
        events("M(1/s)/M(1s)/1", jobs)
