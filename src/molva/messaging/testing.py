"""A broker in memory for the tests of an application, with everything in it to look at.

With pytest, ask for the fixture ``molva_broker``. It is a real broker, with leases, retries
and dead letters as on any other, and no mock: what an application does wrong with it goes
wrong here too.
"""

import itertools
from typing import Final, final

from molva.messaging.driver import DeadLetter
from molva.messaging.drivers import memory
from molva.messaging.drivers._memory_queue import Store
from molva.messaging.message import Message
from molva.messaging.url import with_options

__all__ = ["MemoryBroker"]

_names: Final = itertools.count(1)


@final
class MemoryBroker:
    """A fresh broker in memory.

    Attributes:
        url: What an application is given as its broker's URL.
    """

    def __init__(self) -> None:
        self._name = f"testing-{next(_names)}"
        self.url: Final = f"memory://{self._name}"
        memory._recorded.add(self._name)

    def topic_url(self, topic: str, **options: object) -> str:
        """Return the URL of a topic in it; ``subscription=`` makes it that of one reader."""
        return with_options(self.url, topic=topic, **_as_text(options))

    def queue_url(self, queue: str, **options: object) -> str:
        """Return the URL of a queue in it."""
        return with_options(self.url, queue=queue, **_as_text(options))

    def sent(self, name: str) -> list[Message]:
        """Return all that was ever sent to a topic or queue, oldest first."""
        found: list[Message] = []
        for place in (self._topics.get(name), self._queues.get(name)):
            if place is not None:
                found += place.sent or []
        return found

    def dead_letters(self, name: str) -> list[DeadLetter]:
        """Return the dead letters of a queue, or of all subscriptions of a topic."""
        found: list[DeadLetter] = []
        if name in self._queues:
            found += self._queues[name].dead
        if name in self._topics:
            for reading in self._topics[name].readings.values():
                found += reading.dead
        return found

    def waiting(self, name: str, subscription: str | None = None) -> int:
        """Return how many messages are not yet settled in a queue or a subscription.

        Raises:
            KeyError: Nothing of that name was opened.
        """
        if subscription is None:
            return len(self._queues[name].rows)
        log = self._topics[name]
        return log.last - log.readings[subscription].settled

    def forget(self) -> None:
        """Free its memory. What still has it open keeps what it holds."""
        memory._brokers.pop(self._name, None)
        memory._queues.pop(self._name, None)
        memory._recorded.discard(self._name)

    def __repr__(self) -> str:
        return f"<MemoryBroker {self.url}>"

    @property
    def _topics(self) -> "dict[str, memory._Log]":
        return memory._brokers.get(self._name, {})

    @property
    def _queues(self) -> dict[str, Store]:
        return memory._queues.get(self._name, {})


def _as_text(options: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in options.items()}
