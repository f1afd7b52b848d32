"""SQLite catalog: campaigns in one file on a local disk.

URL:
    ``sqlite:///var/lib/molva/catalog.db``

    ``create``
        ``auto`` makes a missing file, ``never`` refuses to. Default ``auto``.

Design:
    Two connections. One reads, on the loop: in WAL mode a reader waits for nobody, and a
    look-up of a campaign takes microseconds. The other writes, in a thread, where it may
    wait for another process. SQLite's data_version, asked on the reading connection,
    changes whenever any other connection committed, be it the writing one beside it or
    one of another process: that alone is the revision.

    One connection with a counter for own writes was rejected: a revision asked on the
    loop while a write waits in the thread would wait with it.
"""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Final, Self, final
from zlib import crc32

import apsw

from molva._base.sqlite_file import (
    DamagedFileError,
    SQLiteFileError,
    UnusableFileError,
    open_sqlite,
)
from molva._base.sqlite_writer import (
    BrokenFileError,
    BusyFileError,
    FullFileError,
    SQLiteWriter,
)
from molva.ratings.campaign import Campaign, check_campaign
from molva.ratings.catalog.protocol import (
    CatalogBrokenError,
    CatalogDamagedError,
    CatalogError,
    CatalogUnavailableError,
    CatalogVersionError,
    ScaleNarrowedError,
)

__all__ = ["SQLiteCatalog"]

_APPLICATION_ID: Final = int.from_bytes(b"Mcat", "big")

# A script that was released never changes. The row is Campaign(), which a test compares.


def _add_checksums(connection: apsw.Connection) -> None:
    """SQLite's pages have none, and a flipped bit in a scale refuses ratings or lets them in."""
    connection.execute("ALTER TABLE campaign ADD COLUMN checksum INTEGER")
    for name, *rest in connection.execute(f"SELECT {_COLUMNS} FROM campaign").fetchall():
        connection.execute(
            "UPDATE campaign SET checksum = ? WHERE name = ?", (_checksum(name, *rest), name)
        )


def _checksum(*values: object) -> int:
    return crc32(json.dumps(values).encode())


_MIGRATIONS: Final = (
    """
    CREATE TABLE campaign (
      name     TEXT PRIMARY KEY,
      question TEXT NOT NULL,
      minimum  INTEGER NOT NULL,
      maximum  INTEGER NOT NULL,
      "window" INTEGER NOT NULL,
      CHECK (minimum < maximum)
    ) STRICT, WITHOUT ROWID;
    INSERT INTO campaign VALUES ('default', 'How do you like it?', 0, 10, 10);
    """,
    _add_checksums,
)

_COLUMNS: Final = 'name, question, minimum, maximum, "window"'


@final
class SQLiteCatalog:
    """See the module. Made by ``open``."""

    def __init__(self, path: str, reader: apsw.Connection, writer: apsw.Connection) -> None:
        self._path = path
        self._reader = reader
        # In a thread: a catalog is seldom written, so nobody waits for the hand-over.
        self._writer = SQLiteWriter(writer, path=path, on_loop=False)
        self._closed = False

    @classmethod
    async def open(cls, path: str, *, create: bool = True) -> Self:
        """Open the file, creating or migrating it where needed; waits in a thread."""
        return await asyncio.to_thread(cls._open, path, create)

    @classmethod
    def _open(cls, path: str, create: bool) -> Self:
        with _translated(path):
            writer = _connect(path, create=create)
            try:
                _check_all(writer, path)
                reader = _connect(path, create=False)
            except BaseException:
                writer.close()
                raise
        return cls(path, reader, writer)

    async def campaigns(self) -> list[Campaign]:
        """Return all campaigns, in the order of their names."""
        self._check_open()
        with _translated(self._path):
            sql = f"SELECT {_COLUMNS}, checksum FROM campaign ORDER BY name"
            return [_campaign(row) for row in self._reader.execute(sql)]

    async def campaign(self, name: str) -> Campaign | None:
        """Return the campaign of that name; None where there is none."""
        self._check_open()
        with _translated(self._path):
            return _find(self._reader, name)

    async def put_campaign(self, campaign: Campaign) -> bool:
        """Store a campaign; True if it was created. See ``Catalog``."""
        check_campaign(campaign)
        self._check_open()
        with _translated(self._path):
            return await self._writer.write(lambda connection: _store(connection, campaign))

    async def revision(self) -> int:
        """Return a number that differs whenever any process changed anything in between."""
        self._check_open()
        with _translated(self._path):
            version = self._reader.pragma("data_version")
        assert isinstance(version, int)
        return version

    async def close(self) -> None:
        """Release the file. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._reader.close()
        # Last: whoever closes the last connection copies the WAL back into the file.
        await self._writer.close()

    def _check_open(self) -> None:
        if self._closed:
            raise CatalogError(f"{self._path}: the catalog is closed")


def _check_all(connection: apsw.Connection, path: str) -> None:
    """Look at every page: a catalog is small, and a row that is not found refuses a campaign."""
    found = connection.pragma("integrity_check")
    if found != "ok":
        raise DamagedFileError(path, f"the catalog is damaged ({found}); restore it from a copy")


def _connect(path: str, *, create: bool) -> apsw.Connection:
    return open_sqlite(
        path,
        kind="catalog",
        application_id=_APPLICATION_ID,
        migrations=_MIGRATIONS,
        create=create,
    )


def _find(connection: apsw.Connection, name: str) -> Campaign | None:
    sql = f"SELECT {_COLUMNS}, checksum FROM campaign WHERE name = ?"
    rows = connection.execute(sql, (name,))
    # All of them, although there is one at most: a statement left half-way holds its
    # snapshot, and data_version would stand still.
    found = [_campaign(row) for row in rows]
    return found[0] if found else None


def _store(connection: apsw.Connection, campaign: Campaign) -> bool:
    """Insert or replace within a transaction; True if the campaign is new."""
    old = _find(connection, campaign.name)
    if old == campaign:
        return False
    if old is not None and not (
        campaign.minimum <= old.minimum and old.maximum <= campaign.maximum
    ):
        raise ScaleNarrowedError(old, campaign)
    values = (
        campaign.name,
        campaign.question,
        campaign.minimum,
        campaign.maximum,
        campaign.window,
    )
    connection.execute(
        f"INSERT OR REPLACE INTO campaign ({_COLUMNS}, checksum) VALUES (?, ?, ?, ?, ?, ?)",
        (*values, _checksum(*values)),
    )
    return old is None


def _campaign(row: tuple[object, ...]) -> Campaign:
    name, question, minimum, maximum, window, checksum = row
    if checksum != _checksum(name, question, minimum, maximum, window):
        raise apsw.CorruptError(f"campaign {name!r:.60} is not what was stored")
    assert isinstance(name, str)
    assert isinstance(question, str)
    assert isinstance(minimum, int)
    assert isinstance(maximum, int)
    assert isinstance(window, int)
    return Campaign(name=name, question=question, minimum=minimum, maximum=maximum, window=window)


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    """Raise what the file's errors mean to whoever uses a catalog."""
    try:
        yield
    except BrokenFileError as error:
        raise CatalogBrokenError(f"{error}; restart the process") from error
    except (UnusableFileError, BusyFileError, FullFileError) as error:
        raise CatalogUnavailableError(str(error)) from error
    except DamagedFileError as error:
        raise CatalogDamagedError(str(error)) from error
    except SQLiteFileError as error:
        raise CatalogVersionError(str(error)) from error
    except (apsw.CorruptError, apsw.NotADBError, UnicodeDecodeError) as error:
        problem = f"{path}: the catalog is damaged ({error}); restore it from a copy"
        raise CatalogDamagedError(problem) from error
    except apsw.Error as error:
        raise CatalogUnavailableError(
            f"{path}: the catalog cannot be used now ({error})"
        ) from error
