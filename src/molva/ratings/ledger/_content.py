"""What an id stands for: the content by which a redelivery is told from another entry."""

from hashlib import blake2b
from typing import Final

import msgspec

from molva.ratings.ledger._schema import (
    CHANGE,
    COMMENT,
    EXCLUSION,
    RATING,
    RESTORATION,
    RETRACTION,
)
from molva.ratings.rating import (
    Change,
    Comment,
    Entry,
    Exclusion,
    Rating,
    Restoration,
    Retraction,
)

__all__ = ["KIND_OF", "Content", "content_hash", "content_of", "text_hash", "text_of"]

# (kind, campaign, item, rate, rating it is about, hash of its words): what one id stands
# for. The time of acceptance is no part of it: a client that tries again has a later one.
Content = tuple[int, str, str | None, int | None, bytes | None, bytes | None]

KIND_OF: Final[dict[type, int]] = {
    Rating: RATING,
    Change: CHANGE,
    Retraction: RETRACTION,
    Comment: COMMENT,
    Exclusion: EXCLUSION,
    Restoration: RESTORATION,
}


def content_of(entry: Entry) -> Content:
    """Return what the entry's id stands for."""
    text = text_of(entry)
    return (
        KIND_OF[type(entry)],
        entry.campaign,
        entry.item if isinstance(entry, Rating) else None,
        entry.rate if isinstance(entry, Rating | Change) else None,
        None if isinstance(entry, Rating) else entry.rating_id,
        None if text is None else text_hash(text),
    )


def content_hash(entry: Entry) -> bytes:
    """Return 8 bytes that tell this content from any other."""
    return blake2b(msgspec.json.encode(content_of(entry)), digest_size=8).digest()


def text_of(entry: Entry) -> str | None:
    """Return the words of an entry; None where there are none.

    An empty comment beside a rating is none; as an entry of its own it takes back what
    was said before.
    """
    match entry:
        case Rating():
            return entry.comment or None
        case Comment():
            return entry.text
        case Exclusion():
            return entry.reason or None
        case _:
            return None


def text_hash(text: str) -> bytes:
    """Return 8 bytes that stand for the text also after it was erased."""
    return blake2b(text.encode(), digest_size=8).digest()
