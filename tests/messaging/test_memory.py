"""The memory driver passes the suite of all drivers, so that it is a faithful fake."""

import itertools

import pytest

from molva.messaging.drivers import memory
from tests.messaging.conformance import TopicConformance, TopicHarness
from tests.messaging.conformance.queues import QueueConformance, QueueHarness

_names = itertools.count()


class MemoryHarness(TopicHarness):
    settle_interval = 0.0
    share_interval = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._name = f"test-{next(_names)}"

    def base_url(self) -> str:
        return f"memory://{self._name}"

    def let_only_wake_ups_wake(self) -> None:
        """Nothing else does."""

    async def kept(self, topic: str = "t") -> int:
        return len(memory._brokers[self._name][topic].rows)


class TestMemory(TopicConformance):
    @pytest.fixture
    def harness(self) -> TopicHarness:
        return MemoryHarness()


class TestMemoryQueue(QueueConformance):
    @pytest.fixture
    def harness(self) -> QueueHarness:
        return QueueHarness(f"memory://test-queue-{next(_names)}")
