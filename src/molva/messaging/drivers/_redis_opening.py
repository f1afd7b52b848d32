"""What all parts of the Redis driver begin with: options, capabilities, names, the server."""

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Final, final

from redis.exceptions import ResponseError

from molva._base.redis_server import (
    SERVER_OPTIONS,
    FunctionLibrary,
    MisconfiguredServerError,
    RedisAddress,
    RedisLink,
    RedisServerError,
    ServerFacts,
    UnusableServerError,
    probe,
)
from molva._base.url import one_of, positive_number
from molva.messaging.driver import Capabilities
from molva.messaging.drivers._channel import channel_capabilities
from molva.messaging.errors import (
    IncompatibleBrokerError,
    InvalidURLError,
    UnavailableError,
)
from molva.messaging.url import BrokerURL

__all__ = [
    "CHANNEL_CAPABILITIES",
    "QUEUE_CAPABILITIES",
    "QUEUE_FUNCTIONS",
    "QUEUE_OPTIONS",
    "TOPIC_CAPABILITIES",
    "TOPIC_FUNCTIONS",
    "TOPIC_OPTIONS",
    "RedisServer",
    "ServerOptions",
    "new_consumer_name",
    "translated",
]

TOPIC_OPTIONS: Final = ("lease", "start", "prefix", *SERVER_OPTIONS)
QUEUE_OPTIONS: Final = ("lease", "prefix", *SERVER_OPTIONS)

# The largest body that is taken. Redis takes five times as much; but it does one thing at a
# time, and everybody waits while it moves a message of this size for a tenth of a second.
_MAX_BODY_BYTES: Final = 100_000_000
# Bytes that a message carries beside its body at most, as far as ``proto-max-bulk-len`` goes.
_ENVELOPE_BYTES: Final = 1_000_000

# What a topic can do where the server syncs before it confirms.
TOPIC_CAPABILITIES: Final = Capabilities(
    delivery="at-least-once",
    ordering="in-process",  # "per-key" needs lanes that are owned; a group has none
    capacity="exact",
    survives=frozenset({"kill", "power"}),
    max_body_bytes=_MAX_BODY_BYTES,
    holding="lease",
    attempts="exact",
    keeps_place=False,
)

# What a topic can do that was made with ``delivery=at-most-once``.
CHANNEL_CAPABILITIES: Final = channel_capabilities(_MAX_BODY_BYTES)

QUEUE_CAPABILITIES: Final = Capabilities(
    delivery="at-least-once",
    ordering="in-process",
    capacity="exact",
    survives=frozenset({"kill", "power"}),
    max_body_bytes=_MAX_BODY_BYTES,
    holding="lease",
    disciplines=frozenset({"fifo", "lifo", "priority", "random"}),
    overflows=frozenset({"reject", "drop-oldest"}),
    delay=True,
    attempts="exact",
)


def _functions(kind: str) -> FunctionLibrary:
    source = files(__package__).joinpath(f"_redis_{kind}.lua").read_text()
    return FunctionLibrary(f"molva_{kind}", source)


TOPIC_FUNCTIONS: Final = _functions("topic")
QUEUE_FUNCTIONS: Final = _functions("queue")


@final
class ServerOptions:
    """The options of one URL."""

    def __init__(self, url: BrokerURL) -> None:
        url.check_driver_options(TOPIC_OPTIONS if url.queue is None else QUEUE_OPTIONS)
        self.lease = url.option("lease", positive_number, None)
        self.start = url.option("start", one_of("earliest", "latest"), "earliest")
        self.prefix = url.option("prefix", _prefix, "molva")


@final
@dataclass(frozen=True, slots=True)
class RedisServer:
    """A server that was reached and looked at.

    Attributes:
        address: Where it is.
        functions: What is loaded there.
        facts: What it turned out to be.
        link: An open connection.
    """

    address: RedisAddress
    functions: FunctionLibrary
    facts: ServerFacts
    link: RedisLink

    @classmethod
    async def reach(cls, url: BrokerURL, functions: FunctionLibrary) -> "RedisServer":
        """Reach the server that the URL names."""
        address = RedisAddress.of(url)
        link = RedisLink(address, functions)
        try:
            with translated():
                facts = await probe(link, address)
        except BaseException:
            await link.close()
            raise
        return cls(address, functions, facts, link)

    def another_link(self) -> RedisLink:
        """Return one more connection, which opens when it is first used."""
        return RedisLink(self.address, self.functions)

    def limited(self, capabilities: Capabilities) -> Capabilities:
        """Return what of these capabilities there is with this server's settings."""
        most = capabilities.max_body_bytes
        if self.facts.max_string_bytes is not None:
            most = min(most, self.facts.max_string_bytes - _ENVELOPE_BYTES)
        return dataclasses.replace(
            capabilities,
            survives=capabilities.survives & self.facts.survives,
            max_body_bytes=max(0, most),
        )


def new_consumer_name() -> str:
    """Return a name that no other consumer has: two of one name would share what they hold."""
    return f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(6)}"


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise what went wrong as messaging's errors."""
    try:
        yield
    except MisconfiguredServerError as error:
        raise InvalidURLError(str(error)) from error
    except UnusableServerError as error:
        raise IncompatibleBrokerError(str(error)) from error
    except RedisServerError as error:
        raise UnavailableError(str(error)) from error
    except ResponseError as error:
        if "WRONGTYPE" in str(error):
            raise IncompatibleBrokerError(
                f"redis: something else is stored under Molva's keys, choose a prefix=: {error}"
            ) from error
        raise UnavailableError(f"redis: {error}") from error


def _prefix(text: str) -> str:
    if not text.isprintable() or not 1 <= len(text) <= 100 or set(text) & set("{}"):
        raise ValueError("1 to 100 printable characters without braces are accepted")
    return text
