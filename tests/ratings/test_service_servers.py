"""The service on ledgers and catalogs of servers: real processes, real outages."""

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.brokers import Server, private_postgresql, private_redis
from tests.conftest import MolvaProcess, StartMolva

# Seconds for which a server is away in these tests. A minute is no different, but for the
# pauses of the worker, which grow to five seconds: see docs/reliability.md.
AWAY = 8.0

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
    times = [child.cpu_times() for child in molva.children().values()]
    return sum(found.user + found.system for found in times)


@pytest.mark.parametrize("how", ["killed", "paused"])
def test_a_ledger_that_is_away_costs_nothing_but_time(
    ledger: Server, start_molva: StartMolva, how: str
) -> None:
    molva = start_molva("--workers", "2", "--ledger", ledger.url)
    before = {name: child.pid for name, child in molva.children().items()}
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
    assert {name: child.pid for name, child in molva.children().items()} == before
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
        assert molva.process.wait(20) == 6
        assert "ledger: nothing" in molva.log
