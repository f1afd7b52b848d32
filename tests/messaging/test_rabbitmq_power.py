"""Power cuts of a RabbitMQ: what it had confirmed is there afterwards."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from molva.messaging import Message, MessagingError, open_queue, with_options
from molva.messaging.conformance import PATIENCE, eventually
from tests.brokers.kind import Place
from tests.brokers.ports import free_ports
from tests.brokers.server import Server, ensure_local
from tests.brokers.table import KINDS
from tests.conftest import skip_without
from tests.faults.live.disk import Image, can_mount

pytestmark = pytest.mark.root

_CUTS = 3


async def test_what_was_confirmed_survives_power_cuts(tmp_path: Path) -> None:
    why_not = can_mount(tmp_path)
    if why_not:
        skip_without("mount", why_not)
    kind = KINDS["rabbitmq"]
    ensure_local(kind)
    place = Place(folder=tmp_path / "server", ports=free_ports(kind.ports), hurried=True)
    place.data.mkdir(parents=True)
    server = Server(kind, place)
    disk = Image(tmp_path / "0.img", megabytes=512)
    confirmed: set[bytes] = set()
    try:
        disk.make()
        disk.mount(place.data)
        kind.prepare(place)
        await asyncio.to_thread(server.start)
        url = with_options(server.url, queue="q", timeout="3")
        async with await open_queue(url) as queue:
            # A server has files of its own, made at its first start, that it never syncs itself:
            # 3.10 without them does not start. A real file system's timer writes them in 5 s.
            disk.flush()
            over = asyncio.Event()

            async def send(task: int) -> None:
                number = 0
                while not over.is_set():
                    body = b"%d.%d" % (task, number)
                    with contextlib.suppress(MessagingError):
                        await queue.send(Message(body))
                        confirmed.add(body)
                    number += 1
                    await asyncio.sleep(0.002)

            sending = [asyncio.create_task(send(task)) for task in range(16)]
            for cut in range(1, _CUTS + 1):
                before = len(confirmed)
                await eventually(lambda seen=before: len(confirmed) > seen + 200)  # type: ignore[misc]
                server.pause()
                # Behind the pause: a sync of the server's own would take this file with it.
                (place.data / "unsynced").write_text("must go")
                after = disk.cut(tmp_path / f"{cut}.img")
                server.kill()
                disk.discard()
                disk = after
                disk.mount(place.data)
                assert not (place.data / "unsynced").exists(), "this was no power cut"
                await asyncio.to_thread(server.start)
            over.set()
            await asyncio.gather(*sending)
            found: set[bytes] = set()
            async with asyncio.timeout(2 * PATIENCE):
                while not confirmed <= found:
                    with contextlib.suppress(MessagingError):
                        for delivery in await queue.receive(1_000):
                            found.add(delivery.message.body)
                            await delivery.ack()
        assert len(confirmed) > 200 * _CUTS
    finally:
        server.stop()
        disk.discard()
