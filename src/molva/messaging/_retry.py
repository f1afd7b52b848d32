"""How often a message is tried, and how long after which failure."""

import random
from typing import Final, Self, final

from molva.messaging.url import BrokerURL

__all__ = ["Retries"]

# Hand-overs of one message before it becomes a dead letter. As most brokers' users set it:
# fewer gives up on a short outage, more keeps a lane waiting behind a poisonous message.
_MAX_ATTEMPTS: Final = 5

# Seconds before the second attempt, doubled for each further one up to the limit. A
# quarter of it is random, so that consumers that failed together do not return together.
_FIRST_DELAY: Final = 0.5
_LONGEST_DELAY: Final = 60.0


@final
class Retries:
    """Attempts up to a limit, with growing, jittered delays between them.

    Args:
        max_attempts: Hand-overs of one message before it becomes a dead letter, ≥ 1.
        dice: Where jitter comes from; None for one of its own.
    """

    def __init__(self, max_attempts: int, *, dice: random.Random | None = None) -> None:
        if max_attempts < 1:
            raise ValueError(f"max_attempts={max_attempts} is refused; at least 1 is accepted")
        self.max_attempts: Final = max_attempts
        self._random = random.Random() if dice is None else dice  # jitter, no secret

    @classmethod
    def of(cls, max_attempts: int | None, url: BrokerURL) -> Self:
        """Return the retries that a caller asks for; else those of the URL; else the usual."""
        if max_attempts is None:
            max_attempts = url.max_attempts
        return cls(_MAX_ATTEMPTS if max_attempts is None else max_attempts)

    def delay(self, attempt: int) -> float:
        """Return the seconds to wait after the failed ``attempt``, counted from 1."""
        # Bounded before it is raised: 2.0 ** 1100 is an OverflowError.
        longest = min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** min(attempt - 1, 60))
        return longest * (0.75 + 0.25 * self._random.random())
