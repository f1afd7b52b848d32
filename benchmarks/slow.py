"""A worker whose ledger is slow: what it holds in memory while ever more waits for it."""

import asyncio
import contextlib
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from urllib.parse import urlsplit

import psutil
from tests.brokers import private_kafka, private_redis

from benchmarks.report import Report
from benchmarks.scaled import worker
from benchmarks.service import running, total

SECONDS = 600.0
# Seconds that each answer of the ledger is held up.
DELAY = 1.0
# Ratings a second that are sent, by so many connections.
RATE = 800
CONNECTIONS = 16
_SAMPLE_SECONDS = 2.0


def slow(*, seconds: float = SECONDS) -> None:
    """Send more than a slow ledger takes for ten minutes; look at the worker's memory."""
    report = Report(
        "slow",
        "A worker whose ledger is slow",
        f"Kafka → Redis; each answer of Redis to the worker takes {DELAY:g} s longer; {RATE:,} "
        f"ratings a second offered over HTTP for {seconds:.0f} s. Memory: resident set of `molva "
        f"work`, every {_SAMPLE_SECONDS:g} s.",
    )
    with (
        private_kafka() as kafka,
        private_redis() as redis,
        _held_up(redis.url) as slow_url,
        tempfile.TemporaryDirectory() as folder,
    ):
        broker = f"{kafka.url}?topic={uuid.uuid4().hex[:8]}&lanes=8"
        common = ("--port", "PORT", "--data", folder, "--broker", broker, "--ledger")
        with (
            running("-m", "molva", "serve", *common, redis.url) as (port, _process),
            worker("molva", *common, slow_url) as process,
        ):
            sizes, accepted = asyncio.run(_loaded(port, psutil.Process(process.pid), seconds))
            counted = total(port).get("count") or 0
            assert isinstance(counted, int)
    tenth = max(1, len(sizes) // 10)
    early, late = (statistics.median(part) for part in (sizes[tenth : 2 * tenth], sizes[-tenth:]))
    report.add("accepted, and not counted at the end", f"{accepted:,}, {accepted - counted:,}", "")
    report.add("largest", f"{max(sizes):.1f} MiB", "of all samples")
    report.add(
        "last tenth / second tenth of the time",
        f"{late / early:.3f}",
        f"{early:.1f} to {late:.1f} MiB, medians; asked: flat",
    )
    report.figures["MiB"] = sizes
    report.write()


async def _loaded(port: int, worker: psutil.Process, seconds: float) -> tuple[list[float], int]:
    """Offer ratings for so long; return the worker's memory in MiB meanwhile, and how many came in."""
    end = time.monotonic() + seconds
    clients = [asyncio.create_task(_rates(port, end)) for _ in range(CONNECTIONS)]
    sizes = []
    while time.monotonic() < end:
        await asyncio.sleep(_SAMPLE_SECONDS)
        sizes.append(worker.memory_info().rss / 2**20)
    return sizes, sum(await asyncio.gather(*clients))


async def _rates(port: int, end: float) -> int:
    """Rate at a steady pace over one connection; return how many ratings were accepted."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    accepted = 0
    due = time.monotonic()
    with contextlib.closing(writer):
        while (now := time.monotonic()) < end:
            due = max(due, now - 1.0) + CONNECTIONS / RATE
            await asyncio.sleep(max(0.0, due - now))
            writer.write(b"POST /rate?rate=7 HTTP/1.1\r\nHost: bench\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2].partition(b"\r")[0]
            await reader.readexactly(int(length))
            accepted += head.startswith(b"HTTP/1.1 202")
    return accepted


@contextlib.contextmanager
def _held_up(url: str) -> Iterator[str]:
    """Yield the URL of a relay to a server, which passes each of its answers on late."""
    parts = urlsplit(url)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def copy(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float
    ) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            while data := await reader.read(2**16):
                await asyncio.sleep(delay)
                writer.write(data)
                await writer.drain()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs = await asyncio.open_connection(parts.hostname, parts.port)
        await asyncio.gather(copy(reader, theirs[1], 0.0), copy(theirs[0], writer, DELAY))

    server = asyncio.run_coroutine_threadsafe(
        asyncio.start_server(relay, "127.0.0.1", 0), loop
    ).result()
    port = server.sockets[0].getsockname()[1]
    try:
        yield parts._replace(netloc=f"127.0.0.1:{port}").geturl()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
