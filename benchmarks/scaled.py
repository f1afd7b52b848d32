"""The service on Kafka and Redis: against a bare handler, and against FastStream's way."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator

from tests.brokers import Server, private_kafka, private_redis

from benchmarks.report import Report
from benchmarks.service import running, total, wrk

CONNECTIONS = (5, 64, 256)
SECONDS = 6
TURNS = 5
# Lanes, which are partitions: the same number for everybody.
PARTITIONS = 8


def scaled() -> None:
    """Measure ``/rate`` on Kafka → Redis at 5, 64 and 256 connections."""
    report = Report(
        "scaled",
        "The service on Kafka → Redis: ratings a second",
        f"wrk, one thread, {SECONDS} s a turn, random rates 0–10, closed loop; {TURNS} turns, one "
        f"after the other in each, and a turn ahead of them for warm-up; Kafka with one node, {PARTITIONS} partitions, acks=all, "
        "idempotent; Redis with appendfsync=always. Survived: kill, by broker and ledger alike.",
    )
    with private_kafka() as kafka, private_redis(appendonly="yes", appendfsync="always") as redis:
        _at(64, kafka, redis, turns=1)  # a warm-up, for whatever Kafka does for the first time
        for connections in CONNECTIONS:
            bare, ours, counted, theirs, drains = _at(connections, kafka, redis)
            at = f" at {connections} connections"
            report.ratio(f"accepted / bare handler on confluent-kafka{at}", ours, bare, "0.6")
            report.ratio(f"accepted and counted / FastStream, FastAPI{at}", counted, theirs, "3")
            report.add(f"backlog gone after the load{at}", f"{max(drains):.2f} s", "worst turn")
    report.write()


def _at(
    connections: int, kafka: Server, redis: Server, *, turns: int = TURNS
) -> tuple[list[float], list[float], list[float], list[float], list[float]]:
    bare: list[float] = []
    ours: list[float] = []
    counted: list[float] = []
    theirs: list[float] = []
    drains: list[float] = []
    bootstrap = kafka.url.removeprefix("kafka://")
    for _ in range(turns):
        topic = _fresh_topic(bootstrap)
        command = ("-m", "benchmarks.peers.raw_kafka", "PORT", bootstrap, topic)
        with running(*command) as (port, _process):
            bare.append(wrk(port, connections=connections, seconds=SECONDS).answered_per_second)
        with _molva(kafka, redis) as where, running("-m", "molva", "serve", *where) as (port, _p):
            ours.append(wrk(port, connections=connections, seconds=SECONDS).answered_per_second)
        with _molva(kafka, redis) as where:
            with running("-m", "molva", "serve", *where) as (port, _p), worker("molva", *where):
                load = wrk(port, connections=connections, seconds=SECONDS)
                drains.append(_drained(port, load.requests - load.refused))
                counted.append(load.answered_per_second)
        peer = "benchmarks.peers.faststream_way"
        topic = _fresh_topic(bootstrap)
        where = ("PORT", bootstrap, topic, redis.url)
        with running("-m", peer, "serve", *where) as (port, _p), worker(peer, "0", *where[1:]):
            time.sleep(2)  # its consumer joins its group
            load = wrk(port, connections=connections, seconds=SECONDS)
            theirs.append(load.answered_per_second)
        _forget(redis)
    return bare, ours, counted, theirs, drains


@contextlib.contextmanager
def _molva(kafka: Server, redis: Server) -> Iterator[tuple[str, ...]]:
    """Yield the options of a deployment of its own: nothing of the last turn is in it."""
    name = uuid.uuid4().hex[:8]
    with tempfile.TemporaryDirectory() as folder:
        yield (
            *("--port", "PORT", "--data", folder),
            *("--broker", f"{kafka.url}?topic={name}&lanes={PARTITIONS}"),
            *("--ledger", redis.url),  # emptied after each turn
        )


@contextlib.contextmanager
def worker(module: str, *where: str) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a worker of a module for the block; ``where`` begins with its server's port."""
    arguments = list(where)
    if module == "molva":
        del arguments[:2]  # a worker has no port
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MOLVA_")}
    process = subprocess.Popen(
        [sys.executable, "-m", module, "work", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def _drained(port: int, accepted: int) -> float:
    """Return the seconds until all that was accepted is counted."""
    started = time.perf_counter()
    while (total(port).get("count") or 0) < accepted:  # type: ignore[operator]
        assert time.perf_counter() - started < 60, total(port)
        time.sleep(0.02)
    return time.perf_counter() - started


def _fresh_topic(bootstrap: str) -> str:
    from confluent_kafka.admin import AdminClient
    from confluent_kafka.cimpl import NewTopic

    topic = f"bench-{uuid.uuid4().hex[:8]}"
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for created in admin.create_topics([NewTopic(topic, PARTITIONS, 1)]).values():
        created.result()
    return topic


def _forget(redis: Server) -> None:
    import redis as client

    with client.Redis.from_url(redis.url) as connection:
        connection.flushall()
