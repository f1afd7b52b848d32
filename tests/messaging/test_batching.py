"""The batcher: order, results, one call at a time, no timer."""

import asyncio
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molva._base.clock import ManualClock
from molva.messaging._batching import Batcher
from molva.messaging.driver import DearCalls


class Calls:
    """A call that can be held up, and that notes what it was given."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.running = self.most_running = 0
        self.go = asyncio.Event()
        if not held:
            self.go.set()

    async def __call__(self, items: list[int]) -> Sequence[int]:
        self.batches.append(items)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await self.go.wait()
        self.running -= 1
        if any(item < 0 for item in items):
            raise OSError(f"refused {items}")
        return [item * 10 for item in items]


async def _wait(batcher: Batcher[int, int], item: int) -> int:
    return await batcher.submit(item)


async def test_a_lone_item_goes_at_once() -> None:
    calls = Calls()
    batcher = Batcher(calls)
    for item in (1, 2, 3):
        steps = 0
        waiting = asyncio.create_task(_wait(batcher, item))
        while not waiting.done():
            await asyncio.sleep(0)
            steps += 1

        assert waiting.result() == item * 10
        assert steps < 10
    assert calls.batches == [[1], [2], [3]]


async def test_what_comes_during_a_call_travels_together_in_the_next() -> None:
    calls = Calls(held=True)
    batcher = Batcher(calls)
    sends = [asyncio.create_task(_wait(batcher, 1))]
    await asyncio.sleep(0.001)
    sends += [asyncio.create_task(_wait(batcher, item)) for item in range(2, 12)]
    await asyncio.sleep(0.001)

    waiting = batcher.waiting
    calls.go.set()
    results = await asyncio.gather(*sends)

    assert waiting == 10
    assert calls.batches == [[1], list(range(2, 12))]
    assert results == [item * 10 for item in range(1, 12)]


async def test_a_call_takes_no_more_than_it_may() -> None:
    calls = Calls()
    batcher = Batcher(calls, max_items=4)

    await asyncio.gather(*(_wait(batcher, item) for item in range(10)))

    assert calls.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_one_call_runs_at_a_time() -> None:
    calls = Calls(held=True)
    batcher = Batcher(calls, max_items=2)
    sends = [asyncio.create_task(_wait(batcher, item)) for item in range(20)]
    await asyncio.sleep(0.001)
    calls.go.set()
    await asyncio.gather(*sends)

    assert calls.most_running == 1


async def test_an_exception_reaches_all_of_its_call_alone() -> None:
    calls = Calls()
    batcher = Batcher(calls, max_items=2)

    results = await asyncio.gather(
        *(_wait(batcher, item) for item in (1, 2, -3, 4, 5, 6)), return_exceptions=True
    )

    assert [type(result) for result in results] == [int, int, OSError, OSError, int, int]
    assert [result for result in results if type(result) is int] == [10, 20, 50, 60]


async def test_a_cancelled_waiter_does_not_hurt_the_others() -> None:
    calls = Calls(held=True)
    batcher = Batcher(calls)
    sends = [asyncio.create_task(_wait(batcher, item)) for item in range(5)]
    await asyncio.sleep(0.001)
    sends[2].cancel()
    await asyncio.sleep(0)
    calls.go.set()

    results = await asyncio.gather(*sends, return_exceptions=True)

    assert [r for r in results if not isinstance(r, BaseException)] == [0, 10, 30, 40]
    assert await batcher.submit(9) == 90


async def test_a_call_with_too_few_results_fails_its_items() -> None:
    async def short(items: list[int]) -> Sequence[int]:
        return items[1:]

    batcher = Batcher(short)

    with pytest.raises(RuntimeError, match="1 results for 2 items"):
        await asyncio.gather(_wait(batcher, 1), _wait(batcher, 2))


async def test_many_are_handed_over_in_slices() -> None:
    calls = Calls()
    batcher = Batcher(calls, max_items=4)

    results = await batcher.submit_many(list(range(10)))

    assert results == [item * 10 for item in range(10)]
    assert [len(batch) for batch in calls.batches] == [4, 4, 2]


async def test_many_get_a_result_or_an_exception_each() -> None:
    batcher = Batcher(Calls(), max_items=2)

    results = await batcher.submit_many([1, 2, -3, 4, 5])

    assert [type(result) for result in results] == [int, int, OSError, OSError, int]


async def test_many_of_nothing_are_nothing() -> None:
    calls = Calls()

    assert await Batcher(calls).submit_many([]) == []
    assert calls.batches == []


async def test_draining_waits_for_every_result() -> None:
    calls = Calls(held=True)
    batcher = Batcher(calls, max_items=2)
    sends = [asyncio.create_task(_wait(batcher, item)) for item in range(5)]
    await asyncio.sleep(0)
    draining = asyncio.create_task(batcher.drain())
    await asyncio.sleep(0.001)
    assert not draining.done()

    calls.go.set()
    await draining

    assert [len(batch) for batch in calls.batches] == [2, 2, 1]
    assert await asyncio.gather(*sends) == [0, 10, 20, 30, 40]


async def test_draining_waits_for_slices_that_are_still_to_come() -> None:
    calls = Calls()
    batcher = Batcher(calls, max_items=2)
    many = asyncio.create_task(batcher.submit_many(list(range(9))))
    await asyncio.sleep(0)

    async with asyncio.timeout(5):
        await batcher.drain()
        assert await many == [item * 10 for item in range(9)]


async def test_draining_ends_when_what_was_to_come_is_cancelled() -> None:
    calls = Calls(held=True)
    batcher = Batcher(calls, max_items=2)
    many = asyncio.create_task(batcher.submit_many(list(range(9))))
    await asyncio.sleep(0.001)
    draining = asyncio.create_task(batcher.drain())
    await asyncio.sleep(0.001)
    many.cancel()
    calls.go.set()

    async with asyncio.timeout(5):
        await draining


async def test_draining_what_was_never_used_is_nothing() -> None:
    await Batcher(Calls()).drain()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_item_gets_its_own_result_in_the_order_submitted(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32))
    max_items = data.draw(st.integers(1, 7))
    groups = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    dear = data.draw(st.sampled_from([None, DearCalls(2, 0.0002)]))

    async def scenario() -> None:
        rng = random.Random(seed)
        calls: list[int] = []

        async def call(items: list[int]) -> Sequence[int]:
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
            calls.extend(items)
            if rng.random() < 0.1:
                raise OSError(items)
            return [item * 10 for item in items]

        batcher = Batcher(call, max_items=max_items, dear=dear)
        submitted: list[int] = []
        tasks: list[tuple[list[int], asyncio.Task[list[int | BaseException]]]] = []

        async def lone(item: int) -> list[int | BaseException]:
            try:
                return [await batcher.submit(item)]
            except OSError as error:
                return [error]

        number = 0
        for size in groups:
            items = list(range(number, number + size))
            number += size
            many = size > 1
            tasks.append(
                (items, asyncio.create_task(batcher.submit_many(items) if many else lone(items[0])))
            )
            submitted += items
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            if rng.random() < 0.1:
                tasks[-1][1].cancel()
        await asyncio.wait([task for _, task in tasks])
        await batcher.drain()

        for items, task in tasks:
            positions = [calls.index(item) for item in items if item in calls]
            assert positions == sorted(positions)
            if not task.cancelled():
                for item, result in zip(items, task.result(), strict=True):
                    if isinstance(result, OSError):
                        assert item in result.args[0]
                    else:
                        assert result == item * 10
        assert len(set(calls)) == len(calls)

    asyncio.run(scenario())


async def test_giving_up_answers_all_who_wait_and_sends_nothing_that_waited() -> None:
    calls = Calls(held=True)
    batcher = Batcher(calls)
    under_way = asyncio.create_task(_wait(batcher, 1))
    await asyncio.sleep(0.001)
    behind = [asyncio.create_task(_wait(batcher, 2)), asyncio.create_task(_wait(batcher, 3))]
    many = asyncio.create_task(batcher.submit_many([4, 5]))
    await asyncio.sleep(0.001)
    assert batcher.busy
    assert batcher.call_seconds > 0.0

    given_up = batcher.fail(OSError("given up"))
    found = await asyncio.gather(under_way, *behind, return_exceptions=True)

    assert given_up == 5
    assert [str(each) for each in [*found, *await many]] == ["given up"] * 5
    later = asyncio.create_task(_wait(batcher, 6))
    await asyncio.sleep(0.001)
    assert calls.batches == [[1]]
    calls.go.set()
    assert await later == 60
    assert calls.batches == [[1], [6]]
    assert not batcher.busy
    assert batcher.call_seconds == 0.0


def _dear(clock: ManualClock) -> "tuple[Calls, Batcher[int, int]]":
    calls = Calls()
    return calls, Batcher(calls, dear=DearCalls(fewest=3, seconds=0.005), clock=clock)


async def _some(batcher: Batcher[int, int], *items: int) -> "list[asyncio.Task[int]]":
    tasks = [asyncio.create_task(_wait(batcher, item)) for item in items]
    await _turns()
    return tasks


async def _turns() -> None:
    """Let the loop do all that waits for no time: the clock here is moved by hand."""
    for _ in range(30):
        await asyncio.sleep(0)


async def test_a_dear_call_waits_for_as_many_as_the_last_had() -> None:
    calls, batcher = _dear(ManualClock())
    await asyncio.gather(*await _some(batcher, 1, 2, 3, 4))

    tasks = await _some(batcher, 5, 6)
    assert calls.batches == [[1, 2, 3, 4]]
    tasks += await _some(batcher, 7, 8)

    assert calls.batches == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert await asyncio.gather(*tasks) == [50, 60, 70, 80]


async def test_a_dear_call_waits_no_longer_than_it_costs_and_only_behind_many() -> None:
    clock = ManualClock()
    calls, batcher = _dear(clock)
    await asyncio.gather(*await _some(batcher, 1, 2, 3, 4))

    tasks = await _some(batcher, 5, 6)
    await clock.pass_time(0.0049)
    assert len(calls.batches) == 1
    await clock.pass_time(0.0001)
    await asyncio.gather(*tasks)
    assert calls.batches[1:] == [[5, 6]]

    await asyncio.gather(*await _some(batcher, 7))  # behind two: at once
    assert calls.batches[2:] == [[7]]


async def test_a_dear_call_waits_for_nobody_when_it_is_drained() -> None:
    calls, batcher = _dear(ManualClock())
    await asyncio.gather(*await _some(batcher, 1, 2, 3, 4))
    tasks = await _some(batcher, 5)

    await batcher.drain()

    assert calls.batches == [[1, 2, 3, 4], [5]]
    assert await tasks[0] == 50


async def test_a_slice_of_many_does_not_wait_for_those_behind_it() -> None:
    calls = Calls()
    clock = ManualClock()
    batcher = Batcher(calls, max_items=4, dear=DearCalls(fewest=3, seconds=0.005), clock=clock)

    sending = asyncio.create_task(batcher.submit_many(list(range(10))))
    await _turns()
    assert calls.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
    await clock.pass_time(0.005)

    assert len(await sending) == 10
    assert calls.batches[2:] == [[8, 9]]


async def test_a_call_that_is_ended_by_something_else_answers_its_items_and_others_follow() -> None:
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    ended.cancel()

    async def call(items: list[int]) -> Sequence[int]:
        if items == [1]:
            await ended  # as a client library ends what waits for a lost connection
        return items

    batcher: Batcher[int, int] = Batcher(call)
    async with asyncio.timeout(30.0):
        with pytest.raises(ConnectionError):
            await batcher.submit(1)
        assert await batcher.submit(2) == 2
        await batcher.drain()
