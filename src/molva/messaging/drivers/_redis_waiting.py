"""What both kinds of Redis consumers have in common: limits, and cutting what is long."""

from collections.abc import Collection, Iterator, Sequence
from typing import Final

from molva.messaging.driver import Outcome
from molva.messaging.message import Message

__all__ = ["BATCH", "KEEP", "outcomes_of", "parts_of"]

# Messages that one call takes or settles. Lua's stack holds 8,000 values, and some have
# two; and nobody else is served meanwhile.
BATCH: Final = 1_000

# Seconds for which messages are kept that a receive was cancelled for, until the next one
# asks; then they are given back. Longer, and others wait for them; shorter, and a consumer
# that is cancelled and asks again gives back and takes the same ones.
KEEP: Final = 0.2

# Messages, and bytes of bodies, that one call stores. Fewer, and calls cost more than
# messages; more, and others wait while the server copies them.
_SEND_MESSAGES: Final = 256
_SEND_BYTES: Final = 1_000_000


def parts_of(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Cut messages into parts that one call stores."""
    start = size = 0
    for place, message in enumerate(messages):
        size += len(message.body)
        if place > start and (size > _SEND_BYTES or place - start == _SEND_MESSAGES):
            yield messages[start:place]
            start, size = place, len(message.body)
    if messages:
        yield messages[start:]


def outcomes_of(number: int, lost: Collection[int], otherwise: Outcome) -> list[Outcome]:
    """Return the outcomes of so many items, of which some are lost."""
    outcomes = [otherwise] * number
    for place in lost:
        outcomes[place] = Outcome.LEASE_LOST
    return outcomes
