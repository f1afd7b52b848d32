"""The files driver passes the suite of all drivers."""

from pathlib import Path
from urllib.parse import quote

import pytest

from molva.messaging.conformance import Harness, QueueConformance, TopicConformance


class FilesHarness(Harness):
    lease = 1.0
    quiet = 0.05

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def base_url(self) -> str:
        return f"files://{self._folder}"

    async def kept(self, topic: str = "t") -> int:
        boxes = (self._folder / "topics" / quote(topic, safe="")).iterdir()
        files = (part for box in boxes for part in (*box.glob("ready/*"), *box.glob("held/*")))
        return sum(1 for _ in files)


class TestFilesTopic(TopicConformance):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Harness:
        return FilesHarness(tmp_path)


class TestFilesQueue(QueueConformance):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Harness:
        return FilesHarness(tmp_path)
