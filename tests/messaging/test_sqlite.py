"""The SQLite driver passes the suite of all drivers, on either kind of disk."""

from pathlib import Path

import apsw
import pytest

from molva.messaging import Action, Message
from molva.messaging.conformance import Harness, QueueConformance, TopicConformance, bodies
from molva.messaging.drivers import _sqlite_subscription


class SQLiteHarness(Harness):
    virtual = True
    lease = 10.0
    moment = 30.0
    quiet = 0.0
    silences = 1
    delete_interval = 1.1
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
    def harness(self, tmp_path: Path, request: pytest.FixtureRequest) -> Harness:
        return SQLiteHarness(tmp_path, request.param)


class TestSQLiteQueue(QueueConformance):
    @pytest.fixture(params=["loop", "thread"])
    def harness(self, tmp_path: Path, request: pytest.FixtureRequest) -> Harness:
        return SQLiteHarness(tmp_path, request.param)


async def test_offsets_are_never_used_again_once_every_message_was_deleted(tmp_path: Path) -> None:
    h = SQLiteHarness(tmp_path, "loop")
    h.stop_clock()
    topic, subscription = await h.topic(), await h.subscription()
    # As many as an idle consumer deletes at a time, and the one that it begins with.
    await topic.send_many([Message(b"old") for _ in range(2_001)])
    while deliveries := await subscription.receive(5_000, wait=0.0):
        await subscription.settle([(delivery, Action.ACK) for delivery in deliveries])
    await h.pass_time(1.0)
    assert await h.kept() == 0
    await topic.close()
    await subscription.close()

    topic, subscription = await h.topic(), await h.subscription()
    await topic.send(Message(b"new"))

    assert bodies(await subscription.receive(10, wait=0.0)) == [b"new"]
    await h.close()
