"""URLs of brokers: the one thing that changes when the broker changes.

    scheme://user:password@host:port/path?topic=ratings&option=value

What is opened, for every broker:

    ``topic``, ``subscription``, ``queue``
        A log, one reader of it; or a queue. Names of 1 to 200 printable characters.
    ``create``
        ``auto`` (default) makes what is missing, ``never`` raises.
    ``require``
        Features that the broker must have, with commas between them: ``power,per-key``.
    ``capacity``, ``overflow``
        How many messages may wait, and what becomes of one that does not fit: ``reject``
        (default), ``wait``, ``drop-newest``, ``drop-oldest``.
    ``discipline``
        ``fifo`` (default), ``lifo``, ``priority``, ``random``, ``aggregated``.
    ``aggregate``
        How many messages ``discipline=aggregated`` takes as one at most. Default 100.
    ``delivery``
        ``at-least-once`` (default) or ``at-most-once``, which settles before it hands over.
    ``max_attempts``
        Hand-overs of a message before it becomes a dead letter. Default 5.
    ``prefetch``
        Messages that iterating and ``run`` take ahead at most.
    ``linger``
        Seconds that a send waits for others to travel with. Default 0.

A driver is reached by its scheme only, and loaded when its scheme is first opened. Drivers
of others make their scheme known by an entry point of the group ``molva.messaging.drivers``,
whose name is the scheme and whose object is the driver's module. They are looked for only
where a scheme is none of ours, so that nobody who has none pays for it; ours cannot be
replaced.
"""

import importlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Final, Literal, cast, final
from urllib.parse import quote, urlencode, urlsplit

from molva._base.redaction import redact
from molva._base.url import ResourceURL, nearest, one_of, positive_integer, positive_number
from molva.messaging.driver import ALL_FEATURES, Capabilities
from molva.messaging.errors import (
    InvalidURLError,
    MissingExtraError,
    UnsupportedFeatureError,
)

__all__ = [
    "COMMON_OPTIONS",
    "BrokerURL",
    "Kind",
    "check_features",
    "drivers_with",
    "known_schemes",
    "load_driver",
    "one_of",
    "positive_integer",
    "positive_number",
    "with_options",
]

Kind = Literal["topic", "queue"]

# Scheme to (module, extra that brings its client library). The only global state here.
_DRIVERS: Final[dict[str, tuple[str, str | None]]] = {
    "amqp": ("molva.messaging.drivers.amqp", "rabbitmq"),
    "amqps": ("molva.messaging.drivers.amqp", "rabbitmq"),
    "kafka": ("molva.messaging.drivers.kafka", "kafka"),
    "memory": ("molva.messaging.drivers.memory", None),
    "nats": ("molva.messaging.drivers.nats", "nats"),
    "redis": ("molva.messaging.drivers.redis", "redis"),
    "rediss": ("molva.messaging.drivers.redis", "redis"),
    "sqlite": ("molva.messaging.drivers.sqlite", None),
    "tls": ("molva.messaging.drivers.nats", "nats"),
}

# The group of entry points by which a distribution makes its driver known.
_GROUP: Final = "molva.messaging.drivers"

# Understood for every broker: see the head of this file.
COMMON_OPTIONS: Final = (
    "topic",
    "subscription",
    "queue",
    "create",
    "require",
    "capacity",
    "overflow",
    "discipline",
    "aggregate",
    "delivery",
    "max_attempts",
    "prefetch",
    "linger",
)

_CREATE: Final = one_of("auto", "never")
_DISCIPLINE: Final = one_of("fifo", "lifo", "priority", "random", "aggregated")
_OVERFLOW: Final = one_of("reject", "wait", "drop-newest", "drop-oldest")
_DELIVERY: Final = one_of("at-least-once", "at-most-once")
_DEFAULT_AGGREGATE: Final = 100


@final
@dataclass(frozen=True, slots=True, repr=False)
class BrokerURL(ResourceURL):
    """A broker's URL, and what of it every broker understands; see the head of this file.

    Attributes:
        topic: Name of the topic; None in a base URL.
        subscription: Name of the subscription; None where a topic is meant.
        queue: Name of the queue.
        create: Whether what is missing is made: ``auto`` or ``never``.
        require: Features that the broker must have.
        capacity: How many messages may wait; None where nothing bounds them.
        overflow: What becomes of a message that does not fit.
        discipline: In which order messages are taken; None where the URL does not say.
        aggregate: How many messages are taken as one; None unless ``aggregated``.
        delivery: Whether messages are settled before or after they are handed over.
        max_attempts: Hand-overs before a message is a dead letter; None is the default.
        prefetch: Messages taken ahead at most; None where that is left to us.
        linger: Seconds that a send waits for others to travel with.
    """

    topic: str | None
    subscription: str | None
    queue: str | None
    create: Literal["auto", "never"]
    require: frozenset[str]
    capacity: int | None
    overflow: str
    discipline: str | None
    aggregate: int | None
    delivery: str
    max_attempts: int | None
    prefetch: int | None
    linger: float

    @classmethod
    def parse(cls, text: str) -> "BrokerURL":
        """Return the parsed form of ``text``.

        Raises:
            InvalidURLError: The text is no URL, an option stands twice, or the value of
                one that every broker understands is out of its range.
        """
        base = ResourceURL.read(text, what="broker", file="queue", error=InvalidURLError)
        discipline = base.option("discipline", _DISCIPLINE, None)
        aggregate = base.option("aggregate", positive_integer, None)
        if aggregate is not None and discipline != "aggregated":
            raise InvalidURLError(
                f"{base}: aggregate={aggregate} says nothing without discipline=aggregated"
            )
        capacity = base.option("capacity", positive_integer, None)
        overflow = base.option("overflow", _OVERFLOW, "reject")
        if capacity is None and overflow != "reject":
            raise InvalidURLError(f"{base}: overflow={overflow} says nothing without a capacity")
        url = cls(
            scheme=base.scheme,
            host=base.host,
            path=base.path,
            shown=base.shown,
            example=base.example,
            error=base.error,
            user=base.user,
            password=base.password,
            topic=base.option("topic", _name, None),
            subscription=base.option("subscription", _name, None),
            queue=base.option("queue", _name, None),
            create=cast("Literal['auto', 'never']", base.option("create", _CREATE, "auto")),
            require=base.option("require", _features, frozenset()),
            capacity=capacity,
            overflow=overflow,
            discipline="fifo" if discipline == "aggregated" else discipline,
            aggregate=(aggregate or _DEFAULT_AGGREGATE if discipline == "aggregated" else None),
            delivery=base.option("delivery", _DELIVERY, "at-least-once"),
            max_attempts=base.option("max_attempts", positive_integer, None),
            prefetch=base.option("prefetch", positive_integer, None),
            linger=base.option("linger", positive_number, 0.0),
            options={k: v for k, v in base.options.items() if k not in COMMON_OPTIONS},
        )
        if url.queue is not None and (url.topic or url.subscription) is not None:
            raise InvalidURLError(f"{base}: names a queue and a topic; it can be of one only")
        return url

    def check_driver_options(self, known: Collection[str]) -> None:
        """Raise InvalidURLError where an option is neither common nor among ``known``.

        Says so where the option is one of another driver, or of the other kind.
        """
        for option in self.options:
            if option in known:
                continue
            owner = _owner_of(option, self.scheme)
            if owner is not None:
                raise InvalidURLError(f"{self.scheme}: option {option!r} is {owner}, not of this")
            hint = nearest(option, (*known, *COMMON_OPTIONS))
            names = ", ".join((*known, *COMMON_OPTIONS))
            raise InvalidURLError(
                f"{self.scheme}: unknown option {option!r}; {hint or f'known are {names}'}"
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
    if url.scheme not in _DRIVERS:
        elsewhere = _drivers_of_others()
        url.check_scheme((*_DRIVERS, *elsewhere))
        return _load_from(elsewhere[url.scheme])
    module, extra = _DRIVERS[url.scheme]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if extra is None:
            raise
        raise MissingExtraError(
            f"{url.scheme}:// needs a client library: pip install 'molva[{extra}]'"
        ) from error


def _drivers_of_others() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=_GROUP)}


def _load_from(point: EntryPoint) -> ModuleType:
    of = f"{point.name}://, which {point.dist.name if point.dist else point.value} brings,"
    try:
        module = point.load()
    except ImportError as error:
        raise MissingExtraError(f"{of} needs what is not installed: {error}") from error
    if not isinstance(module, ModuleType):
        raise InvalidURLError(f"{of} is no module: {point.value}")
    return module


def known_schemes() -> tuple[str, ...]:
    """Return the schemes of our own drivers, in the order of their names."""
    return tuple(sorted(_DRIVERS))


def check_features(
    url: BrokerURL, capabilities: Capabilities, required: Iterable[str], kind: Kind
) -> None:
    """Raise UnsupportedFeatureError where a feature is missing that the URL needs.

    Args:
        url: What was opened; its options need features too.
        capabilities: What it turned out to do.
        required: Further features.
        kind: Whether a topic or a queue was opened.

    Raises:
        UnsupportedFeatureError: Names the feature, and the drivers that have it.
        ValueError: ``required`` names something that is no feature at all.
    """
    needed = set(url.require)
    for feature in required:
        needed |= _features(feature)
    if url.capacity is not None:
        needed |= {"capacity", url.overflow}
    if url.discipline is not None:
        needed.add(url.discipline)
    if url.delivery == "at-most-once":
        needed.add("at-most-once")
    # Read by the driver, whose options differ; what it asks for is the same everywhere.
    needed |= {url.options.get("start", "")} & {"earliest", "latest"}
    for feature in sorted(needed - capabilities.features):
        raise UnsupportedFeatureError(
            f"{url}: a {kind} there, as it was opened, has no {feature!r} "
            f"({ALL_FEATURES[feature]})",
            feature=feature,
            drivers=drivers_with(feature, kind),
        )


def drivers_with(feature: str, kind: Kind) -> tuple[str, ...]:
    """Return the schemes whose drivers can do it, of those whose library is there."""
    found: dict[ModuleType, str] = {}
    for scheme in known_schemes():
        try:
            driver = importlib.import_module(_DRIVERS[scheme][0])
        except ImportError:
            continue
        best = getattr(driver, f"{kind.upper()}_CAPABILITIES", None)
        if best is not None and feature in best.features:
            found.setdefault(driver, scheme)  # a second scheme is the same over TLS
    return tuple(found.values())


def _owner_of(option: str, own: str) -> str | None:
    """Return whose option it is, if it is any driver's; for an error message.

    Its own driver is asked first: the option may be one of the other kind.
    """
    for scheme in sorted(known_schemes(), key=lambda scheme: scheme != own):
        try:
            driver = importlib.import_module(_DRIVERS[scheme][0])
        except ImportError:
            continue
        for kind in ("topic", "queue"):
            if option in getattr(driver, f"{kind.upper()}_OPTIONS", ()):
                return f"one of {scheme}:// for a {kind}"
    return None


def _name(value: str) -> str:
    """Check the name of a topic, queue or subscription."""
    if not 1 <= len(value) <= 200 or not value.isprintable():
        raise ValueError("1 to 200 printable characters are accepted")
    return value


def _features(text: str) -> frozenset[str]:
    names = frozenset(text.split(","))
    for name in sorted(names - ALL_FEATURES.keys()):
        hint = nearest(name, ALL_FEATURES) or f"known are {', '.join(ALL_FEATURES)}"
        raise ValueError(f"{name!r} is no feature; {hint}")
    return names
