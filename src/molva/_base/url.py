"""URLs of what a deployment opens: brokers, ledgers, catalogs. One grammar for all.

    scheme://user:password@host:port/path?option=value

A file has no host and an absolute path: ``sqlite:///var/lib/molva/queue.db``. Each open
parses its own URL into its own frozen options, so nothing leaks from one to the next. An
option that nobody reads is an error: a misspelt ``capacity`` that is silently ignored shows
on the day the disk is full. No error and no repr shows a password.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from molva._base.redaction import redact

__all__ = [
    "POSTGRESQL_LIBPQ_OPTIONS",
    "POSTGRESQL_OPTIONS",
    "ResourceURL",
    "host_and_port",
    "missing_extra",
    "nearest",
    "one_of",
    "positive_integer",
    "positive_number",
]

T = TypeVar("T")

# What a URL of PostgreSQL may say, whatever is kept there. Here, because a URL is checked
# before asyncpg is loaded. The first are libpq's own and go through as they are.
POSTGRESQL_LIBPQ_OPTIONS: Final = (
    *("sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "ssl_min_protocol_version"),
    *("target_session_attrs", "passfile"),
)
POSTGRESQL_OPTIONS: Final = (
    *("schema", "create", "timeout", "connections", "statement_cache_size"),
    *POSTGRESQL_LIBPQ_OPTIONS,
)


@dataclass(frozen=True, slots=True, repr=False)
class ResourceURL:
    """A parsed URL. Its repr and str are ``shown``, which has no password in it.

    Attributes:
        scheme: Chooses the driver.
        host: Host, or several with ports, as written; "" where there is none.
        path: Percent-decoded, with its leading slash.
        options: What stands behind the question mark, as text.
        shown: The URL for people.
        example: A file's URL that would be right, for error messages.
        error: Raised for whatever is wrong.
        user: Percent-decoded; None where there is none.
        password: Percent-decoded; None where there is none.
    """

    scheme: str
    host: str
    path: str
    options: Mapping[str, str]
    shown: str
    example: str
    error: type[ValueError]
    user: str | None
    password: str | None

    @classmethod
    def read(cls, text: str, *, what: str, file: str, error: type[ValueError]) -> "ResourceURL":
        """Return the parsed form of ``text``.

        Args:
            text: The URL.
            what: What it is of, for error messages: ``broker``, ``ledger``, ``catalog``.
            file: What its file would be called, without the ending.
            error: Raised where the text is no URL, or an option stands twice.
        """
        shown = redact(text)
        example = f"sqlite:///var/lib/molva/{file}.db"
        try:
            parts = urlsplit(text)
            pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except ValueError:
            # Without the error's own text: it quotes the part that it could not read,
            # which may be one of a password.
            raise error(
                f"{shown!r} is no URL; each option is name=value, and what is special in a "
                "name or a password is percent-encoded"
            ) from None
        if not parts.scheme or "://" not in text or parts.fragment:
            raise error(f"{shown!r} is no {what} URL; write one like {example!r}, with # as %23")
        options: dict[str, str] = {}
        for name, value in pairs:
            if name in options:
                raise error(f"{shown}: option {name!r} is given twice")
            options[name] = value
        return ResourceURL(
            scheme=parts.scheme,
            host=parts.netloc.rpartition("@")[2],
            path=unquote(parts.path),
            options=options,
            shown=shown,
            example=example,
            error=error,
            user=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
        )

    def check_scheme(self, known: Iterable[str]) -> None:
        """Raise ``error`` where the scheme is not among ``known``; suggests the nearest."""
        names = sorted(known)
        if self.scheme not in names:
            hint = nearest(self.scheme, names)
            shown = ", ".join(f"{name}://" for name in names)
            raise self.error(
                f"{self.shown}: unknown scheme {self.scheme!r}; {hint or f'known are {shown}'}"
            )

    def check_options(self, known: Iterable[str]) -> None:
        """Raise ``error`` where an option is not among ``known``; suggests the nearest."""
        names = list(known)
        for option in self.options:
            if option not in names:
                hint = nearest(option, names) or f"known are {', '.join(names) or 'none'}"
                raise self.error(f"{self.scheme}: unknown option {option!r}; {hint}")

    def option(self, name: str, read: Callable[[str], T], default: T) -> T:
        """Return the option ``name`` as ``read`` understands it.

        Raises ``error`` where ``read`` refuses it with a ValueError, whose text says what
        would be accepted.
        """
        text = self.options.get(name)
        if text is None:
            return default
        try:
            return read(text)
        except ValueError as problem:
            raise self.error(
                f"{self.scheme}: option {name}={text!r:.60} is refused; {problem}"
            ) from None

    def authorities(self, *, secure: str) -> str | None:
        """Return the option ``ca``, a file of certificates; None where it is not given.

        Raises ``error`` where the scheme is not ``secure``, or there is no such file.
        """
        ca = self.options.get("ca")
        if ca is not None and self.scheme != secure:
            raise self.error(f"{self}: ca={ca!r} says nothing without TLS; write {secure}://")
        if ca is not None and not os.path.isfile(ca):
            raise self.error(f"{self}: ca={ca!r} is no file; name one with PEM certificates")
        return ca

    def file(self) -> Path:
        """Return the local file that the URL names; raise ``error`` where it names none."""
        if self.host:
            raise self.error(
                f"{self.shown}: a file has no host; write three slashes before its path, "
                f"{self.example}"
            )
        if len(self.path) < 2:
            raise self.error(f"{self.shown}: names no file; write {self.example}")
        return Path(self.path)

    def __str__(self) -> str:
        return self.shown

    def __repr__(self) -> str:
        # Not field by field: an option may be a secret as well.
        return f"<{type(self).__name__} {self.shown}>"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return a question about the nearest known word; None where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else None


def host_and_port(text: str, default_port: int) -> tuple[str, int] | None:
    """Return the host, without brackets, and the port of one server; None where it is none."""
    match = re.fullmatch(r"(\[[^\]]+\]|[^:\[\],]+)(?::(\d{1,5}))?", text)
    port = int(match[2] or default_port) if match else 0
    return (match[1].strip("[]"), port) if match and 0 < port < 65536 else None


def positive_integer(text: str) -> int:
    """Return a whole number of at least 1 (underscores may group digits)."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value < 2**62:
        raise ValueError("a whole number of at least 1 is accepted")
    return value


def positive_number(text: str) -> float:
    """Return a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError("a finite number above 0 is accepted")
    return value


def one_of(*names: str) -> Callable[[str], str]:
    """Return a reader that accepts these words only."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(nearest(text, names) or f"one of {', '.join(names)} is accepted")
        return text

    return read


@contextlib.contextmanager
def missing_extra(extra: str, error: type[ValueError]) -> Iterator[None]:
    """Raise ``error`` with the extra to install where an import in the block fails."""
    try:
        yield
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("molva"):
            raise
        raise error(
            f"{extra}: {missing.name} is not installed: pip install 'molva[{extra}]'"
        ) from missing
