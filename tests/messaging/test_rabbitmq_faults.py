"""RabbitMQ servers that are wrong, full, gone, or come back; and what others do to our queues."""

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import aiormq
import pytest
from aiormq.exceptions import ChannelNotFoundEntity
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from molva.messaging import (
    Action,
    DeadLetter,
    Delivery,
    IncompatibleBrokerError,
    InUseError,
    InvalidURLError,
    LeaseLostError,
    Message,
    MessageTooLargeError,
    QueueFullError,
    QueueNotFoundError,
    SendManyError,
    Subscription,
    Topic,
    UnavailableError,
    UnsupportedFeatureError,
    _inbox,
    open_queue,
    open_requester,
    open_responder,
    open_subscription,
    open_topic,
    with_options,
)
from molva.messaging.conformance import PATIENCE, bodies, eventually, take
from molva.messaging.conformance.actors import starting
from molva.messaging.driver import Outcome, Settlement
from molva.messaging.drivers import _amqp_consumer, _amqp_link, _amqp_topology
from molva.messaging.drivers._amqp_options import Names
from molva.messaging.drivers._amqp_sender import AMQPSender, Parcel
from tests.brokers import Server, make_certificates, private_rabbitmq
from tests.brokers.rabbitmq import rabbitmqctl
from tests.faults.live.proxy import Proxy
from tests.messaging.servers import AT_ONCE, Unreachable, refusal, send_surely


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_amqp_topology, "NEW_QUEUE", 0.0)


@pytest.fixture
def url(rabbitmq_url: str) -> str:
    return with_options(rabbitmq_url, prefix=f"test-{secrets.token_hex(6)}")


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """A server of this file's own, whose users, memory and queues it changes."""
    with private_rabbitmq(password="right-s3cret", hurried=True) as server:
        yield server


def own_url(server: Server) -> str:
    return with_options(server.url, prefix=f"test-{secrets.token_hex(6)}", timeout="2")


async def control(server: Server, *arguments: str) -> str:
    return await asyncio.to_thread(rabbitmqctl, server.place, *arguments)


def main_queue(url: str, queue: str = "q") -> str:
    prefix = url.partition("prefix=")[2].partition("&")[0]
    return Names.of_queue(prefix, queue).main


@pytest.fixture
async def raw(rabbitmq_url: str) -> AsyncIterator[aiormq.abc.AbstractChannel]:
    """A channel of somebody else's to the shared server."""
    async with aiormq.connect(rabbitmq_url) as connection:
        yield await connection.channel()


# Opening --------------------------------------------------------------------------------------


class TestUnreachableRabbitMQ(Unreachable):
    """A server that is not there, or says nothing."""

    scheme = "amqp"


async def test_a_server_of_something_else_is_told(redis_url: str) -> None:
    error = await refusal(redis_url.replace("redis://", "amqp://").removesuffix("/0"))
    assert isinstance(error, UnavailableError | IncompatibleBrokerError)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("amqp://", "no host"),
        ("amqp://127.0.0.1:70000", "port is 1 to 65535"),
        ("amqp://a:1,b:2", "no host of one server"),
        ("amqp://127.0.0.1?ca=/x.pem", "write amqps://"),
        ("amqp://127.0.0.1?prefix={x}", "letters, digits"),
        ("amqp://127.0.0.1?prefix=amq.x", "not amq"),
        ("amqp://127.0.0.1?timeout=0", "above 0"),
        ("amqp://127.0.0.1?start=latest", "for a topic"),
        ("amqp://127.0.0.1?expires=60", "for a topic"),
        ("amqp://127.0.0.1?prefx=x", r"did you mean 'prefix'\?"),
        ("amqps://127.0.0.1?ca=/missing.pem", "missing.pem"),
    ],
)
async def test_a_url_that_cannot_be_right_is_refused_before_anybody_is_asked(
    url: str, problem: str
) -> None:
    with pytest.raises(InvalidURLError, match=problem):
        await open_queue(with_options(url, queue="q"))


async def test_a_wrong_password_says_where_the_right_one_belongs(
    own: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bare = f"amqp://127.0.0.1:{own.port}"
    for url in (bare, f"amqp://molva:wr0ng-s3cret@127.0.0.1:{own.port}"):
        error = await refusal(url)
        assert isinstance(error, InvalidURLError)
        assert "MOLVA_AMQP_PASSWORD" in str(error)
        assert "s3cret" not in f"{error} {error!r} {error.__cause__!r} {caplog.text}"

    async with await open_queue(with_options(own.url, queue="q")) as queue:
        assert "s3cret" not in repr(queue)
    monkeypatch.setenv("MOLVA_AMQP_USERNAME", "molva")
    monkeypatch.setenv("MOLVA_AMQP_PASSWORD", "right-s3cret")
    async with await open_queue(with_options(bare, queue="q")) as queue:
        await queue.send(Message(b"1"))


async def test_a_vhost_that_is_missing_or_forbidden_is_named(own: Server) -> None:
    await control(own, "add_vhost", "shop")
    missing = await refusal(f"{own.url}/nowhere")
    forbidden = await refusal(f"{own.url}/shop")

    for error in (missing, forbidden):
        assert isinstance(error, InvalidURLError)
    assert "nowhere" in str(missing)
    assert "shop" in str(forbidden)
    await control(own, "set_permissions", "--vhost", "shop", "molva", ".*", ".*", ".*")
    async with await open_queue(with_options(f"{own.url}/shop", queue="q")) as queue:
        await queue.send(Message(b"1"))


async def test_a_user_without_rights_is_told_so(own: Server) -> None:
    await control(own, "add_user", "mute", "pw")
    await control(own, "set_permissions", "mute", "", "", "")
    error = await refusal(f"amqp://mute:pw@127.0.0.1:{own.port}")
    assert isinstance(error, InvalidURLError)
    assert "access to queue" in str(error)
    assert "'mute' needs the rights to configure, write and read" in str(error)


async def test_a_certificate_must_carry_the_hosts_name(tmp_path: Path) -> None:
    right = make_certificates(tmp_path / "right")
    wrong = make_certificates(tmp_path / "wrong", ("elsewhere.example",))
    with private_rabbitmq(certificates=right, hurried=True) as server:
        ca = {"ca": str(right.authority), "queue": "q"}
        async with await open_queue(with_options(server.url, **ca)) as queue:
            await queue.send(Message(b"1"))
            [delivery] = await queue.receive()
            await delivery.ack()
        unknown = await refusal(server.url)
        assert isinstance(unknown, InvalidURLError)
        assert "certificate" in str(unknown)
        plain = await refusal(server.url.replace("amqps://", "amqp://"))
        assert isinstance(plain, UnavailableError | IncompatibleBrokerError)
    with private_rabbitmq(certificates=wrong, hurried=True) as server:
        error = await refusal(with_options(server.url, ca=str(wrong.authority)))
        assert isinstance(error, InvalidURLError)
        assert "certificate is refused" in str(error)
        assert "ca= names the file" in str(error)


async def test_a_server_that_is_too_old_is_told_from_which_version(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_amqp_link, "_OLDEST", (99, 0))
    error = await refusal(url)
    assert isinstance(error, IncompatibleBrokerError)
    assert "99.0 or newer" in str(error)
    # Its connection is closed: what serves it would end with the loop, and be complained of later.
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def test_what_is_survived_depends_on_the_kind_of_queue(url: str) -> None:
    async with await open_queue(with_options(url, queue="q")) as queue:
        assert queue.capabilities.survives == {"kill", "power"}
        assert queue.capabilities.disciplines == {"fifo"}
    ranked = with_options(url, queue="ranked")
    async with await open_queue(with_options(ranked, discipline="priority")) as queue:
        assert queue.capabilities.survives == {"kill"}
    async with await open_queue(ranked) as queue:
        assert queue.capabilities.survives == {"kill"}  # it stays what it was made as


# Queues that are otherwise --------------------------------------------------------------------


async def test_a_queue_of_somebody_else_under_our_name_is_refused(
    url: str, raw: aiormq.abc.AbstractChannel
) -> None:
    await raw.queue_declare(main_queue(url), durable=True, arguments={"x-message-ttl": 1_000})
    error = await refusal(url)
    # By which argument is not the same, the server says of the first that it finds.
    assert isinstance(error, IncompatibleBrokerError | InvalidURLError)
    assert "'q'" in str(error)
    assert "or delete" in str(error)


async def test_what_a_queue_was_made_with_cannot_change(url: str) -> None:
    bounded = with_options(url, queue="bounded")
    async with await open_queue(with_options(bounded, capacity="5")):
        pass
    async with await open_queue(bounded) as queue:
        assert queue.capacity is None
    with pytest.raises(InvalidURLError, match=r"capacity=6 is refused.*'bounded'"):
        await open_queue(with_options(bounded, capacity="6"))
    refused = r"discipline=priority is refused.*leave it out, or delete 'test-.*queue\.bounded'"
    with pytest.raises(InvalidURLError, match=refused):
        await open_queue(with_options(bounded, discipline="priority"))


async def test_a_full_queue_refuses_and_takes_again_when_there_is_room(url: str) -> None:
    async with await open_queue(with_options(url, queue="q", capacity="10")) as queue:
        failures: list[Exception] = []
        for _ in range(5):
            try:
                await queue.send_many([Message(b"%d" % n) for n in range(100)])
            except SendManyError as error:
                failures += error.failures.values()
        assert {type(error) for error in failures} == {QueueFullError}
        stored = queue.counters.stored
        assert 10 <= stored <= 200
        for delivery in await take(queue, stored):
            await delivery.ack()
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await queue.send(Message(b"again"))
                    break
                except QueueFullError:
                    await asyncio.sleep(0.05)
        assert bodies(await take(queue, 1)) == [b"again"]


async def test_a_full_queue_loses_nothing_that_is_given_back(url: str) -> None:
    async with await open_queue(with_options(url, queue="q", capacity="2")) as queue:
        await queue.send_many([Message(b"1"), Message(b"2")])
        [first] = await take(queue, 1)
        await queue.send(Message(b"3"))
        while True:
            try:
                await queue.send(Message(b"more"))
            except QueueFullError:
                break
        await first.nack(delay=0.1)
        async with asyncio.timeout(PATIENCE):
            found: set[bytes] = set()
            while b"1" not in found:
                for delivery in await queue.receive(10):
                    found.add(delivery.message.body)
                    await delivery.ack()


async def test_a_message_over_the_servers_own_limit_fails_alone() -> None:
    settings: dict[str, str | int] = {"max_message_size": 2_000}
    with private_rabbitmq(settings=settings, hurried=True) as server:
        async with await open_queue(with_options(server.url, queue="q")) as queue:
            with pytest.raises(SendManyError) as failed:
                await queue.send_many([Message(b"a"), Message(bytes(5_000)), Message(b"b")])
            assert list(failed.value.failures) == [1]
            assert isinstance(failed.value.failures[1], MessageTooLargeError)
            # The server closed the channel, and what it had stored before is sent once more.
            found: set[bytes] = set()
            async with asyncio.timeout(PATIENCE):
                while found != {b"a", b"b"}:
                    found.update(bodies(await queue.receive(10)))


# What others do -------------------------------------------------------------------------------


async def test_a_queue_that_was_deleted_is_made_anew_and_the_log_says_so(
    url: str, raw: aiormq.abc.AbstractChannel, caplog: pytest.LogCaptureFixture
) -> None:
    async with await open_queue(with_options(url, queue="q")) as queue:
        waiting = asyncio.create_task(queue.receive(wait=PATIENCE))
        await asyncio.sleep(0.3)
        await raw.queue_delete(main_queue(url))
        await asyncio.sleep(0.3)
        await queue.send(Message(b"1"))
        async with asyncio.timeout(PATIENCE):
            assert bodies(await waiting) == [b"1"]
        assert any("had been removed" in line for line in caplog.messages)


async def test_a_queue_of_dead_letters_that_was_deleted_is_made_anew(
    url: str, raw: aiormq.abc.AbstractChannel
) -> None:
    async with await open_queue(with_options(url, queue="q")) as queue:
        await queue.send(Message(b"bad"))
        [delivery] = await take(queue, 1)
        await raw.queue_delete(f"{main_queue(url)}.dead")
        await delivery.reject("bad")
        assert [letter.message.body for letter in await queue.dead_letters()] == [b"bad"]

        await raw.queue_delete(f"{main_queue(url)}.dead")
        about = aiormq.spec.Basic.Properties(message_id="none of ours")
        await raw.basic_publish(b"foreign", routing_key=main_queue(url), properties=about)
        letters: list[DeadLetter] = []
        async with asyncio.timeout(PATIENCE):
            while not letters:
                assert await queue.receive(1, wait=0.3) == []
                with contextlib.suppress(UnavailableError):
                    letters = await queue.dead_letters()
        assert [letter.message.body for letter in letters] == [b"foreign"]


@pytest.mark.parametrize("kind", ["queue", "exchange"])
async def test_a_ladder_that_was_deleted_is_made_anew(
    url: str, raw: aiormq.abc.AbstractChannel, kind: str
) -> None:
    delete = raw.queue_delete if kind == "queue" else raw.exchange_delete
    async with await open_queue(with_options(url, queue="q")) as queue:
        await queue.send(Message(b"1", delay=0.1))
        [delivery] = await take(queue, 1)
        await delete(f"{main_queue(url)}.later.1")
        await delivery.nack(delay=0.1)
        [delivery] = await take(queue, 1)
        assert delivery.attempt == 2
        await delete(f"{main_queue(url)}.later.1")
        await queue.send(Message(b"2", delay=0.1))
        assert bodies(await take(queue, 1)) == [b"2"]


async def test_what_was_sent_before_an_exchange_was_missed_is_not_sent_twice(
    url: str, raw: aiormq.abc.AbstractChannel
) -> None:
    async with await open_queue(with_options(url, queue="q")) as queue:
        await queue.send(Message(b"warm", delay=0.1))
        [delivery] = await take(queue, 1)
        await delivery.ack()
        await raw.exchange_delete(f"{main_queue(url)}.later.1")
        plain = [Message(b"%d" % n) for n in range(50)]
        failures: dict[int, Exception] = {}
        try:
            await queue.send_many([*plain, Message(b"later", delay=0.1)])
        except SendManyError as error:
            failures.update(error.failures)
        # Whether the server has these is not known.
        assert all(isinstance(problem, UnavailableError) for problem in failures.values())
        assert 50 not in failures
        found: list[bytes] = []
        while some := await queue.receive(100, wait=1.0):
            found += bodies(some)
        assert len(found) == len(set(found))
        assert b"later" in found


async def test_a_queue_that_was_deleted_stays_so_where_none_may_be_made(
    url: str, raw: aiormq.abc.AbstractChannel
) -> None:
    await (await open_queue(with_options(url, queue="q"))).close()
    async with await open_queue(with_options(url, queue="q", create="never")) as queue:
        await raw.queue_delete(main_queue(url))
        with pytest.raises(QueueNotFoundError, match="create=never"):
            await queue.send(Message(b"1"))
        with pytest.raises(QueueNotFoundError, match="create=never"):
            await queue.receive(wait=1.0)


async def test_somebody_elses_message_becomes_a_dead_letter_that_says_so(
    url: str, raw: aiormq.abc.AbstractChannel
) -> None:
    async with await open_queue(with_options(url, queue="q")) as queue:
        await raw.basic_publish(
            b"hello", routing_key=main_queue(url), properties=Basic.Properties(message_id="hello")
        )
        await raw.basic_publish(
            b"odd",
            routing_key=main_queue(url),
            properties=Basic.Properties(message_id="7", headers={"molva-attempts": "many"}),
        )
        await queue.send(Message(b"ours"))

        assert bodies(await take(queue, 1)) == [b"ours"]

        letters: list[DeadLetter] = []
        async with asyncio.timeout(PATIENCE):
            while len(letters) < 2:
                letters = await queue.dead_letters()
        assert sorted(letter.message.body for letter in letters) == [b"hello", b"odd"]
        assert all("molva" in letter.reason.lower() for letter in letters)


async def test_what_is_settled_side_by_side_is_settled_as_it_was_told(url: str) -> None:
    number = 200
    async with await open_queue(with_options(url, queue="q")) as queue:
        await queue.send_many([Message(b"%d" % n) for n in range(number)])
        *failed, done = await take(queue, number)
        driver = queue._driver
        again = [Settlement(one.token, Action.NACK, attempt=one.attempt) for one in failed]
        nacking = asyncio.create_task(driver.settle_batch(again))
        for _ in range(5):  # some are written
            await asyncio.sleep(0)
        acked = await driver.settle_batch([Settlement(done.token, Action.ACK)])
        assert await nacking == [Outcome.SETTLED] * len(failed)
        assert acked == [Outcome.SETTLED]
        assert sorted(bodies(await take(queue, len(failed)))) == sorted(bodies(failed))


async def test_what_is_settled_twice_in_a_call_is_settled_once(url: str) -> None:
    async with await open_queue(with_options(url, queue="q")) as queue:
        await queue.send_many([Message(b"1"), Message(b"2")])
        one, two = [delivery.token for delivery in await take(queue, 2)]
        told = [(one, Action.ACK), (one, Action.RETURN), (two, Action.RETURN)]
        found = await queue._driver.settle_batch([Settlement(*each) for each in told])
        assert found == [Outcome.SETTLED, Outcome.LEASE_LOST, Outcome.SETTLED]
        assert bodies(await take(queue, 1)) == [b"2"]
        assert await queue.receive(wait=0.3) == []


async def test_somebody_elses_message_is_not_acknowledged_with_others(
    url: str, raw: aiormq.abc.AbstractChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = AMQPSender.publish
    is_away = True

    async def perhaps(self: AMQPSender, parcels: Sequence[Parcel]) -> list[Exception | None]:
        if is_away and parcels[0].routing_key.endswith(".dead"):
            raise UnavailableError("away")
        return await publish(self, parcels)

    monkeypatch.setattr(AMQPSender, "publish", perhaps)
    async with await open_queue(with_options(url, queue="q")) as queue:
        about = aiormq.spec.Basic.Properties(message_id="none of ours")
        await raw.basic_publish(b"foreign", routing_key=main_queue(url), properties=about)
        await queue.send(Message(b"good"))
        [good] = await take(queue, 1)
        await good.ack()
        is_away = False
        async with asyncio.timeout(PATIENCE):
            while not (letters := await queue.dead_letters()):
                await asyncio.sleep(0.05)
        assert [letter.message.body for letter in letters] == [b"foreign"]


@pytest.mark.parametrize(
    "headers",
    [
        {"molva-key": 5},
        {"molva-meta": '{"ttl":"soon"}'},
        {"molva-meta": "[" * 60_000},
        {"x-delivery-count": "a", "x-acquired-count": "b", "molva-stored-us": "c"},
    ],
)
async def test_fields_that_are_none_make_a_dead_letter(
    url: str, raw: aiormq.abc.AbstractChannel, headers: dict[str, aiormq.abc.FieldValue]
) -> None:
    async with await open_queue(with_options(url, queue="q")) as queue:
        about = aiormq.spec.Basic.Properties(message_id="00" * 16, headers=headers)
        await raw.basic_publish(b"bad", routing_key=main_queue(url), properties=about)
        await queue.send(Message(b"good"))
        [good] = await take(queue, 1)
        assert good.message.body == b"good"
        await good.ack()
        async with asyncio.timeout(PATIENCE):
            while not (letters := await queue.dead_letters()):
                await asyncio.sleep(0.05)
        assert [letter.message.body for letter in letters] == [b"bad"]


async def test_headers_that_cannot_be_written_as_they_were_read_hold_nobody_up(
    url: str, raw: aiormq.abc.AbstractChannel
) -> None:
    async with await open_queue(with_options(url, queue="q")) as queue:
        about = aiormq.spec.Basic.Properties(message_id="none of ours", headers={"text": "~~~~"})
        frames = aiormq.abc.ChannelFrame.marshall(
            raw.number,
            [
                aiormq.spec.Basic.Publish(exchange="", routing_key=main_queue(url)),
                ContentHeader(properties=about, body_size=3),
                ContentBody(b"bad"),
            ],
        )
        # Latin letters, where the protocol has UTF-8.
        payload = frames.payload.replace(b"~~~~", b"\xe4\xf6\xfc\xdf")
        assert isinstance(raw, aiormq.Channel)
        await raw.write_queue.put(aiormq.abc.ChannelFrame(payload, should_close=False))
        async with asyncio.timeout(PATIENCE):
            while not (letters := await queue.dead_letters()):
                await queue.receive(1, wait=0.1)
        assert [letter.message.body for letter in letters] == [b"bad"]


async def test_a_reason_that_is_no_text_is_kept_as_far_as_it_is(url: str) -> None:
    async with await open_queue(with_options(url, queue="q")) as queue:
        await queue.send_many([Message(b"1"), Message(b"2")])
        for delivery in await take(queue, 2):
            await delivery.reject("no file named \udce4")
        letters = await queue.dead_letters()
        assert [letter.reason for letter in letters] == ["no file named ?"] * 2


async def test_what_another_client_gives_up_is_a_dead_letter_with_the_servers_reason(
    url: str, raw: aiormq.abc.AbstractChannel
) -> None:
    async with await open_queue(with_options(url, queue="q")) as queue:
        message = Message(b"1", key="k", headers={"n": "1"})
        await queue.send(message)
        got = await raw.basic_get(main_queue(url))
        await raw.basic_reject(got.delivery_tag or 0, requeue=False)
        letters: list[DeadLetter] = []
        async with asyncio.timeout(PATIENCE):
            while not letters:
                letters = await queue.dead_letters()
        [letter] = letters
        assert letter.message == message
        assert letter.reason == "RabbitMQ gave it up: rejected"
        assert await queue.replay() == 1
        [again] = await take(queue, 1)
        assert (again.message, again.attempt) == (message, 1)


async def test_two_who_look_at_dead_letters_at_once_both_see_all(url: str) -> None:
    one, two = [await open_queue(with_options(url, queue="q")) for _ in range(2)]
    await one.send_many([Message(b"%d" % n) for n in range(50)])
    for delivery in await take(one, 50):
        await delivery.reject("bad")

    found = await asyncio.gather(*(queue.dead_letters() for queue in (one, two, one, two)))

    expected = [b"%d" % n for n in range(50)]
    assert [[letter.message.body for letter in letters] for letters in found] == [expected] * 4
    await one.close()
    await two.close()


async def test_a_subscription_whose_worker_is_busy_cannot_be_removed(url: str) -> None:
    named = with_options(url, topic="t", subscription="s")
    async with await open_topic(with_options(url, topic="t")) as topic:
        async with await open_subscription(named) as worker:
            await topic.send(Message(b"1"))
            [held] = await take(worker, 1)
            await asyncio.sleep(0.5)  # it is not subscribed any more

            with pytest.raises(InUseError, match="'s' is being consumed; stop its consumers"):
                await topic.remove_subscription("s")

            await held.ack()
        assert await topic.remove_subscription("s")


async def test_a_subscription_whose_worker_receives_now_and_then_cannot_be_removed(
    url: str,
) -> None:
    named = with_options(url, topic="t", subscription="s")

    async def work(worker: Subscription) -> None:
        while True:
            await worker.receive(wait=0.2)
            await asyncio.sleep(0.4)

    async with (
        await open_topic(with_options(url, topic="t")) as topic,
        await open_subscription(named) as worker,
    ):
        working = asyncio.create_task(work(worker))
        for _ in range(3):
            with pytest.raises(InUseError):
                await topic.remove_subscription("s")
        working.cancel()


# What requesters leave ------------------------------------------------------------------------


_OF_Q = ("queue.q", "queue.q.dead")


async def queues(server: Server) -> str:
    return await control(server, "list_queues", "name", "messages", "--no-table-headers")


async def test_what_a_killed_requester_left_expires_and_nothing_of_the_living(
    own: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_inbox, "_EXPIRES", 1.0)
    url = own_url(own)
    requests, replies = (with_options(url, **to) for to in ({"queue": "q"}, {"topic": "replies"}))
    doomed = await open_requester(requests, replies)
    async with (
        await open_requester(requests, replies) as requester,
        await open_responder(requests) as responder,
    ):

        async def shout(request: Delivery) -> Message:
            return Message(request.message.body.upper())

        answering = asyncio.create_task(responder.run(shout))
        # As if it had been killed: it says nothing more.
        doomed._listening.cancel()
        doomed._tidying.cancel()
        await asyncio.wait((doomed._listening,))
        assert doomed._inbox._subscription is not None
        await doomed._inbox._subscription.close()
        left, kept = doomed._inbox.address, requester._inbox.address
        assert left in await queues(own)
        async with asyncio.timeout(4 * PATIENCE):
            while left in (told := await queues(own)):
                await asyncio.sleep(0.5)

        assert f"{kept}\t" in told
        assert (await requester.ask(Message(b"a"), timeout=PATIENCE)).body == b"A"
        responder.stop()
        await answering
    await doomed._inbox._topic.close()
    await doomed.requests.close()


async def test_replies_to_nobody_are_gone_with_the_next_requester(own: Server) -> None:
    url = own_url(own)
    requests, replies = (with_options(url, **to) for to in ({"queue": "q"}, {"topic": "replies"}))
    async with await open_topic(replies) as topic:
        await topic.send_many([Message(b"late") for _ in range(20)])
    async with await open_requester(requests, replies) as requester:
        await eventually(lambda: requester.counters.others == 20)
    prefix = url.partition("prefix=")[2].partition("&")[0]
    left = [line for line in (await queues(own)).splitlines() if line.startswith(prefix)]
    assert sorted(left) == [f"{prefix}.{name}\t0" for name in ("kept.replies", *_OF_Q)]


async def test_a_subscription_that_expires_is_opened_as_it_was_made(url: str) -> None:
    named = with_options(url, topic="t", subscription="s")
    async with (
        await open_topic(with_options(url, topic="t")) as topic,
        await open_subscription(with_options(named, expires="60")) as one,
        await open_subscription(named) as other,
    ):
        await topic.send_many([Message(b"1"), Message(b"2")])
        assert bodies([*await take(one, 1), *await take(other, 1)]) == [b"1", b"2"]
        with pytest.raises(IncompatibleBrokerError, match="x-expires"):
            await open_subscription(with_options(named, expires="61"))


# What is kept, counted, given back --------------------------------------------------------------


async def test_what_is_sent_before_anybody_subscribed_waits_for_the_first(url: str) -> None:
    async with await open_topic(with_options(url, topic="t")) as topic:
        await topic.send_many([Message(b"%d" % n) for n in range(700)])
        subscription = with_options(url, topic="t", subscription="s")
        async with await open_subscription(subscription) as first:
            await topic.send(Message(b"700"))
            found = bodies(await take(first, 701))
            assert found == [b"%d" % n for n in range(701)]
            async with await open_subscription(
                with_options(url, topic="t", subscription="later")
            ) as later:
                assert await later.receive(10, wait=0.3) == []


async def test_the_first_subscription_is_opened_also_while_others_send_without_a_pause(
    url: str,
) -> None:
    """What they send faster than it could be moved is not waited for, and not lost."""
    sent: set[bytes] = set()

    async def flood(topic: Topic) -> None:
        for n in itertools.count():
            messages = [Message(b"%d.%d" % (n, m)) for m in range(100)]
            await topic.send_many(messages)
            sent.update(message.body for message in messages)

    topic = await open_topic(with_options(url, topic="t"))
    flooding = asyncio.create_task(flood(topic))
    await eventually(lambda: len(sent) >= 500)
    async with asyncio.timeout(25):
        subscription = await open_subscription(with_options(url, topic="t", subscription="s"))
    assert not flooding.done()
    flooding.cancel()
    await asyncio.wait([flooding])
    found: set[bytes] = set()
    while some := await subscription.receive(1_000, wait=1.0):
        found.update(bodies(some))
        await subscription.settle([(delivery, Action.ACK) for delivery in some])
    assert sent <= found
    await subscription.close()
    await topic.close()


async def test_giving_back_counts_nothing_however_often(url: str) -> None:
    async with await open_queue(with_options(url, queue="q")) as queue:
        await queue.send(Message(b"1"))
    for _ in range(8):
        async with await open_queue(with_options(url, queue="q")) as queue:
            [delivery] = await take(queue, 1)
            assert delivery.attempt == 1


async def test_what_nobody_here_fetches_another_gets(url: str) -> None:
    one, two = [await open_queue(with_options(url, queue="q")) for _ in range(2)]
    await one.send_many([Message(b"%d" % n) for n in range(300)])
    # Comes back at once, again and again: it is sent ahead.
    taken = 0
    while taken < 100:
        for delivery in await one.receive(min(5, 100 - taken)):
            await delivery.ack()
            taken += 1
    await eventually(lambda: one._driver._ready)  # type: ignore[attr-defined]

    rest = await take(two, 200)

    assert sorted(int(delivery.message.body) for delivery in rest) == list(range(100, 300))
    await one.close()
    await two.close()


@pytest.mark.parametrize("discipline", ["fifo", "priority"])
async def test_a_message_that_kills_its_workers_becomes_a_dead_letter(
    url: str, discipline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_amqp_consumer, "_GRACE", 2)
    for name in ("a", "b", "c"):
        letter = await _killed_for(with_options(url, queue=name, discipline=discipline))
        if letter is not None:
            break
    assert letter is not None, "a busy machine leaves a death uncounted, and not three in a row"
    assert (letter.message.body, letter.attempts) == (b"poison", 5)
    assert "never settled" in letter.reason


async def _killed_for(named: str) -> DeadLetter | None:
    """Let a message kill seven workers; return the dead letter, None where it comes again."""
    async with await open_queue(named) as queue, starting() as start:
        await queue.send(Message(b"poison"))
        for _ in range(7):
            doomed = await (await start("hold", named)).ready()
            await eventually(lambda actor=doomed: actor.lines)  # type: ignore[misc]
            # Killed at once, it might leave the message and its copy, each to be counted.
            await asyncio.sleep(0.5)
            await doomed.kill()

        letters: list[DeadLetter] = []
        async with asyncio.timeout(PATIENCE):
            while not letters:
                for delivery in await queue.receive(wait=0.2):
                    await delivery.ack()
                    return None
                letters = await queue.dead_letters()
        [letter] = letters
        return letter


async def test_workers_that_are_killed_in_turn_bury_no_good_message(url: str) -> None:
    named = with_options(url, queue="q")
    async with await open_queue(named) as queue, starting() as start:
        await queue.send_many([Message(b"%d" % n) for n in range(20)])
        for _ in range(6):
            doomed = await (await start("hold", named)).ready()
            await eventually(lambda actor=doomed: len(actor.lines) == 20)  # type: ignore[misc]
            await doomed.kill()
        assert {d.attempt for d in await take(queue, 20)} == {1}


@pytest.mark.parametrize("delay", [0.05, 0.2, 0.75, 1.6])
async def test_a_delay_is_never_cut_short_and_hardly_too_long(url: str, delay: float) -> None:
    async with await open_queue(with_options(url, queue="q")) as queue:
        await queue.send(Message(b"warm", delay=delay))  # makes the ladder
        await take(queue, 1)
        began = time.monotonic()
        await queue.send(Message(b"1", delay=delay))
        await take(queue, 1)
        took = time.monotonic() - began
        assert delay <= took < delay + 1.0


async def test_priorities_are_kept_by_what_comes_again(url: str) -> None:
    named = with_options(url, queue="q", discipline="priority")
    async with await open_queue(named) as queue:
        await queue.send_many([Message(b"low"), Message(b"high", priority=9)])
        [high] = await take(queue, 1)
        await high.nack(delay=0.1)
        await asyncio.sleep(0.5)
        assert bodies(await take(queue, 2)) == [b"high", b"low"]


# Going away -------------------------------------------------------------------------------------


async def test_a_token_from_before_a_cut_settles_nothing(own: Server) -> None:
    url = with_options(own_url(own), queue="q")
    async with await open_queue(url) as queue:
        await queue.send_many([Message(b"%d" % n) for n in range(3)])
        late = await take(queue, 3)
        await control(own, "close_all_connections", "a test")
        again = await take(queue, 3)
        # The numbers are the same on the new channel, and are others' messages there.
        for delivery in late:
            with pytest.raises(LeaseLostError):
                await delivery.ack()
        assert {d.attempt for d in again} == {1}
        for delivery in again:
            await delivery.nack()
        assert len(await take(queue, 3)) == 3


async def test_connections_that_break_in_the_middle_come_back(rabbitmq_url: str) -> None:
    port = int(rabbitmq_url.rpartition(":")[2])
    proxy = Proxy(port, seed=1)
    await proxy.start()
    url = with_options(
        f"amqp://127.0.0.1:{proxy.port}",
        prefix=f"test-{secrets.token_hex(6)}",
        timeout="3",
        queue="q",
    )
    got: set[bytes] = set()
    async with await open_queue(url) as queue:

        async def handle(delivery: Delivery) -> None:
            got.add(delivery.message.body)

        running = asyncio.create_task(queue.run(handle, concurrency=4))
        for number in range(200):
            if number % 50 == 25:
                proxy.reset()
            await send_surely(queue, Message(b"%d" % number))
        async with asyncio.timeout(PATIENCE):
            while len(got) < 200:
                await asyncio.sleep(0.02)
        queue.stop()
        await running
    await proxy.close()


async def test_a_full_memory_refuses_what_is_sent_in_time_and_lets_consumers_go_on(
    own: Server,
) -> None:
    async with await open_queue(with_options(own_url(own), queue="q")) as queue:
        await queue.send_many([Message(b"%d" % n) for n in range(20)])
        await control(own, "set_vm_memory_high_watermark", "0.00001")
        try:
            async with asyncio.timeout(15.0):
                refused = ""
                while not refused:  # the first after the alarm is still taken
                    try:
                        await queue.send(Message(b"more"))
                    except UnavailableError as error:
                        refused = str(error)
            assert "memory or disk is full" in refused
            async with asyncio.timeout(PATIENCE):
                held = await take(queue, 20)
                for delivery in held:
                    await delivery.ack()
        finally:
            await control(own, "set_vm_memory_high_watermark", "0.4")
        async with asyncio.timeout(PATIENCE):
            await send_surely(queue, Message(b"again"))
            found: list[bytes] = []
            while b"again" not in found:
                found += bodies(await queue.receive(10))


async def test_what_a_full_memory_does_not_let_store_goes_back_and_holds_up_no_ack(
    own: Server,
) -> None:
    url = with_options(own_url(own), queue="q")
    async with await open_queue(url) as queue, await open_queue(url) as other:
        await queue.send_many([Message(b"%d" % n) for n in range(4)])
        held = await take(queue, 4)
        await control(own, "set_vm_memory_high_watermark", "0.00001")
        try:
            with contextlib.suppress(UnavailableError):
                while True:  # the first after the alarm is still taken
                    await queue.send(Message(b"more"))
            kinds = (Action.ACK, Action.REJECT, Action.NACK, Action.RETURN)
            settlements = [
                Settlement(one.token, kind, delay=0.1 * (kind is Action.NACK), reason="bad")
                for one, kind in zip(held, kinds, strict=True)
            ]
            settling = asyncio.create_task(queue._driver.settle_batch(settlements))
            await asyncio.sleep(1.0)
            # The first is done with while the others still wait for the server.
            [late] = await queue._driver.extend_batch([held[0].token], 1.0)
            assert (late, settling.done()) == (Outcome.LEASE_LOST, False)

            lost, settled = Outcome.LEASE_LOST, Outcome.SETTLED
            assert await settling == [settled, lost, settled, settled]

            found: list[bytes] = []
            async with asyncio.timeout(PATIENCE):
                while not {b"1", b"2", b"3"} <= set(found):
                    found += bodies(await other.receive(10))
            assert b"0" not in found
        finally:
            await control(own, "set_vm_memory_high_watermark", "0.4")


@pytest.mark.parametrize("discipline", ["fifo", "priority"])
async def test_a_dead_letter_that_cannot_be_stored_comes_again_until_it_can(
    url: str,
    discipline: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish = AMQPSender.publish
    is_away = True

    async def perhaps(self: AMQPSender, parcels: Sequence[Parcel]) -> list[Exception | None]:
        if is_away and any(parcel.routing_key.endswith(".dead") for parcel in parcels):
            raise UnavailableError("away")
        return await publish(self, parcels)

    monkeypatch.setattr(AMQPSender, "publish", perhaps)
    async with await open_queue(with_options(url, queue="q", discipline=discipline)) as queue:
        expired = Message(b"old", ttl=0.01)
        await queue.send_many([expired, Message(b"bad"), Message(b"good")])
        await asyncio.sleep(0.05)
        found: dict[bytes, Delivery] = {}
        async with asyncio.timeout(PATIENCE):
            while len(found) < 2:
                found |= {one.message.body: one for one in await queue.receive(3, wait=1.0)}
        await found[b"good"].ack()
        with pytest.raises(LeaseLostError):
            await found[b"bad"].reject("bad")
        [again] = await take(queue, 1)
        assert (again.message.body, again.attempt) == (b"bad", 1)
        assert not any("became a dead letter" in line for line in caplog.messages)
        is_away = False
        await again.reject("bad")
        letters: list[DeadLetter] = []
        async with asyncio.timeout(PATIENCE):
            while len(letters) < 2:
                assert await queue.receive(1, wait=0.2) == []
                letters = await queue.dead_letters()
        assert {letter.message.body for letter in letters} == {b"old", b"bad"}
        lines = [one for one in caplog.records if "could not be stored" in one.getMessage()]
        assert all(hasattr(one, "message_id") for one in lines)
        assert lines


async def test_a_server_that_hangs_fails_sends_in_time(own: Server) -> None:
    async with await open_queue(with_options(own_url(own), queue="q")) as queue:
        await queue.send(Message(b"1"))
        own.pause()
        try:
            async with asyncio.timeout(2.0 + AT_ONCE):
                with pytest.raises(UnavailableError, match="not confirmed within 2 s"):
                    await queue.send(Message(b"2"))
        finally:
            own.resume()
        async with asyncio.timeout(PATIENCE):
            await send_surely(queue, Message(b"3"))
            found: list[bytes] = []
            while not {b"1", b"3"} <= set(found):
                found += bodies(await queue.receive(10))


async def test_a_connection_that_died_without_a_word_is_noticed(
    own: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_amqp_link, "ANSWER", 0.5)
    proxy = Proxy(own.port, seed=1)
    await proxy.start()
    url = with_options(own_url(own), queue="q")
    through = url.replace(f":{own.port}", f":{proxy.port}")
    async with await open_queue(through) as queue, await open_queue(url) as other:
        waiting = asyncio.create_task(queue.receive(wait=60.0))
        await asyncio.sleep(0.3)
        proxy.mute()
        await other.send(Message(b"1"))
        # Heartbeats would tell in a minute and a half.
        async with asyncio.timeout(PATIENCE):
            assert bodies(await waiting) == [b"1"]
    await proxy.close()


@pytest.mark.parametrize("how", ["given up", "never answered"])
async def test_settling_on_a_connection_that_died_without_a_word_fails_and_the_next_one_works(
    own: Server, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(_amqp_consumer, "ANSWER", 2 * PATIENCE if how == "given up" else 0.5)
    proxy = Proxy(own.port, seed=1)
    await proxy.start()
    url = with_options(own_url(own), queue="q")
    through = url.replace(f":{own.port}", f":{proxy.port}")
    async with await open_queue(through) as queue, await open_queue(url) as other:
        await other.send(Message(b"1"))
        [held] = await take(queue, 1)
        proxy.mute()
        settling = asyncio.create_task(held.ack())
        await asyncio.sleep(0.3)
        if how == "given up":  # as a receive beside it does that has no answer
            await queue._driver._link.drop()  # type: ignore[attr-defined]
        async with asyncio.timeout(PATIENCE / 2):
            with pytest.raises((UnavailableError, LeaseLostError)):
                await settling
        await other.send(Message(b"2"))
        found: list[bytes] = []
        # Heartbeats would tell in a minute and a half.
        async with asyncio.timeout(PATIENCE):
            while b"2" not in found:
                with contextlib.suppress(UnavailableError, LeaseLostError):
                    for delivery in await queue.receive(10, wait=1.0):
                        found.append(delivery.message.body)
                        await delivery.ack()
    await proxy.close()


async def test_a_subscription_that_is_refused_leaves_nothing_behind(
    url: str, raw: aiormq.abc.AbstractChannel
) -> None:
    name = with_options(url, topic="t", subscription="s", start="earliest")
    with pytest.raises(UnsupportedFeatureError, match="earliest"):
        await open_subscription(name)
    with pytest.raises(UnsupportedFeatureError, match="capacity"):
        await open_topic(with_options(url, topic="t", capacity="5"))

    prefix = url.partition("prefix=")[2]
    with pytest.raises(ChannelNotFoundEntity):
        await raw.queue_declare(Names.of_subscription(prefix, "t", "s").main, passive=True)


async def test_letters_that_have_no_id_have_one_each_that_stays(
    url: str, raw: aiormq.abc.AbstractChannel
) -> None:
    async with await open_queue(with_options(url, queue="q")) as queue:
        about = aiormq.spec.Basic.Properties(message_id="none of ours")
        for _ in range(2):
            await raw.basic_publish(b"foreign", routing_key=main_queue(url), properties=about)
        letters: list[DeadLetter] = []
        async with asyncio.timeout(PATIENCE):
            while len(letters) < 2:
                await queue.receive(1, wait=0.3)
                letters = await queue.dead_letters()
        ids = {letter.message.id for letter in letters}
        assert len(ids) == 2
        assert {letter.message.id for letter in await queue.dead_letters()} == ids
        assert await queue.replay() == 2
        again = await take(queue, 2)
        assert {delivery.message.id for delivery in again} == ids
        for delivery in again:
            await delivery.ack()


@pytest.mark.parametrize("discipline", ["fifo", "priority"])
async def test_a_full_queue_of_what_a_consumer_left_goes_on(url: str, discipline: str) -> None:
    named = with_options(url, queue="q", discipline=discipline, capacity="3")
    async with await open_queue(named) as sender:
        left = await open_queue(named)
        await sender.send_many([Message(b"%d" % n) for n in range(2)])
        await take(left, 2)
        # What is held does not count for the server, and so makes room.
        with contextlib.suppress(QueueFullError):
            for n in range(2, 20):
                await sender.send(Message(b"%d" % n))
        await left.close()

        async with await open_queue(named) as queue:
            found: list[bytes] = []
            async with asyncio.timeout(PATIENCE):
                while len(found) < 3:
                    for delivery in await queue.receive(1, wait=1.0):
                        found.append(delivery.message.body)
                        await delivery.ack()
            assert {b"0", b"1"} & set(found)
