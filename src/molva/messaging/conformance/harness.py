"""What a driver brings to the suite: URLs of a fresh broker, how it keeps time, what it offers.

Two kinds of time. The drivers whose whole time comes from the clock that they are opened
with (memory, SQLite) are ``virtual``: a test that calls ``stop_clock`` gets a clock that
stands still, and ``pass_time`` moves it. A broker keeps time of its own: there ``stop_clock``
does nothing and ``pass_time`` waits. So a harness of a broker declares short times, and the
suite is over in minutes.

A short lease is also one that runs out when the machine stands still for as long. So only
tests that let leases run out have the one declared: those that need the feature ``leases``,
and those that call ``shorten_leases`` or ``use_processes``. In all others a broker's leases are
longer than any test.

What a broker cannot do is no matter of the harness but of the driver's ``Capabilities``:
tests are chosen by them, with ``needs`` and ``lacks``, and by nothing else.
"""

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable
from typing import ClassVar, Final, TypeVar

import pytest
import pytest_asyncio

from molva._base.clock import SYSTEM_CLOCK, Clock, ManualClock
from molva.messaging.conformance.actors import Start, starting
from molva.messaging.conformance.waiting import PATIENCE, eventually, key_in_lane, patiently
from molva.messaging.delivery import Delivery
from molva.messaging.driver import ALL_FEATURES, Capabilities
from molva.messaging.queue import Queue, open_queue
from molva.messaging.subscription import Subscription, open_subscription
from molva.messaging.topic import Topic, open_topic
from molva.messaging.url import BrokerURL, Kind, load_driver, with_options

__all__ = ["Harness", "Suite", "lacks", "needs", "offered"]

# Seconds by which a receive may be late and yet have listened.
_ON_TIME: Final = 0.5
# Seconds of a lease that no test sees the end of.
_LONG_LEASE: Final = 3 * PATIENCE
# Seconds of a lease where processes are killed. Shorter, and one that stands still for a moment
# loses what it holds; longer, and each test of a kill takes so much longer.
_PROCESS_LEASE: Final = 2.0

_Opened = TypeVar("_Opened")
_Test = TypeVar("_Test", bound=Callable[..., object])


class Harness(ABC):
    """One fresh broker, its time, and what can be done to it. Override what differs.

    The intervals below are those of a driver that is told of everything at once. They are
    waited for in earnest where a driver is not ``virtual``: declare the shortest at which
    the tests never fail.
    """

    # Whether all of the driver's time comes from the clock that it is opened with.
    virtual: ClassVar[bool] = False
    # Seconds of a lease. Long where time is virtual; with a broker, the shortest that it
    # keeps reliably: each test of leases waits for several. Others have a longer one.
    lease: float = 1.0
    # A length of time where any would do: of a delay, of a message's age.
    moment: ClassVar[float] = 1.0
    # Seconds without a message after which none is under way any more. 0 where a receive
    # of what is there finds it all at once.
    quiet: ClassVar[float] = 0.3
    # How often it must be quiet for so long. Once is enough where a consumer asks and the
    # broker answers that there is nothing; one that sends by itself may have stood still.
    silences: ClassVar[int] = 2
    # Seconds after which a settled message has made room, and is counted and kept no more.
    settle_interval: ClassVar[float] = 0.0
    # Seconds after which what was acknowledged stays so, though its consumer is killed.
    ack_interval: ClassVar[float] = 0.0
    # Seconds after which lanes have moved to a consumer that joined or whose peer left.
    share_interval: ClassVar[float] = 0.0
    # Seconds for which a lane that should move waits for who works on a message of it;
    # None: for ever.
    lane_grace: ClassVar[float | None] = None
    # Seconds within which an idle consumer has a message that was sent. 50 ms is the
    # promise; a broker whose protocol cannot declares more, and the summary prints it.
    idle_bound: ClassVar[float] = 0.05
    # Within how many seconds a message that was held by a killed consumer comes to another
    # one, beyond a lease: a session's timeout and a rebalance.
    death_interval: ClassVar[float] = 0.0
    # Of how many orders of acknowledging eight messages the suite tries a sample, by seed;
    # None: all 40,320 of them, for a driver that needs no more than some 50 µs for each.
    ack_orders: ClassVar[int | None] = 12
    # Seconds after which what everybody has settled is deleted.
    delete_interval: float = 0.0
    # By how many messages more than its capacity a topic or queue may hold where
    # ``capacity`` is ``approximate``.
    capacity_slack: ClassVar[int] = 0
    # Stands before the names of topics and queues, where tests share a server.
    prefix: str = ""

    # Which kind is tested; the suite sets it.
    kind: Kind = "topic"

    def __init__(self) -> None:
        self.clock: Clock = SYSTEM_CLOCK
        self.duplicates: Counter[str] = Counter()
        self._opened: list[Topic | Subscription | Queue] = []
        self._short_lease: float | None = None

    # What a driver must say ----------------------------------------------------------------

    @abstractmethod
    def base_url(self) -> str:
        """Return the URL of one broker, which is empty at first, or of which ``prefix`` is."""

    async def kept(self, topic: str = "t") -> int:
        """Return how many messages of a topic are stored, settled or not.

        Needed where the driver's topics have the feature ``deletes``; ask the broker.
        """
        raise AssertionError(f"{type(self).__name__} says nothing of what {topic!r} keeps")

    def capabilities(self, kind: Kind) -> Capabilities:
        """Return what the broker under test can do; at best, unless this is overridden.

        Override it where that depends on how the server under test was set up.
        """
        driver = load_driver(BrokerURL.parse(self.base_url()))
        found: Capabilities = getattr(driver, f"{kind.upper()}_CAPABILITIES")
        return found

    def options(self, kind: Kind) -> tuple[str, ...]:
        """Return the URL options that only this driver has."""
        driver = load_driver(BrokerURL.parse(self.base_url()))
        found: tuple[str, ...] = getattr(driver, f"{kind.upper()}_OPTIONS")
        return found

    def can(self, feature: str) -> bool:
        """Tell whether the driver has a feature, for the kind that is tested."""
        return feature in self.capabilities(self.kind).features

    # What a driver may offer ---------------------------------------------------------------

    def let_only_wake_ups_wake(self) -> None:  # noqa: B027 - most have nothing to keep from
        """Keep consumers opened from now on from looking by themselves, if they do."""

    def let_deleting_hurry(self) -> None:  # noqa: B027 - most delete soon anyway
        """Let consumers opened from now on delete more often, and shorten ``delete_interval``."""

    async def restart_broker(self) -> None:
        """Stop the broker without warning and start it again with what it had stored."""
        raise AssertionError("not offered")

    async def cut_connections(self) -> None:
        """Close all connections from the broker's side."""
        raise AssertionError("not offered")

    def offers(self, hook: str) -> bool:
        """Tell whether an optional hook was overridden."""
        return getattr(type(self), hook) is not getattr(Harness, hook)

    async def close(self) -> None:
        """Close what was opened. Override to remove what was made."""
        for opened in self._opened:
            await opened.close()

    def forget(self, opened: Topic | Subscription | Queue) -> None:
        """Leave it to the test to close what was opened."""
        self._opened.remove(opened)

    # Time ----------------------------------------------------------------------------------

    def stop_clock(self) -> None:
        """Let time stand still for whatever is opened from now on, where time is virtual."""
        if self.virtual:
            self.clock = ManualClock()

    async def pass_time(self, seconds: float) -> None:
        """Let time pass: a stopped clock is moved, any other waited for."""
        if isinstance(self.clock, ManualClock):
            await self.clock.pass_time(seconds)
        else:
            await asyncio.sleep(seconds)

    async def pass_until(self, holds: Callable[[], object]) -> None:
        """Let time pass in small steps until ``holds()`` is true."""
        if not isinstance(self.clock, ManualClock):
            await eventually(holds)
            return
        async with asyncio.timeout(PATIENCE):
            while not holds():
                await asyncio.sleep(0.001)
                await self.clock.pass_time(0.05)

    def use_processes(self) -> None:
        """Have leases that are waited for in earnest: processes have clocks of their own."""
        self.lease = _PROCESS_LEASE

    def lengthen_leases(self) -> None:
        """Have leases that no test sees the end of, where they would be waited for."""
        if not self.virtual:
            self._short_lease, self.lease = self.lease, _LONG_LEASE

    def shorten_leases(self) -> None:
        """Have the leases declared again: for a test that waits for one to run out."""
        if self._short_lease is not None:
            self.lease = self._short_lease

    def lengthen_sessions(self) -> None:
        """Have those who open from now on be missed only after two minutes, if they ever are.

        Needed where there is a ``death_interval``.
        """
        assert not self.death_interval, f"{type(self).__name__} does not say how"

    async def pass_lease(self) -> None:
        """Let a lease that was taken before run out."""
        await self.pass_time(self.lease + 0.1)

    @property
    def slack(self) -> float:
        """Seconds by which a measured time may be too long: the machine may be busy."""
        return 0.1 if isinstance(self.clock, ManualClock) else 5.0

    # Opening -------------------------------------------------------------------------------

    def url(self, topic: str = "t", subscription: str | None = None, /, **options: object) -> str:
        """Return the URL of a topic, or of a subscription of it."""
        named = {"topic": self.prefix + topic, **options}
        if subscription is not None:
            named["subscription"] = subscription
            if self.capabilities("topic").holding == "lease":
                named = {"lease": self.lease, **named}
        return with_options(self.base_url(), **{name: str(named[name]) for name in named})

    def queue_url(self, queue: str = "q", /, **options: object) -> str:
        """Return the URL of a queue."""
        named = {"queue": self.prefix + queue, **options}
        if self.capabilities("queue").holding == "lease":
            named = {"lease": self.lease, **named}
        return with_options(self.base_url(), **{name: str(named[name]) for name in named})

    async def topic(self, topic: str = "t", **options: object) -> Topic:
        """Open a topic, which is closed after the test."""
        url = self.url(topic, **options)
        opened = await self._open(lambda: open_topic(url, clock=self.clock))
        self._opened.append(opened)
        return opened

    async def subscription(
        self, name: str = "s", *, topic: str = "t", max_attempts: int = 5, **options: object
    ) -> Subscription:
        """Open one consumer of a subscription, which is closed after the test."""
        url = self.url(topic, name, **options)
        opened = await self._open(
            lambda: open_subscription(url, max_attempts=max_attempts, clock=self.clock)
        )
        self._opened.append(opened)
        return opened

    async def queue(
        self, queue: str = "q", *, max_attempts: int | None = None, **options: object
    ) -> Queue:
        """Open a queue, which is closed after the test."""
        url = self.queue_url(queue, **options)
        opened = await self._open(
            lambda: open_queue(url, clock=self.clock, max_attempts=max_attempts)
        )
        self._opened.append(opened)
        return opened

    async def _open(self, opens: Callable[[], Awaitable[_Opened]]) -> _Opened:
        return await (opens() if self.virtual else patiently(opens))

    async def sender(self, name: str = "a") -> Topic | Queue:
        """Open what is sent to: a topic or a queue, whichever is tested."""
        return await (self.topic(name) if self.kind == "topic" else self.queue(name))

    async def consumer(self, name: str = "a", *, max_attempts: int = 5) -> Subscription | Queue:
        """Open one consumer: of a subscription or a queue, whichever is tested."""
        if self.kind == "topic":
            return await self.subscription(topic=name, max_attempts=max_attempts)
        return await self.queue(name, max_attempts=max_attempts)

    def consumer_url(self, name: str = "a") -> str:
        """Return the URL that ``consumer`` opens, for another process."""
        return self.url(name, "s") if self.kind == "topic" else self.queue_url(name)

    def sender_url(self, name: str = "a") -> str:
        """Return the URL that ``sender`` opens, for another process."""
        return self.url(name) if self.kind == "topic" else self.queue_url(name)

    # Receiving -----------------------------------------------------------------------------

    async def rest(self, consumer: Subscription | Queue, *, least: int = 0) -> list[Delivery]:
        """Return all that still comes; an empty list says that nothing does.

        ``least`` are waited for: where that many must come, a busy broker is only late.
        """
        found: list[Delivery] = []
        loop = asyncio.get_running_loop()
        silences = 0
        deadline = loop.time() + PATIENCE
        while silences < self.silences or (len(found) < least and loop.time() < deadline):
            began = loop.time()
            more = await consumer.receive(1_000, wait=self.quiet)
            found += more
            # Where this process stood still meanwhile, it has not listened.
            silences = 0 if more else silences + (loop.time() - began < self.quiet + _ON_TIME)
        return found

    async def share(self, *consumers: Subscription | Queue) -> list[list[Delivery]]:
        """Let consumers that came or lost a peer share the lanes; return what each got."""
        got: list[list[Delivery]] = [[] for _ in consumers]
        for _ in range(3):  # notice, let go, take over
            await self.pass_time(self.share_interval)
            for place, consumer in enumerate(consumers):
                got[place] += await consumer.receive(1_000, wait=0.0)
        for place, consumer in enumerate(consumers):
            got[place] += await self.rest(consumer)
        return got

    def placed(self, found: list[bytes]) -> list[bytes]:
        """Return bodies as they came, or sorted where what comes again loses its place."""
        return found if self.can("in-place") else sorted(found)

    def key_in_lane(self, lane: int, lanes: int) -> str:
        """Return a key whose messages travel in ``lane`` of a topic that has ``lanes``."""
        return key_in_lane(lane, lanes)

    # Duplicates ----------------------------------------------------------------------------

    def count_duplicates(self, got: Iterable[Hashable], *, most: int, why: str) -> None:
        """Record what came more often than the test asked for.

        Args:
            got: What came, each as often as it did.
            most: How many duplicates are within what the driver declares.
            why: What made them: ``kill``, ``rebalance``, ``cancelled``.
        """
        found = sum(times - 1 for times in Counter(got).values())
        self.duplicates[why] += found
        assert found <= most, (
            f"duplicates beyond what is declared, after {why}: {found}, and at most {most}"
        )


class Suite:
    """What the parts of the suite share. Subclasses bring the fixture ``harness``."""

    kind: ClassVar[Kind]

    @pytest_asyncio.fixture
    async def start(self) -> AsyncIterator[Start]:
        """Starts processes that use the broker; whoever is left after the test is killed."""
        async with starting() as start:
            yield start

    @pytest_asyncio.fixture
    async def h(
        self,
        harness: Harness,
        request: pytest.FixtureRequest,
        record_property: Callable[[str, object], None],
    ) -> AsyncIterator[Harness]:
        """The harness, once it is sure that the driver can do what the test is about."""
        harness.kind = self.kind
        capabilities = harness.capabilities(self.kind)
        record_property("molva", f"{BrokerURL.parse(harness.base_url()).scheme} {self.kind}")
        # Skipped or not: what a harness has set in a driver must not stay for the next one.
        try:
            _skip_what_it_cannot(harness, request.function, capabilities)
            if "leases" not in getattr(request.function, _NEEDS, ()):
                harness.lengthen_leases()
            for hook in ("restart_broker", "cut_connections"):
                if harness.offers(hook):
                    record_property("molva offers", hook)
            yield harness
        finally:
            await harness.close()
        if harness.idle_bound != Harness.idle_bound:
            record_property("molva idle bound", harness.idle_bound)
        for why, number in (+harness.duplicates).items():
            record_property("molva duplicates", f"{number} {why}")


_NEEDS: Final = "_molva_needs"
_LACKS: Final = "_molva_lacks"
_OFFERED: Final = "_molva_offered"


def needs(*features: str) -> Callable[[_Test], _Test]:
    """Run a test only with drivers that have all these features, names of ``require``."""
    return _marked(_NEEDS, features)


def lacks(*features: str) -> Callable[[_Test], _Test]:
    """Run a test only with drivers that have none of these features."""
    return _marked(_LACKS, features)


def offered(*hooks: str) -> Callable[[_Test], _Test]:
    """Run a test only where the harness offers these hooks: ``restart_broker``."""
    return _marked(_OFFERED, hooks)


def _marked(mark: str, features: tuple[str, ...]) -> Callable[[_Test], _Test]:
    known = vars(Harness) if mark == _OFFERED else ALL_FEATURES
    unknown = set(features) - known.keys()
    assert not unknown, unknown

    def mark_it(test: _Test) -> _Test:
        setattr(test, mark, features)
        return test

    return mark_it


def _skip_what_it_cannot(
    harness: Harness, test: Callable[..., object], capabilities: Capabilities
) -> None:
    for feature in getattr(test, _NEEDS, ()):
        if feature not in capabilities.features:
            pytest.skip(f"by capability: no {feature!r} ({ALL_FEATURES[feature]})")
    for feature in getattr(test, _LACKS, ()):
        if feature in capabilities.features:
            pytest.skip(f"by capability: has {feature!r}, and this is about those without")
    for hook in getattr(test, _OFFERED, ()):
        if not harness.offers(hook):
            pytest.skip(f"not offered by {type(harness).__name__}: {hook}")
