"""The spool: what it costs while the broker is there, and how fast it is while it is not."""

import asyncio
import contextlib
import http.client
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import redis as client
from tests.brokers import Server, private_redis

from benchmarks.report import Report
from benchmarks.service import running, wrk
from molva._base.clock import SYSTEM_CLOCK
from molva.messaging import open_topic, with_options
from molva.ratings.admission import Admission
from molva.ratings.catalog import open_catalog
from molva.ratings.intake import Intake
from molva.ratings.ledger import open_ledger
from molva.ratings.spool import Spool, SpoolSettings

SECONDS = 6
TURNS = 6
# Seconds of load while the broker is away.
AWAY_SECONDS = 6
# Of the fast lane alone: ratings at once, ratings a turn, turns.
TASKS = 64
RATINGS = 640
LANE_TURNS = 400


def spool() -> None:
    """Measure ``/rate`` with and without a spool, and with the broker away."""
    report = Report(
        "spool",
        "The spool: ratings a second with and without it",
        f"wrk, one thread, 64 connections, {SECONDS} s a turn, random rates 0–10, closed loop; "
        f"`molva serve` alone, on Redis with appendfsync=always; {TURNS} turns, with and without "
        "one after the other in each, the order changing from turn to turn. Away: the broker is "
        "killed, every rating is answered behind the spool's own fsync. The fast lane alone: the "
        "intake called as an ASGI app on a broker in memory, both in one process, in "
        f"{LANE_TURNS} turns of {RATINGS:,} ratings, {TASKS} at once, by processor time.",
    )
    with_one, alone, again = asyncio.run(_fast_lane())
    report.ratio("the fast lane alone, with a spool / without", with_one, alone, "1.0")
    report.ratio("the same without / without: what chance does", again, alone, "1.0")
    without: list[float] = []
    having: list[float] = []
    away: list[float] = []
    emptied: list[float] = []
    with private_redis(appendonly="yes", appendfsync="always") as redis:
        for turn in range(TURNS):
            for spooling in (turn % 2 == 0, turn % 2 == 1):
                with _serving(redis, spooling=spooling) as port:
                    load = wrk(port, seconds=SECONDS)
                    (having if spooling else without).append(load.answered_per_second)
        for _ in range(3):
            with _serving(redis, spooling=True) as port:
                redis.kill()
                load = wrk(port, seconds=AWAY_SECONDS)
                assert load.refused == 0, f"{load.refused} ratings were refused"
                away.append(load.answered_per_second)
                length = _metric(port, "molva_spool_length")
                redis.start()
                emptied.append(length / _until_empty(port))
    report.ratio("with a spool / without, the broker there", having, without, "1.0")
    report.add(
        "accepted while the broker is away", f"{sorted(away)[1]:,.0f}/s", "median of 3 turns"
    )
    report.add(
        "sent on when it is back",
        f"{sorted(emptied)[1]:,.0f}/s",
        "median of 3 turns, no load beside it, from the first that went on",
    )
    report.write()


async def _fast_lane() -> list[list[float]]:
    """Return ratings a second of processor time, turn by turn: with a spool, twice without."""
    speeds: list[list[float]] = [[], [], []]
    with tempfile.TemporaryDirectory() as folder:
        async with (
            _intake(Path(folder), spooling=True) as with_one,
            _intake(Path(folder), spooling=False) as alone,
            _intake(Path(folder), spooling=False) as again,
        ):
            intakes = (with_one, alone, again)
            for turn in range(LANE_TURNS + 3):
                for place in range(3):
                    which = (place + turn) % 3  # nobody is always the first
                    speed = await _speed(intakes[which])
                    if turn >= 3:  # the first ones only warm up
                        speeds[which].append(speed)
    return speeds


@contextlib.asynccontextmanager
async def _intake(folder: Path, *, spooling: bool) -> AsyncIterator[Intake]:
    """Open an intake on a broker in memory that nobody reads."""
    async with contextlib.AsyncExitStack() as stack:
        topic = await open_topic(f"memory://{uuid.uuid4().hex}?topic=ratings")
        stack.push_async_callback(topic.close)
        catalog = await open_catalog(f"sqlite://{folder}/catalog.db")
        stack.push_async_callback(catalog.close)
        ledger = await open_ledger(f"sqlite://{folder}/ledger.db")
        stack.push_async_callback(ledger.close)
        spool: Spool | None = None
        if spooling:

            async def never() -> Any:
                raise AssertionError("it is open")

            spool = await stack.enter_async_context(
                Spool.open(
                    SpoolSettings(folder / "spool", limit=1_000, hours=1.0),
                    broker=topic,
                    open_broker=never,
                    clock=SYSTEM_CLOCK,
                    on_failure=_raise,
                )
            )

        async def pending() -> int | None:
            return None

        yield Intake(
            outlet=spool or topic,
            spool=spool,
            catalog=catalog,
            ledger=ledger,
            pending=pending,
            admission=Admission(None, lambda: topic, pending, SYSTEM_CLOCK),
            api=_nothing,
            clock=SYSTEM_CLOCK,
            on_broken=lambda: None,
        )


async def _speed(intake: Intake) -> float:
    """Return accepted ratings a second of processor time."""
    before = intake.counters.accepted

    async def send(_: Any) -> None:
        return None

    async def client_of_many() -> None:
        scope = {"type": "http", "method": "POST", "path": "/rate", "query_string": b"rate=7"}
        for _ in range(RATINGS // TASKS):
            await intake({**scope, "headers": []}, _nobody, send)

    began = time.process_time()
    await asyncio.gather(*(client_of_many() for _ in range(TASKS)))
    took = time.process_time() - began
    assert intake.counters.accepted - before == RATINGS
    return RATINGS / took


async def _nobody() -> dict[str, Any]:
    raise AssertionError("there is no body")


async def _nothing(*_: Any) -> None:
    raise AssertionError("only the fast lane is here")


def _raise(error: Exception) -> None:
    raise error


@contextlib.contextmanager
def _serving(redis: Server, *, spooling: bool) -> Iterator[int]:
    """Run one HTTP process on a topic of its own; yield its port."""
    broker = with_options(redis.url, topic=f"spool-{uuid.uuid4().hex[:8]}")
    how = "spool" if spooling else "refuse"
    with tempfile.TemporaryDirectory() as folder:
        options = ("--data", folder, "--broker", broker, "--when-broker-down", how)
        with running("-m", "molva", "serve", "--port", "PORT", *options) as (port, _process):
            yield port
    # What the last turn stored would make the next one's log longer.
    with client.Redis.from_url(redis.url) as connection:
        connection.flushall()


def _until_empty(port: int) -> float:
    """Wait until the spool is empty; return the seconds since the first rating went on."""
    length = before = _metric(port, "molva_spool_length")
    began = time.perf_counter()
    deadline = began + 120
    while length:
        assert time.perf_counter() < deadline, f"{length:,.0f} ratings still wait"
        if length == before:
            began = time.perf_counter()
        time.sleep(0.02)
        length = _metric(port, "molva_spool_length")
    return time.perf_counter() - began


def _metric(port: int, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", "/metrics")
        for line in connection.getresponse().read().decode().splitlines():
            if line.split(" ")[0] == name:
                return float(line.split(" ")[1])
    finally:
        connection.close()
    raise AssertionError(f"{name} is not told")
