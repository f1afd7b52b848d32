"""What a ledger should answer to each submission, by the words of ``Outcome``."""

from collections import defaultdict

from molva.ratings.ledger import LedgerEntry, Outcome
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
from tests.ratings.ledger_suite.submissions import (
    APPLIED,
    CONFLICT,
    DUPLICATE,
    NO_EFFECT,
    NO_RATING,
)

__all__ = ["Reference"]


class Reference:
    """A ledger of a few lines. ``apply`` takes what a ledger takes, one at a time.

    Args:
        ids: ``ledger`` where equal ids meet wherever they come, ``campaign`` where each
            campaign has ids of its own; see ``LedgerCapabilities``.
    """

    def __init__(self, ids: str = "ledger") -> None:
        self._ids = ids
        self.contents: dict[tuple[str, bytes], Entry] = {}
        self.idle: dict[tuple[str, bytes], Entry] = {}
        self.ratings: dict[tuple[str, bytes], tuple[str, int]] = {}
        self.states: dict[tuple[str, bytes], tuple[int, bool, bool]] = {}
        self.entries: defaultdict[str, list[LedgerEntry]] = defaultdict(list)

    def key(self, entry: Entry, id_: bytes) -> tuple[str, bytes]:
        return (entry.campaign if self._ids == "campaign" else "", id_)

    def apply(self, submission: Submission) -> Outcome:
        id_, entry = submission
        key = self.key(entry, id_)
        if key in self.contents:
            return DUPLICATE if same(self.contents[key], entry) else CONFLICT
        if isinstance(entry, Rating):
            seq = self.append(id_, entry, "rating", rate=entry.rate, item=entry.item)
            self.ratings[key] = entry.campaign, seq
            self.states[key] = entry.rate, False, False
            if entry.comment:
                self.append(None, entry, "comment", target=seq, text=entry.comment)
            return APPLIED
        if key in self.idle:
            return NO_EFFECT if same(self.idle[key], entry) else CONFLICT
        target_key = self.key(entry, entry.rating_id)
        campaign, target = self.ratings.get(target_key, ("", 0))
        if campaign != entry.campaign:
            return NO_RATING
        before = self.states[target_key]
        after = amended(before, entry)
        if isinstance(entry, Comment):
            self.append(id_, entry, "comment", target=target, text=entry.text)
        elif after == before:
            self.idle[key] = entry
            return NO_EFFECT
        elif isinstance(entry, Change):
            self.append(id_, entry, "change", rate=entry.rate, target=target)
        else:
            text = entry.reason or None if isinstance(entry, Exclusion) else None
            self.append(id_, entry, type(entry).__name__.lower(), target=target, text=text)
        self.states[target_key] = after
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
            self.contents[self.key(entry, id_)] = entry
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
