"""A batch of ratings as the arrays that ``append_ratings`` takes.

Checked, counted and turned into columns before the server is asked: everything here
happens while other processes hold the campaign's row, not while we do.
"""

from collections.abc import Sequence
from typing import Final, final

from molva._base.ids import ID_BYTES
from molva.ratings.ledger._content import text_hash, text_of
from molva.ratings.ledger._schema import MAX_RATE
from molva.ratings.rating import Change, Rating, Submission

__all__ = ["RatingColumns", "check_submission"]

# Bytes of a name that an index of PostgreSQL surely holds: a third of a page, less what
# stands around it.
_MAX_NAME_BYTES: Final = 2_600

_INT8_MAX: Final = (1 << 63) - 1


def check_submission(submission: Submission) -> None:
    """Raise where the submission can never be stored.

    Raises:
        ValueError: Says what was refused and what is accepted; likewise TypeError.
    """
    id_, entry = submission
    _check_id(id_)
    rate = entry.rate if isinstance(entry, Rating | Change) else 0
    _check_numbers(rate, entry.accepted_at_us)
    _check_name("campaign", entry.campaign)
    if isinstance(entry, Rating):
        _check_name("item", entry.item)
    else:
        _check_id(entry.rating_id)
    text = text_of(entry)
    if text is not None:
        text.encode()


@final
class RatingColumns:
    """Ratings, and the comments that came with them, column by column.

    Args:
        ratings: Submissions of ratings, in order.

    Raises:
        ValueError: One of them can never be stored; likewise TypeError.
    """

    def __init__(self, ratings: Sequence[Submission]) -> None:
        # Name to entries, ratings and sum that it gains.
        campaigns: dict[str, list[int]] = {}
        # Campaign and item to its number from 1, its ratings and their sum.
        items: dict[tuple[str, str], list[int]] = {}
        self._ids: list[bytes | None] = []
        self._item_of: list[int] = []
        self._rates: list[int | None] = []
        self._accepted: list[int] = []
        self._texts: dict[int, bytes] = {}
        for id_, rating in ratings:
            assert isinstance(rating, Rating)
            rate, accepted_at_us = rating.rate, rating.accepted_at_us
            _check_id(id_)
            _check_numbers(rate, accepted_at_us)
            item = items.get((rating.campaign, rating.item))
            if item is None:
                _check_name("campaign", rating.campaign)
                _check_name("item", rating.item)
                campaigns.setdefault(rating.campaign, [0, 0, 0])
                item = items[rating.campaign, rating.item] = [len(items) + 1, 0, 0]
            item[1] += 1
            item[2] += rate
            campaign = campaigns[rating.campaign]
            campaign[0] += 1
            campaign[1] += 1
            campaign[2] += rate
            self._ids.append(id_)
            self._item_of.append(item[0])
            self._rates.append(rate)
            self._accepted.append(accepted_at_us)
            if rating.comment:
                campaign[0] += 1
                self._texts[len(self._ids)] = rating.comment.encode()
                self._ids.append(None)
                self._item_of.append(item[0])
                self._rates.append(None)
                self._accepted.append(accepted_at_us)
        self.campaigns: Final = sorted(campaigns)
        self._gained = [campaigns[name] for name in self.campaigns]
        self._items = items

    def arguments(self, applied_at_us: int) -> list[object]:
        """Return the arguments of ``append_ratings``."""
        number = {name: at for at, name in enumerate(self.campaigns, 1)}
        items = self._items
        hashes: list[bytes | None] = [None] * len(self._ids)
        texts: list[bytes | None] | None = None
        if self._texts:
            texts = hashes.copy()
            for at, text in self._texts.items():
                # The rating's row carries the hash, and the comment's own too.
                hashes[at - 1] = hashes[at] = text_hash(text.decode())
                texts[at] = text
        return [
            self.campaigns,
            [entries for entries, _, _ in self._gained],
            [count for _, count, _ in self._gained],
            [total for _, _, total in self._gained],
            [item for _, item in items],
            [number[campaign] for campaign, _ in items],
            [count for _, count, _ in items.values()],
            [total for _, _, total in items.values()],
            self._ids,
            self._item_of,
            self._rates,
            self._accepted,
            hashes,
            texts,
            applied_at_us,
        ]


def _check_id(id_: bytes) -> None:
    if type(id_) is not bytes or len(id_) != ID_BYTES:
        raise ValueError(f"id {id_!r:.60} is refused: {ID_BYTES} bytes are accepted")


def _check_numbers(rate: int, accepted_at_us: int) -> None:
    if type(rate) is not int or not -MAX_RATE <= rate <= MAX_RATE:
        raise ValueError(
            f"rate {rate!r:.40} is refused: an integer from {-MAX_RATE:,} to {MAX_RATE:,} "
            "is accepted"
        )
    if type(accepted_at_us) is not int or not 0 <= accepted_at_us <= _INT8_MAX:
        raise ValueError(f"accepted_at_us {accepted_at_us!r:.40} is refused: microseconds from 0")


def _check_name(what: str, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{what} {name!r:.40} is no text")
    if "\0" in name or len(name.encode()) > _MAX_NAME_BYTES:
        raise ValueError(
            f"{what} {name!r:.40} is refused: at most {_MAX_NAME_BYTES:,} bytes of UTF-8 without "
            "U+0000 are accepted"
        )
