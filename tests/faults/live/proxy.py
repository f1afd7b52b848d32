"""A TCP proxy between clients and the service, which breaks what passes through it.

    reset       both sides of every open connection get a RST
    half-open   one direction is thrown away, the other goes on
    delay       each chunk waits, with jitter; order is kept
    slice       segments of one byte
    cut         the answer ends after so many bytes, with a RST: the request went through,
                and the client cannot know it
    drop        connections are accepted and nothing passes: a partition nobody announces
    refuse      nothing listens: a partition that clients notice at once

It runs in the controller's own loop, so that a fault is an assignment to an attribute and
takes hold at the next chunk. Toxiproxy does the same and more; it is a program of its own
that no package index here carries, and what is needed fits on two pages.
"""

import asyncio
import contextlib
import random
import socket
import struct
from dataclasses import dataclass
from typing import Final, Literal, final

from tests.brokers.ports import free_ports

__all__ = ["Faults", "Proxy"]

_CHUNK: Final = 65_536

# SO_LINGER with a linger time of 0: closing sends RST instead of FIN, and what waits in
# the socket's buffer is thrown away.
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)

_HOST: Final = "127.0.0.1"


@final
@dataclass(slots=True)
class Faults:
    """What is wrong with the network now; the defaults are a sound one.

    Attributes:
        delay: Seconds that each chunk waits, in each direction.
        jitter: Up to so many seconds more, drawn for each chunk.
        slice: Whether bytes travel one by one.
        lost: The direction that is thrown away: requests go ``up``, answers ``down``.
        cut_after: Bytes of answers on a connection after which it is reset; None: never.
        drop: Whether nothing passes at all.
    """

    delay: float = 0.0
    jitter: float = 0.0
    slice: bool = False
    lost: Literal["up", "down"] | None = None
    cut_after: int | None = None
    drop: bool = False


@final
class _Link:
    """One connection through the proxy: both of its ends."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.ends = [client]
        # Of answers, since the fault began: counted here, because a cut falls in the
        # middle of a connection's life.
        self.answered = 0
        # Whether nothing passes any more, for good.
        self.mute = False

    def close(self, *, reset: bool) -> None:
        for end in self.ends:
            if end.transport.is_closing():
                continue
            if reset:
                with contextlib.suppress(OSError):
                    end.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE
                    )
                end.transport.abort()
            else:
                end.close()


@final
class Proxy:
    """Listens on a port of its own and passes everything on to ``upstream``.

    Assign to ``faults`` to break connections, those that are open as well as new ones.
    """

    def __init__(self, upstream: int, *, seed: int) -> None:
        # Not one that the system hands out: while we refuse, it would be given to others.
        [self.port] = free_ports(1)
        self._faults = Faults()
        self.connections = 0  # so far
        self.upstream = upstream
        self._random = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._starting = asyncio.Lock()
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def faults(self) -> Faults:
        """What is wrong now. Assign a new value to change it."""
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._faults = faults
        for link in self._links:
            link.answered = 0

    async def start(self) -> None:
        """Listen, again on the same port. Two faults may end at once."""
        async with self._starting:
            if self._server is None:
                self._server = await asyncio.start_server(self._accept, _HOST, self.port)

    async def refuse(self) -> None:
        """Stop listening and reset what is open, until ``start``."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.reset()

    def mute(self) -> None:
        """Let every open connection die without a word; new ones live."""
        for link in self._links:
            link.mute = True

    def reset(self) -> None:
        """Reset every open connection."""
        for link in list(self._links):
            link.close(reset=True)

    async def close(self) -> None:
        """End everything."""
        await self.refuse()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        link = _Link(writer)
        self._links.add(link)
        try:
            try:
                up_reader, up_writer = await asyncio.open_connection(_HOST, self.upstream)
            except OSError:
                link.close(reset=True)  # as a client sees a service that has just died
                return
            link.ends.append(up_writer)
            up = asyncio.ensure_future(self._pump("up", link, reader, up_writer))
            down = asyncio.ensure_future(self._pump("down", link, up_reader, writer))
            try:
                await asyncio.wait((up, down))
            finally:
                up.cancel()
                down.cancel()
        finally:
            link.close(reset=False)
            self._links.discard(link)

    async def _pump(
        self,
        direction: Literal["up", "down"],
        link: _Link,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        try:
            while chunk := await reader.read(_CHUNK):
                faults = self._faults
                if link.mute or faults.drop or faults.lost == direction:
                    continue
                if faults.delay or faults.jitter:
                    await asyncio.sleep(faults.delay + faults.jitter * self._random.random())
                cut = None
                if direction == "down" and faults.cut_after is not None:
                    cut = max(0, faults.cut_after - link.answered)
                    link.answered += len(chunk)
                    if link.answered <= faults.cut_after:
                        cut = None
                await _pass_on(chunk[:cut], writer, sliced=faults.slice)
                if cut is not None:
                    link.close(reset=True)
                    return
            if writer.can_write_eof():
                writer.write_eof()
        except OSError:
            link.close(reset=True)


async def _pass_on(chunk: bytes, writer: asyncio.StreamWriter, *, sliced: bool) -> None:
    if sliced:
        # asyncio sets TCP_NODELAY, and each write to an empty buffer is a send of its own.
        for at in range(len(chunk)):
            writer.write(chunk[at : at + 1])
            await writer.drain()
            await asyncio.sleep(0)
    else:
        writer.write(chunk)
        await writer.drain()
