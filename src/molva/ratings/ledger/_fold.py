"""Recomputing every number from the entries, by another road than ``apply`` took. Pure.

One fold over a campaign's entries, in order, gives each row that the derived tables should
hold, and says what is wrong with the entries themselves. Ledgers in SQL compare their
tables with it (``verify``) and write them anew from it (``rebuild``). It shares no code with
the writing: it keeps plain sums, computes the nodes of a Fenwick tree from what they cover,
and takes nothing from a derived table.

Memory grows with items and with corrections, not with ratings.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, final

from molva.ratings.ledger._schema import (
    BLOCK,
    CHANGE,
    COMMENT,
    EXCLUSION,
    KINDS,
    RATING,
    RESTORATION,
    RETRACTION,
    SEQ_BITS,
    SEQ_MASK,
    encode_distribution,
)
from molva.ratings.ledger.protocol import Difference

__all__ = ["Fold", "FoldedEntry", "Row", "Value"]

Value = int | str | None


@final
class Row(NamedTuple):
    """A row that a derived table should hold; ``of`` names its scope, for people."""

    table: str
    key: tuple[int, ...]
    values: tuple[Value, ...]
    campaign: str
    of: str


@final
class FoldedEntry(NamedTuple):
    """An entry as it stands in the file."""

    entry_key: int
    kind: int
    rate: int | None
    item_key: int | None
    item_position: int | None
    item_sum: int | None
    campaign_position: int
    campaign_sum: int
    target_key: int | None


@final
@dataclass(slots=True)
class _Tally:
    """A scope, counted from its first rating on."""

    name: str
    count: int = 0
    sum: int = 0
    distribution: Counter[int] = field(default_factory=Counter)
    shift: Counter[int] = field(default_factory=Counter)
    # (from_seq, position, Δcount, Δsum, count at that moment)
    corrections: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    def add(self, rate: int) -> None:
        self.count += 1
        self.sum += rate
        self.distribution[rate] += 1


@final
@dataclass(slots=True)
class _Rating:
    """A rating that was amended, as it is now and where it stands."""

    rate: int
    item_key: int
    item_position: int
    campaign_position: int
    retracted: bool = False
    excluded: bool = False

    def contribution(self) -> int | None:
        return None if self.retracted or self.excluded else self.rate

    def amend(self, entry: FoldedEntry) -> bool:
        """Let an entry have its effect; return False where it has none."""
        before = (self.rate, self.retracted, self.excluded)
        if self.retracted:
            return False
        if entry.kind == CHANGE and entry.rate is not None:
            self.rate = entry.rate
        elif entry.kind == RETRACTION:
            self.retracted = True
        elif entry.kind in (EXCLUSION, RESTORATION):
            self.excluded = entry.kind == EXCLUSION
        return before != (self.rate, self.retracted, self.excluded)


@final
class Fold:
    """One campaign: give it every entry with ``take``, in order, then call ``end``.

    Args:
        campaign_key: The campaign's key.
        campaign: Its name.
        scopes: Key and item of each of its scopes; item None is the campaign as a whole.
        look_up: Returns the entry of a key; None where there is none.
    """

    def __init__(
        self,
        campaign_key: int,
        campaign: str,
        scopes: Iterable[tuple[int, str | None]],
        look_up: Callable[[int], FoldedEntry | None],
    ) -> None:
        self._key = campaign_key
        self._campaign = campaign
        self._look_up = look_up
        self._seq = 0
        self._amended: dict[int, _Rating] = {}
        self._scopes: dict[int, _Tally] = {}
        self._whole_key = 0
        self._whole = _Tally("campaign")
        for scope_key, item in scopes:
            if item is None:
                self._whole_key = scope_key
                self._scopes[scope_key] = self._whole
            else:
                self._scopes[scope_key] = _Tally(f"item {item!r}")

    def begin(self) -> Iterator[Difference]:
        """Yield what is wrong before the first entry."""
        if not self._whole_key:
            yield self._difference("campaign, scope: row", None, "one for the whole campaign")

    def take(self, entry: FoldedEntry) -> Iterator[Row | Difference]:
        """Yield the derived rows that end with this entry, and what is wrong with it."""
        self._seq += 1
        if entry.entry_key & SEQ_MASK != self._seq:
            yield self._differs("seq", entry.entry_key & SEQ_MASK, self._seq)
            self._seq = entry.entry_key & SEQ_MASK
        if entry.kind == RATING:
            yield from self._count(entry)
        else:
            yield from self._amend(entry)
        yield from self._check_running(entry)
        if self._seq % BLOCK == 0:
            yield self._block(self._whole_key, self._whole, self._seq)

    def end(self) -> Iterator[Row]:
        """Yield the derived rows that the campaign as a whole gives."""
        yield self._row("campaign", (self._key,), (self._seq,), "campaign")
        yield from self._scope_rows()

    def _count(self, entry: FoldedEntry) -> Iterator[Row | Difference]:
        rate, item_key = entry.rate, entry.item_key
        if rate is None or item_key is None or item_key == self._whole_key:
            yield self._differs("row", (rate, item_key), "a rate and an item")
            return
        item = self._scopes.get(item_key)
        if item is None:
            yield self._difference(f"item {item_key}: row", None, "has ratings")
            item = self._scopes[item_key] = _Tally(f"item {item_key}")
        self._whole.add(rate)
        item.add(rate)
        if entry.item_position != item.count:
            yield self._differs("item_position", entry.item_position, item.count)
        if entry.item_sum != item.sum:
            yield self._differs("item_sum", entry.item_sum, item.sum)
        if item.count % BLOCK == 0:
            yield self._block(item_key, item, item.count)

    def _check_running(self, entry: FoldedEntry) -> Iterator[Difference]:
        if entry.campaign_position != self._whole.count:
            yield self._differs("campaign_position", entry.campaign_position, self._whole.count)
        if entry.campaign_sum != self._whole.sum:
            yield self._differs("campaign_sum", entry.campaign_sum, self._whole.sum)

    def _amend(self, entry: FoldedEntry) -> Iterator[Row | Difference]:
        if not RATING < entry.kind < len(KINDS):
            yield self._differs("kind", entry.kind, "a known kind")
            return
        rating = self._target(entry)
        if rating is None:
            yield self._differs("target_key", entry.target_key, "an earlier rating")
            return
        if entry.kind == COMMENT:
            return
        assert entry.target_key is not None
        self._amended[entry.target_key] = rating
        before = rating.contribution()
        if not rating.amend(entry):
            yield self._differs("effect", KINDS[entry.kind], "no entry")
        after = rating.contribution()
        if before != after:
            for scope_key, position in (
                (self._whole_key, rating.campaign_position),
                (rating.item_key, rating.item_position),
            ):
                yield self._correct(scope_key, position, before, after)

    def _target(self, entry: FoldedEntry) -> _Rating | None:
        key = entry.target_key
        if key is None or key >> SEQ_BITS != self._key or key >= entry.entry_key:
            return None
        if key in self._amended:
            return self._amended[key]
        target = self._look_up(key)
        if target is None or target.kind != RATING or target.rate is None:
            return None
        if target.item_key not in self._scopes or target.item_position is None:
            return None
        return _Rating(target.rate, target.item_key, target.item_position, target.campaign_position)

    def _correct(self, scope_key: int, position: int, before: int | None, after: int | None) -> Row:
        scope = self._scopes.get(scope_key, self._whole)
        d_count = d_sum = 0
        if before is not None:
            scope.shift[before] -= 1
            d_count, d_sum = d_count - 1, d_sum - before
        if after is not None:
            scope.shift[after] += 1
            d_count, d_sum = d_count + 1, d_sum + after
        scope.corrections.append((self._seq, position, d_count, d_sum, scope.count))
        shift = encode_distribution({rate: n for rate, n in scope.shift.items() if n})
        values = (position, before, after, scope.count, shift)
        return self._row("correction", (scope_key, self._seq), values, scope.name)

    # ---------------------------------------------------------- the rows

    def _scope_rows(self) -> Iterator[Row]:
        for scope_key, scope in self._scopes.items():
            values = (scope.count, scope.sum, encode_distribution(scope.distribution))
            yield self._row("scope", (scope_key,), values, scope.name)
            for node, from_seq, d_count, d_sum in _nodes(scope.corrections):
                key = (scope_key, node, from_seq)
                yield self._row("node", key, (d_count, d_sum), scope.name)
        for entry_key, rating in self._amended.items():
            state = (rating.rate, int(rating.retracted), int(rating.excluded))
            yield self._row("amended", (entry_key,), state, f"entry {entry_key & SEQ_MASK}")

    def _block(self, scope_key: int, scope: _Tally, after: int) -> Row:
        distribution = encode_distribution(scope.distribution)
        return self._row("block", (scope_key, after // BLOCK), (distribution,), scope.name)

    def _row(self, table: str, key: tuple[int, ...], values: tuple[Value, ...], of: str) -> Row:
        return Row(table, key, values, self._campaign, of)

    def _differs(self, column: str, kept: object, recomputed: object) -> Difference:
        return self._difference(f"entry {self._seq}: {column}", kept, recomputed)

    def _difference(self, where: str, kept: object, recomputed: object) -> Difference:
        return Difference(self._campaign, where, kept, recomputed)


def _nodes(
    corrections: list[tuple[int, int, int, int, int]],
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (node, from_seq, Δcount, Δsum) for each version of each node of one scope.

    By definition: node k = m · 2^level with m odd covers the positions (m-1) · 2^level + 1
    to k. It is kept from when the scope's count reaches it, or, for a power of two, from
    the first correction after that; and again for each correction that it covers.
    """
    sums: defaultdict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
    levels = max((count for *_, count in corrections), default=0).bit_length()
    kept_levels = None
    for from_seq, position, d_count, d_sum, count in corrections:
        changed = set()
        for level in range(levels):
            m = -(-position >> level)  # rounded up
            if m % 2:
                node = m << level
                before_count, before_sum = sums[node]
                sums[node] = (before_count + d_count, before_sum + d_sum)
                changed.add(node)
        if kept_levels is not None:
            changed.update(1 << level for level in range(kept_levels, count.bit_length()))
        kept_levels = count.bit_length()
        for node in sorted(changed):
            if node.bit_length() <= kept_levels:
                yield node, from_seq, *sums[node]
