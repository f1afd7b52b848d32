"""Many messages written to a channel at once, and what the server says of each.

The client library publishes one message at a time: a task, a lock and three futures for each, which
take three times as long as writing it. Here a batch is written as one, and there is one future for
all of it. What the library knows of a channel is used as it uses it itself: the next delivery tag,
who waits for which, and which message has which.
"""

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, cast, final

import pamqp.frame
from aiormq.abc import ChannelFrame
from aiormq.channel import Channel
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from molva.messaging.drivers._amqp_messages import Packed

__all__ = ["Batch", "Parcel"]

# Places to which messages go at a time, and more: there is one for each step of a ladder.
_MOST_ADDRESSES: Final = 64


class Parcel(NamedTuple):
    """A message and where it is sent to."""

    packed: Packed
    exchange: str
    routing_key: str


@final
class Batch:
    """Messages that are published together.

    Attributes:
        answers: What became of each, in order: None where it is stored, why it is not, or
            ``Batch.OPEN`` where nobody has said.
    """

    OPEN: Final = object()

    def __init__(self, channel: Channel, parcels: Sequence[Parcel]) -> None:
        self._channel = channel
        self._parcels = parcels
        # By which the client library knows them, and until they are answered.
        self._ids = [str(parcel.packed.properties.message_id) for parcel in parcels]
        self._left = len(parcels)
        self._answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.answers: Final[list[Any]] = [Batch.OPEN] * len(parcels)

    async def publish(self, *, drained: bool) -> None:
        """Write all, and return when all are answered, or when nobody can answer any more.

        Args:
            drained: Whether to write no faster than the server reads. It costs as much as the
                rest, so it is for what fills a socket.
        """
        if not self._parcels:
            return
        # The one who is told first, and once for all of them, when the channel is closed.
        closing = self._channel.closing
        closing.add_done_callback(self._lose)
        try:
            await self._write(drained=drained)
            await self._answered
        finally:
            closing.remove_done_callback(self._lose)
            closing.cancel()

    async def _write(self, *, drained: bool) -> None:
        channel = self._channel
        async with channel.lock:
            # What cannot be written fails alone: the others are numbered without it.
            places, written = self._frames()
            if not places:
                return
            first = channel.delivery_tag + 1
            # The client library's own: it ends when the channel does, whoever writes or not.
            drain = channel.create_future() if drained else None
            # What it calls of a future of its own is all that ours has.
            confirmations = cast("dict[int, _Confirmation]", channel.confirmations)
            for number, place in enumerate(places, first):
                channel.message_id_delivery_tag[self._ids[place]] = number
                confirmations[number] = _Confirmation(self, place)
            channel.delivery_tag += len(places)
            try:
                await channel.write_queue.put(
                    ChannelFrame(b"".join(written), should_close=False, drain_future=drain)
                )
            except BaseException:
                # The server sees none of them, and counts on from where it was.
                channel.delivery_tag = first - 1
                for number, place in enumerate(places, first):
                    confirmations.pop(number, None)
                    self._forget(place)
                raise
            # Who waits for answers that do not come need not keep what was sent.
            self._parcels = ()
            if drain is not None:
                # Where it fails, the channel ends, and that answers all.
                await asyncio.wait((drain,))

    def _frames(self) -> tuple[list[int], list[bytes]]:
        """Return the places of what can be written, and its frames."""
        places, written = [], []
        for place, parcel in enumerate(self._parcels):
            try:
                written.append(_frames_of(parcel, self._channel))
            except Exception as error:  # noqa: BLE001 - it is this message's answer
                self.answer(place, error)
            else:
                places.append(place)
        return places, written

    def answer(self, place: int, problem: BaseException | None) -> None:
        """Take note of what became of one."""
        self._forget(place)
        if self.answers[place] is Batch.OPEN:
            self.answers[place] = problem
            self._left -= 1
            if not self._left and not self._answered.done():
                self._answered.set_result(None)

    def _forget(self, place: int) -> None:
        self._channel.message_id_delivery_tag.pop(self._ids[place], None)

    def _lose(self, closing: "asyncio.Future[object]") -> None:
        """Take note that the channel is gone, and why."""
        error = None if closing.cancelled() else closing.exception()
        for place, found in enumerate(self.answers):
            if found is Batch.OPEN:
                self.answer(place, error or asyncio.CancelledError())


@final
class _Confirmation:
    """What the client library takes for the future of one message."""

    __slots__ = ("_batch", "_place")

    def __init__(self, batch: Batch, place: int) -> None:
        self._batch = batch
        self._place = place

    def done(self) -> bool:
        return self._batch.answers[self._place] is not Batch.OPEN

    def cancelled(self) -> bool:
        # Whoever waited has gone: said, but not loudly.
        return True

    def set_result(self, _: object) -> None:
        self._batch.answer(self._place, None)

    def set_exception(self, problem: BaseException) -> None:
        self._batch.answer(self._place, problem)


def _frames_of(parcel: Parcel, channel: Channel) -> bytes:
    body, number = parcel.packed.body, channel.number
    header = ContentHeader(properties=parcel.packed.properties, body_size=len(body))
    # A server without a limit says 0, of which the client library takes eight off.
    most = channel.max_content_size if channel.max_content_size > 0 else max(1, len(body))
    return b"".join(
        (
            _method(parcel.exchange, parcel.routing_key, number),
            pamqp.frame.marshal(header, number),
            *(
                pamqp.frame.marshal(ContentBody(body[start : start + most]), number)
                for start in range(0, len(body), most)
            ),
        )
    )


@lru_cache(maxsize=_MOST_ADDRESSES)
def _method(exchange: str, routing_key: str, number: int) -> bytes:
    frame = Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=True)
    return pamqp.frame.marshal(frame, number)
