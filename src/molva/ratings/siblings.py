"""The other HTTP processes behind one address, and what they have counted.

Several processes of one ``molva serve`` share a port, so a scrape of ``/metrics`` reaches any
one of them. Each therefore listens on a Unix socket in a folder of theirs, tells there what it
has counted itself, and answers a scrape for all of them: every counter with the label
``process``, which makes each a series of its own. (Sums would fall whenever a process
ends, and a fall reads as a restart from nothing: what the others had counted would count
twice.)
"""

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, final

__all__ = ["PORT_HELD", "PROCESS", "PROCESS_FOLDER", "Siblings", "merged"]

# What a supervisor tells each of its HTTP processes: its number, the folder of the sockets,
# and that the port is held for them.
PROCESS: Final = "MOLVA_PROCESS"
PROCESS_FOLDER: Final = "MOLVA_PROCESS_FOLDER"
PORT_HELD: Final = "MOLVA_PORT_HELD"

# Seconds that a sibling gets to answer. One that is stopped or starting is left out of a
# scrape, as one is that has ended; much longer, and the scraper gives up on all of them.
_PATIENCE: Final = 1.0


@final
@dataclass(frozen=True, slots=True)
class Siblings:
    """This process among those that share its port.

    Attributes:
        process: What this one is called: ``1``, ``2`` and so on.
        folder: Where each has its socket.
    """

    process: str
    folder: Path

    @classmethod
    def from_environment(cls) -> "Siblings | None":
        """Return what the supervisor said; None where this process is on its own."""
        process, folder = os.environ.get(PROCESS), os.environ.get(PROCESS_FOLDER)
        return cls(process, Path(folder)) if process and folder else None

    @contextlib.asynccontextmanager
    async def telling(self, own: Callable[[], bytes]) -> AsyncIterator[None]:
        """Tell siblings what ``own`` returns, for the block."""

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                writer.write(own())
                await writer.drain()
            writer.close()

        path = self._socket(self.process)
        path.unlink(missing_ok=True)  # of the process that had this number before
        server = await asyncio.start_unix_server(answer, path)
        try:
            yield
        finally:
            server.close()
            path.unlink(missing_ok=True)

    async def others(self) -> list[bytes]:
        """Return what every other process tells, in the order of their numbers."""
        paths = sorted(p for p in self.folder.glob("*.sock") if p != self._socket(self.process))
        told = await asyncio.gather(*map(_ask, paths))
        return [text for text in told if text]

    def _socket(self, process: str) -> Path:
        return self.folder / f"{process}.sock"


async def _ask(path: Path) -> bytes:
    try:
        async with asyncio.timeout(_PATIENCE):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                return await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""


# A family is its comments and the samples that follow them. Prometheus wants each once.
_FAMILY: Final = re.compile(rb"^# HELP (\S+) ", re.MULTILINE)


def merged(texts: list[bytes]) -> bytes:
    """Join several texts in Prometheus' format into one that names each family once."""
    families: dict[bytes, list[bytes]] = {}
    for text in texts:
        starts = [match.start() for match in _FAMILY.finditer(text)]
        for start, end in pairwise([*starts, len(text)]):
            lines = text[start:end].splitlines(keepends=True)
            name = lines[0].split(b" ", 3)[2]
            comments = [line for line in lines if line.startswith(b"#")]
            family = families.setdefault(name, comments)
            family += [line for line in lines if not line.startswith(b"#")]
    return b"".join(line for family in families.values() for line in family)
