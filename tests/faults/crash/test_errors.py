"""Whatever operation of the disk fails, and however: refused is said, confirmed is kept."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from molva._base.sqlite_writer import SQLiteWriter
from molva.messaging import Action, Subscription
from molva.ratings.ledger import Ledger
from tests.faults.crash.enduring import Run
from tests.faults.crash.failing import FULL, FailingDisk, Fault
from tests.faults.crash.scenario import POISON, submission

# In memory where there is such a folder: nothing here tests the real disk.
_SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=_SHM))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


async def _run(fault: Fault | None) -> tuple[FailingDisk, Run]:
    disk = FailingDisk(fault)
    try:
        with _folder() as folder:
            run = Run(folder, disk)
            await run.run()
    finally:
        disk.unregister()
    return disk, run


async def _faults() -> list[Fault]:
    """Return a fault at every operation; at writes also a full disk, its three kinds in turn.

    In turn: three times as many runs would take a minute more, and which write of a batch
    it is matters, not which kind meets it.
    """
    disk, run = await _run(None)
    assert run.wrong == []
    kinds = Counter(kind for kind, _ in disk.done)
    assert {"open", "write", "sync", "truncate", "delete"} <= kinds.keys()
    writes = [number for number, (kind, _) in enumerate(disk.done) if kind == "write"]
    return [Fault(number, "error") for number in range(len(disk.done))] + [
        Fault(number, FULL[turn % len(FULL)]) for turn, number in enumerate(writes)
    ]


@pytest.mark.timeout(600)
async def test_an_error_at_every_operation_is_told_and_loses_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    faults = await _faults()
    wrong: dict[Fault, object] = {}
    told = 0
    for fault in faults:
        disk, run = await _run(fault)
        assert disk.struck is not None, fault
        told += run.refused > 0
        if run.wrong:
            wrong[fault] = (disk.struck, run.wrong)
    with capsys.disabled():
        print(f" {len(faults)} faults, {told} of them told ", end="")
    assert wrong == {}


# The net itself: each of these is a mistake that has been made, and must be found.


async def _finds() -> bool:
    """Run a fault at every sync and at some writes, until one is not overcome."""
    disk, _ = await _run(None)
    syncs = [number for number, (kind, _) in enumerate(disk.done) if kind == "sync"]
    writes = [number for number, (kind, _) in enumerate(disk.done) if kind == "write"]
    for fault in (Fault(n, "error") for n in [*syncs, *writes[::10]]):
        _, run = await _run(fault)
        if run.wrong:
            return True
    return False


async def test_a_failed_sync_that_is_tried_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SQLiteWriter, "_give_up", lambda *_: None)
    assert await _finds()


async def test_others_who_write_behind_a_failed_sync_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SQLiteWriter, "_warn_others", lambda _: None)
    assert await _finds()


async def test_a_batch_acknowledged_before_its_commit_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def apply(self: Run, subscription: Subscription, ledger: Ledger) -> int:
        deliveries = await subscription.receive(25, wait=0.0)
        good = [d for d in deliveries if int(d.message.body) not in POISON]
        await subscription.settle([(d, Action.ACK) for d in deliveries])
        batch = [submission(int(d.message.body), d.message.id) for d in good]
        await ledger.apply(batch, applied_at_us=1)
        return len(deliveries)

    monkeypatch.setattr(Run, "_apply", apply)
    assert await _finds()
