"""URLs: the one thing that changes when the broker changes.

    scheme://user:password@host:port/path?topic=ratings&option=value

A driver is reached by its scheme only, and loaded when its scheme is first opened. Each
open parses its own URL into its own frozen options, so nothing leaks from one to the
next. An option that nobody reads is an error: a misspelt ``capacity`` that is silently
ignored shows on the day the disk is full.
"""

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final, Literal, TypeVar, cast, final
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from molva._base.redaction import redact
from molva.messaging.errors import InvalidURLError, MissingExtraError

__all__ = [
    "BrokerURL",
    "load_driver",
    "one_of",
    "positive_integer",
    "positive_number",
    "with_options",
]

T = TypeVar("T")

# Scheme to (module, extra that brings its client library). The only global state here.
_DRIVERS: Final[dict[str, tuple[str, str | None]]] = {
    "memory": ("molva.messaging.drivers.memory", None),
    "sqlite": ("molva.messaging.drivers.sqlite", None),
}

# Understood for every broker. They say what is opened; the driver's own say how.
COMMON_OPTIONS: Final = ("topic", "subscription", "create")


@final
@dataclass(frozen=True, slots=True, repr=False)
class BrokerURL:
    """A parsed URL. Its repr and str are ``shown``, which has no password in it.

    Attributes:
        scheme: Chooses the driver.
        host: Host, or several with ports, as written; "" where there is none.
        path: Percent-decoded, with its leading slash.
        topic: Name of the topic; None in a base URL.
        subscription: Name of the subscription; None where a topic is meant.
        create: Whether what is missing is made: ``auto`` or ``never``.
        options: All the rest, as text.
    """

    scheme: str
    host: str
    path: str
    topic: str | None
    subscription: str | None
    create: Literal["auto", "never"]
    options: Mapping[str, str]
    shown: str
    user: str | None = None
    password: str | None = None

    @classmethod
    def parse(cls, text: str) -> "BrokerURL":
        """Return the parsed form of ``text``.

        Raises:
            InvalidURLError: The text is no URL, or an option stands twice.
        """
        shown = redact(text)
        try:
            parts = urlsplit(text)
            pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except ValueError:
            # Without the error's own text: it quotes the part that it could not read,
            # which may be one of a password.
            raise InvalidURLError(
                f"{shown!r} is no URL; each option is name=value, and what is special in a "
                "name or a password is percent-encoded"
            ) from None
        if not parts.scheme or "://" not in text:
            raise InvalidURLError(
                f"{shown!r} is no broker URL; write one like 'sqlite:///var/lib/molva/queue.db' "
                "or 'memory://'"
            )
        options: dict[str, str] = {}
        for name, value in pairs:
            if name in options:
                raise InvalidURLError(f"{shown}: option {name!r} is given twice")
            options[name] = value
        create = options.pop("create", "auto")
        if create not in ("auto", "never"):
            raise InvalidURLError(f"{shown}: create={create!r} is refused; 'auto' or 'never'")
        return cls(
            scheme=parts.scheme,
            host=parts.netloc.rpartition("@")[2],
            path=unquote(parts.path),
            topic=_name(shown, "topic", options.pop("topic", None)),
            subscription=_name(shown, "subscription", options.pop("subscription", None)),
            create=cast("Literal['auto', 'never']", create),
            options=options,
            shown=shown,
            user=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
        )

    def file(self) -> Path:
        """Return the local file that the URL names: ``sqlite:///var/x.db`` is /var/x.db.

        Raises:
            InvalidURLError: There is a host, or no path.
        """
        if self.host:
            raise InvalidURLError(
                f"{self.shown}: a file has no host; write three slashes before its path, "
                f"{self.scheme}:///var/lib/molva/queue.db"
            )
        if len(self.path) < 2:
            raise InvalidURLError(
                f"{self.shown}: names no file; write {self.scheme}:///var/lib/molva/queue.db"
            )
        return Path(self.path)

    def check_options(self, known: Iterable[str]) -> None:
        """Raise where an option is not among ``known``.

        Raises:
            InvalidURLError: Names the option, and the nearest that exists.
        """
        names = [*known, *COMMON_OPTIONS]
        for option in self.options:
            if option not in names:
                near = difflib.get_close_matches(option, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
                raise InvalidURLError(f"{self.scheme}: unknown option {option!r}; {hint}")

    def option(self, name: str, read: Callable[[str], T], default: T) -> T:
        """Return the option ``name`` as ``read`` understands it.

        Raises:
            InvalidURLError: ``read`` refused it with a ValueError, whose text says what
                would be accepted.
        """
        text = self.options.get(name)
        if text is None:
            return default
        try:
            return read(text)
        except ValueError as error:
            raise InvalidURLError(
                f"{self.scheme}: option {name}={text!r:.60} is refused; {error}"
            ) from None

    def __str__(self) -> str:
        return self.shown

    def __repr__(self) -> str:
        # Not field by field: an option may be a secret as well.
        return f"<BrokerURL {self.shown}>"


def with_options(url: str, **options: str) -> str:
    """Return ``url`` with further options, as a base URL is made into that of a topic.

    >>> with_options("sqlite:///q.db?lanes=4", topic="ratings", subscription="a b")
    'sqlite:///q.db?lanes=4&topic=ratings&subscription=a%20b'
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise InvalidURLError(f"{redact(url)!r} is no URL") from None
    added = urlencode(options, quote_via=quote)
    query = f"{parts.query}&{added}" if parts.query else added
    # urlunsplit would drop the empty host of sqlite:///path.
    path = f"{parts.scheme}://{parts.netloc}{parts.path}"
    return f"{path}?{query}" + (f"#{parts.fragment}" if parts.fragment else "")


def load_driver(url: BrokerURL) -> ModuleType:
    """Return the module of the driver for the URL's scheme, loading it now.

    Raises:
        InvalidURLError: No driver has this scheme.
        MissingExtraError: The driver's client library is not installed.
    """
    if url.scheme not in _DRIVERS:
        near = difflib.get_close_matches(url.scheme, _DRIVERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(f"{scheme}://" for scheme in sorted(_DRIVERS))
        raise InvalidURLError(f"unknown scheme {url.scheme!r}; {hint}known are {known}")
    module, extra = _DRIVERS[url.scheme]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if extra is None:
            raise
        raise MissingExtraError(
            f"{url.scheme}:// needs a client library: pip install 'molva[{extra}]'"
        ) from error


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
            raise ValueError(f"one of {', '.join(names)} is accepted")
        return text

    return read


def _name(shown: str, what: str, value: str | None) -> str | None:
    """Check the name of a topic or subscription: any printable text of 1 to 200."""
    if value is None:
        return None
    if not 1 <= len(value) <= 200 or not value.isprintable():
        raise InvalidURLError(
            f"{shown}: {what}={value!r:.60} is refused; 1 to 200 printable characters are accepted"
        )
    return value
