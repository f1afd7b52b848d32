"""The writer: one transaction at a time, on the loop or beside it, and its end."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from molva._base import sqlite_writer
from molva._base.sqlite_file import open_sqlite
from molva._base.sqlite_writer import (
    BrokenFileError,
    BusyFileError,
    FullFileError,
    SQLiteWriter,
    commit_on_loop,
)


def _connect(path: Path) -> apsw.Connection:
    return open_sqlite(
        path, kind="queue", application_id=7, migrations=["CREATE TABLE a (x INTEGER) STRICT"]
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.db"


@pytest.fixture(params=[True, False], ids=["loop", "thread"])
async def writer(path: Path, request: pytest.FixtureRequest) -> AsyncIterator[SQLiteWriter]:
    writer = SQLiteWriter(_connect(path), path=str(path), on_loop=request.param)
    yield writer
    await writer.close()


def _rows(path: Path) -> list[int]:
    connection = _connect(path)
    rows = [row[0] for row in connection.execute("SELECT x FROM a")]
    connection.close()
    assert all(isinstance(row, int) for row in rows)
    return rows


async def _write(writer: SQLiteWriter, number: int) -> int:
    def work(connection: apsw.Connection) -> int:
        connection.execute("INSERT INTO a VALUES (?)", (number,))
        return number

    return await writer.write(work)


async def test_what_the_work_returned_is_returned(writer: SQLiteWriter, path: Path) -> None:
    assert await asyncio.gather(*(_write(writer, n) for n in range(5))) == [0, 1, 2, 3, 4]
    assert _rows(path) == [0, 1, 2, 3, 4]


async def test_work_that_raises_leaves_nothing(writer: SQLiteWriter, path: Path) -> None:
    def work(connection: apsw.Connection) -> None:
        connection.execute("INSERT INTO a VALUES (9)")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await writer.write(work)
    await _write(writer, 1)

    assert _rows(path) == [1]


async def test_the_loop_carries_commits_only_where_it_may(path: Path) -> None:
    for on_loop in (True, False):
        writer = SQLiteWriter(_connect(path), path=str(path), on_loop=on_loop)
        thread = await writer.write(lambda _: threading.get_ident())
        await writer.close()

        assert (thread == threading.get_ident()) == on_loop


async def test_a_locked_file_is_waited_for_beside_the_loop(
    writer: SQLiteWriter, path: Path
) -> None:
    other = _connect(path)
    other.execute("BEGIN IMMEDIATE")
    writing = asyncio.create_task(_write(writer, 1))
    for _ in range(20):
        await asyncio.sleep(0.001)  # the loop goes on
    assert not writing.done()

    other.execute("COMMIT")

    assert await writing == 1
    other.close()


async def test_a_file_that_stays_locked_is_busy(
    writer: SQLiteWriter, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_writer, "_BUSY_TIMEOUT", 0.05)
    other = _connect(path)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(BusyFileError, match="another process held the file"):
        await _write(writer, 1)
    other.execute("COMMIT")
    other.close()

    assert not writer.broken
    assert await _write(writer, 2) == 2
    assert _rows(path) == [2]


async def test_a_full_disk_is_no_end(writer: SQLiteWriter, path: Path) -> None:
    def work(connection: apsw.Connection) -> None:
        connection.execute("INSERT INTO a VALUES (9)")
        raise apsw.FullError("no space")

    with pytest.raises(FullFileError, match="disk is full"):
        await writer.write(work)

    assert not writer.broken
    assert await _write(writer, 1) == 1
    assert _rows(path) == [1]


async def test_an_io_error_ends_all_writing(writer: SQLiteWriter, path: Path) -> None:
    await _write(writer, 1)
    with pytest.raises(BrokenFileError, match="fsync"):
        await writer.write(_fail)

    for number in (2, 3):
        with pytest.raises(BrokenFileError, match="given up") as caught:
            await _write(writer, number)
        assert isinstance(caught.value.__cause__, apsw.IOError)
    assert writer.broken
    await writer.close()
    assert _rows(path) == [1]


async def test_an_io_error_copies_nothing_into_the_file(path: Path) -> None:
    writer = SQLiteWriter(_connect(path), path=str(path), on_loop=True)
    await _write(writer, 1)
    before = path.read_bytes()

    with pytest.raises(BrokenFileError):
        await writer.write(_fail)
    await writer.close()

    assert path.read_bytes() == before


async def test_a_cancelled_write_has_the_connection_to_itself_until_it_ends(path: Path) -> None:
    writer = SQLiteWriter(_connect(path), path=str(path), on_loop=False)
    started, go = threading.Event(), threading.Event()

    def work(connection: apsw.Connection) -> None:
        started.set()
        go.wait(5)
        connection.execute("INSERT INTO a VALUES (1)")

    writing = asyncio.create_task(writer.write(work))
    await asyncio.to_thread(started.wait)
    for _ in range(3):  # more than once: impatient callers do that
        writing.cancel()
        await asyncio.sleep(0.001)
    after = asyncio.create_task(_write(writer, 2))
    await asyncio.sleep(0.01)
    assert not writing.done()
    assert not after.done()
    go.set()

    with pytest.raises(asyncio.CancelledError):
        await writing
    assert await after == 2
    await writer.close()
    assert _rows(path) == [1, 2]


async def test_an_io_error_of_a_cancelled_write_ends_all_writing(path: Path) -> None:
    writer = SQLiteWriter(_connect(path), path=str(path), on_loop=False)
    started, go = threading.Event(), threading.Event()

    def work(_: apsw.Connection) -> None:
        started.set()
        go.wait(5)
        raise apsw.IOError("fsync")

    writing = asyncio.create_task(writer.write(work))
    await asyncio.to_thread(started.wait)
    writing.cancel()
    await asyncio.sleep(0.001)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await writing

    with pytest.raises(BrokenFileError):
        await _write(writer, 2)
    await writer.close()
    assert _rows(path) == []


@pytest.mark.parametrize("on_loop", [True, False])
async def test_closing_waits_for_what_is_written(path: Path, on_loop: bool) -> None:
    writer = SQLiteWriter(_connect(path), path=str(path), on_loop=on_loop)
    writing = [asyncio.create_task(_write(writer, n)) for n in range(3)]
    await asyncio.sleep(0)

    await writer.close()
    await asyncio.gather(*writing)

    assert _rows(path) == [0, 1, 2]


def test_where_to_commit_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit_on_loop(str(tmp_path), "loop")
    assert not commit_on_loop(str(tmp_path), "thread")
    for seconds, expected in ((0.0001, True), (0.005, False)):
        monkeypatch.setattr(sqlite_writer, "probe_fsync", lambda _, s=seconds: s)
        assert commit_on_loop(str(tmp_path), "auto") == expected


def _fail(_: apsw.Connection) -> None:
    raise apsw.IOError("fsync")
