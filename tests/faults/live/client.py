"""An honest client over HTTP: what it asked, what it was told, and when.

Design:
    A client is a task that sends one rating after another. It takes an answer for no more
    than it is:

        2xx                                       ok: it must be counted, once
        4xx with a problem document               fail: it must not be counted
        connection refused                        fail: nobody was there to read it
        all else (timeout, reset, 5xx, nonsense)  unknown: it may be counted

    Whatever is not ok is tried again, with the same id, at whichever address comes next,
    until it is ok or the run ends. Some clients give up instead, as people do, so that
    there are ratings of which nobody knows.

    A refusal of one attempt says nothing about the others: a rating failed only where
    every attempt did.

    HTTP is written by hand on an asyncio protocol. Client and service share two cores, and
    a library's 300 µs a request would halve the load under which things are killed.

    Every line of the history is written before the request leaves, and as soon as its
    answer is there, by one writer, with one monotonic clock.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, final

__all__ = ["Client", "History", "Load", "Pace", "Told", "Totals", "request"]

Result = Literal["ok", "fail", "unknown"]
Answer = tuple[int, bytes, bytes]  # status, head, body
# Returns the ports to try, as they stand now: some lead through a proxy, some do not.
Ports = Callable[[], Sequence[int]]

# Seconds without an answer after which it is unknown. Longer than a commit behind a
# locked file takes (5 s) would hide how the service answers then; shorter, and a noisy
# neighbour's second looks like a fault.
_PATIENCE: Final = 3.0
# Seconds between two attempts. The Retry-After of the service says 1 to 2; a client that
# tries sooner is the harder test.
_PAUSE: Final = (0.02, 0.2)
# One in so many unknown answers makes a client give up, unless it is told otherwise.
_GIVES_UP: Final = 12
# One in so many accepted ratings is sent again, with the same id.
_REPEATS: Final = 25
# One in so many is sent again under the same id with another rate.
_CHEATS: Final = 200
# One in so many turns also reads a total.
_READS: Final = 20


@final
@dataclass(slots=True, eq=False)
class Told:
    """One id: what was sent under it, and what the client was told.

    Attributes:
        at: When it was first sent, and ``ok_at`` when it was first answered with 2xx, on
            the controller's monotonic clock; None without such an answer.
        unknown: Attempts whose outcome is open.
        failed: Attempts that were refused for certain.
    """

    id: bytes
    process: int
    campaign: str
    item: str
    rate: int
    at: float
    ok_at: float | None = None
    attempts: int = 0
    unknown: int = 0
    failed: int = 0

    @property
    def request(self) -> str:
        """Return the first words of the request that sends it."""
        return (
            f"POST /rate?rate={self.rate}&item={self.item}&campaign={self.campaign}"
            f"&id={self.id.hex()}"
        )


@final
@dataclass(frozen=True, slots=True)
class Totals:
    """An answer to ``GET /total``, and when it was asked for and given."""

    process: int
    campaign: str
    item: str | None
    n: int
    average: float
    count: int
    distribution: dict[int, int]
    as_of: int
    at: float
    until: float


@final
class History:
    """All that clients did: in memory for the checker, as JSONL for people."""

    def __init__(self, path: Path) -> None:
        self.ratings: dict[bytes, Told] = {}
        # Ratings under an id that stands for another one: never the first to be counted.
        self.conflicts: list[Told] = []
        self.totals: list[Totals] = []
        self.in_flight = 0
        self.accepted = 0
        self.results: dict[str, int] = {"ok": 0, "fail": 0, "unknown": 0}
        self.last_ok_at = time.monotonic()
        self.longest_silence = 0.0
        self._file = path.open("w", encoding="ascii")
        self._count = 0

    def let_either_stand(self, counted: Mapping[bytes, int]) -> None:
        """Let that of two ratings under one id be the first that was counted.

        For brokers that keep no order: the second may come first, and then the first becomes
        the dead letter. Exactly one of them is counted, and the other one is told.

        Args:
            counted: By id, the rate that the ledger has.
        """
        for place, other in enumerate(self.conflicts):
            first = self.ratings[other.id]
            if counted.get(other.id) == other.rate != first.rate:
                self.ratings[other.id], self.conflicts[place] = other, first

    def write(self, process: int, what: str, kind: str, **more: object) -> float:
        """Write one line; return its time."""
        now = time.monotonic()
        self._count += 1
        line = {"i": self._count, "proc": process, "f": what, "type": kind, **more}
        line["t"] = round(now, 6)
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        return now

    def invoke(self, told: Told) -> None:
        """Note that an attempt is about to be made."""
        told.attempts += 1
        self.in_flight += 1
        now = self.write(
            told.process, "rate", "invoke",
            id=told.id.hex(), campaign=told.campaign, item=told.item, rate=told.rate,
        )  # fmt: skip
        if told.attempts == 1:
            told.at = now

    def end(self, told: Told, result: Result, status: int) -> None:
        """Note how an attempt ended."""
        self.in_flight -= 1
        self.results[result] += 1
        now = self.write(told.process, "rate", result, id=told.id.hex(), status=status)
        if result == "ok":
            self.longest_silence = max(self.longest_silence, now - self.last_ok_at)
            self.last_ok_at = now
            if told.ok_at is None:
                told.ok_at = now
                self.accepted += 1
        elif result == "fail":
            told.failed += 1
        else:
            told.unknown += 1

    def close(self) -> None:
        """Write what is buffered."""
        self._file.close()


@final
class _Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._answer: asyncio.Future[Answer] | None = None
        self._transport: asyncio.Transport | None = None
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, _error: Exception | None) -> None:
        self.lost = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("no answer"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or self._answer is None or self._answer.done():
            return
        head = bytes(self._buffer[:end])
        length = _content_length(head)
        if len(self._buffer) >= end + 4 + length:
            body = bytes(self._buffer[end + 4 : end + 4 + length])
            self._buffer.clear()
            if head[:9] == b"HTTP/1.1 " and head[9:12].isdigit():
                self._answer.set_result((int(head[9:12]), head, body))
            else:
                self._answer.set_exception(ConnectionError("no HTTP"))

    async def ask(self, data: bytes, patience: float) -> Answer:
        """Return the answer. Raises OSError where none comes."""
        assert self._transport is not None
        if self.lost:
            raise ConnectionResetError("closed while idle")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._answer = answer
        timer = loop.call_later(patience, self.abort)
        self._transport.write(data)
        try:
            return await answer
        finally:
            timer.cancel()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _content_length(head: bytes) -> int:
    lower = head.lower()
    at = lower.find(b"content-length:")
    if at < 0:
        return 0
    value = lower[at + 15 :].partition(b"\r")[0].strip()
    return int(value) if value.isdigit() else 0


async def request(port: int, head: str, *, patience: float = _PATIENCE) -> tuple[int, bytes]:
    """Return (status, body) of one request on a connection of its own."""
    async with asyncio.timeout(patience):
        _, connection = await asyncio.get_running_loop().create_connection(
            _Connection, "127.0.0.1", port
        )
    try:
        status, _, body = await connection.ask(_encode(head), patience)
    finally:
        connection.abort()
    return status, body


def _encode(head: str) -> bytes:
    return f"{head} HTTP/1.1\r\nHost: molva\r\nAccept: application/json\r\n\r\n".encode()


@final
class Pace:
    """Turns at a steady rate for all who ask.

    A load that stood still for long does not come back as a flood: at most half a second
    of it is made up for.
    """

    def __init__(self, per_second: float) -> None:
        self._gap = 1.0 / per_second
        self._next = time.monotonic()

    async def turn(self) -> None:
        """Wait for the next turn."""
        now = time.monotonic()
        self._next = due = max(self._next, now - 0.5) + self._gap
        if due > now:
            await asyncio.sleep(due - now)


@final
class Client:
    """One client: a task, a connection, and its share of the history."""

    def __init__(
        self,
        process: int,
        *,
        seed: int,
        ports: Ports,
        history: History,
        pace: Pace,
        items: int,
        campaigns: Sequence[tuple[str, int, int]],
        patience: float = _PATIENCE,
        gives_up: int = _GIVES_UP,
    ) -> None:
        self._process = process
        self._random = random.Random(f"{seed}/{process}")
        self._ports = ports
        self._history = history
        self._pace = pace
        self._items = items
        self._campaigns = campaigns
        self._patience = patience
        self._gives_up = gives_up
        self._connection: _Connection | None = None
        self._port_turn = process
        self._over = False  # no new ratings
        self._out_of_time = False  # no new attempts

    async def run(self) -> None:
        """Rate until ``stop``, and then until what is open is settled."""
        rng = self._random
        while not self._over:
            await self._pace.turn()
            if self._over:
                break
            told = self._next_rating()
            self._history.ratings[told.id] = told
            ok = await self._until_ok(told)
            if ok and not rng.randrange(_REPEATS):
                self._leave_at_random()
                await self._attempt(told)
            if ok and not rng.randrange(_CHEATS):
                await self._cheat(told)
            if not rng.randrange(_READS):
                await self._read()
        self._hang_up()

    def stop(self) -> None:
        """Send no new ratings."""
        self._over = True

    def give_up(self) -> None:
        """Make no more attempts: the end of the run."""
        self._over = self._out_of_time = True

    def _next_rating(self) -> Told:
        rng = self._random
        campaign, lowest, highest = self._campaigns[rng.randrange(len(self._campaigns))]
        # Ordered by time, as a good client's are: an index over random ones is a test of
        # the disk. The seed is not in them: a run that is repeated on the same data
        # sends new ratings.
        id_ = int(time.time() * 1000).to_bytes(6, "big") + rng.getrandbits(56).to_bytes(7, "big")
        id_ += self._process.to_bytes(3, "big")
        return Told(
            id=id_,
            process=self._process,
            campaign=campaign,
            item=f"item-{rng.randrange(self._items)}",
            rate=rng.randint(lowest, highest),
            at=0.0,
        )

    async def _until_ok(self, told: Told) -> bool:
        rng = self._random
        while True:
            result = await self._attempt(told)
            if result == "ok":
                return True
            if self._out_of_time or (result == "unknown" and not rng.randrange(self._gives_up)):
                return False
            await asyncio.sleep(rng.uniform(*_PAUSE))
            if self._out_of_time:
                return False

    async def _attempt(self, told: Told) -> Result:
        history = self._history
        history.invoke(told)
        status = 0
        result: Result = "unknown"
        try:
            status, answer_head, _ = await self._ask(told.request)
            if 200 <= status < 300:
                result = "ok"
            elif 400 <= status < 500 and b"application/problem+json" in answer_head:
                result = "fail"
        except ConnectionRefusedError:
            result = "fail"
        except (OSError, TimeoutError):
            pass
        finally:
            history.end(told, result, status)
        if result != "ok":
            self._leave_at_random()
        return result

    async def _cheat(self, first: Told) -> None:
        """Send another rating under an id that stands: 409, or a dead letter later."""
        other = Told(
            id=first.id, process=first.process, campaign=first.campaign, item=first.item,
            rate=first.rate + 1 if first.rate < 5 else first.rate - 1, at=0.0,
        )  # fmt: skip
        self._history.conflicts.append(other)
        self._leave_at_random()
        accepted = self._history.accepted
        await self._attempt(other)
        self._history.accepted = accepted

    async def _read(self) -> None:
        rng = self._random
        campaign = self._campaigns[rng.randrange(len(self._campaigns))][0]
        item = f"item-{rng.randrange(self._items)}" if rng.random() < 0.7 else None
        n = rng.choice((1, 10, 100, 1_000))
        asked_item = "" if item is None else f"&item={item}"
        at = time.monotonic()
        try:
            status, _, body = await self._ask(f"GET /total?campaign={campaign}&n={n}{asked_item}")
        except (OSError, TimeoutError):
            return
        if status != 200:
            return
        found: dict[str, Any] = json.loads(body)
        self._history.totals.append(
            Totals(
                process=self._process,
                campaign=campaign,
                item=item,
                n=n,
                average=found["average"],
                count=found["count"],
                distribution={int(rate): count for rate, count in found["distribution"].items()},
                as_of=found["as_of"],
                at=at,
                until=time.monotonic(),
            )
        )

    async def _ask(self, head: str) -> Answer:
        connection = self._connection
        if connection is None or connection.lost:
            ports = self._ports()
            port = ports[self._port_turn % len(ports)]
            self._port_turn += 1
            async with asyncio.timeout(self._patience):
                _, connection = await asyncio.get_running_loop().create_connection(
                    _Connection, "127.0.0.1", port
                )
            self._connection = connection
        try:
            return await connection.ask(_encode(head), self._patience)
        except OSError:
            self._hang_up()
            raise

    def _leave_at_random(self) -> None:
        if self._random.random() < 0.5:
            self._hang_up()

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.abort()
            self._connection = None


@final
@dataclass(slots=True)
class Load:
    """Many clients at once."""

    clients: list[Client]
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        """Begin."""
        self._tasks = [asyncio.ensure_future(client.run()) for client in self.clients]

    async def stop(self, *, seconds: float) -> bool:
        """End: what is open gets so many seconds. Return whether all of it was settled."""
        for client in self:
            client.stop()
        _, open_ = await asyncio.wait(self._tasks, timeout=seconds)
        for client in self:
            client.give_up()
        # Each attempt ends by its own patience.
        async with asyncio.timeout(20):
            await asyncio.gather(*self._tasks)
        return not open_

    async def cancel(self) -> None:
        """End at once: the run has failed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check(self) -> None:
        """Raise what a client ended with, if one did: a bug of the harness."""
        for task in self._tasks:
            if task.done():
                task.result()

    def __iter__(self) -> Iterator[Client]:
        return iter(self.clients)
