"""A deployment moves from Kafka to NATS while visitors rate, as docs/scaling.md says."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from examples.scaling_out.fleet import Fleet
from examples.scaling_out.round_robin import RoundRobin
from examples.scaling_out.visitors import Visitors, total

from molva.messaging import with_options
from tests.brokers import private_kafka, private_nats, private_redis

ROOT = Path(__file__).parent.parent.parent
CAMPAIGN = "swapped"

# Seconds for one step: starting processes of Python on a busy machine.
STEP = 90.0

pytestmark = pytest.mark.timeout(300)


def waiting(broker: str) -> int:
    """Return how many ratings wait in a broker, as ``molva queue stat`` tells it."""
    url = with_options(broker, topic="ratings", subscription="process")
    done = subprocess.run(
        [sys.executable, "-m", "molva", "queue", "stat", url, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(json.loads(done.stdout)["process"]["pending"])


async def rated(visitors: Visitors, more: int) -> None:
    """Wait until so many more ratings were accepted."""
    wanted, deadline = visitors.accepted + more, time.monotonic() + STEP
    while visitors.accepted < wanted:
        assert time.monotonic() < deadline, f"{visitors.accepted} of {wanted} were accepted"
        await asyncio.sleep(0.05)


async def test_from_kafka_to_nats_under_load_nothing_is_lost(tmp_path: Path) -> None:
    with (
        private_kafka() as kafka,
        private_nats() as nats,
        private_redis() as redis,
        contextlib.ExitStack() as running,
    ):
        same = {
            "MOLVA_LEDGER": redis.url,
            "MOLVA_CATALOG": f"sqlite://{tmp_path}/catalog.db",
        }
        for name in ("old-work", "old-serve", "new"):
            (tmp_path / name).mkdir()
        on_kafka = {**same, "MOLVA_BROKER": kafka.url}
        on_nats = {**same, "MOLVA_BROKER": with_options(nats.url, sync="always")}
        old_workers = Fleet(tmp_path / "old-work", on_kafka)
        old_http = Fleet(tmp_path / "old-serve", on_kafka)
        new = Fleet(tmp_path / "new", on_nats)
        stop_old_workers, stop_old_http = contextlib.ExitStack(), contextlib.ExitStack()
        for stack in (stop_old_workers, stop_old_http):
            running.enter_context(stack)
        stop_old_workers.enter_context(old_workers)
        stop_old_http.enter_context(old_http)
        running.enter_context(new)

        await asyncio.to_thread(old_workers.run, "campaign put", CAMPAIGN)
        for _ in range(2):
            old_workers.start("work")
            old_http.start("serve")
        await asyncio.to_thread(old_workers.wait_ready)
        await asyncio.to_thread(old_http.wait_ready)
        addresses = [("127.0.0.1", port) for port in old_http.ports]
        balancer = RoundRobin(addresses)
        await balancer.start()
        visitors = Visitors(balancer.port, CAMPAIGN)
        rating = asyncio.create_task(visitors.rate(per_second=200, seconds=STEP * 3))
        await rated(visitors, 200)

        # 1. Workers on the new broker, beside the old ones.
        for _ in range(2):
            new.start("work")
        await asyncio.to_thread(new.wait_ready)
        await rated(visitors, 200)
        # 2. HTTP on the new broker; visitors go there.
        for _ in range(2):
            new.start("serve")
        await asyncio.to_thread(new.wait_ready)
        addresses[:] = [("127.0.0.1", port) for port in new.ports]
        # 3. The old HTTP ends in order: nothing comes into the old broker any more.
        await asyncio.to_thread(stop_old_http.close)
        await rated(visitors, 200)
        # 4. The old workers go on until nothing waits there.
        deadline = time.monotonic() + STEP
        while await asyncio.to_thread(waiting, kafka.url):
            assert time.monotonic() < deadline, "the old broker does not drain"
        # 5. They end.
        await asyncio.to_thread(stop_old_workers.close)
        await rated(visitors, 200)

        rating.cancel()
        await asyncio.wait([rating])
        # Whoever was interrupted may have been accepted without having been told.
        counted, deadline = 0, time.monotonic() + STEP
        while counted < visitors.accepted and time.monotonic() < deadline:
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                counted = await total(balancer.port, CAMPAIGN)
            await asyncio.sleep(0.2)
        await asyncio.sleep(1.0)
        counted = await total(balancer.port, CAMPAIGN)
        await balancer.close()

        assert visitors.accepted >= 800
        assert visitors.accepted <= counted <= visitors.offered
        deadline = time.monotonic() + STEP
        while await asyncio.to_thread(waiting, on_nats["MOLVA_BROKER"]):
            assert time.monotonic() < deadline, "the new broker does not drain"
