"""Redis servers that are wrong, old, full, gone, or come back."""

import asyncio
import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import redis

from molva._base import redis_server
from molva.messaging import (
    Delivery,
    IncompatibleBrokerError,
    InvalidURLError,
    Message,
    UnavailableError,
    open_queue,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.conformance import PATIENCE, eventually
from tests.brokers import make_certificates, private_redis
from tests.messaging.servers import (
    Unreachable,
    both_ends,
    lose_nothing_while_killed,
    refusal,
    send_surely,
)

# Opening --------------------------------------------------------------------------------------


class TestUnreachableRedis(Unreachable):
    """A server that is not there, or says nothing."""

    scheme = "redis"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis://", "no host"),
        ("redis://127.0.0.1:70000", "port is 1 to 65535"),
        ("redis://a:1,b:2", "no host of one server"),
        ("redis://127.0.0.1/zero", "no number of a database"),
        ("redis://127.0.0.1?ca=/x.pem", "write rediss://"),
        ("redis://127.0.0.1?prefix={x}", "without braces"),
        ("redis://127.0.0.1?lease=0", "above 0"),
        ("redis://127.0.0.1?start=latest", "for a topic"),
        ("redis://127.0.0.1?prefx=x", r"did you mean 'prefix'\?"),
        ("rediss://127.0.0.1?ca=/missing.pem", "missing.pem"),
    ],
)
async def test_a_url_that_cannot_be_right_is_refused_before_anybody_is_asked(
    url: str, problem: str
) -> None:
    with pytest.raises(InvalidURLError, match=problem):
        await open_queue(with_options(url, queue="q"))


async def test_a_wrong_password_says_where_the_right_one_belongs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with private_redis(password="right-s3cret") as server:
        bare = f"redis://127.0.0.1:{server.port}/0"
        for url in (bare, f"redis://:wr0ng-s3cret@127.0.0.1:{server.port}/0"):
            error = await refusal(url)
            assert isinstance(error, InvalidURLError)
            assert "MOLVA_REDIS_PASSWORD" in str(error)
            assert "s3cret" not in f"{error} {error!r} {error.__cause__!r} {caplog.text}"

        async with await open_queue(with_options(server.url, queue="q")) as queue:
            assert "s3cret" not in repr(queue)
        monkeypatch.setenv("MOLVA_REDIS_PASSWORD", "right-s3cret")
        async with await open_queue(with_options(bare, queue="q")) as queue:
            await queue.send(Message(b"1"))


async def test_a_user_needs_rights_and_is_told_so() -> None:
    with private_redis(password="admin") as server:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command(
                "ACL", "SETUSER", "app", "on", ">pw", "~molva:*", "+@all", "-config"
            )
            client.execute_command("ACL", "SETUSER", "mute", "on", ">pw", "~molva:*", "+info")
        good = f"redis://app:pw@127.0.0.1:{server.port}/0"
        async with await open_queue(with_options(good, queue="q")) as queue:
            # It may not ask how the server keeps what it stores: then nothing is promised.
            assert queue.capabilities.survives == frozenset()
            await queue.send(Message(b"1"))
        error = await refusal(f"redis://mute:pw@127.0.0.1:{server.port}/0")
        assert isinstance(error, InvalidURLError)
        assert "permissions" in str(error)


async def test_a_certificate_must_carry_the_hosts_name(tmp_path: Path) -> None:
    right = make_certificates(tmp_path / "right")
    wrong = make_certificates(tmp_path / "wrong", ("elsewhere.example",))
    with private_redis(certificates=right) as server:
        ca = {"ca": str(right.authority), "queue": "q"}
        async with await open_queue(with_options(server.url, **ca)) as queue:
            await queue.send(Message(b"1"))
            [delivery] = await queue.receive()
            await delivery.ack()
        unknown = await refusal(server.url)
        assert isinstance(unknown, InvalidURLError)
        assert "certificate" in str(unknown)
        assert isinstance(
            await refusal(server.url.replace("rediss://", "redis://")), UnavailableError
        )
    with private_redis(certificates=wrong) as server:
        error = await refusal(with_options(server.url, ca=str(wrong.authority)))
        assert isinstance(error, InvalidURLError)
        assert "certificate is refused" in str(error)


async def test_a_server_that_is_too_old_is_told_from_which_version(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_server, "_OLDEST", (99, 0))
    error = await refusal(redis_url)
    assert isinstance(error, IncompatibleBrokerError)
    assert "functions are needed" in str(error)


async def test_a_server_that_evicts_is_refused() -> None:
    with private_redis(maxmemory="100mb", maxmemory_policy="allkeys-lru") as server:
        error = await refusal(server.url)
        assert isinstance(error, IncompatibleBrokerError)
        assert "noeviction" in str(error)


async def test_something_else_under_our_keys_is_named() -> None:
    with private_redis() as server:
        with redis.Redis.from_url(server.url) as client:
            client.set("molva:{queue:q}:info", "something")
        error = await refusal(server.url)
        assert isinstance(error, IncompatibleBrokerError)
        assert "prefix=" in str(error)


@pytest.mark.parametrize(
    ("settings", "survives"),
    [
        ({"appendfsync": "always"}, {"kill", "power"}),
        ({"appendfsync": "always", "no_appendfsync_on_rewrite": "yes"}, {"kill"}),
        ({"appendfsync": "no"}, {"kill"}),
        ({"appendfsync": "everysec"}, set()),
        ({"appendonly": "no"}, set()),
    ],
)
async def test_what_is_survived_is_asked_of_the_server(
    settings: dict[str, Any], survives: set[str]
) -> None:
    with private_redis(**settings) as server:
        async with await open_topic(with_options(server.url, topic="t")) as topic:
            assert topic.capabilities.survives == survives
        async with await open_queue(with_options(server.url, queue="q")) as queue:
            assert queue.capabilities.survives == survives


async def test_a_replica_is_refused_at_open_and_when_it_becomes_one() -> None:
    with private_redis() as server, private_redis() as primary:
        async with await open_queue(with_options(server.url, queue="q")) as queue:
            await queue.send(Message(b"1"))
            with redis.Redis.from_url(server.url) as client:
                client.replicaof("127.0.0.1", primary.port)
                with pytest.raises(UnavailableError, match=r"replica|loading|primary"):
                    await queue.send(Message(b"2"))
                error = await refusal(server.url)
                assert isinstance(error, UnavailableError)
                assert "replica" in str(error)
                client.replicaof("NO", "ONE")
            async with asyncio.timeout(PATIENCE):
                await queue.send(Message(b"3"))


# Going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topic", "queue"])
async def test_nothing_confirmed_is_lost_while_the_server_is_killed_under_100_publishers(
    kind: str,
) -> None:
    with private_redis() as server:
        await lose_nothing_while_killed(kind, server)


@pytest.mark.parametrize("kind", ["topic", "queue"])
async def test_connections_that_are_killed_lose_nothing_and_repeat_nothing_acked(kind: str) -> None:
    with private_redis() as server:
        sender, consumer = await both_ends(kind, server.url, "30")
        got: set[bytes] = set()

        async def receive() -> None:
            while True:
                with contextlib.suppress(UnavailableError):
                    deliveries = await consumer.receive(5, wait=1.0)
                    got.update(delivery.message.body for delivery in deliveries)
                    for delivery in deliveries:
                        await delivery.ack()

        receiving = asyncio.create_task(receive())
        with redis.Redis.from_url(server.url) as client:
            for n in range(200):
                if n % 10 == 5:
                    client.client_kill_filter(_type="normal", skipme=True)
                await send_surely(sender, Message(b"%d" % n))
        if kind == "topic":
            # Leases are long: only asking for what was lost on the way finds it in time.
            await eventually(lambda: len(got) == 200)
        else:
            found = await _all_but_the_lost(got, server.url)
            assert found == 200
        receiving.cancel()
        await asyncio.wait([receiving])
        await sender.close()
        await consumer.close()


async def _all_but_the_lost(got: set[bytes], url: str) -> int:
    """Return how many were got, or are held under a lease of who never heard of them."""
    async with await open_queue(with_options(url, queue="q")) as queue:
        for _ in range(100):
            stat = await queue.stat()
            assert stat is not None
            if len(got) + stat.held >= 200 and not stat.ready:
                break
            await asyncio.sleep(0.05)
        return len(got | {peeked.message.body for peeked in await queue.peek(300)})


async def test_a_server_that_is_away_costs_no_memory_and_no_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with private_redis() as server:
        url = with_options(server.url, topic="t")
        async with (
            await open_topic(url) as topic,
            await open_subscription(url + "&subscription=s") as subscription,
        ):
            # Not while it opens, which may take longer.
            monkeypatch.setattr(redis_server, "_TIMEOUT", 0.5)
            server.pause()
            waiting = asyncio.create_task(subscription.receive(wait=1.0))
            sends = [asyncio.create_task(topic.send(Message(b"%d" % n))) for n in range(12_000)]
            results = await asyncio.gather(*sends, return_exceptions=True)
            # What does not fit is refused at once, the rest when there is no answer.
            assert Counter(type(r).__name__ for r in results)["QueueFullError"] >= 1_000
            assert not [r for r in results if r is None]
            with pytest.raises(UnavailableError):
                await waiting
            server.resume()
            async with asyncio.timeout(PATIENCE):
                await send_surely(topic, Message(b"again"))
                found: list[Delivery] = []
                while not found:
                    # It may still be connecting.
                    with contextlib.suppress(UnavailableError):
                        found = await subscription.receive(1_000)
            assert found
