"""A topic or a queue in a server, and the consumer of one subscription of it.

Found or made when it is opened, looked at again over each new connection and every few seconds.
What somebody has deleted is made anew, what somebody has changed is set right, and both are
told: neither may pass in silence.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, final

from molva._base.clock import Clock
from molva.messaging.drivers._nats_kept import Kept
from molva.messaging.drivers._nats_messages import Names
from molva.messaging.drivers._nats_opening import NATSServer
from molva.messaging.drivers._nats_streams import (
    APIError,
    Consumer,
    JetStream,
    Stream,
    age_of,
    consumer_settings,
    shown_settings,
    stream_settings,
)
from molva.messaging.errors import (
    IncompatibleBrokerError,
    InUseError,
    MessagingError,
    NotFoundError,
    UnavailableError,
)

__all__ = ["Place"]

_logger: Final = logging.getLogger("molva.messaging")

_DEFAULT_LEASE: Final = 30.0

# Seconds between two times that settled messages are deleted while others are held. Deleting
# makes the server forget what was given back and is due already, until its lease is over; while
# nothing is held there is no such message.
_TRIM: Final = 30.0

# Calls of ``look_after`` after which a consumer is looked at even if nothing was settled.
_SELDOM: Final = 5

# Looks at a consumer, and seconds between two, before it is taken for one that nobody consumes: no
# server tells who does, and a busy one waits for a message at few moments. Fewer, and it is
# removed under the hands of a busy process; more, and whoever removes waits.
_LIFE_LOOKS: Final = 6
_LIFE_PAUSE: Final = 0.2

# How often a consumer is replaced that others make anew meanwhile.
_TRIES: Final = 5


@final
class Place:
    """A topic or a queue, and one consumer of it.

    Args:
        server: Where it is.
        names: What it is called.
        creates: Whether what is missing is made.
        replicas: Copies of a stream that is made; None for one.
        lease: Seconds; None for what the consumer has.
        missing: Makes the error of what is missing and may not be made, out of what it is.
        clock: Where time comes from.
    """

    def __init__(
        self,
        server: NATSServer,
        names: Names,
        *,
        creates: bool,
        replicas: int | None,
        lease: float | None,
        missing: Callable[[str], NotFoundError],
        clock: Clock,
    ) -> None:
        self.names: Final = names
        self.jetstream: Final = JetStream(server.link)
        self._server = server
        self._creates = creates
        self._replicas = replicas or 1
        self._wanted_lease = lease
        self.lease = lease or _DEFAULT_LEASE
        self._missing = missing
        self._clock = clock
        self.kept: Final = Kept(server.link, names, replicas=self._replicas)
        self._stream: Stream | None = None
        self._consumer: Consumer | None = None
        # Whether something was settled that may have to be deleted.
        self.must_trim = False
        self._trimmed = 0
        self._next_trim = clock.monotonic() + _TRIM
        self._looks = 0

    @property
    def takes_batches(self) -> bool:
        """Whether what is stored as one is confirmed behind one sync, as far as was found."""
        found = self._stream
        return self._server.syncs_batches and found is not None and found.takes_batches

    # Opening ----------------------------------------------------------------------------

    async def open(self) -> Stream:
        """Find the stream, or make it."""
        wanted = self._settings()
        if self._creates:
            found = await self.jetstream.ensure_stream(wanted)
            await self.kept.open()
        else:
            found = await self.found_stream()
            if odd := found.throws_away(wanted):
                raise IncompatibleBrokerError(
                    f"nats: {self.names.shown} would not keep what it is given "
                    f"({shown_settings(odd)}); choose a prefix=, or correct stream "
                    f"{self.names.stream!r}"
                )
        self._stream = found
        return found

    def _settings(self) -> dict[str, Any]:
        """Return the settings of the stream, as it would be made now."""
        return stream_settings(
            self.names,
            replicas=self._replicas,
            # Numbers of before mean nothing in a stream that was made anew.
            first=self._clock.now_us() if self._server.numbers_well else None,
            batches=self._server.syncs_batches,
        )

    async def open_consumer(self, start: str = "earliest") -> None:
        """Find the consumer, or make it; give it the lease that was asked for."""
        names = self.names
        found = await self.jetstream.consumer(names.stream, names.consumer)
        if found is None:
            if not self._creates:
                raise self._missing(f"subscription {names.consumer_name!r} of {names.shown}")
            wanted = consumer_settings(names, self.lease, start=start)
            found = await self.jetstream.put_consumer(names.stream, wanted)
        self._consumer = await self._set_right(found, lease=self._wanted_lease)
        self.lease = self._consumer.lease

    async def _set_right(self, found: Consumer, *, lease: float | None) -> Consumer:
        """Give a consumer the settings that it must have."""
        wanted = consumer_settings(self.names, lease or found.lease)
        odd = found.differs_from(wanted)
        if not odd and (lease is None or abs(found.lease - lease) < 1e-6):
            return found
        # Where it began cannot be changed, and matters no more.
        kept = ("deliver_policy", "opt_start_seq", "opt_start_time", "num_replicas")
        settings = {**wanted, **{k: found.settings[k] for k in kept if k in found.settings}}
        if odd:
            shown = shown_settings(odd)
            _logger.warning(
                "nats: consumer %r of %s was changed by somebody else (%s); set right again",
                found.name,
                self.names.shown,
                shown,
            )
        try:
            return await self.jetstream.put_consumer(self.names.stream, settings)
        except UnavailableError as error:
            if not isinstance(error.__cause__, APIError) or not odd:
                raise
            raise IncompatibleBrokerError(
                f"nats: consumer {found.name!r} of {self.names.shown} was changed by somebody "
                f"else, and cannot be set right ({shown}): {error}; delete it, and what was not "
                "settled comes again"
            ) from error

    # Looking ----------------------------------------------------------------------------

    async def look(self) -> bool:
        """Find stream and consumer, or make them anew; return whether they are others now."""
        before, held_by = self._stream, self._consumer
        stream = await self.jetstream.stream(self.names.stream)
        if stream is None:
            stream = await self.open()
            _logger.warning("nats: %s was gone from the server; made anew", self.names.shown)
        else:
            self._tell_what_is_thrown_away(stream)
        self._stream = stream
        if held_by is None:
            return False
        found = await self.jetstream.consumer(self.names.stream, self.names.consumer)
        if found is None:
            await self.open_consumer()
            _logger.warning(
                "nats: consumer %r of %s was gone from the server; made anew, and what is still "
                "stored comes again",
                self.names.consumer,
                self.names.shown,
            )
        else:
            self._consumer = await self._set_right(found, lease=None)
            self._note_lease()
        assert self._consumer is not None
        assert before is not None
        return (before.created, held_by.created) != (stream.created, self._consumer.created)

    def _tell_what_is_thrown_away(self, stream: Stream) -> None:
        # No error: what is here can still be settled, and nobody would be better off.
        if odd := stream.throws_away(self._settings()):
            _logger.error(
                "nats: %s was changed by somebody else and throws away what nobody has settled "
                "(%s); correct it",
                self.names.shown,
                shown_settings(odd),
            )

    async def look_after(self) -> bool:
        """Look at the consumer now and then, and delete what all have settled.

        Returns whether the consumer is another one now.
        """
        self._looks += 1
        if self.must_trim and self.names.kind == "topic":
            return await self._compare(await self.trim())
        if self._looks % _SELDOM:
            return False
        found = await self.jetstream.consumer(self.names.stream, self.names.consumer)
        return await self._compare([] if found is None else [found])

    async def trim(self) -> list[Consumer]:
        """Delete what all subscriptions have settled; return their consumers."""
        if self.names.kind == "queue":
            return []  # the server does it
        # Before they are asked: what is settled meanwhile must be looked at again.
        self.must_trim = False
        try:
            every = await self.jetstream.consumers(self.names.stream)
            floor = min((one.floor for one in every), default=0)
            now = self._clock.monotonic()
            if floor > self._trimmed:
                if any(one.held for one in every) and now < self._next_trim:
                    self.must_trim = True
                    return every
                await self.jetstream.purge(self.names.stream, seq=floor + 1)
                self._trimmed = floor
                self._next_trim = now + _TRIM
        except MessagingError:
            self.must_trim = True
            raise
        return every

    async def _compare(self, every: list[Consumer]) -> bool:
        """Compare our consumer with what it was; return whether it is another one."""
        before = self._consumer
        found = next((one for one in every if one.name == self.names.consumer), None)
        if before is None:
            return False
        if found is None or found.created != before.created:
            return await self.look()
        self._consumer = await self._set_right(found, lease=None)
        self._note_lease()
        return False

    def _note_lease(self) -> None:
        assert self._consumer is not None
        lease = self._consumer.lease
        if abs(lease - self.lease) > 1e-6:
            _logger.warning(
                "nats: the lease of consumer %r of %s is %g s now, and was %g s: it is one for "
                "all its consumers, the one that was given last",
                self.names.consumer,
                self.names.shown,
                lease,
                self.lease,
            )
            self.lease = lease

    # Counting ---------------------------------------------------------------------------

    async def waiting(self, consumer: Consumer) -> tuple[int, float | None]:
        """Return how much waits in a consumer, and the age of the oldest of it."""
        number = consumer.pending + consumer.held
        if not number:
            return 0, None
        asked = {"seq": consumer.floor + 1, "next_by_subj": self.names.subject}
        [oldest] = await self.jetstream.messages(self.names.stream, [asked])
        if oldest is None:
            return number, None
        return number, age_of(str(oldest["time"]), self._clock.now_us())

    async def found_consumer(self) -> Consumer:
        """Return the consumer as it is now. Raises NotFoundError where it is gone."""
        found = await self.jetstream.consumer(self.names.stream, self.names.consumer)
        if found is None:
            raise self._missing(f"subscription {self.names.consumer_name!r} of {self.names.shown}")
        return found

    async def found_stream(self) -> Stream:
        """Return the stream as it is now. Raises NotFoundError where it is gone."""
        found = await self.jetstream.stream(self.names.stream)
        if found is None:
            raise self._missing(self.names.shown)
        return found

    # Removing ---------------------------------------------------------------------------

    async def purge(self) -> int:
        """Remove all that waits here, also what somebody holds; return how much it was."""
        if self.names.kind == "queue":
            return await self.jetstream.purge(self.names.stream)
        # Nothing moves a consumer on, so another takes its place, which begins behind.
        stream, consumer = await self.found_stream(), await self.found_consumer()
        settings = {
            **consumer_settings(self.names, consumer.lease),
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": stream.last + 1,
        }
        await self._replace(settings)
        return consumer.pending + consumer.held

    async def _replace(self, settings: dict[str, object]) -> None:
        async def once() -> bool:
            await self.jetstream.delete_consumer(self.names.stream, self.names.consumer)
            made = await self.jetstream.put_consumer(self.names.stream, settings)
            self._consumer = made
            return made.settings.get("opt_start_seq") == settings["opt_start_seq"]

        if not await _some_time(once):
            raise InUseError(
                f"nats: the consumers of {self.names.shown} make theirs anew while it is replaced; "
                "stop them, then purge"
            )

    async def remove(self) -> bool:
        """Remove the consumer and what is kept for it; return whether there was one."""
        names = self.names
        before: Consumer | None = None
        for look in range(_LIFE_LOOKS):
            if look:
                await asyncio.sleep(_LIFE_PAUSE)
            found = await self.jetstream.consumer(names.stream, names.consumer)
            if found is None:
                return False
            if found.waiting or (before is not None and found.moved != before.moved):
                raise InUseError(
                    f"nats: subscription {names.consumer_name!r} is being consumed; stop its "
                    "consumers, then remove it"
                )
            before = found
        removed = await self.jetstream.delete_consumer(names.stream, names.consumer)
        await self.kept.purge_all()
        return removed


async def _some_time(once: Callable[[], Awaitable[bool]]) -> bool:
    for _ in range(_TRIES):
        if await once():
            return True
    return False
