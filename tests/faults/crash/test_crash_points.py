"""After a crash at any point nothing that was promised is missing, and nothing is twice."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import pytest

from molva._base.clock import ManualClock
from tests.faults.crash.disk import MODES, Disk, Mode
from tests.faults.crash.scenario import RATINGS, apply, opened, record, submission

# In memory where there is such a folder: nothing here tests the real disk.
_SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=_SHM))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


async def _check(
    disk: Disk, point: int, mode: Mode, files: dict[str, bytes] | None = None
) -> list[str]:
    """Reopen what a crash left, ``files``; return what is wrong."""
    files = disk.image(point, mode) if files is None else files
    sent = set(disk.marks(point, "sent"))
    applied = set(disk.marks(point, "applied"))
    dead = set(disk.marks(point, "dead"))
    everything = set(disk.marks(len(disk.log), "sent"))
    wrong: list[str] = []
    with _folder() as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        clock = ManualClock()
        async with opened(folder, clock) as (subscription, queue, ledger):
            for path in (folder / "queue.db", folder / "ledger.db"):
                connection = apsw.Connection(str(path))
                if connection.pragma("integrity_check") != "ok":
                    wrong.append(f"{path.name} is corrupt")
                connection.close()
            before = _ratings(folder)
            if not applied <= before.keys():
                wrong.append(f"applied and gone: {len(applied - before.keys())}")
            while await apply(subscription, ledger, None, limit=100):
                pass
            after = _ratings(folder)
            letters = {letter.message.id for letter in await subscription.dead_letters()}
            # A dead letter is not synced on its own: a power cut may bring its message back,
            # to be rejected once more. By now it has been.
            if not dead <= letters:
                wrong.append(f"dead letters gone: {len(dead - letters)}")
            counted = after.keys() | letters
            if not sent <= counted:
                wrong.append(f"sent and lost: {len(sent - counted)}")
            if not counted <= everything:
                wrong.append(f"never sent: {len(counted - everything)}")
            for id_, rate in after.items():
                if submission(int.from_bytes(id_, "big"), id_).entry.rate != rate:  # type: ignore[union-attr]
                    wrong.append("garbled")
            total = await ledger.total("default", n=10**6)
            found = (0, 0) if total is None else (total.count, total.sum)
            if found != (len(after), sum(after.values())):
                wrong.append(f"total {found} of {len(after)} ratings")
            wrong += [str(difference) async for difference in ledger.verify()]
            stat = await queue.stat()
            rows = await queue.peek(1_000)
            if stat is None or stat.pending != len(rows):
                wrong.append(f"{stat} with {len(rows)} rows in the queue")
            settled = stat.pending + stat.dead if stat is not None else 0
            if mode == "kill" and point == len(disk.log) and settled >= RATINGS:
                wrong.append("acks of the queue are gone after a kill")
    return wrong


def _ratings(folder: Path) -> dict[bytes, int]:
    """Return id and rate of every rating, read without the product's code."""
    connection = apsw.Connection(str(folder / "ledger.db"))
    try:
        rows = connection.execute("SELECT id, rate FROM entry WHERE rate IS NOT NULL").fetchall()
    finally:
        connection.close()
    return {bytes(id_): rate for id_, rate in rows}  # type: ignore[arg-type, misc]


def _points(disk: Disk) -> list[int]:
    """Return every point behind which something else is on the disk, or was promised."""
    opened_at = next(n for n, o in enumerate(disk.log) if o.kind == "mark")
    return list(range(opened_at, len(disk.log) + 1))


def _crashes(disk: Disk, mode: Mode, points: list[int]) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Yield every point with the files it leaves; of several that leave the same, the last.

    Nothing but promises was made between them, and by the last of them most had been.
    """
    images = disk.images(points, mode)
    files = next(images)
    for point, following in zip(points, (*points[1:], None), strict=True):
        after = None if following is None else next(images)
        if after != files:
            yield point, files
        if after is not None:
            files = after


@pytest.mark.timeout(600)
async def test_every_point_of_every_kind_of_crash(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with _folder() as folder:
        disk = await record(folder)
    points = _points(disk)
    kinds = {o.kind for o in disk.log}
    assert {"write", "sync", "mark"} <= kinds
    assert len(disk.marks(len(disk.log), "applied")) >= RATINGS - 2
    assert any(o.file == "queue.db" and o.kind == "write" for o in disk.log[points[0] :]), (
        "no checkpoint happened"
    )
    wrong = {
        (mode, point): found
        for mode in MODES
        for point, files in _crashes(disk, mode, points)
        if (found := await _check(disk, point, mode, files))
    }
    with capsys.disabled():
        print(f" {len(points)} points, {len(MODES)} kinds of crash ", end="")
    assert wrong == {}


# The net itself: each of these is a mistake that has been made, and must be found.


async def _finds(disk: Disk) -> bool:
    points = _points(disk)
    for mode in ("power", "torn", "kill"):
        for point in [*points[:: max(1, len(points) // 40)], points[-1]]:
            try:
                if await _check(disk, point, mode):
                    return True
            except Exception:  # noqa: BLE001 - a file that cannot be opened was found too
                return True
    return False


async def test_commits_that_are_not_synced_are_found() -> None:
    with _folder() as folder:
        disk = await record(folder)
    disk.log[:] = [o for o in disk.log if o.kind != "sync" or not o.file.endswith("-wal")]
    assert await _finds(disk)


async def test_a_promise_made_before_its_commit_is_found() -> None:
    with _folder() as folder:
        disk = await record(folder)
    marks = [n for n, o in enumerate(disk.log) if o.kind == "mark" and o.file == "applied"]
    promise = disk.log.pop(marks[-1])
    disk.log.insert(marks[0], promise)
    assert await _finds(disk)


async def test_rows_and_totals_of_two_commits_are_found() -> None:
    with _folder() as folder:
        disk = await record(folder)
    # A commit that reached the disk only by half, and was taken for whole.
    frames = [n for n, o in enumerate(disk.log) if o.kind == "write" and o.file == "ledger.db-wal"]
    del disk.log[frames[len(frames) // 2]]
    assert await _finds(disk)
