"""The proxy does to a connection what its faults say, and nothing else."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from tests.faults.live.proxy import Faults, Proxy


@dataclass
class Upstream:
    """Echoes what comes, and remembers it in the pieces in which it came."""

    pieces: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(65_536):
                self.pieces.append(piece)
                writer.write(piece)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    @property
    def received(self) -> bytes:
        return b"".join(self.pieces)


@pytest.fixture
async def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
async def proxy(upstream: Upstream) -> AsyncIterator[Proxy]:
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    proxy = Proxy(server.sockets[0].getsockname()[1], seed=1)
    await proxy.start()
    yield proxy
    await proxy.close()
    server.close()


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def receive(self, number: int, wait: float = 20.0) -> bytes:
        async with asyncio.timeout(wait):
            return await self.reader.readexactly(number)


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[Client]:
    client = Client(*await asyncio.open_connection("127.0.0.1", proxy.port))
    yield client
    client.writer.close()


async def all_passed() -> None:
    """Let everything through that is under way: where we stood still, time alone does not."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_a_sound_network_changes_nothing(client: Client) -> None:
    data = bytes(range(256)) * 4_000
    sending = asyncio.ensure_future(client.send(data))
    assert await client.receive(len(data)) == data
    await sending


async def test_a_reset_ends_open_connections_with_an_error(proxy: Proxy, client: Client) -> None:
    await client.send(b"x")
    await client.receive(1)

    proxy.reset()

    with pytest.raises(ConnectionResetError):
        await client.reader.read(1)


async def test_a_lost_answer_leaves_the_request_delivered(
    proxy: Proxy, client: Client, upstream: Upstream
) -> None:
    proxy.faults = Faults(lost="down")
    await client.send(b"request")

    with pytest.raises(TimeoutError):
        await client.receive(1, wait=0.2)
    await all_passed()

    assert upstream.received == b"request"


async def test_a_lost_request_reaches_nobody(
    proxy: Proxy, client: Client, upstream: Upstream
) -> None:
    proxy.faults = Faults(lost="up")
    await client.send(b"request")

    with pytest.raises(TimeoutError):
        await client.receive(1, wait=0.2)
    await all_passed()

    assert upstream.received == b""


async def test_a_cut_answer_ends_after_its_bytes(
    proxy: Proxy, client: Client, upstream: Upstream
) -> None:
    await client.send(b"before")
    await client.receive(6)
    proxy.faults = Faults(cut_after=4)
    await client.send(b"request")

    # What a reset connection had delivered before, its reader may or may not still see.
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)) as raised:
        await client.receive(7)

    if isinstance(raised.value, asyncio.IncompleteReadError):
        assert raised.value.partial == b"requ"
    assert upstream.received == b"beforerequest"


async def test_slices_arrive_byte_by_byte(proxy: Proxy, client: Client, upstream: Upstream) -> None:
    proxy.faults = Faults(slice=True)
    await client.send(b"request")

    assert await client.receive(7) == b"request"
    assert len(upstream.pieces) > 3


async def test_a_delay_holds_both_directions_up(proxy: Proxy, client: Client) -> None:
    proxy.faults = Faults(delay=0.1, jitter=0.05)
    started = time.monotonic()
    await client.send(b"x")
    await client.receive(1)

    assert 0.2 <= time.monotonic() - started < 10.0


async def test_dropping_passes_nothing_until_it_ends(
    proxy: Proxy, client: Client, upstream: Upstream
) -> None:
    proxy.faults = Faults(drop=True)
    await client.send(b"lost")
    with pytest.raises(TimeoutError):
        await client.receive(1, wait=0.2)
    await all_passed()

    proxy.faults = Faults()
    await client.send(b"found")

    assert await client.receive(5) == b"found"
    assert upstream.received == b"found"


async def test_refusing_is_noticed_at_once_until_it_listens_again(proxy: Proxy) -> None:
    await proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", proxy.port)

    await proxy.start()

    again = Client(*await asyncio.open_connection("127.0.0.1", proxy.port))
    await again.send(b"x")
    assert await again.receive(1) == b"x"
    again.writer.close()


async def test_two_faults_that_end_at_once_let_it_listen_again(proxy: Proxy) -> None:
    await proxy.refuse()

    await asyncio.gather(proxy.start(), proxy.start())

    again = Client(*await asyncio.open_connection("127.0.0.1", proxy.port))
    await again.send(b"x")
    assert await again.receive(1) == b"x"
    again.writer.close()


async def test_a_dead_service_behind_it_is_a_reset() -> None:
    proxy = Proxy(1, seed=1)  # nothing listens on port 1
    await proxy.start()
    client = Client(*await asyncio.open_connection("127.0.0.1", proxy.port))

    with pytest.raises(ConnectionResetError):
        await client.reader.read(1)

    client.writer.close()
    await proxy.close()
