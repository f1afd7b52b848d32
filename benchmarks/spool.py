"""The spool: what it costs while the broker is there, and how fast it is while it is not."""

import contextlib
import http.client
import tempfile
import time
import uuid
from collections.abc import Iterator

import redis as client
from tests.brokers import Server, private_redis

from benchmarks.report import Report
from benchmarks.service import running, wrk
from molva.messaging import with_options

SECONDS = 6
TURNS = 8
# Seconds of load while the broker is away.
AWAY_SECONDS = 6


def spool() -> None:
    """Measure ``/rate`` with and without a spool, and with the broker away."""
    report = Report(
        "spool",
        "The spool: ratings a second with and without it",
        f"wrk, one thread, 64 connections, {SECONDS} s a turn, random rates 0–10, closed loop; "
        f"`molva serve` alone, on Redis with appendfsync=always; {TURNS} turns, with and without "
        "one after the other in each, the order changing from turn to turn. Away: the broker is "
        "killed, every rating is answered behind the spool's own fsync.",
    )
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
