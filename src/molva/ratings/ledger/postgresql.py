"""PostgreSQL ledger: ratings counted in a database, by any number of processes.

URL:
    ``postgresql://user:password@db.example:5432/molva``

    ``schema``
        Name of the ledger's schema in the database. Default ``molva_ledger``.
    ``create``
        ``auto`` makes a missing schema, ``never`` refuses to. Default auto.
    ``timeout``
        Seconds that a batch or a read may take; a read is given up after five at most.
        Default 30.
    ``connections``
        Connections that a process holds at most. Default 4.
    ``statement_cache_size``
        Prepared statements that a connection keeps; 0 behind a PgBouncer that pools
        transactions. Default 100.
    ``sslmode``, ``sslrootcert``, ``sslcert``, ``sslkey``, ``sslcrl``, \
``ssl_min_protocol_version``, ``target_session_attrs``, ``passfile``
        As libpq's. Several hosts, ``host1:5432,host2:5432``, with
        ``target_session_attrs=read-write`` follow a failover.

    What the URL lacks is taken from PGHOST, PGUSER, PGPASSWORD and libpq's other variables.

Durability:
    As the server is set up, and as each session finds it: with ``synchronous_commit`` off
    nothing is survived; with ``fsync`` and ``full_page_writes`` a power cut; with
    ``synchronous_standby_names`` the loss of a node. Nothing is ever set to less here.
    Every entry stays, so reads at any ``as_of`` are answered and ids are known for ever.
    After an I/O error the server itself stops and recovers from its log; we connect again.

Design:
    The tables and the arithmetic are the SQLite ledger's. A batch of new ratings is one
    call of one function: one round trip, and the campaign's row is held for the time that
    the server needs alone. Ids are not looked at: a known one violates the unique index,
    nothing was applied, and the batch is applied again carefully, in a transaction that
    looks all its ids up. See ``_postgresql_1.sql``.

    The row of a campaign is locked before anything else, several in the order of their
    names, so its sequence is dense and writers wait instead of colliding. A process that is
    stopped while it holds one is ended by ``idle_in_transaction_session_timeout``.

    Rejected: one statement of data-modifying CTEs (it reads the items' totals as they were
    before it waited for the campaign's row); COPY of rows computed here (the row has to
    be held while Python works, and two writers were no faster than one); a row for each
    rate of each item (most of a batch's time, where items are many).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Final, TypeVar, final

import asyncpg

from molva._base.postgresql import (
    PostgreSQL,
    PostgreSQLError,
    PostgreSQLURL,
    RefusedError,
    UnsuitableError,
    VersionError,
)
from molva._base.postgresql_schema import (
    check_or_make_schema,
    in_schema,
    migrate_schema,
    read_script,
)
from molva._base.url import ResourceURL
from molva.ratings.ledger._content import (
    KIND_OF,
    Content,
    content_hash,
    content_of,
    text_hash,
    text_of,
)
from molva.ratings.ledger._postgresql_audit import differences, rebuild
from molva.ratings.ledger._postgresql_batch import RatingColumns
from molva.ratings.ledger._refusals import check_submission
from molva.ratings.ledger._schema import COMMENT, KINDS, SEQ_BITS, SEQ_MASK, decode_distribution
from molva.ratings.ledger.protocol import (
    Difference,
    LedgerCapabilities,
    LedgerEntry,
    LedgerError,
    LedgerServerError,
    LedgerSize,
    LedgerUnavailableError,
    LedgerURLError,
    LedgerVersionError,
    Outcome,
    Total,
)
from molva.ratings.rating import Change, Rating, Submission

__all__ = ["BEST", "PostgreSQLLedger", "migrate_postgresql_ledger"]

T = TypeVar("T")

# What a ledger in PostgreSQL can do at best: the server's settings decide what is survived.
BEST: Final = LedgerCapabilities(
    survives=frozenset({"kill", "power", "node"}),
    history=True,
    window=None,
    horizon_seconds=None,
    ids="ledger",
)

# A script for each version. One that was released never changes.
_SCRIPTS: Final = ("_postgresql_1.sql",)

_SCHEMA: Final = "molva_ledger"
# Seconds that a batch may take: it may wait for other writers of its campaign.
_TIMEOUT: Final = 30.0
# Seconds that a read may take at most. Somebody waits for the answer, and a 503 after half
# a minute is worth nothing to him.
_READ_TIMEOUT: Final = 5.0
# Times that a batch is applied carefully: each time another process was faster with one of
# its ids in a campaign that is not locked here. Twice is rare.
_CAREFUL_TRIES: Final = 5
# Entries that ``entries`` reads at a time.
_ENTRIES_A_PAGE: Final = 1_000
# SQLSTATE of append_ratings where a campaign has to be made first.
_CAMPAIGN_IS_NEW: Final = "MV001"

_OUTCOMES: Final = {outcome.value: outcome for outcome in Outcome}


@final
class PostgreSQLLedger:
    """A ledger in a schema of PostgreSQL. See ``Ledger`` for what each method promises."""

    def __init__(self, server: PostgreSQL) -> None:
        self._server = server
        schema = server.url.schema

        def sql(text: str) -> str:
            return in_schema(text, schema)

        marks = ", ".join(f"${n}" for n in range(1, 16))
        self._append = sql(f"SELECT molva.append_ratings({marks})")
        self._add_campaigns = sql("SELECT molva.add_campaigns($1)")
        self._lock = sql(
            "SELECT FROM molva.campaign WHERE campaign = ANY ($1) ORDER BY campaign "
            "FOR NO KEY UPDATE"
        )
        self._known = sql("SELECT * FROM molva.known($1)")
        marks = ", ".join(f"${n}" for n in range(1, 11))
        self._apply_to_rating = sql(f"SELECT molva.apply_to_rating({marks})")
        self._total = sql("SELECT * FROM molva.read_total($1, $2, $3, $4, $5)")
        self._last_seq = sql("SELECT last_seq FROM molva.campaign WHERE campaign = $1")
        self._size = sql(
            "SELECT count(*), coalesce(sum(last_seq), 0)::bigint, coalesce(sum(count), 0)::bigint "
            "FROM molva.campaign JOIN molva.scope USING (campaign_key) "
            "WHERE item IS NULL AND last_seq > 0"
        )
        self._entries = sql(
            "SELECT entry_key, kind, id, item, rate, target_key, item_position, "
            f"campaign_position, CASE kind WHEN {COMMENT} THEN comment.text ELSE reason.text END, "
            "accepted_at_us, applied_at_us FROM molva.entry "
            "LEFT JOIN molva.scope ON scope_key = item_key "
            "LEFT JOIN molva.comment USING (entry_key) LEFT JOIN molva.reason USING (entry_key) "
            "WHERE entry_key > $1 AND entry_key <= $2 ORDER BY entry_key"
        )
        self._campaign = sql(
            "SELECT campaign_key, last_seq FROM molva.campaign WHERE campaign = $1"
        )

    @classmethod
    async def open(cls, url: ResourceURL) -> "PostgreSQLLedger":
        """Return the ledger that ``url`` names, made where it is missing and may be made.

        Raises:
            LedgerURLError: The server will not have us: password, database, TLS, rights.
            LedgerServerError: It is too old, or set up in a way that a ledger cannot use.
            LedgerVersionError: The schema is of another version, or something else.
            LedgerUnavailableError: It cannot be reached now.
        """
        server = PostgreSQL(_settings(url))
        try:
            await check_or_make_schema(server, "ledger", _scripts())
        except BaseException as error:
            await server.close()
            if isinstance(error, PostgreSQLError):
                raise _meaning(error, opening=True) from error
            raise
        return cls(server)

    @property
    def capabilities(self) -> LedgerCapabilities:
        """What the ledger can do, with the settings that the last connection found."""
        settings = self._server.settings
        assert settings is not None, "open connects"
        return replace(BEST, survives=settings.survives())

    # --------------------------------------------------------------- writing

    async def apply(
        self, batch: Sequence[Submission], *, applied_at_us: int
    ) -> list[Outcome | Exception]:
        """Apply a batch in one transaction, in its order. See ``Ledger.apply``."""
        if not batch:
            return []
        if all(isinstance(entry, Rating) for _, entry in batch):
            try:
                columns = RatingColumns(batch)
                await self._call(
                    lambda connection: self._append_ratings(connection, columns, applied_at_us)
                )
            except (asyncpg.UniqueViolationError, ValueError, TypeError):
                pass  # Nothing was applied: an id is known, or something cannot be stored.
            else:
                return [Outcome.APPLIED] * len(batch)
        return await self._apply_carefully(batch, applied_at_us)

    async def _append_ratings(
        self, connection: asyncpg.Connection, columns: RatingColumns, applied_at_us: int
    ) -> None:
        arguments = columns.arguments(applied_at_us)
        try:
            await connection.execute(self._append, *arguments)
        except asyncpg.PostgresError as error:
            if error.sqlstate != _CAMPAIGN_IS_NEW:
                raise
            await connection.execute(self._add_campaigns, columns.campaigns)
            await connection.execute(self._append, *arguments)

    async def _apply_carefully(
        self, batch: Sequence[Submission], applied_at_us: int
    ) -> list[Outcome | Exception]:
        """Apply a batch of any entries, some of which may be known, or cannot be stored."""
        outcomes: list[Outcome | Exception | None] = [None] * len(batch)
        storable = []
        for at, submission in enumerate(batch):
            try:
                check_submission(submission)
            except (ValueError, TypeError) as error:
                outcomes[at] = error
            else:
                storable.append((at, submission))

        async def work(connection: asyncpg.Connection) -> list[tuple[int, Outcome]]:
            return await self._apply_known(connection, storable, applied_at_us)

        for tries in range(_CAREFUL_TRIES):
            try:
                found = await self._call(work)
                break
            except asyncpg.UniqueViolationError as error:
                if tries + 1 == _CAREFUL_TRIES:
                    raise LedgerUnavailableError(
                        f"{self._server.url.shown}: the ledger contradicts itself ({error}); see "
                        "'molva verify' and 'molva rebuild'"
                    ) from error
        for at, outcome in found:
            outcomes[at] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    async def _apply_known(
        self,
        connection: asyncpg.Connection,
        batch: Sequence[tuple[int, Submission]],
        applied_at_us: int,
    ) -> list[tuple[int, Outcome]]:
        campaigns = sorted({s.entry.campaign for _, s in batch if isinstance(s.entry, Rating)})
        if campaigns:
            # In a transaction of its own: see add_campaigns.
            await connection.execute(self._add_campaigns, campaigns)
        outcomes: list[tuple[int, Outcome]] = []
        async with self._server.transaction(connection):
            every = sorted({submission.entry.campaign for _, submission in batch})
            await connection.execute(self._lock, every)
            known: dict[bytes, Content] = {
                row[0]: tuple(row[1:])
                for row in await connection.fetch(self._known, [s.id for _, s in batch])
            }
            for is_rating, run in groupby(batch, lambda one: isinstance(one[1].entry, Rating)):
                fresh: list[Submission] = []
                for at, submission in run:
                    content = content_of(submission.entry)
                    if submission.id in known:
                        same = known[submission.id] == content
                        outcome = Outcome.DUPLICATE if same else Outcome.CONFLICT
                    elif is_rating:
                        fresh.append(submission)
                        outcome = Outcome.APPLIED
                    else:
                        outcome = await self._correct(connection, submission, applied_at_us)
                    if outcome is Outcome.APPLIED:
                        known[submission.id] = content
                    outcomes.append((at, outcome))
                if fresh:
                    arguments = RatingColumns(fresh).arguments(applied_at_us)
                    await connection.execute(self._append, *arguments)
        return outcomes

    async def _correct(
        self, connection: asyncpg.Connection, submission: Submission, applied_at_us: int
    ) -> Outcome:
        id_, entry = submission
        assert not isinstance(entry, Rating)
        text = text_of(entry)
        outcome = await connection.fetchval(
            self._apply_to_rating,
            id_,
            KIND_OF[type(entry)],
            entry.campaign,
            entry.rating_id,
            entry.rate if isinstance(entry, Change) else None,
            None if text is None else text.encode(),
            None if text is None else text_hash(text),
            content_hash(entry),
            entry.accepted_at_us,
            applied_at_us,
        )
        return _OUTCOMES[outcome]

    async def rebuild(self) -> None:
        """Recompute the derived tables from the entries, in one transaction.

        Meanwhile nobody can write: ``apply`` waits, and is unavailable after its time.
        """
        await self._call(lambda connection: rebuild(connection, self._server), timeout=3_600.0)

    # --------------------------------------------------------------- reading

    async def total(
        self,
        campaign: str,
        *,
        item: str | None = None,
        n: int,
        as_of: int | None = None,
        trusted: bool = True,
    ) -> Total | None:
        """Return the average of the last ``n`` at ``as_of``. See ``Ledger.total``."""
        if n < 1:
            raise ValueError(f"n={n} is refused: a window holds at least 1 rating")
        row = await self._read(
            lambda connection: connection.fetchrow(
                self._total, campaign, item, min(n, SEQ_MASK), as_of, trusted
            )
        )
        if row is None:
            return None
        sum_, n, count, tally, at_seq = row
        distribution = decode_distribution(tally)
        return Total(
            sum=sum_,
            n=n,
            count=count,
            distribution={rate: distribution[rate] for rate in sorted(distribution)},
            as_of=at_seq,
        )

    async def last_seq(self, campaign: str) -> int:
        """Return the campaign's last sequence number; 0 where it has no entry."""
        seq = await self._read(lambda connection: connection.fetchval(self._last_seq, campaign))
        return seq or 0

    async def size(self) -> LedgerSize:
        """Return how much the ledger holds, at a cost that grows with campaigns only."""
        row = await self._read(lambda connection: connection.fetchrow(self._size))
        assert row is not None
        return LedgerSize(*row)

    async def entries(self, campaign: str, *, since_seq: int = 0) -> AsyncIterator[LedgerEntry]:
        """Yield the campaign's entries after ``since_seq`` in order, as they stand now."""
        row = await self._read(lambda connection: connection.fetchrow(self._campaign, campaign))
        if row is None:
            return
        base, last_seq = row[0] << SEQ_BITS, row[1]
        while since_seq < last_seq:
            upto = min(since_seq + _ENTRIES_A_PAGE, last_seq)
            for entry in await self._page(base + since_seq, base + upto):
                yield entry
            since_seq = upto

    async def _page(self, after_key: int, upto_key: int) -> list[LedgerEntry]:
        rows = await self._read(
            lambda connection: connection.fetch(self._entries, after_key, upto_key)
        )
        return [_entry(row) for row in rows]

    async def verify(self) -> AsyncIterator[Difference]:
        """Recompute every number from the entries; yield each that differs.

        In one snapshot: rows that were updated meanwhile cannot be vacuumed away before its
        end.
        """
        found: asyncio.Queue[Difference | None] = asyncio.Queue(maxsize=1_000)

        async def work(connection: asyncpg.Connection) -> None:
            async for difference in differences(connection, self._server):
                await found.put(difference)

        async def compare() -> None:
            try:
                await self._call(work, timeout=86_400.0)
            finally:
                await found.put(None)

        comparing = asyncio.ensure_future(compare())
        try:
            while (difference := await found.get()) is not None:
                yield difference
            await comparing
        finally:
            comparing.cancel()
            await asyncio.wait([comparing])

    # ------------------------------------------------------------ the way there

    async def _read(self, read: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        return await self._call(read, timeout=min(self._server.url.timeout, _READ_TIMEOUT))

    async def _call(
        self, work: Callable[[asyncpg.Connection], Awaitable[T]], *, timeout: float | None = None
    ) -> T:
        if self._server.closed:
            raise LedgerError(f"{self._server.url.shown}: the ledger is closed")
        try:
            return await self._server.run(work, timeout=timeout)
        except PostgreSQLError as error:
            raise _meaning(error, opening=False) from error
        except asyncpg.UniqueViolationError:
            raise
        except asyncpg.PostgresError as error:
            # The statements are ours and the values were checked: the schema was tampered
            # with, and no rating is to blame.
            raise LedgerUnavailableError(f"{self._server.url.shown}: {error}") from error

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        await self._server.close()


async def migrate_postgresql_ledger(url: ResourceURL) -> tuple[int, int]:
    """Make the ledger, or bring it to the newest version; return the old and the new one.

    Raises:
        LedgerError: As ``PostgreSQLLedger.open``.
    """
    server = PostgreSQL(_settings(url))
    try:
        return await migrate_schema(server, "ledger", _scripts())
    except PostgreSQLError as error:
        raise _meaning(error, opening=True) from error
    finally:
        await server.close()


def _settings(url: ResourceURL) -> PostgreSQLURL:
    return PostgreSQLURL.read(url, schema=_SCHEMA, timeout=_TIMEOUT)


def _scripts() -> list[str]:
    return [read_script("molva.ratings.ledger", name) for name in _SCRIPTS]


def _meaning(error: PostgreSQLError, *, opening: bool) -> LedgerError:
    """Return what an error means to whoever uses a ledger."""
    if isinstance(error, VersionError):
        return LedgerVersionError(str(error))
    if isinstance(error, UnsuitableError) and opening:
        return LedgerServerError(str(error))
    if isinstance(error, RefusedError) and opening:
        return LedgerURLError(str(error))
    # A server that let us in once is expected to do so again.
    return LedgerUnavailableError(str(error))


def _entry(row: asyncpg.Record) -> LedgerEntry:
    (key, kind, id_, item, rate, target_key, position, campaign_position, text, *times) = row
    return LedgerEntry(
        seq=key & SEQ_MASK,
        kind=KINDS[kind],
        id=id_,
        item=item,
        rate=rate,
        target_seq=None if target_key is None else target_key & SEQ_MASK,
        position=position,
        campaign_position=campaign_position,
        text=None if text is None else text.decode(),
        accepted_at_us=times[0],
        applied_at_us=times[1],
    )
