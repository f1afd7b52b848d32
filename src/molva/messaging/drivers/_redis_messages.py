"""How messages lie in Redis, and under which keys.

An entry of a topic's stream has the fields ``id`` (16 bytes), ``body``, ``key`` where there
is one and, where there is more, ``meta``: a JSON object with ``headers`` and ``ttl``. ``only``
stands behind them where a dead letter was sent back, and names the subscription that it is for.

A queue's message, and what is published to a channel, is one string: the digit of the
priority, the 16 bytes of the id, the length of ``meta`` in four bytes, ``meta`` with ``key``
among it, body.

All keys of a topic or a queue carry its name in braces, so that in a cluster they lie on
one node: ``molva:{topic:ratings}:log``.
"""

import json
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any, Final, final

from molva._base.ids import ID_BYTES
from molva.messaging.message import NO_HEADERS, Message

__all__ = [
    "ForeignEntryError",
    "QueueKeys",
    "TopicKeys",
    "fields_of",
    "fields_text",
    "message_of_fields",
    "message_of_string",
    "meta_of",
    "string_of",
]

_LENGTH_BYTES: Final = 4
_META_AT: Final = 1 + ID_BYTES + _LENGTH_BYTES
_NO_META: Final = bytes(_LENGTH_BYTES)
_PLAIN: Final = b"0"
_DIGITS: Final = tuple(b"%d" % digit for digit in range(10))


class ForeignEntryError(ValueError):
    """What lies there is none of our messages."""


@final
class TopicKeys:
    """The keys of a topic and of one subscription of it."""

    def __init__(self, prefix: str, topic: str, subscription: str = "") -> None:
        start = f"{prefix}:{{topic:{_escaped(topic)}}}:"
        self.log: Final = start + "log"
        self.info: Final = start + "info"
        self.channel: Final = start + "channel"
        behind = f":{subscription}"
        self.later: Final = start + "later" + behind
        self.tries: Final = start + "tries" + behind
        self.wake: Final = start + "wake" + behind
        self.dead: Final = start + "dead" + behind
        self.members: Final = start + "members" + behind


@final
class QueueKeys:
    """The keys of a queue, in the order in which its functions take them."""

    def __init__(self, prefix: str, queue: str) -> None:
        start = f"{prefix}:{{queue:{_escaped(queue)}}}:"
        self.info: Final = start + "info"
        self.wake: Final = start + "wake"
        names = ("messages", "turns", "age", "ready", "held", "delayed")
        self.every: Final = (
            self.info,
            *(start + name for name in names),
            self.wake,
            start + "dead",
            start + "letters",
        )


def _escaped(name: str) -> str:
    """Return a name that cannot be mistaken for the end of the braces."""
    for character in "%{}":
        name = name.replace(character, f"%{ord(character):02X}")
    return name


def meta_of(message: Message) -> bytes:
    """Return a message's headers and time to live; nothing where it has neither."""
    headers, ttl = message.headers, message.ttl
    if not headers and ttl is None:
        return b""
    meta: dict[str, Any] = {}
    if headers:
        meta["headers"] = dict(headers)
    if ttl is not None:
        meta["ttl"] = ttl
    return _json(meta)


def _meta_with_key(message: Message) -> bytes:
    key, headers, ttl = message.key, message.headers, message.ttl
    if not headers and ttl is None:
        # What nearly every message has: written by hand, which is three times as fast.
        return b"" if key is None else b'{"key":%b}' % encode_basestring_ascii(key).encode()
    meta: dict[str, Any] = {} if key is None else {"key": key}
    return _json(meta | json.loads(meta_of(message)))


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _made(
    id_: bytes, body: bytes, meta: bytes, priority: int = 0, key: bytes | None = None
) -> Message:
    found = json.loads(meta) if meta else {}
    return Message(
        body,
        id_,
        found.get("key") if key is None else key.decode(),
        found.get("headers") or NO_HEADERS,
        priority,
        ttl=found.get("ttl"),
    ).checked()


def fields_of(message: Message) -> tuple[bytes | str, ...]:
    """Return the fields of a message's stream entry, names and values."""
    fields: tuple[bytes | str, ...] = ("id", message.id, "body", message.body)
    if message.key is not None:
        fields = (*fields, "key", message.key)
    meta = meta_of(message)
    return (*fields, "meta", meta) if meta else fields


def message_of_fields(fields: Sequence[bytes]) -> tuple[Message, str | None]:
    """Return a stream entry's message, and the only subscription that it is for.

    Raises:
        ForeignEntryError: Somebody else has written it.
    """
    named = dict(zip(fields[::2], fields[1::2], strict=False))
    id_, only = named.get(b"id", b""), named.get(b"only")
    if len(id_) != ID_BYTES:
        raise ForeignEntryError(f"it has no id of {ID_BYTES} bytes")
    try:
        body, meta = named.get(b"body", b""), named.get(b"meta", b"")
        message = _made(id_, body, meta, key=named.get(b"key"))
    except (ValueError, TypeError, AttributeError) as error:
        raise ForeignEntryError(f"its meta cannot be read: {error}") from error
    return message, None if only is None else only.decode()


def fields_text(fields: Sequence[bytes]) -> bytes:
    """Return the fields of a foreign entry, for people."""
    named: Mapping[str, str] = {
        name.decode(errors="replace"): value.decode(errors="replace")
        for name, value in zip(fields[::2], fields[1::2], strict=False)
    }
    return json.dumps(named, ensure_ascii=False).encode()


def string_of(message: Message) -> bytes:
    """Return a message as one string."""
    meta = _meta_with_key(message)
    if not meta:
        return _DIGITS[message.priority] + message.id + _NO_META + message.body
    length = len(meta).to_bytes(_LENGTH_BYTES, "big")
    return b"".join((_DIGITS[message.priority], message.id, length, meta, message.body))


def message_of_string(text: bytes) -> Message:
    """Return the message that a string holds.

    Raises:
        ForeignEntryError: Somebody else has written it.
    """
    if text.startswith(_PLAIN) and text[_META_AT - _LENGTH_BYTES : _META_AT] == _NO_META:
        return Message(text[_META_AT:], text[1 : 1 + ID_BYTES])
    try:
        body_at = _META_AT + int.from_bytes(text[_META_AT - _LENGTH_BYTES : _META_AT], "big")
        if not _META_AT <= body_at <= len(text):
            raise ForeignEntryError("it is too short")
        meta = text[_META_AT:body_at]
        return _made(text[1 : 1 + ID_BYTES], text[body_at:], meta, int(text[:1]))
    except (ValueError, TypeError, AttributeError) as error:
        raise ForeignEntryError(f"it cannot be read: {error}") from error
