"""What only the Redis driver's queues have: a server that many share, and that forgets."""

import asyncio
import secrets

import pytest
import redis

from molva.messaging import (
    Message,
    Queue,
    QueueNotFoundError,
    UnavailableError,
    open_queue,
    with_options,
)
from molva.messaging.conformance import PATIENCE, bodies
from molva.messaging.drivers import _redis_queue
from tests.brokers import private_redis


@pytest.fixture
def url(redis_url: str) -> str:
    return with_options(redis_url, prefix=f"test-{secrets.token_hex(6)}", queue="q")


async def take(queue: Queue, number: int) -> list[bytes]:
    found: list[bytes] = []
    async with asyncio.timeout(PATIENCE):
        while len(found) < number:
            for delivery in await queue.receive(number - len(found)):
                found.append(delivery.message.body)
                await delivery.ack()
    return found


async def test_nine_numbers_are_pushed_and_popped_in_order(url: str) -> None:
    numbers = [b"%d" % number for number in range(1, 10)]
    async with await open_queue(url) as queue:
        for number in numbers:
            await queue.send(Message(number))

        popped = []
        for _ in numbers:
            popped += await take(queue, 1)

        assert popped == numbers
        assert await queue.receive(wait=0.0) == []


async def test_what_is_acknowledged_leaves_nothing_in_the_server(url: str, redis_url: str) -> None:
    async with await open_queue(url) as queue:
        await queue.send_many([Message(b"%d" % n, delay=0.01 * (n % 3)) for n in range(300)])
        await take(queue, 300)
        prefix = url.partition("prefix=")[2].partition("&")[0]
        with redis.Redis.from_url(redis_url) as client:
            kept = {
                key.decode().rpartition(":")[2]: client.memory_usage(key)
                for key in client.scan_iter(match=f"{prefix}:*", count=10_000)
            }
        # The names of the sets and what keeps them indexed; nothing of any message.
        assert set(kept) == {"info", "held", "turns"}
        assert sum(kept.values()) < 2_000


async def test_one_message_wakes_one_of_many_consumers(url: str) -> None:
    queues = [await open_queue(url) for _ in range(5)]
    waiting = [asyncio.create_task(queue.receive(wait=4.0)) for queue in queues]
    await asyncio.sleep(0.2)
    await queues[0].send(Message(b"1"))
    found = await asyncio.gather(*waiting)
    assert sorted(map(len, found)) == [0, 0, 0, 0, 1]
    for queue in queues:
        await queue.close()


async def test_a_cancelled_wait_leaves_its_wake_up_to_another(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_redis_queue, "_LOOK", 60.0)
    gone, waits = await open_queue(url), await open_queue(url)
    # Who has waited longest is woken first, also where nobody waits there any more.
    cancelled = asyncio.create_task(gone.receive(wait=PATIENCE))
    await asyncio.sleep(0.2)
    cancelled.cancel()
    waiting = asyncio.create_task(waits.receive(wait=PATIENCE))
    await asyncio.sleep(0.2)

    await waits.send(Message(b"1"))

    async with asyncio.timeout(PATIENCE / 2):
        assert bodies(await waiting) == [b"1"]
    await gone.close()
    await waits.close()


async def test_an_idle_consumer_asks_seldom(url: str, redis_url: str) -> None:
    async with await open_queue(url) as queue:
        with redis.Redis.from_url(redis_url) as client:
            await queue.receive(wait=0.0)
            before = client.info("stats")["total_commands_processed"]
            assert await queue.receive(wait=2.5) == []
            asked = client.info("stats")["total_commands_processed"] - before
        assert asked < 60  # functions count what they call


async def test_functions_that_were_flushed_are_loaded_again() -> None:
    with private_redis() as server:
        url = with_options(server.url, queue="q")
        async with await open_queue(url) as queue:
            await queue.send(Message(b"1"))
            with redis.Redis.from_url(server.url) as client:
                client.execute_command("FUNCTION", "FLUSH")
                client.script_flush()
                assert client.execute_command("FUNCTION", "LIST") == []
            await queue.send(Message(b"2"))
            assert await take(queue, 2) == [b"1", b"2"]


async def test_a_wiped_server_is_an_empty_queue() -> None:
    with private_redis() as server:
        url = with_options(server.url, queue="q")
        strict = await open_queue(url)
        await strict.close()
        strict = await open_queue(url + "&create=never")
        async with await open_queue(url + "&discipline=fifo") as queue:
            await queue.send_many([Message(b"1"), Message(b"2")])
            [lost] = await queue.receive()
            with redis.Redis.from_url(server.url) as client:
                client.flushall()

            with pytest.raises(QueueNotFoundError, match="create=never"):
                await strict.send(Message(b"3"))
            await queue.send(Message(b"4"))
            assert await take(queue, 1) == [b"4"]
            with pytest.raises(Exception, match="held by another consumer"):
                await lost.ack()
        await strict.close()


async def test_a_message_is_never_in_a_client_only(url: str, redis_url: str) -> None:
    """Whatever becomes of a consumer, the server still has what it took."""
    async with await open_queue(url + "&lease=2") as heir:
        await heir.send_many([Message(b"%d" % n) for n in range(50)])
        doomed = await open_queue(url + "&lease=2")
        assert len(await doomed.receive(50)) == 50
        stat = await heir.stat()
        assert stat is not None
        assert (stat.pending, stat.held) == (50, 50)
        await doomed._driver._link.close()  # type: ignore[attr-defined]
        assert len(await take(heir, 50)) == 50
        await doomed.close()


async def test_a_full_memory_refuses_what_is_sent_and_lets_consumers_go_on() -> None:
    with private_redis() as server:
        url = with_options(server.url, queue="q")
        async with await open_queue(url) as queue:
            await queue.send_many([Message(bytes(10_000)) for _ in range(100)])
            with redis.Redis.from_url(server.url) as client:
                client.config_set("maxmemory", client.info("memory")["used_memory"] - 100_000)
                with pytest.raises(UnavailableError, match="memory is full"):
                    await queue.send(Message(b"1"))
                assert len(await take(queue, 100)) == 100
                async with asyncio.timeout(PATIENCE):
                    while True:
                        try:
                            await queue.send(Message(b"2"))
                            break
                        except UnavailableError:
                            await asyncio.sleep(0.1)  # what was deleted is freed by and by
                client.config_set("maxmemory", 0)
            assert await take(queue, 1) == [b"2"]
