"""What a deployment opens of its three URLs."""

import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from molva._base.clock import Clock
from molva.messaging import Message
from molva.ratings import deployment
from molva.ratings.deployment import Deployment


async def test_deployments_that_share_a_broker_name_topics_of_their_own(tmp_path: Path) -> None:
    shared = f"sqlite://{tmp_path}/shared.db"
    first = Deployment.in_folder(tmp_path, broker=f"{shared}?topic=first", capacity=10)
    second = Deployment.in_folder(tmp_path, broker=shared, capacity=20)

    async with (
        await first.open_topic() as firsts,
        await second.open_topic() as seconds,
        await second.open_subscription() as reading,
    ):
        await firsts.send(Message(b"1"))
        await seconds.send(Message(b"2"))
        found = await reading.receive(10, wait=1.0)

    assert [delivery.message.body for delivery in found] == [b"2"]
    assert (firsts.capacity, seconds.capacity) == (10, 20)


async def test_a_capacity_in_the_url_is_kept(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/q.db?capacity=5"

    async with await Deployment.in_folder(tmp_path, broker=url, capacity=10).open_topic() as topic:
        assert topic.capacity == 5


def test_a_broker_without_a_bound_is_opened_without_the_libraries_of_others(
    kafka_url: str, tmp_path: Path
) -> None:
    # Loading them takes seconds of each start.
    program = f"""
import asyncio, sys
from pathlib import Path
from molva.messaging import with_options
from molva.ratings.deployment import Deployment

async def main():
    broker = with_options({kafka_url!r}, topic="unbounded-{tmp_path.name}")
    deployment = Deployment.in_folder(Path({str(tmp_path)!r}), broker=broker, capacity=10)
    async with await deployment.open_topic() as topic:
        assert topic.capacity is None
    assert "redis" not in sys.modules

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("broker", "asked"),
    [
        ("kafka://127.0.0.1:1", {"fetch_wait": "0.02"}),
        ("kafka://127.0.0.1:1?fetch_wait=0", {"fetch_wait": "0"}),
        ("sqlite://nowhere/q.db", {}),
    ],
)
async def test_a_broker_that_can_collect_ratings_for_workers_is_asked_to(
    broker: str, asked: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    async def note(url: str, *, clock: Clock) -> None:
        opened.append(url)

    monkeypatch.setattr(deployment, "open_subscription", note)
    await Deployment.in_folder(tmp_path, broker=broker).open_subscription()

    found = dict(parse_qsl(opened[0].partition("?")[2]))
    assert found == {"topic": "ratings", "subscription": "process", **asked}
