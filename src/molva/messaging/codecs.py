"""Typed bodies: what travels is bytes, what a program means is text, JSON or a struct.

    await topic.send(JSON.message({"rate": 7}, key="ann"))
    await subscription.run(JSON.handler(handle))     # handle(value, delivery)

A body that cannot be decoded can never be processed, however often it is tried: the handler
raises ``RejectError``, and the message goes to the dead letters at once, with the reason.

A codec marks what it encodes with a ``content-type`` header and refuses what is marked
otherwise. It never guesses from the body what a body is: brokers that did have taken users'
JSON for an envelope of their own.

There is no pickle, and none will come: whoever can send a pickle can run any code in the
process that reads it.
"""

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, final

from molva.messaging.delivery import Delivery
from molva.messaging.errors import MissingExtraError, RejectError
from molva.messaging.message import NO_HEADERS, Message

if TYPE_CHECKING:
    pass

__all__ = ["BYTES", "JSON", "TEXT", "Codec", "JSONValue", "struct"]

T = TypeVar("T")
R = TypeVar("R")

# What JSON can say. Recursive types are not spelled out: no checker of users does them well.
JSONValue = dict[str, Any] | list[Any] | str | int | float | bool | None

_CONTENT_TYPE: Final = "content-type"


class Codec(ABC, Generic[T]):
    """Turns values into bodies and back.

    Attributes:
        content_type: What its bodies are marked with; None marks and asks for nothing.
    """

    content_type: str | None = None

    @abstractmethod
    def encode(self, value: T) -> bytes:
        """Return the body of a value.

        Raises:
            ValueError: The value cannot be said in this form.
            TypeError: It is none of this codec's.
        """

    @abstractmethod
    def parse(self, body: bytes) -> T:
        """Return the value of a body; raises ValueError or RecursionError where it has none."""

    def decode(self, message: Message) -> T:
        """Return the value of a message.

        Raises:
            RejectError: It is marked as something else, or cannot be decoded.
        """
        marked = message.headers.get(_CONTENT_TYPE, self.content_type)
        if self.content_type is not None and marked != self.content_type:
            raise RejectError(f"the body is marked as {marked!r}, not {self.content_type!r}")
        try:
            return self.parse(message.body)
        except (ValueError, RecursionError) as error:
            raise RejectError(f"the body cannot be decoded: {error}") from error

    def message(
        self,
        value: T,
        *,
        id: bytes | None = None,
        key: str | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
        priority: int = 0,
        delay: float = 0.0,
        ttl: float | None = None,
    ) -> Message:
        """Return a message that carries a value; the other fields are those of ``Message``.

        Example:
            >>> message = JSON.message({"rate": 7})
            >>> message.body, dict(message.headers)
            (b'{"rate":7}', {'content-type': 'application/json'})
            >>> JSON.decode(message)
            {'rate': 7}
        """
        if self.content_type is not None:
            headers = {**headers, _CONTENT_TYPE: self.content_type}
        return Message(self.encode(value), id, key, headers, priority, delay, ttl)

    def handler(
        self, function: Callable[[T, Delivery], Awaitable[object]]
    ) -> Callable[[Delivery], Awaitable[None]]:
        """Return a handler for ``run`` that calls ``function`` with value and delivery."""

        @functools.wraps(function)
        async def handle(delivery: Delivery) -> None:
            await function(self.decode(delivery.message), delivery)

        return handle

    def answering(
        self, function: Callable[[T, Delivery], Awaitable[R]], replies: "Codec[R]"
    ) -> Callable[[Delivery], Awaitable[Message]]:
        """Return a handler for a responder, whose answer is what ``function`` returns.

        Args:
            function: Called with value and delivery of a request.
            replies: Codec of what it returns.
        """

        @functools.wraps(function)
        async def answer(request: Delivery) -> Message:
            return replies.message(await function(self.decode(request.message), request))

        return answer


@final
class _Bytes(Codec[bytes]):
    def encode(self, value: bytes) -> bytes:
        return value

    def parse(self, body: bytes) -> bytes:
        return body


@final
class _Text(Codec[str]):
    content_type = "text/plain; charset=utf-8"

    def encode(self, value: str) -> bytes:
        return value.encode()

    def parse(self, body: bytes) -> str:
        return body.decode()


@final
class _JSON(Codec[JSONValue]):
    content_type = "application/json"

    def encode(self, value: JSONValue) -> bytes:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()  # a lone surrogate is a ValueError here

    def parse(self, body: bytes) -> JSONValue:
        found: JSONValue = json.loads(body.decode(), parse_constant=_refuse)
        return found


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


@final
class _Struct(Codec[T]):
    content_type = "application/json"

    def __init__(self, type_: type[T]) -> None:
        try:
            import msgspec
        except ImportError as error:
            raise MissingExtraError(
                "typed bodies need a library: pip install 'molva[msgspec]'"
            ) from error
        self._encode = msgspec.json.Encoder().encode
        self._decoder: msgspec.json.Decoder[T] = msgspec.json.Decoder(type_)

    def encode(self, value: T) -> bytes:
        return self._encode(value)

    def parse(self, body: bytes) -> T:
        # msgspec's errors are ValueErrors, and name the field.
        return self._decoder.decode(body)


BYTES: Final[Codec[bytes]] = _Bytes()
TEXT: Final[Codec[str]] = _Text()
JSON: Final[Codec[JSONValue]] = _JSON()


def struct(type_: type[T]) -> Codec[T]:
    """Return the codec of a msgspec struct, dataclass or other annotated type, as JSON.

    What comes in is checked against the type.

    Raises:
        MissingExtraError: msgspec is not installed.
    """
    return _Struct(type_)
