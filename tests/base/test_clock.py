"""The clock that stands still until it is moved."""

import asyncio

from molva._base.clock import SYSTEM_CLOCK, ManualClock


async def test_time_stands_still_until_it_is_moved() -> None:
    clock = ManualClock(now_us=1_000_000)
    await asyncio.sleep(0.002)
    before = (clock.now_us(), clock.monotonic())

    await clock.pass_time(1.5)

    assert before == (1_000_000, 0.0)
    assert (clock.now_us(), clock.monotonic()) == (2_500_000, 1.5)


async def test_sleepers_wake_in_the_order_in_which_they_are_due() -> None:
    clock = ManualClock()
    woken: list[tuple[str, float]] = []

    async def sleep(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.monotonic()))

    tasks = [
        asyncio.create_task(sleep(name, seconds))
        for name, seconds in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("a2", 1.0), ("never", 9.0))
    ]
    await clock.pass_time(5.0)

    assert woken == [("a", 1.0), ("a2", 1.0), ("b", 2.0), ("c", 3.0)]
    assert clock.monotonic() == 5.0
    tasks[-1].cancel()


async def test_a_sleeper_that_sleeps_again_wakes_again_on_the_way() -> None:
    clock = ManualClock()
    ticks: list[float] = []

    async def tick() -> None:
        while True:
            await clock.sleep(1.0)
            ticks.append(clock.monotonic())

    ticking = asyncio.create_task(tick())
    await clock.pass_time(3.5)
    ticking.cancel()

    assert ticks == [1.0, 2.0, 3.0]


async def test_a_task_that_has_not_run_yet_sleeps_from_the_time_before() -> None:
    clock = ManualClock()
    sleeping = asyncio.create_task(clock.sleep(1.0))

    await clock.pass_time(1.0)

    assert sleeping.done()


async def test_a_cancelled_sleeper_is_passed_over() -> None:
    clock = ManualClock()
    sleeping = asyncio.create_task(clock.sleep(1.0))
    await asyncio.sleep(0)
    sleeping.cancel()

    await clock.pass_time(2.0)

    assert sleeping.cancelled()


async def test_sleeping_for_no_time_lets_others_run() -> None:
    clock = ManualClock()
    ran = asyncio.Event()
    asyncio.get_running_loop().call_soon(ran.set)

    await clock.sleep(0.0)

    assert ran.is_set()


async def test_the_system_clock_sleeps_for_real() -> None:
    before = SYSTEM_CLOCK.monotonic()

    await SYSTEM_CLOCK.sleep(0.01)

    assert 0.009 < SYSTEM_CLOCK.monotonic() - before < 60.0
    assert SYSTEM_CLOCK.now_us() > 1_700_000_000_000_000
