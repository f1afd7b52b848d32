"""The service on ledgers and catalogs of servers: real processes, real outages."""

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from tests.brokers import Server, private_kafka, private_postgresql, private_redis
from tests.conftest import MolvaProcess, StartMolva

# Seconds for which a server is away in these tests. A minute is no different, but for the
# pauses of the worker, which grow to five seconds: see docs/reliability.md.
AWAY = 8.0

# Broker, ledger, and seconds for which the broker is away: longer than Kafka's client keeps what
# it could not send (10 s), and twice as long as a receive waits by itself (5 s). A minute was
# tried by hand: docs/reliability.md.
PAIRS = [
    pytest.param(private_kafka, private_redis, 15.0, id="kafka-redis"),
    pytest.param(private_redis, private_postgresql, 12.0, id="redis-postgresql"),
]
# Seconds within which every request must have its answer: what a broker has for storing, 10 s,
# and a machine so busy that processes stand still. Who asks waits for longer.
LONGEST_ANSWER = 20.0
# Bytes by which a process may grow while a server is away.
GROWTH = 40_000_000

RunMolva = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(params=["postgresql", "redis"])
def ledger(request: pytest.FixtureRequest) -> Iterator[Server]:
    private = private_postgresql if request.param == "postgresql" else private_redis
    with private() as server:
        yield server


def rate(molva: MolvaProcess, count: int, first: int = 0) -> None:
    for at in range(first, first + count):
        status, _, body = molva.request("POST", f"/rate?rate={at % 11}&item=i{at % 3}&id=r{at}")
        assert status == 202, body


def processor_seconds(molva: MolvaProcess) -> float:
    children = psutil.Process(molva.process.pid).children()
    times = [child.cpu_times() for child in children]
    return sum(found.user + found.system for found in times)


class Load:
    """Clients that rate one after the other, and try again under the same id where they must.

    Attributes:
        accepted: The ratings that were answered with 202.
        refused: How many answers of 503 there were.
        longest: Seconds that the slowest answer took.
        wrong: What should never have been seen.
    """

    def __init__(self, molva: MolvaProcess, clients: int = 8) -> None:
        self._molva = molva
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.accepted = 0
        self.refused = 0
        self.longest = 0.0
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._rate, args=(n,)) for n in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Let each client bring its last rating to its end."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def wait_accepted(self, more: int, seconds: float = 30.0) -> None:
        """Wait until so many more ratings were accepted."""
        wanted, deadline = self.accepted + more, time.monotonic() + seconds
        while self.accepted < wanted:
            assert time.monotonic() < deadline, f"{self.accepted} of {wanted}: {self.wrong[:3]}"
            time.sleep(0.05)

    def _rate(self, client: int) -> None:
        at = 0
        while not self._ended.is_set():
            self._until_accepted(f"/rate?rate=7&item=i{client}&id=c{client}-{at}")
            at += 1
            time.sleep(0.02)

    def _until_accepted(self, path: str) -> None:
        patience = time.monotonic() + 120.0
        while time.monotonic() < patience:
            began = time.monotonic()
            try:
                status, headers, _ = self._molva.request("POST", path)
            except OSError as error:
                status, headers = 0, {"error": repr(error)}
            seconds = time.monotonic() - began
            with self._lock:
                self.longest = max(self.longest, seconds)
                self.accepted += status == 202
                self.refused += status == 503
                if status not in (202, 503) or (
                    status == 503 and int(headers.get("retry-after", 0)) < 1
                ):
                    self.wrong.append(f"{status} after {seconds:.1f} s: {headers}")
            if status == 202:
                return
            time.sleep(0.2)
        self.wrong.append(f"{path} was never accepted")


def processes(molva: MolvaProcess) -> dict[int, int]:
    """Return the resident bytes of each process of the service."""
    return {
        child.pid: child.memory_info().rss for child in psutil.Process(molva.process.pid).children()
    }


@pytest.mark.parametrize(("broker_kind", "ledger_kind", "away"), PAIRS)
def test_a_broker_that_is_killed_costs_503s_and_nothing_else(
    broker_kind: Callable[[], "contextlib.AbstractContextManager[Server]"],
    ledger_kind: Callable[[], "contextlib.AbstractContextManager[Server]"],
    away: float,
    start_molva: StartMolva,
) -> None:
    with broker_kind() as broker, ledger_kind() as ledger:
        molva = start_molva("--workers", "2", "--broker", broker.url, "--ledger", ledger.url)
        # One that is still opening its ledger ends without it, and is started again.
        molva.wait_working(2)
        with Load(molva) as load:
            load.wait_accepted(200)
            before = processes(molva)
            broker.kill()
            away_until = time.monotonic() + away
            grown = 0
            while time.monotonic() < away_until or (
                not load.refused and time.monotonic() < away_until + 30.0
            ):
                time.sleep(0.5)
                now = processes(molva)
                grown = max(grown, *(now.get(pid, 0) - size for pid, size in before.items()))
            accepted, refused = load.accepted, load.refused
            broker.start()
            load.wait_accepted(200, seconds=60.0)
        found = molva.wait_counted(load.accepted, seconds=60.0)

        assert load.wrong == []
        assert refused > 0
        assert accepted < load.accepted
        assert load.longest < LONGEST_ANSWER
        assert grown < GROWTH
        assert found["count"] == load.accepted
        assert processes(molva).keys() == before.keys(), molva.log
        assert molva.stop() == 0


@pytest.mark.parametrize("how", ["killed", "paused"])
def test_a_ledger_that_is_away_costs_nothing_but_time(
    ledger: Server, start_molva: StartMolva, how: str
) -> None:
    # A worker that is still opening its ledger ends without it, and is started again.
    molva = start_molva("--workers", "2", "--ledger", ledger.url).wait_working(2)
    before = processes(molva).keys()
    rate(molva, 50)
    molva.wait_counted(50)

    if how == "killed":
        ledger.kill()
    else:
        ledger.pause()
    away_until = time.monotonic() + AWAY
    rate(molva, 50, first=50)
    busy = processor_seconds(molva)
    status, headers, body = molva.request("GET", "/total")
    assert status == 503, body
    assert int(headers["retry-after"]) >= 1
    assert json.loads(body)["type"] == "urn:molva:problem:ledger-unavailable"
    time.sleep(max(0.0, away_until - time.monotonic()))
    assert processor_seconds(molva) - busy < AWAY / 3, "a busy loop"
    rate(molva, 50, first=100)
    if how == "killed":
        ledger.restart()
    else:
        ledger.resume()

    found = molva.wait_counted(150)
    assert found["count"] == 150
    assert sum(int(r) * n for r, n in found["distribution"].items()) == sum(
        at % 11 for at in range(150)
    )
    assert processes(molva).keys() == before, molva.log
    assert molva.stop() == 0


def test_a_catalog_that_is_away_stops_no_rating_of_a_known_campaign(
    start_molva: StartMolva,
) -> None:
    with private_postgresql() as server:
        molva = start_molva("--ledger", server.url, "--catalog", server.url)
        rate(molva, 10)
        molva.wait_counted(10)
        server.pause()
        with contextlib.ExitStack() as stack:
            stack.callback(server.resume)
            rate(molva, 20, first=10)
        assert molva.wait_counted(30)["count"] == 30


@pytest.mark.parametrize("kind", ["postgresql", "redis"])
def test_every_command_works_on_a_server(
    kind: str, start_molva: StartMolva, run_molva: RunMolva
) -> None:
    with private_postgresql(password="s3cret") as database, contextlib.ExitStack() as stack:
        where = {"MOLVA_CATALOG": database.url, "MOLVA_LEDGER": database.url}
        if kind == "redis":
            where["MOLVA_LEDGER"] = stack.enter_context(private_redis(password="s3cret")).url

        def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
            done = run_molva(*arguments, environment={**where, "MOLVA_DATA": str(molva.data)})
            assert "s3cret" not in done.stdout + done.stderr
            return done

        molva = start_molva(
            *("--ledger", where["MOLVA_LEDGER"], "--catalog", where["MOLVA_CATALOG"]),
            *("--survive", "power"),
        )
        rate(molva, 30)
        molva.wait_counted(30)
        assert run("campaign", "put", "talk", "--scale", "1-5").returncode == 0
        assert "talk" in run("campaign", "list").stdout
        total: dict[str, Any] = json.loads(run("total", "--json", "-n", "5").stdout)
        assert (total["count"], total["average"]) == (30, sum(at % 11 for at in range(25, 30)) / 5)
        assert run("verify").returncode == 0
        assert run("migrate").returncode == 0
        rebuilt = run("rebuild")
        assert rebuilt.returncode == (0 if kind == "postgresql" else 2), rebuilt.stderr
        findings = {f["what"]: f for f in json.loads(run("doctor", "--json").stdout)["findings"]}
        assert findings["ledger"]["ok"]
        assert findings["survives"]["detail"] == "kill, power"
        assert ("ids are known for 72 h" in findings["ledger"]["detail"]) == (kind == "redis")
        status, _, _ = molva.request("POST", "/rate?campaign=talk&rate=5")
        assert status == 202
        molva.wait_counted(1, "?campaign=talk")
        assert "s3cret" not in molva.log
        assert molva.stop() == 0


def test_a_promise_that_the_ledger_does_not_keep_is_refused(
    start_molva: StartMolva,
) -> None:
    with private_redis(appendfsync="everysec") as server:
        molva = start_molva("--ledger", server.url, "--survive", "power", ready=False)
        assert molva.process.wait(30) == 6
        assert "ledger: nothing" in molva.log
