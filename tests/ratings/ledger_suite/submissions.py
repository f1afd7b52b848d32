"""What the suite submits: short words for entries under numbered ids."""

import random
from collections.abc import Iterator
from typing import Final

from hypothesis import strategies as st

from molva.ratings.ledger import Ledger, Outcome
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

__all__ = [
    "APPLIED",
    "CONFLICT",
    "DUPLICATE",
    "HISTORIES",
    "NO_EFFECT",
    "NO_RATING",
    "about",
    "apply",
    "long_history",
    "number",
    "rating",
    "ratings",
]

APPLIED, DUPLICATE, CONFLICT, NO_RATING, NO_EFFECT = Outcome


def number(n: int) -> bytes:
    return n.to_bytes(16, "big")


def rating(
    id_: int, rate: int, item: str = "", *, campaign: str = "c", comment: str | None = None
) -> Submission:
    return Submission(number(id_), Rating(campaign, 1_000 + id_, rate, item, comment))


def ratings(first: int, count: int, *, campaign: str = "c", items: int = 3) -> list[Submission]:
    """Return ratings whose ids go on from ``first``, spread over a few items."""
    return [
        rating(id_, id_ % 11, f"item-{id_ % items}", campaign=campaign)
        for id_ in range(first, first + count)
    ]


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


# Ids from a small set, so that they meet again: as duplicates, conflicts and targets.
_IDS: Final = st.integers(0, 30)
_CAMPAIGNS: Final = st.sampled_from(["c", "c", "c", "d"])
_RATES: Final = st.integers(-1, 3)
_RATINGS: Final = st.builds(
    lambda id_, rate, item, campaign, comment: rating(
        id_, rate, item, campaign=campaign, comment=comment
    ),
    _IDS,
    _RATES,
    st.sampled_from(["", "a", "b"]),
    _CAMPAIGNS,
    st.sampled_from([None, None, "", "so", "so so"]),
)
_OTHERS: Final = st.one_of(
    st.builds(
        lambda i, t, r, c: about(i, Change, t, r, campaign=c), _IDS, _IDS, _RATES, _CAMPAIGNS
    ),
    st.builds(lambda i, t, c: about(i, Retraction, t, campaign=c), _IDS, _IDS, _CAMPAIGNS),
    st.builds(lambda i, t, c: about(i, Exclusion, t, "x", campaign=c), _IDS, _IDS, _CAMPAIGNS),
    st.builds(lambda i, t, c: about(i, Restoration, t, campaign=c), _IDS, _IDS, _CAMPAIGNS),
    st.builds(lambda i, t, c: about(i, Comment, t, "hm", campaign=c), _IDS, _IDS, _CAMPAIGNS),
)
HISTORIES: Final = st.lists(st.lists(st.one_of(_RATINGS, _OTHERS), max_size=12), max_size=8)

_CORRECTIONS: Final[list[type[Entry]]] = [
    *(Exclusion, Exclusion, Exclusion, Restoration, Retraction, Comment, Change)
]


def long_history(random_: random.Random, length: int) -> Iterator[Submission]:
    """Ratings in many items with a share of everything else, in clusters."""
    for id_ in range(1, length + 1):
        share = 0.8 if id_ // 200 % 3 == 1 else 0.05
        if id_ > 10 and random_.random() < share:
            # Half of the corrections meet the newest ratings, where windows begin.
            target = id_ - random_.randint(1, 10) if id_ % 2 else random_.randint(1, id_ - 1)
            kind = random_.choice(_CORRECTIONS)
            more = random_.randint(0, 10) if kind is Change else "x"
            yield about(id_, kind, target, more)
        else:
            item = "hot" if random_.random() < 0.6 else f"item-{random_.randint(1, 5)}"
            yield rating(id_, random_.randint(0, 10), item)
