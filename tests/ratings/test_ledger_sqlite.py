"""The SQLite ledger passes the suite of all ledgers; what only a URL of it can get wrong."""

from pathlib import Path

import apsw
import pytest

from molva.ratings.ledger import LedgerCapabilities, LedgerURLError, open_ledger
from tests.ratings.ledger_suite import LedgerHarness, LedgerSuite


class SQLiteHarness(LedgerHarness):
    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.db"

    def url(self, **options: str) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"sqlite://{self.path}?{query}"

    async def reset(self) -> None:
        for path in self.path.parent.glob("ledger.db*"):
            path.unlink()

    async def erase_comments(self) -> None:
        eraser = apsw.Connection(str(self.path))
        eraser.execute("DELETE FROM comment")
        eraser.close()

    async def derived(self) -> object:
        connection = apsw.Connection(str(self.path), flags=apsw.SQLITE_OPEN_READONLY)
        tables = ("campaign", "scope", "block", "correction", "node", "amended", "entry")
        rows = {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables}
        connection.close()
        return {table: sorted(found, key=repr) for table, found in rows.items()}


class TestSQLite(LedgerSuite):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> LedgerHarness:
        return SQLiteHarness(tmp_path)


async def test_capabilities_say_what_is_survived(tmp_path: Path) -> None:
    async with SQLiteHarness(tmp_path).opened() as ledger:
        assert ledger.capabilities == LedgerCapabilities(
            survives=frozenset({"kill", "power"}),
            history=True,
            window=None,
            horizon_seconds=None,
            ids="ledger",
        )


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlit:///x.db", "did you mean 'sqlite'"),
        ("x.db", "is no ledger URL"),
        ("sqlite://x.db", "three slashes"),
        ("sqlite://", "names no file"),
        ("sqlite:///x.db?comit=loop", "did you mean 'commit'"),
        ("sqlite:///x.db?commit=loop&commit=loop", "twice"),
        ("sqlite:///x.db?commit=never", "auto, loop, thread"),
        ("mongodb://ann:s3cret@host/0", r"ann:\*\*\*@host"),
    ],
)
async def test_a_url_that_names_no_ledger_is_refused(url: str, message: str) -> None:
    with pytest.raises(LedgerURLError, match=message):
        await open_ledger(url)
