"""Applying a batch of submissions inside one write transaction.

What a batch touches is read once, computed in Python, and written once at its end. A
batch is first taken on trust: its rows are inserted without a look at their ids. Where an
id is known already, or something cannot be stored, the unique index or SQLite says so,
the transaction is rolled back, and the batch is applied again one by one
(``apply_carefully``): each id is looked up, and what cannot be stored fails alone. A look
at every id beforehand would cost every batch what only a redelivered one needs.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final, cast, final

import apsw

from molva._base.ids import ID_BYTES
from molva.ratings.ledger._content import (
    KIND_OF,
    Content,
    content_hash,
    content_of,
    text_hash,
    text_of,
)
from molva.ratings.ledger._corrections import add_correction
from molva.ratings.ledger._schema import (
    BLOCK,
    COMMENT,
    MAX_RATE,
    RATING,
    SEQ_BITS,
    SEQ_MASK,
    EntryRow,
    entry_checksum,
)
from molva.ratings.ledger._tallies import Campaign, Tallies
from molva.ratings.ledger.protocol import Outcome
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

__all__ = ["REFUSALS", "apply_carefully", "apply_on_trust"]

# What SQLite, apsw and the checks below raise for a submission that can never be stored.
REFUSALS: Final = (
    ValueError,  # UnicodeEncodeError among them: a lone surrogate
    TypeError,
    OverflowError,
    apsw.ConstraintError,
    apsw.MismatchError,
    apsw.TooBigError,
)

_INSERT_ENTRY: Final = "INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


def apply_on_trust(
    connection: apsw.Connection, batch: Sequence[Submission], applied_at_us: int
) -> list[Outcome | Exception]:
    """Apply a batch whose ids are probably new.

    Raises:
        Exception: One of REFUSALS; roll back and apply the batch carefully.
    """
    writing = _Batch(connection, applied_at_us)
    outcomes: list[Outcome | Exception] = []
    for kind, run in groupby(batch, key=lambda submission: type(submission.entry)):
        if kind is Rating:
            ratings = cast("list[tuple[bytes, Rating]]", list(run))
            writing.append_ratings(ratings)
            outcomes += [Outcome.APPLIED] * len(ratings)
        else:
            outcomes += [writing.apply_one(submission) for submission in run]
    writing.flush()
    return outcomes


def apply_carefully(
    connection: apsw.Connection, batch: Sequence[Submission], applied_at_us: int
) -> list[Outcome | Exception]:
    """Apply a batch one by one; what cannot be stored is an Exception in its slot."""
    writing = _Batch(connection, applied_at_us)
    outcomes: list[Outcome | Exception] = []
    for submission in batch:
        connection.execute("SAVEPOINT submission")
        try:
            outcome: Outcome | Exception = writing.apply_one(submission)
            writing.flush()
        except REFUSALS as error:
            if _is_contradiction(error):
                raise
            connection.execute("ROLLBACK TO submission")
            writing.forget()
            outcome = error
        connection.execute("RELEASE submission")
        outcomes.append(outcome)
    return outcomes


def _is_contradiction(error: Exception) -> bool:
    # Its id was looked up and is new, and yet a key stands there already: the ledger's
    # numbers are wrong, not the submission.
    return isinstance(error, apsw.ConstraintError) and getattr(error, "extendedresult", 0) in (
        apsw.SQLITE_CONSTRAINT_UNIQUE,
        apsw.SQLITE_CONSTRAINT_PRIMARYKEY,
        apsw.SQLITE_CONSTRAINT_ROWID,
    )


@final
class _Batch:
    """What one batch has read and not yet written."""

    def __init__(self, connection: apsw.Connection, applied_at_us: int) -> None:
        self._connection = connection
        self._applied_at_us = applied_at_us
        self._tallies = Tallies(connection)
        self._comments: list[tuple[int, str]] = []

    # ------------------------------------------------------------- ratings

    def append_ratings(self, ratings: Sequence[tuple[bytes, Rating]]) -> None:
        """Append ratings, and the comments that came with them, without a look at ids."""
        rows = self._rating_rows(ratings)
        self._connection.executemany(_INSERT_ENTRY, ((*row, entry_checksum(row)) for row in rows))

    def _rating_rows(self, ratings: Sequence[tuple[bytes, Rating]]) -> Iterator[EntryRow]:
        # The hot path: everything here is paid for every rating.
        applied_at_us = self._applied_at_us
        tallies = self._tallies
        campaigns = tallies.campaigns
        for id_, rating in ratings:
            rate = rating.rate
            campaign = campaigns.get(rating.campaign) or tallies.campaign(rating.campaign)
            item = campaign.items.get(rating.item) or tallies.item(campaign, rating.item)
            _check(id_, rate)
            whole = campaign.whole
            campaign.seq = seq = campaign.seq + 1
            key = campaign.key << SEQ_BITS | seq
            whole.count += 1
            whole.sum += rate
            whole.distribution[rate] = whole.distribution.get(rate, 0) + 1
            item.count += 1
            item.sum += rate
            item.distribution[rate] = item.distribution.get(rate, 0) + 1
            if not seq % BLOCK:
                tallies.add_block(whole, seq)
            if not item.count % BLOCK:
                tallies.add_block(item, item.count)
            yield (
                key, id_, RATING, rate, item.key, item.count, item.sum, whole.count, whole.sum,
                None, text_hash(rating.comment) if rating.comment else None,
                rating.accepted_at_us, applied_at_us,
            )  # fmt: skip
            if rating.comment:
                yield self._comment_row(campaign, key, rating.comment, rating.accepted_at_us)

    def _comment_row(
        self, campaign: Campaign, rating_key: int, comment: str, accepted_at_us: int
    ) -> EntryRow:
        """Return the entry of a comment that came with its rating, whose id it shares."""
        row = self._row(
            campaign, None, COMMENT, None, rating_key, text_hash(comment), accepted_at_us
        )
        self._comments.append((row[0], comment))
        return row

    # --------------------------------------------------------- other entries

    def apply_one(self, submission: Submission) -> Outcome:
        """Apply one submission of any kind, whose id may be known."""
        id_, entry = submission
        known = self._content_under(id_)
        if known is not None:
            return Outcome.DUPLICATE if known == content_of(entry) else Outcome.CONFLICT
        if isinstance(entry, Rating):
            self.append_ratings([(id_, entry)])
            return Outcome.APPLIED
        _check(id_, entry.rate if isinstance(entry, Change) else 0)
        return self._apply_to_rating(id_, entry)

    def _content_under(self, id_: bytes) -> Content | None:
        row: Content | None = self._connection.execute(
            "SELECT entry.kind, campaign.campaign, scope.item, entry.rate, target.id, "
            "entry.text_hash FROM entry "
            f"JOIN campaign ON campaign.campaign_key = entry.entry_key >> {SEQ_BITS} "
            "LEFT JOIN scope ON scope.scope_key = entry.item_key "
            "LEFT JOIN entry AS target ON target.entry_key = entry.target_key "
            "WHERE entry.id = ?",
            (id_,),
        ).fetchone()
        return row

    def _apply_to_rating(self, id_: bytes, entry: Entry) -> Outcome:
        assert not isinstance(entry, Rating)
        remembered: tuple[bytes] | None = self._connection.execute(
            "SELECT content_hash FROM no_effect WHERE id = ?", (id_,)
        ).fetchone()
        if remembered is not None:
            same = remembered[0] == content_hash(entry)
            return Outcome.NO_EFFECT if same else Outcome.CONFLICT
        target: tuple[int, int, int, int, int, str] | None = self._connection.execute(
            "SELECT entry_key, rate, item_key, item_position, campaign_position, campaign "
            f"FROM entry JOIN campaign ON campaign_key = entry_key >> {SEQ_BITS} "
            f"WHERE id = ? AND kind = {RATING}",
            (entry.rating_id,),
        ).fetchone()
        if target is None or target[5] != entry.campaign:
            return Outcome.NO_RATING
        if isinstance(entry, Comment):
            self._append(id_, entry, target[0])
        elif not self._amend(id_, entry, target):
            self._connection.execute(
                "INSERT INTO no_effect VALUES (?, ?)", (id_, content_hash(entry))
            )
            return Outcome.NO_EFFECT
        return Outcome.APPLIED

    def _amend(
        self,
        id_: bytes,
        entry: Change | Retraction | Exclusion | Restoration,
        target: tuple[int, int, int, int, int, str],
    ) -> bool:
        """Correct a rating; return False where that changes nothing."""
        key, first_rate, item_key, item_position, position, _ = target
        row: tuple[int, int, int] | None = self._connection.execute(
            "SELECT rate, retracted, excluded FROM amended WHERE entry_key = ?", (key,)
        ).fetchone()
        rate, retracted, excluded = before = row or (first_rate, 0, 0)
        if retracted:
            return False  # taken back for good: nothing corrects it any more
        match entry:
            case Change():
                rate = entry.rate
            case Retraction():
                retracted = 1
            case Exclusion():
                excluded = 1
            case Restoration():
                excluded = 0
        if (rate, retracted, excluded) == before:
            return False
        seq = self._append(id_, entry, key)
        self._connection.execute(
            "INSERT OR REPLACE INTO amended VALUES (?, ?, ?, ?)", (key, rate, retracted, excluded)
        )
        rate_before = _counted(*before)
        rate_after = _counted(rate, retracted, excluded)
        if rate_before != rate_after:
            whole = self._tallies.campaign(entry.campaign).whole
            [(item_count,)] = self._connection.execute(
                "SELECT max(item_position) FROM entry WHERE item_key = ?", (item_key,)
            )
            for scope_key, count, at in (
                (whole.key, whole.count, position),
                (item_key, item_count, item_position),
            ):
                add_correction(
                    self._connection,
                    scope_key,
                    count=count,
                    position=at,
                    from_seq=seq,
                    rate_before=rate_before,
                    rate_after=rate_after,
                )
        return True

    def _append(self, id_: bytes, entry: Entry, target_key: int) -> int:
        """Append an entry about a rating; return its sequence number."""
        text = text_of(entry)
        row = self._row(
            self._tallies.campaign(entry.campaign),
            id_,
            KIND_OF[type(entry)],
            entry.rate if isinstance(entry, Change) else None,
            target_key,
            None if text is None else text_hash(text),
            entry.accepted_at_us,
        )
        self._connection.execute(_INSERT_ENTRY, (*row, entry_checksum(row)))
        if isinstance(entry, Comment):
            self._comments.append((row[0], entry.text))
        elif text is not None:
            self._connection.execute("INSERT INTO reason VALUES (?, ?)", (row[0], text))
        return row[0] & SEQ_MASK

    def _row(
        self,
        campaign: Campaign,
        id_: bytes | None,
        kind: int,
        rate: int | None,
        target_key: int,
        hash_of_text: bytes | None,
        accepted_at_us: int,
    ) -> EntryRow:
        """Return the next row of a campaign for any kind but a rating."""
        whole = campaign.whole
        campaign.seq = seq = campaign.seq + 1
        if not seq % BLOCK:
            self._tallies.add_block(whole, seq)
        return (
            campaign.key << SEQ_BITS | seq, id_, kind, rate, None, None, None,
            whole.count, whole.sum, target_key, hash_of_text, accepted_at_us, self._applied_at_us,
        )  # fmt: skip

    def flush(self) -> None:
        """Write what the entries so far have changed."""
        self._tallies.flush()
        if self._comments:
            self._connection.executemany("INSERT INTO comment VALUES (?, ?)", self._comments)
            self._comments.clear()

    def forget(self) -> None:
        """Drop what was read: it is ahead of the file, which was rolled back."""
        self._tallies.forget()
        self._comments.clear()


def _check(id_: bytes, rate: int) -> None:
    if type(id_) is not bytes or len(id_) != ID_BYTES:
        raise ValueError(f"id {id_!r:.60} is refused: {ID_BYTES} bytes are accepted")
    if type(rate) is not int or not -MAX_RATE <= rate <= MAX_RATE:
        raise ValueError(
            f"rate {rate!r:.40} is refused: an integer from {-MAX_RATE:,} to {MAX_RATE:,} "
            "is accepted"
        )


def _counted(rate: int, retracted: int, excluded: int) -> int | None:
    return None if retracted or excluded else rate
