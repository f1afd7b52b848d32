"""The service under simulation: its real intake, worker and ledger in simulated processes."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final, Literal, cast, final

from molva.messaging import Delivery, Queue, RejectError, Subscription, Topic
from molva.messaging._retry import Retries
from molva.messaging.url import BrokerURL
from molva.ratings.admission import Admission
from molva.ratings.campaign import Campaign
from molva.ratings.catalog.protocol import CatalogUnavailableError
from molva.ratings.intake import Intake
from molva.ratings.ledger.protocol import (
    Ledger,
    LedgerBrokenError,
    LedgerUnavailableError,
    Outcome,
    Total,
)
from molva.ratings.ledger.sqlite import SQLiteLedger
from molva.ratings.rating import Rating, Submission, check_rate, decode_entry
from molva.ratings.worker import Worker
from tests.faults.simulation.broker import Broker
from tests.faults.simulation.disk import Disk
from tests.faults.simulation.drivers import LeasedQueue, LogSubscription, LogTopic
from tests.faults.simulation.loop import Process, SimulatedLoop, VirtualClock
from tests.faults.simulation.plan import Plan

__all__ = ["CAMPAIGN", "Catalog", "Server", "Service", "Storage"]

CAMPAIGN: Final = Campaign(name="default", minimum=0, maximum=10, window=3)

_LOG: Final = BrokerURL.parse("memory://simulated?topic=ratings&subscription=process")
_QUEUE: Final = BrokerURL.parse("memory://simulated?queue=ratings")

# Hand-overs before a message is given up. Things are killed here as often as in years; a
# rating must not become a dead letter because of it.
_MAX_ATTEMPTS: Final = 1_000

_HANDLERS: Final = 4

# Ratings that may wait where the broker bounds nothing: few enough to be met now and then.
_MAY_WAIT: Final = 12


@final
class Catalog:
    """One campaign; cannot be read while it is ``down``."""

    def __init__(self) -> None:
        self.down = False

    async def revision(self) -> int:
        """Return a number that never changes."""
        if self.down:
            raise CatalogUnavailableError("the catalog is away")
        return 1

    async def campaigns(self) -> list[Campaign]:
        """Return the only campaign."""
        return [CAMPAIGN]

    async def campaign(self, name: str) -> Campaign | None:
        """Return the only campaign."""
        return CAMPAIGN if name == CAMPAIGN.name else None

    async def put_campaign(self, campaign: Campaign) -> bool:
        """Nobody changes it here."""
        return False

    async def close(self) -> None:
        """Nothing to release."""


@final
class Storage:
    """Where the ledger's file is, now: a power cut moves it.

    Attributes:
        slow: Whether commits take long and may be refused.
        begun: Told when a process begins to apply a batch.
        outcomes: What became of all submissions.
    """

    def __init__(self, loop: SimulatedLoop, plan: Plan, folder: Path, template: bytes) -> None:
        self.loop: Final = loop
        self.plan: Final = plan
        self.slow = False
        self.begun: Callable[[LateLedger], None] = lambda _: None
        self.outcomes: Counter[str] = Counter()
        self.disk = Disk() if plan.disk else None
        self._root = folder
        self._cuts = 0
        self._shared: SQLiteLedger | None = None
        self.path = folder / "0" / "ledger.db"
        self.path.parent.mkdir()
        self.path.write_bytes(template)
        if self.disk is not None:
            self.disk.begin(self.path.parent)

    def open(self, path: Path) -> SQLiteLedger:
        """Open the ledger, for one process.

        Opening is what costs most in a run. Where a commit is one step of the loop nothing is
        ever half done in the object, so there all processes share one.
        """
        vfs = None if self.disk is None else self.disk.vfs_name
        if self._shared is None or self.disk is not None or self.plan.commit != "loop":
            self._shared = SQLiteLedger.open(path, vfs=vfs, commit=self.plan.commit)
        return self._shared

    def cut(self) -> None:
        """Lose the power: whoever opens the ledger from now on finds what was synced."""
        assert self.disk is not None
        self._cuts += 1
        folder = self._root / str(self._cuts)
        folder.mkdir()
        self.disk.cut(folder, self.loop.chance)
        self.path = folder / "ledger.db"


@final
class LateLedger:
    """The real ledger behind a network: everything takes time, before and after."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        # Where it was when its process began: a power cut moves it from under our feet.
        self._path = storage.path
        self._opened: SQLiteLedger | None = None
        self._ended = False

    @property
    def real(self) -> SQLiteLedger:
        """The ledger itself; opened when it is first needed, which is what costs most here."""
        if self._opened is None:
            self._opened = self._storage.open(self._path)
        return self._opened

    async def apply(
        self, batch: Sequence[Submission], *, applied_at_us: int
    ) -> list[Outcome | Exception]:
        """Apply a batch; the caller may be killed before the commit, and behind it."""
        storage = self._storage
        if self._ended:
            raise LedgerBrokenError("the run is over")
        storage.begun(self)
        await self._wait()
        if storage.slow and storage.loop.chance.random() < 0.5:
            raise LedgerUnavailableError("the ledger is away")
        outcomes = await self.real.apply(batch, applied_at_us=applied_at_us)
        for outcome in outcomes:
            storage.outcomes[getattr(outcome, "name", "FAILED")] += 1
        await self._wait()
        return outcomes

    async def total(
        self,
        campaign: str,
        *,
        item: str | None = None,
        n: int,
        as_of: int | None = None,
        trusted: bool = True,
    ) -> Total | None:
        """Return the average of the last ``n``."""
        return await self.real.total(campaign, item=item, n=n, as_of=as_of, trusted=trusted)

    def end(self) -> None:
        """Apply nothing more."""
        self._ended = True

    async def close(self) -> None:
        """Release the file."""
        if self._opened is not None:
            await self._opened.close()

    async def _wait(self) -> None:
        storage = self._storage
        most = 0.8 if storage.slow else storage.plan.broker.latency
        await asyncio.sleep(most * storage.loop.chance.random())


@final
class Server:
    """One process of the service: HTTP or work; what it has open, and how it ends.

    Attributes:
        process: Its place in the loop.
        main: What it runs; done where the process ended by itself.
        doomed: Set when it is to be killed as soon as it has begun with something.
    """

    def __init__(self, service: "Service", role: Literal["serve", "work"], number: int) -> None:
        self._service = service
        self.role: Final = role
        self.number: Final = number
        self.process: Final = Process(f"{role}-{number}")
        self.ledger: Final = LateLedger(service.storage)
        self.doomed: Callable[[], None] | None = None
        self.intake: Intake | None = None
        self.stop: Callable[[], None] = lambda: None
        self.main = service.loop.start(self.process, self._main())

    def begin(self) -> None:
        """Note that it begins with a request, or a batch."""
        doom, self.doomed = self.doomed, None
        if doom is not None:
            self._service.broker.soon(doom)

    async def _main(self) -> None:
        service = self._service
        clock = VirtualClock(service.loop)
        try:
            if self.role == "serve":
                await self._serve(service, clock)
            elif service.plan.handlers:
                await self._handle(service, clock)
            else:
                await self._work(service, clock)
        except LedgerBrokenError:
            pass  # another process goes on
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - a process that fails is started again
            service.trace(self.process.name, "ended by", type(error).__name__)

    async def _serve(self, service: "Service", clock: VirtualClock) -> None:
        topic = service.open_sender(self.process, clock)
        ended = asyncio.Event()
        self.stop = ended.set

        async def pending() -> int | None:
            return service.broker.pending

        async def api(*_: object) -> None:
            raise AssertionError("only the fast lane is here")

        admission = Admission(_MAY_WAIT, lambda: topic, pending, clock)
        self.intake = Intake(
            outlet=topic,
            catalog=service.catalog,
            ledger=cast(Ledger, self.ledger),
            pending=pending,
            admission=admission,
            api=api,
            clock=clock,
            on_broken=ended.set,
        )
        try:
            async with admission.watching():
                await ended.wait()
        finally:
            await topic.close()

    async def _work(self, service: "Service", clock: VirtualClock) -> None:
        subscription = service.open_consumer(self.process, clock)
        worker = Worker(
            subscription=cast(Subscription, subscription),
            ledger=cast(Ledger, self.ledger),
            catalog=service.catalog,
            clock=clock,
        )
        self.stop = worker.stop
        try:
            await worker.run()
        finally:
            await subscription.close()

    async def _handle(self, service: "Service", clock: VirtualClock) -> None:
        queue = service.open_consumer(self.process, clock)
        self.stop = queue.stop

        async def handle(delivery: Delivery) -> None:
            try:
                entry = decode_entry(delivery.message.body)
                assert isinstance(entry, Rating)
                check_rate(entry.rate, CAMPAIGN)
            except ValueError as error:
                raise RejectError(str(error)) from error
            if service.loop.chance.random() < 0.1 and service.broker.rough:
                raise OSError("a handler fails now and then")
            submission = Submission(delivery.message.id, entry)
            try:
                [outcome] = await self.ledger.apply([submission], applied_at_us=clock.now_us())
            except LedgerBrokenError:
                queue.stop()  # another process goes on
                raise
            if outcome is Outcome.CONFLICT:
                raise RejectError("its id was used for another rating, which stands")

        try:
            await queue.run(handle, concurrency=_HANDLERS)
        finally:
            await queue.close()


@final
class Service:
    """All processes of the service, its broker and its ledger."""

    def __init__(
        self, loop: SimulatedLoop, plan: Plan, folder: Path, template: bytes, trace: Any
    ) -> None:
        self.loop: Final = loop
        self.plan: Final = plan
        self.trace: Callable[..., None] = trace
        self.broker: Final = Broker(loop, plan.broker, trace)
        self.storage: Final = Storage(loop, plan, folder, template)
        self.storage.begun = self._begun
        self.catalog: Final = Catalog()
        self.servers: dict[tuple[str, int], Server] = {}
        self.ended: list[Server] = []
        self._members = itertools.count(1)
        self.opened: list[Topic | Queue | Subscription] = []

    def start_all(self) -> None:
        """Start every process that is not there, or has ended."""
        if self.broker.ended:
            return
        for role, number in (("serve", self.plan.servers), ("work", self.plan.workers)):
            for index in range(number):
                server = self.servers.get((role, index))
                if server is None or not server.process.alive or server.main.done():
                    if server is not None:
                        self.ended.append(server)
                    self.servers[role, index] = Server(self, role, index)  # type: ignore[arg-type]

    def _begun(self, ledger: LateLedger) -> None:
        for server in self.servers.values():
            if server.ledger is ledger:
                server.begin()

    def open_sender(self, process: Process, clock: VirtualClock) -> Topic:
        """Open what ratings are sent to."""
        if self.plan.broker.holding == "lane":
            topic = Topic(LogTopic(self.broker, process, clock), _LOG, clock=clock, tracing=None)
            self.opened.append(topic)
            return topic
        # A queue sends as a topic does.
        return cast(Topic, self._open_queue(process, clock))

    def open_consumer(self, process: Process, clock: VirtualClock) -> Subscription | Queue:
        """Open what ratings are taken from."""
        if self.plan.broker.holding == "lane":
            driver = LogSubscription(self.broker, process, clock, next(self._members))
            subscription = Subscription(
                driver, _LOG, retries=self._retries(), clock=clock, tracing=None
            )
            self.opened.append(subscription)
            return subscription
        return self._open_queue(process, clock)

    def _open_queue(self, process: Process, clock: VirtualClock) -> Queue:
        driver = LeasedQueue(self.broker, process, clock, next(self._members))
        queue = Queue(driver, _QUEUE, retries=self._retries(), clock=clock, tracing=None)
        self.opened.append(queue)
        return queue

    def _retries(self) -> Retries:
        return Retries(_MAX_ATTEMPTS, dice=Random(self.loop.chance.random()))
