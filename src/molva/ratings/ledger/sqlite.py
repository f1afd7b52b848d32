"""SQLite ledger: ratings counted in one file on a local disk.

URL:
    ``sqlite:///var/lib/molva/ledger.db``

    ``commit``
        Where commits run: ``loop``, ``thread``, or ``auto``, which is the loop where an
        fsync is fast enough. Default auto.
    ``vfs``
        Name of a registered SQLite VFS. Default: the system's own.

Durability:
    Survives kill and power: ``apply`` returns after its fsync. Every entry stays, so reads
    at any ``as_of`` are answered and ids are remembered for ever. Any number of processes
    on one host may share the file. It cannot live on a network file system: WAL needs
    shared memory.

    After an I/O error nothing is written to the file any more: every later ``apply``
    raises LedgerBrokenError. Reads go on.

Design:
    A batch is one transaction on one connection. Its entries take the next dense sequence
    numbers of their campaigns; SQLite's single write lock orders batches of all processes.
    A rating's row carries the running counts and sums of its item and its campaign, so a
    last n at any moment is two point look-ups. See ``_schema`` for the tables, ``_apply``
    for the writing, ``_corrections`` for changes and exclusions, ``_reads`` for totals.

    Reads run on the loop, on their own connection, in a snapshot: WAL readers wait for
    nobody. ``verify`` and ``rebuild`` (``_audit``) recompute everything by another road,
    in a thread.

    A submission that corrects nothing (a second retraction) makes no entry, but its id is
    remembered, so that a late redelivery cannot have an effect then. Such an id is not
    taken: a rating under it is counted.

    Rejected: totals kept by triggers (nothing could be compared with them, and each row
    would write them anew); a window kept as a table (n would have to be known beforehand);
    sequence numbers from AUTOINCREMENT (not dense for a campaign).
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Final, TypeVar, final

import apsw

from molva._base.sqlite_file import (
    DamagedFileError,
    ForeignFileError,
    NewerFileError,
    SQLiteFileError,
    open_sqlite,
)
from molva._base.sqlite_writer import (
    BrokenFileError,
    CommitOn,
    SQLiteWriter,
    commit_on_loop,
)
from molva.ratings.ledger._apply import REFUSALS, apply_carefully, apply_on_trust
from molva.ratings.ledger._audit import differences, rebuild
from molva.ratings.ledger._reads import read_entries, read_last_seq, read_size, read_total
from molva.ratings.ledger._schema import APPLICATION_ID, MIGRATIONS
from molva.ratings.ledger.protocol import (
    Difference,
    LedgerBrokenError,
    LedgerCapabilities,
    LedgerEntry,
    LedgerError,
    LedgerSize,
    LedgerUnavailableError,
    LedgerVersionError,
    Outcome,
    Total,
)
from molva.ratings.rating import Submission

__all__ = ["BEST", "SQLiteLedger"]

T = TypeVar("T")

# What a ledger in SQLite can do, always.
BEST: Final = LedgerCapabilities(
    survives=frozenset({"kill", "power"}),  # open_sqlite sets synchronous=FULL
    history=True,
    window=None,
    horizon_seconds=None,
    ids="ledger",
)

# KiB of pages that the writing connection keeps at hand: the right-hand edges of the
# indexes, one for each item. At 10⁶ ratings of 1,000 items SQLite's own 2,000 cost a
# quarter more time a rating; 128 MiB gained nothing over this.
_CACHE_KIB: Final = 32 * 1024

# Entries that ``entries`` reads at a time, on the loop: about 3 ms.
_ENTRIES_A_PAGE: Final = 1_000

# Seconds that ``verify`` works between two looks at whoever waits for it: how long a
# cancelled one goes on.
_VERIFY_SLICE: Final = 0.1


@final
class SQLiteLedger:
    """A ledger in a SQLite file. See ``Ledger`` for what each method promises."""

    capabilities: Final = BEST

    def __init__(
        self,
        path: str,
        *,
        vfs: str | None,
        writing: apsw.Connection,
        reading: apsw.Connection,
        on_loop: bool,
    ) -> None:
        self._path = path
        self._vfs = vfs
        self._reading = reading
        self._writer = SQLiteWriter(writing, path=path, on_loop=on_loop)
        self._closed = False

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, vfs: str | None = None, commit: CommitOn = "auto"
    ) -> "SQLiteLedger":
        """Return the ledger in ``path``, made or migrated where needed. Blocks.

        Raises:
            LedgerVersionError: It was written by a newer version, or is no ledger.
            LedgerUnavailableError: It cannot be opened or prepared now.
            LedgerError: It is damaged.
        """
        path = os.fspath(path)
        try:
            on_loop = commit_on_loop(os.path.dirname(os.path.abspath(path)), commit)
        except OSError as error:
            raise LedgerUnavailableError(
                f"{path}: the ledger cannot be opened ({error})"
            ) from error
        writing = _connect(path, vfs, create=True)
        try:
            writing.pragma("cache_size", -_CACHE_KIB)
            reading = _connect(path, vfs, create=False)
        except BaseException:
            writing.close()
            raise
        reading.pragma("query_only", True)
        return cls(path, vfs=vfs, writing=writing, reading=reading, on_loop=on_loop)

    # --------------------------------------------------------------- writing

    async def apply(
        self, batch: Sequence[Submission], *, applied_at_us: int
    ) -> list[Outcome | Exception]:
        """Apply a batch in one transaction, in its order. See ``Ledger.apply``."""
        if not batch:
            return []
        try:
            return await self._write(
                lambda connection: apply_on_trust(connection, batch, applied_at_us)
            )
        except REFUSALS:
            # Rolled back. Some ids are known, or some submission cannot be stored.
            pass
        try:
            return await self._write(
                lambda connection: apply_carefully(connection, batch, applied_at_us)
            )
        except apsw.ConstraintError as error:
            raise LedgerUnavailableError(
                f"{self._path}: the ledger contradicts itself ({error}); see 'molva verify' "
                "and 'molva rebuild'"
            ) from error

    async def rebuild(self) -> None:
        """Recompute the derived tables from the entries, in one transaction.

        Runs in a thread, on its own connection. Meanwhile nobody can write: ``apply``
        raises LedgerUnavailableError after its five seconds.
        """
        self._check_usable()
        connection = await asyncio.to_thread(_connect, self._path, self._vfs, create=False)
        writer = SQLiteWriter(connection, path=self._path, on_loop=False)
        try:
            await self._translated(writer.write(rebuild))
        finally:
            await writer.close()

    async def _write(self, work: Callable[[apsw.Connection], T]) -> T:
        self._check_usable()
        return await self._translated(self._writer.write(work))

    def _check_usable(self) -> None:
        if self._closed:
            raise LedgerError(f"{self._path}: the ledger is closed")
        try:
            self._writer.check()
        except BrokenFileError as error:
            raise LedgerBrokenError(str(error)) from error

    async def _translated(self, write: Awaitable[T]) -> T:
        try:
            return await write
        except BrokenFileError as error:
            raise LedgerBrokenError(str(error)) from error
        except SQLiteFileError as error:
            raise LedgerUnavailableError(str(error)) from error
        except REFUSALS:
            raise
        except LedgerUnavailableError as error:
            raise LedgerUnavailableError(f"{self._path}: {error}") from error
        except apsw.Error as error:
            raise LedgerUnavailableError(f"{self._path}: cannot be written ({error})") from error

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
        return self._read(
            partial(read_total, campaign=campaign, item=item, n=n, as_of=as_of, trusted=trusted)
        )

    async def last_seq(self, campaign: str) -> int:
        """Return the campaign's last sequence number; 0 where it has no entry."""
        return self._read(lambda connection: read_last_seq(connection, campaign))

    async def size(self) -> LedgerSize:
        """Return how much the ledger holds, at a cost that grows with campaigns only."""
        return self._read(read_size)

    async def entries(self, campaign: str, *, since_seq: int = 0) -> AsyncIterator[LedgerEntry]:
        """Yield the campaign's entries after ``since_seq`` in order, as they stand now."""
        last_seq = await self.last_seq(campaign)
        while since_seq < last_seq:
            upto = min(since_seq + _ENTRIES_A_PAGE, last_seq)
            read = partial(read_entries, campaign=campaign, since_seq=since_seq, upto_seq=upto)
            for entry in self._read(read):
                yield entry
            since_seq = upto

    def _read(self, read: Callable[[apsw.Connection], T]) -> T:
        """Return what ``read`` finds in one snapshot."""
        if self._closed:
            raise LedgerError(f"{self._path}: the ledger is closed")
        connection = self._reading
        try:
            connection.execute("BEGIN")
            try:
                return read(connection)
            finally:
                connection.execute("ROLLBACK")
        except apsw.BusyError as error:
            raise LedgerUnavailableError(f"{self._path}: is busy ({error})") from error
        except apsw.Error as error:
            raise LedgerError(f"{self._path}: cannot be read ({error})") from error
        except LedgerError as error:
            raise type(error)(f"{self._path}: {error}") from error
        except (ValueError, TypeError, LookupError, AssertionError) as error:
            # A row that must be there is not, or is another.
            raise LedgerError(
                f"{self._path}: the ledger contradicts itself ({error}); see 'molva verify' and "
                "'molva rebuild'"
            ) from error

    async def verify(self) -> AsyncIterator[Difference]:
        """Recompute every number from the entries; yield each that differs.

        Runs in a thread, in one snapshot: the WAL cannot be cut back meanwhile.
        """
        connection = await asyncio.to_thread(self._open_to_verify)
        findings = differences(connection)
        found: list[Difference] | None
        try:
            go_on = partial(_go_on, findings)
            while (found := await _in_thread(go_on, connection.interrupt)) is not None:
                for difference in found:
                    yield difference
        except apsw.Error as error:
            raise LedgerError(f"{self._path}: cannot be read ({error})") from error
        except (ValueError, TypeError, LookupError, AssertionError) as error:
            # Rows of other types than were ever written: nothing can be folded from them.
            problem = f"the ledger is damaged ({error}); restore it from a copy"
            raise LedgerError(f"{self._path}: {problem}") from error
        finally:
            connection.close(True)

    def _open_to_verify(self) -> apsw.Connection:
        # Read-only, so that it neither copies the WAL nor clears it away.
        try:
            flags = apsw.SQLITE_OPEN_READONLY
            connection = apsw.Connection(self._path, flags=flags, vfs=self._vfs)
            connection.set_busy_timeout(1_000)
            connection.execute("BEGIN")
        except apsw.Error as error:
            raise LedgerUnavailableError(f"{self._path}: cannot be read ({error})") from error
        return connection

    # ------------------------------------------------------------- the end

    async def close(self) -> None:
        """Release the file, behind whatever is being written. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._reading.close()
        await self._writer.close()


def _connect(path: str, vfs: str | None, *, create: bool) -> apsw.Connection:
    try:
        connection = open_sqlite(
            path,
            kind="ledger",
            application_id=APPLICATION_ID,
            migrations=MIGRATIONS,
            create=create,
            vfs=vfs,
        )
    except (NewerFileError, ForeignFileError) as error:
        raise LedgerVersionError(str(error)) from error
    except DamagedFileError as error:
        raise LedgerError(str(error)) from error
    except SQLiteFileError as error:
        raise LedgerUnavailableError(str(error)) from error
    return connection


def _go_on(findings: Iterator[Difference | None]) -> list[Difference] | None:
    """Verify for a while; return what differs, None at the end."""
    until = time.monotonic() + _VERIFY_SLICE
    found = []
    for difference in findings:
        if difference is not None:
            found.append(difference)
        if time.monotonic() > until:
            return found
    return found or None


async def _in_thread(work: Callable[[], T], interrupt: Callable[[], None]) -> T:
    """Run ``work`` in a thread; when cancelled, interrupt it and wait for its end."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        interrupt()
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        task.exception()  # looked at, or asyncio complains that nobody did
        raise
