"""What every driver's topics and queues do, written once, for drivers anywhere.

A driver's own test file is a harness and a subclass for each kind that it has:

    class RedisHarness(Harness):
        lease = 1.0

        def base_url(self) -> str:
            return f"redis://127.0.0.1:{PORT}/0"

    class TestRedisTopic(TopicConformance):
        @pytest.fixture
        def harness(self) -> Harness:
            return RedisHarness()

A test is skipped only by what the driver declares in its ``Capabilities``, and the skip
names it. Needs pytest and pytest-asyncio: ``pip install 'molva[conformance]'``.
"""

import pytest

from molva.messaging.conformance.asking import Asking, Sweeping
from molva.messaging.conformance.basics import Basics
from molva.messaging.conformance.cancelling import Cancelling
from molva.messaging.conformance.draining import Draining
from molva.messaging.conformance.dying import Dying
from molva.messaging.conformance.effects import Effects
from molva.messaging.conformance.flow import Flow
from molva.messaging.conformance.groups import Groups
from molva.messaging.conformance.harness import Harness, Suite, lacks, needs, offered
from molva.messaging.conformance.holding import Holding
from molva.messaging.conformance.keeping import Keeping
from molva.messaging.conformance.order import Order
from molva.messaging.conformance.queues import Queues
from molva.messaging.conformance.running import Running
from molva.messaging.conformance.settling import Settling
from molva.messaging.conformance.waiting import PATIENCE, bodies, eventually, key_in_lane, take

__all__ = [
    "PATIENCE",
    "Harness",
    "QueueConformance",
    "Suite",
    "TopicConformance",
    "bodies",
    "eventually",
    "key_in_lane",
    "lacks",
    "needs",
    "offered",
    "take",
]


@pytest.mark.asyncio
class TopicConformance(
    Basics,
    Groups,
    Settling,
    Holding,
    Order,
    Running,
    Draining,
    Flow,
    Cancelling,
    Keeping,
    Dying,
    Effects,
    Asking,
    Sweeping,
):
    """What topics and subscriptions do. Subclasses bring the fixture ``harness``."""

    kind = "topic"


@pytest.mark.asyncio
class QueueConformance(Queues, Holding, Draining, Cancelling, Dying, Effects, Asking):
    """What queues do. Subclasses bring the fixture ``harness``."""

    kind = "queue"
