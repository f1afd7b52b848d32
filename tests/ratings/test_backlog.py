"""What waits at a broker, asked of one that may not answer."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator
from typing import cast

from molva.messaging import Topic, TopicStat, UnavailableError
from molva.ratings.backlog import Backlog


class Asked:
    """A topic that answers when the test says."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.stored = 0
        self.calls = 0
        self.error: Exception | None = None

    async def stat(self) -> TopicStat:
        self.calls += 1
        stored = self.stored
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        return TopicStat(stored=stored, subscriptions={})


@contextlib.asynccontextmanager
async def backlog_of(asked: Asked) -> AsyncIterator[Backlog]:
    backlog = Backlog(lambda: cast(Topic, asked))
    yield backlog
    await backlog.close()


async def test_a_broker_that_does_not_answer_holds_nobody_up_and_is_asked_once() -> None:
    asked = Asked()
    async with backlog_of(asked) as backlog:
        loop = asyncio.get_running_loop()
        began = loop.time()
        found = await asyncio.gather(*(backlog.stat(0.1) for _ in range(50)))

        assert found == [None] * 50
        assert loop.time() - began < 5.0
        assert asked.calls == 1


async def test_an_answer_is_never_of_a_question_that_was_asked_before() -> None:
    asked = Asked()
    async with backlog_of(asked) as backlog:
        early = asyncio.ensure_future(backlog.stat(30.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asked.stored = 7  # the first question does not know of these
        late = [asyncio.ensure_future(backlog.stat(30.0)) for _ in range(3)]
        await asyncio.sleep(0)
        asked.answers.set()

        first = await early
        assert first is not None
        assert first.stored == 0
        assert [stat and stat.stored for stat in await asyncio.gather(*late)] == [7, 7, 7]
        assert asked.calls == 2


async def test_a_broker_that_cannot_be_reached_and_one_that_never_was_tell_nothing() -> None:
    asked = Asked()
    asked.error = UnavailableError("nobody listens there")
    asked.answers.set()

    async with backlog_of(asked) as backlog:
        assert await backlog.stat() is None
    assert await Backlog(lambda: None).stat() is None


async def test_who_goes_away_takes_the_question_of_others_along_in_no_way() -> None:
    asked = Asked()
    async with backlog_of(asked) as backlog:
        gone = asyncio.ensure_future(backlog.stat(30.0))
        await asyncio.sleep(0)
        stays = asyncio.ensure_future(backlog.stat(30.0))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait((gone,))
        asked.answers.set()

        assert await stays is not None


async def test_a_question_that_fails_when_nobody_waits_any_more_is_no_trouble() -> None:
    asked, trouble = Asked(), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: trouble.append(context))
    async with backlog_of(asked) as backlog:
        assert await backlog.stat(0.01) is None
        asked.error = UnavailableError("no answer in time")
        asked.answers.set()
        await asyncio.sleep(0.01)
        assert await backlog.stat(0.01) is None
    gc.collect()
    assert trouble == []
    assert await backlog.stat() is None  # it was closed
    assert asked.calls == 2
