"""Power cuts, a few of each kind; and the proof that they are power cuts."""

import json
import os
import random
from pathlib import Path

import apsw
import pytest

from tests.conftest import skip_without
from tests.faults.live.disk import Image, can_mount
from tests.faults.live.power import VARIANTS, PowerConfig, Variant, cut_power

SEED = 20_26

pytestmark = pytest.mark.root


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Return a folder in which images can be made and mounted."""
    why_not = can_mount(tmp_path)
    if why_not:
        skip_without("mount", why_not)
    return tmp_path


def commits_after_a_cut(folder: Path, *, synchronous: str, torn: bool) -> int:
    """Commit a hundred times, cut the power, and return how many commits are there."""
    image, after, later = Image(folder / "before.img"), None, None
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
        if torn:
            image.flush()
            later = image.cut(folder / "later.img")
        connection.close()
        after.mount(folder / "after")
        if later is not None:
            after.tear(later, folder / "later", {"file.db", "file.db-wal"}, random.Random(1))
        reopened = apsw.Connection(str(folder / "after" / "file.db"))
        found = reopened.execute("SELECT count(*) FROM t").get
        assert reopened.pragma("integrity_check") == "ok"
        reopened.close()
        assert isinstance(found, int)
        return found
    finally:
        for each in (image, after, later):
            if each is not None:
                each.discard()


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


def test_a_torn_cut_leaves_some_of_what_was_not_synced(disk: Path) -> None:
    image, after, later = Image(disk / "before.img"), None, None
    old, new = b"o" * 2**20, b"n" * 2**20
    try:
        image.make()
        image.mount(disk / "before")
        for name in ("torn", "left"):
            with (disk / "before" / name).open("wb") as file:
                file.write(old)
                file.flush()
                os.fsync(file.fileno())
        with (disk / "before" / "torn").open("r+b") as file:
            file.write(new)
        (disk / "before" / "unsynced").write_bytes(new)
        after = image.cut(disk / "after.img")
        image.flush()
        later = image.cut(disk / "later.img")
        after.mount(disk / "after")
        names = {"torn", "left", "unsynced"}

        torn = after.tear(later, disk / "later", names, random.Random(1))

        found = (disk / "after" / "torn").read_bytes()
        sectors = [found[at : at + 512] for at in range(0, len(found), 512)]
        assert set(sectors) == {old[:512], new[:512]}
        assert sectors.count(new[:512]) == torn
        assert (disk / "after" / "left").read_bytes() == old
        assert not (disk / "after" / "unsynced").exists()
    finally:
        for each in (image, after, later):
            if each is not None:
                each.discard()


@pytest.mark.parametrize("torn", [False, True])
def test_commits_that_were_synced_survive_a_cut(disk: Path, torn: bool) -> None:
    assert commits_after_a_cut(disk, synchronous="full", torn=torn) == 100


@pytest.mark.parametrize("torn", [False, True])
def test_commits_that_were_not_synced_are_lost_in_a_cut(disk: Path, torn: bool) -> None:
    assert commits_after_a_cut(disk, synchronous="normal", torn=torn) < 100


@pytest.mark.parametrize("variant", VARIANTS)
async def test_every_accepted_rating_survives_power_cuts(disk: Path, variant: Variant) -> None:
    # A cut tears something only where it falls between a write and its sync.
    cuts = 5 if variant == "torn" else 2
    # As in test_live: a round in which a busy machine let too little happen is done again.
    for seed in range(SEED, SEED + 3):
        report = await cut_power(PowerConfig(seed, cuts, variant), disk / str(seed))
        shown = json.dumps(report.shown(), indent=1)
        assert report.cuts == cuts, shown
        assert report.violations == [], shown
        if not report.vacuous:
            break

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
