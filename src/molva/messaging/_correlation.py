"""What ties a reply to its request: headers, and nothing of any broker.

A request says where its reply goes (``reply-to``: name of a topic), which one it is of
(``correlation-id``) and until when anybody waits for it (``deadline``: RFC 3339, UTC). A
reply repeats the correlation id. One that says why there is no answer carries the kind of
the error in ``error-type``, and the reason as its body.

A request of another program may do without the correlation id: its message id is meant then.
"""

from datetime import UTC, datetime, timedelta
from typing import Final

from molva._base.ids import format_id
from molva.messaging.errors import RejectError, RequestFailedError
from molva.messaging.message import Message

__all__ = [
    "CORRELATION_ID",
    "DEADLINE",
    "ERROR_TYPE",
    "REPLY_TO",
    "as_reply",
    "as_request",
    "deadline_us",
    "error_reply",
    "failure_of",
]

REPLY_TO: Final = "reply-to"
CORRELATION_ID: Final = "correlation-id"
DEADLINE: Final = "deadline"
ERROR_TYPE: Final = "error-type"

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def as_request(message: Message, *, reply_to: str, correlation_id: str, until_us: int) -> Message:
    """Return the message with the headers of a request beside its own.

    Args:
        message: What is asked.
        reply_to: Name of the topic to which the reply goes.
        correlation_id: What the reply will repeat.
        until_us: When nobody waits for it any more: microseconds, UTC.
    """
    until = (_EPOCH + timedelta(microseconds=until_us)).isoformat().replace("+00:00", "Z")
    asking = {REPLY_TO: reply_to, CORRELATION_ID: correlation_id, DEADLINE: until}
    return message.with_headers({**message.headers, **asking})


def deadline_us(request: Message) -> int | None:
    """Return until when somebody waits for the reply: microseconds, UTC; None for ever.

    Raises:
        RejectError: The deadline is no instant.
    """
    text = request.headers.get(DEADLINE)
    if text is None:
        return None
    try:
        until = datetime.fromisoformat(text)
        return (until - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, TypeError):  # TypeError: without a time zone it is no instant
        raise RejectError(
            f"deadline {text!r} is no instant; one is written 2026-01-31T12:00:00Z"
        ) from None


def as_reply(reply: Message, request: Message) -> Message:
    """Return a reply that finds its request."""
    correlation_id = request.headers.get(CORRELATION_ID) or format_id(request.id)
    return reply.with_headers({**reply.headers, CORRELATION_ID: correlation_id})


def error_reply(kind: str, reason: str) -> Message:
    """Return what is answered where there is no answer."""
    # A lone surrogate in an error's text is no reason to answer nothing at all.
    return Message(reason.encode(errors="replace"), headers={ERROR_TYPE: kind})


def failure_of(reply: Message, request_id: bytes) -> RequestFailedError | None:
    """Return the error that a reply tells of; None where it is an answer."""
    kind = reply.headers.get(ERROR_TYPE)
    if kind is None:
        return None
    reason = reply.body.decode(errors="replace")
    return RequestFailedError(request_id, kind=kind, reason=reason)
