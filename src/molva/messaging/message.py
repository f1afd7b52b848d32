"""A message: what travels. Immutable, bytes inside, with an id of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, final

from molva._base.ids import ID_BYTES, format_id, new_id

__all__ = ["NO_HEADERS", "Message"]

NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})


@final
@dataclass(frozen=True, slots=True)
class Message:
    """What travels from a sender to the consumers.

    Attributes:
        body: Any bytes; never looked into.
        id: 16 bytes that name this message for ever, through every redelivery. Made here,
            time-ordered, unless the sender has one that it will use again when it
            retries.
        key: Messages of one key keep their order where the broker promises order per
            key. None: no order is asked for.
        headers: Text to text, for whoever carries or routes it. Copied, so that nobody's
            later change reaches a message that was sent.
    """

    body: bytes
    id: bytes = field(default_factory=new_id)
    key: str | None = None
    headers: Mapping[str, str] = field(default_factory=lambda: NO_HEADERS)

    def __post_init__(self) -> None:
        if self.headers is not NO_HEADERS:
            object.__setattr__(self, "headers", MappingProxyType(dict(self.headers)))

    def check(self) -> None:
        """Raise where a field is not what brokers can carry.

        Raises:
            TypeError: The body is no bytes, or a header or the key is no text.
            ValueError: The id has not 16 bytes, or a text holds a lone surrogate.
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

    def __str__(self) -> str:
        return f"message {format_id(self.id)} of {len(self.body):,} bytes"


def _check_text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"a {what} is text, not {type(value).__name__}: {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a {what} holds a lone surrogate, which no broker can carry") from error
