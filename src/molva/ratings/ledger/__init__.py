"""Where ratings are counted: one protocol, opened by URL."""

import asyncio
from collections.abc import Mapping
from typing import Final, cast

from molva._base.url import POSTGRESQL_OPTIONS, ResourceURL, missing_extra, one_of
from molva.ratings.ledger.protocol import (
    Difference,
    Ledger,
    LedgerBrokenError,
    LedgerCapabilities,
    LedgerEntry,
    LedgerError,
    LedgerServerError,
    LedgerSize,
    LedgerUnavailableError,
    LedgerUnsupportedError,
    LedgerURLError,
    LedgerVersionError,
    Outcome,
    Total,
)

__all__ = [
    "Difference",
    "Ledger",
    "LedgerBrokenError",
    "LedgerCapabilities",
    "LedgerEntry",
    "LedgerError",
    "LedgerServerError",
    "LedgerSize",
    "LedgerURLError",
    "LedgerUnavailableError",
    "LedgerUnsupportedError",
    "LedgerVersionError",
    "Outcome",
    "Total",
    "best_capabilities",
    "migrate_ledger",
    "open_ledger",
]

# Scheme to the options that its ledger's header documents.
_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "sqlite": ("commit", "vfs"),
    "redis": ("horizon", "prefix", "ca"),
    "rediss": ("horizon", "prefix", "ca"),
    "postgresql": POSTGRESQL_OPTIONS,
}


def best_capabilities() -> dict[str, LedgerCapabilities]:
    """Return what each ledger can do at best, by its scheme. Loads all their libraries."""
    from molva.ratings.ledger import postgresql, redis, sqlite

    return {"sqlite": sqlite.BEST, "postgresql": postgresql.BEST, "redis": redis.BEST}


async def open_ledger(url: str) -> Ledger:
    """Return the ledger that ``url`` names, made where it is missing.

    Args:
        url: ``sqlite:///var/lib/molva/ledger.db``: three slashes before an absolute path;
            ``postgresql://user@host/database``; ``redis://host:6379/0``.

    Raises:
        LedgerURLError: The URL is wrong, or the server that it names refuses it.
        LedgerServerError: The server cannot keep a ledger as it is.
        LedgerVersionError: The ledger is of another version, or is none.
        LedgerUnavailableError: It cannot be opened now.
        LedgerError: It is damaged.

    Example:
        >>> import asyncio, tempfile
        >>> async def last_seq(folder: str) -> int:
        ...     ledger = await open_ledger(f"sqlite://{folder}/ledger.db")
        ...     try:
        ...         return await ledger.last_seq("default")
        ...     finally:
        ...         await ledger.close()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     asyncio.run(last_seq(folder))
        0
    """
    parsed = _parsed(url)
    # Each is loaded only here, so that no ledger needs another one's library.
    match parsed.scheme:
        case "postgresql":
            with missing_extra("postgresql", LedgerURLError):
                from molva.ratings.ledger.postgresql import PostgreSQLLedger

            return await PostgreSQLLedger.open(parsed)
        case "redis" | "rediss":
            with missing_extra("redis", LedgerURLError):
                from molva.ratings.ledger.redis import RedisLedger

            return await RedisLedger.open(parsed)
        case _:
            return await _open_sqlite(parsed)


async def migrate_ledger(url: str) -> tuple[int, int] | None:
    """Bring a ledger to the newest version; return the old version and the new one.

    Returns:
        None for a ledger that is migrated whenever it is opened.

    Raises:
        LedgerError: As ``open_ledger``.
    """
    parsed = _parsed(url)
    if parsed.scheme == "postgresql":
        with missing_extra("postgresql", LedgerURLError):
            from molva.ratings.ledger.postgresql import migrate_postgresql_ledger

        return await migrate_postgresql_ledger(parsed)
    await (await open_ledger(url)).close()
    return None


def _parsed(url: str) -> ResourceURL:
    parsed = ResourceURL.read(url, what="ledger", file="ledger", error=LedgerURLError)
    parsed.check_scheme(_OPTIONS)
    parsed.check_options(_OPTIONS[parsed.scheme])
    return parsed


async def _open_sqlite(parsed: ResourceURL) -> Ledger:
    from molva._base.sqlite_writer import CommitOn
    from molva.ratings.ledger.sqlite import SQLiteLedger

    commit = parsed.option("commit", one_of("auto", "loop", "thread"), "auto")
    return await asyncio.to_thread(
        SQLiteLedger.open,
        parsed.file(),
        vfs=parsed.options.get("vfs"),
        commit=cast("CommitOn", commit),
    )
