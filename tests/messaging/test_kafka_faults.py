"""Kafka that is not there, refuses, dies, comes back: with servers of the tests' own."""

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from molva.messaging import (
    InvalidURLError,
    LeaseLostError,
    Message,
    SendManyError,
    TopicNotFoundError,
    UnavailableError,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.conformance import Harness, bodies, eventually, take
from molva.messaging.conformance.dying import Dying
from molva.messaging.conformance.waiting import numbered
from tests.brokers import Server, make_certificates, private_kafka
from tests.brokers.ports import free_ports
from tests.faults.live.proxy import Proxy
from tests.messaging.servers import AT_ONCE, send_surely
from tests.messaging.test_kafka import KafkaHarness


class ProxyThread:
    """A proxy before Kafka, in a loop of its own: it outlives the loops of the tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.proxy = Proxy(0, seed=1)
        self._run(self.proxy.start())

    def reset(self) -> None:
        """Reset every open connection."""
        self._loop.call_soon_threadsafe(self.proxy.reset)

    def close(self) -> None:
        self._run(self.proxy.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        # Left open, it is found when the interpreter ends, and fails the whole run.
        self._loop.close()

    def _run(self, work: Coroutine[object, object, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)


class Behind(NamedTuple):
    """A Kafka, and the proxy that it tells its clients to be."""

    server: Server
    proxy: ProxyThread

    @property
    def url(self) -> str:
        return f"kafka://127.0.0.1:{self.proxy.proxy.port}"


@pytest.fixture(scope="module")
def behind() -> Iterator[Behind]:
    proxy = ProxyThread()
    try:
        with private_kafka(advertised_listeners=f"BROKER://127.0.0.1:{proxy.proxy.port}") as server:
            proxy.proxy.upstream = server.port
            yield Behind(server, proxy)
    finally:
        proxy.close()


class OwnKafkaHarness(KafkaHarness):
    """A Kafka of its own, which can be killed and cut off."""

    def __init__(self, behind: Behind) -> None:
        super().__init__(behind.url)
        self._behind = behind

    async def restart_broker(self) -> None:
        await asyncio.to_thread(self._behind.server.kill)
        await asyncio.to_thread(self._behind.server.start)

    async def cut_connections(self) -> None:
        self._behind.proxy.reset()


class TestKafkaThatDies(Dying):
    """What outlives the death of everybody, the broker among them."""

    kind = "topic"

    @pytest.fixture
    def harness(self, behind: Behind) -> Harness:
        return OwnKafkaHarness(behind)


@pytest.fixture
async def h(behind: Behind) -> AsyncIterator[OwnKafkaHarness]:
    harness = OwnKafkaHarness(behind)
    yield harness
    await harness.close()


async def _refused(url: str, error: type[Exception], problem: str) -> None:
    """Opening fails soon, whatever is opened, and says what is wrong."""
    for opens, what in ((open_topic, url), (open_subscription, url + "&subscription=s")):
        began = time.monotonic()
        with pytest.raises(error, match=problem):
            await opens(what)
        assert time.monotonic() - began < AT_ONCE


async def test_a_port_where_nobody_listens_is_an_error_that_says_so() -> None:
    [port] = free_ports(1)

    await _refused(f"kafka://127.0.0.1:{port}?topic=t", UnavailableError, "no broker answers")


async def test_a_host_that_nobody_knows_is_an_error_that_says_so() -> None:
    await _refused("kafka://no-such-host.invalid?topic=t", UnavailableError, "not known")


async def test_a_wrong_password_is_an_error_that_shows_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with private_kafka(password="right-pass") as server:
        good = with_options(server.url, topic="t")
        async with await open_topic(good) as topic:
            await topic.send(Message(b"1"))
        wrong = good.replace("right-pass", "wr0ng-pass")

        await _refused(wrong, UnavailableError, "user or password is wrong")

    assert "wr0ng-pass" not in caplog.text
    assert "right-pass" not in caplog.text


async def test_tls_checks_the_brokers_name_and_authority(tmp_path: Path) -> None:
    for name in ("good", "other"):
        (tmp_path / name).mkdir()
    files = make_certificates(tmp_path / "good")
    others = make_certificates(tmp_path / "other")
    with private_kafka(certificates=files) as server:
        base = f"kafka://127.0.0.1:{server.port}?topic=t"
        trusted = with_options(base, tls="on", ca=str(files.authority))
        async with await open_topic(trusted) as topic:
            await topic.send(Message(b"1"))

        await _refused(
            with_options(base, tls="on", ca=str(others.authority)), UnavailableError, "ca"
        )
        await _refused(base, UnavailableError, "tls")


async def test_a_file_that_is_no_certificate_is_a_wrong_url() -> None:
    url = with_options("kafka://127.0.0.1:1?topic=t", tls="on", ca=__file__)

    with pytest.raises(InvalidURLError, match="ssl"):
        await open_topic(url)


async def test_a_missing_topic_is_refused_within_a_second(behind: Behind) -> None:
    url = with_options(behind.url, topic=f"missing-{uuid.uuid4().hex[:6]}", create="never")

    await _refused(url, TopicNotFoundError, "create=never was asked")


async def _pause(server: Server) -> None:
    """Stop a server; it may answer once more until all of its threads stand still."""
    await asyncio.to_thread(server.pause)
    await eventually(lambda: server.process.status() == psutil.STATUS_STOPPED)


async def test_a_stopped_broker_is_bounded_errors_and_no_restart_of_ours(
    h: OwnKafkaHarness, behind: Behind
) -> None:
    topic, subscription = await h.topic(timeout=2), await h.subscription()
    await topic.send(Message(b"before"))
    assert bodies(await take(subscription, 1)) == [b"before"]
    await _pause(behind.server)
    try:
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="timed out"):
            await topic.send(Message(b"lost, perhaps"))
        with pytest.raises(SendManyError) as failures:
            await topic.send_many(numbered(3))
        assert time.monotonic() - began < 15.0
        assert {type(e).__mro__[1] for e in failures.value.failures.values()} == {UnavailableError}
    finally:
        await asyncio.to_thread(behind.server.resume)

    async with asyncio.timeout(90.0):
        await send_surely(topic, Message(b"after"))
        got: list[bytes] = []
        while b"after" not in got:
            with contextlib.suppress(UnavailableError, LeaseLostError):
                for delivery in await subscription.receive(10):
                    got.append(delivery.message.body)
                    await delivery.ack()


async def test_closing_is_bounded_while_the_broker_is_stopped(
    h: OwnKafkaHarness, behind: Behind
) -> None:
    topic, subscription = await h.topic(timeout=2), await h.subscription()
    await topic.send_many(numbered(3))
    [first] = await take(subscription, 1)
    await first.ack()
    await _pause(behind.server)
    try:
        began = time.monotonic()
        await subscription.close()
        await topic.close()
        assert time.monotonic() - began < 20.0
    finally:
        await asyncio.to_thread(behind.server.resume)
