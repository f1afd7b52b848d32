"""What a ledger holds, read by a road of our own: never with the code under test.

    sqlite      SQL, on a read-only connection
    postgresql  SQL, in a read-only snapshot
    redis       raw commands, and the layout that ``_redis.lua`` documents

Reading it with the ledger's own code would let one bug hide another. Changing how a ledger
stores something? What is read here must stay: the checker's independence is worth that it
breaks loudly. A new ledger is a file beside these and a row of ``_READERS``.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from tests.faults.live.ledgers.content import Content, Kept, Row, Running
from tests.faults.live.ledgers.postgresql import read_postgresql
from tests.faults.live.ledgers.redis import read_redis
from tests.faults.live.ledgers.sqlite import read_sqlite

__all__ = ["Content", "Kept", "Row", "Running", "read_ledger"]

_READERS: Final[Mapping[str, Callable[[str], Awaitable[Content]]]] = {
    "sqlite": read_sqlite,
    "postgresql": read_postgresql,
    "redis": read_redis,
}


async def read_ledger(url: str) -> Content:
    """Return what the ledger at ``url`` holds, while nothing is being counted."""
    return await _READERS[url.partition(":")[0]](url)
