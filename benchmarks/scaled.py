"""The service on a broker and Redis: against a bare handler, and against FastStream's way."""

import asyncio
import contextlib
import http.client
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from tests.brokers import Server, private_kafka, private_nats, private_rabbitmq, private_redis

from benchmarks.report import Report
from benchmarks.service import Load, running, total, wrk
from molva.messaging import with_options

CONNECTIONS = (5, 64, 256)
SECONDS = 6
TURNS = 5
# Lanes, which are Kafka's partitions: the same number for everybody.
PARTITIONS = 8


@dataclass(frozen=True, slots=True)
class Stack:
    """A broker in front of Redis.

    Attributes:
        name: Of the broker, as in its documentation.
        client: The raw client library.
        server: Runs the broker.
        options: What stands in Molva's URL of it.
        bare: The module of the bare handler.
        settings: What is confirmed when, for the report.
        make: Makes a topic for the peers, with the URL; returns its name.
    """

    name: str
    client: str
    server: Callable[[], AbstractContextManager[Server]]
    options: Mapping[str, str]
    bare: str
    settings: str
    make: Callable[[str], str]


def scaled() -> None:
    """Measure ``/rate`` on Kafka → Redis at 5, 64 and 256 connections."""
    _measure("scaled", KAFKA)


def scaled_nats() -> None:
    """Measure it on NATS → Redis."""
    _measure("scaled-nats", NATS)


def scaled_rabbitmq() -> None:
    """Measure it on RabbitMQ → Redis."""
    _measure("scaled-rabbitmq", RABBITMQ)


def scaled_redis() -> None:
    """Measure it on Redis → Redis: a server each, so that neither waits for the other's fsync."""
    _measure("scaled-redis", REDIS)


def _measure(name: str, stack: Stack) -> None:
    report = Report(
        name,
        f"The service on {stack.name} → Redis: ratings a second",
        f"wrk, one thread, {SECONDS} s a turn, random rates 0–10, closed loop; {TURNS} turns, one "
        f"after the other in each, and a turn ahead of them for warm-up; {stack.settings}; Redis "
        "with appendfsync=always. What is accepted and counted is divided by the time until the last "
        "of it is counted, on both sides.",
    )
    with stack.server() as broker, private_redis(appendonly="yes", appendfsync="always") as redis:
        _at(64, stack, broker, redis, turns=1)  # a warm-up, for what a server does the first time
        for connections in CONNECTIONS:
            bare, ours, counted, theirs, drains = _at(connections, stack, broker, redis)
            at = f" at {connections} connections"
            report.ratio(f"accepted / bare handler on {stack.client}{at}", ours, bare, "0.6")
            report.ratio(f"accepted and counted / FastStream, FastAPI{at}", counted, theirs, "3")
            report.add(f"backlog gone after the load{at}", f"{max(drains):.2f} s", "worst turn")
    report.write()


def _at(
    connections: int, stack: Stack, broker: Server, redis: Server, *, turns: int = TURNS
) -> tuple[list[float], list[float], list[float], list[float], list[float]]:
    bare: list[float] = []
    ours: list[float] = []
    counted: list[float] = []
    theirs: list[float] = []
    drains: list[float] = []
    address = broker.url.removeprefix("kafka://").partition("?")[0]
    for _ in range(turns):
        command = ("-m", stack.bare, "PORT", address, stack.make(broker.url))
        with running(*command) as (port, _process):
            bare.append(wrk(port, connections=connections, seconds=SECONDS).answered_per_second)
        with (
            _molva(stack, broker, redis) as where,
            running("-m", "molva", "serve", *where) as (port, _p),
        ):
            ours.append(wrk(port, connections=connections, seconds=SECONDS).answered_per_second)
        with _molva(stack, broker, redis) as where:
            with running("-m", "molva", "serve", *where) as (port, _p), worker("molva", *where):
                _await_worker(port)
                load = wrk(port, connections=connections, seconds=SECONDS)
                drains.append(_drained(port, 1 + load.requests - load.refused))
                counted.append(_counted_per_second(load, drains[-1]))
        peer = "benchmarks.peers.faststream_way"
        where = ("PORT", address, stack.make(broker.url), redis.url)
        with running("-m", peer, "serve", *where) as (port, _p), worker(peer, "0", *where[1:]):
            _await_worker(port)
            load = wrk(port, connections=connections, seconds=SECONDS)
            backlog = _drained(port, 1 + load.requests - load.refused)
            theirs.append(_counted_per_second(load, backlog))
        _forget(redis)
    return bare, ours, counted, theirs, drains


@contextlib.contextmanager
def _molva(stack: Stack, broker: Server, redis: Server) -> Iterator[tuple[str, ...]]:
    """Yield the options of a deployment of its own: nothing of the last turn is in it."""
    name = uuid.uuid4().hex[:8]
    with tempfile.TemporaryDirectory() as folder:
        yield (
            *("--port", "PORT", "--data", folder),
            *("--broker", with_options(broker.url, topic=name, **stack.options)),
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


def _await_worker(port: int) -> None:
    """Return when a first rating is counted: some brokers take seconds to let a worker in."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/rate?rate=7")
    assert connection.getresponse().status == 202
    connection.close()
    _drained(port, 1)


def _counted_per_second(load: Load, backlog: float) -> float:
    return load.answered_per_second * SECONDS / (SECONDS + backlog)


def _drained(port: int, accepted: int) -> float:
    """Return the seconds until all that was accepted is counted."""
    started = time.perf_counter()
    while (total(port).get("count") or 0) < accepted:  # type: ignore[operator]
        assert time.perf_counter() - started < 60, total(port)
        time.sleep(0.02)
    return time.perf_counter() - started


def _kafka_topic(url: str) -> str:
    from confluent_kafka.admin import AdminClient
    from confluent_kafka.cimpl import NewTopic

    topic = _fresh_name()
    admin = AdminClient({"bootstrap.servers": url.removeprefix("kafka://")})
    for created in admin.create_topics([NewTopic(topic, PARTITIONS, 1)]).values():
        created.result()
    return topic


def _nats_stream(url: str) -> str:
    import nats
    from nats.js.api import DiscardPolicy, StorageType

    topic = _fresh_name()

    async def make() -> None:
        client = await nats.connect(url.partition("?")[0])
        await client.jetstream().add_stream(
            name=topic, subjects=[topic], storage=StorageType.FILE, discard=DiscardPolicy.NEW
        )
        await client.close()

    asyncio.run(make())
    return topic


def _rabbitmq_queue(url: str) -> str:
    import aio_pika

    topic = _fresh_name()

    async def make() -> None:
        async with await aio_pika.connect(url) as connection:
            channel = await connection.channel()
            await channel.declare_queue(topic, durable=True, arguments={"x-queue-type": "quorum"})

    asyncio.run(make())
    return topic


def _redis_stream(url: str) -> str:
    import redis as client

    topic = _fresh_name()
    with client.Redis.from_url(url) as connection:
        connection.xgroup_create(topic, "process", "0", mkstream=True)
    return topic


def _fresh_name() -> str:
    return f"bench-{uuid.uuid4().hex[:8]}"


def _forget(redis: Server) -> None:
    import redis as client

    with client.Redis.from_url(redis.url) as connection:
        connection.flushall()


KAFKA: Final = Stack(
    "Kafka",
    "confluent-kafka",
    private_kafka,
    {"lanes": str(PARTITIONS)},
    "benchmarks.peers.raw_kafka",
    f"Kafka with one node, {PARTITIONS} partitions, acks=all, idempotent. Survived: kill",
    _kafka_topic,
)
NATS: Final = Stack(
    "NATS",
    "nats-py",
    private_nats,
    {"sync": "always"},
    "benchmarks.peers.raw_nats",
    "JetStream with one node, files, sync_interval: always. Survived: kill, power",
    _nats_stream,
)
RABBITMQ: Final = Stack(
    "RabbitMQ",
    "aio-pika",
    private_rabbitmq,
    {},
    "benchmarks.peers.raw_rabbitmq",
    "RabbitMQ with one node, quorum queues, confirms. Survived: kill, power",
    _rabbitmq_queue,
)
REDIS: Final = Stack(
    "Redis",
    "redis-py",
    lambda: private_redis(appendonly="yes", appendfsync="always"),
    {},
    "benchmarks.peers.raw_redis",
    "Redis Streams on one node, appendfsync=always. Survived: kill, power",
    _redis_stream,
)
