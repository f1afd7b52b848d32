"""A server of a test's own: what each fault does to it, and the ways in."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import aiormq
import aiormq.exceptions
import asyncpg
import nats
import nats.js.errors
import psutil
import pytest
import redis
from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tests.brokers import (
    Server,
    make_certificates,
    private_kafka,
    private_nats,
    private_postgresql,
    private_rabbitmq,
    private_redis,
)
from tests.brokers.private import private_server

# Not a secret: it opens a server that lives for this test, on loopback.
PASSWORD = "throw-away"


@pytest.fixture(scope="module")
def own_redis() -> Iterator[Server]:
    with private_redis(appendfsync="everysec") as server:
        yield server


@pytest.fixture(scope="module")
def own_postgresql() -> Iterator[Server]:
    with private_postgresql(synchronous_commit="off") as server:
        yield server


@pytest.fixture(scope="module")
def own_kafka() -> Iterator[Server]:
    with private_kafka(message_max_bytes=2048) as server:
        yield server


@pytest.fixture(scope="module")
def own_nats() -> Iterator[Server]:
    with private_nats(max_payload=2048) as server:
        yield server


@pytest.fixture(scope="module")
def own_rabbitmq() -> Iterator[Server]:
    # Its start is the slowest of all: what is asked of it shares one.
    with private_rabbitmq(settings={"channel_max": 77}, hurried=True) as server:
        yield server


def redis_client(server: Server, **options: object) -> "redis.Redis":
    return redis.Redis.from_url(
        server.url, decode_responses=True, socket_timeout=5.0, retry=None, **options
    )


def kafka_settings(server: Server) -> dict[str, str | int | float | bool]:
    return {"bootstrap.servers": f"127.0.0.1:{server.port}"}


def test_settings_of_redis_reach_it(own_redis: Server) -> None:
    with redis_client(own_redis) as client:
        assert client.config_get("appendfsync") == {"appendfsync": "everysec"}


def test_settings_of_kafka_reach_it(own_kafka: Server) -> None:
    admin = AdminClient(kafka_settings(own_kafka))
    admin.create_topics([NewTopic("big", 1)])["big"].result(10)
    failed: list[str] = []
    producer = Producer(kafka_settings(own_kafka))
    producer.produce(
        "big",
        bytes(4096),
        on_delivery=lambda error, _: failed.append(error.name() if error else ""),
    )
    producer.flush(20)

    assert failed == ["MSG_SIZE_TOO_LARGE"]


async def test_settings_of_postgresql_reach_it(own_postgresql: Server) -> None:
    assert await ask(own_postgresql, "SHOW synchronous_commit") == "off"


async def test_settings_of_nats_reach_it(own_nats: Server) -> None:
    client = await nats.connect(own_nats.url)
    assert client.max_payload == 2048
    await client.close()


async def test_settings_of_rabbitmq_reach_it(own_rabbitmq: Server) -> None:
    async with aiormq.connect(own_rabbitmq.url) as connection:
        assert connection.connection_tune.channel_max == 77


def test_what_redis_holds_survives_a_kill(own_redis: Server) -> None:
    with redis_client(own_redis) as client:
        client.set("killed", "7")
        before = own_redis.url, own_redis.pid

        own_redis.kill()
        with pytest.raises(redis.ConnectionError):
            client.get("killed")
        own_redis.restart()

        assert client.get("killed") == "7"
    assert own_redis.url == before[0]
    assert own_redis.pid != before[1]


def test_a_paused_redis_keeps_its_connections_open_without_an_answer(own_redis: Server) -> None:
    with redis_client(own_redis) as client:
        client.ping()

        own_redis.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        own_redis.resume()

        assert client.ping()


async def test_what_postgresql_committed_survives_a_kill_of_all_its_processes(
    own_postgresql: Server,
) -> None:
    await ask(own_postgresql, "CREATE TABLE killed AS SELECT 7 AS rate")
    await ask(own_postgresql, "CHECKPOINT")  # synchronous_commit is off here
    helpers = own_postgresql.process.children()
    assert helpers

    await asyncio.to_thread(own_postgresql.kill)
    for helper in helpers:
        with contextlib.suppress(psutil.NoSuchProcess):
            # Ended, and perhaps not yet collected by the system's first process.
            assert helper.status() == psutil.STATUS_ZOMBIE
    await asyncio.to_thread(own_postgresql.restart)

    assert await ask(own_postgresql, "SELECT rate FROM killed") == 7


async def test_a_paused_postgresql_keeps_its_sessions_open_without_an_answer(
    own_postgresql: Server,
) -> None:
    connection = await asyncpg.connect(own_postgresql.url)
    try:
        own_postgresql.pause()
        answer = asyncio.ensure_future(connection.fetchval("SELECT 7"))
        done, _ = await asyncio.wait([answer], timeout=0.5)
        assert not done
        own_postgresql.resume()
        assert await answer == 7
    finally:
        own_postgresql.resume()
        await connection.close()


def test_a_topic_of_kafka_survives_a_kill(own_kafka: Server) -> None:
    admin = AdminClient(kafka_settings(own_kafka))
    admin.create_topics([NewTopic("killed", 2)])["killed"].result(10)

    own_kafka.kill()
    with pytest.raises(KafkaException):
        AdminClient({**kafka_settings(own_kafka), "log_level": 0}).list_topics(timeout=1)
    own_kafka.restart()

    delivered: list[object] = []
    producer = Producer(kafka_settings(own_kafka))
    producer.produce("killed", b"7", on_delivery=lambda error, _: delivered.append(error))
    producer.flush(20)
    assert delivered == [None]


async def test_what_jetstream_confirmed_survives_a_kill_of_its_server(own_nats: Server) -> None:
    client = await nats.connect(own_nats.url)
    stream = client.jetstream()
    await stream.add_stream(name="s", subjects=["s"])
    await stream.publish("s", b"7")
    await client.close()

    await asyncio.to_thread(own_nats.kill)
    with pytest.raises(OSError, match=str(own_nats.port)):
        await asyncio.open_connection("127.0.0.1", own_nats.port)
    await asyncio.to_thread(own_nats.restart)

    client = await nats.connect(own_nats.url)
    message = await client.jetstream().get_msg("s", 1)
    assert message.data == b"7"
    await client.close()


async def test_a_paused_nats_keeps_its_connections_open_without_an_answer(own_nats: Server) -> None:
    client = await nats.connect(own_nats.url)
    try:
        own_nats.pause()
        answer = asyncio.ensure_future(client.flush(timeout=20))
        done, _ = await asyncio.wait([answer], timeout=0.5)
        assert not done
        assert client.is_connected
        own_nats.resume()
        await answer
    finally:
        own_nats.resume()
        await client.close()


async def test_what_rabbitmq_confirmed_survives_a_kill_of_all_its_processes(
    own_rabbitmq: Server,
) -> None:
    async with aiormq.connect(own_rabbitmq.url) as connection:
        channel = await connection.channel()
        await channel.queue_declare("killed", durable=True)
        persistent = aiormq.spec.Basic.Properties(delivery_mode=2)
        await channel.basic_publish(b"7", routing_key="killed", properties=persistent)
    helpers = own_rabbitmq.process.children(recursive=True)
    assert {"epmd", "beam.smp"} <= {helper.name() for helper in helpers}

    await asyncio.to_thread(own_rabbitmq.kill)
    for helper in helpers:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert helper.status() == psutil.STATUS_ZOMBIE
    await asyncio.to_thread(own_rabbitmq.restart)

    async with aiormq.connect(own_rabbitmq.url) as connection:
        channel = await connection.channel()
        assert (await channel.basic_get("killed")).body == b"7"


async def test_a_paused_rabbitmq_keeps_its_connections_open_without_an_answer(
    own_rabbitmq: Server,
) -> None:
    async with aiormq.connect(own_rabbitmq.url) as connection:
        channel = await connection.channel()
        try:
            own_rabbitmq.pause()
            answer = asyncio.ensure_future(channel.queue_declare("paused", exclusive=True))
            done, _ = await asyncio.wait([answer], timeout=0.5)
            assert not done
        finally:
            own_rabbitmq.resume()
        assert (await answer).queue == "paused"


@pytest.mark.parametrize("name", ["redis", "nats"])
def test_nothing_of_a_private_server_stays(name: str) -> None:
    with private_server(name, {}) as server:
        folder, process = Path(server.data_dir).parent.parent, server.process
        assert folder.exists()

    assert not folder.exists()
    assert not process.is_running()


def test_redis_behind_tls_asks_for_its_password(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    with private_redis(password=PASSWORD, certificates=files) as server:
        assert server.url == f"rediss://:{PASSWORD}@127.0.0.1:{server.port}/0"
        with redis_client(server, ssl_ca_certs=str(files.authority)) as client:
            assert client.ping()
        with (
            redis.Redis(port=server.port, ssl=True, ssl_ca_certs=str(files.authority)) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()


def test_a_certificate_with_another_name_is_refused_by_a_careful_client(tmp_path: Path) -> None:
    files = make_certificates(tmp_path, ("other.example",))
    with (
        private_redis(certificates=files) as server,
        redis_client(server, ssl_ca_certs=str(files.authority)) as client,
        pytest.raises(redis.ConnectionError, match="certificate verify failed"),
    ):
        client.ping()


async def test_nats_behind_tls_asks_for_its_password(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    trust = ssl.create_default_context(cafile=str(files.authority))
    with private_nats(password=PASSWORD, certificates=files) as server:
        assert server.url == f"tls://molva:{PASSWORD}@127.0.0.1:{server.port}"
        client = await nats.connect(server.url, tls=trust, connect_timeout=20)
        assert (await client.jetstream().account_info()).streams == 0
        await client.close()
        with pytest.raises(Exception, match="Authorization Violation"):
            await nats.connect(
                f"tls://127.0.0.1:{server.port}",
                tls=trust,
                allow_reconnect=False,
                connect_timeout=20,
            )


async def test_rabbitmq_behind_tls_asks_for_its_password(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    trust = ssl.create_default_context(cafile=str(files.authority))
    with private_rabbitmq(password=PASSWORD, certificates=files, hurried=True) as server:
        assert server.url == f"amqps://molva:{PASSWORD}@127.0.0.1:{server.port}"
        async with aiormq.connect(server.url, context=trust) as connection:
            assert connection.server_properties["version"] == server.version
        with pytest.raises(aiormq.exceptions.ProbableAuthenticationError):
            await aiormq.connect(server.url.replace(PASSWORD, "wrong"), context=trust)
        with pytest.raises(aiormq.exceptions.ProbableAuthenticationError):
            await aiormq.connect(f"amqps://127.0.0.1:{server.port}", context=trust)


async def test_nats_without_jetstream_is_core_nats() -> None:
    with private_nats(jetstream="off") as server:
        client = await nats.connect(server.url)
        with pytest.raises(nats.js.errors.ServiceUnavailableError):
            await client.jetstream().account_info()
        await client.close()


async def test_postgresql_behind_tls_asks_for_its_password_by_scram(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    with private_postgresql(password=PASSWORD, certificates=files) as server:
        trusted = f"{server.url.replace('require', 'verify-full')}&sslrootcert={files.authority}"
        assert await ask_url(trusted, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        with pytest.raises(asyncpg.InvalidPasswordError):
            await ask_url(trusted.replace(PASSWORD, "wrong"), "SELECT 1")
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
            await ask_url(server.url.replace("require", "disable"), "SELECT 1")


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_kafka_asks_for_its_password(tmp_path: Path, tls: bool) -> None:
    files = make_certificates(tmp_path) if tls else None
    with private_kafka(password=PASSWORD, certificates=files) as server:
        assert server.url == f"kafka://molva:{PASSWORD}@127.0.0.1:{server.port}"
        settings = {
            **kafka_settings(server),
            "security.protocol": "SASL_SSL" if tls else "SASL_PLAINTEXT",
            "sasl.mechanism": "PLAIN",
            "sasl.username": "molva",
            "log_level": 0,
        }
        if files is not None:
            settings["ssl.ca.location"] = str(files.authority)
        assert AdminClient({**settings, "sasl.password": PASSWORD}).list_topics(timeout=10).brokers
        with pytest.raises(KafkaException):
            AdminClient({**settings, "sasl.password": "wrong"}).list_topics(timeout=2)


@pytest.mark.parametrize(
    ("name", "said"), [("redis", "Bad directive"), ("nats", 'unknown field "no_such_setting"')]
)
def test_a_server_that_cannot_start_says_why_with_its_log(name: str, said: str) -> None:
    started = time.monotonic()
    with (
        pytest.raises(Exception, match=rf"(?s){name}: it ended with 1.*{said}"),
        private_server(name, {"no_such_setting": "7"}),
    ):
        pass
    assert time.monotonic() - started < 10


async def ask(server: Server, query: str) -> object:
    return await ask_url(server.url, query)


async def ask_url(url: str, query: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        found: object = await connection.fetchval(query)
        return found
    finally:
        await connection.close()
