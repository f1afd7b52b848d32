"""A few connections to one PostgreSQL server, replaced when they break.

What the ledger and the catalog share: how a URL is read, what an error of the server means
to whoever uses it, which settings it runs with. Loaded only where a URL names PostgreSQL.

    PostgreSQLError
    ├── RefusedError          correct the configuration: password, database, TLS, rights
    ├── UnsuitableError       another server, or other settings of it
    ├── VersionError          the schema is another version's, or something else
    └── UnreachableError      try again later; nothing was changed, or it is unknown

Nothing lives in a session: whatever a transaction needs is set inside it. So a PgBouncer
that hands each transaction to another session is no trouble, once ``statement_cache_size``
is 0 in its URL (prepared statements are of a session too).

Every call has a time limit of its own, on our side: a server that was stopped, or a network
that swallows packets, answers nothing, not even an error. A connection whose call was cut
off is closed, never used again.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar, final
from urllib.parse import quote, urlencode

import asyncpg

from molva._base.redaction import redact
from molva._base.url import POSTGRESQL_LIBPQ_OPTIONS, ResourceURL, positive_integer, positive_number

__all__ = [
    "PostgreSQL",
    "PostgreSQLError",
    "PostgreSQLURL",
    "RefusedError",
    "ServerSettings",
    "UnreachableError",
    "UnsuitableError",
    "VersionError",
]

T = TypeVar("T")

_logger: Final = logging.getLogger("molva.postgresql")

# The oldest server that is accepted: the oldest that its makers still mended in 2026.
_OLDEST_VERSION: Final = 14
# Seconds that a connection may take to be made, TLS and password included. Whoever opens
# with a wrong port or password learns it within five.
_CONNECT_TIMEOUT: Final = 4.0
# Seconds after which the server ends a transaction of ours that does nothing: a process
# that was stopped in the middle of one holds the campaign's row, and everybody waits.
_IDLE_TIMEOUT: Final = 5
# Connections that one opening holds at most. A worker needs one; an HTTP process reads with
# as many as are useful to a server that has a few cores.
_CONNECTIONS: Final = 4
# Prepared statements that a connection keeps, as asyncpg's own default.
_STATEMENTS: Final = 100


class PostgreSQLError(Exception):
    """Anything that the server, or the way to it, did not do."""


@final
class RefusedError(PostgreSQLError):
    """The server is there and will not have us: correct the configuration."""


@final
class UnsuitableError(PostgreSQLError):
    """The server is too old, or set up in a way that we cannot work with."""


@final
class VersionError(PostgreSQLError):
    """The schema is of another version, or something else. It was not touched."""


@final
class UnreachableError(PostgreSQLError):
    """The server cannot be reached or takes nothing now: try again later."""


@final
@dataclass(frozen=True, slots=True, repr=False)
class PostgreSQLURL:
    """What a URL says: where, as whom, which schema, how patiently.

    Attributes:
        shown: The URL for people, without its password.
        dsn: The same for asyncpg, which takes from the environment what it lacks (PGHOST,
            PGUSER, PGPASSWORD, PGSSLMODE, …, and ``~/.pgpass``).
        schema: The schema of ours in the database.
        create: Whether a missing schema is made.
        timeout: Seconds that a call may take.
        connections: How many at most.
        statement_cache_size: Prepared statements a connection; 0 behind a PgBouncer.
    """

    shown: str
    dsn: str
    schema: str
    create: bool
    timeout: float
    connections: int
    statement_cache_size: int

    @classmethod
    def read(cls, url: ResourceURL, *, schema: str, timeout: float) -> "PostgreSQLURL":
        """Return what ``url`` says; raises the URL's own error where it is refused.

        Args:
            url: Its options are checked to be among POSTGRESQL_OPTIONS.
            schema: Default for the schema's name.
            timeout: Default for the seconds that a call may take.
        """
        if len(url.path) < 2 or "/" in url.path[1:]:
            raise url.error(
                f"{url.shown}: names no database; write postgresql://user@host:5432/database"
            )
        user = quote(url.user, safe="") if url.user is not None else ""
        password = f":{quote(url.password, safe='')}" if url.password is not None else ""
        at = "@" if user or password else ""
        passed_on = {
            name: url.options[name] for name in POSTGRESQL_LIBPQ_OPTIONS if name in url.options
        }
        query = f"?{urlencode(passed_on)}" if passed_on else ""
        database = quote(url.path[1:], safe="")
        return cls(
            shown=url.shown,
            dsn=f"postgresql://{user}{password}{at}{url.host}/{database}{query}",
            schema=url.option("schema", _schema_name, schema),
            create=url.option("create", _create, True),
            timeout=url.option("timeout", positive_number, timeout),
            connections=url.option("connections", positive_integer, _CONNECTIONS),
            statement_cache_size=url.option("statement_cache_size", _whole_number, _STATEMENTS),
        )

    def __repr__(self) -> str:
        return f"<PostgreSQLURL {self.shown}>"


@final
@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a session runs with, as the server itself says."""

    version: int
    synchronous_commit: str
    fsync: bool
    full_page_writes: bool
    synchronous_standbys: bool

    def survives(self) -> frozenset[str]:
        """Return what a commit outlives, out of ``kill``, ``power`` and ``node``."""
        if self.synchronous_commit == "off":
            # The answer comes before the log is written: a server that is killed forgets.
            return frozenset()
        survived = {"kill"}
        if self.fsync and self.full_page_writes:
            survived.add("power")
        if self.synchronous_standbys and self.synchronous_commit != "local":
            survived.add("node")
        return frozenset(survived)


@final
class PostgreSQL:
    """The connections of one opening. Lives on one event loop."""

    def __init__(self, url: PostgreSQLURL) -> None:
        self.url: Final = url
        self._idle: list[asyncpg.Connection] = []
        self._free = asyncio.Semaphore(url.connections)
        self._closed = False
        self.settings: ServerSettings | None = None

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    async def run(
        self,
        work: Callable[[asyncpg.Connection], Awaitable[T]],
        *,
        timeout: float | None = None,
    ) -> T:
        """Return what ``work`` returns for a connection of its own.

        Args:
            work: Leaves no transaction open.
            timeout: Seconds; the URL's where it is None.

        Raises:
            PostgreSQLError: What the server's or the network's failure means.
            asyncpg.PostgresError: The server understood, and refuses the statement.
        """
        limit = self.url.timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(limit), self._free:
                connection = await self._connection()
                try:
                    result = await work(connection)
                except BaseException as error:
                    self._put_back_after(error, connection)
                    raise
                self._idle.append(connection)
                return result
        except TimeoutError as error:
            raise UnreachableError(
                f"{self.url.shown}: no answer within {limit:g} s; is the server overloaded, or the "
                "network broken?"
            ) from error
        except _CLIENT_ERRORS as error:
            raise self._meaning(error) from error

    @contextlib.asynccontextmanager
    async def transaction(self, connection: asyncpg.Connection) -> AsyncIterator[None]:
        """Hold a transaction for the length of the block, within ``run``."""
        await connection.execute(
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; "
            f"SET LOCAL idle_in_transaction_session_timeout = '{_IDLE_TIMEOUT}s'"
        )
        try:
            yield
        except Exception:
            if not connection.is_closed():
                await connection.execute("ROLLBACK")
            raise
        # An error here leaves open whether it was committed: the ids make trying again safe.
        await connection.execute("COMMIT")

    async def close(self) -> None:
        """Close every idle connection; those at work close when they are done. Idempotent."""
        self._closed = True
        while self._idle:
            await _close(self._idle.pop())

    # ---------------------------------------------------------------- connections

    async def _connection(self) -> asyncpg.Connection:
        while self._idle:
            # The one that was used last: behind a change of the server the others go first.
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        return await self._connect()

    async def _connect(self) -> asyncpg.Connection:
        try:
            connection = await asyncpg.connect(
                self.url.dsn,
                timeout=_CONNECT_TIMEOUT,
                statement_cache_size=self.url.statement_cache_size,
            )
        except TimeoutError as error:
            raise UnreachableError(
                f"{self.url.shown}: no connection within {_CONNECT_TIMEOUT:g} s"
            ) from error
        except (ssl.SSLError, ssl.CertificateError) as error:
            raise RefusedError(
                f"{self.url.shown}: TLS failed ({error}); sslmode and sslrootcert say what is "
                "trusted"
            ) from error
        except (asyncpg.InternalClientError, asyncpg.InterfaceError, ValueError) as error:
            raise RefusedError(f"{self.url.shown}: {redact(str(error))}") from error
        except ConnectionError as error:
            if type(error) is ConnectionError:
                # asyncpg's own, where the server does no TLS and sslmode asks for it.
                raise RefusedError(f"{self.url.shown}: {error}") from error
            raise
        try:
            settings = await self._read_settings(connection)
        except BaseException:
            connection.terminate()
            raise
        if self.settings is not None and (lost := self.settings.survives() - settings.survives()):
            _logger.warning(
                "%s: what is committed does not survive %s any more: the server's settings changed",
                self.url.shown,
                ", ".join(sorted(lost)),
            )
        self.settings = settings
        return connection

    async def _read_settings(self, connection: asyncpg.Connection) -> ServerSettings:
        version = connection.get_server_version().major
        if version < _OLDEST_VERSION:
            raise UnsuitableError(
                f"{self.url.shown}: PostgreSQL {version} is too old; from {_OLDEST_VERSION} on is "
                "accepted"
            )
        row = await connection.fetchrow(
            "SELECT current_setting('synchronous_commit') AS commit, "
            "current_setting('fsync') AS fsync, current_setting('full_page_writes') AS pages, "
            "current_setting('synchronous_standby_names') AS standbys, "
            "current_setting('server_encoding') AS encoding, "
            "current_setting('default_transaction_isolation') AS isolation"
        )
        assert row is not None
        if row["encoding"] != "UTF8":
            raise UnsuitableError(
                f"{self.url.shown}: the database's encoding is {row['encoding']}; make it with "
                "ENCODING 'UTF8'"
            )
        if row["isolation"] != "read committed":
            raise UnsuitableError(
                f"{self.url.shown}: default_transaction_isolation is {row['isolation']!r}; 'read "
                "committed' is needed, set it for this role"
            )
        return ServerSettings(
            version=version,
            synchronous_commit=row["commit"],
            fsync=row["fsync"] == "on",
            full_page_writes=row["pages"] == "on",
            synchronous_standbys=bool(row["standbys"]),
        )

    def _put_back_after(self, error: BaseException, connection: asyncpg.Connection) -> None:
        """Keep a connection that an error left in order; close any other at once."""
        in_order = isinstance(error, asyncpg.PostgresError) or not isinstance(
            error, (*_CLIENT_ERRORS, asyncio.CancelledError)
        )
        if in_order and not connection.is_closed() and not connection.is_in_transaction():
            self._idle.append(connection)
        else:
            # Also tells the server to stop what it does for us, where it can still be told.
            connection.terminate()

    # --------------------------------------------------------------------- errors

    def _meaning(self, error: Exception) -> Exception:
        """Return what to raise for whatever the network or the server raised."""
        shown = self.url.shown
        if not isinstance(error, asyncpg.PostgresError):
            return UnreachableError(f"{shown}: cannot be reached ({redact(str(error))})")
        text = redact(str(error))
        state = error.sqlstate or ""
        if state == "25006":
            # A failover left us at a server that follows: the next connection may find the
            # one that leads, where the URL names both.
            for connection in self._idle:
                connection.terminate()
            self._idle.clear()
            return UnreachableError(f"{shown}: takes no writes now: it follows another ({text})")
        if state in _PASSING or state[:2] in _PASSING:
            return UnreachableError(f"{shown}: {text}")
        if state in _REFUSING or state[:2] in _REFUSING:
            return RefusedError(f"{shown}: {text}")
        return error


# What asyncpg raises where the server refuses, the connection breaks, or a call was made on
# one that is breaking.
_CLIENT_ERRORS: Final = (
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)

# SQLSTATEs, or their first two characters, after which trying again later may help.
_PASSING: Final = frozenset(
    {
        "08",  # connection exception
        "40",  # transaction rollback: deadlock, serialization
        "53",  # no memory, no disk, no connections left
        "55",  # not in the needed state: a lock that could not be had
        "57",  # operator intervention: shutdown, starting up, cancelled
        "58",  # an error of the system below, I/O among them
        "25P03",  # idle in transaction for too long
        "XX",  # internal errors
    }
)
# Those for which the configuration is to blame.
_REFUSING: Final = frozenset({"28", "3D", "42501", "3F"})


async def _close(connection: asyncpg.Connection) -> None:
    try:
        await connection.close(timeout=1.0)
    except _CLIENT_ERRORS:  # TimeoutError is an OSError
        connection.terminate()


def _schema_name(text: str) -> str:
    if not text or len(text.encode()) > 63 or "\0" in text or text.startswith("pg_"):
        raise ValueError("a name of 1 to 63 bytes that does not begin with pg_ is accepted")
    return text


def _create(text: str) -> bool:
    if text not in ("auto", "never"):
        raise ValueError("one of auto, never is accepted")
    return text == "auto"


def _whole_number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ValueError("a whole number of at least 0 is accepted")
    return int(text)
