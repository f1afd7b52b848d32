"""Clients in virtual time: they rate, try again under the same id, repeat, cheat and read.

What a client makes of an answer is what ``live.client`` says: 2xx is ok, 4xx and a refused
connection are a failure, everything else is unknown.
"""

import asyncio
import json
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, final

from tests.faults.live.client import Told, Totals
from tests.faults.simulation.loop import Process
from tests.faults.simulation.service import CAMPAIGN, Server, Service

__all__ = ["Client", "Record"]

# Virtual seconds without an answer after which it is unknown.
_PATIENCE: Final = 2.0
# Of so many unknown answers one makes a client give up; of so many accepted ratings one is
# sent again, one under the same id with another rate; of so many turns one also reads.
_GIVES_UP, _REPEATS, _CHEATS, _READS = 8, 4, 8, 2
# Of so many turns one is a burst of so many ratings at once.
_BURSTS, _BURST = 5, 4


@final
@dataclass(slots=True)
class Record:
    """What clients did and were told; ``judge`` reads it."""

    ratings: dict[bytes, Told] = field(default_factory=dict)
    conflicts: list[Told] = field(default_factory=list)
    totals: list[Totals] = field(default_factory=list)
    in_flight: int = 0
    unknown: int = 0


@final
class Client:
    """Sends one rating after another."""

    def __init__(self, number: int, service: Service, record: Record) -> None:
        self._number = number
        self._service = service
        self._record = record
        self._random = Random(f"client {number} of {service.plan.seed}")
        self.process: Final = Process(f"client-{number}")
        self.impatient = False

    async def run(self) -> None:
        """Rate, as often as the plan says."""
        dice = self._random
        plan = self._service.plan
        for turn in range(plan.ratings):
            await asyncio.sleep(dice.random() * 1.5)
            burst = _BURST if not dice.randrange(_BURSTS) else 1
            await asyncio.gather(*(self._rate(turn) for _ in range(burst)))
            if not dice.randrange(_READS):
                await self._read()

    async def _rate(self, turn: int) -> None:
        dice = self._random
        told = self._next_rating(turn)
        self._record.ratings[told.id] = told
        if await self._until_ok(told):
            if not dice.randrange(_REPEATS):
                await self._attempt(told)
            # Where order is not kept, the second may rightly be counted first.
            if not dice.randrange(_CHEATS) and self._service.plan.broker.ordered:
                await self._cheat(told)

    def _next_rating(self, turn: int) -> Told:
        dice = self._random
        id_ = turn.to_bytes(4, "big") + dice.getrandbits(64).to_bytes(8, "big")
        id_ += self._number.to_bytes(4, "big")
        item = f"item-{dice.randrange(self._service.plan.items)}"
        return Told(id_, self._number, CAMPAIGN.name, item, dice.randint(0, 10), at=0.0)

    async def _until_ok(self, told: Told) -> bool:
        dice = self._random
        while True:
            result = await self._attempt(told)
            if result == "ok":
                return True
            if result == "unknown" and not dice.randrange(_GIVES_UP):
                return False
            if self.impatient:
                return False
            await asyncio.sleep(dice.uniform(0.1, 1.2))

    async def _attempt(self, told: Told) -> str:
        record = self._record
        loop = self._service.loop
        told.attempts += 1
        if told.attempts == 1:
            told.at = loop.now
        record.in_flight += 1
        result = "unknown"
        status = 0
        try:
            status, _ = await self._ask(told.request)
            if 200 <= status < 300:
                result = "ok"
            elif 400 <= status < 500:
                result = "fail"
        except ConnectionRefusedError:
            result = "fail"
        except (OSError, TimeoutError):
            pass
        record.in_flight -= 1
        self._service.trace(self.process.name, "is told", told.id.hex()[:8], status, result)
        if result == "ok":
            told.ok_at = loop.now if told.ok_at is None else told.ok_at
        elif result == "fail":
            told.failed += 1
        else:
            told.unknown += 1
            record.unknown += 1
        return result

    async def _cheat(self, first: Told) -> None:
        """Send another rating under an id that stands: 409, or a dead letter later."""
        rate = first.rate + 1 if first.rate < 5 else first.rate - 1
        other = Told(first.id, self._number, first.campaign, first.item, rate, at=0.0)
        self._record.conflicts.append(other)
        await self._attempt(other)

    async def _read(self) -> None:
        dice = self._random
        loop = self._service.loop
        item = f"item-{dice.randrange(self._service.plan.items)}" if dice.random() < 0.6 else None
        n = dice.choice((1, 2, 3, 50))
        asked = "" if item is None else f"&item={item}"
        at = loop.now
        try:
            status, body = await self._ask(f"GET /total?n={n}{asked}")
        except (OSError, TimeoutError):
            return
        if status != 200:
            return
        found: dict[str, Any] = json.loads(body)
        distribution = {int(rate): count for rate, count in found["distribution"].items()}
        read = Totals(
            self._number, CAMPAIGN.name, item, n, found["average"], found["count"], distribution,
            found["as_of"], at, loop.now,
        )  # fmt: skip
        self._service.trace(self.process.name, "reads", read.as_of, read.count, read.average)
        self._record.totals.append(read)

    async def _ask(self, request: str) -> tuple[int, bytes]:
        """Send a request to one of the HTTP processes.

        Raises:
            ConnectionRefusedError: Nobody is there.
            OSError: The connection broke, before the request was read or behind it.
            TimeoutError: No answer came.
        """
        service = self._service
        loop = service.loop
        numbers = range(service.plan.servers)
        server = service.servers["serve", self._random.choice(numbers)]
        await asyncio.sleep(service.broker.latency())
        if not server.process.alive or server.intake is None or server.main.done():
            raise ConnectionRefusedError
        rough = service.broker.rough
        if rough and loop.chance.random() < 0.02:
            raise ConnectionResetError
        answer: asyncio.Future[tuple[int, bytes]] = loop.create_future()
        loop.start(server.process, _serve(server, request, answer))
        async with asyncio.timeout(_PATIENCE):
            found = await answer
        await asyncio.sleep(service.broker.latency())
        if rough and loop.chance.random() < 0.04:
            raise ConnectionResetError
        return found


async def _serve(server: Server, request: str, answer: "asyncio.Future[tuple[int, bytes]]") -> None:
    """Be the HTTP server: one request to the real application, in its process."""
    method, _, target = request.partition(" ")
    path, _, query = target.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(b"accept", b"application/json")],
    }
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    assert server.intake is not None
    server.begin()
    await server.intake(scope, receive, send)
    if not answer.done():
        answer.set_result((sent[0]["status"], sent[1]["body"]))
