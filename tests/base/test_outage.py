"""Getting over an outage: pauses that grow, two lines in the log, an end at once."""

import asyncio
import itertools
import logging

import pytest

from molva._base.clock import ManualClock
from molva._base.outage import Outage

LOGGER = logging.getLogger("molva.tests.outage")


def made(clock: ManualClock, stopping: asyncio.Event | None = None) -> Outage:
    stopping = stopping or asyncio.Event()
    return Outage("nothing can be done", logger=LOGGER, stopping=stopping, clock=clock)


async def test_pauses_grow_from_a_tenth_of_a_second_to_five_and_begin_anew() -> None:
    clock = ManualClock()
    outage = made(clock)
    tries: list[float] = []

    async def fail(times: int) -> None:
        for _ in range(times):
            tries.append(clock.monotonic())
            await outage.wait(OSError("away"))
        outage.over()

    for times in (9, 3):
        tries.clear()
        failing = asyncio.create_task(fail(times))
        await asyncio.sleep(0)
        for _ in range(3_000):
            await clock.pass_time(0.01)
        await failing
        pauses = [later - sooner for sooner, later in itertools.pairwise(tries)]
        expected = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0][: times - 1]
        assert pauses == pytest.approx(expected, abs=0.05)


async def test_the_log_tells_of_its_beginning_and_its_end_and_nothing_between(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = ManualClock()
    outage = made(clock)
    outage.over()

    for _ in range(12):
        waiting = asyncio.create_task(outage.wait(OSError("refused")))
        await asyncio.sleep(0)
        await clock.pass_time(5.0)
        assert await waiting
    outage.over()
    outage.over()

    assert [record.message for record in caplog.records] == [
        "nothing can be done; trying again until it passes: refused",
        "nothing can be done: over after 60.0 s",
    ]


async def test_what_comes_and_goes_quickly_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    outage = made(clock)
    for _ in range(100):
        waiting = asyncio.create_task(outage.wait(OSError("refused")))
        await asyncio.sleep(0)
        await clock.pass_time(0.1)
        await waiting
        outage.over()
    assert 2 <= len(caplog.records) <= 6  # ten seconds, and each of both lines once in five


async def test_a_stop_ends_a_pause_at_once() -> None:
    stopping = asyncio.Event()
    outage = made(ManualClock(), stopping)
    waiting = asyncio.create_task(outage.wait(OSError("away")))
    await asyncio.sleep(0)

    stopping.set()

    async with asyncio.timeout(10.0):  # no time passes by itself
        assert not await waiting
        assert not await outage.wait(OSError("away"))


async def test_another_reason_is_told_while_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    outage = made(clock)
    for error in (OSError("refused"), OSError("refused"), ValueError("no such vhost")):
        outage.begin(error)
        await clock.pass_time(60.0)

    told = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert told == ["refused", "no such vhost"]
