"""A broker that neither bounds what waits nor tells how much does, as RabbitMQ's topics are."""

import asyncio
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

from molva._base.clock import Clock
from molva.cli.exits import USAGE
from molva.messaging import url
from molva.messaging.drivers import amqp, sqlite
from molva.messaging.url import BrokerURL
from molva.ratings.deployment import Deployment
from molva.ratings.server import HTTPService
from tests.cli.commands import run

_CAPABILITIES: Final = replace(
    sqlite.TOPIC_CAPABILITIES, capacity="none", overflows=frozenset(), stat="none"
)


class _BlindTopic:
    """A topic in a SQLite file, of which nothing is told."""

    capabilities: Final = _CAPABILITIES
    capacity: Final = None

    def __init__(self, topic: sqlite.SQLiteTopic) -> None:
        self.send_batch = topic.send_batch
        self.close = topic.close

    async def stat(self) -> None:
        return None


async def _open_topic(url: BrokerURL, *, clock: Clock) -> _BlindTopic:
    return _BlindTopic(await sqlite.open_topic(url, clock=clock))


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    driver = ModuleType("blind")
    vars(driver).update(
        TOPIC_OPTIONS=sqlite.TOPIC_OPTIONS,
        TOPIC_CAPABILITIES=_CAPABILITIES,
        open_topic=_open_topic,
    )
    monkeypatch.setitem(sys.modules, "blind", driver)
    monkeypatch.setitem(url._DRIVERS, "blind", ("blind", None))
    return f"blind://{tmp_path}/queue.db"


@pytest.fixture
def deployment(broker: str, tmp_path: Path) -> Deployment:
    return Deployment.in_folder(tmp_path, broker=broker, capacity=10)


def test_rabbitmq_is_such_a_broker() -> None:
    told = amqp.TOPIC_CAPABILITIES

    assert (told.capacity, told.stat) == (_CAPABILITIES.capacity, _CAPABILITIES.stat)


async def test_it_is_asked_for_no_number(deployment: Deployment) -> None:
    async with HTTPService.open(deployment) as service:
        assert await service.pending() is None
        assert service.admission.capacity is None


async def test_its_metrics_have_no_number_that_nobody_knows(deployment: Deployment) -> None:
    async with HTTPService.open(deployment) as service:
        told = (await service.metrics()).decode()

    assert "molva_messages_stored_total 0.0" in told
    assert re.findall(r"molva_queue_\w+|molva_dead_letters", told) == []


async def test_a_process_says_at_its_start_that_nothing_bounds_what_waits(
    deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    async with HTTPService.open(deployment):
        pass

    [line] = [record.getMessage() for record in caplog.records if "bounds" in record.getMessage()]
    assert line.startswith(deployment.broker)
    assert "--capacity" in line


async def test_a_broker_that_tells_is_not_complained_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with HTTPService.open(Deployment.in_folder(tmp_path)) as service:
        assert await service.pending() == 0

    assert "bounds" not in caplog.text


def test_the_doctor_says_what_is_not_known(broker: str, tmp_path: Path) -> None:
    code, told = run("doctor", "--data", str(tmp_path), "--broker", broker)

    assert code == 0
    assert (
        f"ok  broker    {broker}: reachable; it does not tell how much waits, and nothing "
        "bounds it\n"
    ) in told


async def test_what_waits_in_it_is_a_question_without_an_answer(deployment: Deployment) -> None:
    async with await deployment.open_topic() as topic:
        waits = f"{deployment.broker}?topic={topic.name}"
    code, told = await asyncio.to_thread(run, "queue", "stat", waits, "--json")

    assert code == USAGE
    assert "has no 'stat'" in told
