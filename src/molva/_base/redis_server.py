"""A Redis server behind whatever is kept in it: its address, a connection, its settings.

A connection is one that loses nothing. What was asked is answered before the next is asked;
a caller that is cancelled stops waiting, and the exchange goes on to its end, because a
reply that nobody reads would be taken for the next one's. Whatever goes wrong in between
closes the connection, and the next call opens another.

What must be atomic is a function in the server (Lua). A library is named after its own
text, so that two versions of Molva on one server each call their own, and is loaded when
the server turns out not to have it: at first, after ``FUNCTION FLUSH``, after a wipe.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import os
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import hiredis
from redis.asyncio.connection import Connection, SSLConnection
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from molva._base.url import ResourceURL, host_and_port

__all__ = [
    "SERVER_OPTIONS",
    "FunctionLibrary",
    "MisconfiguredServerError",
    "RedisAddress",
    "RedisLink",
    "RedisServerError",
    "ServerFacts",
    "UnreachableServerError",
    "UnusableServerError",
    "probe",
]

_logger: Final = logging.getLogger("molva.redis")

# What every URL of a Redis server may say about the connection.
SERVER_OPTIONS: Final = ("ca",)

# Seconds for connecting, and for an answer. Longer, and a server that hangs holds up its
# callers; shorter, and one that forks to save itself is taken for dead.
_TIMEOUT: Final = 4.0
# Bytes a second that any network carries: what is larger is waited for longer.
_SLOWEST_NETWORK: Final = 2_000_000
# Bytes that are written at a time.
_WINDOW_BYTES: Final = 262_144

# Functions, and effects instead of scripts in the replication stream, came with it.
_OLDEST: Final = (7, 0)

_PORT: Final = 6379
_USERNAME: Final = "MOLVA_REDIS_USERNAME"
_PASSWORD: Final = "MOLVA_REDIS_PASSWORD"


class RedisServerError(Exception):
    """Anything that is wrong with a Redis server, for people."""


@final
class UnreachableServerError(RedisServerError):
    """It cannot be reached, or cannot do it now; whether it did is unknown."""


@final
class MisconfiguredServerError(RedisServerError):
    """The address, the name and password, or the certificate is not right."""


@final
class UnusableServerError(RedisServerError):
    """The server is too old, or set up so that it would lose what is stored."""


@final
@dataclass(frozen=True, slots=True, repr=False)
class RedisAddress:
    """Where a server is and how to log in there. Its repr shows no password."""

    host: str
    port: int
    database: int
    username: str | None
    password: str | None
    tls: bool
    ca: str | None

    @classmethod
    def of(cls, url: ResourceURL) -> "RedisAddress":
        """Return what a URL says, and the environment where it has no password."""
        at = host_and_port(url.host, _PORT)
        if at is None:
            raise url.error(
                f"{url}: {url.host!r} is no host of one server; write redis://host:6379/0 "
                "(the port is 1 to 65535)"
            )
        ca = url.authorities(secure="rediss")
        username, password = url.user, url.password
        if password is None:
            username = username or os.environ.get(_USERNAME) or None
            password = os.environ.get(_PASSWORD) or None
        return cls(*at, _database(url), username, password, url.scheme == "rediss", ca)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.database}"

    def __repr__(self) -> str:
        return f"<RedisAddress {self}>"

    def connection(self) -> Connection:
        """Return a connection that is not open yet."""
        settings: dict[str, Any] = {
            "host": self.host,
            "port": self.port,
            "db": self.database,
            "username": self.username,
            "password": self.password,
            # Ours is the patience: see ``RedisLink``.
            "socket_timeout": None,
            "socket_connect_timeout": _TIMEOUT,
            "protocol": 2,
            "driver_info": None,
        }
        if self.tls:
            return SSLConnection(ssl_ca_certs=self.ca, ssl_check_hostname=True, **settings)
        return Connection(**settings)


def _database(url: ResourceURL) -> int:
    text = url.path.strip("/")
    if not text:
        return 0
    if not text.isascii() or not text.isdigit():
        raise url.error(f"{url}: {text!r} is no number of a database; write redis://host:6379/0")
    return int(text)


@final
class FunctionLibrary:
    """Lua functions that run in the server, each of them atomically.

    Args:
        name: What the library is about: ``molva_queue``.
        source: Lua. It calls ``register(name, function(keys, args) … end, flags)``, where
            ``allow-oom`` marks what must work when memory is full, and ``no-writes`` what
            changes nothing.
    """

    def __init__(self, name: str, source: str) -> None:
        digest = hashlib.sha256(source.encode()).hexdigest()[:10]
        self.name: Final = f"{name}_{digest}"
        # On one line, so that line numbers in the server's errors are those of the file.
        self.source: Final = (
            f"#!lua name={self.name}\n"
            "local function register(name, callback, flags) redis.register_function{"
            f"function_name = '{self.name}_' .. name, callback = callback, "
            "flags = flags or {}} end "
        ) + source
        self._names: dict[str, bytes] = {}

    def call(self, function: str, keys: Sequence[Any], *arguments: Any) -> tuple[Any, ...]:
        """Return the command that calls a function."""
        return ("FCALL", f"{self.name}_{function}", len(keys), *keys, *arguments)


@final
class RedisLink:
    """One connection: opened when it is needed, and again after it was lost.

    Args:
        address: Where the server is.
        library: What is loaded where the server does not have it.
    """

    def __init__(self, address: RedisAddress, library: FunctionLibrary | None = None) -> None:
        self._address = address
        self._library = library
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()
        self._closed = False
        # By which another connection can wake this one while it blocks.
        self.client_id: int | None = None

    async def call(self, *command: Any, patience: float = 0.0) -> Any:
        """Return the reply to one command.

        Args:
            command: Its words.
            patience: Seconds that the server may block, beyond those that it has anyway.

        Raises:
            UnreachableServerError: There was no reply, or one that may change.
            MisconfiguredServerError: The server does not let us.
            ResponseError: Any other error, as the server puts it.
        """
        [reply] = await self.call_many([command], patience=patience)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def call_many(
        self, commands: Sequence[tuple[Any, ...]], *, patience: float = 0.0
    ) -> list[Any]:
        """Return the replies to several commands, sent together; errors are replies too.

        Raises what ``call`` raises, but for what is only one command's.
        """
        # Shielded: see the head of this file.
        exchange = asyncio.ensure_future(self._exchange(commands, patience))
        exchange.add_done_callback(_note)
        return await asyncio.shield(exchange)

    async def close(self) -> None:
        """Close the connection for good; what is under way fails."""
        self._closed = True
        await self._disconnect()

    async def _exchange(self, commands: Sequence[tuple[Any, ...]], patience: float) -> list[Any]:
        async with self._turn:
            replies = await self._ask(commands, patience)
            missing = [place for place, reply in enumerate(replies) if _is_missing(reply)]
            if missing and self._library is not None:
                await self._load(self._library)
                # None of these has run, so running them now is no second time.
                again = await self._ask([commands[place] for place in missing], patience)
                for place, reply in zip(missing, again, strict=True):
                    replies[place] = reply
        for reply in replies:
            if isinstance(reply, RedisError):
                await self._raise_if_general(reply)
        return replies

    async def _ask(self, commands: Sequence[tuple[Any, ...]], patience: float) -> list[Any]:
        try:
            async with asyncio.timeout(_TIMEOUT + patience) as deadline:
                connection = await self._connected()
                await _send(connection, commands, deadline)
                replies = []
                for _ in commands:
                    try:
                        reply = await connection.read_response(
                            disable_decoding=True, timeout=math.inf
                        )
                    except ResponseError as error:
                        reply = error
                    replies.append(reply)
                return replies
        except BaseException as error:
            await self._disconnect()
            raise self._explained(error) from error

    async def _connected(self) -> Connection:
        if self._closed:
            raise UnreachableServerError(f"{self._address}: the connection was closed")
        connection = self._connection
        # Something to read where nothing was asked: the end, as the server has closed it.
        if connection is not None and (not connection.is_connected or await connection.can_read()):
            await self._disconnect()
            connection = None
        if connection is None:
            self._connection = connection = self._address.connection()
            await connection.connect()  # type: ignore[no-untyped-call]
            await connection.send_command("CLIENT", "ID")
            self.client_id = await connection.read_response()
        return connection

    async def _load(self, library: FunctionLibrary) -> None:
        [reply] = await self._ask([("FUNCTION", "LOAD", "REPLACE", library.source)], 0.0)
        if isinstance(reply, Exception):
            await self._raise_if_general(reply)
            raise UnusableServerError(
                f"{self._address}: the functions of Molva cannot be loaded: {reply}"
            ) from reply

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(RedisError, OSError):
                await connection.disconnect(nowait=True)

    async def _raise_if_general(self, error: Exception) -> None:
        """Raise where an error is the server's state and not the command's."""
        found = self._explained(error)
        if found is not error:
            if _word_of(error) == "READONLY":
                # It was a primary once: whoever is it now may stand behind the same name.
                await self._disconnect()
            raise found from error

    def _explained(self, error: BaseException) -> BaseException:
        """Return what an error means, for people; the error itself where it says enough."""
        text = str(error)
        word = _word_of(error)
        refused = (
            AuthenticationError,
            AuthenticationWrongNumberOfArgsError,
            AuthorizationError,
            NoPermissionError,
        )
        if isinstance(error, asyncio.CancelledError | RedisServerError):
            return error
        if isinstance(error, refused) or word in ("NOAUTH", "WRONGPASS", "NOPERM"):
            return MisconfiguredServerError(
                f"{self._address}: {text}; put name and password into the URL, or into "
                f"{_USERNAME} and {_PASSWORD}"
            )
        certificate = _certificate_error(error)
        if certificate is not None:
            return MisconfiguredServerError(
                f"{self._address}: its certificate is refused: {certificate.verify_message}; "
                "connect by a name that it is made out to, and name its authority with ca="
            )
        if "invalid DB index" in text or ("out of range" in text and "DB" in text):
            return MisconfiguredServerError(f"{self._address}: {text}")
        if word in _PASSING:
            return UnreachableServerError(f"{self._address}: {_PASSING[word]} ({text})")
        if isinstance(error, ResponseError) or not isinstance(error, Exception):
            return error
        if isinstance(error, TimeoutError) or not text:
            return UnreachableServerError(f"{self._address}: no answer in time")
        return UnreachableServerError(f"{self._address}: {text}")


# Errors by which a server says that it cannot do anything, or anything like this, now.
_PASSING: Final = {
    "OOM": "its memory is full; let consumers catch up, or raise maxmemory",
    "READONLY": "it is a replica now and takes no writes; give the primary's address",
    "LOADING": "it is loading its data",
    "BUSY": "it runs somebody's script that does not end",
    "MISCONF": "it cannot save to its disk, and refuses writes",
    "MASTERDOWN": "it is a replica that has lost its primary",
    "NOREPLICAS": "it has fewer replicas than it needs to take writes",
    "CLUSTERDOWN": "its cluster is down",
    "TRYAGAIN": "its cluster is moving these keys",
    "MOVED": "these keys are on another node of its cluster; give that one's address",
    "ASK": "its cluster is moving these keys",
}


# The client library takes the first word off errors that it has classes for.
_WORDS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (OutOfMemoryError, "OOM"),
    (ReadOnlyError, "READONLY"),
    (BusyLoadingError, "LOADING"),
    (MasterDownError, "MASTERDOWN"),
    (ClusterDownError, "CLUSTERDOWN"),
    (TryAgainError, "TRYAGAIN"),
    (MovedError, "MOVED"),
    (AskError, "ASK"),
)


def _word_of(error: BaseException) -> str:
    """Return the word by which the server names an error."""
    for kind, word in _WORDS:
        if isinstance(error, kind):
            return word
    return str(error).split(" ", 1)[0]


async def _send(
    connection: Connection, commands: Sequence[tuple[Any, ...]], deadline: asyncio.Timeout
) -> None:
    """Write commands, a window at a time: joining megabytes costs more than sending them."""
    window: list[bytes] = []
    size = 0
    for command in commands:
        packed = hiredis.pack_command(command)
        window.append(packed)
        size += len(packed)
        if size >= _WINDOW_BYTES:
            when = deadline.when()
            assert when is not None
            deadline.reschedule(when + size / _SLOWEST_NETWORK)
            await connection.send_packed_command(window, check_health=False)
            window, size = [], 0
    if window:
        await connection.send_packed_command(window, check_health=False)


def _is_missing(reply: object) -> bool:
    return isinstance(reply, ResponseError) and "Function not found" in str(reply)


def _certificate_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _note(exchange: "asyncio.Future[list[Any]]") -> None:
    # Whoever asked may have been cancelled; then nobody looks at what went wrong.
    if not exchange.cancelled():
        exchange.exception()


@final
@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server turned out to be.

    Attributes:
        version: ``7.0.15``.
        survives: What it keeps what it confirmed through, out of ``kill`` and ``power``.
        max_string_bytes: The longest string that it takes; None where it would not say.
    """

    version: str
    survives: frozenset[str]
    max_string_bytes: int | None


async def probe(link: RedisLink, address: RedisAddress, *, expiring: bool = False) -> ServerFacts:
    """Return what the server is; raise where it cannot be used.

    Args:
        link: A connection to it.
        address: Its address, for people.
        expiring: Whether keys that expire must be kept until then, too.

    Raises:
        UnusableServerError: It is too old, or throws away what is stored when memory is
            full.
        UnreachableServerError: It is a replica, or cannot be reached.
    """
    info = _pairs(await link.call("INFO"))
    version = info.get("redis_version", "0")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST:
        raise UnusableServerError(
            f"{address}: this is Redis {version}; functions are needed, which came with 7.0"
        )
    if info.get("role") == "slave":
        raise UnreachableServerError(
            f"{address}: this is a replica, which takes no writes; give the primary's address"
        )
    policy = info.get("maxmemory_policy", "noeviction")
    evicting = policy != "noeviction" if expiring else policy.startswith("allkeys")
    if info.get("maxmemory", "0") != "0" and evicting:
        raise UnusableServerError(
            f"{address}: maxmemory-policy {policy} throws away what is stored when memory is "
            "full; set it to noeviction"
        )
    settings = await _settings(link, address)
    limit = settings.get("proto-max-bulk-len")
    return ServerFacts(version, _survives(settings), int(limit) if limit else None)


async def _settings(link: RedisLink, address: RedisAddress) -> dict[str, str]:
    names = ("appendonly", "appendfsync", "no-appendfsync-on-rewrite", "proto-max-bulk-len")
    try:
        replies = [await link.call("CONFIG", "GET", name) for name in names]
    except (ResponseError, MisconfiguredServerError) as error:
        _logger.warning(
            "%s: its settings cannot be read, so nothing is promised to survive: %s", address, error
        )
        return {}
    return {reply[0].decode(): reply[1].decode() for reply in replies if reply and len(reply) == 2}


def _survives(settings: dict[str, str]) -> frozenset[str]:
    """Return what a confirmed write outlives.

    With ``always`` the log is written and synced before anything is confirmed, unless it is
    being rewritten and that setting says not to. With ``no`` it is written, and that outlives
    the process. With ``everysec`` a write may be put off for two seconds while a sync is
    under way: after a kill, what was confirmed in these is gone.
    """
    if settings.get("appendonly") != "yes":
        return frozenset()
    fsync = settings.get("appendfsync")
    if fsync == "always" and settings.get("no-appendfsync-on-rewrite") == "no":
        return frozenset({"kill", "power"})
    return frozenset() if fsync == "everysec" else frozenset({"kill"})


def _pairs(info: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in info.decode().splitlines())
    return {name: value for name, colon, value in lines if colon}
