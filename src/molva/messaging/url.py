"""URLs of brokers: the one thing that changes when the broker changes.

    scheme://user:password@host:port/path?topic=ratings&option=value

A driver is reached by its scheme only, and loaded when its scheme is first opened.
"""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Final, Literal, cast, final
from urllib.parse import quote, urlencode, urlsplit

from molva._base.redaction import redact
from molva._base.url import ResourceURL
from molva.messaging.errors import InvalidURLError, MissingExtraError

__all__ = ["COMMON_OPTIONS", "BrokerURL", "load_driver", "with_options"]

# Scheme to (module, extra that brings its client library). The only global state here.
_DRIVERS: Final[dict[str, tuple[str, str | None]]] = {
    "memory": ("molva.messaging.drivers.memory", None),
    "sqlite": ("molva.messaging.drivers.sqlite", None),
}

# Understood for every broker. They say what is opened; the driver's own say how.
COMMON_OPTIONS: Final = ("topic", "subscription", "create")


@final
@dataclass(frozen=True, slots=True, repr=False)
class BrokerURL(ResourceURL):
    """A broker's URL, and what of it is meant.

    Attributes:
        topic: Name of the topic; None in a base URL.
        subscription: Name of the subscription; None where a topic is meant.
        create: Whether what is missing is made: ``auto`` or ``never``.
    """

    topic: str | None
    subscription: str | None
    create: Literal["auto", "never"]

    @classmethod
    def parse(cls, text: str) -> "BrokerURL":
        """Return the parsed form of ``text``.

        Raises:
            InvalidURLError: The text is no URL, or an option stands twice.
        """
        base = ResourceURL.read(text, what="broker", file="queue", error=InvalidURLError)
        options = dict(base.options)
        create = options.pop("create", "auto")
        if create not in ("auto", "never"):
            raise InvalidURLError(f"{base}: create={create!r} is refused; 'auto' or 'never'")
        return cls(
            scheme=base.scheme,
            host=base.host,
            path=base.path,
            shown=base.shown,
            example=base.example,
            error=base.error,
            user=base.user,
            password=base.password,
            topic=_name(base.shown, "topic", options.pop("topic", None)),
            subscription=_name(base.shown, "subscription", options.pop("subscription", None)),
            create=cast("Literal['auto', 'never']", create),
            options=options,
        )


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
    url.check_scheme(_DRIVERS)
    module, extra = _DRIVERS[url.scheme]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if extra is None:
            raise
        raise MissingExtraError(
            f"{url.scheme}:// needs a client library: pip install 'molva[{extra}]'"
        ) from error


def _name(shown: str, what: str, value: str | None) -> str | None:
    """Check the name of a topic or subscription: any printable text of 1 to 200."""
    if value is None:
        return None
    if not 1 <= len(value) <= 200 or not value.isprintable():
        raise InvalidURLError(
            f"{shown}: {what}={value!r:.60} is refused; 1 to 200 printable characters are accepted"
        )
    return value
