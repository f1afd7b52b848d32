"""The SQLite ledger among crashes, full disks, failing disks and other processes."""

import asyncio
import contextlib
import hashlib
import random
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import apsw
import pytest

from molva.ratings.ledger import (
    Ledger,
    LedgerBrokenError,
    LedgerError,
    LedgerUnavailableError,
    LedgerVersionError,
    Outcome,
    open_ledger,
)
from molva.ratings.rating import Rating, Submission


@contextlib.asynccontextmanager
async def opened(folder: Path, **options: str) -> AsyncIterator[Ledger]:
    query = "&".join(f"{name}={value}" for name, value in options.items())
    ledger = await open_ledger(f"sqlite://{folder}/ledger.db?{query}")
    try:
        yield ledger
    finally:
        await ledger.close()


def ratings(first: int, number: int) -> list[Submission]:
    return [
        Submission(i.to_bytes(16, "big"), Rating("c", 1, i % 11, f"item-{i % 3}"))
        for i in range(first, first + number)
    ]


async def apply(ledger: Ledger, batch: list[Submission]) -> set[object]:
    return set(await ledger.apply(batch, applied_at_us=1))


async def assert_sound(folder: Path, *, entries: int) -> None:
    """Nothing lost, nothing twice, every number right."""
    async with opened(folder) as ledger:
        assert await ledger.last_seq("c") == entries
        assert [entry.seq async for entry in ledger.entries("c")] == list(range(1, entries + 1))
        assert [difference async for difference in ledger.verify()] == []


# -------------------------------------------------------------- files that are not ours


def digest(folder: Path) -> dict[str, str]:
    """Return what each file holds; without shared memory, and without an empty WAL."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if not path.name.endswith("-shm") and path.stat().st_size
    }


async def test_a_ledger_of_a_newer_version_is_not_touched(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await apply(ledger, ratings(1, 5))
    newer = apsw.Connection(str(tmp_path / "ledger.db"))
    newer.pragma("user_version", 99)
    newer.close()
    before = digest(tmp_path)

    with pytest.raises(LedgerVersionError, match="version 99"):
        await open_ledger(f"sqlite://{tmp_path}/ledger.db")

    assert digest(tmp_path) == before


async def test_a_database_of_something_else_is_not_touched(tmp_path: Path) -> None:
    foreign = apsw.Connection(str(tmp_path / "ledger.db"))
    foreign.execute("CREATE TABLE recipes (name TEXT)")
    foreign.close()
    before = digest(tmp_path)

    with pytest.raises(LedgerVersionError, match="something else"):
        await open_ledger(f"sqlite://{tmp_path}/ledger.db")

    assert digest(tmp_path) == before


async def test_what_is_no_database_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"Dear diary, " * 1_000)
    before = digest(tmp_path)

    with pytest.raises(LedgerVersionError, match="no SQLite database"):
        await open_ledger(f"sqlite://{tmp_path}/ledger.db")

    assert digest(tmp_path) == before


@pytest.mark.parametrize("kept_bytes", [100, 4_096, 20_000])
async def test_a_truncated_ledger_is_an_error_and_never_a_number(
    tmp_path: Path, kept_bytes: int
) -> None:
    async with opened(tmp_path) as ledger:
        await apply(ledger, ratings(1, 2_000))
    path = tmp_path / "ledger.db"
    path.write_bytes(path.read_bytes()[:kept_bytes])

    async def use() -> None:
        async with opened(tmp_path) as ledger:
            await ledger.total("c", n=1_000)
            await ledger.apply(ratings(3_000, 1), applied_at_us=1)

    with pytest.raises(LedgerError):
        await use()


async def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailableError, match="cannot be opened"):
        await open_ledger(f"sqlite://{tmp_path}/nowhere/ledger.db")


# ------------------------------------------------------------------ a disk that fails


class FailingDisk(apsw.VFS):
    """The system's VFS, whose writes and syncs fail while a test says so."""

    name = "failing-disk"

    def __init__(self) -> None:
        self.on_write: Exception | None = None
        self.on_sync: Exception | None = None
        self.only = ""
        super().__init__(self.name, "")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        return FailingFile(self, name, flags)

    def fails(self, path: str, error: Exception | None) -> bool:
        return error is not None and path.endswith(self.only)


class FailingFile(apsw.VFSFile):
    def __init__(
        self, disk: FailingDisk, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> None:
        self.disk = disk
        self.path = name.filename() if isinstance(name, apsw.URIFilename) else name or ""
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        if self.disk.on_write is not None and self.disk.fails(self.path, self.disk.on_write):
            raise self.disk.on_write
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:  # noqa: N802
        if self.disk.on_sync is not None and self.disk.fails(self.path, self.disk.on_sync):
            raise self.disk.on_sync
        super().xSync(flags)


@pytest.fixture
def disk() -> Iterator[FailingDisk]:
    disk = FailingDisk()
    yield disk
    disk.on_write = disk.on_sync = None
    disk.unregister()


@pytest.fixture(params=["loop", "thread"])
async def ledger(
    request: pytest.FixtureRequest, tmp_path: Path, disk: FailingDisk
) -> AsyncIterator[Ledger]:
    async with opened(tmp_path, vfs=disk.name, commit=request.param) as ledger:
        await apply(ledger, ratings(1, 100))
        yield ledger


async def test_a_full_disk_refuses_the_batch_until_there_is_room(
    ledger: Ledger, disk: FailingDisk, tmp_path: Path
) -> None:
    disk.on_write = apsw.FullError("no room")
    for _ in range(3):
        with pytest.raises(LedgerUnavailableError, match="full") as caught:
            await apply(ledger, ratings(101, 50))
        assert not isinstance(caught.value, LedgerBrokenError)
    assert await ledger.last_seq("c") == 100

    disk.on_write = None
    assert await apply(ledger, ratings(101, 50)) == {Outcome.APPLIED}
    await ledger.close()
    await assert_sound(tmp_path, entries=150)


@pytest.mark.parametrize("operation", ["on_sync", "on_write"])
async def test_after_an_io_error_nothing_is_written_to_the_file(
    ledger: Ledger, disk: FailingDisk, tmp_path: Path, operation: str
) -> None:
    setattr(disk, operation, apsw.IOError("the disk is dying"))
    with pytest.raises(LedgerBrokenError):
        await apply(ledger, ratings(101, 50))
    # The disk seems well again; that is no reason to trust it.
    disk.on_sync = disk.on_write = None
    left = digest(tmp_path)

    for _ in range(3):
        with pytest.raises(LedgerBrokenError):
            await apply(ledger, ratings(151, 10))
        with pytest.raises(LedgerBrokenError):
            await ledger.rebuild()
    assert await ledger.last_seq("c") == 100, "reads go on"
    assert [difference async for difference in ledger.verify()] == []
    await ledger.close()

    assert digest(tmp_path) == left


async def test_the_batch_that_met_an_fsync_error_is_counted_once_after_all(
    ledger: Ledger, disk: FailingDisk, tmp_path: Path
) -> None:
    disk.on_sync = apsw.IOError("the disk is dying")
    with pytest.raises(LedgerBrokenError):
        await apply(ledger, ratings(101, 50))
    disk.on_sync = None
    await ledger.close()

    # A new process would: the refused commit may have reappeared, or not.
    async with opened(tmp_path) as again:
        assert await apply(again, ratings(101, 50)) <= {Outcome.APPLIED, Outcome.DUPLICATE}
    await assert_sound(tmp_path, entries=150)


async def test_an_error_while_the_wal_is_copied_breaks_the_next_batch_only(
    ledger: Ledger, disk: FailingDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molva._base.sqlite_writer.CHECKPOINT_PAGES", 1)
    disk.only, disk.on_sync = "ledger.db", apsw.IOError("the disk is dying")
    assert await apply(ledger, ratings(101, 50)) == {Outcome.APPLIED}
    disk.on_sync = None
    left = digest(tmp_path)
    with pytest.raises(LedgerBrokenError):
        await apply(ledger, ratings(151, 50))
    await ledger.close()

    assert digest(tmp_path) == left
    await assert_sound(tmp_path, entries=150)


# ------------------------------------------------------------------ other writers


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    holder = apsw.Connection(str(folder / "ledger.db"))
    holder.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        holder.execute("ROLLBACK")
        holder.close()


async def longest_pause(during: asyncio.Task[object]) -> float:
    """Return the longest time for which the event loop stood still, in seconds."""
    longest = 0.0
    while not during.done():
        started = time.perf_counter()
        await asyncio.sleep(0.005)
        longest = max(longest, time.perf_counter() - started)
    return longest


@pytest.mark.parametrize("commit", ["loop", "thread"])
async def test_waiting_for_another_writer_leaves_the_loop_alive(
    tmp_path: Path, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A loop that waited itself would stand still for as long: the lock is only free after it.
    monkeypatch.setattr("molva._base.sqlite_writer._BUSY_TIMEOUT", 20.0)
    async with opened(tmp_path, commit=commit) as ledger:
        await apply(ledger, ratings(1, 10))
        with locked(tmp_path):
            applying: asyncio.Task[object] = asyncio.create_task(apply(ledger, ratings(11, 10)))
            pausing = asyncio.create_task(longest_pause(applying))
            await asyncio.sleep(0.7)
            assert not applying.done()
            assert await ledger.last_seq("c") == 10, "reads wait for nobody"
        assert await applying == {Outcome.APPLIED}
        assert await pausing < 10.0
    await assert_sound(tmp_path, entries=20)


async def test_a_ledger_held_too_long_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molva._base.sqlite_writer._BUSY_TIMEOUT", 0.1)
    async with opened(tmp_path) as ledger:
        with locked(tmp_path), pytest.raises(LedgerUnavailableError, match="another process"):
            await apply(ledger, ratings(1, 10))
        assert await apply(ledger, ratings(1, 10)) == {Outcome.APPLIED}


async def test_a_cancelled_batch_leaves_the_ledger_in_order(tmp_path: Path) -> None:
    async with opened(tmp_path, commit="thread") as ledger:
        for first in range(1, 2_000, 100):
            cancelled = asyncio.create_task(apply(ledger, ratings(first, 100)))
            await asyncio.sleep(random.random() / 500)
            cancelled.cancel()
            following = asyncio.create_task(apply(ledger, ratings(first, 100)))
            with contextlib.suppress(asyncio.CancelledError):
                await cancelled
            await following
    await assert_sound(tmp_path, entries=2_000)


async def test_a_cancelled_verify_releases_the_file(tmp_path: Path) -> None:
    async with opened(tmp_path) as ledger:
        await apply(ledger, ratings(1, 20_000))

        async def verify() -> None:
            async for _ in ledger.verify():
                pass

        for _ in range(5):
            verifying = asyncio.create_task(verify())
            await asyncio.sleep(random.random() / 50)
            verifying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await verifying
    assert not (tmp_path / "ledger.db-wal").exists(), "the last connection clears the WAL away"
