"""Ratings and the other entries of a ledger: what they hold, how they travel, what is refused.

Everything here is pure. The intake's fast lane and the worker judge a rating with the
same function, so that what the one accepts the other never refuses.

On the wire an entry is one JSON object whose ``kind`` names its shape and the version of
that shape (``rating/1``). Unknown fields are refused on purpose: a message of a newer
version waits in the dead letters until it can be replayed, instead of being half
understood. The id is not in the body: it is the message's own.
"""

from typing import Final, NamedTuple, final

import msgspec

from molva.ratings.campaign import Campaign

__all__ = [
    "MAX_COMMENT_CHARACTERS",
    "MAX_ID_CHARACTERS",
    "MAX_ITEM_CHARACTERS",
    "Change",
    "Comment",
    "Entry",
    "Exclusion",
    "FieldError",
    "Rating",
    "RefusedError",
    "Restoration",
    "Retraction",
    "Submission",
    "check_comment",
    "check_item",
    "check_rate",
    "decode_entry",
    "encode_entry",
    "rate_from_text",
]

# Long enough for any path of a page, short enough that an index over it stays small.
MAX_ITEM_CHARACTERS: Final = 512
# A page of text. Longer, and the body cap of the intake (in bytes) would refuse it first.
MAX_COMMENT_CHARACTERS: Final = 2_000
# As the usual services allow for an idempotency key.
MAX_ID_CHARACTERS: Final = 200
# No scale needs more; int() of a longer text costs time that grows with its square.
_MAX_RATE_CHARACTERS: Final = 6


class _Entry(
    msgspec.Struct, frozen=True, tag_field="kind", forbid_unknown_fields=True, omit_defaults=True
):
    """What all entries share.

    Attributes:
        campaign: Name of the campaign that the entry belongs to.
        accepted_at_us: When the intake accepted it: microseconds since 1970, UTC.
    """

    campaign: str
    accepted_at_us: int


@final
class Rating(_Entry, frozen=True, tag="rating/1"):
    """What a visitor gave.

    Attributes:
        rate: An integer on the campaign's scale.
        item: What was rated, "" for the campaign itself.
        comment: The visitor's words, kept apart from the numbers.
    """

    rate: int
    item: str = ""
    comment: str | None = None


@final
class Change(_Entry, frozen=True, tag="change/1"):
    """The visitor gives an earlier rating another rate. ``rating_id``: 16 bytes."""

    rating_id: bytes
    rate: int


@final
class Retraction(_Entry, frozen=True, tag="retraction/1"):
    """The visitor takes an earlier rating back, for good. ``rating_id``: 16 bytes."""

    rating_id: bytes


@final
class Comment(_Entry, frozen=True, tag="comment/1"):
    """Words added to an earlier rating; the last ones stand. ``rating_id``: 16 bytes."""

    rating_id: bytes
    text: str


@final
class Exclusion(_Entry, frozen=True, tag="exclusion/1"):
    """The owner stops trusting a rating. ``rating_id``: 16 bytes; ``reason``: for people."""

    rating_id: bytes
    reason: str = ""


@final
class Restoration(_Entry, frozen=True, tag="restoration/1"):
    """The owner trusts an excluded rating again. ``rating_id``: 16 bytes."""

    rating_id: bytes


Entry = Rating | Change | Retraction | Comment | Exclusion | Restoration


class Submission(NamedTuple):
    """An entry under its own id (16 bytes), as the ledger takes it."""

    id: bytes
    entry: Entry


_encoder: Final = msgspec.json.Encoder()
_decoder: Final[msgspec.json.Decoder[Entry]] = msgspec.json.Decoder(Entry)


def encode_entry(entry: Entry) -> bytes:
    """Return the entry as a message's body: UTF-8 JSON."""
    return _encoder.encode(entry)


def decode_entry(body: bytes) -> Entry:
    """Return the entry that a message's body holds.

    Raises:
        ValueError: The body is no entry of a known kind and version; says why.
    """
    try:
        return _decoder.decode(body)
    except RecursionError:
        raise ValueError("nested deeper than any entry is") from None


@final
class FieldError(msgspec.Struct, frozen=True):
    """One field that was refused, and what it would accept."""

    field: str
    detail: str


@final
class RefusedError(ValueError):
    """The input was refused; nothing was stored. ``errors`` names each field."""

    def __init__(self, *errors: FieldError) -> None:
        super().__init__("; ".join(f"{error.field}: {error.detail}" for error in errors))
        self.errors = errors


def rate_from_text(text: str, campaign: Campaign) -> int:
    """Return the rate written in ``text``, which must be on the campaign's scale.

    Only ASCII digits with an optional minus are an integer here: Python's ``int`` would
    also take ``1_0``, ``٣`` and blanks around it.

    Raises:
        RefusedError: Not an integer, or outside the scale.
    """
    digits = text[1:] if text[:1] == "-" else text
    if len(text) <= _MAX_RATE_CHARACTERS and digits.isascii() and digits.isdigit():
        return check_rate(int(text), campaign)
    raise RefusedError(FieldError("rate", f"{_shown(text)} is not {_accepted(campaign)}"))


def check_rate(rate: int, campaign: Campaign) -> int:
    """Return ``rate`` if it is on the campaign's scale.

    Raises:
        RefusedError: It is not.
    """
    if campaign.minimum <= rate <= campaign.maximum:
        return rate
    raise RefusedError(FieldError("rate", f"{_shown(str(rate))} is not {_accepted(campaign)}"))


def check_item(item: str) -> str:
    """Return ``item`` if it can name what is rated.

    Raises:
        RefusedError: Too long, or it holds what is no text.
    """
    if len(item) > MAX_ITEM_CHARACTERS:
        detail = f"{len(item):,} characters; at most {MAX_ITEM_CHARACTERS} are accepted"
        raise RefusedError(FieldError("item", detail))
    if not item.isprintable():
        # isprintable is false for control characters and for lone surrogates, both of
        # which some database behind us would refuse later, when it is too late.
        _refuse_unprintable("item", item, allowed="")
    return item


def check_comment(comment: str) -> str:
    """Return ``comment`` if it is text of an accepted length.

    Raises:
        RefusedError: Too long, or it holds what is no text.
    """
    if len(comment) > MAX_COMMENT_CHARACTERS:
        detail = f"{len(comment):,} characters; at most {MAX_COMMENT_CHARACTERS:,} are accepted"
        raise RefusedError(FieldError("comment", detail))
    if not comment.isprintable():
        _refuse_unprintable("comment", comment, allowed="\t\n\r")
    return comment


def _refuse_unprintable(field: str, text: str, *, allowed: str) -> None:
    for character in text:
        if character in allowed:
            continue
        if "\ud800" <= character <= "\udfff":
            raise RefusedError(FieldError(field, "holds a lone surrogate; send valid UTF-8"))
        if character < " " or "\x7f" <= character <= "\x9f":
            name = f"U+{ord(character):04X}"
            detail = f"holds the control character {name}; text is accepted"
            raise RefusedError(FieldError(field, detail))


def _accepted(campaign: Campaign) -> str:
    return f"an integer from {campaign.minimum} to {campaign.maximum}"


def _shown(text: str) -> str:
    # What a stranger sent goes back to him shortened and escaped, never whole.
    return ascii(text if len(text) <= 40 else text[:40] + "…")
