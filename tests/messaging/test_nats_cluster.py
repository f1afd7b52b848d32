"""Three NATS servers that keep three copies: one at a time is killed, paused, lost for good."""

import asyncio
import contextlib
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar
from urllib.parse import parse_qs, urlsplit

import nats
import nats.errors
import pytest

from molva.messaging import (
    Message,
    Queue,
    UnavailableError,
    open_queue,
    with_options,
)
from tests.brokers import Server, private_nats
from tests.brokers.ports import free_ports
from tests.messaging.clusters import ELECTION, Load
from tests.messaging.nats_versions import need_present

T = TypeVar("T")


class Cluster:
    """Three servers, and a URL that names them all."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        self.url = "nats://" + ",".join(f"127.0.0.1:{server.port}" for server in servers)

    def queue_url(self, replicas: int = 3, **options: str) -> str:
        prefix = f"c-{secrets.token_hex(4)}"
        return with_options(self.url, queue="q", prefix=prefix, replicas=str(replicas), **options)

    async def leader(self, url: str) -> Server:
        """Return the server that leads the stream of a queue."""
        stream = f"{parse_qs(urlsplit(url).query)['prefix'][0]}_queue_q"
        client = await nats.connect([f"nats://127.0.0.1:{s.port}" for s in self.servers])
        deadline = time.monotonic() + ELECTION
        try:
            while True:
                with contextlib.suppress(nats.errors.Error):
                    cluster = (await client.jetstream().stream_info(stream)).cluster
                    if cluster is not None and cluster.leader:
                        return self.servers[int(cluster.leader.removeprefix("n"))]
                assert time.monotonic() < deadline, "no leader in time"
                await asyncio.sleep(0.1)
        finally:
            await client.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    routes = free_ports(3)
    shown = ", ".join(f'"nats-route://127.0.0.1:{port}"' for port in routes)
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                private_nats(
                    server_name=f"n{number}",
                    cluster=f'{{ name: c, listen: "127.0.0.1:{port}", routes: [{shown}] }}',
                )
            )
            for number, port in enumerate(routes)
        ]
        yield Cluster(servers)


async def when_led(call: Callable[[], Awaitable[T]]) -> T:
    """Return what ``call`` does as soon as the stream that it asks has a leader."""
    deadline = time.monotonic() + ELECTION
    while True:
        try:
            return await call()
        except UnavailableError:
            assert time.monotonic() < deadline, "no leader in time"
            await asyncio.sleep(0.2)


async def opened(url: str) -> Queue:
    return await when_led(lambda: open_queue(url))


async def test_three_copies_survive_the_loss_of_a_node_and_say_so(cluster: Cluster) -> None:
    need_present(since=(2, 10), what="sync before it confirms")
    async with await opened(cluster.queue_url(sync="always")) as queue:
        assert queue.capabilities.survives == {"kill", "power", "node"}
    async with await opened(cluster.queue_url(replicas=1)) as queue:
        assert queue.capabilities.survives == {"kill"}


async def test_without_a_majority_nothing_is_confirmed_and_with_one_it_goes_on(
    cluster: Cluster,
) -> None:
    async with await opened(cluster.queue_url()) as queue:
        for server in cluster.servers[:2]:
            await asyncio.to_thread(server.kill)
        try:
            until = time.monotonic() + 10
            while time.monotonic() < until:
                with pytest.raises(UnavailableError):
                    await queue.send(Message(b"refused"))
                await asyncio.sleep(0.1)
        finally:
            for server in cluster.servers[:2]:
                await asyncio.to_thread(server.start)
        load = Load(queue, queue)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.send())
            tasks.create_task(load.receive())
            await load.confirms_more()
            load.stop()


async def test_what_was_confirmed_is_there_when_a_node_is_lost_for_good(cluster: Cluster) -> None:
    url = cluster.queue_url(lease="2")
    async with await opened(url) as queue:
        bodies = {b"%d" % number for number in range(500)}
        await queue.send_many([Message(body) for body in bodies])
        lost = await cluster.leader(url)
        await asyncio.to_thread(lost.kill)
        try:
            # Its disk with it: what is left are two copies.
            await asyncio.to_thread(shutil.rmtree, lost.data_dir)
            load = Load(queue, queue)
            load.confirmed |= bodies
            load.stop()
            async with asyncio.timeout(2 * ELECTION):
                await load.send()
                await load.receive()
            # What the server handed over, and its word came first, was dropped, until it had been
            # handed over too often.
            assert await when_led(queue.dead_letters) == []
        finally:
            await asyncio.to_thread(lost.start)
    assert set(load.received) == bodies


@pytest.mark.timeout(300)
async def test_nothing_is_lost_while_one_node_after_another_goes_and_comes_back(
    cluster: Cluster,
) -> None:
    url = cluster.queue_url(lease="2")
    async with await opened(url) as queue:
        load = Load(queue, queue)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.send())
            tasks.create_task(load.receive())
            await load.confirms_more()
            for number in range(6):
                # Whoever leads, and whoever only follows or is who we are connected to.
                leader = await cluster.leader(url)
                at = (cluster.servers.index(leader) + number) % 3
                victim = cluster.servers[at]
                if number % 2:
                    await asyncio.to_thread(victim.pause)
                    await load.confirms_more()
                    await asyncio.to_thread(victim.resume)
                else:
                    await asyncio.to_thread(victim.kill)
                    await load.confirms_more()
                    await asyncio.to_thread(victim.start)
                await load.confirms_more()
            load.stop()
    assert load.confirmed <= set(load.received)
    assert load.silence < ELECTION
