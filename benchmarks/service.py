"""The service under wrk: accepted, accepted and applied, against an empty app and the usual way."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from benchmarks.report import Report
from molva.ratings.ledger import open_ledger

CONNECTIONS = 64
SECONDS = 6
TURNS = 5
# Random rates, as the original's load test sent.
SCRIPT = """
math.randomseed(os.time())
request = function()
  return wrk.format("POST", "/rate?rate=" .. math.random(0, 10))
end
"""


@dataclass(frozen=True)
class Load:
    """What one run of wrk says."""

    requests: int
    answered_per_second: float
    p50_ms: float
    p99_ms: float
    refused: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wrk(port: int, *, connections: int = CONNECTIONS, seconds: float = SECONDS) -> Load:
    """Load ``/rate`` with wrk: closed loop, so latencies say little, throughput much."""
    if shutil.which("wrk") is None:
        raise SystemExit("benchmarks: wrk is not installed; Debian's package is called wrk")
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(SCRIPT)
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency"]
        output = subprocess.run(
            [*command, "-s", script.name, f"http://127.0.0.1:{port}/"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def milliseconds(quantile: str) -> float:
        match = re.search(rf"^\s+{quantile}%\s+([\d.]+)(us|ms|s)", output, re.MULTILINE)
        assert match is not None, output
        return float(match[1]) * {"us": 0.001, "ms": 1.0, "s": 1_000.0}[match[2]]

    requests = int(re.search(r"(\d+) requests in", output)[1])  # type: ignore[index]
    took = float(re.search(r"requests in ([\d.]+)", output)[1])  # type: ignore[index]
    if "m," in output.partition("requests in")[2][:12]:
        took *= 60
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    refused = int(bad[1]) if bad else 0
    return Load(
        requests, (requests - refused) / took, milliseconds("50"), milliseconds("99"), refused
    )


@contextlib.contextmanager
def running(*command: str) -> Iterator[tuple[int, "subprocess.Popen[bytes]"]]:
    """Run a server for the block; ``PORT`` in the command becomes its port."""
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MOLVA_")}
    process = subprocess.Popen(
        [sys.executable, *(str(port) if part == "PORT" else part for part in command)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            time.sleep(0.02)
        yield port, process
    finally:
        process.terminate()
        process.wait(15)


def total(port: int, query: str = "") -> dict[str, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", f"/total{query}", headers={"Accept": "application/json"})
        document: dict[str, object] = json.loads(connection.getresponse().read())
        return document
    finally:
        connection.close()


def service() -> None:
    """Measure throughput against the empty app and the usual way."""
    report = Report(
        "service",
        "The service: ratings a second",
        f"wrk, one thread, {CONNECTIONS} connections, {SECONDS} s a turn, random rates 0–10, closed "
        f"loop; {TURNS} turns, one after the other in each; metrics and limits on; a fresh data "
        "folder each turn. Survived: kill and power (an fsync before every answer).",
    )
    empty: list[float] = []
    accepted: list[float] = []
    applied: list[float] = []
    usual: list[float] = []
    drains: list[float] = []
    p99: list[float] = []
    for _ in range(TURNS):
        with running("-m", "benchmarks.peers.empty_app", "PORT") as (port, _process):
            empty.append(wrk(port).answered_per_second)
        with tempfile.TemporaryDirectory() as folder:
            with running("-m", "molva", "serve", "--port", "PORT", "--data", folder) as (port, _p):
                accepted.append(wrk(port).answered_per_second)
        with tempfile.TemporaryDirectory() as folder:
            with running("-m", "molva", "up", "--port", "PORT", "--data", folder) as (port, _p):
                load = wrk(port)
                started = time.perf_counter()
                while (total(port).get("count") or 0) < load.requests - load.refused:  # type: ignore[operator]
                    assert time.perf_counter() - started < 30, total(port)
                    time.sleep(0.01)
                drains.append(time.perf_counter() - started)
                applied.append(load.answered_per_second)
                p99.append(load.p99_ms)
        with tempfile.TemporaryDirectory() as folder:
            peer = ("-m", "benchmarks.peers.usual_way", "PORT", f"{folder}/ratings.db")
            with running(*peer) as (port, _process):
                usual.append(wrk(port).answered_per_second)
    report.ratio("accepted and durable / empty app", accepted, empty, "0.45, better 0.6")
    report.ratio(
        "accepted and applied by one worker / empty app", applied, empty, "0.28, better 0.4"
    )
    report.ratio("accepted and applied / FastAPI, uvicorn, SQLite", applied, usual, "8")
    report.add("backlog gone after the load", f"{max(drains):.2f} s", "worst turn; asked for 1 s")
    report.add(
        "p99 while applying", f"{statistics.median(p99):.1f} ms", "closed loop, median of turns"
    )
    report.write()


def minute() -> None:
    """Do what the original's load test did: five connections for a minute."""
    report = Report(
        "minute",
        "The original's load test: a minute with five connections",
        "wrk, 5 connections, 60 s, random rates 0–10. The original reached 207 requests/s at 30 ms.",
    )
    with tempfile.TemporaryDirectory() as folder:
        with running("-m", "molva", "up", "--port", "PORT", "--data", folder) as (port, _process):
            load = wrk(port, connections=5, seconds=60)
            good = load.requests - load.refused
            deadline = time.monotonic() + 10
            found = total(port)
            while found.get("pending") and time.monotonic() < deadline:
                time.sleep(0.05)
                found = total(port)
            count = found["count"]
            assert isinstance(count, int)
            assert good <= count <= good + 5, f"{good} answered, {count} counted"
            last = asyncio.run(_last_rates(folder, 10_000))
            for n in (1, 10, 10_000):
                assert total(port, f"?n={n}")["average"] == sum(last[-n:]) / n
        verify = [sys.executable, "-m", "molva", "verify", "--data", folder]
        assert subprocess.run(verify, check=False).returncode == 0
    report.add("requests a second", f"{load.answered_per_second:,.0f}", "the original: 207")
    report.add(
        "latency", f"{load.p50_ms:.2f} ms", f"median; p99 {load.p99_ms:.2f} ms; the original: 30 ms"
    )
    report.add("answered with 2xx", f"{good:,}", f"{load.refused:,} refused")
    report.add(
        "counted", f"{count:,}", "between the 2xx and these and the five under way at the end"
    )
    report.write()


async def _last_rates(folder: str, number: int) -> list[int]:
    """Return the last rates, from the ledger's entries themselves."""
    ledger = await open_ledger(f"sqlite://{folder}/ledger.db")
    try:
        since = await ledger.last_seq("default") - number
        entries = [entry async for entry in ledger.entries("default", since_seq=since)]
    finally:
        await ledger.close()
    return [entry.rate for entry in entries if entry.kind == "rating" and entry.rate is not None]


def idle() -> None:
    """Measure what `molva up` costs while nothing happens."""
    report = Report("idle", "`molva up`, idle", "All its processes together, one worker.")
    firsts, memory, used = [], [], []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            with running("-m", "molva", "up", "--port", "PORT", "--data", folder) as (
                port,
                process,
            ):
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("POST", "/rate?rate=7")
                assert connection.getresponse().status == 202
                firsts.append(time.perf_counter() - started)
                connection.close()
                time.sleep(2)
                every = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
                before = sum(sum(each.cpu_times()[:2]) for each in every)
                time.sleep(5)
                used.append((sum(sum(each.cpu_times()[:2]) for each in every) - before) / 5)
                memory.append(sum(each.memory_full_info().pss for each in every) / 2**20)
    report.add(
        "first rating accepted",
        f"{max(firsts):.2f} s",
        "after the command, worst of 5; asked for 2 s",
    )
    report.add(
        "memory", f"{max(memory):.0f} MiB", "proportional set size, worst of 5; asked for 150 MB"
    )
    report.add(
        "CPU", f"{statistics.median(used) * 100:.2f} %", "of one core, over 5 s, median of 5"
    )
    report.write()
