"""A queue under faults, for seconds; ``make faults`` does it for minutes. And its net."""

import json
from pathlib import Path

import pytest

from tests.faults.live.queue_judge import DeadOne, Event, judge_queue
from tests.faults.live.queues import QueueConfig, run_queue

SEED = 20_26
ID = "aa"


def judged(
    *events: tuple[str, int, float], fate: str = "ack", dead: tuple[DeadOne, ...] = ()
) -> set[str]:
    """Return the kinds of what is found; ``events``: (what, attempt, at) of one message."""
    found = judge_queue(
        [Event(what, ID, attempt, at, f"c{attempt}") for what, attempt, at in events],
        dead,
        waiting=0,
        numbers={ID: ("p0", 1)},
        fates={ID: fate},
        max_attempts=4,
    )
    return {each.partition(":")[0] for each in found.violations}


SENT = (("try", 0, 0.0), ("sent", 0, 0.1))
DONE = (("begin", 1, 1.0), ("done", 1, 1.1), ("ack", 1, 1.2))


def test_a_message_that_came_once_and_was_done_is_right() -> None:
    assert judged(*SENT, *DONE) == set()


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        (SENT, "lost"),
        (DONE, "phantom"),
        ((*SENT, *DONE, ("bad", 0, 1.0)), "garbled"),
        ((*SENT, *DONE, ("ack", 2, 3.0)), "settled"),
        ((*SENT, *DONE, ("begin", 2, 3.0)), "settled"),
        ((*SENT, ("begin", 1, 1.0), ("begin", 2, 2.0), *DONE[1:2], ("ack", 1, 3.0)), "zombie"),
        ((*SENT, ("begin", 7, 1.0), ("done", 7, 1.0), ("ack", 7, 1.1)), "attempts"),
        ((*SENT, ("begin", 1, 0.9), *DONE), "attempts"),
    ],
)
def test_what_breaks_a_promise_is_named(
    events: tuple[tuple[str, int, float], ...], kind: str
) -> None:
    assert judged(*events) == {kind}


@pytest.mark.parametrize(
    ("letter", "fate", "kinds"),
    [
        (DeadOne(ID, "poison", 1), "reject", set()),
        (DeadOne(ID, "poison", 1), "ack", {"dead"}),
        (DeadOne(ID, "ValueError", 4), "raise", set()),
        (DeadOne(ID, "ValueError", 2), "raise", {"dead"}),
    ],
)
def test_dead_letters_are_judged(letter: DeadOne, fate: str, kinds: set[str]) -> None:
    assert judged(*SENT, fate=fate, dead=(letter,)) == kinds


def test_a_producers_messages_out_of_order_are_named() -> None:
    events = [
        Event(what, id_, int(what == "begin"), at, "c0")
        for what, id_, at in (
            *(("try", id_, 0.0) for id_ in ("aa", "bb")),
            *(("begin", id_, at) for at, id_ in ((1.0, "bb"), (1.1, "aa"))),
        )
    ]
    found = judge_queue(
        events,
        (),
        waiting=0,
        numbers={"aa": ("p0", 1), "bb": ("p0", 2)},
        fates={},
        max_attempts=4,
    )

    assert [each for each in found.violations if each.startswith("order")]


async def test_a_queue_keeps_its_promises_under_faults(tmp_path: Path) -> None:
    # As in test_live: a round in which a busy machine let too little happen is done again.
    for seed in range(SEED, SEED + 3):
        report = await run_queue(QueueConfig(seed, seconds=4.0), tmp_path / str(seed))
        shown = json.dumps(report.shown(), indent=1)
        assert report.violations == [], shown
        if not report.vacuous:
            break

    assert report.vacuous == [], shown


@pytest.mark.parametrize(("mutant", "kind"), [("stale-ack", "zombie"), ("ack-first", "lost")])
async def test_a_queue_that_breaks_a_promise_is_found(
    tmp_path: Path, mutant: str, kind: str
) -> None:
    found: list[str] = []
    for seed in (1, 2, 3):
        report = await run_queue(
            QueueConfig(seed, seconds=3.0, mutant=mutant), tmp_path / str(seed)
        )
        found += report.violations
        if any(each.startswith(kind) for each in found):
            return
    pytest.fail(f"{mutant} was not found in three rounds, only {found}")
