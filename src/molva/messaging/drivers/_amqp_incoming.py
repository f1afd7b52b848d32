"""What a channel is sent: deliveries to whoever takes them, all else to the client library.

The client library passes each frame on by a queue and each delivery by a task. What comes by the
thousand costs more on that way than in all the rest of it, so a channel's queue of frames is
replaced by one that takes deliveries out where they are put in.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, final

from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader

__all__ = ["take_deliveries"]

# Deliveries after which others have a turn. What has come already is read without a pause.
_TURN: Final = 64


def take_deliveries(channel: Channel, take: Callable[[DeliveredMessage], None]) -> None:
    """Hand what a channel's consumers are sent to ``take``, in order and at once.

    Call it before the first consumer is made. Where ``take`` raises, the connection ends, and all
    that it held comes again: what nobody has taken in must not be acknowledged with others.
    """
    # What the client library calls of its queue is all that ours has.
    channel.frames = _Frames(channel, take)  # type: ignore[assignment]


@final
class _Frames:
    def __init__(self, channel: Channel, take: Callable[[DeliveredMessage], None]) -> None:
        self._channel = channel
        self._take = take
        self._others = channel.frames
        # Who reads it has begun to.
        self.get: Final = self._others.get
        self.task_done: Final = self._others.task_done
        # A delivery of which not all has come.
        self._delivery: Basic.Deliver | None = None
        self._header: ContentHeader | None = None
        self._parts: list[bytes] = []
        self._left = 0
        self._taken = 0

    async def put(self, item: tuple[int, Any]) -> None:
        """Take in one frame. The three kinds of a delivery come together: nothing is between."""
        frame = item[1]
        if isinstance(frame, Basic.Deliver):
            self._delivery, self._header = frame, None
            return
        if self._delivery is None:
            await self._others.put(item)
            return
        if isinstance(frame, ContentHeader):
            self._header, self._parts, self._left = frame, [], frame.body_size or 0
        elif isinstance(frame, ContentBody) and self._header is not None:
            self._parts.append(frame.value)
            self._left -= len(frame.value)
        else:
            # It ends here: a channel may be closed in between.
            self._delivery = None
            await self._others.put(item)
            return
        if self._left <= 0:
            await self._complete(self._delivery, self._header)

    async def _complete(self, delivery: Basic.Deliver, header: ContentHeader) -> None:
        body = b"".join(self._parts)
        self._delivery, self._header, self._parts = None, None, []
        message = DeliveredMessage(
            delivery=delivery, header=header, body=body, channel=self._channel
        )
        self._take(message)
        self._taken += 1
        if self._taken % _TURN == 0:
            await asyncio.sleep(0)
