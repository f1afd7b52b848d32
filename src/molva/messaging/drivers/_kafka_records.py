r"""A message as a Kafka record, and back.

What we write is marked: the header ``molva-id`` holds the message's 16 bytes, and only where
it stands is any other ``molva-`` header ours. Nothing is guessed from a body. A message's own
headers are headers of the record under their own names, so that other programs can read
them; those whose names Kafka's clients cannot carry (empty, with a null byte, or beginning
with ``molva-``) travel together as JSON.

A record without the mark is somebody else's, and is read as well as it can be: its id is made
of where it stands, so that it is the same at each hand-over; a key or header that is not
UTF-8 has its odd bytes shown as ``\xff``; a record without a value (a tombstone) has an empty
body and the header ``kafka-tombstone``.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from typing import Any, Final, NamedTuple, cast

from confluent_kafka import Message as Consumed

from molva._base.ids import ID_BYTES, stamp_uuid8
from molva.messaging.driver import DeadLetter
from molva.messaging.message import NO_HEADERS, Message

__all__ = [
    "MAX_OVERHEAD_BYTES",
    "TOMBSTONE",
    "PlainRecord",
    "Record",
    "dead_letter_of",
    "message_of",
    "messages_of",
    "offset_of",
    "partition_of",
    "record_of",
    "record_of_dead",
    "records_of",
    "stored_at_us",
    "stored_at_us_of",
    "topic_of",
]

# Stands in for the value that a tombstone has not.
TOMBSTONE: Final = "kafka-tombstone"

# What a batch of one record takes beside key, headers and body (61 bytes of the batch, at
# most 35 of the record) and what we add to it.
MAX_OVERHEAD_BYTES: Final = 256

_ID: Final = "molva-id"
_OURS: Final = "molva-"
_TTL: Final = "molva-ttl"
_ODD: Final = "molva-headers"
_KEY: Final = "molva-key"
_REASON: Final = "molva-reason"
_ATTEMPTS: Final = "molva-attempts"
_DIED: Final = "molva-died-at-us"
_STORED: Final = "molva-stored-at-us"

Headers = list[tuple[str, bytes]]

# What is asked of each of many records: with ``map`` a loop of the interpreter's own, and half
# the time of calling ``record.offset()`` and the like.
offset_of: Final = cast(Callable[[Any], int], Consumed.offset)
partition_of: Final = cast(Callable[[Any], int], Consumed.partition)
topic_of: Final = cast(Callable[[Any], str], Consumed.topic)
_timestamp_of: Final = cast(Callable[[Any], tuple[int, int]], Consumed.timestamp)
_headers_read: Final = cast(Callable[[Any], Headers], Consumed.headers)
_key_of: Final = cast(Callable[[Any], bytes | None], Consumed.key)
_value_of: Final = cast(Callable[[Any], bytes], Consumed.value)


class Record(NamedTuple):
    """What is produced: a value of None is a tombstone."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers


# The same without names: made by the thousand, in a fifth of the time.
PlainRecord = tuple[str, bytes | None, bytes | None, Headers]


def record_of(topic: str, message: Message) -> Record:
    """Return the record of a message."""
    [record] = records_of(topic, [message])
    return Record(*record)


def records_of(topic: str, messages: Iterable[Message]) -> list[PlainRecord]:
    """Return the record of each message."""
    return [
        (
            topic,
            None if (key := message.key) is None else key.encode(),
            message.body,
            _headers_of(message) if message.headers or message.ttl else [(_ID, message.id)],
        )
        for message in messages
    ]


def _headers_of(message: Message) -> Headers:
    headers = [(_ID, message.id)]
    if message.ttl is not None:
        headers.append((_TTL, repr(message.ttl).encode()))
    odd = {}
    for name, value in message.headers.items():
        if not name or "\0" in name or name.startswith(_OURS):
            odd[name] = value
        else:
            headers.append((name, value.encode()))
    if odd:
        headers.append((_ODD, json.dumps(odd).encode()))
    return headers


def stored_at_us(record: Any) -> int:
    """Return when Kafka, or the sender, says that a record was stored."""
    return max(0, int(record.timestamp()[1])) * 1_000


def stored_at_us_of(records: Sequence[Any]) -> list[int]:
    """Return ``stored_at_us`` of each."""
    times = [time * 1_000 for _, time in map(_timestamp_of, records)]
    return times if not times or min(times) >= 0 else [max(0, time) for time in times]


def messages_of(records: Sequence[Any]) -> list[Message]:
    """Return ``message_of`` of each: at once where all are the usual ones, for they are many.

    Column by column, so that the loops are those of the interpreter: a call of Python's own
    for each would cost more than all else that is done with it.
    """
    try:
        headers = list(map(_headers_read, records))
        values = list(map(_value_of, records))
        ids = [id_ for [(_, id_)] in headers]
        names = [name for [(name, _)] in headers]
        usual = (
            names.count(_ID) == len(records)
            and {ID_BYTES} == set(map(len, ids))
            and {bytes} == set(map(type, values))
        )
        if usual:
            keys = [None if k is None else k.decode() for k in map(_key_of, records)]
            return list(map(Message, values, ids, keys))
    except (TypeError, ValueError):
        pass  # somebody else's are among them
    return list(map(message_of, records))


def message_of(record: Any) -> Message:
    """Return the message of a record that was consumed, whoever wrote it."""
    try:
        headers = record.headers()
    except UnicodeDecodeError:
        headers = [("kafka-headers-unreadable", b"true")]
    value, key = record.value(), record.key()
    if headers and headers[0][0] == _ID and headers[0][1] and value is not None:
        # What only looks like one of ours is a foreign one, whatever stands in its headers.
        with contextlib.suppress(TypeError, ValueError):
            text = None if key is None else key.decode("utf-8", "backslashreplace")
            message = _our_message(value, text, headers)
            message.check()
            return message
    return _foreign_message(record, value, key, headers or ())


def _our_message(value: bytes, key: str | None, headers: Headers) -> Message:
    own: dict[str, str] = {}
    ttl = None
    for name, content in headers[1:]:
        if not name.startswith(_OURS):
            own[name] = _text(content)
        elif name == _TTL:
            ttl = float(content)
        elif name == _ODD:
            own |= json.loads(content)
    return Message(value, headers[0][1], key, own or NO_HEADERS, ttl=ttl)


def _foreign_message(
    record: Any, value: bytes | None, key: bytes | None, headers: Sequence[tuple[str, Any]]
) -> Message:
    own = {name: _text(content) for name, content in headers}
    if value is None:
        own[TOMBSTONE] = "true"
    where = f"{record.topic()}\0{record.partition()}\0{record.offset()}"
    id_ = stamp_uuid8(sha256(where.encode()).digest()[:ID_BYTES])
    text = None if key is None else _text(key)
    return Message(value or b"", id_, text, own or NO_HEADERS)


def _text(content: bytes | None) -> str:
    return "" if content is None else content.decode("utf-8", "backslashreplace")


def record_of_dead(topic: str, place: bytes, letter: DeadLetter) -> Record:
    """Return the record of a dead letter. ``place`` names it among all of its topic."""
    message = letter.message
    headers = _headers_of(message)
    if message.key is not None:
        headers.append((_KEY, message.key.encode()))
    headers += [
        (_REASON, letter.reason.encode()),
        (_ATTEMPTS, b"%d" % letter.attempts),
        (_DIED, b"%d" % letter.died_at_us),
        (_STORED, b"%d" % letter.stored_at_us),
    ]
    return Record(topic, place, message.body, headers)


def dead_letter_of(record: Any, origin: str) -> DeadLetter:
    """Return the dead letter of a record that was consumed."""
    headers: Headers = record.headers() or []
    last = dict(headers)
    key = last.get(_KEY)
    message = _our_message(record.value() or b"", None if key is None else key.decode(), headers)
    return DeadLetter(
        message,
        _text(last.get(_REASON)),
        int(last.get(_ATTEMPTS, b"0")),
        int(last.get(_DIED, b"0")),
        origin,
        int(last.get(_STORED, b"0")),
    )
