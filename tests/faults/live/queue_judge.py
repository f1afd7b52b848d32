"""What a queue's processes wrote down, against what a queue promises.

    lost       confirmed, and neither done nor a dead letter
    phantom    handed over, or dead, and never sent
    garbled    handed over with another body
    settled    settled more often than it was sent, or handed over after it was settled
    zombie     an ack that was confirmed although another consumer had the message by then
    order      one consumer was handed a producer's messages, tried for the first time, out of
               their order (``Capabilities.ordering`` is "in-process")
    attempts   handed over more often than its attempts say, or than it may be
    dead       what must end among the dead letters is not there, or something else is
    left       still waiting at the end

It shares no code with the product, and reads nothing but logs and what is left at the end.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final

__all__ = ["DeadOne", "Event", "Findings", "judge_queue", "read_log"]


class Event(NamedTuple):
    """One line of a log."""

    what: str
    id: str
    attempt: int
    at: float
    process: str


class DeadOne(NamedTuple):
    """A dead letter at the end."""

    id: str
    reason: str
    attempts: int


@final
@dataclass(slots=True)
class Findings:
    """What was found, and what makes a round worth something."""

    violations: list[str] = field(default_factory=list)
    sent: int = 0
    done: int = 0
    redelivered: int = 0
    late: int = 0
    dead: int = 0


def read_log(text: str, process: str) -> list[Event]:
    """Return the events of a log. ``process``: one life of one process."""
    events = []
    for line in text.splitlines():
        words = line.split()
        attempt = int(words[2]) if len(words) == 4 else 0
        events.append(Event(words[0], words[1], attempt, float(words[-1]), process))
    return events


def judge_queue(
    events: Iterable[Event],
    dead: Iterable[DeadOne],
    *,
    waiting: int,
    numbers: Mapping[str, tuple[str, int]],
    fates: Mapping[str, str],
    max_attempts: int,
) -> Findings:
    """Return what a round has shown.

    Args:
        events: All of them.
        dead: What is among the dead letters, before any is replayed.
        waiting: How many messages wait at the end.
        numbers: Producer and number of each id that was ever tried.
        fates: What consumers do with each.
        max_attempts: How often a message may be tried.
    """
    found = Findings()
    by_id: defaultdict[str, list[Event]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.at):
        by_id[event.id].append(event)
    letters: defaultdict[str, list[DeadOne]] = defaultdict(list)
    for letter in dead:
        letters[letter.id].append(letter)
        found.dead += 1
    if waiting:
        found.violations.append(f"left: {waiting} messages still wait")
    for id_ in sorted({*by_id, *letters}):
        fate = fates.get(id_, "")
        for problem in _judge_one(by_id[id_], letters[id_], fate, max_attempts):
            found.violations.append(f"{problem} ({id_} {numbers.get(id_)} {fate})")
    every = [event for each in by_id.values() for event in each]
    found.violations += _order(every, numbers)
    found.sent = len({e.id for e in every if e.what == "sent"})
    found.done = len({e.id for e in every if e.what == "done"})
    found.late = sum(e.what == "late" for e in every)
    # What was not given back by a handler, and came again.
    given_back = {(e.id, e.attempt) for e in every if e.what == "nack"}
    found.redelivered = sum(
        e.what == "begin"
        and e.attempt > 1
        and (e.id, e.attempt - 1) not in given_back
        and fates.get(e.id) != "raise"
        for e in every
    )
    return found


def _judge_one(
    events: list[Event], letters: list[DeadOne], fate: str, max_attempts: int
) -> Iterable[str]:
    of: defaultdict[str, list[Event]] = defaultdict(list)
    for event in events:
        of[event.what].append(event)
    tries, begins = len(of["try"]), of["begin"]
    if not tries:
        yield "phantom: never sent"
        return
    if of["bad"]:
        yield "garbled: its body is not what was sent"
    if of["sent"] and not of["done"] and not letters:
        yield "lost: confirmed, and neither done nor dead"
    settled = len(of["ack"]) + len(of["reject"])
    if settled > tries:
        yield f"settled: {settled} times, and sent {tries} times"
    if tries == 1:
        for ack in (*of["ack"], *of["reject"]):
            # A zombie may still begin what it took before: of an earlier turn, and fenced.
            if any(b.at > ack.at and b.attempt > ack.attempt for b in begins):
                yield f"settled: handed over again after it was {ack.what}ed"
            if any(b.attempt > ack.attempt and b.at < ack.at for b in begins):
                yield "zombie: settled although another consumer had it"
        if len(begins) > max((b.attempt for b in begins), default=0):
            yield f"attempts: handed over {len(begins)} times, by its attempts fewer"
        # What was in the hands of consumers that died comes twice more, alone.
        if any(begin.attempt > max_attempts + 2 for begin in begins):
            yield f"attempts: tried more than {max_attempts} and two times"
    for letter in letters:
        if letter.reason != "poison" and letter.attempts < max_attempts:
            yield f"dead: given up after {letter.attempts} attempts: {letter.reason}"
        if letter.reason == "poison" and fate != "reject":
            yield "dead: rejected, and nobody did"
    if of["sent"] and fate in ("reject", "raise") and not letters:
        yield "dead: it can never be processed, and is not among the dead letters"
    if len(letters) > tries:
        yield f"dead: {len(letters)} letters of one message"


def _order(events: list[Event], numbers: Mapping[str, tuple[str, int]]) -> Iterable[str]:
    """Compare the order in which each process was first handed each producer's messages."""
    tries: defaultdict[str, int] = defaultdict(int)
    for event in events:
        tries[event.id] += event.what == "try"
    last: dict[tuple[str, str], int] = {}
    for event in sorted(events, key=lambda event: event.at):
        if event.what != "begin" or event.attempt != 1 or tries[event.id] != 1:
            continue
        producer, number = numbers[event.id]
        if number % 11 == 0:
            continue  # it was delayed
        if number < last.get((event.process, producer), -1):
            yield f"order: {event.process} was handed {producer} {number} behind a later one"
        last[event.process, producer] = max(number, last.get((event.process, producer), -1))
