"""Where ratings are counted: one protocol, opened by URL."""

import asyncio
from collections.abc import Mapping
from typing import Final, cast

from molva._base.url import ResourceURL, one_of
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
    "open_ledger",
]

# Scheme to the options that its ledger's header documents.
_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {"sqlite": ("commit", "vfs")}


async def open_ledger(url: str) -> Ledger:
    """Return the ledger that ``url`` names, made or migrated where needed.

    Args:
        url: ``sqlite:///var/lib/molva/ledger.db``: three slashes before an absolute path.

    Raises:
        LedgerURLError: The scheme or an option is unknown, or there is no path.
        LedgerVersionError: The ledger was written by a newer version, or is none.
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
    parsed = ResourceURL.read(url, what="ledger", file="ledger", error=LedgerURLError)
    parsed.check_scheme(_OPTIONS)
    parsed.check_options(_OPTIONS[parsed.scheme])
    commit = parsed.option("commit", one_of("auto", "loop", "thread"), "auto")
    # Loaded here, so that other ledgers never need this one's library.
    from molva._base.sqlite_writer import CommitOn
    from molva.ratings.ledger.sqlite import SQLiteLedger

    return await asyncio.to_thread(
        SQLiteLedger.open,
        parsed.file(),
        vfs=parsed.options.get("vfs"),
        commit=cast("CommitOn", commit),
    )
