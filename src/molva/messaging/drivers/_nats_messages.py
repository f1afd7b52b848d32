"""How messages lie in NATS, and under which names.

A message's body is the payload. The header ``Nats-Msg-Id``, by which a server knows what was sent
twice, is its id in hexadecimal and a checksum of all else: another message under an id that was
taken is none that was sent twice, and a server that took it for one would drop it without a word.
Where there is more than an id, ``Molva`` holds it as JSON: ``key``,
``headers`` and ``ttl``; and ``id`` and ``only`` where a dead letter was sent back, which must
not be taken for what was sent twice, and is for one subscription alone.

A dead letter has a subject of its own, ``…dead.SUBSCRIPTION.ID.SEQUENCE``: stored twice it is
there once. Why it died is in the header ``Molva-Dead``.

A stream, a consumer and a part of a subject may hold neither dots nor spaces nor wildcards. So
whatever is not a letter, a digit or a hyphen becomes ``=`` and its bytes in hexadecimal, and
what is then too long is cut, and told from others by its digest. What it was called stands in
the description of the stream or consumer.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from json.encoder import encode_basestring_ascii
from typing import Any, Final, final

from nats.aio.msg import Msg

from molva._base.ids import ID_BYTES
from molva.messaging.driver import DeadLetter
from molva.messaging.errors import MessageTooLargeError
from molva.messaging.message import NO_HEADERS, Message

__all__ = [
    "MSG_ID",
    "ForeignMessageError",
    "Names",
    "dead_headers_of",
    "dead_letter_of",
    "encoded",
    "fitting",
    "foreign",
    "headers_of",
    "message_of",
    "only_of",
    "replay_headers_of",
    "too_large",
]

MSG_ID: Final = "Nats-Msg-Id"
_META: Final = "Molva"
_DEAD: Final = "Molva-Dead"

# Characters of a name beyond which it is cut. A file's name has 255, and a stream's is one.
_LONGEST: Final = 120
_DIGEST: Final = 20

# Bytes of a reason that are kept at most, as they stand in a header, where one character may
# take twelve: a letter must fit where its message did.
_LONGEST_REASON: Final = 1_500
# Characters of an id, and of the checksum behind it.
_ID_DIGITS: Final = 2 * ID_BYTES
_SUM_DIGITS: Final = 8
# Headers that tell of a sending, and not of the message: a traced one that is sent again has
# another span, and is the same.
_OF_A_SENDING: Final = frozenset({"traceparent", "tracestate", "baggage"})
# Bytes of the headers of a message that has an id only, and of another one beside its value.
_PLAIN_BYTES: Final = len(f"NATS/1.0\r\n{MSG_ID}: -\r\n\r\n") + _ID_DIGITS + _SUM_DIGITS
_META_BYTES: Final = len(f"{_META}: \r\n")


class ForeignMessageError(ValueError):
    """What lies there is none of our messages."""


@final
class Names:
    """What a topic or a queue is called in the server.

    Args:
        prefix: What all begins with.
        kind: ``topic`` or ``queue``.
        name: What it is called.
        consumer: What the subscription is called; of a queue there is one.
    """

    def __init__(self, prefix: str, kind: str, name: str, consumer: str = "") -> None:
        what = encoded(name)
        self.kind: Final = kind
        self.name: Final = name
        self.consumer_name: Final = consumer
        # Letters, digits and hyphens on both sides of an underscore: no two can be the same.
        self.stream: Final = f"{prefix}_{kind}_{what}"
        self.subject: Final = f"{prefix}.{kind}.{what}"
        self.kept_stream: Final = f"{prefix}_{kind}-kept_{what}"
        self._kept = f"{prefix}.{kind}-kept.{what}"
        self.kept_subjects: Final = f"{self._kept}.>"
        self.consumer: Final = encoded(consumer) if consumer else "all"
        self.channel: Final = f"{prefix}.channel.{what}"

    @property
    def origin(self) -> str:
        """Return where a message waited, for people."""
        if self.kind == "queue":
            return f"queue {self.name}"
        return f"topic {self.name}, subscription {self.consumer_name}"

    @property
    def shown(self) -> str:
        """Return what it is, for people."""
        return f"{self.kind} {self.name!r}"

    def dead(self, id_: str = "*", sequence: int | str = "*") -> str:
        """Return the subject of a dead letter, or of all."""
        return f"{self._kept}.dead.{self.consumer}.{id_}.{sequence}"

    def tries(self, id_: str = "*", sequence: int | str = "*") -> str:
        """Return the subject of what is known of a message's attempts, or of all."""
        return f"{self._kept}.tries.{self.consumer}.{id_}.{sequence}"


def encoded(name: str) -> str:
    """Return a name that NATS takes; no two names have the same."""

    def hexadecimal(match: re.Match[str]) -> str:
        return "".join(f"={byte:02X}" for byte in match[0].encode())

    found = re.sub(r"[^A-Za-z0-9-]", hexadecimal, name)
    if len(found) <= _LONGEST:
        return found
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGEST]
    # Two equals signs stand in no other.
    return f"{found[: _LONGEST - _DIGEST - 2]}=={digest}"


def headers_of(message: Message) -> dict[str, str]:
    """Return the headers of a message that is sent."""
    key = message.key
    if message.headers or message.ttl is not None:
        found = _meta_of(message)
        meta = same = _json(found)
        if not _OF_A_SENDING.isdisjoint(message.headers):
            of_it = message.headers.items()
            found["headers"] = {name: text for name, text in of_it if name not in _OF_A_SENDING}
            same = _json(found)
    elif key is None:
        return {MSG_ID: f"{message.id.hex()}-{zlib.crc32(message.body):08x}"}
    else:
        # What nearly every message has: written by hand, which is three times as fast.
        meta = same = f'{{"key":{encode_basestring_ascii(key)}}}'
    checksum = zlib.crc32(same.encode(), zlib.crc32(message.body))
    return {MSG_ID: f"{message.id.hex()}-{checksum:08x}", _META: meta}


def too_large(
    message: Message, headers: Mapping[str, str], limit: int
) -> MessageTooLargeError | None:
    """Return why a message does not fit into ``limit`` bytes with its headers; None if it does."""
    meta, size = headers.get(_META), len(message.body)
    around = _PLAIN_BYTES + (0 if meta is None else len(meta) + _META_BYTES)
    if size + around <= limit:
        return None
    return MessageTooLargeError(size, max(0, limit - around))


def message_of(msg: Msg) -> Message:
    """Return the message that was stored.

    Raises:
        ForeignMessageError: Somebody else has written it.
    """
    headers = msg.headers
    if not headers:
        raise ForeignMessageError(f"it has no header {MSG_ID}")
    meta = headers.get(_META)
    try:
        if meta is None:
            return Message(msg.data, _id_in(headers[MSG_ID]))
        return _made(msg.data, headers.get(MSG_ID, ""), json.loads(meta))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise ForeignMessageError(
            f"its header {MSG_ID} is no id of {ID_BYTES} bytes, or {_META} cannot be read"
        ) from None


def only_of(msg: Msg) -> str | None:
    """Return the only subscription that a message is for; None where it is for all."""
    meta = (msg.headers or {}).get(_META, "")
    if '"only"' not in meta:
        return None
    found = json.loads(meta).get("only")
    return None if found is None else str(found)


def foreign(msg: Msg, sequence: int) -> Message:
    """Return what somebody else has written, as a message: its id stays the same."""
    return Message(msg.data, sequence.to_bytes(ID_BYTES, "big"))


def replay_headers_of(letter: DeadLetter, only: str, number: int) -> dict[str, str]:
    """Return the headers of a dead letter that is sent back: the ``number``-th stored one."""
    message = letter.message
    meta = {**_meta_of(message), "id": message.id.hex(), "only": only}
    return {MSG_ID: f"{message.id.hex()}-again-{number}", _META: _json(meta)}


def dead_headers_of(letter: DeadLetter) -> dict[str, str]:
    """Return the headers of a dead letter that is stored."""
    message = letter.message
    about = {
        "reason": _cut(letter.reason),
        "attempts": letter.attempts,
        "died_at_us": letter.died_at_us,
        "stored_at_us": letter.stored_at_us,
    }
    meta = {**_meta_of(message), "id": message.id.hex()}
    return {_META: _json(meta), _DEAD: _json(about)}


def fitting(letter: DeadLetter, most: int) -> DeadLetter:
    """Return a letter that a server takes: what others stored may leave no room for a reason.

    ``most``: bytes of a message, headers and all, that it takes. What does not fit is cut off
    the end of the body, and told.
    """
    lines = (f"{name}: {value}\r\n" for name, value in dead_headers_of(letter).items())
    beyond = len("NATS/1.0\r\n\r\n") + sum(map(len, lines)) + len(letter.message.body) - most
    if beyond <= 0:
        return letter
    m = letter.message
    told = f"{_cut(letter.reason, _LONGEST_REASON // 2)}; the end of its {len(m.body)} bytes is cut"
    body = m.body[: max(0, len(m.body) - beyond - len(told))]
    kept = Message(body, m.id, m.key, m.headers, m.priority, ttl=m.ttl)
    return replace(letter, message=kept, reason=told)


def _cut(reason: str, most: int = _LONGEST_REASON) -> str:
    found = reason[:most]
    while (size := len(encode_basestring_ascii(found))) > most:
        found = found[: len(found) * most // size]
    return found


def dead_letter_of(msg: Msg, origin: str) -> DeadLetter:
    """Return the dead letter that was stored."""
    about = json.loads((msg.headers or {})[_DEAD])
    return DeadLetter(
        message_of(msg),
        about["reason"],
        about["attempts"],
        about["died_at_us"],
        origin,
        about["stored_at_us"],
    )


def _meta_of(message: Message) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    if message.key is not None:
        meta["key"] = message.key
    if message.headers:
        meta["headers"] = dict(message.headers)
    if message.ttl is not None:
        meta["ttl"] = message.ttl
    return meta


def _made(body: bytes, id_: str, meta: dict[str, Any]) -> Message:
    found = _id_in(meta.get("id", id_))
    headers = meta.get("headers") or NO_HEADERS
    return Message(body, found, meta.get("key"), headers, ttl=meta.get("ttl")).checked()


def _id_in(text: str) -> bytes:
    """Return the id at the beginning; raise ValueError or TypeError where there is none."""
    found = bytes.fromhex(text[:_ID_DIGITS])
    if len(found) != ID_BYTES or text[_ID_DIGITS : _ID_DIGITS + 1] not in ("", "-"):
        raise ValueError
    return found


def _json(value: object) -> str:
    # ASCII: a header's value may hold no line's end, and some clients read no more.
    return json.dumps(value, separators=(",", ":"))
