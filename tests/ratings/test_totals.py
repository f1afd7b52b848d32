"""The reference counts by hand-made examples; the ledger is compared with it elsewhere."""

from molva.ratings.ledger import LedgerEntry, Total
from molva.ratings.totals import total


def entry(
    seq: int, kind: str, *, item: str | None = None, rate: int | None = None, of: int | None = None
) -> LedgerEntry:
    return LedgerEntry(seq, kind, bytes(16), item, rate, of, None, 0, None, 0, 0)


LOG = [
    entry(1, "rating", item="a", rate=2),
    entry(2, "rating", item="b", rate=4),
    entry(3, "rating", item="a", rate=9),
    entry(4, "exclusion", of=3),
    entry(5, "change", of=1, rate=8),
    entry(6, "comment", of=1),
    entry(7, "restoration", of=3),
    entry(8, "retraction", of=2),
]


def test_the_last_n_are_the_newest_ratings() -> None:
    assert total(LOG, n=2, as_of=3) == Total(13, 2, 3, {2: 1, 4: 1, 9: 1}, 3)


def test_an_excluded_rating_makes_room_for_an_older_one() -> None:
    assert total(LOG, n=2, as_of=4) == Total(6, 2, 2, {2: 1, 4: 1}, 4)


def test_a_changed_rating_counts_with_its_new_rate() -> None:
    assert total(LOG, n=2, as_of=6) == Total(12, 2, 2, {4: 1, 8: 1}, 6)


def test_a_restored_rating_counts_again_in_its_old_place() -> None:
    assert total(LOG, n=1, as_of=7) == Total(9, 1, 3, {4: 1, 8: 1, 9: 1}, 7)


def test_a_retracted_rating_is_gone() -> None:
    assert total(LOG, n=10) == Total(17, 2, 2, {8: 1, 9: 1}, 8)


def test_raw_totals_heed_no_correction() -> None:
    assert total(LOG, n=10, trusted=False) == Total(15, 3, 3, {2: 1, 4: 1, 9: 1}, 8)


def test_an_item_is_counted_by_itself() -> None:
    assert total(LOG, item="a", n=1, as_of=3) == Total(9, 1, 2, {2: 1, 9: 1}, 3)


def test_where_nothing_counts_there_is_no_total() -> None:
    assert total(LOG, item="z", n=1) is None
    assert total(LOG, n=1, as_of=0) is None
    assert total([], n=1) is None
