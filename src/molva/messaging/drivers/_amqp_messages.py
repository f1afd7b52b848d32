"""How messages travel by AMQP: what is in their properties, headers and bodies.

The body is the message's own. ``message_id`` is its id in hex and, behind a dot, a number that
no other publishing of this process had: AMQP names a message that it returns by nothing else.
Headers say the rest: ``molva-stored-us``; ``molva-attempts``, failures before it was published this
time, and ``molva-returns``, how often a consumer went away with it before; ``molva-key``;
``molva-meta``, a JSON object of headers and time to live. An envelope too large for AMQP's header,
which has to fit into one frame, stands before the body as JSON, its length in the four bytes before
it, and ``molva-inside`` says so.

A dead letter says besides why and when it died. What came to the dead letters without us, by a
policy or another client, carries RabbitMQ's own ``x-death``.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, NamedTuple, final

from aiormq.abc import DeliveredMessage
from pamqp import encode
from pamqp.commands import Basic

from molva._base.ids import ID_BYTES
from molva.messaging.driver import DeadLetter
from molva.messaging.message import MAX_PRIORITY, NO_HEADERS, Message

__all__ = [
    "ForeignMessageError",
    "Packed",
    "Received",
    "again",
    "bury",
    "foreign",
    "letter_of",
    "pack",
    "received",
]

_STORED: Final = "molva-stored-us"
_ATTEMPTS: Final = "molva-attempts"
_RETURNS: Final = "molva-returns"
_KEY: Final = "molva-key"
_META: Final = "molva-meta"
_INSIDE: Final = "molva-inside"
_REASON: Final = "molva-reason"
_DIED: Final = "molva-died-us"

# How often a quorum queue has handed a message over before and got it back. From 4.0 on the
# first counts failures, and the second counts what we mean.
_COUNTS: Final = ("x-delivery-count", "x-acquired-count")

_PERSISTENT: Final = 2

# Bytes of key, headers and reason that travel as headers. A frame has 128 KiB as servers are
# shipped; an operator may set it to half.
_MOST_IN_HEADERS: Final = 50_000
_LENGTH_BYTES: Final = 4
# Characters of a reason that are kept: a traceback with everything in it helps nobody.
_MOST_OF_REASON: Final = 4_000

_serial: Final = itertools.count()


class ForeignMessageError(ValueError):
    """What came is none of our messages."""


class Packed(NamedTuple):
    """What is published of a message."""

    body: bytes
    properties: Basic.Properties


@final
@dataclass(slots=True)
class Received:
    """One hand-over of a message by the server.

    Attributes:
        message: The message.
        attempts: Failed attempts before, as far as its publisher knew.
        stored_at_us: When it was first published: microseconds, UTC.
        consumer: Which of this process's consumers it came to.
        returns: How often the server got it back, from whoever went away with it.
    """

    message: Message
    attempts: int
    stored_at_us: int
    consumer: int
    returns: int


def pack(message: Message, stored_at_us: int, attempts: int = 0, returns: int = 0) -> Packed:
    """Return what to publish of a message that failed so often, and was lost with its consumer."""
    headers: dict[str, Any] = {_STORED: stored_at_us}
    if returns:
        headers[_RETURNS] = returns
    return _packed(message, headers, attempts)


def bury(
    message: Message, stored_at_us: int, attempts: int, *, reason: str, died_at_us: int
) -> Packed:
    """Return what to publish of a message that becomes a dead letter."""
    more = {_STORED: stored_at_us, _REASON: _text(reason), _DIED: died_at_us}
    return _packed(message, more, attempts)


def foreign(delivered: DeliveredMessage, why: str, *, died_at_us: int) -> Packed:
    """Return what to publish of somebody else's message, so that it is a dead letter of ours."""
    properties = delivered.header.properties
    headers = {**_sendable(properties.headers or {}), _REASON: _text(why), _DIED: died_at_us}
    # Such a number may be anything, or nothing; RabbitMQ returns messages by it.
    id_ = f"{(properties.message_id or '')[:100]}.{next(_serial)}"
    made = Basic.Properties(
        content_type=properties.content_type,
        message_id=id_,
        delivery_mode=_PERSISTENT,
        headers=headers,
    )
    return Packed(bytes(delivered.body), made)


def again(delivered: DeliveredMessage) -> Packed:
    """Return what to publish of a message that goes on as it is."""
    properties = delivered.header.properties
    id_ = (properties.message_id or "").partition(".")[0][:100]
    made = Basic.Properties(
        content_type=properties.content_type,
        message_id=f"{id_}.{next(_serial)}",
        delivery_mode=_PERSISTENT,
        priority=properties.priority,
        headers=_sendable({k: v for k, v in _headers_of(delivered).items() if k not in _COUNTS}),
    )
    return Packed(bytes(delivered.body), made)


def _text(reason: str) -> str:
    """Return what can be sent of a reason: an error may quote what is no text."""
    return reason[:_MOST_OF_REASON].encode(errors="replace").decode()


def _sendable(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return headers of another program as they can be sent on.

    The client library reads more than it can write: text that is no UTF-8 comes as bytes, and a
    number may be too large for it. Bytes go on as bytes, and what is left as how it is written.
    """
    found: dict[str, Any] = {}
    for name, value in headers.items():
        kept = bytearray(value) if isinstance(value, bytes) else value
        try:
            encode.field_table({name: kept})
        except Exception:  # noqa: BLE001 - the library raises whatever it meets
            kept = _text(repr(value))
        found[name] = kept
    return found


def _packed(message: Message, headers: dict[str, Any], attempts: int) -> Packed:
    key, body = message.key, message.body
    if attempts:
        headers[_ATTEMPTS] = attempts
    meta = _meta_of(message)
    if len(meta) + (4 * len(key) if key else 0) > _MOST_IN_HEADERS:
        envelope = json.dumps({"key": key, **(json.loads(meta) if meta else {})}).encode()
        headers[_INSIDE] = True
        body = b"".join((len(envelope).to_bytes(_LENGTH_BYTES, "big"), envelope, body))
    else:
        if key is not None:
            headers[_KEY] = key
        if meta:
            headers[_META] = meta
    properties = Basic.Properties(
        message_id=f"{message.id.hex()}.{next(_serial)}",
        delivery_mode=_PERSISTENT,
        priority=message.priority or None,
        headers=headers,
    )
    return Packed(body, properties)


def _meta_of(message: Message) -> str:
    if not message.headers and message.ttl is None:
        return ""
    meta: dict[str, Any] = {"headers": dict(message.headers)} if message.headers else {}
    if message.ttl is not None:
        meta["ttl"] = message.ttl
    return json.dumps(meta, separators=(",", ":"))


def received(delivered: DeliveredMessage, consumer: int) -> Received:
    """Return what was handed over.

    Raises:
        ForeignMessageError: Somebody else has published it.
    """
    headers = _headers_of(delivered)
    before = headers.get(_RETURNS, 0)
    attempts = headers.get(_ATTEMPTS, 0)
    stored = headers.get(_STORED, 0)
    if not all(isinstance(number, int) for number in (attempts, stored, before)):
        raise ForeignMessageError("its headers that begin with molva- are none of Molva's")
    message = _message_of(delivered, headers)
    return Received(message, attempts, stored, consumer, before + _returns(headers))


def _id_of_letter(delivered: DeliveredMessage, died: object) -> bytes:
    """Return an id for what has none: the same each time, and another for each letter."""
    properties = delivered.header.properties
    told = f"{died}/{properties.message_id}/{properties.timestamp}/".encode()
    return blake2b(told + bytes(delivered.body), digest_size=ID_BYTES).digest()


def letter_of(delivered: DeliveredMessage, origin: str) -> DeadLetter:
    """Return a dead letter as it lies in its queue, whoever has put it there."""
    headers = _headers_of(delivered)
    reason, died = headers.get(_REASON), headers.get(_DIED, 0)
    attempts = headers.get(_ATTEMPTS, 0)
    if reason is None:
        reason, attempts = _of_the_server(headers, attempts)
    try:
        message = _message_of(delivered, headers)
    except ForeignMessageError as error:
        reason = f"{reason}; {error}"
        message = Message(bytes(delivered.body), _id_of_letter(delivered, died))
    return DeadLetter(
        message,
        str(reason),
        _number(attempts),
        _number(died),
        origin,
        _number(headers.get(_STORED)),
    )


def _of_the_server(headers: Mapping[str, Any], attempts: int) -> tuple[str, int]:
    """Return what RabbitMQ says about a message that it gave up itself."""
    deaths = headers.get("x-death") or [{}]
    first = deaths[0] if isinstance(deaths[0], dict) else {}
    why = first.get("reason", "unknown")
    return f"RabbitMQ gave it up: {why}", _number(attempts) + _returns(headers)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _headers_of(delivered: DeliveredMessage) -> Mapping[str, Any]:
    return delivered.header.properties.headers or {}


def _returns(headers: Mapping[str, Any]) -> int:
    counts = [headers.get(name, 0) for name in _COUNTS]
    return max((count for count in counts if isinstance(count, int)), default=0)


def _message_of(delivered: DeliveredMessage, headers: Mapping[str, Any]) -> Message:
    properties = delivered.header.properties
    try:
        id_ = bytes.fromhex((properties.message_id or "").partition(".")[0])
        if len(id_) != ID_BYTES:
            raise ForeignMessageError(f"its message_id has no {ID_BYTES} bytes in hex")
        body, key, meta = bytes(delivered.body), headers.get(_KEY), headers.get(_META)
        if headers.get(_INSIDE):
            at = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "big")
            found = json.loads(body[_LENGTH_BYTES:at])
            body, key = body[at:], found.get("key")
        else:
            found = json.loads(meta) if meta else {}
        return Message(
            body,
            id_,
            key,
            found.get("headers") or NO_HEADERS,
            min(properties.priority or 0, MAX_PRIORITY),  # as the server takes it
            ttl=found.get("ttl"),
        ).checked()
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ForeignMessageError(f"it is none of Molva's messages: {error}") from error
