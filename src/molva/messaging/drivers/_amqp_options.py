"""What an AMQP URL says: where the server is, how to sign in, and what things are called.

Names. Everything of ours begins with ``prefix``, then comes what it is, then whose:

    molva.topic.ratings            exchange: what a topic's senders send to
    molva.kept.ratings             exchange and queue: what was sent while nobody subscribed
    molva.sub.ratings.process      queue: what waits in a subscription
    molva.queue.mails              queue
    molva.sub.ratings.process.dead        queue: the dead letters of either
    molva.sub.ratings.process.later.3     exchange and queue: a step of the ladder of delays

Of a name, what is no ASCII letter or digit and none of ``_-:@,/`` or a space is written as ``+2E``
for each byte: so no two names meet, and clients take them all. A name too long for AMQP, which
takes 127 bytes of an exchange's, is a digest behind ``+h``.
"""

import os
import re
import ssl
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, final

from yarl import URL

from molva._base.url import host_and_port, one_of, positive_number
from molva.messaging.driver import Capabilities
from molva.messaging.errors import InvalidURLError
from molva.messaging.url import BrokerURL

__all__ = [
    "QUEUE_CAPABILITIES",
    "QUEUE_OPTIONS",
    "TOPIC_CAPABILITIES",
    "TOPIC_OPTIONS",
    "AMQPAddress",
    "AMQPOptions",
    "Names",
]

QUEUE_OPTIONS: Final = ("prefix", "timeout", "ca")
TOPIC_OPTIONS: Final = ("start", "expires", *QUEUE_OPTIONS)

# The largest body that is taken. RabbitMQ 4 takes 16 MiB as shipped, envelope and all; older
# ones take more, and stop for everybody while they move it.
_MAX_BODY_BYTES: Final = 16_000_000

TOPIC_CAPABILITIES: Final = Capabilities(
    delivery="at-least-once",
    ordering="in-process",  # "per-key" needs lanes that are owned; consumers share a queue
    capacity="none",  # an exchange has no bound, and its queues are not the sender's
    # A quorum queue syncs before it confirms. Never "node": the protocol does not tell how
    # many replicas a queue has, nor how many of them are there.
    survives=frozenset({"kill", "power"}),
    max_body_bytes=_MAX_BODY_BYTES,
    holding="connection",
    overflows=frozenset(),
    keeps_place=False,
    starts=frozenset({"latest"}),
    stat="none",  # the protocol tells what is ready, never what is held: too little
    peek=False,
)

QUEUE_CAPABILITIES: Final = Capabilities(
    delivery="at-least-once",
    ordering="in-process",
    capacity="approximate",
    survives=frozenset({"kill", "power"}),
    max_body_bytes=_MAX_BODY_BYTES,
    holding="connection",
    disciplines=frozenset({"fifo", "priority"}),
    delay=True,
    keeps_place=False,
    stat="none",
    peek=False,
)

# Seconds after which a message that was not confirmed fails. Shorter, and the choice of a new
# leader among replicas shows; longer, and whoever waits for the answer does not.
_DEFAULT_TIMEOUT: Final = 10.0
# Seconds without a sign of life after which either side gives up the connection, twice as long
# for the server. Shorter, and a handler that blocks the loop loses its messages; longer, and
# what a machine held that vanished comes later. Whoever waits looks by itself, and sooner.
_HEARTBEAT: Final = 30

# Seconds after which a queue that nobody uses may go: RabbitMQ counts 32 bits of milliseconds.
_LONGEST_EXPIRES: Final = 4_000_000.0

_USERNAME: Final = "MOLVA_AMQP_USERNAME"
_PASSWORD: Final = "MOLVA_AMQP_PASSWORD"
_PORTS: Final = {"amqp": 5672, "amqps": 5671}

# Bytes that AMQP takes of an exchange's name, less what ``.later.26`` takes of it.
_LONGEST: Final = 127 - len(".later.26")


_SPECIAL: Final = re.compile(r"[^a-zA-Z0-9_\-:@,/ ]")
_PREFIX: Final = re.compile(r"[a-zA-Z0-9_\-.]{1,100}")


@final
@dataclass(frozen=True, slots=True, repr=False)
class AMQPAddress:
    """Where a server is and how to log in there. Its repr shows no password."""

    scheme: str
    host: str
    port: int
    vhost: str
    user: str
    password: str
    ca: str | None

    @classmethod
    def of(cls, url: BrokerURL) -> "AMQPAddress":
        """Return what a URL says, and the environment where it has no password."""
        at = host_and_port(url.host, _PORTS[url.scheme])
        if at is None:
            raise InvalidURLError(
                f"{url}: {url.host!r} is no host of one server; write {url.scheme}://host/vhost "
                "(the port is 1 to 65535)"
            )
        ca = url.authorities(secure="amqps")
        user, password = url.user, url.password
        if password is None:
            user = user or os.environ.get(_USERNAME)
            password = os.environ.get(_PASSWORD)
        # What AMQP servers are shipped with, for clients of the same machine.
        user, password = user or "guest", password or "guest"
        vhost = url.path.removeprefix("/") or "/"
        return cls(url.scheme, *at, vhost, user, password, ca)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{'' if self.vhost == '/' else '/' + self.vhost}"

    def __repr__(self) -> str:
        return f"<AMQPAddress {self}>"

    def url(self, name: str) -> URL:
        """Return what the client library connects by. Holds the password."""
        return URL.build(
            scheme=self.scheme,
            user=self.user,
            password=self.password,
            host=self.host,
            port=self.port,
            path="/" if self.vhost == "/" else "/" + self.vhost.replace("/", "%2F"),
            query={"heartbeat": str(_HEARTBEAT), "name": name},
        )

    def context(self) -> ssl.SSLContext | None:
        """Return how the server's certificate is checked; None without TLS."""
        if self.scheme != "amqps":
            return None
        return ssl.create_default_context(cafile=self.ca)


@final
class AMQPOptions:
    """The options of one URL."""

    def __init__(self, url: BrokerURL) -> None:
        url.check_driver_options(TOPIC_OPTIONS if url.queue is None else QUEUE_OPTIONS)
        self.address: Final = AMQPAddress.of(url)
        # Only a start that there is gets past the check of features.
        self.start = url.option("start", one_of("earliest", "latest"), None)
        self.expires = url.option("expires", _expires, None)
        self.prefix = url.option("prefix", _prefix, "molva")
        self.timeout = url.option("timeout", positive_number, _DEFAULT_TIMEOUT)


@final
@dataclass(frozen=True, slots=True)
class Names:
    """What belongs to a subscription, or to a queue; see the head of this file.

    Attributes:
        main: The queue that is consumed.
        origin: Where its messages wait, for people.
    """

    main: str
    origin: str

    @classmethod
    def of_subscription(cls, prefix: str, topic: str, subscription: str) -> "Names":
        """Return the names of a subscription."""
        main = _name(f"{prefix}.sub", topic, subscription)
        return cls(main, f"topic {topic}, subscription {subscription}")

    @classmethod
    def of_queue(cls, prefix: str, queue: str) -> "Names":
        """Return the names of a queue."""
        return cls(_name(f"{prefix}.queue", queue), f"queue {queue}")

    @staticmethod
    def exchange_of(prefix: str, topic: str) -> str:
        """Return the exchange of a topic."""
        return _name(f"{prefix}.topic", topic)

    @staticmethod
    def kept_of(prefix: str, topic: str) -> str:
        """Return where what nobody subscribed to is kept."""
        return _name(f"{prefix}.kept", topic)

    @property
    def dead(self) -> str:
        """The queue of dead letters."""
        return f"{self.main}.dead"

    def later(self, step: int) -> str:
        """Return the exchange and queue of a step of the ladder."""
        return f"{self.main}.later.{step}"


def _name(kind: str, *parts: str) -> str:
    name = ".".join((kind, *map(_escaped, parts)))
    return name if len(name) <= _LONGEST else f"{kind}.+h{sha256(name.encode()).hexdigest()}"


def _escaped(name: str) -> str:
    return _SPECIAL.sub(lambda found: "".join(f"+{byte:02X}" for byte in found[0].encode()), name)


def _expires(text: str) -> float:
    seconds = positive_number(text)
    if not 0.001 <= seconds <= _LONGEST_EXPIRES:
        raise ValueError(f"0.001 to {_LONGEST_EXPIRES:,.0f} seconds are accepted")
    return seconds


def _prefix(text: str) -> str:
    if not _PREFIX.fullmatch(text) or text.startswith("amq."):
        raise ValueError("1 to 100 letters, digits, dots, hyphens and _ are accepted, not amq.")
    return text
