"""Dead letters: looked at, sent back, removed.

They lie in a queue, and a queue can only be consumed. So whoever looks takes them and gives them
back: alone, since two who take at once each see half. Quorum queues know no exclusive consumers;
the lock is another queue, which belongs to one connection for as long as it is there, and whoever
finds it taken tries again. What was taken goes back to its place when its channel is closed, in
order; given back by number it would come in any. A looker that dies does both by dying.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Final

from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from aiormq.exceptions import ChannelLockedResource

from molva.messaging.driver import DeadLetter
from molva.messaging.drivers._amqp_link import ANSWER, AMQPLink, translated
from molva.messaging.drivers._amqp_messages import Packed, again, letter_of, pack
from molva.messaging.drivers._amqp_options import Names
from molva.messaging.drivers._amqp_sender import AMQPSender, Parcel
from molva.messaging.drivers._amqp_topology import ready_in
from molva.messaging.errors import UnavailableError

__all__ = ["dead_letters_of", "move", "purge_dead", "replay_dead"]

# Seconds before it is tried again whether somebody else is done looking, and in which it must be.
_PAUSE: Final = 0.05
_TURN: Final = 10.0
# How many looks in a row must find nothing more. Fewer, and what comes back just then is missed.
_QUIET: Final = 2
# What AMQP lets a consumer hold at once.
_MOST: Final = 65_535
# Letters that are sent back, or compared with what was asked for, at once.
_BATCH: Final = 500
# Messages that are moved at once, where they are small, and bytes of them. Fewer, and a turn's
# waits cost more than what is moved in it.
_MOVED: Final = 2_000
_MOVED_BYTES: Final = 16_000_000


async def dead_letters_of(link: AMQPLink, names: Names, limit: int) -> list[DeadLetter]:
    """Return up to ``limit`` dead letters, oldest first; at most the 65,535 oldest."""
    async with _taken(link, names.dead, limit) as (_, letters):
        # They go back when the channel closes, all of them at once.
        return [letter_of(letter, names.origin) for letter in letters]


async def replay_dead(
    link: AMQPLink, sender: AMQPSender, names: Names, ids: Collection[bytes] | None, limit: int
) -> int:
    """Send dead letters back to where they waited; return how many."""
    wanted = None if ids is None else set(ids)
    number = 0
    while number < limit and (wanted is None or wanted):
        # Those that are not wanted go back to where they were, and come first the next time.
        some = _MOST if wanted is not None else min(_BATCH, limit - number)
        async with _taken(link, names.dead, some) as (channel, letters):
            sent = await _sent_back(channel, sender, names, letters, wanted, limit - number)
        number += sent
        if not sent or wanted is not None:
            break
    return number


async def _sent_back(
    channel: Channel,
    sender: AMQPSender,
    names: Names,
    letters: list[DeliveredMessage],
    wanted: set[bytes] | None,
    limit: int,
) -> int:
    chosen: list[tuple[DeliveredMessage, Packed]] = []
    for delivered in letters:
        letter = letter_of(delivered, names.origin)
        if len(chosen) < limit and (wanted is None or letter.message.id in wanted):
            chosen.append((delivered, pack(letter.message, letter.stored_at_us)))
    failed = await _passed_on(channel, sender, chosen, names.main, letters)
    if failed is not None:
        raise UnavailableError(f"dead letters were not sent back: {failed}") from failed
    return len(chosen)


async def move(
    link: AMQPLink, sender: AMQPSender, source: str, target: str, *, growing: bool = False
) -> None:
    """Move all that lies in a queue to another, as it is.

    ``growing``: where others still send to it, what was there at first and no more. They may
    send faster than anything can be moved.
    """
    moved, most, some = 0, None, _BATCH
    while most is None or moved < most:
        channel = await link.channel()
        with translated(link.address):
            there = await ready_in(channel, source)
            if not there:
                return
            await channel.close()
        if growing and most is None:
            most = there
        async with _taken(link, source, some) as (held, found):
            moved += len(found)
            size = sum(len(delivered.body) for delivered in found)
            some = max(1, min(_MOVED, _MOVED_BYTES * len(found) // max(1, size)))
            chosen = [(delivered, again(delivered)) for delivered in found]
            failed = await _passed_on(held, sender, chosen, target, found)
            if failed is not None:
                raise UnavailableError(f"{source!r} was not moved: {failed}") from failed


async def _passed_on(
    channel: Channel,
    sender: AMQPSender,
    chosen: Sequence[tuple[DeliveredMessage, Packed]],
    target: str,
    taken: Sequence[DeliveredMessage],
) -> Exception | None:
    """Move some of what was taken to another queue; return why the first that stays does.

    Stored first, then removed: at every moment it is in one of the two, at worst in both.
    """
    results = await sender.publish([Parcel(packed, "", target) for _, packed in chosen])
    stored = [d for (d, _), problem in zip(chosen, results, strict=True) if problem is None]
    await _remove(channel, stored, taken)
    return next((problem for problem in results if problem is not None), None)


async def _remove(
    channel: Channel, done: Sequence[DeliveredMessage], taken: Sequence[DeliveredMessage]
) -> None:
    """Acknowledge some of what was taken; return when it is removed.

    A quorum queue's side of a channel sends 32 acknowledgements on and keeps the rest until the
    queue has answered: a channel that is closed meanwhile takes them along, and what was done
    with comes once more. So the first ones, mostly all, are acknowledged by one, and the rest is
    waited for.
    """
    wanted = {delivered.delivery_tag or 0 for delivered in done}
    upto = 0
    for delivered in taken:
        if delivered.delivery_tag not in wanted:
            break
        upto = delivered.delivery_tag
        wanted.discard(upto)
    if upto:
        await channel.basic_ack(upto, multiple=True, wait=False)
    for tag in sorted(wanted):
        await channel.basic_ack(tag, wait=False)
        await _read(channel)
    if wanted:
        await asyncio.sleep(_PAUSE)
    else:
        await _read(channel)


async def _read(channel: Channel) -> None:
    """Return when the server has read what was written: this is answered after it."""
    async with asyncio.timeout(ANSWER):
        await channel.basic_qos(prefetch_count=0)


async def purge_dead(link: AMQPLink, names: Names) -> int:
    """Remove all dead letters; return how many there were."""
    channel = await link.channel()
    with translated(link.address):
        async with asyncio.timeout(ANSWER):
            found = await channel.queue_purge(names.dead)
            await channel.close()
    return found.message_count or 0


@contextlib.asynccontextmanager
async def _taken(
    link: AMQPLink, queue: str, limit: int
) -> AsyncIterator[tuple[Channel, list[DeliveredMessage]]]:
    """Take up to ``limit`` messages of a queue, oldest first, alone; what is left goes back."""
    window = min(limit, _MOST)
    async with _alone(link, queue) as channel:
        found: list[DeliveredMessage] = []

        async def take(message: DeliveredMessage) -> None:
            found.append(message)

        with translated(link.address):
            async with asyncio.timeout(_TURN):
                await channel.basic_qos(prefetch_count=window)
                await channel.basic_consume(queue, take)
                seen, quiet = -1, 0
                # What is ready is on its way here, and what another looker has just given back
                # is on its way to being ready.
                while len(found) < window and quiet < _QUIET:
                    there = len(found) + (await ready_in(channel, queue) or 0)
                    quiet = quiet + 1 if there == seen == len(found) else 0
                    seen = there
                    await asyncio.sleep(_PAUSE)
            # More comes as these are settled, and is nobody's business.
            yield channel, found[:window]


@contextlib.asynccontextmanager
async def _alone(link: AMQPLink, queue: str) -> AsyncIterator[Channel]:
    """Give a channel to whoever looks into a queue, one at a time."""
    deadline = asyncio.get_running_loop().time() + _TURN
    lock = f"{queue}.look"
    async with link.looking:
        while True:
            channel = await link.channel()
            with translated(link.address):
                try:
                    async with asyncio.timeout(ANSWER):
                        await channel.queue_declare(lock, exclusive=True)
                        taking = await link.channel()
                    break
                except ChannelLockedResource as taken:
                    if asyncio.get_running_loop().time() > deadline:
                        raise UnavailableError(
                            f"{link.address}: somebody else has looked into {queue!r} for "
                            f"{_TURN:.0f} s; try again"
                        ) from taken
            await asyncio.sleep(_PAUSE)
        try:
            yield taking
        finally:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(ANSWER):
                    await taking.close()
                    # Back before the lock is free, or the next one finds nothing.
                    await asyncio.sleep(_PAUSE)
                    await channel.queue_delete(lock)
                    await channel.close()
