"""Request and reply: who gets which answer, and what is left behind."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from molva.messaging import _inbox
from molva.messaging.codecs import JSON
from molva.messaging.conformance.actors import Start
from molva.messaging.conformance.harness import Harness, Suite, needs
from molva.messaging.conformance.waiting import PATIENCE, eventually, take
from molva.messaging.delivery import Delivery
from molva.messaging.errors import (
    ClosedError,
    DeadlineExceededError,
    QueueFullError,
    RejectError,
    RequestFailedError,
)
from molva.messaging.message import Message
from molva.messaging.requester import Requester, open_requester
from molva.messaging.responder import Responder, open_responder
from molva.messaging.topic import Topic

__all__ = ["Asking", "Sweeping"]


class Asking(Suite):
    """Requests by a queue or a topic, whichever is tested, and replies by a topic."""

    async def test_each_answer_comes_to_the_request_that_it_is_of(self, h: Harness) -> None:
        async with _asking(h) as one, _asking(h) as other, _answering(h, _double):
            numbers = [*range(100)]
            asked = [_ask(one, n) for n in numbers] + [_ask(other, -n) for n in numbers]

            answers = await asyncio.gather(*asked)

            assert answers == [2 * n for n in numbers] + [-2 * n for n in numbers]
            for requester in (one, other):
                counters = requester.counters
                assert (counters.asked, counters.answered, counters.failed) == (100, 100, 0)
                assert (counters.late, counters.duplicates, requester.pending) == (0, 0, 0)

    async def test_a_handler_that_raises_is_answered_at_once(self, h: Harness) -> None:
        tried: list[object] = []

        async def fail(request: Delivery) -> Message:
            tried.append(JSON.decode(request.message))
            if tried[-1] == "mistaken":
                raise RejectError("that is no number")
            raise ValueError("password=s3cret")

        async with _asking(h) as requester, _answering(h, fail):
            with pytest.raises(RequestFailedError, match="that is no number") as mistaken:
                await _ask(requester, "mistaken")
            with pytest.raises(RequestFailedError) as broken:
                await _ask(requester, "broken")

        assert mistaken.value.kind == "RejectError"
        assert broken.value.kind == "ValueError"
        assert "s3cret" not in str(broken.value)
        assert tried == ["mistaken", "broken"]
        assert requester.counters.failed == 2

    async def test_a_request_is_not_worked_on_after_its_deadline(self, h: Harness) -> None:
        await (await h.consumer("requests")).close()  # so that what is asked waits
        worked_on: list[object] = []

        async def note(request: Delivery) -> Message:
            worked_on.append(JSON.decode(request.message))
            return Message(b"0")

        async with _asking(h) as requester:
            with pytest.raises(DeadlineExceededError, match=r"within 0\.2 s"):
                await requester.ask(JSON.message("too late"), timeout=0.2)
            assert (requester.counters.overdue, requester.pending) == (1, 0)
            async with _answering(h, note) as responder:
                assert await _ask(requester, "in time") == 0
                await eventually(lambda: responder.counters.overdue == 1)

        assert worked_on == ["in time"]

    async def test_a_reply_after_the_deadline_is_dropped_and_counted(self, h: Harness) -> None:
        over = asyncio.Event()
        taken = 0

        async def linger(request: Delivery) -> Message:
            nonlocal taken
            taken += 1
            await over.wait()
            return request.message

        async with _asking(h) as requester, _answering(h, linger):
            # One that is not taken in time is not answered at all.
            for timeout in (1.0, 4.0, 16.0):
                with pytest.raises(DeadlineExceededError):
                    await requester.ask(JSON.message(1), timeout=timeout)
                if taken:
                    break
            over.set()

            await eventually(lambda: requester.counters.late == taken > 0)

            assert await _ask(requester, 2) == 2
            assert requester.counters.duplicates == 0

    async def test_of_two_replies_the_first_counts(self, h: Harness) -> None:
        consumer, replies = await h.consumer("requests"), await h.topic("replies")
        async with _asking(h) as requester:
            asking = asyncio.create_task(_ask(requester, "what?"))
            [request] = await take(consumer, 1)
            # What a program does that has nothing of ours: it repeats the correlation id.
            headers = {"correlation-id": request.message.headers["correlation-id"]}
            assert request.message.headers["reply-to"] == h.prefix + "replies"
            for body in (b"1", b"2"):
                await replies.send(Message(body, key="k", headers=headers))

            assert await asking == 1
            await eventually(lambda: requester.counters.duplicates == 1)
            assert requester.counters.answered == 1

    async def test_cancelled_asks_leave_nothing_behind(self, h: Harness) -> None:
        await (await h.consumer("requests")).close()
        async with _asking(h) as requester:
            asking = [asyncio.create_task(_ask(requester, n)) for n in range(50)]
            await asyncio.sleep(0.01)
            assert requester.pending == 50
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)

            assert all(task.cancelled() for task in asking)
            assert requester.pending == 0

    async def test_no_more_than_the_bound_can_be_pending(self, h: Harness) -> None:
        await (await h.consumer("requests")).close()
        async with _asking(h, max_pending=2) as requester:
            asking = [asyncio.create_task(_ask(requester, n)) for n in range(2)]
            await asyncio.sleep(0.01)
            with pytest.raises(QueueFullError):
                await _ask(requester, 3)
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)

    async def test_closing_fails_what_waits(self, h: Harness) -> None:
        await (await h.consumer("requests")).close()
        async with _asking(h) as requester:
            asking = asyncio.create_task(_ask(requester, 1))
            await asyncio.sleep(0.05)

            await requester.close()

            with pytest.raises(ClosedError, match="before the reply came"):
                await asking
            with pytest.raises(ClosedError):
                await _ask(requester, 2)

    @needs("shared")
    async def test_what_a_killed_responder_held_is_answered_by_another(
        self, h: Harness, start: Start
    ) -> None:
        h.use_processes()
        await (await h.consumer("requests")).close()
        holder = await (await start("hold", h.consumer_url("requests"))).ready()
        seen: Counter[bytes] = Counter()

        async def double(request: Delivery) -> Message:
            seen[request.message.id] += 1
            return await _double(request)

        async with _asking(h) as requester:
            asking = [asyncio.create_task(_ask(requester, n)) for n in range(20)]
            await eventually(lambda: len(set(holder.lines)) == 20)
            await holder.kill()
            async with _answering(h, double):
                assert await asyncio.gather(*asking) == [2 * n for n in range(20)]

        assert len(seen) == 20


class Sweeping(Suite):
    """What requesters leave behind, which does not depend on how requests travel."""

    @needs("stat")
    async def test_a_closed_requester_leaves_no_subscription(self, h: Harness) -> None:
        replies = await h.topic("replies")
        async with _asking(h):
            assert len(await _subscriptions(replies)) == 1

        assert await _subscriptions(replies) == []

    @needs("shared", "stat")
    async def test_what_a_killed_requester_left_is_removed_and_nothing_of_the_living(
        self, h: Harness, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Nothing here is just being opened while somebody sweeps.
        monkeypatch.setattr(_inbox, "_GRACE", 0.0)
        monkeypatch.setattr(_inbox, "_SWEEP", 0.1)
        replies = await h.topic("replies")
        doomed = await (await start("ask", h.sender_url("requests"), h.url("replies"))).ready()
        [left] = await _subscriptions(replies)
        await doomed.kill()

        h.lengthen_sessions()  # or whoever stands still for some seconds is dead as well
        async with _asking(h) as one, _asking(h) as other, _answering(h, _double):
            async with asyncio.timeout(2 * PATIENCE + h.death_interval):
                while left in await _subscriptions(replies):
                    await asyncio.sleep(0.1)

            assert len(await _subscriptions(replies)) == 2
            assert [await _ask(one, 1), await _ask(other, 2)] == [2, 4]


@contextlib.asynccontextmanager
async def _asking(h: Harness, *, max_pending: int = 10_000) -> AsyncIterator[Requester]:
    """Open a requester for the length of the block."""
    requests, replies = h.sender_url("requests"), h.url("replies")
    async with await open_requester(
        requests, replies, max_pending=max_pending, clock=h.clock
    ) as requester:
        yield requester


@contextlib.asynccontextmanager
async def _answering(
    h: Harness, handler: Callable[[Delivery], Awaitable[Message]]
) -> AsyncIterator[Responder]:
    """Answer requests for the length of the block."""
    async with await open_responder(h.consumer_url("requests"), clock=h.clock) as responder:
        running = asyncio.create_task(responder.run(handler, concurrency=8))
        try:
            yield responder
        finally:
            responder.stop()
            await running


async def _ask(requester: Requester, value: int | str) -> object:
    return JSON.decode(await requester.ask(JSON.message(value), timeout=3 * PATIENCE))


async def _double(request: Delivery) -> Message:
    value = JSON.decode(request.message)
    assert isinstance(value, int)
    return JSON.message(2 * value)


async def _subscriptions(topic: Topic) -> list[str]:
    stat = await topic.stat()
    assert stat is not None
    return list(stat.subscriptions)
