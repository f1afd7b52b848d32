"""The spool of real processes, before real brokers that are killed, paused and come back."""

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from molva._base.ids import id_from_text
from molva.ratings.ledger import open_ledger
from tests.brokers import Server, private_kafka, private_redis
from tests.conftest import MolvaProcess, StartMolva
from tests.ratings.fsync import failing_fsync
from tests.ratings.test_service_servers import Load

# Seconds for which a broker is away: longer than Kafka's client keeps what it could not send.
AWAY = 13.0
# Seconds within which every rating of an outage must have its answer, where a broker that hangs
# has one, and the machine is busy. Kafka's client alone would take ten.
LONGEST_ANSWER = 9.0

SPOOL = ("--when-broker-down", "spool")

RunMolva = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def redis() -> Iterator[Server]:
    with private_redis() as server:
        yield server


def metric(molva: MolvaProcess, name: str) -> float:
    """Return the sum of a metric over all processes."""
    lines = molva.request("GET", "/metrics")[2].decode().splitlines()
    found = [
        float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split()[0] == name
    ]
    assert found, f"{name} is not told"
    return sum(found)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def has_gone_on(molva: MolvaProcess) -> bool:
    """Return whether the broker has confirmed something since this process started."""
    return metric(molva, "molva_messages_stored_total") > 0


def rate(molva: MolvaProcess, count: int, first: int = 0) -> None:
    for at in range(first, first + count):
        status, _, body = molva.request("POST", f"/rate?rate={at % 11}&item=i{at % 3}&id=r{at}")
        assert status == 202, body


def counted(data: Path) -> list[tuple[str | None, bytes | None]]:
    """Return item and id of every rating of the embedded ledger, in the order of counting."""

    async def read() -> list[tuple[str | None, bytes | None]]:
        ledger = await open_ledger(f"sqlite://{data}/ledger.db")
        try:
            return [(e.item, e.id) async for e in ledger.entries("default") if e.kind == "rating"]
        finally:
            await ledger.close()

    return asyncio.run(read())


def doctor(run_molva: RunMolva, molva: MolvaProcess, *arguments: str) -> dict[str, dict[str, Any]]:
    done = run_molva("doctor", "--json", "--data", str(molva.data), *arguments)
    return {found["what"]: found for found in json.loads(done.stdout)["findings"]}


@pytest.mark.parametrize("kind", [private_redis, private_kafka], ids=["redis", "kafka"])
def test_while_a_broker_is_away_every_rating_is_accepted_and_counts_once_behind_it(
    kind: Callable[[], "contextlib.AbstractContextManager[Server]"],
    start_molva: StartMolva,
    run_molva: RunMolva,
) -> None:
    with kind() as broker:
        molva = start_molva("--broker", broker.url, *SPOOL)
        with Load(molva) as load:
            load.wait_accepted(200)
            # On a busy machine a broker can take so long that it counts as away for a moment.
            wait_until(lambda: metric(molva, "molva_broker_away") == 0)
            broker.kill()
            away_until = time.monotonic() + AWAY
            load.wait_accepted(100)
            while time.monotonic() < away_until - 6.0:
                time.sleep(0.2)
            length = metric(molva, "molva_spool_length")
            oldest = metric(molva, "molva_spool_oldest_seconds")
            assert metric(molva, "molva_broker_away") == 1
            found = doctor(run_molva, molva, "--broker", broker.url, *SPOOL)
            while time.monotonic() < away_until:
                time.sleep(0.1)
            broker.start()
            load.wait_accepted(100)
            wait_until(lambda: metric(molva, "molva_broker_away") == 0)
            load.wait_accepted(50)
        total = molva.wait_counted(load.accepted, seconds=60.0)
        time.sleep(1.0)

        assert load.wrong == []
        assert load.refused == 0
        assert load.longest < LONGEST_ANSWER
        assert length > 0
        assert 1.0 < oldest < AWAY
        assert found["spool"]["ok"]
        assert "ratings wait for the broker, the oldest for" in found["spool"]["detail"]
        assert not found["broker"]["ok"]
        assert total["count"] == load.accepted
        assert molva.total()["count"] == load.accepted
        assert metric(molva, "molva_spool_length") == 0
        assert metric(molva, "molva_spool_stored_total") > 100
        assert metric(molva, "molva_spool_dead_letters") == 0
        assert molva.stop() == 0
        order = counted(molva.data)
        for client in range(8):
            ids = [id_ for item, id_ in order if item == f"i{client}" and id_]
            wanted = [id_from_text(f"c{client}-{at}", scope="default") for at in range(len(ids))]
            assert ids == wanted or broker.kind.name == "redis"
            assert sorted(ids) == sorted(wanted)


def test_a_broker_that_hangs_holds_nobody_up_for_long(
    redis: Server, start_molva: StartMolva
) -> None:
    molva = start_molva("--broker", redis.url, *SPOOL)
    rate(molva, 5)
    redis.pause()
    with contextlib.ExitStack() as stack:
        stack.callback(redis.resume)
        slowest = 0.0
        for at in range(5, 25):
            began = time.monotonic()
            rate(molva, 1, first=at)
            slowest = max(slowest, time.monotonic() - began)
        began = time.monotonic()
        rate(molva, 20, first=25)
        later = time.monotonic() - began

    assert slowest < LONGEST_ANSWER
    assert later < 10.0, "twenty that each waited for a second take twenty"
    assert molva.wait_counted(45)["count"] == 45
    assert molva.stop() == 0


def test_a_service_killed_while_it_spools_goes_on_without_the_broker(
    redis: Server, start_molva: StartMolva, run_molva: RunMolva
) -> None:
    serve = start_molva("--broker", redis.url, *SPOOL, command="serve")
    rate(serve, 20)
    # On a busy machine a broker can take so long that some of them are in the spool.
    wait_until(lambda: metric(serve, "molva_broker_away") == 0)
    redis.kill()
    rate(serve, 100, first=20)
    serve.process.kill()
    serve.process.wait()
    found = doctor(run_molva, serve, "--broker", redis.url, *SPOOL)
    assert not found["spool"]["ok"]
    assert "processes that are gone" in found["spool"]["detail"]

    again = start_molva("--broker", redis.url, *SPOOL, command="serve")
    assert "the broker is away" in again.log
    assert metric(again, "molva_spool_length") == 100
    rate(again, 50, first=120)
    again.process.kill()
    again.process.wait()
    redis.start()
    last = start_molva("--broker", redis.url, *SPOOL, command="serve")
    start_molva("--broker", redis.url, command="work", ready=False)
    rate(last, 10, first=170)

    assert last.wait_counted(180)["count"] == 180
    wait_until(lambda: metric(last, "molva_spool_length") == 0)
    assert "spool" in last.log or metric(last, "molva_broker_away") == 0
    assert last.stop() == 0
    assert len(counted(last.data)) == 180


def test_a_service_killed_while_it_empties_the_spool_loses_nothing(
    redis: Server, start_molva: StartMolva
) -> None:
    serve = start_molva("--broker", redis.url, *SPOOL, command="serve")
    redis.kill()
    rate(serve, 600)
    redis.start()
    # Each process is killed as soon as something has gone on, and most of it has not.
    for turn in range(1, 5):
        wait_until(partial(has_gone_on, serve), seconds=20.0)
        serve.process.kill()
        serve.process.wait()
        redis.kill()
        serve = start_molva("--broker", redis.url, *SPOOL, command="serve")
        rate(serve, 600, first=600 * turn)
        redis.start()
    start_molva("--broker", redis.url, command="work", ready=False)

    assert serve.wait_counted(3_000, seconds=60.0)["count"] == 3_000
    wait_until(lambda: metric(serve, "molva_spool_length") == 0)
    time.sleep(1.0)
    assert serve.total()["count"] == 3_000
    assert serve.stop() == 0


def test_what_processes_left_over_is_sent_on_by_one(redis: Server, start_molva: StartMolva) -> None:
    # Port and metrics are shared, so all are killed together.
    many = start_molva("--broker", redis.url, *SPOOL, "--processes", "3", command="serve")
    wait_until(lambda: many.log.count("molva serve: http") == 3)
    redis.kill()
    rate(many, 150)
    wait_until(lambda: metric(many, "molva_spool_length") == 150)
    every = psutil.Process(many.process.pid).children()
    many.process.kill()
    for child in every:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(every, timeout=30)
    spools = [path for path in (many.data / "spool").iterdir() if path.is_dir()]
    assert len(spools) == 3

    redis.start()
    one = start_molva("--broker", redis.url, *SPOOL)

    assert one.wait_counted(150, seconds=60.0)["count"] == 150
    wait_until(
        lambda: len([p for p in (many.data / "spool").iterdir() if p.is_dir()]) == 1, seconds=60.0
    )
    assert one.stop() == 0


def test_a_spool_that_is_full_answers_503_with_retry_after(
    redis: Server, start_molva: StartMolva
) -> None:
    molva = start_molva("--broker", redis.url, *SPOOL, "--spool-limit", "5")
    redis.kill()
    rate(molva, 5)
    status, headers, body = molva.request("POST", "/rate?rate=7&id=more")

    assert (status, headers["retry-after"]) == (503, "5")
    assert "limit of 5 ratings" in json.loads(body)["detail"]
    assert metric(molva, "molva_spool_refused_total") == 1
    assert metric(molva, "molva_spool_limit") == 5
    redis.start()
    wait_until(lambda: molva.request("POST", "/rate?rate=7&id=more")[0] == 202)
    assert molva.wait_counted(6)["count"] == 6
    assert molva.stop() == 0


def test_without_a_spool_a_broker_that_is_away_is_503_with_retry_after(
    redis: Server, start_molva: StartMolva
) -> None:
    molva = start_molva("--broker", redis.url)
    redis.kill()
    status, headers, _ = molva.request("POST", "/rate?rate=7")

    assert status == 503
    assert int(headers["retry-after"]) >= 1
    assert not (molva.data / "spool").exists()


def test_it_stops_in_order_while_the_broker_is_away(redis: Server, start_molva: StartMolva) -> None:
    molva = start_molva("--broker", redis.url, *SPOOL, command="serve")
    redis.pause()
    with contextlib.ExitStack() as stack:
        stack.callback(redis.resume)
        rate(molva, 20)
        began = time.monotonic()
        assert molva.stop() == 0
        assert time.monotonic() - began < 9.0


def test_what_does_not_survive_the_loss_of_a_machine_is_refused(start_molva: StartMolva) -> None:
    molva = start_molva(*SPOOL, "--survive", "node", ready=False)

    assert molva.process.wait(30) == 6
    assert "spool: kill, power" in molva.log
    assert "--when-broker-down refuse" in molva.log


def test_a_ledger_that_forgets_too_early_is_refused(redis: Server, start_molva: StartMolva) -> None:
    molva = start_molva("--ledger", redis.url, *SPOOL, "--spool-hours", "60", ready=False)

    assert molva.process.wait(30) == 2
    assert "remembers ids for 72 h" in molva.log
    assert "horizon=306000" in molva.log
    assert "--spool-hours 47" in molva.log


def test_doctor_tells_what_a_deployment_with_a_spool_survives(
    start_molva: StartMolva, run_molva: RunMolva
) -> None:
    molva = start_molva(*SPOOL)
    rate(molva, 1)
    molva.wait_counted(1)
    found = doctor(run_molva, molva, *SPOOL)

    assert found["survives"]["detail"] == "kill, power"
    assert found["spool"]["detail"].endswith("spool: 0 ratings wait for the broker")
    assert molva.stop() == 0


def test_after_a_failed_fsync_of_the_spool_a_new_process_goes_on(
    redis: Server, start_molva: StartMolva, tmp_path: Path
) -> None:
    molva = start_molva("--broker", redis.url, *SPOOL)
    redis.kill()
    rate(molva, 20)
    pid = molva.children()["serve"].pid
    with failing_fsync(pid, tmp_path):
        status, headers, _ = molva.request("POST", "/rate?rate=7&id=the-one")

    assert status == 503
    assert "retry-after" in headers
    wait_until(lambda: molva.children().get("serve", psutil.Process(1)).pid not in (1, pid))
    molva.wait_ready()
    assert molva.request("POST", "/rate?rate=7&id=the-one")[0] == 202
    redis.start()
    assert molva.wait_counted(21, seconds=60.0)["count"] == 21
    time.sleep(0.5)
    assert molva.total()["count"] == 21
