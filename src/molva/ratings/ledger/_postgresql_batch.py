"""A batch of ratings as the arrays that ``append_ratings`` takes.

Checked, counted and turned into columns before the server is asked: everything here
happens while other processes hold the campaign's row, not while we do.
"""

from collections.abc import Sequence
from typing import Final, final

from molva.ratings.ledger._content import text_hash
from molva.ratings.ledger._refusals import check_id, check_name, check_numbers
from molva.ratings.rating import Rating, Submission

__all__ = ["RatingColumns"]


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
            check_id(id_)
            check_numbers(rate, accepted_at_us)
            item = items.get((rating.campaign, rating.item))
            if item is None:
                check_name("campaign", rating.campaign)
                check_name("item", rating.item)
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
