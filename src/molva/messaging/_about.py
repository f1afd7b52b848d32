"""What a structured log keeps of messages, beside the text of a line."""

from collections.abc import Iterable

from molva._base.ids import format_id
from molva.messaging.message import Message

__all__ = ["about", "about_many"]


def about(message: Message, attempt: int) -> dict[str, object]:
    """Return the fields of a line about one hand-over: ``message_id``, ``attempt``."""
    return {"message_id": format_id(message.id), "attempt": attempt}


def about_many(messages: Iterable[Message]) -> dict[str, object]:
    """Return the fields of a line about several messages: ``message_ids``, a list."""
    return {"message_ids": [format_id(message.id) for message in messages]}
