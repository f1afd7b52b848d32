"""The spool over a broker that is away, hangs, is full or refuses, on a clock of its own."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import apsw
import pytest

from molva._base.clock import ManualClock
from molva.messaging import (
    BrokenBrokerError,
    IncompatibleBrokerError,
    Message,
    MessageTooLargeError,
    MessagingError,
    QueueFullError,
    Topic,
    UnavailableError,
    open_subscription,
    with_options,
)
from molva.messaging.driver import Capabilities, Outcome
from molva.messaging.url import BrokerURL
from molva.ratings.deployment import UnmetPromiseError
from molva.ratings.outbox import OUTBOX_SUBSCRIPTION, OUTBOX_TOPIC, Outbox, look_into
from molva.ratings.spool import (
    ForgetfulLedgerError,
    Spool,
    SpoolRefusedError,
    SpoolSettings,
    means_away,
)
from molva.ratings.spool_folder import SpoolFolder
from tests.messaging.faults import FaultyVFS

BROKER = BrokerURL.parse("memory://fake?topic=ratings")


class Broker:
    """A broker's driver that does what the test says.

    Attributes:
        stored: What it has stored, in order; under one id perhaps several times.
        calls: How many messages each call brought.
        away: Whether every call fails at once.
        forgets_to_answer: Whether a call stores, and fails all the same.
        answering: Cleared, calls get no answer until it is set.
        hangs_after: Once it has stored so many it gives no answer any more; None for never.
        room: How many more it may store; None for any number.
    """

    capacity = None
    capabilities = Capabilities(
        delivery="at-least-once",
        ordering="per-key",
        capacity="exact",
        survives=frozenset({"kill", "power", "node"}),
        max_body_bytes=100,
    )

    def __init__(self) -> None:
        self.stored: list[Message] = []
        self.calls: list[int] = []
        self.away = False
        self.forgets_to_answer = False
        self.answering = asyncio.Event()
        self.answering.set()
        self.hangs_after: int | None = None
        self.room: int | None = None
        self.too_large: set[bytes] = set()
        self.broken = False

    async def send_batch(self, messages: Sequence[Message]) -> list[Any]:
        self.calls.append(len(messages))
        await asyncio.sleep(0)
        if self.hangs_after is not None and len(self.stored) >= self.hangs_after:
            self.answering.clear()
        await self.answering.wait()
        if self.broken:
            raise BrokenBrokerError("the broker's file was given up")
        if self.away:
            raise UnavailableError("nobody listens there")
        results: list[Any] = []
        for message in messages:
            if message.body in self.too_large:
                results.append(MessageTooLargeError(len(message.body), 1))
            elif self.room == 0:
                results.append(Outcome.FULL)
            else:
                self.room = None if self.room is None else self.room - 1
                self.stored.append(message)
                results.append(Outcome.STORED)
        if self.forgets_to_answer:
            raise UnavailableError("the connection was cut before the answer")
        return results

    async def stat(self) -> None:
        return None

    async def dead_letters(self, subscription: str, limit: int) -> list[Any]:
        return []

    async def remove_subscription(self, subscription: str) -> bool:
        return False

    async def close(self) -> None:
        return None

    @property
    def bodies(self) -> list[bytes]:
        """What it has stored, each id once: the first one counts."""
        return list({message.id: message.body for message in self.stored}.values())


class Site:
    """A spool in front of a broker, and who sends to it as the intake does."""

    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self.broker = Broker()
        self.topic = self.open_topic()
        self.settings = SpoolSettings(folder / "spool", limit=10_000, hours=24.0)
        self.failures: list[Exception] = []
        self.opened = 0

    def open_topic(self) -> Topic:
        return Topic(self.broker, BROKER, clock=self.clock, tracing=None)

    async def open_late(self) -> Topic:
        self.opened += 1
        if self.broker.away:
            raise UnavailableError("nobody listens there")
        return self.topic

    @contextlib.asynccontextmanager
    async def spool(self, *, late: bool = False, options: str = "") -> AsyncIterator[Spool]:
        async with Spool.open(
            self.settings,
            broker=None if late else self.topic,
            open_broker=self.open_late,
            clock=self.clock,
            on_failure=self.failures.append,
            options=options or "?commit=loop",
        ) as spool:
            yield spool

    async def pass_time(self, seconds: float) -> None:
        """Let time pass, with real moments in between for what runs in threads."""
        passed = 0.0
        while passed < seconds:
            await self.clock.pass_time(0.05)
            passed += 0.05
            await asyncio.sleep(0.001)

    async def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        for _ in range(round(seconds / 0.25)):
            if condition():
                return
            await self.pass_time(0.25)
        raise AssertionError("it did not happen in time")

    def damage(self, *, number: int, offset: int) -> None:
        """Have one rating of a spool that nobody has open not be what it was."""
        connection = apsw.Connection(f"{self.settings.folder}/{number}/queue.db")
        connection.execute("UPDATE message_1 SET body = x'00' WHERE offset = ?", (offset,))
        connection.close()

    def file(self, number: int = 1) -> str:
        return f"sqlite://{self.settings.folder}/{number}/queue.db"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    found = Site(tmp_path)
    yield found
    found.broker.answering.set()
    await found.topic.close()


async def store(spool: Spool, body: bytes, id_: bytes | None = None) -> None:
    """Store a rating as the intake does."""
    message = Message(body, key="default/") if id_ is None else Message(body, id_, "default/")
    try:
        await spool.send(message)
    except MessagingError as error:
        if not means_away(error):
            raise
        await spool.take(message, error)


async def store_all(spool: Spool, bodies: Sequence[bytes]) -> None:
    """Store ratings, one after the other."""
    for body in bodies:
        await store(spool, body)


async def leave_over(site: Site, *each: Sequence[bytes]) -> None:
    """Store ratings by as many processes, which are gone then."""
    async with contextlib.AsyncExitStack() as stack:
        spools = [await stack.enter_async_context(site.spool()) for _ in each]
        for spool, bodies in zip(spools, each, strict=True):
            await store_all(spool, bodies)


def numbered(number: int, first: int = 0) -> list[bytes]:
    return [b"%d" % at for at in range(first, first + number)]


class TestStoring:
    async def test_with_the_broker_nothing_stands_in_front_of_it(self, site: Site) -> None:
        async with site.spool() as spool:
            # Not equal in effect: the very same function, so that it costs the same.
            assert spool.send == site.topic.send
            await store(spool, b"7")
            await site.pass_time(5.0)

            assert (spool.is_away, spool.stored, spool.length) == (False, 0, 0)
        assert site.broker.bodies == [b"7"]

    async def test_what_a_broker_that_is_away_cannot_take_is_kept(self, site: Site) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store_all(spool, numbered(5))

            assert (spool.is_away, spool.stored, spool.length) == (True, 5, 5)
            assert site.broker.stored == []

    async def test_while_it_is_away_the_broker_is_asked_with_one_rating_at_a_time(
        self, site: Site
    ) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store_all(spool, numbered(50))
            await site.pass_time(60.0)

            # 0.1 s, doubled up to 5 s: some eighteen times in a minute.
            assert set(site.broker.calls) == {1}
            assert 10 < len(site.broker.calls) < 25
        async with site.spool():  # where fifty wait from the start
            await site.pass_time(10.0)

            assert set(site.broker.calls) == {1}

    async def test_a_broker_that_does_not_answer_holds_the_first_up_for_a_second_or_so(
        self, site: Site
    ) -> None:
        async with site.spool() as spool:
            site.broker.answering.clear()
            began = site.clock.monotonic()
            first = [asyncio.ensure_future(store(spool, body)) for body in numbered(20)]
            await site.until(lambda: all(each.done() for each in first))
            took = site.clock.monotonic() - began
            for body in numbered(20, first=20):
                await asyncio.wait_for(store(spool, body), 10.0)  # of real time: no pass_time

            assert took <= 1.75
            assert spool.length == 40
            site.broker.answering.set()
            await site.until(lambda: not spool.is_away)
        assert site.broker.bodies == numbered(40)

    async def test_what_was_perhaps_stored_goes_on_under_the_same_id(self, site: Site) -> None:
        site.broker.forgets_to_answer = True
        async with site.spool() as spool:
            await store(spool, b"7")
            site.broker.forgets_to_answer = False
            await site.until(lambda: not spool.is_away)

        assert [message.body for message in site.broker.stored] == [b"7", b"7"]
        assert len({message.id for message in site.broker.stored}) == 1
        assert {message.key for message in site.broker.stored} == {"default/"}

    async def test_a_full_broker_is_not_away(self, site: Site) -> None:
        site.broker.room = 0
        async with site.spool() as spool:
            with pytest.raises(QueueFullError):
                await store(spool, b"7")

            assert not spool.is_away

    async def test_what_is_too_large_for_the_broker_is_refused_while_it_is_away(
        self, site: Site
    ) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store(spool, b"7")
            with pytest.raises(MessageTooLargeError):
                await store(spool, b"x" * 101)

            assert spool.length == 1

    async def test_a_broker_that_was_given_up_is_not_away(self, site: Site) -> None:
        site.broker.broken = True
        async with site.spool() as spool:
            with pytest.raises(BrokenBrokerError):
                await store(spool, b"7")

            assert not spool.is_away


class TestBounds:
    async def test_a_full_spool_refuses(self, site: Site) -> None:
        site.settings = SpoolSettings(site.settings.folder, limit=3, hours=24.0)
        site.broker.away = True
        async with site.spool() as spool:
            await store_all(spool, numbered(3))
            with pytest.raises(SpoolRefusedError, match="limit of 3 ratings"):
                await store(spool, b"4")

            assert (spool.length, spool.refused) == (3, 1)

    async def test_one_that_waited_too_long_refuses(self, site: Site) -> None:
        site.settings = SpoolSettings(site.settings.folder, limit=100, hours=0.01)
        site.broker.away = True
        async with site.spool() as spool:
            await store(spool, b"1")
            await site.pass_time(35.0)
            await store(spool, b"2")
            await site.pass_time(2.0)
            with pytest.raises(SpoolRefusedError, match=r"waited in the spool for 0\.0 h"):
                await store(spool, b"3")

            assert 36.0 < spool.oldest_seconds < 38.0
            site.broker.away = False
            await site.until(lambda: not spool.is_away)
            assert spool.oldest_seconds == 0.0
        assert site.broker.bodies == [b"1", b"2"]

    async def test_a_broker_that_is_back_and_full_lets_the_rest_wait(self, site: Site) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store_all(spool, numbered(10))
            site.broker.away, site.broker.room = False, 4
            await site.until(lambda: len(site.broker.stored) == 4)
            await site.pass_time(1.0)
            refused = []
            for _ in range(2):
                with pytest.raises(QueueFullError) as full:
                    await store(spool, b"new")
                refused.append(full.value)
            # One that is raised again and again keeps the stacks of all who met it.
            assert refused[0] is not refused[1]

            assert spool.length == 6
            site.broker.room = None
            await site.until(lambda: not spool.is_away)
        assert site.broker.bodies == numbered(10)

    @pytest.mark.parametrize(
        ("hours", "horizon", "refused"),
        [
            (24.0, None, False),
            (24.0, 259_200.0, False),
            (47.0, 259_200.0, False),
            (48.0, 259_200.0, True),
            (24.0, 90_000.0, True),
        ],
    )
    def test_a_ledger_must_remember_ids_for_as_long_as_they_may_come_again(
        self, hours: float, horizon: float | None, refused: bool
    ) -> None:
        settings = SpoolSettings(Path("spool"), limit=1, hours=hours)

        with pytest.raises(ForgetfulLedgerError) if refused else contextlib.nullcontext() as found:
            settings.check_horizon(horizon)

        if found is not None:
            assert f"horizon={round(hours * 3_600 + 90_000)}" in str(found.value)
            assert f"remembers ids for {horizon / 3_600:,.0f} h" in str(found.value)  # type: ignore[operator]


class TestComingBack:
    async def test_all_go_on_in_order_each_once(self, site: Site) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store_all(spool, numbered(2_500))
            site.broker.away = False
            await site.until(lambda: not spool.is_away)

            assert (spool.length, spool.oldest_seconds) == (0, 0.0)
            assert spool.send == site.topic.send
        assert [message.body for message in site.broker.stored] == numbered(2_500)

    async def test_new_ratings_do_not_overtake_those_that_wait(self, site: Site) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store_all(spool, numbered(3_000))
            site.broker.away = False
            at = 3_000
            while spool.is_away:
                # One after the other, as a visitor's would be: each behind the one before.
                sending = asyncio.ensure_future(store(spool, b"%d" % at))
                while not sending.done():
                    await site.pass_time(0.05)
                await sending
                at += 1
            for _ in range(10):
                await store(spool, b"%d" % at)
                at += 1

            assert at > 3_010, "none was sent while others waited"
        assert site.broker.bodies == numbered(at)

    async def test_under_load_the_spool_comes_to_an_end(self, site: Site) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store_all(spool, numbered(1_500))
            site.broker.away = False
            ended = False
            sent = 0

            async def client() -> None:
                nonlocal sent
                while not ended:
                    sent += 1
                    await store(spool, b"live")

            clients = [asyncio.ensure_future(client()) for _ in range(32)]
            await site.until(lambda: not spool.is_away, seconds=20.0)
            ended = True
            await asyncio.gather(*clients)
        assert len({message.id for message in site.broker.stored}) == 1_500 + sent

    async def test_one_that_goes_away_again_is_waited_for_again(self, site: Site) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            sent = 0
            for _ in range(4):
                for _ in range(700):
                    await store(spool, b"%d" % sent)
                    sent += 1
                site.broker.away = False
                before = len(site.broker.stored)
                await site.until(lambda before=before: len(site.broker.stored) > before)  # type: ignore[misc]
                site.broker.away = True
            site.broker.away = False
            await site.until(lambda: not spool.is_away)
        assert site.broker.bodies == numbered(sent)

    async def test_who_waits_for_the_last_ones_is_kept_where_the_broker_goes_again(
        self, site: Site
    ) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store_all(spool, numbered(5))
            site.broker.away, site.broker.hangs_after = False, 1
            await site.until(lambda: site.broker.calls[-1] > 1)
            waiting = [asyncio.ensure_future(store(spool, b"%d" % at)) for at in range(5, 8)]
            await site.pass_time(0.1)
            assert not any(each.done() for each in waiting)
            await site.until(lambda: all(each.done() for each in waiting), seconds=3.0)

            assert spool.length == 4 + 3
            site.broker.hangs_after = None
            site.broker.answering.set()
            await site.until(lambda: not spool.is_away)
        assert site.broker.bodies == numbered(8)

    async def test_a_rating_that_can_never_go_on_is_a_dead_letter_and_stops_nobody(
        self, site: Site
    ) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store_all(spool, numbered(5))
            site.broker.too_large, site.broker.away = {b"2"}, False
            await site.until(lambda: not spool.is_away)
            await site.pass_time(1.0)  # watermarks are written four times a second

            found = await look_into(site.file())
            assert (found.pending, found.dead) == (0, 1)
        assert site.broker.bodies == [b"0", b"1", b"3", b"4"]

    async def test_a_count_that_went_wrong_keeps_nobody_away_from_the_broker(
        self, site: Site
    ) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store_all(spool, numbered(40))
            # As where somebody else has consumed some of it, with `molva sub`.
            spool._outbox._found += 5
            site.broker.away = False
            await site.until(lambda: not spool.is_away)

            assert spool.length == 0
        assert site.broker.bodies == numbered(40)

    async def test_a_request_that_was_cancelled_is_not_forgotten_in_the_spool(
        self, site: Site
    ) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store(spool, b"0")
            cancelled = asyncio.ensure_future(store(spool, b"1"))
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.wait((cancelled,))
            site.broker.away = False
            await site.until(lambda: not spool.is_away)
        assert site.broker.bodies == [b"0", b"1"]


class TestDying:
    async def test_what_was_left_in_it_goes_on_first(self, site: Site) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store_all(spool, numbered(30))
        async with site.spool() as spool:
            assert (spool.is_away, spool.length) == (True, 30)
            await store(spool, b"30")
            site.broker.away = False
            await site.until(lambda: not spool.is_away)
        assert site.broker.bodies == numbered(31)

    async def test_nothing_leaves_it_before_the_broker_has_confirmed(self, site: Site) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store_all(spool, numbered(30))
            site.broker.away, site.broker.hangs_after = False, 1
            await site.until(lambda: site.broker.calls[-1] > 1)
            # A batch is on its way, and this process ends.

        assert site.broker.bodies == [b"0"]
        assert (await look_into(site.file())).pending == 29

    async def test_dying_again_and_again_makes_no_dead_letter(self, site: Site) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store(spool, b"7")
        url = with_options(site.file(), topic=OUTBOX_TOPIC, subscription=OUTBOX_SUBSCRIPTION)
        for _ in range(12):
            dying = await open_subscription(url, max_attempts=1_000, clock=site.clock)
            assert len(await dying.receive(1, wait=1.0)) == 1
            # As the system would: locks are free, and nothing is given back.
            dying._driver._members.close()  # type: ignore[attr-defined]
            dying._closed = True

        async with site.spool() as spool:
            site.broker.away = False
            await site.until(lambda: not spool.is_away)
        assert site.broker.bodies == [b"7"]

    async def test_what_another_process_left_over_is_adopted(self, site: Site) -> None:
        site.broker.away = True
        async with site.spool() as first:
            await store(first, b"first")
            async with site.spool() as second:
                await store(second, b"second")
                assert [held for _, held in SpoolFolder(site.settings.folder).look()] == [True] * 2
            site.broker.away = False
            await site.until(lambda: not first.is_away)
            assert [held for _, held in SpoolFolder(site.settings.folder).look()] == [True, False]
            await site.until(lambda: b"second" in site.broker.bodies, seconds=61.0)
            await site.until(lambda: len(SpoolFolder(site.settings.folder).look()) == 1)

            assert first.length == 0
        assert site.broker.bodies == [b"first", b"second"]

    async def test_dead_letters_of_one_that_was_left_over_are_kept(
        self, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        site.broker.away = True
        async with site.spool() as first:
            async with site.spool() as second:
                await store_all(second, [b"small", b"large"])
            site.broker.too_large, site.broker.away = {b"large"}, False
            await site.until(lambda: b"small" in site.broker.bodies, seconds=61.0)
            await site.pass_time(65.0)  # it is looked into twice more

            assert (await look_into(site.file(2))).dead == 1
            assert (first.dead_letters, first.length) == (1, 0)
        told = [line.getMessage() for line in caplog.records if "spool/2" in line.getMessage()]
        assert len(told) == 2
        assert "dead letter here: " in told[0]
        assert told[1].endswith("1 dead letters are kept there")

    @pytest.mark.parametrize("number", [1, 2])
    async def test_a_dead_letter_that_was_sent_back_goes_on(self, site: Site, number: int) -> None:
        site.broker.away = True
        async with site.spool() as first:
            async with site.spool() as second:
                await store(first if number == 1 else second, b"large")
            site.broker.too_large, site.broker.away = {b"large"}, False
            await site.until(lambda: not first.is_away)
            await site.pass_time(65.0)
            assert first.dead_letters == 1

            site.broker.too_large = set()
            # As `molva queue replay` does.
            url = with_options(
                site.file(number), topic=OUTBOX_TOPIC, subscription=OUTBOX_SUBSCRIPTION
            )
            async with await open_subscription(url) as subscription:
                assert await subscription.replay() == 1
            await site.until(lambda: b"large" in site.broker.bodies, seconds=61.0)
            await site.until(lambda: len(SpoolFolder(site.settings.folder).look()) == 1)
            await site.until(lambda: not first.is_away)

            assert (first.dead_letters, first.length) == (0, 0)
        assert site.failures == []

    async def test_a_failed_fsync_in_one_that_was_left_over_ends_the_process(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vfs = FaultyVFS()
        site.broker.away = True
        async with site.spool() as first:
            async with site.spool() as second:
                await store_all(second, numbered(5))
            # Only who adopts a spool opens it without a limit.
            opening = Outbox.open

            async def open_faulty(url: str, *, limit: int | None, clock: ManualClock) -> Outbox:
                options = f"?commit=loop&vfs={vfs.vfs_name}"
                return await opening(url + options, limit=limit, clock=clock)

            monkeypatch.setattr(Outbox, "open", open_faulty)
            vfs.fail_sync = lambda: True
            site.broker.away = False
            await site.until(lambda: bool(site.failures), seconds=61.0)
            vfs.fail_sync = lambda: False
            writes = vfs.writes
            await site.pass_time(65.0)

            assert vfs.writes == writes
            assert (await look_into(site.file(2))).pending == 5
            assert not first.is_away
        assert [type(error) for error in site.failures] == [BrokenBrokerError]

    async def test_a_damaged_one_that_was_left_over_stops_nobody(self, site: Site) -> None:
        site.broker.away = True
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(site.spool())
            for body in (b"1", b"2"):
                async with contextlib.AsyncExitStack() as inner:
                    other = await inner.enter_async_context(site.spool())
                    another = await inner.enter_async_context(site.spool())
                    await store(other, body)
                    await store(another, body)
            Path(f"{site.settings.folder}/2/queue.db").write_bytes(b"this is no database" * 400)
            site.broker.away = False
            await site.until(lambda: b"2" in site.broker.bodies, seconds=120.0)

            assert not first.is_away
            await site.pass_time(31.0)
            assert (first.left_over, first.unreadable) == (0, 1)
        assert site.failures == []

    async def test_one_that_may_not_be_taken_stops_nobody(
        self, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        site.broker.away = True
        async with site.spool() as first:
            await leave_over(site, [b"2"], [b"3"])
            # As where somebody else made it, and it may not be written.
            lock = site.settings.folder / "2.lock"
            lock.unlink()
            lock.mkdir()
            site.broker.away = False
            await site.until(lambda: b"3" in site.broker.bodies, seconds=61.0)
            await site.pass_time(31.0)

            assert not first.is_away
            assert first.left_over == 1
        assert site.failures == []
        assert "spool/2 cannot be sent on" in caplog.text

    async def test_all_that_was_left_over_is_told_while_the_broker_is_away(
        self, site: Site
    ) -> None:
        site.broker.away = True
        async with site.spool() as first:
            await store(first, b"1")
            await leave_over(site, numbered(2), numbered(3))
            await site.pass_time(31.0)

            assert (first.length, first.left_over) == (1, 5)
            site.broker.away = False
            await site.until(lambda: len(site.broker.bodies) == 6)
            await site.until(lambda: (first.left_over, first.length) == (0, 0))

    async def test_one_with_a_rating_that_cannot_be_read_is_counted_and_passed_over(
        self, site: Site
    ) -> None:
        site.broker.away = True
        async with site.spool() as first:
            await leave_over(site, numbered(3), [b"third"])
            site.damage(number=2, offset=1)
            site.broker.away = False
            await site.until(lambda: b"third" in site.broker.bodies, seconds=61.0)
            await site.pass_time(31.0)

            assert first.unreadable == 1
            assert not first.is_away
        assert site.failures == []

    async def test_a_rating_that_cannot_be_read_ends_the_process_whose_spool_it_is(
        self, site: Site
    ) -> None:
        site.broker.away = True
        async with site.spool() as spool:
            await store_all(spool, numbered(5))
        site.damage(number=1, offset=3)
        site.broker.away = False
        async with site.spool():
            await site.until(lambda: bool(site.failures))
        [failure] = site.failures
        assert type(failure) is IncompatibleBrokerError


class TestStarting:
    async def test_the_broker_may_be_away_from_the_start(self, site: Site) -> None:
        site.broker.away = True
        async with site.spool(late=True) as spool:
            assert spool.is_away
            assert spool.broker is None
            await store_all(spool, numbered(3))
            await site.pass_time(10.0)
            assert site.opened > 3
            site.broker.away = False
            await site.until(lambda: not spool.is_away)
            assert spool.broker is site.topic
        assert site.broker.bodies == numbered(3)

    async def test_one_that_comes_late_takes_over_though_nothing_was_kept(self, site: Site) -> None:
        site.broker.away = True
        async with site.spool(late=True) as spool:
            await site.pass_time(3.0)
            site.broker.away = False
            await site.until(lambda: not spool.is_away)
            await store(spool, b"7")
        assert site.broker.bodies == [b"7"]

    async def test_one_that_turns_out_not_to_be_what_was_asked_for_ends_the_process(
        self, site: Site
    ) -> None:
        async def open_broker() -> Topic:
            raise UnmetPromiseError("it does not survive power")

        site.open_late = open_broker  # type: ignore[method-assign]
        async with site.spool(late=True) as spool:
            await store(spool, b"7")
            await site.until(lambda: bool(site.failures))

            assert isinstance(site.failures[0], UnmetPromiseError)
            assert spool.length == 1, "it stays where it is safe"

    async def test_a_folder_that_cannot_be_written_is_refused(self, site: Site) -> None:
        site.settings.folder.write_text("a file")

        with pytest.raises(UnavailableError, match="--when-broker-down refuse"):
            async with site.spool():
                pass


class TestStorageTrouble:
    async def test_a_full_disk_refuses_and_passes(self, site: Site) -> None:
        vfs = FaultyVFS()
        site.broker.away = True
        async with site.spool(options=f"?commit=loop&vfs={vfs.vfs_name}") as spool:
            await store(spool, b"1")
            vfs.fail_write = lambda: True
            with pytest.raises(SpoolRefusedError, match="cannot be written"):
                await store(spool, b"2")
            vfs.fail_write = lambda: False
            await store(spool, b"3")
            site.broker.away = False
            await site.until(lambda: not spool.is_away)
        assert site.broker.bodies == [b"1", b"3"]

    async def test_after_a_failed_fsync_nothing_is_written_behind_it(self, site: Site) -> None:
        vfs = FaultyVFS()
        site.broker.away = True
        writes: list[int] = []
        answers: list[str] = []

        async def attempt(spool: Spool, body: bytes) -> None:
            try:
                await store(spool, body)
                answers.append("stored")
            except BrokenBrokerError:
                answers.append("broken")
            writes.append(vfs.writes)

        # Closing what is broken raises, too, so nothing is asserted within.
        with contextlib.suppress(BrokenBrokerError):
            async with site.spool(options=f"?commit=loop&vfs={vfs.vfs_name}") as spool:
                await attempt(spool, b"1")
                vfs.fail_sync = lambda: True
                await attempt(spool, b"2")
                vfs.fail_sync = lambda: False
                await attempt(spool, b"3")
                await site.pass_time(10.0)
                writes.append(vfs.writes)

        assert answers == ["stored", "broken", "broken"]
        assert writes[1] == writes[2] == writes[3]

        # And the next process: what was confirmed is there, what was refused may be.
        site.broker.away = False
        async with site.spool() as spool:
            await site.until(lambda: not spool.is_away)
        assert site.broker.bodies[0] == b"1"
        assert b"3" not in site.broker.bodies


class TestOutbox:
    async def test_it_survives_kill_and_power_and_no_node(self, tmp_path: Path) -> None:
        clock = ManualClock()
        outbox = await Outbox.open(f"sqlite://{tmp_path}/q.db", limit=None, clock=clock)

        assert outbox.survives == {"kill", "power"}
        await outbox.close()

    async def test_looking_into_one_that_was_never_made_finds_nothing(self, tmp_path: Path) -> None:
        found = await look_into(f"sqlite://{tmp_path}/q.db")

        assert (found.pending, found.dead) == (0, 0)
