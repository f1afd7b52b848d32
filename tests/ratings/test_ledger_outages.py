"""Ledgers on servers that are killed, paused, full, or not what they should be.

Each test has a server of its own. No call may hang, none may lose a rating that was
applied, and none may need a restart of ours.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from molva.ratings.ledger import (
    Ledger,
    LedgerError,
    LedgerServerError,
    LedgerUnavailableError,
    LedgerURLError,
    LedgerVersionError,
    migrate_ledger,
    open_ledger,
)
from tests.brokers import Server, make_certificates, private_postgresql, private_redis
from tests.ratings.ledger_suite.harness import differences
from tests.ratings.ledger_suite.submissions import APPLIED, DUPLICATE, apply, rating, ratings

# Seconds within which opening a ledger that cannot be opened has failed.
OPENING = 10.0

Private = Callable[..., contextlib.AbstractContextManager[Server]]
BOTH: dict[str, Private] = {"postgresql": private_postgresql, "redis": private_redis}


@pytest.fixture(params=BOTH)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with BOTH[request.param]() as server:
        yield server


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[Ledger]:
    ledger = await open_ledger(url)
    try:
        yield ledger
    finally:
        await ledger.close()


async def applied_at_last(ledger: Ledger, *, first: int, count: int, seconds: float = 30.0) -> None:
    """Apply as a worker does, until it succeeds."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                outcomes = await apply(ledger, *ratings(first, count))
            except LedgerUnavailableError:
                await asyncio.sleep(0.1)
            else:
                assert set(outcomes) <= {APPLIED, DUPLICATE}
                return


# ------------------------------------------------------------------------- outages


async def test_a_killed_server_is_met_again_without_a_loss(server: Server) -> None:
    async with opened(server.url) as ledger:
        for at in range(3):
            await applied_at_last(ledger, first=1 + at * 100, count=100)
            await asyncio.to_thread(server.kill)
            with pytest.raises(LedgerUnavailableError):
                await apply(ledger, *ratings(1, 5))
            with pytest.raises(LedgerUnavailableError):
                await ledger.total("c", n=5)
            await asyncio.to_thread(server.restart)
        await applied_at_last(ledger, first=1, count=300)
        assert await ledger.last_seq("c") == 300
        assert await differences(ledger) == []


async def test_batches_through_kills_are_counted_once(server: Server) -> None:
    async with opened(server.url) as one, opened(server.url) as other:
        done = asyncio.Event()
        batches = 0

        async def write(ledger: Ledger) -> None:
            nonlocal batches
            for first in range(1, 4_001, 50):
                await applied_at_last(ledger, first=first, count=50)
                batches += 1
                await asyncio.sleep(0.01)

        async def kill() -> None:
            while not done.is_set():
                before = batches
                await asyncio.sleep(0.4)
                # By the clock alone a slow machine would get nowhere.
                while batches < before + 8 and not done.is_set():
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.restart)

        killing = asyncio.create_task(kill())
        await asyncio.gather(write(one), write(other))
        done.set()
        await killing
        await applied_at_last(one, first=1, count=1)
        assert await one.last_seq("c") == 4_000
        found = await one.total("c", n=4_000)
        assert found is not None
        assert found.sum == sum(i % 11 for i in range(1, 4_001))
        assert await differences(one) == []


async def test_a_paused_server_holds_nobody_up_for_long(server: Server) -> None:
    async with opened(f"{server.url}?timeout=3" if "post" in server.url else server.url) as ledger:
        await apply(ledger, *ratings(1, 100))
        server.pause()
        try:
            for call in (
                lambda: ledger.total("c", n=5),
                lambda: apply(ledger, *ratings(101, 50)),
                lambda: ledger.last_seq("c"),
            ):
                began = time.monotonic()
                with pytest.raises(LedgerUnavailableError):
                    await call()
                assert time.monotonic() - began < 15.0
            with pytest.raises(LedgerUnavailableError):
                await asyncio.wait_for(open_ledger(server.url), OPENING)
        finally:
            server.resume()
        await applied_at_last(ledger, first=101, count=50)
        assert await ledger.last_seq("c") == 150
        assert await differences(ledger) == []


async def test_many_reads_of_a_paused_server_all_end(server: Server) -> None:
    async with opened(f"{server.url}?timeout=2" if "post" in server.url else server.url) as ledger:
        await apply(ledger, *ratings(1, 10))
        server.pause()
        began = time.monotonic()
        try:
            reads = [asyncio.ensure_future(ledger.last_seq("c")) for _ in range(20)]
            done, waiting = await asyncio.wait(reads, timeout=60.0)
        finally:
            server.resume()
        assert not waiting
        # One after the other they would take forty, and of Redis a hundred.
        assert time.monotonic() - began < 20.0
        assert all(isinstance(read.exception(), LedgerUnavailableError) for read in done)


# --------------------------------------------------------------------- PostgreSQL


async def statement(url: str, *statements: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(url.partition("?")[0])
    try:
        found: list[asyncpg.Record] = []
        for text in statements:
            found = await connection.fetch(text)
        return found
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("settings", "survived"),
    [
        ({}, {"kill", "power"}),
        ({"synchronous_commit": "off"}, set()),
        ({"fsync": "off"}, {"kill"}),
        ({"full_page_writes": "off"}, {"kill"}),
        ({"synchronous_commit": "local"}, {"kill", "power"}),
    ],
)
async def test_what_is_survived_is_asked_of_the_server(
    settings: dict[str, Any], survived: set[str]
) -> None:
    with private_postgresql(**settings) as server:
        async with opened(server.url) as ledger:
            assert ledger.capabilities.survives == survived


async def test_a_role_that_commits_asynchronously_survives_nothing() -> None:
    with private_postgresql() as server:
        await statement(server.url, "ALTER ROLE molva SET synchronous_commit = off")
        async with opened(server.url) as ledger:
            assert ledger.capabilities.survives == frozenset()


async def test_a_server_that_promises_less_than_before_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with private_postgresql() as server:
        async with opened(server.url) as ledger:
            await apply(ledger, *ratings(1, 10))
            await statement(server.url, "ALTER ROLE molva SET synchronous_commit = off")
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.restart)
            await applied_at_last(ledger, first=11, count=10)
            assert ledger.capabilities.survives == frozenset()
    assert any("does not survive kill, power any more" in line for line in caplog.messages)


async def test_a_server_that_follows_is_unavailable_until_it_leads() -> None:
    with private_postgresql() as server:
        async with opened(server.url) as ledger:
            await apply(ledger, *ratings(1, 10))
            await statement(server.url, "ALTER ROLE molva SET default_transaction_read_only = on")
            async with opened(server.url) as behind:
                with pytest.raises(LedgerUnavailableError, match="takes no writes"):
                    await apply(behind, *ratings(11, 10))
                assert await behind.last_seq("c") == 10, "reads go on"
                await statement(
                    server.url,
                    "SET default_transaction_read_only = off",
                    "ALTER ROLE molva SET default_transaction_read_only = off",
                )
                await applied_at_last(behind, first=11, count=10)
                assert await behind.last_seq("c") == 20


async def test_a_connection_that_is_cut_is_made_again() -> None:
    with private_postgresql() as server:
        async with opened(server.url) as ledger:
            await apply(ledger, *ratings(1, 10))
            await statement(
                server.url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'",
            )
            await applied_at_last(ledger, first=11, count=10, seconds=20)
            assert await ledger.last_seq("c") == 20


async def test_a_writer_that_stops_in_a_transaction_holds_the_campaign_for_seconds_only() -> None:
    with private_postgresql() as server:
        async with opened(server.url) as ledger:
            await apply(ledger, *ratings(1, 10))
            stopped = await asyncpg.connect(server.url)
            began = time.monotonic()
            # What a careful batch begins with; then its process is stopped.
            await stopped.execute(
                "BEGIN; SET LOCAL idle_in_transaction_session_timeout = '5s'; "
                "SELECT FROM molva_ledger.campaign FOR NO KEY UPDATE"
            )
            assert set(await apply(ledger, *ratings(11, 10))) == {APPLIED}
            assert time.monotonic() - began > 4.5, "nothing was held: proves nothing"
            stopped.terminate()


async def test_no_prepared_statement_is_kept_where_none_may_be() -> None:
    with private_postgresql() as server:
        async with opened(f"{server.url}?statement_cache_size=0&connections=1") as ledger:
            for at in range(1, 50, 7):
                await apply(ledger, *ratings(at, 10))
            assert await differences(ledger) == []


async def test_an_unmigrated_schema_is_said_and_left_alone() -> None:
    with private_postgresql() as server:
        with pytest.raises(LedgerVersionError, match="molva migrate"):
            await open_ledger(f"{server.url}?create=never")
        assert await migrate_ledger(server.url) == (0, 1)
        async with opened(f"{server.url}?create=never") as ledger:
            await apply(ledger, rating(1, 5))
        await statement(server.url, "UPDATE molva_ledger.molva SET version = 0")
        with pytest.raises(LedgerVersionError, match=r"of version 0.*molva migrate"):
            await open_ledger(server.url)
        await statement(server.url, "UPDATE molva_ledger.molva SET version = 99")
        with pytest.raises(LedgerVersionError, match=r"version 99.*upgrade"):
            await open_ledger(server.url)
        with pytest.raises(LedgerVersionError, match=r"version 99.*upgrade"):
            await migrate_ledger(server.url)


async def test_a_schema_of_something_else_is_left_alone() -> None:
    with private_postgresql() as server:
        await statement(server.url, "CREATE SCHEMA molva_ledger", "CREATE TABLE molva_ledger.t ()")
        with pytest.raises(LedgerVersionError, match="something else"):
            await open_ledger(server.url)


async def test_a_role_without_rights_is_told_who_must_migrate() -> None:
    with private_postgresql() as server:
        await statement(server.url, "CREATE ROLE clerk LOGIN")
        with pytest.raises(LedgerURLError, match=r"permission denied.*molva migrate"):
            await open_ledger(server.url.replace("//molva@", "//clerk@"))


async def test_a_database_of_another_encoding_is_refused() -> None:
    with private_postgresql() as server:
        await statement(
            server.url,
            "CREATE DATABASE odd ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0",
        )
        with pytest.raises(LedgerServerError, match="LATIN1"):
            await open_ledger(server.url.removesuffix("molva") + "odd")


async def test_a_server_that_is_too_old_is_told_from_which_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("molva._base.postgresql._OLDEST_VERSION", 99)
    with private_postgresql() as server, pytest.raises(LedgerServerError, match="from 99 on"):
        await open_ledger(server.url)


async def test_a_name_that_postgresql_cannot_keep_fails_alone() -> None:
    with private_postgresql() as server:
        async with opened(server.url) as ledger:
            outcomes = await apply(ledger, rating(1, 5), rating(2, 5, "a\0b"), rating(3, 5))
            assert [outcomes[0], outcomes[2]] == [APPLIED, APPLIED]
            assert "U+0000" in str(outcomes[1])


# -------------------------------------------------------------------------- Redis


@pytest.mark.parametrize(
    ("settings", "survived"),
    [
        ({}, {"kill", "power"}),
        ({"appendfsync": "everysec"}, set()),
        ({"appendonly": "no"}, set()),
        ({"no_appendfsync_on_rewrite": "yes"}, {"kill"}),
        ({"rename_command": 'CONFIG" "'}, set()),
    ],
    # Not ids=str: a set is written in an order of its own in every process, and two processes
    # that share the tests must collect the same names.
    ids=["durable", "every second", "no append file", "not during a rewrite", "not to be asked"],
)
async def test_what_redis_survives_is_asked_of_it(
    settings: dict[str, Any], survived: set[str]
) -> None:
    with private_redis(**settings) as server:
        async with opened(server.url) as ledger:
            assert ledger.capabilities.survives == survived


async def test_a_redis_that_may_evict_is_refused() -> None:
    with (
        private_redis(maxmemory="64mb", maxmemory_policy="volatile-lru") as server,
        pytest.raises(LedgerServerError, match=r"volatile-lru.*noeviction"),
    ):
        await open_ledger(server.url)


async def test_a_full_redis_refuses_the_batch_until_there_is_room() -> None:
    with private_redis(maxmemory="4mb", maxmemory_policy="noeviction") as server:
        async with opened(server.url) as ledger, Redis.from_url(server.url) as client:
            applied = 0
            refusal: LedgerUnavailableError | None = None
            while refusal is None:
                try:
                    await apply(ledger, *ratings(applied + 1, 200))
                    applied += 200
                except LedgerUnavailableError as error:
                    refusal = error
            assert "memory is full" in str(refusal)
            assert await ledger.last_seq("c") == applied
            await client.config_set("maxmemory", "64mb")
            await applied_at_last(ledger, first=applied + 1, count=200)
            assert await ledger.last_seq("c") == applied + 200
            assert await differences(ledger) == []


async def test_a_redis_that_became_a_replica_is_unavailable() -> None:
    with private_redis() as server:
        async with opened(server.url) as ledger, Redis.from_url(server.url) as client:
            await apply(ledger, *ratings(1, 10))
            await client.replicaof("127.0.0.1", "1")
            with pytest.raises(LedgerUnavailableError, match="replica"):
                await apply(ledger, *ratings(11, 10))
            await client.replicaof("NO", "ONE")
            await applied_at_last(ledger, first=11, count=10)
            assert await ledger.last_seq("c") == 20


async def test_functions_that_were_flushed_are_loaded_again() -> None:
    with private_redis() as server:
        async with opened(server.url) as ledger, Redis.from_url(server.url) as client:
            await apply(ledger, *ratings(1, 10))
            await client.function_flush("SYNC")
            assert set(await apply(ledger, *ratings(11, 10))) == {APPLIED}
            assert await ledger.last_seq("c") == 20


async def test_a_log_that_is_rewritten_loses_nothing() -> None:
    with private_redis() as server:
        async with opened(server.url) as ledger, Redis.from_url(server.url) as client:
            for at in range(5):
                await apply(ledger, *ratings(1 + at * 200, 200))
                with contextlib.suppress(ResponseError):  # one is under way
                    await client.bgrewriteaof()
            await asyncio.sleep(0.5)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.restart)
            await applied_at_last(ledger, first=1, count=1_000)
            assert await ledger.last_seq("c") == 1_000


async def test_ids_are_known_for_the_whole_horizon_and_no_longer_than_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("molva.ratings.ledger.redis._SHORTEST_HORIZON", 1)
    with private_redis() as server:
        async with opened(f"{server.url}?horizon=4") as ledger:
            # Whoever asks too late, because a process stood still, learns nothing: a new id.
            for id_ in (1, 2, 3):
                if await seconds_known(ledger, id_, at_least=3.5, horizon=4.0) >= 3.5:
                    break
            else:
                pytest.fail("three times too slow to ask within the horizon")
            # Four stretches of a second and the one in which it came.
            await asyncio.sleep(2.5)
            async with Redis.from_url(server.url) as client:
                assert await client.keys("molva:*:ids:*") == []
            assert await apply(ledger, rating(id_, 5)) == [APPLIED]


async def seconds_known(ledger: Ledger, id_: int, *, at_least: float, horizon: float) -> float:
    """Apply a rating again and again; return when it was last found known for certain."""
    began = time.monotonic()
    known = 0.0
    assert await apply(ledger, rating(id_, 5)) == [APPLIED]
    while known < at_least:
        found = await apply(ledger, rating(id_, 5))
        passed = time.monotonic() - began
        if passed >= horizon:
            break
        assert found == [DUPLICATE]
        known = passed
        await asyncio.sleep(0.2)
    return known


async def test_a_horizon_that_is_too_short_is_refused() -> None:
    with pytest.raises(LedgerURLError, match=r"horizon='3600' is refused; at least 90,000"):
        await open_ledger("redis://127.0.0.1:1/0?horizon=3600")


async def test_hours_are_counted() -> None:
    from molva.ratings.ledger.redis import HourlyCount, RedisLedger

    with private_redis() as server:
        async with opened(server.url) as ledger:
            assert isinstance(ledger, RedisLedger)
            day = int(time.time() // 86_400) - 1
            for hour, batch in ((3, [rating(1, 5, "a"), rating(2, 7)]), (9, [rating(3, 1, "a")])):
                at = (day * 24 + hour) * 3_600_000_000
                await ledger.apply(batch, applied_at_us=at)
            hours = await ledger.by_hour("c", day=day)
            assert hours == [HourlyCount(day * 24 + 3, 2, 12), HourlyCount(day * 24 + 9, 1, 1)]
            hours = await ledger.by_hour("c", item="a", day=day)
            assert hours == [HourlyCount(day * 24 + 3, 1, 5), HourlyCount(day * 24 + 9, 1, 1)]


# ------------------------------------------------------------------------- opening


@pytest.mark.parametrize("scheme", ["postgresql", "redis"])
async def test_a_wrong_port_is_said_in_time(scheme: str) -> None:
    async with asyncio.timeout(OPENING):
        with pytest.raises(LedgerUnavailableError, match=r"127.0.0.1:1"):
            await open_ledger(f"{scheme}://ann:s3cret@127.0.0.1:1/0")


@pytest.mark.parametrize("kind", BOTH)
async def test_a_wrong_password_is_said_and_not_shown(kind: str) -> None:
    with BOTH[kind](password="right") as server:
        async with opened(server.url) as ledger:
            await apply(ledger, rating(1, 5))
        async with asyncio.timeout(OPENING):
            with pytest.raises(LedgerURLError) as caught:
                await open_ledger(server.url.replace("right", "s3cret"))
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "variable"), [("postgresql", "PGPASSWORD"), ("redis", "MOLVA_REDIS_PASSWORD")]
)
async def test_a_password_may_stand_in_the_environment(
    kind: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BOTH[kind](password="right") as server:
        monkeypatch.setenv(variable, "right")
        async with opened(server.url.replace(":right", "", 1)) as ledger:
            assert await apply(ledger, rating(1, 5)) == [APPLIED]


async def test_a_missing_database_is_said() -> None:
    with private_postgresql() as server, pytest.raises(LedgerURLError, match="does not exist"):
        await open_ledger(server.url.removesuffix("molva") + "nowhere")


@pytest.mark.parametrize(
    ("kind", "options"), [("postgresql", "sslmode=verify-full&sslrootcert={}"), ("redis", "ca={}")]
)
async def test_a_certificate_is_checked(kind: str, options: str, tmp_path: Path) -> None:
    right = make_certificates(tmp_path / "right")
    other = make_certificates(tmp_path / "other", names=("elsewhere.example",))
    with BOTH[kind](certificates=right) as server:
        url = server.url.partition("?")[0]
        async with opened(f"{url}?{options.format(right.authority)}") as ledger:
            assert await apply(ledger, rating(1, 5)) == [APPLIED]
        async with asyncio.timeout(OPENING):
            with pytest.raises(LedgerURLError, match=r"(?i)certificate"):
                await open_ledger(f"{url}?{options.format(other.authority)}")
    with BOTH[kind](certificates=other) as server:
        url = server.url.partition("?")[0]
        async with asyncio.timeout(OPENING):
            with pytest.raises(LedgerURLError, match=r"(?i)certificate"):
                await open_ledger(f"{url}?{options.format(other.authority)}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://host", "names no database"),
        ("postgresql://host/db?scheme=x", "did you mean 'schema'"),
        ("postgresql://host/db?schema=pg_x", "does not begin with pg_"),
        ("postgresql://host/db?create=no", "one of auto, never"),
        ("postgresql://host/db?connections=0", "at least 1"),
        ("redis://host/x", "no number of a database"),
        ("redis://host/0?prefix={a}", "without braces"),
        ("redis://host/0?horizn=1", "did you mean 'horizon'"),
    ],
)
async def test_a_url_that_names_no_ledger_is_refused(url: str, message: str) -> None:
    with pytest.raises(LedgerURLError, match=message):
        await open_ledger(url)


@pytest.mark.parametrize(("kind", "library"), [("postgresql", "asyncpg"), ("redis", "redis")])
async def test_a_missing_library_is_named_with_its_extra(
    kind: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in [n for n in sys.modules if n.split(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [n for n in sys.modules if n.startswith(("molva._base.", "molva.ratings.ledger."))]:
        if kind in name:
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(LedgerError, match=rf"{library}.* is not installed: .*molva\[{kind}\]"):
        await open_ledger(f"{kind}://127.0.0.1/0")
