"""What broker and ledger hold against what clients were told: every contradiction.

    lost        answered with 2xx, and neither counted nor among the dead letters
    phantom     counted, and never sent
    aborted     counted, and refused for certain each time it was sent
    doubled     counted twice under one id
    garbled     counted as something other than what was sent
    hole        a sequence number that nothing has
    running     the place or the sum that is kept beside a rating, and is not what comes before
    forgotten   an id that was counted and that the ledger would not know again, or one that it
                knows and never counted, where it keeps ids apart
    total       a number that the ledger keeps and its ratings do not give
    read        an answer to GET /total that its ``as_of`` does not give
    backwards   an answer older than one that was there before it was asked for
    order       two ratings of one item, counted the other way round than they were sent,
                the second after the first was acknowledged; where the broker promises it
    poison      a message that cannot be counted, and is not among the dead letters; or one
                among them that could have been

Whether an id that nobody was told about is counted or not is right either way.

All values are unique, so sets and sorting decide everything, in O(n log n). A search for a
linear order of all operations, as for a register, is exponential and would find no more.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Protocol

from tests.faults.live.client import Told, Totals
from tests.faults.live.evidence import Evidence
from tests.faults.live.ledgers import Row

__all__ = ["History", "judge"]

# Examples of each kind that are shown. One bug makes thousands.
_SHOWN: Final = 3

Finding = tuple[str, str]


class History(Protocol):
    """What clients were told, live or simulated.

    Attributes:
        ratings: By id, what was sent first under it.
        conflicts: Ratings under an id that stands for another one.
        totals: Answers to ``GET /total``.
    """

    @property
    def ratings(self) -> Mapping[bytes, Told]: ...

    @property
    def conflicts(self) -> Sequence[Told]: ...

    @property
    def totals(self) -> Sequence[Totals]: ...


def judge(
    history: History,
    evidence: Evidence,
    poisoned: Mapping[bytes, int],
    *,
    ordered: bool = True,
) -> list[str]:
    """Return every kind of contradiction, how often it is there, and some of it.

    Args:
        history: What clients sent, and what they were told.
        evidence: What broker and ledger hold, with nothing waiting any more.
        poisoned: Ids of messages that nobody can count, to how many dead letters each may be.
        ordered: Whether the broker promises the order of a key.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for check in (
        _ids(history, evidence),
        _dense(evidence.rows),
        _totals(evidence),
        _reads(history.totals, evidence.rows),
        _backwards(history.totals),
        _running(evidence.rows),
        _known(evidence),
        _order(history.ratings, evidence.rows) if ordered else iter(()),
        _dead(history, evidence, poisoned),
    ):
        for kind, what in check:
            found[kind].append(what)
    return [
        f"{kind}: {len(what):,}, {'; '.join(what[:_SHOWN])}{'; …' if len(what) > _SHOWN else ''}"
        for kind, what in found.items()
    ]


def _ids(history: History, evidence: Evidence) -> Iterator[Finding]:
    sent = history.ratings
    count = Counter(row.id for row in evidence.rows)
    lost = [told for told in sent.values() if told.ok_at is not None and told.id not in count]
    for number, told in enumerate(lost):
        shape = _shape(told, sent, count) if number < _SHOWN else ""
        yield "lost", f"{told.id.hex()} of client {told.process}, {shape}"
    for row in evidence.rows:
        sender = sent.get(row.id)
        if sender is None:
            yield "phantom", str(row)
        elif sender.failed == sender.attempts:
            yield "aborted", row.id.hex()
        elif (sender.campaign, sender.item, sender.rate) != (row.campaign, row.item, row.rate):
            yield "garbled", f"{sender} is counted as {row}"
        if count[row.id] > 1:
            yield "doubled", f"{row.id.hex()}, {count[row.id]} times"


def _shape(lost: Told, sent: Mapping[bytes, Told], count: Mapping[bytes, int]) -> str:
    """Say where in its client's ratings a loss is: the shape of a loss points at the bug."""
    own = [told for told in sent.values() if told.process == lost.process]
    there = [told.id in count for told in own]
    at = own.index(lost)
    if not any(there[:at]):
        return "at its beginning: everything before is gone, too"
    if not any(there[at:]):
        return "at its end: nothing came after it"
    return f"in the middle, {at} of {len(own)}"


def _dense(rows: Sequence[Row]) -> Iterator[Finding]:
    last: dict[str, int] = {}
    for row in rows:
        expected = last.get(row.campaign, 0) + 1
        if row.seq != expected:
            yield "hole", f"{row.campaign} goes from {expected - 1} to {row.seq}"
        last[row.campaign] = row.seq


def _running(rows: Sequence[Row]) -> Iterator[Finding]:
    """Compare the place and the sums beside each rating with what comes before it."""
    so_far: dict[tuple[str, str | None], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for row in rows:
        for scope in ((row.campaign, row.item), (row.campaign, None)):
            position, sum_ = so_far[scope]
            so_far[scope] = (position + 1, sum_ + row.rate)
        given = (*so_far[row.campaign, row.item], *so_far[row.campaign, None])
        if row.running is not None and row.running != given:
            yield "running", f"{row}, and what comes before gives {given}"


def _known(evidence: Evidence) -> Iterator[Finding]:
    if evidence.known is None:
        return
    counted = {(row.campaign, row.id) for row in evidence.rows}
    for campaign, id_ in counted ^ evidence.known:
        yield "forgotten", f"{id_.hex()} of {campaign}"


def _totals(evidence: Evidence) -> Iterator[Finding]:
    rates: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for row in evidence.rows:
        rates[row.campaign, row.item].append(row.rate)
        rates[row.campaign, None].append(row.rate)
    for key in rates.keys() | evidence.totals.keys():
        given = (len(rates[key]), sum(rates[key]), dict(Counter(rates[key])))
        kept = evidence.totals.get(key, (0, 0, {}))
        if given != kept:
            yield "total", f"{key} is kept as {kept}, its ratings give {given}"


def _reads(reads: Sequence[Totals], rows: Sequence[Row]) -> Iterator[Finding]:
    """Compare each answer with the ledger's prefix at its ``as_of``, in one sweep."""
    for campaign in {read.campaign for read in reads}:
        mine = [row for row in rows if row.campaign == campaign]
        rates: dict[str | None, list[int]] = defaultdict(list)
        counts: dict[str | None, Counter[int]] = defaultdict(Counter)
        upto = 0
        asked = (read for read in reads if read.campaign == campaign)
        for read in sorted(asked, key=lambda read: read.as_of):
            while upto < len(mine) and mine[upto].seq <= read.as_of:
                row = mine[upto]
                for item in (row.item, None):
                    rates[item].append(row.rate)
                    counts[item][row.rate] += 1
                upto += 1
            prefix = rates[read.item]
            last = prefix[-read.n :]
            if not last or read.as_of > mine[-1].seq:
                yield "read", f"{read} is of something that never was"
            elif (read.count, read.distribution, read.average) != (
                len(prefix),
                counts[read.item],
                sum(last) / len(last),
            ):
                yield "read", f"{read}, but {len(prefix)} ratings average {sum(last) / len(last)}"


def _backwards(reads: Sequence[Totals]) -> Iterator[Finding]:
    for campaign in {read.campaign for read in reads}:
        mine = [read for read in reads if read.campaign == campaign]
        ended = sorted(mine, key=lambda read: read.until)
        place, seen = 0, 0
        for read in sorted(mine, key=lambda read: read.at):
            while place < len(ended) and ended[place].until < read.at:
                seen = max(seen, ended[place].as_of)
                place += 1
            if read.as_of < seen:
                yield "backwards", f"{read}, and {seen} had been shown before"


def _order(sent: Mapping[bytes, Told], rows: Sequence[Row]) -> Iterator[Finding]:
    by_item: dict[tuple[str, str], list[Told]] = defaultdict(list)
    for row in rows:
        if row.id in sent:
            by_item[row.campaign, row.item].append(sent[row.id])
    for key, ratings in by_item.items():
        # When the first of those that were counted later was acknowledged.
        first_ok, first = float("inf"), None
        for told in reversed(ratings):
            if first_ok < told.at:
                yield "order", f"{key}: {told} is counted before {first}"
            if told.ok_at is not None and told.ok_at < first_ok:
                first_ok, first = told.ok_at, told


def _dead(history: History, evidence: Evidence, poisoned: Mapping[bytes, int]) -> Iterator[Finding]:
    """Compare the dead letters with the messages that must, or may, be among them."""
    dead = Counter(letter.id for letter in evidence.dead)
    for id_, sent in poisoned.items():
        if not 1 <= dead[id_] <= sent:
            yield "poison", f"{id_.hex()} may be {sent} dead letters, and is {dead[id_]}"
    second = {told.id: told for told in history.conflicts}
    for told in second.values():
        if told.ok_at is not None and not dead[told.id]:
            yield "lost", f"{told.id.hex()}, another rating under an id that was taken"
    for letter in evidence.dead:
        id_ = letter.id
        if id_ in poisoned:
            continue
        other = second.get(id_)
        body = letter.body
        if (
            other is None
            or other.failed == other.attempts
            or json.loads(body)["rate"] != other.rate
        ):
            yield "poison", f"{id_.hex()} is dead and need not be: {letter.reason}; {body[:120]!r}"
