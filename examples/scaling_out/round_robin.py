"""A load balancer of sixty lines: connections go to the addresses behind it in turn.

A connection that finds nobody at one address goes on to the next, so a process that died is
missed by nobody who comes later. What breaks once bytes have passed breaks for the client,
too, because nobody here can know how far its request had come. It asks again, under the
same id. nginx or HAProxy in front of Molva do the same, and more.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final, final

__all__ = ["Address", "RoundRobin"]

Address = tuple[str, int]

# Bytes taken over at once.
_CHUNK: Final = 65_536


@final
class RoundRobin:
    """Listens on 127.0.0.1, and passes each connection on to one of ``addresses``."""

    def __init__(self, addresses: Sequence[Address], *, port: int = 0) -> None:
        self._addresses = addresses
        self._turn = 0
        self._open: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = port

    async def start(self) -> None:
        """Listen. ``port`` is the one that was asked for, or one that was free."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening and cut what is open."""
        if self._server is not None:
            self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        with contextlib.closing(writer):
            for _ in self._addresses:
                self._turn = (self._turn + 1) % len(self._addresses)
                with contextlib.suppress(OSError):
                    there = await asyncio.open_connection(*self._addresses[self._turn])
                    break
            else:
                return  # nobody is there
            with contextlib.closing(there[1]):
                ways = (_copy(reader, there[1]), _copy(there[0], writer))
                both = [asyncio.ensure_future(way) for way in ways]
                try:
                    # An end on either side is the end: neither half of HTTP is of use alone.
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in both:
                        way.cancel()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(_CHUNK):
            target.write(data)
            await target.drain()
