"""The memory driver passes the suite of all drivers, so that it is a faithful fake."""

import itertools

import pytest

from molva.messaging.conformance import Harness, QueueConformance, TopicConformance
from molva.messaging.drivers import memory

_names = itertools.count()


class MemoryHarness(Harness):
    virtual = True
    lease = 10.0
    moment = 30.0
    quiet = 0.0
    silences = 1
    delete_interval = 1.1

    def __init__(self) -> None:
        super().__init__()
        self._name = f"test-{next(_names)}"

    def base_url(self) -> str:
        return f"memory://{self._name}"

    async def kept(self, topic: str = "t") -> int:
        return len(memory._brokers[self._name][topic].rows)


class TestMemory(TopicConformance):
    @pytest.fixture
    def harness(self) -> Harness:
        return MemoryHarness()


class TestMemoryQueue(QueueConformance):
    @pytest.fixture
    def harness(self) -> Harness:
        return MemoryHarness()
