"""What a server's ledger refuses of a submission before it asks the server.

A server would refuse the whole batch, and not always say whose fault it was.
"""

from typing import Final

from molva._base.ids import ID_BYTES
from molva.ratings.ledger._content import text_of
from molva.ratings.ledger._schema import MAX_RATE
from molva.ratings.rating import Change, Rating, Submission

__all__ = ["check_id", "check_name", "check_numbers", "check_submission"]

# Bytes of a name that an index of PostgreSQL surely holds: a third of a page, less what
# stands around it.
_MAX_NAME_BYTES: Final = 2_600
# Microseconds since 1970 that a Lua number holds exactly: the year 2255.
_LAST_MOMENT: Final = 1 << 53


def check_submission(submission: Submission) -> None:
    """Raise where the submission can never be stored.

    Raises:
        ValueError: Says what was refused and what is accepted; likewise TypeError.
    """
    id_, entry = submission
    check_id(id_)
    rate = entry.rate if isinstance(entry, Rating | Change) else 0
    check_numbers(rate, entry.accepted_at_us)
    check_name("campaign", entry.campaign)
    if isinstance(entry, Rating):
        check_name("item", entry.item)
    else:
        check_id(entry.rating_id)
    text = text_of(entry)
    if text is not None:
        text.encode()


def check_id(id_: bytes) -> None:
    """Raise ValueError where it is no id."""
    if type(id_) is not bytes or len(id_) != ID_BYTES:
        raise ValueError(f"id {id_!r:.60} is refused: {ID_BYTES} bytes are accepted")


def check_numbers(rate: int, accepted_at_us: int) -> None:
    """Raise ValueError where a number is none that a ledger adds up."""
    if type(rate) is not int or not -MAX_RATE <= rate <= MAX_RATE:
        raise ValueError(
            f"rate {rate!r:.40} is refused: an integer from {-MAX_RATE:,} to {MAX_RATE:,} "
            "is accepted"
        )
    if type(accepted_at_us) is not int or not 0 <= accepted_at_us <= _LAST_MOMENT:
        raise ValueError(f"accepted_at_us {accepted_at_us!r:.40} is refused: microseconds from 0")


def check_name(what: str, name: str) -> None:
    """Raise ValueError or TypeError where a name cannot be one in every ledger."""
    if not isinstance(name, str):
        raise TypeError(f"{what} {name!r:.40} is no text")
    if "\0" in name or len(name.encode()) > _MAX_NAME_BYTES:
        raise ValueError(
            f"{what} {name!r:.40} is refused: at most {_MAX_NAME_BYTES:,} bytes of UTF-8 without "
            "U+0000 are accepted"
        )
