"""The Kafka driver passes the suite of all drivers."""

import itertools
import os
import uuid
from collections.abc import Iterator

import pytest

from molva.messaging.conformance import Harness, TopicConformance

URL = os.environ.get("MOLVA_TEST_KAFKA", "")


class KafkaHarness(Harness):
    share_interval = 1.5
    settle_interval = 0.4
    quiet = 0.3
    ack_orders = 4

    def __init__(self) -> None:
        super().__init__()
        self.prefix = f"x{uuid.uuid4().hex[:8]}-"

    def base_url(self) -> str:
        return URL + "?session=6&grace=1"


class TestKafka(TopicConformance):
    @pytest.fixture
    def harness(self) -> Harness:
        return KafkaHarness()
