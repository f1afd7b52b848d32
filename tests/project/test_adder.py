"""The adder in real processes: an answer is its own request's sum, or says why there is none."""

import json
import os
import secrets
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from examples.adder.places import Places

from molva.messaging import url, with_options
from tests.brokers.ports import free_ports

ROOT = Path(__file__).parent.parent.parent


def run_adder(broker: str, *arguments: str) -> dict[str, int]:
    """Run the whole example; return what it counted."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.adder", "run", *arguments],
        cwd=ROOT,
        env={**os.environ, "ADDER_BROKER": broker},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (line.rsplit(maxsplit=1) for line in done.stdout.splitlines())
    return {what: int(number.replace(",", "")) for what, number in lines}


def check(counted: dict[str, int]) -> None:
    assert (counted["wrong"], counted["other refusals"], counted["workers killed"]) == (0, 0, 1)
    assert counted["right"] + counted["504, asked again"] == counted["asked"]
    assert counted["right after that"] > 0


def test_a_killed_worker_costs_no_sum_on_sqlite(tmp_path: Path) -> None:
    counted = run_adder(f"sqlite://{tmp_path}/adder.db", "--seconds", "6", "--timeout", "20")

    check(counted)
    # Another worker has what it held after a second, and everybody waits for twenty.
    assert counted["right"] == counted["asked"]


@pytest.mark.parametrize("server", ["redis_url", "nats_url", "rabbitmq_url"])
def test_a_killed_worker_costs_no_sum_on_a_server(
    request: pytest.FixtureRequest, server: str
) -> None:
    prefix = f"adder-{secrets.token_hex(4)}"
    broker = with_options(request.getfixturevalue(server), prefix=prefix)
    counted = run_adder(broker, "--seconds", "6", "--timeout", "20")

    check(counted)
    assert counted["right"] == counted["asked"]


def test_a_killed_worker_costs_no_more_than_an_answer_in_time_on_kafka(kafka_url: str) -> None:
    # Ten seconds until Kafka misses it: what it held then is answered late, or not in time.
    counted = run_adder(kafka_url, "--seconds", "6", "--timeout", "3")

    check(counted)


def test_requests_go_by_a_topic_on_any_broker_without_queues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = ModuleType("a_log")
    monkeypatch.setitem(sys.modules, "a_log", driver)
    monkeypatch.setitem(url._DRIVERS, "log", ("a_log", None))

    places = Places.of("log://host")

    assert places.asked == "log://host?topic=additions"
    assert places.taken == "log://host?topic=additions&subscription=adders"
    assert places.replies == "log://host?topic=sums"


@pytest.mark.parametrize(
    ("broker", "queue"),
    [
        ("nats://host", "nats://host?queue=additions&lease=1"),
        ("amqp://host", "amqp://host?queue=additions"),
    ],
)
def test_a_lease_is_short_where_a_broker_has_leases(broker: str, queue: str) -> None:
    assert Places.of(broker).taken == queue


@pytest.fixture
def lonely(tmp_path: Path) -> Iterator[str]:
    """The HTTP side, whose workers are all away."""
    [port] = free_ports(1)
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.adder", "serve", f"--port={port}", "--timeout=0.3"],
        cwd=ROOT,
        env={**os.environ, "ADDER_BROKER": f"sqlite://{tmp_path}/adder.db"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        assert b"serving" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def refusal(url: str) -> tuple[int, str | None, Any]:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=20)
    with refused.value as answer:
        return answer.code, answer.headers.get("Content-Type"), json.loads(answer.read())


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("a=two&b=3", "a='two'"),
        ("a=2", "b=''"),
        ("a=2&b=3.5", "b='3.5'"),
        ("a=2&b=" + "9" * 101, "b='999"),
        ("a=%D9%A2&b=3", "a='٢'"),
    ],
)
def test_what_is_no_number_is_refused_by_name(lonely: str, query: str, named: str) -> None:
    status, kind, body = refusal(f"{lonely}/add?{query}")

    assert (status, kind) == (400, "application/problem+json")
    assert named in body["detail"]
    assert body["status"] == 400


def test_a_sum_that_does_not_come_in_time_is_a_504_that_says_so(lonely: str) -> None:
    status, kind, body = refusal(f"{lonely}/add?a=2&b=3")

    assert (status, kind) == (504, "application/problem+json")
    assert body["detail"] == "no sum came within 0.3 s; ask again"
