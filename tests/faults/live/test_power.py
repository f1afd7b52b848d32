"""Power cuts, a few of each kind; and the proof that they are power cuts."""

import json
import os
from pathlib import Path

import apsw
import pytest

from tests.conftest import skip_without
from tests.faults.live.disk import Image, can_mount
from tests.faults.live.power import VARIANTS, PowerConfig, Variant, cut_power

pytestmark = pytest.mark.root


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Return a folder in which images can be made and mounted."""
    why_not = can_mount(tmp_path)
    if why_not:
        skip_without("mount", why_not)
    return tmp_path


def commits_after_a_cut(folder: Path, *, synchronous: str) -> int:
    """Commit a hundred times, cut the power, and return how many commits are there."""
    image, after = Image(folder / "before.img"), None
    try:
        image.make()
        image.mount(folder / "before")
        connection = apsw.Connection(str(folder / "before" / "file.db"))
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", "full")
        connection.execute("CREATE TABLE t (n INTEGER)")
        connection.pragma("synchronous", synchronous)
        for number in range(100):
            connection.execute("INSERT INTO t VALUES (?)", (number,))
        after = image.cut(folder / "after.img")
        connection.close()
        after.mount(folder / "after")
        reopened = apsw.Connection(str(folder / "after" / "file.db"))
        found = reopened.execute("SELECT count(*) FROM t").get
        assert reopened.pragma("integrity_check") == "ok"
        reopened.close()
        assert isinstance(found, int)
        return found
    finally:
        image.discard()
        if after is not None:
            after.discard()


def test_a_cut_keeps_what_was_synced_alone(disk: Path) -> None:
    image, after = Image(disk / "before.img"), None
    try:
        image.make()
        image.mount(disk / "before")
        with (disk / "before" / "synced").open("w") as file:
            file.write("stays")
            file.flush()
            os.fsync(file.fileno())
        (disk / "before" / "unsynced").write_text("goes")
        after = image.cut(disk / "after.img")
        after.mount(disk / "after")

        assert (disk / "after" / "synced").read_text() == "stays"
        assert not (disk / "after" / "unsynced").exists()
        assert (disk / "before" / "unsynced").exists()
    finally:
        image.discard()
        if after is not None:
            after.discard()


def test_commits_that_were_synced_survive_a_cut(disk: Path) -> None:
    assert commits_after_a_cut(disk, synchronous="full") == 100


def test_commits_that_were_not_synced_are_lost_in_a_cut(disk: Path) -> None:
    assert commits_after_a_cut(disk, synchronous="normal") < 100


@pytest.mark.parametrize("variant", VARIANTS)
async def test_every_accepted_rating_survives_power_cuts(disk: Path, variant: Variant) -> None:
    report = await cut_power(PowerConfig(seed=20_26, cuts=2, variant=variant), disk / "run")

    shown = json.dumps(report.shown(), indent=1)
    assert report.cuts == 2, shown
    assert report.violations == [], shown
    assert report.vacuous == [], shown


async def test_a_service_that_does_not_sync_is_found(disk: Path) -> None:
    found: list[str] = []
    for seed in (1, 2, 3):
        mutant = {"serve": "not-synced", "work": "not-synced"}
        report = await cut_power(PowerConfig(seed, cuts=2, added=mutant), disk / str(seed))
        found += report.violations
        if any(each.startswith("lost") for each in found):
            return
    pytest.fail(f"it was not found in three rounds, only {found}")
