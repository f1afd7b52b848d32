"""What every driver's topics and subscriptions do, written once.

A driver's own test file is a harness and a subclass:

    class TestMemory(TopicConformance):
        @pytest.fixture
        def harness(self) -> TopicHarness: ...

Time is real unless a test asks the harness for a ``ManualClock`` before it opens anything.
"""

from tests.messaging.conformance.basics import Basics
from tests.messaging.conformance.cancelling import Cancelling
from tests.messaging.conformance.flow import Flow
from tests.messaging.conformance.groups import Groups
from tests.messaging.conformance.harness import (
    TopicHarness,
    bodies,
    eventually,
    key_in_lane,
    take,
)
from tests.messaging.conformance.keeping import Keeping
from tests.messaging.conformance.order import Order
from tests.messaging.conformance.running import Running
from tests.messaging.conformance.settling import Settling

__all__ = ["TopicConformance", "TopicHarness", "bodies", "eventually", "key_in_lane", "take"]


class TopicConformance(Basics, Groups, Settling, Order, Running, Flow, Cancelling, Keeping):
    """The suite. Subclasses bring the fixture ``harness``."""
