"""Where ratings are counted: one protocol, opened by URL."""

import asyncio
import difflib
from collections.abc import Mapping
from typing import Final, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from molva._base.redaction import redact
from molva.ratings.ledger.protocol import (
    Difference,
    Ledger,
    LedgerBrokenError,
    LedgerCapabilities,
    LedgerEntry,
    LedgerError,
    LedgerSize,
    LedgerUnavailableError,
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
    "LedgerSize",
    "LedgerURLError",
    "LedgerUnavailableError",
    "LedgerVersionError",
    "Outcome",
    "Total",
    "open_ledger",
]

# Scheme to the options that its ledger's header documents.
_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {"sqlite": ("commit", "vfs")}
_COMMIT: Final = ("auto", "loop", "thread")


async def open_ledger(url: str) -> Ledger:
    """Return the ledger that ``url`` names, made or migrated where needed.

    Args:
        url: ``sqlite:///var/lib/molva/ledger.db``; three slashes before an absolute path,
            two before one that is relative to the working directory.

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
    path, options = _parse(url)
    # Loaded here, so that other ledgers never need this one's library.
    from molva._base.sqlite_writer import CommitOn
    from molva.ratings.ledger.sqlite import SQLiteLedger

    commit = options.get("commit", "auto")
    if commit not in _COMMIT:
        raise LedgerURLError(
            f"sqlite: commit={commit!r:.40} is refused; one of {', '.join(_COMMIT)} is accepted"
        )
    vfs = options.get("vfs")
    return await asyncio.to_thread(
        SQLiteLedger.open, path, vfs=vfs, commit=cast("CommitOn", commit)
    )


def _parse(url: str) -> tuple[str, dict[str, str]]:
    """Return the path and the options of a ledger's URL.

    >>> _parse("sqlite:///var/x%20y.db?commit=loop")
    ('/var/x y.db', {'commit': 'loop'})
    >>> _parse("sqlite://x.db")
    ('x.db', {})
    """
    shown = redact(url)
    parts = urlsplit(url)
    if parts.scheme not in _OPTIONS or "://" not in url:
        near = difflib.get_close_matches(parts.scheme, _OPTIONS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise LedgerURLError(
            f"{shown!r}: unknown ledger {parts.scheme!r}; {hint}"
            "write one like 'sqlite:///var/lib/molva/ledger.db'"
        )
    path = unquote(parts.netloc + parts.path)
    if not path.strip("/") or path == ":memory:":
        raise LedgerURLError(
            f"{shown!r}: names no file; write one like 'sqlite:///var/lib/molva/ledger.db'"
        )
    options: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        known = _OPTIONS[parts.scheme]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise LedgerURLError(f"{parts.scheme}: unknown option {name!r}; {hint}")
        if name in options:
            raise LedgerURLError(f"{parts.scheme}: option {name!r} is given twice")
        options[name] = value
    return path, options
