"""Where requests and replies travel, made of the one URL that names the broker."""

from dataclasses import dataclass
from typing import Final, Self, final

from molva.messaging import with_options

__all__ = ["Places"]

# Seconds after which another worker takes over what a killed one was adding. Far less than
# anybody waits for a sum, or a killed worker would always cost its requests their answers.
_LEASE: Final = "1"

# Brokers that lease a queue's message for a time. On others a worker's connection or its lanes
# say whether it lives.
_LEASING: Final = ("memory", "redis", "rediss", "sqlite")


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
        scheme = broker.partition(":")[0]
        replies = with_options(broker, topic="sums")
        if scheme == "kafka":  # which has topics only
            asked = with_options(broker, topic="additions")
            return cls(asked, with_options(asked, subscription="adders"), replies)
        leased = {"lease": _LEASE} if scheme in _LEASING else {}
        queue = with_options(broker, queue="additions", **leased)
        return cls(queue, queue, replies)
