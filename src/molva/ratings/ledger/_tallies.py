"""The raw totals that a batch touches: read once, counted on in memory, written once."""

from typing import final

import apsw

from molva.ratings.ledger._schema import BLOCK, decode_distribution, encode_distribution

__all__ = ["Campaign", "Scope", "Tallies"]


@final
class Scope:
    """The raw totals of an item, or of a campaign as a whole, as the batch leaves them."""

    __slots__ = ("count", "distribution", "key", "sum", "written")

    def __init__(self, key: int, count: int, sum_: int, distribution: dict[int, int]) -> None:
        self.key = key
        self.count = self.written = count
        self.sum = sum_
        self.distribution = distribution


@final
class Campaign:
    """A campaign as the batch leaves it: its sequence number and its scopes."""

    __slots__ = ("items", "key", "seq", "whole", "written")

    def __init__(self, key: int, seq: int, whole: Scope) -> None:
        self.key = key
        self.seq = self.written = seq
        self.whole = whole
        self.items: dict[str, Scope] = {}


@final
class Tallies:
    """What one batch has read and not yet written."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self.campaigns: dict[str, Campaign] = {}
        self._blocks: list[tuple[int, int, str]] = []

    def add_block(self, scope: Scope, after: int) -> None:
        """Keep the scope's distribution after its first ``after`` entries or ratings."""
        row = (scope.key, after // BLOCK, encode_distribution(scope.distribution))
        self._blocks.append(row)

    def campaign(self, name: str) -> Campaign:
        """Return a campaign as the batch leaves it; a new one is made."""
        known = self.campaigns.get(name)
        if known is not None:
            return known
        row: tuple[int, int, int, int, int, str] | None = self._connection.execute(
            "SELECT campaign_key, last_seq, scope_key, count, sum, distribution "
            "FROM campaign JOIN scope USING (campaign_key) "
            "WHERE campaign = ? AND item IS NULL",
            (name,),
        ).fetchone()
        if row is None:
            self._connection.execute(
                "INSERT INTO campaign (campaign, last_seq) VALUES (?, 0)", (name,)
            )
            key = self._connection.last_insert_rowid()
            campaign = Campaign(key, 0, self._new_scope(key, None))
        else:
            key, seq, scope_key, count, sum_, distribution = row
            whole = Scope(scope_key, count, sum_, decode_distribution(distribution))
            campaign = Campaign(key, seq, whole)
        self.campaigns[name] = campaign
        return campaign

    def item(self, campaign: Campaign, name: str) -> Scope:
        """Return an item as the batch leaves it; a new one is made."""
        if not isinstance(name, str):
            raise TypeError(f"item {name!r:.40} is no text")
        row: tuple[int, int, int, str] | None = self._connection.execute(
            "SELECT scope_key, count, sum, distribution FROM scope "
            "WHERE campaign_key = ? AND item = ?",
            (campaign.key, name),
        ).fetchone()
        if row is None:
            item = self._new_scope(campaign.key, name)
        else:
            scope_key, count, sum_, distribution = row
            item = Scope(scope_key, count, sum_, decode_distribution(distribution))
        campaign.items[name] = item
        return item

    def _new_scope(self, campaign_key: int, item: str | None) -> Scope:
        self._connection.execute(
            "INSERT INTO scope (campaign_key, item, count, sum, distribution) "
            "VALUES (?, ?, 0, 0, '{}')",
            (campaign_key, item),
        )
        return Scope(self._connection.last_insert_rowid(), 0, 0, {})

    def flush(self) -> None:
        """Write what the entries so far have changed."""
        campaigns = [c for c in self.campaigns.values() if c.seq != c.written]
        if not campaigns:
            return
        scopes = [
            scope
            for campaign in campaigns
            for scope in (campaign.whole, *campaign.items.values())
            if scope.count != scope.written
        ]
        execute_many = self._connection.executemany
        execute_many(
            "UPDATE campaign SET last_seq = ? WHERE campaign_key = ?",
            [(campaign.seq, campaign.key) for campaign in campaigns],
        )
        execute_many(
            "UPDATE scope SET count = ?, sum = ?, distribution = ? WHERE scope_key = ?",
            [(s.count, s.sum, encode_distribution(s.distribution), s.key) for s in scopes],
        )
        if self._blocks:
            execute_many("INSERT INTO block VALUES (?, ?, ?)", self._blocks)
        self._blocks.clear()
        for campaign in campaigns:
            campaign.written = campaign.seq
        for scope in scopes:
            scope.written = scope.count

    def forget(self) -> None:
        """Drop what was read: it is ahead of the file, which was rolled back."""
        self.campaigns.clear()
        self._blocks.clear()
