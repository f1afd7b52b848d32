"""Processes for tests to start, stop and kill: see ``actor``."""

import asyncio
import contextlib
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final

from molva.messaging.conformance.waiting import PATIENCE, eventually

__all__ = ["Actor", "Start", "starting"]

# By its file, and with nothing beside it in the way (-P): as a module of this package it would
# import the whole suite and pytest first, which takes as long again as all that it needs.
_ACTOR: Final = ("-P", str(Path(__file__).with_name("actor.py")))


class Actor:
    """A process that runs ``actor``, and all that it has said so far."""

    def __init__(self, process: Process, heard: list[str] | None = None) -> None:
        self._process = process
        self._heard = heard
        self.pid = process.pid
        self.lines: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            text = line.decode().rstrip("\n")
            self.lines.append(text)
            if self._heard is not None and text != "ready":
                self._heard.append(text)

    async def ready(self) -> "Actor":
        """Wait until it has opened what it uses."""
        await self.said("ready")
        self.lines.remove("ready")
        return self

    async def said(self, line: str) -> None:
        """Wait until it has said ``line``."""
        await eventually(lambda: line in self.lines or self._process.returncode is not None)
        assert line in self.lines, self.lines

    def go(self) -> None:
        """Send it an empty line."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def kill(self) -> None:
        """Kill it without warning; return when all that it said has been read."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        await self._reading

    async def end(self) -> int:
        """Wait until it has ended by itself; return its exit code."""
        async with asyncio.timeout(PATIENCE):
            code = await self._process.wait()
        await self._reading
        return code


Start = Callable[..., Awaitable[Actor]]


@contextlib.asynccontextmanager
async def starting() -> AsyncIterator[Start]:
    """Yield what starts actors; whoever is left at the end is killed.

    ``await start(command, url, ..., heard=lines)`` also appends what the actor says to
    ``lines``, which several may share.
    """
    actors: list[Actor] = []

    async def start(
        *arguments: str,
        program: tuple[str, ...] = _ACTOR,
        heard: list[str] | None = None,
    ) -> Actor:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *program, *arguments, stdin=PIPE, stdout=PIPE
        )
        actors.append(Actor(process, heard))
        return actors[-1]

    try:
        yield start
    finally:
        for actor in actors:
            await actor.kill()
