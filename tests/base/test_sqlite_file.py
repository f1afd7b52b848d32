"""Opening SQLite files of ours: identity, versions, settings."""

import errno
import os
import threading
from pathlib import Path

import apsw
import pytest

from molva._base.sqlite_file import (
    ForeignFileError,
    NewerFileError,
    SQLiteFileError,
    UnusableFileError,
    open_sqlite,
    probe_fsync,
    transaction,
)

_FIRST = "CREATE TABLE a (x INTEGER) STRICT; INSERT INTO a VALUES (1)"
_SECOND = "ALTER TABLE a ADD COLUMN y INTEGER; UPDATE a SET y = 2"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.db"


def _open(
    path: Path, *migrations: str, application_id: int = 77, create: bool = True
) -> apsw.Connection:
    return open_sqlite(
        path,
        kind="ledger",
        application_id=application_id,
        migrations=migrations or (_FIRST,),
        create=create,
    )


def test_a_new_file_has_its_schema_and_its_identity(path: Path) -> None:
    connection = _open(path, _FIRST, _SECOND)

    assert connection.execute("SELECT * FROM a").fetchall() == [(1, 2)]
    assert (connection.pragma("application_id"), connection.pragma("user_version")) == (77, 2)


def test_commits_are_synced(path: Path) -> None:
    connection = _open(path)

    assert connection.pragma("journal_mode") == "wal"
    assert connection.pragma("synchronous") == 2  # FULL


def test_an_older_file_gets_what_it_lacks_once(path: Path) -> None:
    _open(path, _FIRST).close()

    for _ in range(2):
        connection = _open(path, _FIRST, _SECOND)
        assert connection.execute("SELECT * FROM a").fetchall() == [(1, 2)]
        connection.close()


def test_a_migration_that_fails_leaves_the_version_before(path: Path) -> None:
    _open(path, _FIRST).close()

    with pytest.raises(UnusableFileError):
        _open(path, _FIRST, "UPDATE a SET x = 5; SELECT nonsense FROM nowhere")

    connection = _open(path, _FIRST)
    assert connection.execute("SELECT * FROM a").fetchall() == [(1,)]


def test_a_newer_file_is_refused_untouched(path: Path) -> None:
    _open(path, _FIRST, _SECOND).close()
    before = path.read_bytes()

    with pytest.raises(NewerFileError, match=r"ledger has version 2.*up to 1; upgrade"):
        _open(path, _FIRST)

    assert path.read_bytes() == before


def test_a_file_of_another_kind_is_refused_untouched(path: Path) -> None:
    _open(path).close()
    before = path.read_bytes()

    with pytest.raises(ForeignFileError, match="is no ledger") as caught:
        _open(path, application_id=78)

    assert caught.value.path == str(path)
    assert path.read_bytes() == before


def test_what_is_no_database_is_refused_untouched(path: Path) -> None:
    path.write_text("notes " * 1_000)

    with pytest.raises(ForeignFileError, match="no SQLite database"):
        _open(path)

    assert path.read_text() == "notes " * 1_000


def test_a_missing_file_is_only_made_when_asked(path: Path) -> None:
    with pytest.raises(UnusableFileError, match="ledger is missing"):
        _open(path, create=False)

    assert not path.exists()


def test_a_folder_that_is_missing_is_an_error_of_ours(path: Path) -> None:
    with pytest.raises(SQLiteFileError):
        _open(path / "deeper" / "x.db")


def test_a_file_that_appears_while_it_is_looked_at_is_ours(path: Path) -> None:
    """Another process makes the file between two of the looks that tell whose it is."""
    other = apsw.Connection(str(path))
    other.pragma("journal_mode", "wal")

    def make(cursor: apsw.Cursor, statement: str, _: object) -> bool:
        if "user_version" in statement and not made:
            made.append(1)
            with transaction(other):
                other.execute(_FIRST)
                other.pragma("application_id", 77)
                other.pragma("user_version", 1)
        return True

    made: list[int] = []

    def watch(connection: apsw.Connection) -> None:
        connection.exec_trace = make

    apsw.connection_hooks.append(watch)
    try:
        connection = _open(path)
    finally:
        apsw.connection_hooks.remove(watch)

    assert made
    assert connection.execute("SELECT * FROM a").fetchall() == [(1,)]


def test_many_who_make_a_file_at_once_all_succeed(path: Path) -> None:
    together = threading.Barrier(8)
    versions: list[object] = []

    def work() -> None:
        together.wait()
        connection = _open(path, _FIRST, _SECOND)
        versions.append(connection.pragma("user_version"))
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert versions == [2] * 8


def test_what_a_killed_process_left_is_copied_into_the_file(path: Path, tmp_path: Path) -> None:
    connection = _open(path)
    connection.execute("INSERT INTO a VALUES (5)")
    left = tmp_path / "left.db"
    for suffix in ("", "-wal"):
        Path(f"{left}{suffix}").write_bytes(Path(f"{path}{suffix}").read_bytes())

    again = _open(left)

    assert os.path.getsize(f"{left}-wal") == 0
    assert again.execute("SELECT x FROM a").fetchall() == [(1,), (5,)]


def test_a_transaction_is_all_or_nothing(path: Path) -> None:
    connection = _open(path)

    with pytest.raises(RuntimeError), transaction(connection):  # noqa: PT012
        connection.execute("INSERT INTO a VALUES (5)")
        raise RuntimeError

    assert not connection.in_transaction
    assert connection.execute("SELECT x FROM a").fetchall() == [(1,)]


def test_a_probe_measures_and_leaves_nothing(tmp_path: Path) -> None:
    assert 0.0 < probe_fsync(tmp_path) < 5.0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_synced_is_one_clear_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)

    with pytest.raises(UnusableFileError, match="the folder of the ledger cannot be synced"):
        _open(path)
