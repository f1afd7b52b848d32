"""The SQLite ledger against the reference: whatever happened, every total at every moment."""

import asyncio
import contextlib
import random
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molva.ratings.ledger import (
    Ledger,
    LedgerCapabilities,
    LedgerError,
    LedgerSize,
    LedgerURLError,
    Outcome,
    Total,
    open_ledger,
)
from molva.ratings.ledger.protocol import LedgerEntry
from molva.ratings.rating import (
    Change,
    Comment,
    Entry,
    Exclusion,
    Rating,
    Restoration,
    Retraction,
    Submission,
)
from molva.ratings.totals import total

APPLIED, DUPLICATE, CONFLICT, NO_RATING, NO_EFFECT = Outcome


@contextlib.asynccontextmanager
async def opened(folder: Path | str, **options: str) -> AsyncIterator[Ledger]:
    query = "&".join(f"{name}={value}" for name, value in options.items())
    ledger = await open_ledger(f"sqlite://{folder}/ledger.db?{query}")
    try:
        yield ledger
    finally:
        await ledger.close()


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    async with opened(tmp_path) as ledger:
        yield ledger


def number(n: int) -> bytes:
    return n.to_bytes(16, "big")


def rating(
    id_: int, rate: int, item: str = "", *, campaign: str = "c", comment: str | None = None
) -> Submission:
    return Submission(number(id_), Rating(campaign, 1_000 + id_, rate, item, comment))


def about(
    id_: int, kind: type[Entry], target: int, more: int | str | None = None, *, campaign: str = "c"
) -> Submission:
    """A correction or comment; ``more`` is the rate or the words that it comes with."""
    accepted_at_us, target_id = 1_000 + id_, number(target)
    entry: Entry
    if kind is Change:
        assert isinstance(more, int)
        entry = Change(campaign, accepted_at_us, target_id, more)
    elif kind is Comment:
        entry = Comment(campaign, accepted_at_us, target_id, str(more))
    elif kind is Exclusion:
        entry = Exclusion(campaign, accepted_at_us, target_id, str(more or ""))
    else:
        assert kind is Retraction or kind is Restoration
        entry = kind(campaign, accepted_at_us, target_id)
    return Submission(number(id_), entry)


async def apply(ledger: Ledger, *batch: Submission) -> list[Outcome | Exception]:
    return await ledger.apply(batch, applied_at_us=5_000)


async def differences(ledger: Ledger) -> list[object]:
    return [difference async for difference in ledger.verify()]


async def entries(ledger: Ledger, campaign: str = "c") -> list[LedgerEntry]:
    return [entry async for entry in ledger.entries(campaign)]


class Reference:
    """What a ledger should answer to each submission, by the words of ``Outcome``."""

    def __init__(self) -> None:
        self.contents: dict[bytes, Entry] = {}
        self.idle: dict[bytes, Entry] = {}
        self.ratings: dict[bytes, tuple[str, int]] = {}
        self.states: dict[bytes, tuple[int, bool, bool]] = {}
        self.entries: defaultdict[str, list[LedgerEntry]] = defaultdict(list)

    def apply(self, submission: Submission) -> Outcome:
        id_, entry = submission
        if id_ in self.contents:
            return DUPLICATE if same(self.contents[id_], entry) else CONFLICT
        if isinstance(entry, Rating):
            seq = self.append(id_, entry, "rating", rate=entry.rate, item=entry.item)
            self.ratings[id_] = entry.campaign, seq
            self.states[id_] = entry.rate, False, False
            if entry.comment:
                self.append(None, entry, "comment", target=seq, text=entry.comment)
            return APPLIED
        if id_ in self.idle:
            return NO_EFFECT if same(self.idle[id_], entry) else CONFLICT
        campaign, target = self.ratings.get(entry.rating_id, ("", 0))
        if campaign != entry.campaign:
            return NO_RATING
        before = self.states[entry.rating_id]
        after = amended(before, entry)
        if isinstance(entry, Comment):
            self.append(id_, entry, "comment", target=target, text=entry.text)
        elif after == before:
            self.idle[id_] = entry
            return NO_EFFECT
        elif isinstance(entry, Change):
            self.append(id_, entry, "change", rate=entry.rate, target=target)
        else:
            text = entry.reason or None if isinstance(entry, Exclusion) else None
            self.append(id_, entry, type(entry).__name__.lower(), target=target, text=text)
        self.states[entry.rating_id] = after
        return APPLIED

    def append(
        self,
        id_: bytes | None,
        entry: Entry,
        kind: str,
        *,
        rate: int | None = None,
        item: str | None = None,
        target: int | None = None,
        text: str | None = None,
    ) -> int:
        if id_ is not None:
            self.contents[id_] = entry
        log = self.entries[entry.campaign]
        seq = len(log) + 1
        ratings = [e for e in log if e.kind == "rating"]
        position = sum(e.item == item for e in ratings) + 1 if kind == "rating" else None
        log.append(
            LedgerEntry(
                seq=seq,
                kind=kind,
                id=id_,
                item=item,
                rate=rate,
                target_seq=target,
                position=position,
                campaign_position=len(ratings) + (kind == "rating"),
                text=text,
                accepted_at_us=entry.accepted_at_us,
                applied_at_us=5_000,
            )
        )
        return seq


def same(one: Entry, other: Entry) -> bool:
    return content(one) == content(other)


def content(entry: Entry) -> tuple[object, ...]:
    """Everything but the time of acceptance; an empty comment beside a rating is none."""
    values = {name: getattr(entry, name) for name in entry.__struct_fields__}
    values.pop("accepted_at_us")
    if isinstance(entry, Rating):
        values["comment"] = entry.comment or None
    return type(entry), values


def amended(state: tuple[int, bool, bool], entry: Entry) -> tuple[int, bool, bool]:
    rate, retracted, excluded = state
    if retracted:
        return state
    match entry:
        case Change():
            return entry.rate, retracted, excluded
        case Retraction():
            return rate, True, excluded
        case Exclusion():
            return rate, retracted, True
        case Restoration():
            return rate, retracted, False
        case _:
            return state


# Ids from a small set, so that they meet again: as duplicates, conflicts and targets.
IDS = st.integers(0, 30)
CAMPAIGNS = st.sampled_from(["c", "c", "c", "d"])
RATES = st.integers(-1, 3)
RATINGS = st.builds(
    lambda id_, rate, item, campaign, comment: rating(
        id_, rate, item, campaign=campaign, comment=comment
    ),
    IDS,
    RATES,
    st.sampled_from(["", "a", "b"]),
    CAMPAIGNS,
    st.sampled_from([None, None, "", "so", "so so"]),
)
OTHERS = st.one_of(
    st.builds(lambda i, t, r, c: about(i, Change, t, r, campaign=c), IDS, IDS, RATES, CAMPAIGNS),
    st.builds(lambda i, t, c: about(i, Retraction, t, campaign=c), IDS, IDS, CAMPAIGNS),
    st.builds(lambda i, t, c: about(i, Exclusion, t, "x", campaign=c), IDS, IDS, CAMPAIGNS),
    st.builds(lambda i, t, c: about(i, Restoration, t, campaign=c), IDS, IDS, CAMPAIGNS),
    st.builds(lambda i, t, c: about(i, Comment, t, "hm", campaign=c), IDS, IDS, CAMPAIGNS),
)
HISTORIES = st.lists(st.lists(st.one_of(RATINGS, OTHERS), max_size=12), max_size=8)


@settings(max_examples=150, deadline=None)
@given(HISTORIES)
def test_any_history_reads_as_the_reference_at_every_moment(
    history: list[list[Submission]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(compare(Path(folder), history))


async def compare(folder: Path, history: list[list[Submission]]) -> None:
    reference = Reference()
    for batch in history:
        expected = [reference.apply(submission) for submission in batch]
        # Opened anew for each batch: nothing may live in memory alone.
        async with opened(folder, commit="loop") as ledger:
            assert await apply(ledger, *batch) == expected
    async with opened(folder, commit="loop") as ledger:
        for campaign in ("c", "d"):
            log = reference.entries[campaign]
            assert await entries(ledger, campaign) == log
            assert await ledger.last_seq(campaign) == len(log)
            for as_of in (None, *range(-1, len(log) + 2)):
                for item in (None, "", "a", "b"):
                    for n in (1, 2, 5, 100):
                        for trusted in (True, False):
                            expected_total = total(
                                log, item=item, n=n, as_of=as_of, trusted=trusted
                            )
                            assert expected_total == await ledger.total(
                                campaign, item=item, n=n, as_of=as_of, trusted=trusted
                            )
        assert await differences(ledger) == []
        before = derived(folder)
        await ledger.rebuild()
        assert derived(folder) == before


def derived(folder: Path) -> dict[str, list[tuple[object, ...]]]:
    connection = apsw.Connection(f"{folder}/ledger.db", flags=apsw.SQLITE_OPEN_READONLY)
    tables = ("campaign", "scope", "block", "correction", "node", "amended", "entry")
    rows = {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables}
    connection.close()
    return {table: sorted(found, key=repr) for table, found in rows.items()}


CORRECTIONS: list[type[Entry]] = [
    *(Exclusion, Exclusion, Exclusion, Restoration, Retraction, Comment, Change)
]


def long_history(random_: random.Random, length: int) -> Iterator[Submission]:
    """Ratings in many items with a share of everything else, in clusters."""
    for id_ in range(1, length + 1):
        share = 0.8 if id_ // 200 % 3 == 1 else 0.05
        if id_ > 10 and random_.random() < share:
            # Half of the corrections meet the newest ratings, where windows begin.
            target = id_ - random_.randint(1, 10) if id_ % 2 else random_.randint(1, id_ - 1)
            kind = random_.choice(CORRECTIONS)
            more = random_.randint(0, 10) if kind is Change else "x"
            yield about(id_, kind, target, more)
        else:
            item = "hot" if random_.random() < 0.6 else f"item-{random_.randint(1, 5)}"
            yield rating(id_, random_.randint(0, 10), item)


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_long_history_reads_as_the_reference(tmp_path: Path, seed: int) -> None:
    random_ = random.Random(seed)
    history = list(long_history(random_, 4_000))
    reference = Reference()
    async with opened(tmp_path) as ledger:
        at = 0
        while at < len(history):
            batch = history[at : at + random_.choice([1, 7, 300])]
            at += len(batch)
            assert await apply(ledger, *batch) == [reference.apply(s) for s in batch]
        log = reference.entries["c"]
        for _ in range(300):
            as_of = random_.randint(1, len(log))
            item = random_.choice([None, "hot", "item-3"])
            n = random_.choice([1, 3, 10, 100, 1_000, 10_000])
            for trusted in (True, False):
                expected = total(log, item=item, n=n, as_of=as_of, trusted=trusted)
                assert expected == await ledger.total(
                    "c", item=item, n=n, as_of=as_of, trusted=trusted
                )
        assert await differences(ledger) == []
        before = derived(tmp_path)
        await ledger.rebuild()
        assert derived(tmp_path) == before


# ------------------------------------------------------------------------ outcomes


async def test_equal_ratings_under_different_ids_are_both_counted(ledger: Ledger) -> None:
    assert await apply(ledger, rating(1, 5), rating(2, 5)) == [APPLIED, APPLIED]
    assert await ledger.total("c", n=10) == Total(10, 2, 2, {5: 2}, 2)


async def test_a_batch_that_comes_twice_counts_once(ledger: Ledger) -> None:
    batch = [rating(1, 5, comment="good"), about(2, Change, 1, 7), about(3, Exclusion, 1)]
    await apply(ledger, *batch)
    before = await ledger.total("c", n=10, trusted=False)
    assert await apply(ledger, *batch) == [DUPLICATE] * 3
    assert await ledger.total("c", n=10, trusted=False) == before
    assert await ledger.last_seq("c") == 4


async def test_a_duplicate_within_one_batch_counts_once(ledger: Ledger) -> None:
    outcomes = await apply(ledger, rating(1, 5), rating(1, 5), rating(2, 3), rating(1, 6))
    assert outcomes == [APPLIED, DUPLICATE, APPLIED, CONFLICT]
    assert await ledger.total("c", n=10) == Total(8, 2, 2, {3: 1, 5: 1}, 2)


async def test_a_later_time_of_acceptance_is_still_the_same_rating(ledger: Ledger) -> None:
    await apply(ledger, rating(1, 5))
    assert await apply(ledger, Submission(number(1), Rating("c", 999_999, 5))) == [DUPLICATE]


@pytest.mark.parametrize(
    "other",
    [
        rating(1, 6, "a", comment="so"),
        rating(1, 5, "b", comment="so"),
        rating(1, 5, "a", comment="other"),
        rating(1, 5, "a"),
        rating(1, 5, "a", campaign="d", comment="so"),
        about(1, Comment, 1, "so"),
        about(1, Retraction, 1),
    ],
)
async def test_a_used_id_with_other_content_is_a_conflict(
    ledger: Ledger, other: Submission
) -> None:
    await apply(ledger, rating(1, 5, "a", comment="so"))
    assert await apply(ledger, other) == [CONFLICT]
    assert await ledger.total("c", n=10) == Total(5, 1, 1, {5: 1}, 2)
    assert await ledger.size() == LedgerSize(campaigns=1, entries=2, ratings=1)


async def test_a_duplicate_is_known_after_its_comment_was_erased(
    ledger: Ledger, tmp_path: Path
) -> None:
    await apply(ledger, rating(1, 5, comment="my name is Ann"))
    eraser = apsw.Connection(str(tmp_path / "ledger.db"))
    eraser.execute("DELETE FROM comment")
    eraser.close()
    assert await apply(ledger, rating(1, 5, comment="my name is Ann")) == [DUPLICATE]
    assert await apply(ledger, rating(1, 5, comment="my name is Eve")) == [CONFLICT]
    assert await differences(ledger) == []


async def test_what_has_no_effect_answers_the_same_when_it_comes_again(ledger: Ledger) -> None:
    await apply(ledger, rating(1, 5), rating(2, 9), about(3, Exclusion, 1))
    assert await apply(ledger, about(4, Exclusion, 1)) == [NO_EFFECT]
    await apply(ledger, about(5, Restoration, 1))
    # Excluding again would have an effect now, but not under an id that was answered.
    assert await apply(ledger, about(4, Exclusion, 1)) == [NO_EFFECT]
    assert await apply(ledger, about(4, Exclusion, 2)) == [CONFLICT]
    assert await ledger.total("c", n=10) == Total(14, 2, 2, {5: 1, 9: 1}, 4)


async def test_a_correction_waits_for_its_rating(ledger: Ledger) -> None:
    assert await apply(ledger, about(2, Change, 1, 7)) == [NO_RATING]
    assert await ledger.last_seq("c") == 0
    await apply(ledger, rating(1, 5))
    assert await apply(ledger, about(2, Change, 1, 7)) == [APPLIED]


async def test_the_trusted_window_reaches_back_past_excluded_ratings(ledger: Ledger) -> None:
    await apply(ledger, *(rating(i, i) for i in range(1, 7)))
    await apply(ledger, about(10, Exclusion, 5), about(11, Exclusion, 6))
    trusted = await ledger.total("c", n=3)
    raw = await ledger.total("c", n=3, trusted=False)
    assert trusted is not None
    assert raw is not None
    assert (trusted.sum, raw.sum) == (2 + 3 + 4, 4 + 5 + 6)


async def test_a_campaign_whose_ratings_were_all_retracted_has_nothing_to_average(
    ledger: Ledger,
) -> None:
    await apply(ledger, rating(1, 5), about(2, Retraction, 1))
    assert await ledger.total("c", n=10) is None
    assert await ledger.total("c", n=10, as_of=1) == Total(5, 1, 1, {5: 1}, 1)


async def test_an_item_of_another_campaign_is_another_item(ledger: Ledger) -> None:
    await apply(ledger, rating(1, 5, "a"), rating(2, 9, "a", campaign="d"))
    assert await ledger.total("c", item="a", n=10) == Total(5, 1, 1, {5: 1}, 1)
    assert await apply(ledger, about(3, Change, 2, 1)) == [NO_RATING]


async def test_long_runs_of_comments_do_not_hide_the_window(ledger: Ledger) -> None:
    await apply(ledger, *(rating(i, i % 11) for i in range(1, 1_001)))
    await apply(ledger, *(about(i, Comment, 1, "x") for i in range(2_000, 5_000)))
    await apply(ledger, *(rating(i, 10) for i in range(9_000, 9_005)))
    found = await ledger.total("c", n=10)
    assert found is not None
    assert found.sum == 5 * 10 + sum(i % 11 for i in range(996, 1_001))


# ------------------------------------------------------------------------ poison


@pytest.mark.parametrize(
    "poison",
    [
        rating(2, 2**63),
        rating(2, -(2**40)),
        Submission(b"short", Rating("c", 1, 5)),
        rating(2, 5, "\ud800"),
        rating(2, 5, campaign="\udfff"),
        rating(2, 5, comment="\ud800"),
        Submission(number(2), Rating("c", 2**70, 5)),
        Submission(number(2), Rating("c", 1, 5.5)),  # type: ignore[arg-type]
        Submission(number(2), Rating("c", "x", 5)),  # type: ignore[arg-type]
        Submission(number(2), Rating("c", 1, 5, None)),  # type: ignore[arg-type]
        about(2, Change, 1, 2**62),
        about(2, Comment, 1, "\ud800"),
    ],
    ids=repr,
)
async def test_what_cannot_be_stored_fails_alone(ledger: Ledger, poison: Submission) -> None:
    outcomes = await apply(ledger, rating(1, 5, "new"), poison, rating(3, 6, "new"))
    assert [outcomes[0], outcomes[2]] == [APPLIED, APPLIED]
    assert isinstance(outcomes[1], Exception)
    assert await ledger.total("c", n=10) == Total(11, 2, 2, {5: 1, 6: 1}, 2)
    assert await differences(ledger) == []


# ------------------------------------------------------------------------ the surface


async def test_an_empty_batch_is_applied(ledger: Ledger) -> None:
    assert await ledger.apply([], applied_at_us=1) == []


async def test_what_was_never_rated_has_no_total(ledger: Ledger) -> None:
    assert await ledger.total("nobody", n=1) is None
    await apply(ledger, rating(1, 5, "a"))
    assert await ledger.total("c", item="b", n=1) is None
    assert await ledger.total("c", n=1, as_of=0) is None
    assert await ledger.last_seq("nobody") == 0


async def test_a_window_of_none_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="n=0"):
        await ledger.total("c", n=0)


async def test_capabilities_say_what_is_survived(ledger: Ledger) -> None:
    assert ledger.capabilities == LedgerCapabilities(frozenset({"kill", "power"}), True, None)


async def test_entries_go_on_after_a_sequence_number(ledger: Ledger) -> None:
    await apply(ledger, *(rating(i, 1) for i in range(1, 2_501)))
    seqs = [entry.seq async for entry in ledger.entries("c", since_seq=2)]
    assert seqs == list(range(3, 2_501))


async def test_a_closed_ledger_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        pass
    await ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        await apply(ledger, rating(1, 5))
    with pytest.raises(LedgerError, match="closed"):
        await ledger.last_seq("c")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlit:///x.db", "did you mean 'sqlite'"),
        ("x.db", "is no ledger URL"),
        ("sqlite://x.db", "three slashes"),
        ("sqlite://", "names no file"),
        ("sqlite:///x.db?comit=loop", "did you mean 'commit'"),
        ("sqlite:///x.db?commit=loop&commit=loop", "twice"),
        ("sqlite:///x.db?commit=never", "auto, loop, thread"),
        ("redis://ann:s3cret@host/0", r"ann:\*\*\*@host"),
    ],
)
async def test_a_url_that_names_no_ledger_is_refused(url: str, message: str) -> None:
    with pytest.raises(LedgerURLError, match=message):
        await open_ledger(url)
