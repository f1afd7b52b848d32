"""Each contradiction between the files and the clients' history is found, and no other."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.live.client import History, Told, Totals
from tests.faults.live.evidence import Dead, Evidence
from tests.faults.live.judge import judge
from tests.faults.live.ledgers import Row, Running

RATES = (3, 7, 10)


def id_of(number: int) -> bytes:
    return bytes([number]) * 16


def told(number: int, rate: int) -> Told:
    """Return a rating that was sent at its number and acknowledged half a second later."""
    return Told(id_of(number), 0, "default", "a", rate, number, number + 0.5, attempts=1)


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    history = History(tmp_path / "history.jsonl")
    history.ratings = {id_of(n): told(n, rate) for n, rate in enumerate(RATES)}
    yield history
    history.close()


ROWS = [Row("default", n + 1, id_of(n), "a", rate) for n, rate in enumerate(RATES)]


def evidence(rows: list[Row] = ROWS, dead: tuple[Dead, ...] = ()) -> Evidence:
    """Return files that hold these rows, and the totals that they give."""
    rates = [row.rate for row in rows]
    total = (len(rates), sum(rates), {rate: rates.count(rate) for rate in rates})
    return Evidence(rows, {("default", "a"): total, ("default", None): total}, list(dead), 0, 0)


def kinds(found: list[str]) -> set[str]:
    return {each.partition(":")[0] for each in found}


def dead(number: int, rate: int = 9) -> Dead:
    return Dead(id_of(number), b'{"rate":%d}' % rate, "why")


READ = Totals(0, "default", "a", 2, 5.0, 2, {3: 1, 7: 1}, 2, at=5.0, until=5.1)


def test_files_that_agree_are_found_to(history: History) -> None:
    history.totals = [READ, replace(READ, item=None)]

    assert judge(history, evidence(), {}) == []


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (ROWS[:2], "lost"),
        ([*ROWS, Row("default", 4, id_of(9), "a", 1)], "phantom"),
        ([*ROWS, ROWS[2]._replace(seq=4)], "doubled"),
        ([*ROWS[:2], ROWS[2]._replace(rate=1)], "garbled"),
        ([*ROWS[:2], ROWS[2]._replace(seq=4)], "hole"),
        ([ROWS[1]._replace(seq=1), ROWS[0]._replace(seq=2), ROWS[2]], "order"),
    ],
)
def test_rows_that_clients_contradict(history: History, rows: list[Row], kind: str) -> None:
    assert kinds(judge(history, evidence(rows), {})) == {kind}


def test_a_rating_that_was_always_refused_must_not_count(history: History) -> None:
    refused = history.ratings[id_of(2)]
    refused.ok_at, refused.failed = None, 1

    assert kinds(judge(history, evidence(), {})) == {"aborted"}


@pytest.mark.parametrize("rows", [ROWS, ROWS[:2]])
def test_an_unknown_rating_may_count_or_not(history: History, rows: list[Row]) -> None:
    unknown = history.ratings[id_of(2)]
    unknown.ok_at, unknown.unknown = None, 1

    assert judge(history, evidence(rows), {}) == []


def test_a_total_that_its_ratings_do_not_give(history: History) -> None:
    wrong = evidence()
    totals = {**wrong.totals, ("default", None): (3, 21, {3: 1, 7: 1, 10: 1})}

    assert kinds(judge(history, replace(wrong, totals=totals), {})) == {"total"}


@pytest.mark.parametrize(
    "wrong",
    [
        replace(READ, average=5.5),
        replace(READ, count=3),
        replace(READ, distribution={3: 2}),
        replace(READ, as_of=9),
    ],
)
def test_an_answer_that_its_as_of_does_not_give(history: History, wrong: Totals) -> None:
    history.totals = [wrong]

    assert kinds(judge(history, evidence(), {})) == {"read"}


@pytest.mark.parametrize(
    ("running", "kinds_found"),
    [
        (Running(2, 10, 2, 10), set()),
        (Running(1, 10, 2, 10), {"running"}),
        (Running(2, 11, 2, 10), {"running"}),
        (Running(2, 10, 3, 10), {"running"}),
        (Running(2, 10, 2, 9), {"running"}),
    ],
)
def test_places_and_sums_beside_a_rating_must_follow_from_those_before(
    history: History, running: Running, kinds_found: set[str]
) -> None:
    rows = [ROWS[0], ROWS[1]._replace(running=running), ROWS[2]]

    assert kinds(judge(history, evidence(rows), {})) == kinds_found


@pytest.mark.parametrize(("known", "kinds_found"), [((0, 1, 2), set()), ((0, 1), {"forgotten"})])
def test_ids_that_are_kept_apart_must_be_those_of_the_ratings(
    history: History, known: tuple[int, ...], kinds_found: set[str]
) -> None:
    ids = frozenset(("default", id_of(number)) for number in known)

    assert kinds(judge(history, replace(evidence(), known=ids), {})) == kinds_found


def test_order_is_judged_where_the_broker_promises_it(history: History) -> None:
    swapped = [ROWS[1]._replace(seq=1), ROWS[0]._replace(seq=2), ROWS[2]]

    assert judge(history, evidence(swapped), {}, ordered=False) == []
    assert kinds(judge(history, evidence(swapped), {})) == {"order"}


def test_without_order_either_of_two_ratings_under_one_id_stands_and_the_other_is_told(
    history: History,
) -> None:
    history.conflicts = [told(1, 9)]
    rows = [ROWS[0], ROWS[1]._replace(rate=9), ROWS[2]]
    letter = dead(1, RATES[1])
    assert kinds(judge(history, evidence(rows, (letter,)), {}, ordered=False)) == {
        "garbled",
        "poison",
    }

    history.let_either_stand({row.id: row.rate for row in rows})

    assert judge(history, evidence(rows, (letter,)), {}, ordered=False) == []
    assert kinds(judge(history, evidence(rows), {}, ordered=False)) == {"lost"}


def test_an_answer_that_goes_back(history: History) -> None:
    older = Totals(1, "default", "a", 2, 3.0, 1, {3: 1}, 1, at=6.0, until=6.1)
    history.totals = [older, READ]

    assert kinds(judge(history, evidence(), {})) == {"backwards"}


def test_poison_belongs_among_the_dead_letters(history: History) -> None:
    assert judge(history, evidence(dead=(dead(9),)), {id_of(9): 1}) == []
    assert kinds(judge(history, evidence(), {id_of(9): 1})) == {"poison"}
    assert kinds(judge(history, evidence(dead=(dead(9), dead(9))), {id_of(9): 1})) == {"poison"}


def test_a_rating_that_can_be_counted_does_not(history: History) -> None:
    assert kinds(judge(history, evidence(dead=(dead(1, 7),)), {})) == {"poison"}


def test_another_rating_under_a_taken_id_belongs_among_the_dead_letters(history: History) -> None:
    history.conflicts = [told(1, 9)]

    assert judge(history, evidence(dead=(dead(1),)), {}) == []
    assert kinds(judge(history, evidence(), {})) == {"lost"}
