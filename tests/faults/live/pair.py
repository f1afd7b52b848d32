"""Which broker stands in front of which ledger, and the servers that both need.

A pair is two schemes. Its servers are of the run's own, so that they can be killed; several
runs share them, each under names of its own: a topic, a schema, a prefix. Broker and ledger
are two servers also where both are Redis: only so can one be away without the other.

A new broker or ledger is a row of ``_BROKERS`` or ``_LEDGERS`` and, for a server of a new
kind, one of ``tests.brokers.table``.
"""

import contextlib
import functools
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, final

from molva.messaging import with_options
from molva.messaging.drivers._amqp_options import Names
from molva.ratings.deployment import SUBSCRIPTION
from tests.brokers import Server
from tests.brokers.private import private_server
from tests.brokers.rabbitmq import messages_in
from tests.faults.live.evidence import Place

__all__ = ["PAIRS", "STORES_ONCE", "Pair", "Pool", "Servers"]

# By their part: "broker", "ledger". What is a file has none.
Servers = Mapping[str, Server]

# Seconds after which a consumer that died or stands still has lost what it held. Shorter than
# the defaults, so that a run of some seconds sees it; a pause in a run is longer.
_PATIENCE: Final = "3"

# What a Redis ledger keeps one by one: all of a run. See ``launch``.
_WINDOW: Final = 1_000_000

# Brokers that store once what is sent twice: a client that tries again makes no second message.
STORES_ONCE: Final = frozenset({"nats"})

# Options of the broker's URL that each run needs.
_BROKERS: Final[Mapping[str, Mapping[str, str]]] = {
    "sqlite": {"lanes": "16"},
    "kafka": {"session": _PATIENCE, "grace": _PATIENCE, "lanes": "8"},
    "redis": {"lease": _PATIENCE},
    "rabbitmq": {"timeout": _PATIENCE},
    "nats": {"lease": _PATIENCE, "sync": "always"},
}

# The option that gives a run a ledger, or a catalog, of its own.
_LEDGERS: Final[Mapping[str, str]] = {"sqlite": "", "postgresql": "schema", "redis": "prefix"}


@final
@dataclass(frozen=True, slots=True)
class Pair:
    """A broker and a ledger, by their schemes; RabbitMQ by its name."""

    broker: str
    ledger: str

    @property
    def name(self) -> str:
        """Return what a command line calls it."""
        return f"{self.broker}-{self.ledger}"

    @property
    def parts(self) -> dict[str, str]:
        """Return the kind of server that each part needs: ``broker``, ``ledger``."""
        parts = {"broker": self.broker, "ledger": self.ledger}
        return {part: kind for part, kind in parts.items() if kind != "sqlite"}

    def place(self, servers: Servers, folder: Path) -> Place:
        """Return where a run in ``folder`` keeps what: all of it new."""
        data = folder / "data"
        data.mkdir(parents=True)
        # Not of the folder: a seed that runs again must not meet its own ratings.
        name = f"run_{uuid.uuid4().hex[:12]}"

        def url(what: str, server: Server | None, option: str) -> str:
            if server is None:
                return f"sqlite://{data}/{what}.db"
            return with_options(server.url, **{option: f"{name}_{what}"})

        broker = url("queue", servers.get("broker"), "topic")
        ledger = url("ledger", servers.get("ledger"), _LEDGERS[self.ledger])
        # Many machines have no folder in common. Redis has no catalog, and files are the
        # defaults of whoever has one machine.
        waiting = None
        if self.broker == "rabbitmq":
            queue = Names.of_subscription("molva", f"{name}_queue", SUBSCRIPTION).main
            waiting = functools.partial(messages_in, servers["broker"].place, queue)
        shared = self.ledger == "postgresql" and self.broker != "sqlite"
        catalog = url("catalog", servers["ledger"] if shared else None, "schema")
        return Place(
            data=data,
            broker=with_options(broker, **_BROKERS[self.broker]),
            ledger=ledger,
            catalog=catalog,
            witness=folder / "witness.log",
            added=(f"window={_WINDOW}",) if self.ledger == "redis" else (),
            waiting=waiting,
        )


PAIRS: Final = {
    pair.name: pair
    for pair in (
        Pair("kafka", "redis"),
        Pair("kafka", "postgresql"),
        Pair("rabbitmq", "redis"),
        Pair("rabbitmq", "postgresql"),
        Pair("redis", "redis"),
        Pair("redis", "postgresql"),
        Pair("nats", "redis"),
        Pair("nats", "postgresql"),
        Pair("sqlite", "postgresql"),
    )
}


@final
class Pool:
    """Servers of a run's own, or of several runs', each started when it is first needed."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._servers: dict[tuple[str, str], Server] = {}

    def of(self, pair: Pair) -> Servers:
        """Return the servers of a pair. Blocks while they start."""
        for part, kind in pair.parts.items():
            if (part, kind) not in self._servers:
                server = self._stack.enter_context(private_server(kind, {}, hurried=True))
                self._servers[part, kind] = server
        return {part: self._servers[part, kind] for part, kind in pair.parts.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()
