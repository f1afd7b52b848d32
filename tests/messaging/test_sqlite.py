"""The SQLite driver passes the suite of all drivers, on either kind of disk."""

from pathlib import Path

import apsw
import pytest

from molva.messaging.drivers import _sqlite_subscription
from tests.messaging.conformance import TopicConformance, TopicHarness


class SQLiteHarness(TopicHarness):
    # The driver's own intervals, and a little for what is rounded.
    settle_interval = 0.26
    share_interval = 0.26

    def __init__(self, folder: Path, commit: str) -> None:
        super().__init__()
        self.path = folder / "queue.db"
        self._commit = commit
        self._patch = pytest.MonkeyPatch()

    def base_url(self) -> str:
        return f"sqlite://{self.path}?commit={self._commit}"

    def let_only_wake_ups_wake(self) -> None:
        self._patch.setattr(_sqlite_subscription, "_SHARE_INTERVAL", 60.0)

    async def close(self) -> None:
        await super().close()
        self._patch.undo()

    async def kept(self, topic: str = "t") -> int:
        connection = apsw.Connection(str(self.path))
        sql = "SELECT topic_id FROM topic WHERE name = ?"
        topic_id = connection.execute(sql, (topic,)).get
        count = connection.execute(f"SELECT count(*) FROM message_{topic_id}").get
        connection.close()
        assert isinstance(count, int)
        return count


class TestSQLite(TopicConformance):
    @pytest.fixture(params=["loop", "thread"])
    def harness(self, tmp_path: Path, request: pytest.FixtureRequest) -> TopicHarness:
        return SQLiteHarness(tmp_path, request.param)
