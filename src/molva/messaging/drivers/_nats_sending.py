"""Storing messages in a stream: pipelined, confirmed, and no more than may wait.

Many at once are stored as one where the server then syncs once (``allow_atomic``, NATS 2.15): all
of them or none, so that any refusal is found out about by storing one by one what was refused
together. A batch costs six syncs, whatever is in it, and a message that travels alone one.

Otherwise a server confirms each message. One that it calls sent twice is stored where it says
under which number; without one it may be of a message that it never stored, and is no success.

A bound is kept by what the server refuses. Where little room is left, the first message of a
batch is to stand behind the last one that was counted, and each other one behind its own
predecessor: whoever came in between, the rest is refused and counted anew. Where there is much
room, counting now and then is enough: others can fill only so much of it meanwhile.
"""

import asyncio
import itertools
import json
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple, final

from nats.aio.msg import Msg

from molva._base.clock import Clock
from molva.messaging.driver import DearCalls, Outcome
from molva.messaging.drivers._nats_link import NATSLink, Question, nobody_answered
from molva.messaging.drivers._nats_messages import MSG_ID, headers_of, too_large
from molva.messaging.drivers._nats_opening import SPARE_BYTES
from molva.messaging.drivers._nats_streams import error_of
from molva.messaging.errors import (
    MessageTooLargeError,
    MessagingError,
    QueueFullError,
    UnavailableError,
)
from molva.messaging.message import Message

__all__ = ["Room", "Sends"]

# Error codes of the server.
_TOO_LARGE: Final = 10054
_NOT_BEHIND: Final = (10070, 10071, 10164)
_NOT_STORED: Final = 10077

# What makes messages one: they are stored when the last has come, or none is.
_BATCH: Final = "Nats-Batch-Id"
_BATCH_PLACE: Final = "Nats-Batch-Sequence"
_BATCH_END: Final = "Nats-Batch-Commit"

# Messages of a batch: below, storing one by one is as fast; above, servers refuse it.
_FEWEST_AS_ONE: Final = 16
_MOST_AS_ONE: Final = 1_000
# Seconds that a batch waits for those whom the last one has answered: what one costs the server
# whatever is in it. Longer, and the waiting costs more than another batch.
_WAIT_FOR_OTHERS: Final = 0.005
# Bytes of a batch. A server holds them until the last has come, and answers within the
# seconds that an answer is waited for.
_MOST_BYTES_AS_ONE: Final = 8_000_000

_BEHIND_NUMBER: Final = "Nats-Expected-Last-Sequence"
_BEHIND_ID: Final = "Nats-Expected-Last-Msg-Id"

# Messages of room above which counting now and then is enough; messages a second that others may
# fill it with, which is more than a server stores; seconds for which a count is believed at least,
# and at most.
_ROOMY: Final = 2_000
_FASTEST: Final = 200_000
_FRESH: Final = 0.01
_STALE: Final = 1.0

# How often a batch is tried that others always come in between of.
_TRIES: Final = 100


class Room(NamedTuple):
    """How many more may be stored, behind the message of which number."""

    left: int
    last: int


@final
class Sends:
    """The sending side of a stream.

    Args:
        link: The connection.
        subject: Under which messages are stored.
        max_payload: Bytes of a message, headers and all, that the server takes.
        capacity: How many messages may wait; None where nothing bounds them.
        batches: Tells whether the stream takes messages that are stored as one, by one sync.
        count: Counts what waits: returns the number of the message stored last, and then how
            many wait.
        open_again: Makes the stream where it is gone, or raises.
        clock: Where time comes from.
    """

    def __init__(
        self,
        link: NATSLink,
        subject: str,
        *,
        max_payload: int,
        capacity: int | None,
        batches: Callable[[], bool],
        count: Callable[[], Awaitable[tuple[int, int]]],
        open_again: Callable[[], Awaitable[object]],
        clock: Clock,
    ) -> None:
        self._link = link
        self._subject = subject
        self._limit = max_payload - SPARE_BYTES
        self._capacity = capacity
        self._batches = batches
        self._count = count
        self._open_again = open_again
        self._clock = clock
        self._turn = asyncio.Lock()
        self._room: Room | None = None
        self._counted_at = 0.0

    @property
    def dear_calls(self) -> DearCalls | None:
        """From when on it pays to wait for more before sending."""
        return DearCalls(_FEWEST_AS_ONE, _WAIT_FOR_OTHERS) if self._batches() else None

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome | MessagingError]:
        """Store messages in their order."""
        subject, limit = self._subject, self._limit
        questions = []
        refused: dict[int, MessagingError] = {}
        for place, message in enumerate(messages):
            headers = headers_of(message)
            problem = too_large(message, headers, limit)
            if problem is not None:
                refused[place] = problem
                continue
            questions.append(Question(subject, message.body, headers))
        if self._capacity is None:
            outcomes = await self._stored(questions)
        else:
            async with self._turn:
                outcomes = await self._stored_in_room(questions, self._capacity)
        if not refused:
            return outcomes
        rest = iter(outcomes)
        return [refused.get(place) or next(rest) for place in range(len(messages))]

    async def _stored(self, questions: Sequence[Question]) -> list[Outcome | MessagingError]:
        if not self._batches():
            return await self._stored_one_by_one(questions)
        outcomes: list[Outcome | MessagingError] = []
        while len(outcomes) < len(questions):
            some = _as_many_as_fit(questions, len(outcomes))
            if await self._stored_as_one(some) is not None:
                outcomes += [Outcome.STORED] * len(some)
            else:
                outcomes += await self._stored_one_by_one(some)
        return outcomes

    async def _stored_as_one(self, questions: Sequence[Question]) -> int | None:
        """Store all of several messages, or none; return the number of the last.

        None where it is not worth it, and where the server has refused them. Whatever the
        reason, it will say it again of the message that it is about.
        """
        if len(questions) < _FEWEST_AS_ONE:
            return None
        batch = _BATCH, uuid.uuid4().hex
        *parts, end = (
            _with(question, batch, (_BATCH_PLACE, str(place)))
            for place, question in enumerate(questions, 1)
        )
        answer = await self._link.ask_as_one([*parts, _with(end, (_BATCH_END, "1"))])
        if nobody_answered([answer]):
            return None
        found = json.loads(answer.data)
        if found.get("count") != len(questions):
            return None
        return int(found["seq"])

    async def _stored_one_by_one(
        self, questions: Sequence[Question]
    ) -> list[Outcome | MessagingError]:
        if not questions:
            return []
        answers = await self._link.ask(*questions)
        if nobody_answered(answers):
            await self._open_again()
            missing = [place for place, one in enumerate(answers) if nobody_answered([one])]
            again = await self._link.ask(*(questions[place] for place in missing))
            for place, answer in zip(missing, again, strict=True):
                answers[place] = answer
        return [
            # What nearly every answer is: a stream and a number, in JSON that is not read.
            Outcome.STORED if _is_plain(answer) else await self._outcome(answer, question)
            for answer, question in zip(answers, questions, strict=True)
        ]

    async def _outcome(self, answer: Msg, question: Question) -> Outcome | MessagingError:
        """Return what became of a message that was not stored without a word."""
        if nobody_answered([answer]):
            return UnavailableError(f"{self._link.address}: {self._subject} is stored by nobody")
        found = json.loads(answer.data)
        if "error" not in found:
            if found.get("seq"):
                return Outcome.STORED
            return UnavailableError(
                f"{self._link.address}: it calls a message sent twice that it has not stored; "
                "try again later"
            )
        code, text = error_of(found)
        if code == _TOO_LARGE:
            return MessageTooLargeError(len(question.payload), max(0, self._limit))
        if code == _NOT_STORED and text.startswith("maximum "):
            if self._capacity is not None:
                return Outcome.FULL
            # A bound that somebody has set in the server.
            _, waiting = await self._count()
            return QueueFullError(waiting)
        return UnavailableError(f"{self._link.address}: {self._subject}: {text}")

    # Bounds -----------------------------------------------------------------------------

    async def _stored_in_room(
        self, questions: Sequence[Question], capacity: int
    ) -> list[Outcome | MessagingError]:
        outcomes: list[Outcome | MessagingError] = []
        tries = 0
        while len(outcomes) < len(questions):
            at = len(outcomes)
            room, left = self._room, len(questions) - at
            if room is None or self._is_old(room, left):
                last, waiting = await self._count()
                room = self._room = Room(capacity - waiting, last)
                self._counted_at = self._clock.monotonic()
            if room.left <= 0:
                self._room = None
                outcomes += [Outcome.FULL] * left
                break
            if room.left > _ROOMY + left:
                outcomes += await self._stored(questions[at : at + _ROOMY])
                self._room = room._replace(left=room.left - (len(outcomes) - at))
                continue
            outcomes += await self._stored_behind(questions[at : at + room.left], room)
            tries = tries + 1 if len(outcomes) == at else 0
            if tries > _TRIES:
                raise UnavailableError(
                    f"{self._link.address}: {self._subject}: others store so much that what waits "
                    "cannot be counted; try again later"
                )
        return outcomes

    def _is_old(self, room: Room, number: int) -> bool:
        """Tell whether others may have filled what room ``number`` messages were to have."""
        age = self._clock.monotonic() - self._counted_at
        if age <= _FRESH:
            return False
        return age > _STALE or room.left - age * _FASTEST <= _ROOMY + number

    async def _stored_behind(
        self, questions: Sequence[Question], room: Room
    ) -> list[Outcome | MessagingError]:
        """Store messages one behind the other; return the outcomes of those that were tried."""
        before = (_BEHIND_NUMBER, str(room.last))
        if self._batches():
            first, *others = _as_many_as_fit(questions, 0)
            last = await self._stored_as_one([_with(first, before), *others])
            if last is not None:
                self._room = Room(room.left - 1 - len(others), last)
                return [Outcome.STORED] * (1 + len(others))
        asked = []
        for question in questions:
            assert question.headers is not None
            asked.append(_with(question, before))
            before = _BEHIND_ID, question.headers[MSG_ID]
        self._room = None
        answers = await self._link.ask(*asked)
        if nobody_answered(answers):
            await self._open_again()
            return []
        outcomes: list[Outcome | MessagingError] = []
        last = room.last
        for answer, question in zip(answers, questions, strict=True):
            found = json.loads(answer.data)
            if "error" in found:
                if error_of(found)[0] in _NOT_BEHIND:
                    # Somebody came in between. What stands behind this one was refused as well.
                    return outcomes
                outcomes.append(await self._outcome(answer, question))
                return outcomes
            if found.get("duplicate"):
                outcomes.append(await self._outcome(answer, question))
                return outcomes
            last = int(found["seq"])
            outcomes.append(Outcome.STORED)
        self._room = Room(room.left - len(outcomes), last)
        return outcomes


def _as_many_as_fit(questions: Sequence[Question], at: int) -> Sequence[Question]:
    """Return the messages from one on that may be stored as one."""
    number = size = 0
    for question in itertools.islice(questions, at, at + _MOST_AS_ONE):
        size += len(question.payload)
        if size > _MOST_BYTES_AS_ONE and number:
            break
        number += 1
    return questions[at : at + number]


def _with(question: Question, *headers: tuple[str, str]) -> Question:
    return question._replace(headers={**(question.headers or {}), **dict(headers)})


def _is_plain(answer: Msg) -> bool:
    data = answer.data
    return b'"seq":' in data and b'"error":' not in data and b'"duplicate":' not in data
