"""One HTTP process, three workers, clients; one worker is killed half way; all is counted."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final, final

__all__ = ["run"]

_WORKERS: Final = 3
_CLIENTS: Final = 20
# Seconds that a process has until it is at work, and until it has ended.
_READY: Final = 60.0
_END: Final = 15.0


async def run(broker: str, *, work: float, timeout: float, seconds: float) -> int:
    """Ask for sums for so many seconds; return 0 where no answer was wrong."""
    environment = {**os.environ, "ADDER_BROKER": broker}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with contextlib.AsyncExitStack() as processes:

        async def start(*arguments: str) -> Process:
            return await processes.enter_async_context(_started(environment, *arguments))

        # One after the other: the first makes what all of them share.
        workers = [await start("work", f"--work={work}") for _ in range(_WORKERS)]
        await start("serve", f"--port={port}", f"--timeout={timeout}")
        clients = Clients(port)
        asking = asyncio.ensure_future(clients.ask(seconds))
        await asyncio.sleep(seconds / 2)
        workers[0].send_signal(signal.SIGKILL)
        clients.killed_at = clients.asked
        await asking
    for what, number in (
        ("asked", clients.asked),
        ("right", clients.right),
        ("504, asked again", clients.statuses[504]),
        ("other refusals", clients.statuses.total() - clients.statuses[504]),
        ("wrong", clients.wrong),
        ("workers killed", 1),
        ("right after that", clients.right_after),
    ):
        print(f"{what:<20} {number:>8,}")
    return 0 if clients.right > 0 and clients.right_after > 0 and not clients.wrong else 1


@final
@dataclass(slots=True)
class Clients:
    """Twenty at a time, each with numbers of its own, so that a mixed-up answer shows.

    Attributes:
        asked: Requests.
        right, wrong: Answers, by whether they are the sum of what was asked.
        right_after: Right ones to what was asked after the worker was killed.
        statuses: Refusals, by status.
        killed_at: How many had been asked when the worker was killed.
    """

    port: int
    asked: int = 0
    right: int = 0
    right_after: int = 0
    wrong: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    killed_at: int | None = None

    async def ask(self, seconds: float) -> None:
        """Ask for so many seconds; return when everything was answered."""
        async with asyncio.TaskGroup() as clients:
            for _ in range(_CLIENTS):
                clients.create_task(self._ask_on(asyncio.get_running_loop().time() + seconds))

    async def _ask_on(self, end: float) -> None:
        while asyncio.get_running_loop().time() < end:
            a, b = (random.randint(-(10**30), 10**30) for _ in range(2))
            self.asked += 1
            after = self.killed_at is not None
            status, body = await _get(self.port, f"/add?a={a}&b={b}")
            if status != 200:
                self.statuses[status] += 1
            elif json.loads(body) == {"sum": a + b}:
                self.right += 1
                self.right_after += after
            else:
                self.wrong += 1


@contextlib.asynccontextmanager
async def _started(environment: dict[str, str], *arguments: str) -> AsyncIterator[Process]:
    """Start a process of this example and wait until it says that it is at work."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "examples.adder", *arguments),
        env=environment, stdin=DEVNULL, stdout=PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(_READY):
            if not await process.stdout.readline():
                raise RuntimeError(f"{arguments[0]} does not start; it says why above")
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_END):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _get(port: int, path: str) -> tuple[int, bytes]:
    """Return status and body; the server has its own deadline, so nobody waits for ever."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: adder\r\nConnection: close\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        return int(head.split()[1]), await reader.read()
    finally:
        writer.close()
