"""Opening a SQLite file of ours: queue, ledger and catalog share these rules.

A file of ours carries an application id (what it is) and a user version (the number of
migrations applied). Both are looked at before anything is written: a file of a newer
version, or of another program, is left exactly as it was.

Every file runs in WAL mode with ``synchronous=FULL``: a commit returns after its fsync, so
that what was committed survives a kill and a power cut. NORMAL loses the last commits in
a power cut.

    SQLiteFileError
    ├── NewerFileError       a newer version wrote it: upgrade
    ├── ForeignFileError     no file of this kind: correct the path
    ├── DamagedFileError     truncated or overwritten: restore it
    └── UnusableFileError    cannot be opened or prepared now: rights, disk, another process
"""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, final

import apsw

from molva._base.sqlite_mark import has_mark, lost_frames, mark_file

__all__ = [
    "CHECKPOINT_PAGES",
    "DamagedFileError",
    "ForeignFileError",
    "Migration",
    "NewerFileError",
    "SQLiteFileError",
    "UnusableFileError",
    "error_marker",
    "open_sqlite",
    "probe_fsync",
    "transaction",
]

# One step from a version to the next: a script, or a function where the tables to change
# are only known when the file is open.
Migration = str | Callable[[apsw.Connection], None]

# The WAL-reset bug: with several connections, a checkpoint that races a commit can corrupt
# the file. Fixed in 3.51.3, and on older branches that nobody packages for Python.
_FIRST_SAFE_VERSION: Final = 3_051_003

# Seconds that opening waits for another process, which may be migrating the same file.
_OPEN_TIMEOUT: Final = 10.0

# Pages after which a commit also copies the WAL back into the file, 4 KiB each. SQLite's
# own 1,000 makes one commit in twenty of a busy queue pay for it; beyond 10,000 the WAL
# outgrows the processor's caches and readers slow down.
CHECKPOINT_PAGES: Final = 4_000

# The WAL is cut back to this many bytes once it was copied, so that one long read does
# not leave a huge file behind for good.
_WAL_LIMIT_BYTES: Final = 64 * 1024 * 1024


# No SQLite database is smaller: the least page size there is.
_LEAST_BYTES: Final = 512


class SQLiteFileError(Exception):
    """A file could not be opened as what it should be. ``path`` says which."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


@final
class NewerFileError(SQLiteFileError):
    """The file was written by a newer version of Molva. It was not touched."""


@final
class ForeignFileError(SQLiteFileError):
    """The file is no database, or a database of something else. It was not touched."""


@final
class DamagedFileError(SQLiteFileError):
    """The file is one of ours, but it cannot be read."""


@final
class UnusableFileError(SQLiteFileError):
    """The file cannot be opened or prepared now: rights, a full disk, another process."""


def open_sqlite(
    path: str | Path,
    *,
    kind: str,
    application_id: int,
    migrations: Sequence[Migration],
    create: bool = True,
    vfs: str | None = None,
) -> apsw.Connection:
    """Open a file of ours, creating or migrating it where needed.

    Args:
        path: The file; its folder must exist.
        kind: What the file is, for error messages: ``queue``, ``ledger``, ``catalog``.
        application_id: Marks files of this kind.
        migrations: One for each version, the first creates the schema. One that was
            released never changes; corrections are further ones.
        create: Whether a missing file is made.
        vfs: Name of a registered SQLite VFS; None for the system's own.

    Returns:
        A connection in WAL mode with synchronous=FULL and a busy timeout of 0: who may
        wait for another process sets its own.

    Raises:
        SQLiteFileError: One of the classes of this module.
    """
    path = str(path)
    if apsw.SQLITE_VERSION_NUMBER < _FIRST_SAFE_VERSION:
        raise UnusableFileError(
            path,
            f"SQLite {apsw.sqlite_lib_version()} can corrupt files that several processes "
            "use; install apsw 3.51.3.0 or newer from PyPI, which brings its own SQLite",
        )
    flags = apsw.SQLITE_OPEN_READWRITE | (apsw.SQLITE_OPEN_CREATE if create else 0)
    is_new = not os.path.exists(path)
    try:
        connection = apsw.Connection(path, flags=flags, vfs=vfs)
    except apsw.Error as error:
        what = "is missing" if is_new and not create else f"cannot be opened ({error})"
        raise UnusableFileError(path, f"the {kind} {what}") from error
    try:
        _prepare(connection, path, kind, application_id, migrations)
    except apsw.NotADBError as error:
        connection.close()
        raise ForeignFileError(path, f"is no {kind}: it is no SQLite database") from error
    except apsw.CorruptError as error:
        connection.close()
        problem = f"the {kind} is damaged ({error}); restore it from a copy"
        raise DamagedFileError(path, problem) from error
    except apsw.Error as error:
        connection.close()
        raise UnusableFileError(path, f"the {kind} cannot be used now ({error})") from error
    except BaseException:
        connection.close()
        raise
    if vfs is None:
        # Each time: whoever made the file may have been killed before it came this far.
        # SQLite syncs files, not the entry of a new main file in its folder.
        try:
            _sync_directory(os.path.dirname(os.path.abspath(path)))
        except OSError as error:
            connection.close()
            problem = f"the folder of the {kind} cannot be synced now ({error})"
            raise UnusableFileError(path, problem) from error
    return connection


def _prepare(
    connection: apsw.Connection,
    path: str,
    kind: str,
    application_id: int,
    migrations: Sequence[Migration],
) -> None:
    connection.set_busy_timeout(round(_OPEN_TIMEOUT * 1_000))
    # The last connection to close copies the WAL into the file. It must not while we do not
    # know that the file is ours, nor after an I/O error; so only ``SQLiteWriter`` lets it.
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    # Without this, SQLite plans a statement anew whenever a bound value changes that stands
    # in a range (``offset > ?``): 5 µs instead of 1.2 for a look-up.
    connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
    # One read transaction: a file that another process makes at this moment must not be
    # seen half before and half after.
    connection.execute("BEGIN")
    version = _check_identity(connection, path, kind, application_id, migrations)
    connection.execute("COMMIT")
    _check_wal(connection, path, kind)
    _use_wal(connection, path)
    # macOS: there a plain fsync leaves the data in the drive's cache. No effect elsewhere.
    connection.pragma("fullfsync", True)
    connection.pragma("checkpoint_fullfsync", True)
    connection.pragma("synchronous", "full")
    connection.pragma("journal_size_limit", _WAL_LIMIT_BYTES)
    connection.wal_autocheckpoint(CHECKPOINT_PAGES)
    if version < len(migrations):
        with transaction(connection):
            # Another process may have migrated the file since we looked.
            version = _check_identity(connection, path, kind, application_id, migrations)
            for migration in migrations[version:]:
                if isinstance(migration, str):
                    connection.execute(migration)
                else:
                    migration(connection)
            connection.pragma("application_id", application_id)
            connection.pragma("user_version", len(migrations))
    _settle_wal(connection, path)
    connection.set_busy_timeout(0)


def _check_identity(
    connection: apsw.Connection,
    path: str,
    kind: str,
    application_id: int,
    migrations: Sequence[Migration],
) -> int:
    """Return the file's version, 0 for a new one; raise where it is not ours."""
    found_id = connection.pragma("application_id")
    version = connection.pragma("user_version")
    assert isinstance(found_id, int)
    assert isinstance(version, int)
    if found_id == 0 and version == 0:
        if os.path.exists(path) and 0 < os.path.getsize(path) < _LEAST_BYTES:
            # SQLite takes some of these for an empty file.
            raise ForeignFileError(path, f"is no {kind}: it is no SQLite database")
        if has_mark(path):
            problem = f"the {kind} is empty, and was not: there are commits that it lost"
            hint = f"restore it from a copy, or delete {mark_file(path)} to begin anew"
            raise DamagedFileError(path, f"{problem}; {hint} (the file was not touched)")
        if connection.execute("SELECT count(*) FROM sqlite_schema").get:
            raise ForeignFileError(path, f"is no {kind}: it is a database of something else")
        return 0
    if found_id != application_id:
        raise ForeignFileError(path, f"is no {kind}: it is a database of something else")
    if version > len(migrations):
        raise NewerFileError(
            path,
            f"the {kind} has version {version}, this Molva reads up to {len(migrations)}; "
            "upgrade Molva (the file was not touched)",
        )
    return version


def _check_wal(connection: apsw.Connection, path: str, kind: str) -> None:
    """Raise where commits that were synced cannot be read any more."""
    lost = lost_frames(connection, path)
    if lost is not None:
        found, synced = lost
        raise DamagedFileError(
            path,
            f"the {kind} is damaged: of {synced:,} pages in {path}-wal that were on the disk, "
            f"{found:,} can be read; restore it from a copy, or delete {mark_file(path)} to go on "
            "without what stood in the others (the file was not touched)",
        )


def _use_wal(connection: apsw.Connection, path: str) -> None:
    """Switch to WAL mode, waiting for another process that does the same.

    SQLite does not wait here by itself: switching needs the file alone, and two processes
    that make it together would fail with "database is locked".
    """
    deadline = time.monotonic() + _OPEN_TIMEOUT
    while True:
        try:
            mode = connection.pragma("journal_mode", "wal")
        except apsw.BusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
            continue
        if mode != "wal":
            raise UnusableFileError(
                path, "WAL mode is not to be had here; it needs a local disk and shared memory"
            )
        return


def error_marker(path: str) -> str:
    """Return the file that says that a process met an I/O error while it wrote ``path``."""
    return f"{path}-ioerror"


def _settle_wal(connection: apsw.Connection, path: str) -> None:
    """Copy what an earlier process left in the WAL, so that nothing is written behind it.

    After a failed fsync the kernel marks the pages clean although the disk never got
    them. Such a commit may stand in the WAL, readable now and gone after a power cut,
    together with whatever follows it. Copying writes its pages anew, into the main file,
    and the fsync of that counts.

    Where a process has left word of an I/O error this must succeed, and opening fails until
    it does. Elsewhere readers or a writer at work are no reason to wait for long: the file
    is sound, and a later commit copies it.
    """
    marker = error_marker(path)
    must = os.path.exists(marker)
    connection.set_busy_timeout(round(_OPEN_TIMEOUT * 1_000) if must else 200)
    try:
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except apsw.BusyError:
        if must:
            raise
    else:
        if must:
            os.unlink(marker)


@contextlib.contextmanager
def transaction(connection: apsw.Connection) -> Iterator[None]:
    """Run the block in one write transaction: all of it is committed, or nothing.

    The lock is taken at the start (BEGIN IMMEDIATE): a transaction that began by reading
    and then writes fails at once where another process wrote in between, and no waiting
    helps it.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A failed COMMIT has often rolled back by itself already.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def probe_fsync(directory: str | Path, *, tries: int = 7) -> float:
    """Return how long an fsync takes in ``directory``: the median of a few, in seconds.

    Raises:
        OSError: The folder cannot be written to, or its disk refuses.
    """
    seconds = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(tries):
            file.write(b"\0" * 4_096)
            file.flush()
            started = time.perf_counter()
            os.fsync(file.fileno())
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
