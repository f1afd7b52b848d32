"""The end of a run, which is its proof: all is counted, once, and stays so.

Every client has settled what it had under way, and no fault is left. Then, in this order:

    1. The backlog is gone within 30 s, without anybody's help.
    2. What broker and ledger hold is compared with what clients were told (``judge``).
    3. ``molva verify`` compares the ledger with itself.
    4. The whole stream is sent once more, with the same ids: nothing may change. All of
       it through the broker, and a part of it over HTTP, which is the slower road.
"""

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final
from urllib.parse import urlsplit

from molva.messaging import Message, MessagingError, SendManyError, Topic, open_topic
from molva.ratings.rating import Rating, encode_entry
from tests.brokers import BrokersError
from tests.faults.live.client import History, Told, request
from tests.faults.live.evidence import Evidence, Place, collect
from tests.faults.live.fleet import Fleet, command
from tests.faults.live.judge import judge

__all__ = ["Proof", "prove"]

# Seconds in which a healed service must have counted all it accepted.
_DRAIN: Final = 60.0


@final
@dataclass(slots=True)
class Proof:
    """What the end of a run showed. ``recovery_seconds``: until all was counted."""

    evidence: Evidence
    violations: list[str] = field(default_factory=list)
    recovery_seconds: float = 0.0

    @property
    def redelivered(self) -> int:
        """How many messages the broker handed over again, as far as the witness saw.

        Not the duplicates: those are also what clients sent twice, and not what a worker had
        been given and not counted when it died.
        """
        return max(0, self.evidence.received - self.evidence.stored)


# Brokers without one step for both: who dies in between leaves a dead letter and its message.
_DEAD_LETTERS_REPEAT: Final = frozenset({"amqp", "amqps"})


async def prove(
    place: Place,
    fleet: Fleet,
    history: History,
    *,
    healed_at: float,
    poisoned: Mapping[bytes, int],
    replay: int,
    faults: int = 0,
) -> Proof:
    """Return what a service that runs, healed and without load, shows.

    Args:
        place: Where it keeps what.
        fleet: Its processes, all at work.
        history: What clients were told.
        healed_at: When the last fault ended, on the monotonic clock.
        poisoned: Ids of messages that nobody can count, to how often they were sent.
        replay: How many ratings to send again over HTTP.
        faults: How many there were. Where a dead letter is stored before its message is removed,
            each may have come in between.
    """
    repeated = faults if urlsplit(place.broker).scheme in _DEAD_LETTERS_REPEAT else 0
    async with await open_topic(place.topic_url) as topic:
        left = await _drained(place, topic, healed_at + _DRAIN)
        recovery = time.monotonic() - healed_at
        proof = Proof(await collect(place), recovery_seconds=round(recovery, 2))
        if left:
            proof.violations.append(
                f"{left} messages were not settled within {_DRAIN:.0f} s of the last fault"
            )
        ordered = topic.capabilities.ordering == "per-key"
        if not ordered:
            history.let_either_stand({row.id: row.rate for row in proof.evidence.rows})
        proof.violations += judge(
            history,
            proof.evidence,
            {id_: sent + repeated for id_, sent in poisoned.items()},
            ordered=ordered,
        )
        proof.violations += await asyncio.to_thread(_verify, place)
        proof.violations += await _send_all_again(
            place, topic, fleet.of("serve")[0].port, history, proof.evidence, replay
        )
    return proof


async def _drained(place: Place, topic: Topic, deadline: float) -> int:
    """Wait until nothing waits; return how much does at the deadline."""
    while True:
        left = -1
        with contextlib.suppress(MessagingError, BrokersError):
            if place.waiting is not None:
                left = await asyncio.to_thread(place.waiting)
            else:
                stat = await topic.stat()
                assert stat is not None
                left = stat.subscriptions["process"].pending
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.02)


def _verify(place: Place) -> list[str]:
    done = subprocess.run(
        [*command(place.added), "verify", *place.options],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        return []
    return [f"molva verify ended with {done.returncode}: {done.stdout[-1_000:]}{done.stderr}"]


async def _send_surely(topic: Topic, messages: list[Message]) -> None:
    """Send until all of it was confirmed: a busy machine may take longer than a time-out."""
    deadline = time.monotonic() + _DRAIN
    while True:
        try:
            await topic.send_many(messages)
        except SendManyError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.5)
        else:
            return


async def _send_all_again(
    place: Place,
    topic: Topic,
    port: int,
    history: History,
    before: Evidence,
    replay: int,
) -> list[str]:
    # What nobody knows about may rightly be counted now, so only what was counted is sent.
    counted = {row.id for row in before.rows}
    again = [told for told in history.ratings.values() if told.id in counted]
    try:
        for first in range(0, len(again), 1_000):
            await _send_surely(topic, [_message(told) for told in again[first : first + 1_000]])
        found = await _send_over_http(port, again[:replay])
    except (MessagingError, OSError, TimeoutError) as error:
        return [f"the stream could not be sent once more: {error!r}"]
    left = await _drained(place, topic, time.monotonic() + _DRAIN)
    if left:
        found.append(f"{left} ratings that were sent once more were not settled in time")
    after = await collect(place)
    if after.rows != before.rows or after.totals != before.totals:
        found.append("sending all once more with the same ids moved the totals")
    if len(after.dead) != len(before.dead):
        found.append(
            f"sending all once more made {len(after.dead) - len(before.dead)} dead letters"
        )
    return found


async def _send_over_http(port: int, ratings: Sequence[Told]) -> list[str]:
    for told in ratings:
        deadline = time.monotonic() + _DRAIN
        while True:
            answer: object
            try:
                status, answer = await request(port, told.request)
            except (OSError, TimeoutError) as error:
                status, answer = 0, error
            if status == 202:
                break
            # No answer, or "later": a busy machine may do that. A client sends the same again.
            if 0 < status < 500 or time.monotonic() > deadline:
                return [f"{told.id.hex()}, sent once more, was answered with {status}: {answer!r}"]
            await asyncio.sleep(0.5)
    return []


def _message(told: Told) -> Message:
    rating = Rating(told.campaign, time.time_ns() // 1_000, told.rate, told.item)
    return Message(encode_entry(rating), told.id, f"{told.campaign}/{told.item}")
