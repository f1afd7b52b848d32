"""A message: what travels. Immutable, bytes inside, with an id of its own."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, final

from molva._base.ids import ID_BYTES, format_id, new_id

__all__ = ["MAX_PRIORITY", "NO_HEADERS", "Message"]

NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})

# Ten levels, as every broker that knows priorities has.
MAX_PRIORITY: Final = 9

# A hundred years. More is a unit mistaken, and would overflow a 64-bit count of microseconds.
_LONGEST_SECONDS: Final = 100 * 366 * 86_400.0


@final
class Message:
    """What travels from a sender to the consumers. Immutable: its attributes are final.

    Attributes:
        body: Any bytes; never looked into.
        id: 16 bytes that name this message for ever, through every redelivery. Made here,
            time-ordered, unless the sender has one that it will use again when it
            retries.
        key: Messages of one key keep their order where the broker promises order per
            key. None: no order is asked for.
        headers: Text to text, for whoever carries or routes it. Copied, so that no later
            change of the sender's or a consumer's reaches anybody else.
    """

    # Not a frozen dataclass: one is made for every message, and setting its attributes
    # through object.__setattr__ takes three times as long. mypy refuses an assignment.
    __slots__ = ("body", "delay", "headers", "id", "key", "priority", "ttl")

    def __init__(
        self,
        body: bytes,
        id: bytes | None = None,
        key: str | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
        priority: int = 0,
        delay: float = 0.0,
        ttl: float | None = None,
    ) -> None:
        self.body: Final = body
        self.id: Final = new_id() if id is None else id
        self.key: Final = key
        self.headers: Final = headers if headers is NO_HEADERS else MappingProxyType(dict(headers))
        self.priority: Final = priority
        self.delay: Final = delay
        self.ttl: Final = ttl

    def with_headers(self, headers: Mapping[str, str]) -> "Message":
        """Return the same message, id and all, with these headers instead of its own."""
        return Message(self.body, self.id, self.key, headers, self.priority, self.delay, self.ttl)

    @staticmethod
    def carrying(messages: "Sequence[Message]", headers: Mapping[str, str]) -> "list[Message]":
        """Return the same messages with these headers beside their own.

        Copied once for all that have none of their own, not once for each.
        """
        shared = MappingProxyType(dict(headers))
        found = []
        for m in messages:
            carried = Message(m.body, m.id, m.key, NO_HEADERS, m.priority, m.delay, m.ttl)
            both = shared if m.headers is NO_HEADERS else MappingProxyType({**m.headers, **shared})
            carried.headers = both  # type: ignore[misc]  # nobody has seen it yet
            found.append(carried)
        return found

    def check(self) -> None:
        """Raise where a field is not what brokers can carry.

        Raises:
            TypeError: The body is no bytes, a header or the key is no text, or a number
                is none.
            ValueError: The id has not 16 bytes, a text holds a lone surrogate, or a
                number is out of its range.
        """
        if type(self.body) is not bytes:
            raise TypeError(f"a body is bytes, not {type(self.body).__name__}; encode it first")
        if type(self.id) is not bytes or len(self.id) != ID_BYTES:
            raise ValueError(f"a message id is {ID_BYTES} bytes, not {self.id!r}")
        if self.key is not None:
            _check_text("key", self.key)
        if self.headers:
            for name, value in self.headers.items():
                _check_text("header name", name)
                _check_text(f"header {name!r}", value)
        if type(self.priority) is not int:
            raise TypeError(f"a priority is a whole number, not {self.priority!r:.80}")
        if not 0 <= self.priority <= MAX_PRIORITY:
            raise ValueError(
                f"priority={self.priority} is refused; 0 to {MAX_PRIORITY} is accepted"
            )
        _check_seconds("delay", self.delay)
        if self.ttl is not None:
            _check_seconds("ttl", self.ttl)
            if self.ttl == 0:
                raise ValueError("ttl=0 is refused: nobody could ever receive the message")

    def checked(self) -> "Message":
        """Return the message, which somebody else may have made. Raises what ``check`` raises."""
        key = self.key
        if (
            self.headers
            or self.ttl is not None
            or self.priority
            or not (key is None or (type(key) is str and key.isascii()))
        ):
            self.check()
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Message):
            return NotImplemented
        return self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return (
            f"Message({self.body!r}, id={self.id!r}, key={self.key!r}, "
            f"headers={dict(self.headers)!r}, priority={self.priority!r}, "
            f"delay={self.delay!r}, ttl={self.ttl!r})"
        )

    def __str__(self) -> str:
        return f"message {format_id(self.id)} of {len(self.body):,} bytes"

    def _fields(self) -> tuple[object, ...]:
        return (
            self.body,
            self.id,
            self.key,
            dict(self.headers),
            self.priority,
            self.delay,
            self.ttl,
        )


def _check_text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"a {what} is text, not {type(value).__name__}: {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a {what} holds a lone surrogate, which no broker can carry") from error


def _check_seconds(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"a {what} is a number of seconds, not {value!r:.80}")
    if not 0 <= value <= _LONGEST_SECONDS:  # also refuses NaN
        raise ValueError(f"{what}={value!r} is refused; 0 seconds to 100 years is accepted")
