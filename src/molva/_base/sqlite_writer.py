"""Writing to a SQLite file of ours from a program that lives on an event loop.

A commit waits for its fsync. Where that takes a few hundred microseconds, it is cheaper
to wait on the loop than to hand the GIL to a thread and back: with the loop blocked so
briefly, requests pile up in the kernel and travel in the next batch. On a slower disk the
commit runs in a thread, so that the loop stays alive.

Waiting for another process is another matter: that can take seconds, so a thread does it,
never the loop, which tries a locked file once and hands it over.

After an I/O error (an fsync error is one) the connection is closed and never used again:
nothing more is promised of what it wrote last, and nothing may be written behind it. A
new process opens the file anew and puts it in order first (``open_sqlite``).

    SQLiteFileError
    ├── BusyFileError      another process held the file too long; nothing was written
    ├── FullFileError      the disk is full; nothing was written, try again later
    └── BrokenFileError    an I/O error, now or earlier; start a new process
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Final, Literal, TypeVar, final

import apsw

from molva._base.sqlite_file import (
    CHECKPOINT_PAGES,
    SQLiteFileError,
    error_marker,
    probe_fsync,
    transaction,
)
from molva._base.sqlite_mark import Mark

__all__ = [
    "BrokenFileError",
    "BusyFileError",
    "CommitOn",
    "FullFileError",
    "SQLiteWriter",
    "commit_on_loop",
]

T = TypeVar("T")

CommitOn = Literal["auto", "loop", "thread"]

# Seconds a write waits for another process to finish its own. SQLite's locks are unfair:
# with two busy writers 0.25 s was too little when measured. Longer, and a program that
# keeps the file in a transaction stalls everybody without a sign.
_BUSY_TIMEOUT: Final = 5.0

# Below this many seconds an fsync costs less on the loop than in a thread. Measured with
# `make bench`: at 0.2 ms the loop carries twice as many ratings as a thread, at 1 ms both
# carry as many, but the loop then lags by 2 ms.
_LOOP_FSYNC_LIMIT: Final = 0.0005


@final
class BusyFileError(SQLiteFileError):
    """Another process held the file too long. Nothing was written; try again later."""


@final
class FullFileError(SQLiteFileError):
    """The disk is full. Nothing was written; try again when there is room."""


@final
class BrokenFileError(SQLiteFileError):
    """An I/O error: this process must not write to the file again."""


def commit_on_loop(directory: str, chosen: CommitOn) -> bool:
    """Return whether commits run on the loop; ``auto`` measures an fsync to decide."""
    if chosen == "auto":
        return probe_fsync(directory) < _LOOP_FSYNC_LIMIT
    return chosen == "loop"


@final
class SQLiteWriter:
    """Runs write transactions on one connection, one at a time.

    Args:
        connection: Owned by the writer from now on.
        path: For error messages.
        on_loop: Whether a commit may run on the event loop.
    """

    def __init__(self, connection: apsw.Connection, *, path: str, on_loop: bool) -> None:
        self._connection = connection
        self._path = path
        self._on_loop = on_loop
        self._lock = asyncio.Lock()
        self._marker = error_marker(path)
        self._broken: BaseException | None = None
        self._durable: bool | None = None
        # Whether commits are synced, as the connection was opened: 2 is FULL.
        self._synced = connection.pragma("synchronous") == 2
        self._mark = Mark(path)
        connection.set_wal_hook(self._committed)

    @property
    def broken(self) -> bool:
        """Whether an I/O error has ended all writing."""
        return self._broken is not None

    def check(self) -> None:
        """Raise BrokenFileError if an I/O error has ended all writing."""
        if self._broken is not None:
            raise BrokenFileError(self._path, "was given up after an I/O error") from self._broken
        if os.path.exists(self._marker):
            # Its commit may stand in the WAL and be gone after a power cut, and ours behind it.
            self._give_up(apsw.IOError("another connection to it met an I/O error"))
            self.check()

    async def write(
        self, work: Callable[[apsw.Connection], T], *, durable: bool | None = None
    ) -> T:
        """Run ``work`` in one transaction and commit it; return what it returned.

        ``work`` may be run twice: on the loop first, and again, from its beginning, in a
        thread where the file was locked. Cancelling does not stop a commit under way.

        Args:
            work: Writes, on the connection that it is given.
            durable: Whether the commit waits for its fsync, which makes all commits before
                it durable too; None: as the connection was opened.

        Raises:
            BusyFileError: Another process held the file for five seconds.
            FullFileError: The disk is full.
            BrokenFileError: An I/O error, now or in an earlier call.
        """
        async with self._lock:
            self.check()
            try:
                if durable is not None and durable is not self._durable:
                    self._connection.pragma("synchronous", "full" if durable else "normal")
                    self._durable = self._synced = durable
                if self._on_loop:
                    try:
                        return self._transact(work)
                    except apsw.BusyError:
                        pass
                return await self._in_thread(work)
            except apsw.BusyError as error:
                problem = f"another process held the file for {_BUSY_TIMEOUT:.0f} s"
                raise BusyFileError(self._path, problem) from error
            except apsw.FullError as error:
                raise FullFileError(self._path, "the disk is full") from error
            except apsw.IOError as error:
                self._give_up(error)
                raise BrokenFileError(
                    self._path, f"was given up after an I/O error ({error})"
                ) from error

    async def close(self) -> None:
        """Close the connection, behind whatever is being written."""
        async with self._lock:
            if self._broken is None and not os.path.exists(self._marker):
                # Only a sound connection copies the WAL when it closes.
                self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
            # Where that fails, all commits stand in the WAL, which stays then: whoever opens
            # the file next copies it, from its beginning.
            with contextlib.suppress(apsw.IOError, apsw.FullError, apsw.CantOpenError):
                self._connection.close(self._broken is not None)
            self._mark.close()

    def _committed(self, connection: apsw.Connection, _database: str, pages: int) -> int:
        """Note what is safe; copy the WAL back into the file when it is long.

        Called after each commit, with the number of frames in the WAL.

        SQLite's own automatic copy hides its errors. The commit stands whatever happens
        here, but an I/O error while copying is one like any other: the next write finds
        the file broken.
        """
        if self._synced:
            self._mark.write(pages)
        if pages >= CHECKPOINT_PAGES:
            try:
                connection.wal_checkpoint()
            except apsw.IOError as error:
                self._broken = error
                self._warn_others()
            except apsw.Error:
                pass  # readers or a full disk are in the way: a later commit copies it
        return apsw.SQLITE_OK

    async def _in_thread(self, work: Callable[[apsw.Connection], T]) -> T:
        """Run ``work`` in a thread, to its end, whatever is cancelled meanwhile.

        A cancelled caller must not leave a thread at work on a connection that the next
        caller is about to use, nor lose the error by which it ended.
        """
        task = asyncio.ensure_future(asyncio.to_thread(self._transact_patiently, work))
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is None:
            return task.result()
        failed = task.exception()
        if isinstance(failed, apsw.IOError):
            self._give_up(failed)
        raise cancelled

    def _give_up(self, error: apsw.IOError) -> None:
        self._broken = error
        self._warn_others()
        # The last connection to close copies the WAL into the file otherwise.
        self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        self._connection.close(True)

    def _warn_others(self) -> None:
        # Whoever has the file open gives it up, and whoever opens it next has to copy the WAL
        # before it writes, not just try to. Not synced: after a power cut there is nothing
        # left to copy.
        with contextlib.suppress(OSError):
            open(self._marker, "wb").close()

    def _transact(self, work: Callable[[apsw.Connection], T]) -> T:
        with transaction(self._connection):
            return work(self._connection)

    def _transact_patiently(self, work: Callable[[apsw.Connection], T]) -> T:
        self._connection.set_busy_timeout(round(_BUSY_TIMEOUT * 1_000))
        try:
            return self._transact(work)
        finally:
            self._connection.set_busy_timeout(0)
