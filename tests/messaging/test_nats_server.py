"""NATS servers that are wrong, old, full, gone, changed by others, or come back."""

import asyncio
import contextlib
import random
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nats
import pytest
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from molva.messaging import (
    Action,
    Delivery,
    IncompatibleBrokerError,
    InvalidURLError,
    LeaseLostError,
    Message,
    MessageTooLargeError,
    Queue,
    QueueFullError,
    SendManyError,
    UnavailableError,
    open_queue,
    open_requester,
    open_responder,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.conformance import PATIENCE, Harness, bodies, eventually, take
from molva.messaging.conformance.dying import Dying
from molva.messaging.drivers import _nats_link, _nats_opening
from molva.messaging.drivers import nats as driver
from molva.messaging.drivers._nats_link import Hosts, NATSAddress, NATSLink, Question
from molva.messaging.drivers._nats_messages import Names
from molva.messaging.drivers._nats_streams import JetStream
from molva.messaging.drivers.nats import NATSQueue, NATSSubscription
from molva.messaging.url import BrokerURL
from tests.brokers import Server, make_certificates, private_nats
from tests.brokers.kind import Place
from tests.brokers.ports import free_ports
from tests.brokers.table import KINDS
from tests.conftest import skip_without
from tests.faults.live.disk import Image, can_mount
from tests.faults.live.proxy import Proxy
from tests.messaging.nats_versions import need_numbers, need_present, server_of
from tests.messaging.servers import (
    Unreachable,
    both_ends,
    consume,
    lose_nothing_while_killed,
    refusal,
    send_surely,
)
from tests.messaging.test_nats import NATSHarness


@contextlib.asynccontextmanager
async def streams_of(url: str) -> AsyncIterator[JetStreamContext]:
    """Give what an administrator has: JetStream, past Molva."""
    client = await nats.connect(url)
    try:
        yield client.jetstream()
    finally:
        await client.close()


QUEUE = Names("molva", "queue", "q")
TOPIC = Names("molva", "topic", "t", "s")


# Opening --------------------------------------------------------------------------------------


class TestUnreachableNATS(Unreachable):
    """A server that is not there, or says nothing."""

    scheme = "nats"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("nats://", "is no host"),
        ("nats://127.0.0.1:70000", "a port is 1 to 65535"),
        ("nats://127.0.0.1,", "is no host"),
        ("nats://127.0.0.1/path", "a path says nothing"),
        ("nats://127.0.0.1?ca=/x.pem", "write tls://"),
        ("nats://127.0.0.1?prefix=a.b", "letters, digits and hyphens"),
        ("nats://127.0.0.1?replicas=6", "1 to 5 copies"),
        ("nats://127.0.0.1?sync=2m", "'?always'? is accepted"),
        ("nats://127.0.0.1?lease=0", "above 0"),
        ("nats://127.0.0.1?start=latest", "for a topic"),
        ("nats://127.0.0.1?prefx=x", r"did you mean 'prefix'\?"),
        ("tls://127.0.0.1?ca=/missing.pem", "missing.pem"),
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
    with private_nats(password="right-s3cret") as server:
        bare = f"nats://127.0.0.1:{server.port}"
        for url in (bare, f"nats://molva:wr0ng-s3cret@127.0.0.1:{server.port}"):
            error = await refusal(url)
            assert isinstance(error, InvalidURLError)
            assert "MOLVA_NATS_PASSWORD" in str(error)
            assert "s3cret" not in f"{error} {error!r} {error.__cause__!r} {caplog.text}"

        async with await open_queue(with_options(server.url, queue="q")) as queue:
            assert "s3cret" not in repr(queue)
        monkeypatch.setenv("MOLVA_NATS_USERNAME", "molva")
        monkeypatch.setenv("MOLVA_NATS_PASSWORD", "right-s3cret")
        async with await open_queue(with_options(bare, queue="q")) as queue:
            await queue.send(Message(b"1"))


async def test_a_token_comes_from_the_environment_and_is_never_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOLVA_NATS_TOKEN", "t0ken")
    with private_nats(authorization="{ token: t0ken }") as server:
        async with await open_queue(with_options(server.url, queue="q")) as queue:
            await queue.send(Message(b"1"))
        monkeypatch.setenv("MOLVA_NATS_TOKEN", "wr0ng-t0ken")
        for url in (server.url, f"nats://t0ken@127.0.0.1:{server.port}"):
            error = await refusal(url)
            assert isinstance(error, InvalidURLError)
            assert "MOLVA_NATS_TOKEN" in str(error)
            assert "t0ken" not in f"{error} {error.__cause__!r}"


async def test_a_user_needs_rights_and_is_told_so() -> None:
    users = (
        "{ users: [{ user: molva, password: pw }, "
        '{ user: mute, password: pw, permissions: { publish: { deny: "$JS.API.>" } } }] }'
    )
    with private_nats(no_auth_user="molva", authorization=users) as server:
        error = await refusal(f"nats://mute:pw@127.0.0.1:{server.port}")
        assert isinstance(error, InvalidURLError)
        assert "ermissions" in str(error)


async def test_a_certificate_must_carry_the_hosts_name(tmp_path: Path) -> None:
    right = make_certificates(tmp_path / "right")
    wrong = make_certificates(tmp_path / "wrong", ("elsewhere.example",))
    with private_nats(certificates=right) as server:
        ca = {"ca": str(right.authority), "queue": "q"}
        async with await open_queue(with_options(server.url, **ca)) as queue:
            await queue.send(Message(b"1"))
            [delivery] = await queue.receive()
            await delivery.ack()
        unknown = await refusal(server.url)
        assert isinstance(unknown, InvalidURLError)
        assert "certificate is refused" in str(unknown)
        plain = await refusal(server.url.replace("tls://", "nats://"))
        assert isinstance(plain, InvalidURLError | UnavailableError)
    with private_nats(certificates=wrong) as server:
        error = await refusal(server.url, ca=str(wrong.authority))
        assert isinstance(error, InvalidURLError)
        assert "certificate is refused" in str(error)
    with private_nats() as server:
        error = await refusal(server.url.replace("nats://", "tls://"))
        assert isinstance(error, UnavailableError)
        assert "does not speak TLS" in str(error)


async def test_no_password_goes_in_the_clear_to_a_server_that_says_it_has_no_tls() -> None:
    heard = bytearray()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.15.2","max_payload":1048576}\r\n')
        try:
            while data := await reader.read(1_000):
                heard.extend(data)
        finally:
            writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        error = await refusal(f"tls://ann:s3cret@127.0.0.1:{port}")
        await asyncio.sleep(0.1)
    assert isinstance(error, UnavailableError)
    assert b"s3cret" not in heard


async def test_a_server_that_had_no_time_to_look_at_us_is_away_and_refuses_nobody() -> None:
    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b'INFO {"server_id":"x","version":"2.15.2","max_payload":1048576,"auth_required":true}'
            b"\r\n-ERR 'Authentication Timeout'\r\n"
        )
        try:
            await reader.read()
        finally:
            writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        error = await refusal(f"nats://ann:s3cret@127.0.0.1:{port}")
    assert isinstance(error, UnavailableError)
    assert "Authentication Timeout" in str(error)


async def test_more_than_a_stopped_server_reads_is_given_up_in_time() -> None:
    with private_nats() as server:
        async with await open_queue(with_options(server.url, queue="q")) as queue:
            await queue.send(Message(b"before"))
            await asyncio.to_thread(server.pause)
            try:
                # More than the client library and the sockets between take in.
                large = [Message(bytes(900_000)) for _ in range(20)]
                async with asyncio.timeout(PATIENCE):
                    with pytest.raises(SendManyError):
                        await queue.send_many(large)
            finally:
                await asyncio.to_thread(server.resume)
            async with asyncio.timeout(PATIENCE):
                await send_surely(queue, Message(b"after"))


async def test_a_server_that_is_too_old_is_told_from_which_version(
    nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_nats_opening, "_OLDEST", (99, 0))
    error = await refusal(nats_url)
    assert isinstance(error, IncompatibleBrokerError)
    assert "99.0 or newer is needed" in str(error)


async def test_a_server_without_jetstream_is_told_so_and_has_channels() -> None:
    with private_nats(jetstream="off") as server:
        error = await refusal(server.url)
        assert isinstance(error, IncompatibleBrokerError)
        assert "JetStream is not enabled" in str(error)
        url = with_options(server.url, topic="t", delivery="at-most-once")
        async with (
            await open_topic(url) as topic,
            await open_subscription(url + "&subscription=s") as subscription,
        ):
            await topic.send(Message(b"1"))
            assert bodies(await take(subscription, 1)) == [b"1"]


async def test_copies_on_a_server_that_is_alone_are_refused(nats_url: str) -> None:
    error = await refusal(nats_url, replicas="3", prefix="test-copies")
    assert isinstance(error, InvalidURLError)
    assert "leave replicas= out" in str(error)


@pytest.mark.parametrize("create", ["auto", "never"])
@pytest.mark.parametrize("throws_away", [{"max_age": 60.0}, {"max_msgs_per_subject": 1_000}])
async def test_a_stream_of_somebody_else_under_our_name_is_refused(
    throws_away: dict[str, Any], create: str
) -> None:
    with private_nats() as server:
        async with streams_of(server.url) as streams:
            await streams.add_stream(
                name=QUEUE.stream,
                subjects=[QUEUE.subject],
                retention="workqueue",
                discard="new",
                **throws_away,
            )
        error = await refusal(server.url, create=create)
        assert isinstance(error, IncompatibleBrokerError)
        [name] = throws_away
        assert name in str(error)
        assert "prefix=" in str(error)


async def test_who_consumes_a_stream_that_begins_to_throw_away_is_told_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with private_nats() as server:
        async with (
            await open_queue(with_options(server.url, queue="q")) as queue,
            streams_of(server.url) as streams,
        ):
            await queue.send(Message(b"1"))
            config = (await streams.stream_info(QUEUE.stream)).config
            config.max_msgs_per_subject = 1_000
            await streams.update_stream(config)
            # Looked at again over the next connection.
            server.kill()
            await asyncio.to_thread(server.restart)

            # What is there can still be settled.
            found: list[Delivery] = []
            async with asyncio.timeout(PATIENCE):
                while not found:
                    with contextlib.suppress(UnavailableError):
                        found = await queue.receive(1, wait=0.5)
            await found[0].ack()
            assert "throws away what nobody has settled (max_msgs_per_subject=1000)" in caplog.text


async def test_what_is_survived_is_what_url_server_and_stream_say(nats_url: str) -> None:
    need_present(since=(2, 10), what="sync before it confirms")
    with private_nats() as server:
        for sync, survives in (({}, {"kill"}), ({"sync": "always"}, {"kill", "power"})):
            url = with_options(server.url, queue="q", **sync)
            async with await open_queue(url) as queue:
                assert queue.capabilities.survives == survives
        async with streams_of(server.url) as streams:
            volatile = Names("molva", "queue", "volatile")
            await streams.add_stream(
                name=volatile.stream,
                subjects=[volatile.subject],
                retention="workqueue",
                discard="new",
                storage="memory",
            )
        async with await open_queue(
            with_options(server.url, queue="volatile", sync="always")
        ) as queue:
            assert queue.capabilities.survives == frozenset()


@pytest.mark.parametrize(
    ("version", "sync", "replicas", "survives"),
    [
        ((2, 9, 25), "always", 1, {"kill"}),
        ((2, 10, 0), "always", 1, {"kill", "power"}),
        ((2, 15, 2), "always", 3, {"kill", "power", "node"}),
        ((2, 15, 2), None, 3, {"kill", "node"}),
        ((2, 15, 2), "always", 2, {"kill", "power"}),
    ],
)
def test_an_old_server_is_not_believed_to_sync_and_three_copies_outlive_a_node(
    version: tuple[int, int, int], sync: str | None, replicas: int, survives: set[str]
) -> None:
    syncs = sync is not None and version >= _nats_opening._FIRST_THAT_SYNCS
    server = server_of(version, syncs=syncs)

    found = server.limited(driver.QUEUE_CAPABILITIES, replicas=replicas, in_file=True)

    assert found.survives == survives


@pytest.mark.parametrize(
    ("version", "keeps", "is_told"),
    [
        ((2, 9, 25), True, False),  # it ignores the number
        ((2, 10, 0), False, False),
        ((2, 10, 27), False, False),
        ((2, 10, 28), True, True),
        ((2, 11, 1), False, False),
        ((2, 11, 2), True, True),
        ((2, 15, 2), True, True),
    ],
)
def test_a_stream_that_a_killed_server_would_empty_survives_nothing(
    version: tuple[int, int, int], keeps: bool, is_told: bool
) -> None:
    server = server_of(version, syncs=True)
    best = driver.QUEUE_CAPABILITIES

    numbered = server.limited(best, replicas=1, in_file=True, numbered=True)
    other = server.limited(best, replicas=1, in_file=True)

    assert bool(numbered.survives) == keeps
    assert "kill" in other.survives
    assert server.numbers_well == is_told


async def test_a_server_that_would_empty_them_is_not_told_the_first_numbers_of_streams(
    nats_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    need_numbers(nats_url)
    prefix = f"test-{secrets.token_hex(6)}"
    old, new = (with_options(nats_url, prefix=prefix, queue=name) for name in ("old", "new"))
    await (await open_queue(old)).close()  # told, by this server
    monkeypatch.setattr(_nats_opening, "_FIRST_THAT_NUMBER_WELL", ((99, 0, 0), (99, 0, 0)))

    async with await open_queue(new) as queue:
        assert queue.capabilities.survives == {"kill"}
    async with await open_queue(old) as queue:
        assert queue.capabilities.survives == set()

    told = [record.getMessage() for record in caplog.records if "first_seq" in record.msg]
    assert len(told) == 1
    assert Names(prefix, "queue", "old").stream in told[0]
    async with streams_of(nats_url) as streams:
        for name, is_told in (("old", True), ("new", False)):
            info = await streams.stream_info(Names(prefix, "queue", name).stream)
            assert (info.state.first_seq > 1_000_000) == is_told


def test_the_server_that_failed_last_is_tried_last() -> None:
    names = [("a", 1), ("b", 1), ("c", 1)]
    hosts = Hosts(names)
    first, second, third = hosts.in_turn()
    assert {first, second, third} == set(names)

    hosts.put_last(first)
    assert hosts.in_turn() == (second, third, first)
    hosts.put_last(third)
    assert hosts.in_turn() == (second, first, third)


async def test_a_dead_server_in_front_of_a_living_one_costs_nothing(
    nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "sample", lambda hosts, number: list(hosts)[:number])
    dead, living = free_ports(1)[0], urlsplit(nats_url)
    assert living.hostname is not None
    url = nats_url.replace(living.hostname, f"{living.hostname}:{dead},{living.hostname}", 1)
    link = NATSLink(NATSAddress.of(BrokerURL.parse(url)))
    started = time.monotonic()
    try:
        for _ in range(6):
            connection = await link.connected()
            await connection.flush()
            assert await link.connected() is connection
            # It breaks: the dead one is in front again.
            await connection.close()
        # Asking the dead one first costs two seconds each time.
        assert time.monotonic() - started < 10
    finally:
        await link.close()


# Too much -------------------------------------------------------------------------------------


async def test_a_stream_at_its_limit_refuses_and_takes_again() -> None:
    with private_nats() as server:
        async with (
            await open_queue(with_options(server.url, queue="q")) as queue,
            streams_of(server.url) as streams,
        ):
            config = (await streams.stream_info(QUEUE.stream)).config
            config.max_msgs = 3
            await streams.update_stream(config)

            with pytest.raises(SendManyError) as failed:
                await queue.send_many([Message(b"%d" % n) for n in range(5)])

            assert list(failed.value.failures) == [3, 4]
            assert {type(e) for e in failed.value.failures.values()} == {QueueFullError}
            assert "3 messages" in str(failed.value.failures[3])
            for delivery in await take(queue, 3):
                await delivery.ack()
            await queue.send(Message(b"again"))
            assert bodies(await take(queue, 1)) == [b"again"]


async def test_a_bound_holds_to_the_message_however_many_send_at_once() -> None:
    with private_nats() as server:
        url = with_options(server.url, queue="q", capacity="50")
        queues = [await open_queue(url) for _ in range(4)]

        async def send(queue: Queue) -> int:
            refused = 0
            for _ in range(5):
                try:
                    await queue.send_many([Message(b"") for _ in range(10)])
                except SendManyError as error:
                    refused += len(error.failures)
            return refused

        refused = await asyncio.gather(*map(send, queues))
        assert sum(refused) == 150
        stat = await queues[0].stat()
        assert stat is not None
        assert stat.pending == 50
        for queue in queues:
            await queue.close()


async def test_a_message_that_the_server_does_not_take_fails_alone() -> None:
    with private_nats(max_payload=65_536) as server:
        async with await open_queue(with_options(server.url, queue="q")) as queue:
            most = queue.capabilities.max_body_bytes
            assert most < 65_536
            with pytest.raises(SendManyError) as failed:
                await queue.send_many(
                    [
                        Message(b"a"),
                        Message(bytes(most + 1)),
                        Message(bytes(most), headers={"long": "x" * 9_000}),
                        Message(bytes(most)),
                    ]
                )
            assert list(failed.value.failures) == [1, 2]
            assert {type(e) for e in failed.value.failures.values()} == {MessageTooLargeError}
            first, largest = await take(queue, 2)
            assert first.message.body == b"a"
            # It must fit among the dead letters as well, with why it is there.
            await largest.reject("no" * 5_000)
            [letter] = await queue.dead_letters()
            assert len(letter.message.body) == most


@pytest.mark.parametrize("ours", [True, False])
async def test_a_message_that_leaves_no_room_for_a_reason_becomes_a_dead_letter_all_the_same(
    ours: bool,
) -> None:
    size = 65_536
    with private_nats(max_payload=size) as server:
        async with await open_queue(with_options(server.url, queue="q")) as queue:
            async with streams_of(server.url) as streams:
                headers = {"Nats-Msg-Id": "00" * 16} if ours else None
                spare = 100 if ours else 0
                await streams.publish(QUEUE.subject, bytes(size - spare), headers=headers)
            await queue.send(Message(b"good"))
            for delivery in await take(queue, 2 if ours else 1):
                if delivery.message.body == b"good":
                    await delivery.ack()
                else:
                    await delivery.reject("\N{GRINNING FACE}" * 5_000)
            async with asyncio.timeout(PATIENCE):
                while (stat := await queue.stat()) is None or stat.pending:
                    await asyncio.sleep(0.05)
            [letter] = await queue.dead_letters()
            assert letter.reason.endswith(f"the end of its {size - spare} bytes is cut")
            assert size - 4_096 < len(letter.message.body) < size


@pytest.mark.parametrize(
    "meta", ['{"ttl":"soon"}', '{"key":5}', '{"headers":{"a":1}}', "[" * 3_000]
)
async def test_fields_that_are_none_make_a_dead_letter(nats_url: str, meta: str) -> None:
    url = with_options(nats_url, queue="q", prefix=f"test-{secrets.token_hex(6)}")
    async with await open_queue(url) as queue:
        names = Names(url.partition("prefix=")[2], "queue", "q")
        async with streams_of(nats_url) as streams:
            headers = {"Nats-Msg-Id": "00" * 16, "Molva": meta}
            await streams.publish(names.subject, b"bad", headers=headers)
        await queue.send(Message(b"good"))
        [good] = await take(queue, 1)
        await good.ack()
        [letter] = await queue.dead_letters()
        assert letter.message.body == b"bad"
        assert "undecodable" in letter.reason


# Leases ---------------------------------------------------------------------------------------


async def test_what_nobody_settles_is_not_held_for_ever(nats_url: str) -> None:
    url = with_options(nats_url, queue="q", prefix=f"test-{secrets.token_hex(6)}", lease="0.3")
    async with await open_queue(url) as queue:
        await queue.send_many([Message(b"%d" % n) for n in range(50)])
        [late, *_] = await take(queue, 50)
        driver = queue._driver
        assert isinstance(driver, NATSQueue)
        await eventually(lambda: not driver._held)
        with pytest.raises(LeaseLostError):
            await late.ack()


async def test_a_long_lease_of_a_consumer_that_is_gone_ends_no_looking_after(
    nats_url: str,
) -> None:
    url = with_options(nats_url, queue="q", prefix=f"test-{secrets.token_hex(6)}", lease="1.5")
    async with await open_queue(url) as queue:
        await queue.send(Message(b"1"))
        [delivery] = await take(queue, 1)
        await delivery.extend(30.0)
        driver = queue._driver
        assert isinstance(driver, NATSQueue)
        async with streams_of(nats_url) as streams:
            await streams.delete_stream(driver._names.stream)
        # Looking after is the first to see it.
        await (await driver._link.connected()).close()
        await eventually(lambda: not driver._held)
        await asyncio.sleep(0.6)
        assert driver._beating is not None
        assert not driver._beating.done()


async def test_a_question_that_is_given_up_takes_no_answer_from_others(nats_url: str) -> None:
    link = NATSLink(NATSAddress.of(BrokerURL.parse(nats_url)))
    connection = await link.connected()
    answered: list[int] = []

    async def small(number: int) -> None:
        await connection.flush()
        answered.append(number)

    # To nobody who answers; larger than what is written without waiting.
    large = [Question(connection.new_inbox(), bytes(900_000))] * 8
    asking = asyncio.create_task(connection.ask(large))
    others: list[asyncio.Task[None]] = []
    while len(others) < 40:
        others.append(asyncio.create_task(small(len(others))))
        await asyncio.sleep(0)
    asking.cancel()
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*others)
    assert len(answered) == 40
    await link.close()


async def test_consumers_that_do_not_answer_are_not_taken_for_none(nats_url: str) -> None:
    link = NATSLink(NATSAddress.of(BrokerURL.parse(nats_url)))
    jetstream = JetStream(link)

    async def ask(what: str, question: object) -> dict[str, object]:
        return {"total": 0, "offset": 0, "consumers": [], "missing": ["billing"]}

    jetstream.ask = ask  # type: ignore[method-assign, assignment]
    # What they have not read would be deleted.
    with pytest.raises(UnavailableError, match="billing of stream 's' do not answer"):
        await jetstream.consumers("s")
    await link.close()


# Changed by others ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("max_deliver", 1), ("max_ack_pending", 1)])
async def test_a_consumer_that_somebody_changed_is_set_right_and_told(
    name: str, value: int, caplog: pytest.LogCaptureFixture
) -> None:
    with private_nats() as server:
        url = with_options(server.url, topic="t")
        async with (
            await open_topic(url) as topic,
            await open_subscription(url + "&subscription=s&lease=1") as subscription,
            streams_of(server.url) as streams,
        ):
            config = (await streams.consumer_info(TOPIC.stream, TOPIC.consumer)).config
            before = getattr(config, name)
            setattr(config, name, value)
            await streams.add_consumer(TOPIC.stream, config)

            async def is_right() -> bool:
                found = await streams.consumer_info(TOPIC.stream, TOPIC.consumer)
                return bool(getattr(found.config, name) == before)

            async with asyncio.timeout(PATIENCE):
                while not await is_right():
                    await asyncio.sleep(0.1)
            assert f"changed by somebody else ({name}={value})" in caplog.text
            # Delivered more often than the server was told to.
            await topic.send(Message(b"1"))
            for attempt in (1, 2, 3):
                [delivery] = await take(subscription, 1)
                assert delivery.attempt == attempt
                await delivery.nack()


async def test_a_consumer_that_somebody_deleted_is_made_anew_and_nothing_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    need_present(since=(2, 10), what="say that a consumer is gone")
    with private_nats() as server:
        url = with_options(server.url, topic="t")
        async with (
            await open_topic(url) as topic,
            await open_subscription(url + "&subscription=s") as subscription,
            streams_of(server.url) as streams,
        ):
            await topic.send_many([Message(b"%d" % n) for n in range(5)])
            held, *_ = await take(subscription, 2)
            waiting = asyncio.create_task(subscription.receive(1, wait=PATIENCE))
            await asyncio.sleep(0.1)
            await waiting
            await streams.delete_consumer(TOPIC.stream, TOPIC.consumer)

            again = await take(subscription, 5)

            assert bodies(again) == [b"%d" % n for n in range(5)]
            with pytest.raises(LeaseLostError):
                await held.ack()
            await subscription.settle([(delivery, Action.ACK) for delivery in again])
            assert await subscription.receive(1, wait=0.2) == []
            assert "was gone from the server; made anew" in caplog.text


async def test_a_consumer_that_is_sent_to_now_is_refused_by_name() -> None:
    with private_nats() as server:
        url = with_options(server.url, topic="t")
        async with (
            await open_topic(url),
            await open_subscription(url + "&subscription=s") as subscription,
            streams_of(server.url) as streams,
        ):
            # In between, it would make the consumer anew.
            driver = subscription._driver
            assert isinstance(driver, NATSSubscription)
            assert driver._beating is not None
            driver._beating.cancel()
            await streams.delete_consumer(TOPIC.stream, TOPIC.consumer)
            await streams.add_consumer(
                TOPIC.stream,
                ConsumerConfig(
                    durable_name=TOPIC.consumer,
                    deliver_subject="elsewhere",
                    ack_policy=AckPolicy.NONE,
                    deliver_policy=DeliverPolicy.ALL,
                ),
            )
            with pytest.raises(IncompatibleBrokerError, match="by somebody else"):
                await subscription.receive(1, wait=PATIENCE)


async def test_a_queue_made_anew_takes_no_acknowledgement_of_an_old_message() -> None:
    with private_nats() as server:
        need_numbers(server.url)
        url = with_options(server.url, queue="q", lease="30")
        old, new = await open_queue(url), await open_queue(url)
        await old.send(Message(b"old"))
        [late] = await take(old, 1)
        async with streams_of(server.url) as streams:
            await streams.delete_stream(QUEUE.stream)
        # Whichever notices first makes it anew; the other one has not looked yet.
        await new.send(Message(b"new"))
        [held] = await take(new, 1)
        assert held.message.body == b"new"
        with contextlib.suppress(LeaseLostError):
            await late.ack()
        await held.nack()
        assert bodies(await take(new, 1)) == [b"new"], "an old ack settled a new message"
        await old.close()
        await new.close()


async def test_a_request_whose_reply_topic_was_removed_is_worked_on_once(nats_url: str) -> None:
    prefix = f"test-{secrets.token_hex(6)}"
    requests = with_options(nats_url, prefix=prefix, queue="q")
    replies = with_options(nats_url, prefix=prefix, topic="t")
    worked = 0

    async def work(request: Delivery) -> Message:
        nonlocal worked
        worked += 1
        return Message(b"done")

    async with await open_responder(requests) as responder, await open_queue(requests) as queue:
        async with await open_requester(requests, replies) as requester:
            working = asyncio.create_task(responder.run(work))
            await requester.ask(Message(b"1"), timeout=PATIENCE)
        async with streams_of(nats_url) as streams:
            await streams.delete_stream(Names(prefix, "topic", "t").stream)
        await queue.send(Message(b"2", headers={"reply-to": "t"}))
        async with asyncio.timeout(PATIENCE):
            while not (letters := await queue.dead_letters()):
                await asyncio.sleep(0.05)
        assert "no reply can be sent" in letters[0].reason
        assert responder.counters.unanswerable == 1
        assert worked == 2
        responder.stop()
        await working


async def test_a_wiped_server_is_an_empty_topic(caplog: pytest.LogCaptureFixture) -> None:
    need_present(since=(2, 10), what="say that a consumer is gone")
    with private_nats() as server:
        url = with_options(server.url, topic="t")
        async with (
            await open_topic(url) as topic,
            await open_subscription(url + "&subscription=s") as subscription,
        ):
            await topic.send(Message(b"lost"))
            async with streams_of(server.url) as streams:
                for found in await streams.streams_info():
                    await streams.delete_stream(found.config.name or "")
            await topic.send(Message(b"1"))
            await topic.send(Message(b"2"))
            assert bodies(await take(subscription, 2)) == [b"1", b"2"]
            assert "was gone from the server; made anew" in caplog.text


# Going on -------------------------------------------------------------------------------------


class OwnNATSHarness(NATSHarness):
    """A NATS of its own, which can be killed and cut off."""

    lease = 3.0

    def __init__(self, server: Server) -> None:
        super().__init__(server.url)
        self._server = server

    async def restart_broker(self) -> None:
        await asyncio.to_thread(self._server.kill)
        await asyncio.to_thread(self._server.start)

    async def cut_connections(self) -> None:
        # A server that goes in order ends its connections, and loses nothing by it.
        await asyncio.to_thread(self._server.restart)


@pytest.fixture(scope="module")
def own_nats() -> Iterator[Server]:
    with private_nats() as server:
        yield server


class TestNATSTopicThatDies(Dying):
    """What outlives the death of everybody, the broker among them."""

    kind = "topic"

    @pytest.fixture
    def harness(self, own_nats: Server) -> Harness:
        return OwnNATSHarness(own_nats)


class TestNATSQueueThatDies(Dying):
    """The same of a queue."""

    kind = "queue"

    @pytest.fixture
    def harness(self, own_nats: Server) -> Harness:
        return OwnNATSHarness(own_nats)


@pytest.mark.parametrize("kind", ["topic", "queue"])
async def test_nothing_confirmed_is_lost_while_the_server_is_killed_under_100_publishers(
    kind: str,
) -> None:
    with private_nats() as server:
        await lose_nothing_while_killed(kind, server)


@pytest.mark.parametrize("kind", ["topic", "queue"])
async def test_connections_that_are_reset_lose_nothing(kind: str) -> None:
    proxy = Proxy(0, seed=1)
    with private_nats() as server:
        proxy.upstream = server.port
        await proxy.start()
        sender, consumer = await both_ends(kind, f"nats://127.0.0.1:{proxy.port}", "1")
        got: Counter[bytes] = Counter()
        consuming = asyncio.create_task(consume(consumer, got))
        for n in range(200):
            if n % 10 == 5:
                proxy.reset()
            await send_surely(sender, Message(b"%d" % n))
        await eventually(lambda: len(got) == 200)
        consuming.cancel()
        await asyncio.wait([consuming])
        await sender.close()
        await consumer.close()
        await proxy.close()


async def test_an_answer_that_is_lost_is_no_second_message() -> None:
    proxy = Proxy(0, seed=1)
    with private_nats() as server:
        proxy.upstream = server.port
        await proxy.start()
        url = with_options(f"nats://127.0.0.1:{proxy.port}", queue="q")
        async with await open_queue(url) as queue:
            message = Message(b"once")
            proxy.faults.lost = "down"
            sending = asyncio.create_task(queue.send(message))
            await asyncio.sleep(0.3)
            proxy.reset()
            with pytest.raises(UnavailableError):
                await sending
            proxy.faults.lost = None
            await send_surely(queue, message)
            stat = await queue.stat()
            assert stat is not None
            assert stat.pending == 1
        await proxy.close()


async def test_a_connection_that_died_without_a_word_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy = Proxy(0, seed=1)
    with private_nats() as server:
        proxy.upstream = server.port
        await proxy.start()
        url = with_options(f"nats://127.0.0.1:{proxy.port}", queue="q")
        async with await open_queue(url) as queue, await open_queue(url) as other:
            waiting = asyncio.create_task(queue.receive(1, wait=30.0))
            await asyncio.sleep(0.3)
            proxy.faults.drop = True
            await asyncio.sleep(6.0)  # heartbeats are missed
            proxy.faults.drop = False
            proxy.reset()
            await send_surely(other, Message(b"1"))
            async with asyncio.timeout(PATIENCE):
                assert bodies(await waiting) == [b"1"]
        await proxy.close()


async def test_a_server_that_is_away_costs_no_memory_and_no_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with private_nats() as server:
        url = with_options(server.url, topic="t")
        async with (
            await open_topic(url) as topic,
            await open_subscription(url + "&subscription=s") as subscription,
        ):
            # Not while it opens, which may take longer.
            monkeypatch.setattr(_nats_link, "_TIMEOUT", 1.0)
            server.pause()
            waiting = asyncio.create_task(subscription.receive(wait=1.0))
            sends = [asyncio.create_task(topic.send(Message(b"%d" % n))) for n in range(12_000)]
            results = await asyncio.gather(*sends, return_exceptions=True)
            # What does not fit is refused at once, the rest when there is no answer.
            assert Counter(type(r).__name__ for r in results)["QueueFullError"] >= 1_000
            assert not [r for r in results if r is None]
            with contextlib.suppress(UnavailableError):
                assert await waiting == []
            server.resume()
            async with asyncio.timeout(PATIENCE):
                await send_surely(topic, Message(b"again"))
                found: list[Delivery] = []
                while not found:
                    # It may still be connecting.
                    with contextlib.suppress(UnavailableError):
                        found = await subscription.receive(1_000)
            assert found


# Power ----------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Return a folder in which images can be made and mounted."""
    why_not = can_mount(tmp_path)
    if why_not:
        skip_without("mount", why_not)
    return tmp_path


async def left_after_a_power_cut(
    disk: Path, settings: dict[str, str], *, together: int
) -> dict[str, Any]:
    """Store 300 messages, settle 50, cut the power; return what is left of them.

    Args:
        disk: Where images of a disk can be mounted.
        settings: The server's, beside those of the tests.
        together: How many messages one send brings; the next waits for its confirmation.
    """
    before = Image(disk / "before.img")
    after: Image | None = None
    folder = disk / "mounted"
    before.make()
    before.mount(folder)
    place = Place(folder=folder / "nats", ports=free_ports(1), settings=settings)
    server = Server(KINDS["nats"], place)
    url = with_options(server.url, queue="q", lease="1", sync="always")
    try:
        await asyncio.to_thread(server.create)
        # Its configuration is on the disk, as that of any server that was set up yesterday.
        before.flush()
        async with await open_queue(url) as queue:
            for first in range(0, 300, together):
                numbers = range(first, first + together)
                await queue.send_many([Message(b"%d" % n) for n in numbers])
            settled = await take(queue, 50)
            await queue.settle([(delivery, Action.ACK) for delivery in settled])
            server.pause()
            after = await asyncio.to_thread(before.cut, disk / "after.img")
            server.kill()
        before.discard()
        after.mount(folder)
        await asyncio.to_thread(server.start)
        found: list[bytes] = []
        async with await open_queue(url) as queue:
            while some := await queue.receive(100, wait=1.5):
                found += bodies(some)
                await queue.settle([(delivery, Action.ACK) for delivery in some])
        return {"left": set(found), "settled": {d.message.body for d in settled}}
    finally:
        server.kill()
        for image in (before, after):
            if image is not None:
                image.discard()


ALL = {b"%d" % n for n in range(300)}


@pytest.mark.root
@pytest.mark.parametrize("together", [1, 100])
async def test_what_was_confirmed_survives_a_power_cut_where_the_server_syncs(
    disk: Path, together: int
) -> None:
    need_present(since=(2, 10), what="sync before it confirms")
    found = await left_after_a_power_cut(disk, {}, together=together)
    assert found["left"] | found["settled"] == ALL


@pytest.mark.root
@pytest.mark.parametrize("together", [1, 100])
async def test_without_syncing_a_power_cut_loses_what_was_confirmed(
    disk: Path, together: int
) -> None:
    """So ``power`` must not be said of a server whose ``sync_interval`` nobody vouches for."""
    need_present(since=(2, 10), what="sync before it confirms")
    found = await left_after_a_power_cut(disk, {"sync_interval": '"2m"'}, together=together)
    assert ALL - found["left"] - found["settled"]
