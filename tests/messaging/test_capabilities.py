"""What Capabilities say, and what the portable layer makes of it."""

import dataclasses
from typing import Any

import pytest

from molva.messaging import Capabilities, UnsupportedFeatureError, open_queue, open_subscription
from molva.messaging.driver import ALL_FEATURES
from molva.messaging.drivers import memory

_ALL = Capabilities(
    delivery="at-least-once",
    ordering="per-key",
    capacity="exact",
    survives=frozenset({"kill", "power", "node"}),
    max_body_bytes=1,
    shared=True,
    holding="lease",
    disciplines=frozenset({"fifo", "lifo", "priority", "random"}),
    overflows=frozenset({"reject", "drop-oldest"}),
    delay=True,
    attempts="exact",
)
_NONE = Capabilities(
    delivery="at-most-once",
    ordering="none",
    capacity="none",
    survives=frozenset(),
    max_body_bytes=1,
    shared=False,
    holding="connection",
    disciplines=frozenset(),
    keeps_place=False,
    starts=frozenset(),
    deletes=False,
    stat="none",
    peek=False,
    purge=False,
    replay=False,
)


def test_every_feature_can_be_had() -> None:
    lanes = dataclasses.replace(_ALL, holding="lane")

    assert _ALL.features | lanes.features == ALL_FEATURES.keys()
    assert _ALL.features ^ lanes.features == {"leases", "by-message", "lanes"}


def test_every_feature_can_be_missing() -> None:
    assert _NONE.features == {"at-most-once", "by-message"}


@pytest.mark.parametrize(
    ("feature", "drivers"),
    [
        ("peek", ("memory", "redis", "sqlite")),
        ("purge", ("amqp", "memory", "nats", "redis", "sqlite")),
        ("replay", ("amqp", "memory", "nats", "redis", "sqlite")),
    ],
)
async def test_what_a_broker_cannot_do_is_refused_by_name(
    feature: str, drivers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {feature: False}
    poor = dataclasses.replace(memory.QUEUE_CAPABILITIES, **options)
    monkeypatch.setattr(memory.MemoryQueue, "capabilities", poor)
    async with await open_queue("memory://poor?queue=q") as queue:
        with pytest.raises(UnsupportedFeatureError, match=feature) as refused:
            await getattr(queue, feature)()
    assert refused.value.feature == feature
    assert refused.value.drivers == drivers


async def test_a_start_that_a_broker_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    poor = dataclasses.replace(memory.TOPIC_CAPABILITIES, starts=frozenset({"latest"}))
    monkeypatch.setattr(memory.MemorySubscription, "capabilities", poor)

    with pytest.raises(UnsupportedFeatureError, match="earliest"):
        await open_subscription("memory://poor?topic=t&subscription=s&start=earliest")
