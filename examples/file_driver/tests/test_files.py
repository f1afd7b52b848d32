"""The files driver passes the suite of all drivers."""

import dataclasses
from pathlib import Path
from urllib.parse import quote

import pytest

from molva.messaging import Message, UnsupportedFeatureError, open_queue
from molva.messaging.conformance import Harness, QueueConformance, TopicConformance
from molva.messaging.driver import Capabilities
from molva.messaging.url import Kind


class FilesHarness(Harness):
    lease = 1.0
    quiet = 0.05

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def base_url(self) -> str:
        # That a disk keeps what it flushed is not what is tested here.
        return f"files://{self._folder}?sync=no"

    async def kept(self, topic: str = "t") -> int:
        boxes = (self._folder / "topics" / quote(topic, safe="")).iterdir()
        files = (part for box in boxes for part in (*box.glob("ready/*"), *box.glob("held/*")))
        return sum(1 for _ in files)

    def capabilities(self, kind: Kind) -> Capabilities:
        return dataclasses.replace(super().capabilities(kind), survives=frozenset({"kill"}))


class TestFilesTopic(TopicConformance):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Harness:
        return FilesHarness(tmp_path)


class TestFilesQueue(QueueConformance):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Harness:
        return FilesHarness(tmp_path)


async def test_synced_is_the_default_and_survives_power(tmp_path: Path) -> None:
    async with await open_queue(f"files://{tmp_path}?queue=q&require=power") as queue:
        await queue.send(Message(b"1"))
        [delivery] = await queue.receive()
        await delivery.ack()
    with pytest.raises(UnsupportedFeatureError, match="power"):
        await open_queue(f"files://{tmp_path}?queue=q&require=power&sync=no")
