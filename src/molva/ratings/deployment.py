"""A deployment: three URLs, and what all its processes open of them.

The broker holds ratings in flight, the ledger those that are counted, the catalog the
campaigns. Nothing else is shared between the processes of a deployment.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final
from urllib.parse import parse_qsl, quote

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva._base.redaction import redact
from molva.messaging import (
    Capabilities,
    Subscription,
    Topic,
    UnsupportedFeatureError,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.url import BrokerURL, load_driver
from molva.ratings.catalog import Catalog, open_catalog
from molva.ratings.ledger import Ledger, open_ledger

__all__ = [
    "SUBSCRIPTION",
    "TOPIC",
    "Deployment",
    "UnmetPromiseError",
    "UnsharedBrokerError",
    "check_shared",
    "survives",
]

# The names that a deployment uses inside its broker, unless the URL names another topic.
TOPIC: Final = "ratings"
SUBSCRIPTION: Final = "process"

# Seconds that a broker which can may collect ratings before a worker gets them. Kafka answers
# each message at once otherwise, which costs broker and worker twice the work; longer, and a
# lone rating is counted so much later.
_FETCH_WAIT: Final = 0.02

_ALL_FAULTS: Final = ("kill", "power", "node")


@final
class UnmetPromiseError(Exception):
    """The deployment does not survive what was asked for."""


@final
class UnsharedBrokerError(Exception):
    """The broker lives in one process, and a deployment is several."""


@final
@dataclass(frozen=True, slots=True)
class Deployment:
    """Where a deployment keeps what.

    Attributes:
        broker: URL of the broker. Where several deployments share one, each names a topic
            of its own in it (``?topic=``); without one it is ``ratings``.
        ledger: URL of the ledger.
        catalog: URL of the catalog.
        capacity: How many ratings may wait, unless the broker's URL says so; None for any
            number. Where the broker cannot bound them, whoever sends has to: see
            ``ratings.admission``.
        clock: Where time comes from.
    """

    broker: str
    ledger: str
    catalog: str
    capacity: int | None = None
    clock: Clock = SYSTEM_CLOCK

    @classmethod
    def in_folder(
        cls,
        folder: Path,
        *,
        broker: str | None = None,
        ledger: str | None = None,
        catalog: str | None = None,
        capacity: int | None = None,
    ) -> "Deployment":
        """Return the embedded defaults in ``folder``, with those URLs that are given instead.

        ``capacity``: how many ratings may wait, unless the broker's URL says so itself;
        None lets them wait without bound.
        """

        def default(name: str) -> str:
            return f"sqlite://{quote(str(folder.absolute() / name))}"

        return cls(
            broker or default("queue.db"),
            ledger or default("ledger.db"),
            catalog or default("catalog.db"),
            capacity,
        )

    async def open_topic(self) -> Topic:
        """Open where accepted ratings go, bounded by the broker itself where it can."""
        url = self._topic_url
        if self.capacity is not None and not _says(url, "capacity") and _bounds(url):
            bounded = with_options(url, capacity=str(self.capacity))
            with contextlib.suppress(UnsupportedFeatureError):
                return await open_topic(bounded, clock=self.clock)
        return await open_topic(url, clock=self.clock)

    async def open_subscription(self) -> Subscription:
        """Open where workers take ratings from."""
        url = with_options(self._topic_url, subscription=SUBSCRIPTION)
        if _has(url, "fetch_wait") and not _says(url, "fetch_wait"):
            url = with_options(url, fetch_wait=str(_FETCH_WAIT))
        return await open_subscription(url, clock=self.clock)

    @property
    def _topic_url(self) -> str:
        return (
            self.broker if _says(self.broker, "topic") else with_options(self.broker, topic=TOPIC)
        )

    async def open_ledger(self) -> Ledger:
        """Open where ratings are counted."""
        return await open_ledger(self.ledger)

    async def open_catalog(self) -> Catalog:
        """Open where campaigns are kept."""
        return await open_catalog(self.catalog)


def _bounds(url: str) -> bool:
    """Return whether the broker's driver has a bound at all.

    Asking it to open with one would be refused with the names of those that have one, for
    which every driver and its client library is loaded: seconds of each start.
    """
    driver = load_driver(BrokerURL.parse(url))
    best: Capabilities | None = getattr(driver, "TOPIC_CAPABILITIES", None)
    return best is None or best.capacity != "none"


def _has(url: str, option: str) -> bool:
    """Return whether the broker's driver reads that option."""
    return option in load_driver(BrokerURL.parse(url)).TOPIC_OPTIONS


def _says(url: str, option: str) -> bool:
    return any(name == option for name, _ in parse_qsl(url.partition("?")[2]))


def survives(topic: Topic, ledger: Ledger, *, asked: Iterable[str] = ()) -> list[str]:
    """Return what an accepted rating outlives: what broker and ledger have in common.

    Args:
        topic: The opened broker.
        ledger: The opened ledger.
        asked: What the deployment must survive.

    Raises:
        UnmetPromiseError: It does not survive all that is asked.
    """
    common = topic.capabilities.survives & ledger.capabilities.survives
    missing = [fault for fault in asked if fault not in common]
    if missing:
        shown = ", ".join(sorted(common)) or "nothing"
        raise UnmetPromiseError(
            f"asked to survive {', '.join(missing)}, but this deployment survives {shown} "
            f"(broker: {', '.join(sorted(topic.capabilities.survives)) or 'nothing'}; ledger: "
            f"{', '.join(sorted(ledger.capabilities.survives)) or 'nothing'})"
        )
    return [fault for fault in _ALL_FAULTS if fault in common]


def check_shared(capabilities: Capabilities, broker: str) -> None:
    """Raise where a broker does not reach from one process to another.

    Raises:
        UnsharedBrokerError: What is accepted here would never be counted elsewhere.
    """
    if not capabilities.shared:
        raise UnsharedBrokerError(
            f"{redact(broker)}: this broker lives in one process, so what HTTP accepts would never "
            "reach a worker; sqlite:///path/queue.db does"
        )
