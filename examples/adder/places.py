"""Where requests and replies travel, made of the one URL that names the broker."""

from dataclasses import dataclass
from typing import Final, Self, final

from molva.messaging import with_options
from molva.messaging.url import BrokerURL, load_driver

__all__ = ["Places"]

# Seconds after which another worker takes over what a killed one was adding. Far less than
# anybody waits for a sum, or a killed worker would always cost its requests their answers.
_LEASE: Final = "1"


@final
@dataclass(frozen=True, slots=True)
class Places:
    """URLs: of what requests are sent to, of what workers take, of what replies come by."""

    asked: str
    taken: str
    replies: str

    @classmethod
    def of(cls, broker: str) -> Self:
        """Return the places of a broker: a queue, where it has queues, and a topic."""
        driver = load_driver(BrokerURL.parse(broker))
        replies = with_options(broker, topic="sums")
        if getattr(driver, "QUEUE_CAPABILITIES", None) is None:
            asked = with_options(broker, topic="additions")
            return cls(asked, with_options(asked, subscription="adders"), replies)
        # Brokers that have no leases know by a worker's connection whether it lives.
        leased = {"lease": _LEASE} if "lease" in driver.QUEUE_OPTIONS else {}
        queue = with_options(broker, queue="additions", **leased)
        return cls(queue, queue, replies)
