"""What a Kafka URL says: where the brokers are, how to sign in, and what things are called.

Names. A topic's name is Kafka's own where Kafka takes it, so that topics of others can be
opened as they are called. Any other name (``λ``, ``a/b``) is written as ``molva-x-`` and its
UTF-8 with ``_2f`` for each byte that is no letter, digit or hyphen; a name too long for Kafka
is a digest. A subscription is the consumer group ``TOPIC/SUBSCRIPTION`` (percent-encoded:
groups may be called anything), with two topics of its own, ``TOPIC.SUBSCRIPTION.dead`` and
``.retry``.
"""

import logging
import os
import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final, final
from urllib.parse import quote, unquote

from molva._base.redaction import redact
from molva._base.url import one_of, positive_integer, positive_number
from molva.messaging._lanes import MAX_LANES
from molva.messaging.errors import InvalidURLError
from molva.messaging.url import BrokerURL

__all__ = ["DEFAULT_LANES", "TOPIC_OPTIONS", "ClientLog", "KafkaOptions", "Names"]

TOPIC_OPTIONS: Final = (
    "lanes",
    "replicas",
    "start",
    "max_open",
    "fetch_wait",
    "session",
    "grace",
    "timeout",
    "tls",
    "ca",
    "cert",
    "key",
    "sasl",
)

# So many consumers of one subscription can work side by side. As for SQLite.
DEFAULT_LANES: Final = 16
_DEFAULT_MAX_OPEN: Final = 10_000
# Seconds without a heartbeat after which a consumer is taken for dead, and its lanes given to
# others. Kafka's brokers refuse less than 6 unless told otherwise; with more, what a killed
# consumer held waits longer; with less, a pause of the machine costs a rebalance.
_DEFAULT_SESSION: Final = 10.0
# Seconds that a lane waits for what is being worked on before it goes to another consumer.
# All consumers of the subscription stand still meanwhile. Shorter, and slow handlers'
# messages are worked on twice; longer, and who joins waits for them.
_DEFAULT_GRACE: Final = 10.0
# Seconds after which a message that could not be stored fails. Shorter than the choice of a
# new leader takes, and each of these shows; longer, and whoever waits for the answer does not.
_DEFAULT_TIMEOUT: Final = 10.0

# Seconds that brokers may collect what comes before they answer a consumer. Every answer costs
# them, librdkafka and us a few tenths of a millisecond of a processor, for one message as for
# hundreds. What is larger than so many bytes does not wait.
_LONGEST_FETCH_WAIT: Final = 1.0
_ENOUGH_BYTES: Final = 100_000
# While nothing comes. A lane that is owned while the brokers wait for news of the others joins
# them in the next round: so this is short.
_IDLE_FETCH: Final = 0.1

# Bytes that librdkafka keeps of messages not yet stored, and of those taken ahead: a broker
# that has stopped, or a slow consumer, must not fill our memory.
_SEND_BUFFER_KBYTES: Final = 131_072
_RECEIVE_BUFFER_KBYTES: Final = 16_384

_SASL: Final = {
    "plain": "PLAIN",
    "scram-sha-256": "SCRAM-SHA-256",
    "scram-sha-512": "SCRAM-SHA-512",
}
_PORT: Final = 9092

_LEGAL: Final = re.compile(r"[a-zA-Z0-9._-]+")
_UNESCAPED: Final = re.compile(rb"[a-zA-Z0-9-]")
_ESCAPED: Final = "molva-x-"
_DIGEST: Final = "molva-h-"
# Kafka's own bound, and what ``.retry`` takes of it.
_LONGEST: Final = 249 - len(".retry")


@final
class ClientLog:
    """Where librdkafka's own log lines go: Python's logging, without passwords."""

    def __init__(self, secrets: tuple[str, ...]) -> None:
        self._logger = logging.getLogger("molva.messaging.kafka")
        self._secrets = secrets

    def log(self, level: int, text: str, *values: object) -> None:
        """Log one line; librdkafka's client calls this from the thread that polls."""
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", self.clean(text % values if values else text))

    def clean(self, text: str) -> str:
        """Return ``text`` with no password in it."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return redact(text)


@final
@dataclass(frozen=True, slots=True, repr=False)
class KafkaOptions:
    """The options of one open, checked.

    Attributes:
        connection: librdkafka's settings for reaching the brokers. Holds the password.
        log: Where librdkafka's lines go.
        lanes: Partitions of a new topic; None where the URL does not say.
        replicas: Copies of each partition of a new topic; -1 leaves it to the brokers.
        start: Where a new subscription begins.
        max_open: Messages that one consumer may hold and not have settled.
        fetch_wait, session, grace, timeout: Seconds; see the driver's header.
    """

    connection: dict[str, Any]
    log: ClientLog
    lanes: int | None
    replicas: int
    start: str
    max_open: int
    fetch_wait: float
    session: float
    grace: float
    timeout: float

    @classmethod
    def of(cls, url: BrokerURL) -> "KafkaOptions":
        """Read what the URL says; raise InvalidURLError where it cannot be."""
        url.check_driver_options(TOPIC_OPTIONS)
        if url.topic is None:
            raise InvalidURLError(f"{url}: names no topic; add ?topic=ratings")
        lanes = url.option("lanes", positive_integer, None)
        if lanes is not None and lanes > MAX_LANES:
            raise InvalidURLError(f"kafka: lanes={lanes} is refused; 1 to {MAX_LANES} is accepted")
        session = url.option("session", positive_number, _DEFAULT_SESSION)
        if session < 1:
            raise InvalidURLError(f"kafka: session={session:g} is refused; 1 second is the least")
        user = url.user or os.environ.get("MOLVA_KAFKA_USERNAME")
        password = url.password or os.environ.get("MOLVA_KAFKA_PASSWORD")
        log = ClientLog(tuple(secret for secret in (password, url.password) if secret))
        return cls(
            connection={**_connection(url, user, password), "logger": log},
            log=log,
            lanes=lanes,
            replicas=url.option("replicas", positive_integer, -1),
            start=url.option("start", one_of("earliest", "latest"), "earliest"),
            max_open=url.option("max_open", positive_integer, _DEFAULT_MAX_OPEN),
            fetch_wait=url.option("fetch_wait", _fetch_wait, 0.0),
            session=session,
            grace=url.option("grace", positive_number, _DEFAULT_GRACE),
            timeout=url.option("timeout", positive_number, _DEFAULT_TIMEOUT),
        )

    def producer(self, max_message_bytes: int) -> dict[str, Any]:
        """Return librdkafka's settings of a producer that loses and repeats nothing."""
        return {
            **self.connection,
            "acks": "all",
            "enable.idempotence": True,
            # What Kafka's Java clients do: the same key goes to the same partition,
            # whichever client sends it.
            "partitioner": "murmur2_random",
            # The batcher above collects; librdkafka need not wait for more.
            "linger.ms": 0,
            "message.timeout.ms": round(self.timeout * 1_000),
            "request.timeout.ms": round(min(self.timeout, 30.0) * 1_000),
            "message.max.bytes": max_message_bytes,
            # After so long a topic that brokers do not know is not one that is new to them.
            "topic.metadata.propagation.max.ms": 3_000,
            "queue.buffering.max.kbytes": _SEND_BUFFER_KBYTES,
        }

    def consumer(self, group: str) -> dict[str, Any]:
        """Return librdkafka's settings of a consumer whose positions only we commit."""
        return {
            **self.connection,
            "group.id": group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": round(self.session * 1_000),
            # How soon a consumer hears that another one came or went.
            "heartbeat.interval.ms": min(500, round(self.session * 100)),
            "allow.auto.create.topics": False,
            "fetch.min.bytes": _ENOUGH_BYTES if self.fetch_wait else 1,
            "fetch.wait.max.ms": max(1, round((self.fetch_wait or _IDLE_FETCH) * 1_000)),
            "fetch.error.backoff.ms": 50,
            "fetch.queue.backoff.ms": 20,
            "queued.max.messages.kbytes": _RECEIVE_BUFFER_KBYTES,
        }


def _fetch_wait(text: str) -> float:
    """Return a number of seconds that brokers may wait; 0 is none."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _LONGEST_FETCH_WAIT:
        raise ValueError(f"0 to {_LONGEST_FETCH_WAIT:g} second is accepted")
    return seconds


@final
@dataclass(frozen=True, slots=True)
class Names:
    """What a topic and one of its subscriptions are called in Kafka."""

    topic: str
    group: str
    dead: str
    retry: str

    @classmethod
    def of(cls, topic: str, subscription: str = "") -> "Names":
        """Return the names; see the head of this file."""
        base = _topic_name(topic)
        own = f"{base}.{_part(subscription)}"
        if len(own) > _LONGEST:
            own = _DIGEST + sha256(own.encode()).hexdigest()
        return cls(
            base, cls.groups_of(topic) + quote(subscription, safe=""), own + ".dead", own + ".retry"
        )

    @staticmethod
    def groups_of(topic: str) -> str:
        """Return what the groups of all subscriptions of a topic begin with."""
        return _topic_name(topic) + "/"

    @staticmethod
    def subscription_of(group: str) -> str:
        """Return the subscription whose group this is."""
        return unquote(group.partition("/")[2])


def _topic_name(name: str) -> str:
    legal = _LEGAL.fullmatch(name) and name not in (".", "..")
    shown = name if legal and not name.startswith((_ESCAPED, _DIGEST)) else _escape(name)
    return shown if len(shown) <= 249 else _DIGEST + sha256(name.encode()).hexdigest()


def _part(name: str) -> str:
    """Return a subscription's name as a part of a topic's: one without a dot."""
    if _LEGAL.fullmatch(name) and "." not in name and not name.startswith(_ESCAPED):
        return name
    return _escape(name)


def _escape(name: str) -> str:
    shown = (
        chr(byte) if _UNESCAPED.fullmatch(bytes([byte])) else f"_{byte:02x}"
        for byte in name.encode()
    )
    return _ESCAPED + "".join(shown)


def _connection(url: BrokerURL, user: str | None, password: str | None) -> dict[str, Any]:
    if not url.host:
        raise InvalidURLError(f"{url}: names no server; write kafka://host:{_PORT}")
    if url.path.strip("/"):
        raise InvalidURLError(
            f"{url}: nothing of Kafka is in a path; name the topic with ?topic={url.path[1:]}"
        )
    tls = url.option("tls", one_of("on", "off"), "off") == "on"
    files = {name: url.options[name] for name in ("ca", "cert", "key") if name in url.options}
    if files and not tls:
        raise InvalidURLError(f"{url}: {', '.join(files)} says nothing without tls=on")
    for name, path in files.items():
        if not os.access(path, os.R_OK):
            raise InvalidURLError(f"kafka: {name}={path!r} is refused; it cannot be read")
    sasl = url.option("sasl", one_of(*_SASL), "plain")
    if "sasl" in url.options and user is None:
        raise InvalidURLError(
            f"{url}: sasl={sasl} needs a user: kafka://user:password@host, or the variables "
            "MOLVA_KAFKA_USERNAME and MOLVA_KAFKA_PASSWORD"
        )
    settings: dict[str, Any] = {
        "bootstrap.servers": ",".join(map(_with_port, url.host.split(","))),
        "client.id": "molva",
        "security.protocol": f"{'SASL_' if user else ''}{'SSL' if tls else 'PLAINTEXT'}",
        "reconnect.backoff.max.ms": 1_000,
        "socket.connection.setup.timeout.ms": 4_000,
        "socket.keepalive.enable": True,
        "log.connection.close": False,
    }
    if user is not None:
        settings |= {"sasl.mechanism": _SASL[sasl], "sasl.username": user}
        settings |= {"sasl.password": password or ""}
    for name, setting in {"ca": "ca", "cert": "certificate", "key": "key"}.items():
        if name in files:
            settings[f"ssl.{setting}.location"] = files[name]
    key_password = os.environ.get("MOLVA_KAFKA_KEY_PASSWORD")
    if "key" in files and key_password:
        settings["ssl.key.password"] = key_password
    return settings


def _with_port(host: str) -> str:
    after = host.rpartition("]")[2]  # an IPv6 address has colons of its own
    return host if ":" in after else f"{host}:{_PORT}"
