"""One HTTP process of the service: opens a deployment, serves it, drains, closes.

Granian carries the HTTP, embedded in our own event loop: one process, whose end we decide.
On SIGTERM it stops listening, answers what it has accepted, and goes; what is still open
after eight seconds is cut.

After an I/O error of the broker's file, or of the spool's, nothing more may be written to it by
this process. Every rating is then answered with 503, and the process ends, so that whoever
supervises it starts another one, which puts the file in order first.

With a spool the broker may be away from the start. What it survives is asked as soon as it can be;
until then what was accepted lies in the spool, and nowhere less safe.
"""

import asyncio
import contextlib
import logging
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final, final

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server

from molva._base.clock import Clock
from molva._base.collector import calm_collector
from molva._base.redaction import redact
from molva.messaging import BrokenBrokerError, Topic, UnavailableError
from molva.ratings.admission import Admission, tells
from molva.ratings.api import build_api
from molva.ratings.backlog import PATIENCE, Backlog
from molva.ratings.catalog import Catalog
from molva.ratings.deployment import SUBSCRIPTION, Deployment, check_shared, survives
from molva.ratings.intake import Intake
from molva.ratings.ledger import Ledger, LedgerError
from molva.ratings.metrics import Metrics
from molva.ratings.outbox import outboxes_survive
from molva.ratings.siblings import PORT_HELD, Siblings
from molva.ratings.spool import Spool

__all__ = ["AddressInUseError", "BrokenStorageError", "End", "HTTPService", "hold_port", "serve"]

_logger: Final = logging.getLogger("molva.ratings")

# Seconds that a stopping server waits for open requests. The service promises to be gone
# within ten.
_DRAIN_SECONDS: Final = 8.0
# Seconds between the first answer of 503 and the end of a process with broken storage:
# those who wait get their answer first.
_BROKEN_LINGER: Final = 0.5
# Seconds that closing a broker may take, where a spool keeps what it has not confirmed: one that
# is away answers nothing for longer than a stopping process has.
_CLOSE_SECONDS: Final = 1.0
# Milliseconds that the head of a request may take.
_HEADER_TIMEOUT_MS: Final = 10_000
# Connections that may wait to be accepted, and requests that may be under way at once.
_BACKLOG: Final = 1_024
_CONCURRENT_REQUESTS: Final = 4_096
# Open files to ask for: the connections, and some for the files of broker and ledger.
_OPEN_FILES: Final = 65_536
# Seconds for which one thread may keep the GIL. Commits on slow disks run in a thread, and
# at Python's own 5 ms each would wait that long to say that it is done.
_SWITCH_INTERVAL: Final = 0.0005


class AddressInUseError(Exception):
    """Another program listens on the address."""


@final
class BrokenStorageError(Exception):
    """The broker's storage failed; another process has to go on."""


@final
class End:
    """Why this process has to end, and another one to go on.

    Attributes:
        reached: Set as soon as it has to.
        error: What is to be raised then; None where broken storage speaks for itself.
    """

    def __init__(self) -> None:
        self.reached: Final = asyncio.Event()
        self.error: Exception | None = None

    def because(self, error: Exception) -> None:
        """End for an error; the first one tells."""
        self.error = self.error or error
        self.reached.set()


@final
class HTTPService:
    """What one HTTP process has open; see ``ratings.service`` for what its API needs.

    Attributes:
        outlet: Where ratings go: the broker, or a spool in front of it.
        kept: What an accepted rating survives.
        end: Whether this process has to end, and why.
    """

    def __init__(
        self,
        outlet: Topic | Spool,
        catalog: Catalog,
        ledger: Ledger,
        clock: Clock,
        *,
        end: End,
        kept: list[str],
        capacity: int | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self.outlet: Final = outlet
        self.catalog: Final = catalog
        self.ledger: Final = ledger
        self.clock: Final = clock
        self.kept: Final = kept
        self.end: Final = end
        self.stopping = False
        self.api: Final = build_api(self)
        # Missing where it cannot be told, which is what an alert looks for. A broker that is known
        # to be away is not asked: that may take longer than a scrape.
        self.backlog: Final = Backlog(lambda: None if self._is_away else self.topic)
        self.admission: Final = Admission(
            capacity, lambda: self.topic, lambda: self.pending(None), clock
        )
        spool = outlet if isinstance(outlet, Spool) else None
        self.intake: Final = Intake(
            outlet=outlet,
            spool=spool,
            catalog=catalog,
            ledger=ledger,
            pending=self.pending,
            admission=self.admission,
            api=self.api,
            clock=clock,
            on_broken=end.reached.set,
        )
        self._metrics: Final = Metrics(
            lambda: self.topic,
            self.backlog,
            self.intake,
            SUBSCRIPTION,
            siblings,
            capacity=capacity,
            spool=spool,
        )

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, deployment: Deployment, *, asked: tuple[str, ...] = ()
    ) -> "AsyncIterator[HTTPService]":
        """Open everything; close it again at the end of the block.

        Raises what ``serve`` raises for what cannot be opened, or does not survive ``asked``.
        """
        async with contextlib.AsyncExitStack() as stack:
            catalog = await deployment.open_catalog()
            stack.push_async_callback(catalog.close)
            ledger = await deployment.open_ledger()
            stack.push_async_callback(ledger.close)
            end = End()
            outlet = await stack.enter_async_context(
                _outlet(deployment, ledger, asked, on_failure=end.because)
            )
            siblings = Siblings.from_environment()
            topic, spool = (
                (outlet.broker, outlet.survives) if isinstance(outlet, Spool) else (outlet, None)
            )
            service = cls(
                outlet,
                catalog,
                ledger,
                deployment.clock,
                end=end,
                kept=survives(topic, ledger, spool=spool, asked=asked),
                capacity=deployment.capacity,
                siblings=siblings,
            )
            stack.push_async_callback(service.backlog.close)
            await stack.enter_async_context(service.admission.watching())
            if siblings is not None:
                telling = siblings.telling(service._metrics.own_text)
                await stack.enter_async_context(telling)
            yield service

    @property
    def topic(self) -> Topic | None:
        """The broker's topic; None where a spool waits for the broker since the start."""
        return self.outlet.broker if isinstance(self.outlet, Spool) else self.outlet

    @property
    def _is_away(self) -> bool:
        return isinstance(self.outlet, Spool) and self.outlet.is_away

    async def pending(self, patience: float | None = PATIENCE) -> int | None:
        """Return how many ratings are accepted and not yet counted; None if unknown.

        Args:
            patience: Seconds that the broker has for its answer; None for as many as it takes.
        """
        # Before the broker is asked: what goes on meanwhile counts twice rather than not at all.
        spooled = self.outlet.length if isinstance(self.outlet, Spool) else 0
        stat = await self.backlog.stat(patience)
        if stat is None:
            return None
        reading = stat.subscriptions.get(SUBSCRIPTION)
        return spooled + (stat.stored if reading is None else reading.pending)

    async def ready(self) -> list[str]:
        """Return why this process should get no requests now; empty if it should."""
        reasons = []
        if self.stopping:
            reasons.append("this process is stopping")
        if self.end.reached.is_set():
            reasons.append("this process cannot go on, another one will")
        try:
            await self.ledger.last_seq("default")
        except LedgerError:
            reasons.append("the ledger cannot be read")
        return reasons

    async def metrics(self) -> bytes:
        """Return the process's metrics in Prometheus' text format."""
        return await self._metrics.text()

    def stop(self) -> None:
        """End the live streams; new ratings are refused from now on."""
        self.stopping = True
        self.intake.stop()
        self.api.shutdown()


async def serve(
    deployment: Deployment,
    *,
    host: str,
    port: int,
    stop: asyncio.Event,
    asked: tuple[str, ...] = (),
    on_ready: Callable[[list[str]], None],
) -> None:
    """Serve a deployment over HTTP until ``stop`` is set.

    Args:
        deployment: What to open.
        host: Address to listen on.
        port: Port to listen on.
        stop: Set by a signal: drain and return.
        asked: What the deployment must survive.
        on_ready: Called with what it survives, once requests are answered.

    Raises:
        AddressInUseError: Another program listens there.
        BrokenStorageError: The broker's storage failed; all requests got an answer.
        UnmetPromiseError: The deployment does not survive what was asked.
        MessagingError: The broker cannot be opened; likewise LedgerError, CatalogError.
    """
    address = _check_address(host, port)
    _raise_file_limit()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    async with HTTPService.open(deployment, asked=asked) as service:
        server = Server(
            service.intake,
            address=address,
            port=port,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            http1_settings=HTTP1Settings(header_read_timeout=_HEADER_TIMEOUT_MS),
            websockets=False,
            backlog=_BACKLOG,
            backpressure=_CONCURRENT_REQUESTS,
            log_level=LogLevels.error,
        )
        serving = asyncio.ensure_future(server.serve())
        broken = asyncio.ensure_future(service.end.reached.wait())
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await _until_answering(address, port, serving)
            calm_collector()
            on_ready(service.kept)
            await asyncio.wait((serving, broken, stopping), return_when=asyncio.FIRST_COMPLETED)
            if broken.done():
                await asyncio.sleep(_BROKEN_LINGER)
        finally:
            service.stop()
            server.stop()  # type: ignore[no-untyped-call]
            await asyncio.wait((serving,), timeout=_DRAIN_SECONDS)
            for task in (serving, broken, stopping):
                task.cancel()
            await asyncio.wait((serving, broken, stopping))
        if serving.done() and not serving.cancelled():
            serving.result()  # raises what ended the server, if anything did
        if service.end.reached.is_set():
            raise service.end.error or BrokenStorageError(
                "the storage of broker or spool failed; start this process again"
            )


@contextlib.asynccontextmanager
async def _outlet(
    deployment: Deployment,
    ledger: Ledger,
    asked: tuple[str, ...],
    *,
    on_failure: Callable[[Exception], None],
) -> AsyncIterator[Topic | Spool]:
    """Open where ratings go, for the block: the broker, or a spool in front of it."""
    settings = deployment.spool
    spooled = None if settings is None else outboxes_survive()

    async def open_broker() -> Topic:
        topic = await deployment.open_topic()
        try:
            check_shared(topic.capabilities, deployment.broker)
            survives(topic, ledger, spool=spooled, asked=asked)
            if topic.capacity is None and not tells(topic):
                _logger.warning(
                    "%s: the broker neither bounds what waits nor tells how much does, so nothing "
                    "here bounds it (--capacity)",
                    redact(deployment.broker),
                )
        except BaseException:
            await topic.close()
            raise
        return topic

    if settings is None:
        topic = await open_broker()
        try:
            yield topic
        finally:
            await topic.close()
        return
    settings.check_horizon(ledger.capabilities.horizon_seconds)
    broker: Topic | None = None
    try:
        broker = await open_broker()
    except BrokenBrokerError:
        raise
    except UnavailableError as error:
        _logger.warning("the broker is away, ratings are accepted into the spool: %s", error)
    spool: Spool | None = None
    try:
        async with Spool.open(
            settings,
            broker=broker,
            open_broker=open_broker,
            clock=deployment.clock,
            on_failure=on_failure,
        ) as spool:
            yield spool
    finally:
        broker = broker if spool is None else spool.broker
        if broker is not None:
            # What it has not confirmed lies in the spool.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(broker.close(), _CLOSE_SECONDS)


@contextlib.contextmanager
def hold_port(host: str, port: int) -> Iterator[None]:
    """Keep an address, for the block, for those who are started with ``MOLVA_PORT_HELD``.

    Nothing is listened to here: a socket that is bound and does not listen gets no connection.

    Raises:
        AddressInUseError: Another program listens there.
    """
    _check_address(host, port)
    family, kind, protocol, where = _resolve(host, port)
    with socket.socket(family, kind, protocol) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(where)
        yield


def _check_address(host: str, port: int) -> str:
    """Return the host's IP address; raise where somebody listens there already.

    The server shares its port with others of its kind, which is how several processes
    serve one address: without this look, two deployments would share it in silence. Where
    a supervisor holds the port for several of us it has looked for all.
    """
    try:
        family, kind, protocol, where = _resolve(host, port)
        if PORT_HELD not in os.environ:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
    except OSError as error:
        raise AddressInUseError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another with --host and "
            "--port"
        ) from error
    return str(where[0])


def _resolve(host: str, port: int) -> tuple[int, int, int, tuple[Any, ...]]:
    # A name may have several addresses; the first one is what a client tries first.
    family, kind, protocol, _, where = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return family, kind, protocol, where


def _raise_file_limit() -> None:
    """Allow as many open files as the system lets us: each connection is one.

    The usual soft limit of 1,024 would let a thousand idle connections shut everybody out.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _until_answering(host: str, port: int, serving: "asyncio.Future[None]") -> None:
    while not serving.done():
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            await asyncio.sleep(0.01)
        else:
            writer.close()
            return
    serving.result()
    raise AddressInUseError(f"the server on {host}:{port} ended at once")
