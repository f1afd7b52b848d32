"""The worker: applies before it acknowledges, keeps bad messages aside, waits for a ledger."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from uuid import uuid4

import pytest

from molva._base import outage
from molva._base.clock import SYSTEM_CLOCK
from molva.messaging import (
    Action,
    BrokenBrokerError,
    Delivery,
    Message,
    Subscription,
    Topic,
    UnavailableError,
    open_subscription,
    open_topic,
    with_options,
)
from molva.ratings import worker as worker_module
from molva.ratings.campaign import Campaign
from molva.ratings.catalog import Catalog, CatalogError, open_catalog
from molva.ratings.ledger import Ledger, LedgerBrokenError, LedgerUnavailableError, open_ledger
from molva.ratings.ledger.protocol import Outcome
from molva.ratings.rating import Rating, Submission, encode_entry
from molva.ratings.worker import Worker
from tests.brokers import private_postgresql, private_redis


class Bench:
    """A worker between a memory broker and a ledger in a file."""

    def __init__(
        self, url: str, topic: Topic, subscription: Subscription, ledger: Ledger, catalog: Catalog
    ) -> None:
        self.url = url
        self.topic = topic
        self.subscription = subscription
        self.ledger = ledger
        self.catalog = catalog
        self.worker = Worker(
            subscription=subscription, ledger=ledger, catalog=catalog, clock=SYSTEM_CLOCK
        )
        self.running = asyncio.ensure_future(self.worker.run())

    async def send(self, *rates: int, campaign: str = "default", id_: bytes | None = None) -> None:
        await self.topic.send_many(
            Message(encode_entry(Rating(campaign, 1, rate)), id_) for rate in rates
        )

    async def settled(self, seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds):
            while True:
                stat = await self.subscription.stat()
                if stat is not None and stat.pending == 0:
                    return
                await asyncio.sleep(0.005)

    async def count(self) -> int:
        total = await self.ledger.total("default", n=10)
        return 0 if total is None else total.count


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    url = f"memory://{uuid4().hex}?topic=ratings"
    topic = await open_topic(url)
    subscription = await open_subscription(f"{url}&subscription=process")
    ledger = await open_ledger(f"sqlite://{tmp_path}/ledger.db")
    catalog = await open_catalog(f"sqlite://{tmp_path}/catalog.db")
    bench = Bench(url, topic, subscription, ledger, catalog)
    yield bench
    bench.worker.stop()
    await asyncio.wait((bench.running,))
    await subscription.close()
    await topic.close()
    await ledger.close()
    await catalog.close()


async def test_ratings_are_counted_and_acknowledged(bench: Bench) -> None:
    await bench.send(*range(11))
    await bench.settled()

    total = await bench.ledger.total("default", n=5)
    assert total is not None
    assert (total.count, total.average) == (11, 8.0)


async def test_a_rating_that_comes_twice_counts_once(bench: Bench) -> None:
    id_ = bytes(range(16))
    await bench.send(7, id_=id_)
    await bench.send(7, id_=id_)
    await bench.settled()

    assert await bench.count() == 1
    assert bench.worker.counters.outcomes == {"applied": 1, "duplicate": 1}


async def test_what_cannot_count_is_kept_aside_with_its_reason(bench: Bench) -> None:
    id_ = bytes(range(16))
    await bench.topic.send_many([Message(b"{"), Message(b'{"kind":"rating/2"}'), Message(b"\xff")])
    await bench.send(1, campaign="nope")
    await bench.send(11)
    await bench.send(7, id_=id_)
    await bench.send(8, id_=id_)
    await bench.send(9)
    await bench.settled()

    reasons = [dead.reason for dead in await bench.subscription.dead_letters()]
    assert len(reasons) == 6
    assert any("unknown campaign 'nope'" in reason for reason in reasons)
    assert any("integer from 0 to 10" in reason for reason in reasons)
    assert any("id was used for another rating" in reason for reason in reasons)
    total = await bench.ledger.total("default", n=10)
    assert total is not None
    assert total.distribution == {7: 1, 9: 1}


async def test_a_flood_of_bad_messages_is_one_line_a_batch(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.topic.send_many([Message(b"x")] * 500)
    await bench.settled()

    assert len(caplog.records) <= 3


async def test_a_campaign_that_was_added_meanwhile_is_known(bench: Bench) -> None:
    await bench.send(1)
    await bench.settled()
    await bench.catalog.put_campaign(Campaign(name="fresh", minimum=1, maximum=5))

    await bench.send(5, campaign="fresh")
    await bench.settled()

    assert await bench.subscription.dead_letters() == []
    assert await bench.ledger.total("fresh", n=1) is not None


async def test_a_catalog_that_fails_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was known a while ago would make a dead letter of a new campaign's rating."""
    monkeypatch.setattr(outage, "_FIRST_PAUSE", 0.01)
    await bench.send(1)
    await bench.settled()
    await bench.catalog.put_campaign(Campaign(name="fresh"))
    failures = 3

    async def fail_first() -> int:
        nonlocal failures
        if failures:
            failures -= 1
            raise CatalogError("busy")
        return -1

    monkeypatch.setattr(bench.catalog, "revision", fail_first)

    await bench.send(7, campaign="fresh")
    await bench.settled()

    assert failures == 0
    assert await bench.subscription.dead_letters() == []
    assert await bench.ledger.total("fresh", n=1) is not None


async def test_what_the_intake_would_refuse_is_refused_here_too(bench: Bench) -> None:
    for rating in (
        Rating("default", 1, 7, "x" * 513),
        Rating("default", 1, 7, "a\0b"),
        Rating("default", 1, 7, "", "x" * 2_001),
    ):
        await bench.topic.send(Message(encode_entry(rating)))
    await bench.settled()

    assert await bench.count() == 0
    assert len(await bench.subscription.dead_letters()) == 3


async def test_a_ledger_that_takes_nothing_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "_FIRST_PAUSE", 0.01)
    apply = bench.ledger.apply
    failures = 3

    async def fail_first(
        batch: Sequence[Submission], *, applied_at_us: int
    ) -> list[Outcome | Exception]:
        nonlocal failures
        if failures:
            failures -= 1
            raise LedgerUnavailableError("busy")
        return await apply(batch, applied_at_us=applied_at_us)

    monkeypatch.setattr(bench.ledger, "apply", fail_first)

    await bench.send(7)
    await bench.settled()

    assert failures == 0
    assert await bench.count() == 1


async def test_nothing_is_acknowledged_before_the_ledger_has_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = asyncio.Event()

    async def hang(*_: object, **__: object) -> list[Outcome | Exception]:
        entered.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(bench.ledger, "apply", hang)
    await bench.send(7)
    await entered.wait()

    stat = await bench.subscription.stat()

    assert stat is not None
    assert stat.pending == 1
    bench.running.cancel()


async def test_a_slow_ledger_leaves_what_waits_in_the_broker(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's memory is one batch, whatever waits and however long the ledger takes."""
    apply = bench.ledger.apply
    sizes: list[int] = []
    under_way = 0

    async def take_long(
        batch: Sequence[Submission], *, applied_at_us: int
    ) -> list[Outcome | Exception]:
        nonlocal under_way
        under_way += 1
        assert under_way == 1, "a second batch was taken before the first was applied"
        sizes.append(len(batch))
        await asyncio.sleep(0.05)
        outcomes = await apply(batch, applied_at_us=applied_at_us)
        under_way -= 1
        return outcomes

    monkeypatch.setattr(bench.ledger, "apply", take_long)
    await bench.send(*[7] * 5_000)
    await bench.settled(30.0)

    assert sum(sizes) == 5_000
    assert max(sizes) <= worker_module._BATCH
    assert await bench.count() == 5_000


async def test_a_broken_ledger_ends_the_worker_and_another_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> list[Outcome | Exception]:
        raise LedgerBrokenError("I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(bench.ledger, "apply", fail)
        await bench.send(7)
        with pytest.raises(LedgerBrokenError):
            await bench.running
    await bench.subscription.close()
    bench.subscription = await open_subscription(f"{bench.url}&subscription=process")
    bench.worker = Worker(
        subscription=bench.subscription,
        ledger=bench.ledger,
        catalog=bench.catalog,
        clock=SYSTEM_CLOCK,
    )
    bench.running = asyncio.ensure_future(bench.worker.run())
    await bench.settled()

    assert await bench.count() == 1
    await bench.subscription.close()


async def test_one_submission_that_the_ledger_cannot_take_stops_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = bench.ledger.apply

    async def fail_one(
        batch: Sequence[Submission], *, applied_at_us: int
    ) -> list[Outcome | Exception]:
        outcomes = await apply(batch[1:], applied_at_us=applied_at_us)
        return [ValueError("poison"), *outcomes]

    monkeypatch.setattr(bench.ledger, "apply", fail_one)

    await bench.send(1, 2, 3)
    await bench.settled()

    [dead] = await bench.subscription.dead_letters()
    assert "poison" in dead.reason
    assert await bench.count() == 2


async def test_stop_ends_an_idle_worker_at_once(bench: Bench) -> None:
    await asyncio.sleep(0.02)

    bench.worker.stop()

    # By itself it would have looked for messages for five seconds.
    async with asyncio.timeout(4.0):
        await bench.running


async def test_a_broker_that_is_away_is_waited_for_when_receiving(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = bench.subscription.receive
    failures = 4

    async def fail_first(limit: int, *, wait: float) -> list[Delivery]:
        nonlocal failures
        if failures:
            failures -= 1
            raise UnavailableError("connection refused")
        return await receive(limit, wait=wait)

    await bench.send(7)
    await bench.settled()
    monkeypatch.setattr(outage, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(bench.subscription, "receive", fail_first)
    await bench.send(8)
    await bench.send(9)
    await bench.settled()

    assert failures == 0
    assert await bench.count() == 3


async def test_a_broker_that_is_away_is_waited_for_when_settling(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = bench.subscription.settle
    failures = 4

    async def fail_first(
        settlements: Sequence[tuple[Delivery, Action]], *, reason: str = ""
    ) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise UnavailableError("connection refused")
        await settle(settlements, reason=reason)

    monkeypatch.setattr(outage, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(bench.subscription, "settle", fail_first)
    await bench.send(7, 99)
    await bench.settled()

    assert failures == 0
    assert await bench.count() == 1
    [dead] = await bench.subscription.dead_letters()
    assert "99" in dead.reason
    assert bench.worker.counters.outcomes == {"applied": 1}


async def test_a_broken_broker_ends_the_worker(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> list[Delivery]:
        raise BrokenBrokerError("fsync failed")

    monkeypatch.setattr(bench.subscription, "receive", fail)
    await bench.send(7)

    async with asyncio.timeout(10.0):
        with pytest.raises(BrokenBrokerError):
            await bench.running


async def test_a_ledger_away_for_many_leases_makes_no_dead_letter(tmp_path: Path) -> None:
    """More workers wait than a message has attempts, each longer than a lease."""
    ratings, lease, attempts = 31, 3.0, 5
    with private_redis() as broker, private_postgresql() as database:
        url = with_options(broker.url, topic="ratings")
        topic = await open_topic(url)
        catalog = await open_catalog(f"sqlite://{tmp_path}/catalog.db")
        subscriptions: list[Subscription] = []
        ledgers: list[Ledger] = []
        workers: list[Worker] = []
        for _ in range(attempts + 2):
            subscriptions.append(
                await open_subscription(with_options(url, subscription="process", lease=str(lease)))
            )
            ledgers.append(await open_ledger(database.url))
            workers.append(
                Worker(
                    subscription=subscriptions[-1],
                    ledger=ledgers[-1],
                    catalog=catalog,
                    clock=SYSTEM_CLOCK,
                )
            )
        running = [asyncio.ensure_future(worker.run()) for worker in workers]

        async def send(number: int) -> None:
            for _ in range(number):
                await topic.send(Message(encode_entry(Rating("default", 1, 7))))

        await send(ratings - 1)
        async with asyncio.timeout(60.0):
            while (stat := await subscriptions[0].stat()) is None or stat.pending:
                await asyncio.sleep(0.05)
        database.pause()
        # One: of several each worker would take some, and none be there to take them over.
        await send(1)
        await asyncio.sleep(lease * (attempts + 1))
        database.resume()
        async with asyncio.timeout(60.0):
            while True:
                stat = await subscriptions[0].stat()
                if stat is not None and stat.pending == 0:
                    break
                await asyncio.sleep(0.05)

        total = await ledgers[0].total("default", n=10)
        assert total is not None
        assert total.count == ratings
        assert await subscriptions[0].dead_letters() == []
        # None, but that a machine may stand still for longer than a lease: once or twice. By
        # lapsed leases alone it would have been as often as there are attempts.
        redelivered = sum(subscription.received.redelivered for subscription in subscriptions)
        assert redelivered <= 2
        for worker in workers:
            worker.stop()
        await asyncio.gather(*running)
        await asyncio.gather(*(subscription.close() for subscription in subscriptions))
        await asyncio.gather(*(ledger.close() for ledger in ledgers))
        await topic.close()
        await catalog.close()
