"""Messages that JetStream stores as one: all or none, in their order, whatever is refused."""

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator

import nats
import pytest
from nats.aio.client import Client
from nats.js import JetStreamContext

from molva.messaging import (
    Message,
    Queue,
    QueueFullError,
    SendManyError,
    UnavailableError,
    open_queue,
    open_topic,
    with_options,
)
from molva.messaging.conformance import PATIENCE, bodies, take
from molva.messaging.drivers import _nats_link
from molva.messaging.drivers._nats_messages import Names
from tests.brokers import private_nats
from tests.faults.live.proxy import Proxy
from tests.messaging.nats_versions import need_batches
from tests.messaging.servers import lose_nothing_while_killed, send_surely

BATCH = "Nats-Batch-Id"


@pytest.fixture(autouse=True)
def server_with_batches(nats_url: str) -> None:
    need_batches(nats_url)


@pytest.fixture
def prefix() -> str:
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
def url(nats_url: str, prefix: str) -> str:
    return with_options(nats_url, prefix=prefix, queue="q", sync="always")


@pytest.fixture
def names(prefix: str) -> Names:
    return Names(prefix, "queue", "q")


@pytest.fixture
async def client(nats_url: str) -> AsyncIterator[Client]:
    client = await nats.connect(nats_url)
    yield client
    await client.close()


def numbered(number: int) -> list[Message]:
    return [Message(b"%d" % n) for n in range(number)]


async def stored(streams: JetStreamContext, names: Names) -> list[tuple[bytes, str | None]]:
    """Return body and batch of each message of a stream, in order."""
    state = (await streams.stream_info(names.stream)).state
    found = []
    for seq in range(state.first_seq, state.last_seq + 1):
        message = await streams.get_msg(names.stream, seq)
        found.append((message.data or b"", (message.headers or {}).get(BATCH)))
    return found


async def test_many_are_one_batch_and_few_are_none(url: str, client: Client, names: Names) -> None:
    async with await open_queue(url) as queue:
        await queue.send_many(numbered(100))
        await queue.send_many(numbered(3))

        found = await stored(client.jetstream(), names)

    assert [body for body, _ in found] == [m.body for m in numbered(100) + numbered(3)]
    assert len({batch for _, batch in found[:100]}) == 1
    assert found[0][1] is not None
    assert {batch for _, batch in found[100:]} == {None}


async def test_nothing_is_a_batch_where_nobody_vouches_for_syncing(
    url: str, client: Client, names: Names
) -> None:
    """A batch is quicker by its one sync: where none is made for each message, it is slower."""
    async with await open_queue(url.replace("&sync=always", "")) as queue:
        await queue.send_many(numbered(100))

        found = await stored(client.jetstream(), names)

    assert len(found) == 100
    assert {batch for _, batch in found} == {None}


async def test_sends_of_many_tasks_are_one_batch(url: str, client: Client, names: Names) -> None:
    async with await open_queue(url) as queue:
        await asyncio.gather(*(queue.send(message) for message in numbered(100)))

        found = await stored(client.jetstream(), names)

    assert sorted(body for body, _ in found) == sorted(m.body for m in numbered(100))
    assert len({batch for _, batch in found if batch}) <= 2


async def test_one_that_is_stored_already_is_stored_once_and_the_others_too(
    url: str, client: Client, names: Names
) -> None:
    messages = numbered(100)
    async with await open_queue(url) as queue:
        await queue.send(messages[40])
        await queue.send_many([*messages, messages[7]])

        found = await stored(client.jetstream(), names)

    # As they came: one that is known again stays where it was.
    assert [body for body, _ in found] == [b"40", *(m.body for m in messages if m.body != b"40")]


async def test_a_stream_that_takes_no_batches_takes_messages(
    url: str, client: Client, names: Names
) -> None:
    async with await open_queue(url) as queue:
        config = (await client.jetstream().stream_info(names.stream)).config
        assert config.allow_atomic
        config.allow_atomic = False
        await client.jetstream().update_stream(config)

        await queue.send_many(numbered(50))

        found = await stored(client.jetstream(), names)
    assert found == [(m.body, None) for m in numbered(50)]


async def test_a_stream_of_an_earlier_version_takes_batches_when_it_is_opened(
    url: str, client: Client, names: Names
) -> None:
    async with await open_queue(url.replace("&sync=always", "")) as queue:
        await queue.send_many(numbered(50))
        before = (await client.jetstream().stream_info(names.stream)).config
        assert not before.allow_atomic
    async with await open_queue(url) as queue:
        await queue.send_many(numbered(50))

        after = (await client.jetstream().stream_info(names.stream)).config
        found = await stored(client.jetstream(), names)
        assert len(await take(queue, 100)) == 100

    assert after.allow_atomic
    after.allow_atomic = before.allow_atomic
    after.metadata = before.metadata  # the server writes down what it takes to read it
    assert after == before
    assert [batch is None for _, batch in found] == [True] * 50 + [False] * 50


# What a user of one deployment needs, and no more: no right to change a stream.
RIGHTS = (
    *("molva.>", "_INBOX.>", "$JS.ACK.>", "$JS.API.CONSUMER.>"),
    *("$JS.API.STREAM.INFO.>", "$JS.API.STREAM.CREATE.>", "$JS.API.STREAM.MSG.GET.>"),
)


async def test_without_the_right_to_change_a_stream_messages_are_stored_one_by_one() -> None:
    allowed = ", ".join(f'"{subject}"' for subject in RIGHTS)
    few = f"{{user: few, password: p, permissions: {{publish: {{allow: [{allowed}]}}}}}}"
    users = f"{{users: [{{user: all, password: p}}, {few}]}}"
    with private_nats(authorization=users, no_auth_user="all") as server:
        bare = with_options(server.url, queue="q")
        async with await open_queue(bare) as queue:
            await queue.send_many(numbered(50))
        url = with_options(bare.replace("nats://", "nats://few:p@"), sync="always")
        async with await open_queue(url) as queue:
            await queue.send_many(numbered(50))
            client = await nats.connect(server.url)
            found = await stored(client.jetstream(), Names("molva", "queue", "q"))
            await client.close()
            assert len(await take(queue, 100)) == 100
    assert found == [(m.body, None) for m in numbered(50) * 2]


async def test_what_does_not_fit_is_refused_message_by_message(
    url: str, client: Client, names: Names
) -> None:
    async with await open_queue(url) as queue:
        config = (await client.jetstream().stream_info(names.stream)).config
        config.max_msgs = 30
        await client.jetstream().update_stream(config)

        with pytest.raises(SendManyError) as failed:
            await queue.send_many(numbered(50))

        assert list(failed.value.failures) == list(range(30, 50))
        assert {type(e) for e in failed.value.failures.values()} == {QueueFullError}
        assert bodies(await take(queue, 30)) == [m.body for m in numbered(30)]


@pytest.mark.parametrize(("capacity", "each"), [(100, 25), (2_500, 50)])
async def test_a_bound_holds_to_the_message_however_many_send_at_once(
    url: str, client: Client, names: Names, capacity: int, each: int
) -> None:
    queues = [await open_queue(with_options(url, capacity=str(capacity))) for _ in range(4)]

    async def send(queue: Queue) -> int:
        refused = 0
        for _ in range(20):
            try:
                await queue.send_many(numbered(each))
            except SendManyError as error:
                refused += len(error.failures)
        return refused

    refused = await asyncio.gather(*map(send, queues))
    found = await stored(client.jetstream(), names)

    assert len(found) == capacity
    assert sum(refused) == 80 * each - capacity
    assert sum(batch is not None for _, batch in found) >= capacity // 2
    for queue in queues:
        await queue.close()


async def test_a_server_with_too_many_batches_under_way_takes_messages(
    url: str, client: Client, names: Names
) -> None:
    async with await open_queue(url) as queue:
        # Begun by clients that died: it waits ten seconds for their ends.
        for n in range(60):
            headers = {"Nats-Msg-Id": f"x{n}", BATCH: f"dead-{n}", "Nats-Batch-Sequence": "1"}
            await client.publish(names.subject, b"never", headers=headers)
        await client.flush()

        await queue.send_many(numbered(50))

        found = await stored(client.jetstream(), names)
    assert [body for body, _ in found] == [m.body for m in numbered(50)]


async def test_large_messages_are_several_batches(url: str, client: Client, names: Names) -> None:
    messages = [Message(b"%02d" % n + bytes(300_000)) for n in range(60)]
    async with await open_queue(url) as queue:
        await queue.send_many(messages)

        found = await stored(client.jetstream(), names)
    assert [body[:2] for body, _ in found] == [m.body[:2] for m in messages]
    sizes = Counter(batch for _, batch in found)
    assert max(sizes.values()) * 300_000 <= 8_000_000
    assert len(sizes) == 3


async def test_the_largest_messages_fit_into_a_batch_too(url: str) -> None:
    async with await open_queue(url) as queue:
        most = queue.capabilities.max_body_bytes
        messages = [Message(bytes([n]) * most, key="k" * 200) for n in range(8)]
        async with asyncio.timeout(30):
            await queue.send_many([*messages, *numbered(30)])
            assert bodies(await take(queue, 38)) == [m.body for m in [*messages, *numbered(30)]]


async def test_a_stream_that_is_gone_is_made_anew(url: str, client: Client, names: Names) -> None:
    async with await open_queue(url) as queue:
        await client.jetstream().delete_stream(names.stream)
        await queue.send_many(numbered(50))
        await queue.send_many(numbered(50))
        found = await stored(client.jetstream(), names)
    assert [body for body, _ in found] == [m.body for m in numbered(50) * 2]


async def _until_stored(url: str, names: Names, number: int) -> None:
    """Wait until a stream has so many messages."""
    client = await nats.connect(url)
    streams = client.jetstream(timeout=PATIENCE)
    try:
        async with asyncio.timeout(PATIENCE):
            while (await streams.stream_info(names.stream)).state.messages < number:
                await asyncio.sleep(0.02)
    finally:
        await client.close()


async def test_an_answer_that_is_lost_is_no_second_batch() -> None:
    proxy = Proxy(0, seed=1)
    with private_nats() as server:
        proxy.upstream = server.port
        await proxy.start()
        url = with_options(f"nats://127.0.0.1:{proxy.port}", queue="q", sync="always")
        async with await open_queue(url) as queue:
            messages = numbered(100)
            proxy.faults.lost = "down"
            sending = asyncio.create_task(queue.send_many(messages))
            await _until_stored(server.url, Names("molva", "queue", "q"), 100)
            proxy.reset()
            with pytest.raises(SendManyError) as failed:
                await sending
            assert {type(e) for e in failed.value.failures.values()} == {UnavailableError}
            proxy.faults.lost = None
            await send_surely(queue, messages[99])
            await queue.send_many(messages)
            assert bodies(await take(queue, 100)) == [m.body for m in messages]
            stat = await queue.stat()
            assert stat is not None
            assert stat.pending == 100
        await proxy.close()


async def test_a_batch_that_was_cut_off_leaves_nothing(
    url: str, client: Client, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await open_topic(url.replace("queue=q", "topic=q")) as topic:
        whole = _nats_link.Connection.publish
        published = 0

        async def publish(self: _nats_link.Connection, *arguments: object, **named: object) -> None:
            nonlocal published
            published += 1
            if published == 50:
                await self.close()
            await whole(self, *arguments, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(_nats_link.Connection, "publish", publish)
        with pytest.raises(SendManyError) as failed:
            await topic.send_many(numbered(100))
        assert len(failed.value.failures) == 100
        monkeypatch.undo()
        await topic.send_many(numbered(30))
        found = await stored(client.jetstream(), Names(names.stream.split("_")[0], "topic", "q"))
    assert [body for body, _ in found] == [m.body for m in numbered(30)]


@pytest.mark.parametrize("kind", ["topic", "queue"])
async def test_nothing_confirmed_is_lost_while_the_server_is_killed_under_100_publishers(
    kind: str,
) -> None:
    with private_nats() as server:
        await lose_nothing_while_killed(kind, server, sync="always")
