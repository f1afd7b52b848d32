"""Three Kafka brokers that keep three copies: one at a time is killed, the last for good."""

import asyncio
import contextlib
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest

from molva.messaging import open_subscription, open_topic, with_options
from tests.brokers import Server
from tests.brokers.ports import free_ports
from tests.brokers.private import private_server
from tests.messaging.clusters import ELECTION, Load

NODES = 3


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    controllers = free_ports(NODES)
    cluster = "M" + secrets.token_urlsafe(16)[1:]
    voters = ",".join(f"{number}@127.0.0.1:{port}" for number, port in enumerate(controllers, 1))
    brokers: list[AbstractContextManager[Server]] = [
        private_server(
            "kafka",
            {
                "cluster.id": cluster,
                "controller.port": port,
                "node.id": number,
                "controller.quorum.voters": voters,
                "min.insync.replicas": 2,
                "offsets.topic.replication.factor": NODES,
            },
            hurried=True,
        )
        for number, port in enumerate(controllers, 1)
    ]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(NODES) as pool:
        # Side by side: one alone has no majority, and is not ready before the next.
        starting = [pool.submit(broker.__enter__) for broker in brokers]
        for broker in brokers:
            stack.push(broker)
        yield [started.result() for started in starting]


def url_of(servers: list[Server], topic: str) -> str:
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers)
    return with_options(f"kafka://{hosts}", topic=topic, replicas=str(NODES), lanes="3")


@pytest.mark.timeout(300)
async def test_what_was_confirmed_outlives_each_node_in_turn_and_the_last_for_good(
    servers: list[Server],
) -> None:
    url = url_of(servers, f"t{secrets.token_hex(4)}")
    async with (
        await open_topic(url) as topic,
        await open_subscription(with_options(url, subscription="s")) as subscription,
    ):
        assert "node" in topic.capabilities.survives
        load = Load(topic, subscription)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.send())
            tasks.create_task(load.receive())
            await load.confirms_more()
            for server in servers[:-1]:
                await asyncio.to_thread(server.kill)
                await load.confirms_more()
                await asyncio.to_thread(server.start)
                await load.confirms_more()
            last = servers[-1]
            await asyncio.to_thread(last.kill)
            await asyncio.to_thread(shutil.rmtree, last.data_dir)
            await load.confirms_more()
            load.stop()
    assert load.confirmed <= set(load.received)
    assert load.silence < ELECTION
