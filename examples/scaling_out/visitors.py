"""Visitors who rate over HTTP, and ask again where no answer came."""

import asyncio
import json
import random
import secrets
from dataclasses import dataclass
from typing import Final, final

__all__ = ["Visitors", "total"]

# Seconds without an answer after which a visitor asks again.
_PATIENCE: Final = 3.0
# Seconds before that.
_PAUSE: Final = 0.2
_VISITORS: Final = 20


@final
@dataclass(slots=True)
class Visitors:
    """Twenty at a time, who all come through one port.

    Attributes:
        offered: Ratings that somebody wanted to give.
        accepted: Those that were answered with 202.
        unknown: Attempts whose answer did not come, or was "not now" (5xx): the rating may be
            there or not. Each was made again.
    """

    port: int
    campaign: str
    offered: int = 0
    accepted: int = 0
    unknown: int = 0

    async def rate(self, *, per_second: float, seconds: float) -> None:
        """Offer so many ratings a second; return when all of them were accepted."""
        async with asyncio.TaskGroup() as visitors:
            for _ in range(_VISITORS):
                visitors.create_task(self._visit(_VISITORS / per_second, seconds))

    async def _visit(self, gap: float, seconds: float) -> None:
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while clock() < end:
            self.offered += 1
            # One id for one rating, however often it has to be sent.
            query = f"rate={random.randint(0, 10)}&id={secrets.token_hex(16)}"
            while not await self._is_accepted(query):
                self.unknown += 1
                await asyncio.sleep(_PAUSE)
            self.accepted += 1
            await asyncio.sleep(random.uniform(0, 2 * gap))

    async def _is_accepted(self, query: str) -> bool:
        try:
            status, body = await _ask(self.port, f"POST /rate?campaign={self.campaign}&{query}")
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return False
        if 400 <= status < 500:
            raise RuntimeError(f"/rate answered {status}: {body.decode()}")
        return status == 202


async def total(port: int, campaign: str) -> int:
    """Return how many ratings are counted."""
    status, body = await _ask(port, f"GET /total?campaign={campaign}")
    return int(json.loads(body)["count"]) if status == 200 else 0


async def _ask(port: int, line: str) -> tuple[int, bytes]:
    async with asyncio.timeout(_PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(
                f"{line} HTTP/1.1\r\nHost: molva\r\nAccept: application/json\r\n"
                "Connection: close\r\n\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.read()
        finally:
            writer.close()
    return int(head.split()[1]), body
