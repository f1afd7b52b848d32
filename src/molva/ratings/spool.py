"""The spool: ratings are accepted while the broker is away, and go on when it is back.

Three states, told apart by what ``send`` is:

    with the broker   ``send`` is the broker's own: no look, no lock, no call more than without
    away              ``send`` stores in the outbox, a file of this machine
    closing           the outbox is nearly empty: ``send`` waits until it is, then goes on

A send that fails because the broker cannot be reached, or that has had no answer for a second,
goes into the outbox under the id that it has: perhaps the broker stored it, and the ledger's
ids decide. From then on all go there, at once. Meanwhile the oldest is sent to the broker again
and again, with growing pauses; when it gets through the others follow, in their order. New ones
queue behind them, so nothing overtakes anything; and so that a service under load comes to an
end with it, the last ones are waited for instead of being queued behind.

Which errors mean "away": ``UnavailableError``. A message that is too large and a queue that is
full are answers of a broker that is there, and stay what they are. So does a broker that this
process must not use again (``BrokenBrokerError``): the next process goes on with it.

Rejected: waiting for each send with a time limit, which costs every request a timer; asking
before each send whether the broker is there, which tells of a moment that is over; one spool for
all processes of a machine, whose write lock they would wait for, and whose state each would have
to agree on with the others before every send.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, Self, final

from molva._base.clock import Clock
from molva._base.outage import Outage
from molva.messaging import (
    BrokenBrokerError,
    Message,
    MessageTooLargeError,
    MessagingError,
    QueueFullError,
    Topic,
    UnavailableError,
)
from molva.ratings.outbox import Outbox, OutboxDamagedError, Progress, look_into
from molva.ratings.spool_folder import SpoolFile, SpoolFolder

__all__ = ["ForgetfulLedgerError", "Spool", "SpoolRefusedError", "SpoolSettings", "means_away"]

_logger: Final = logging.getLogger("molva.ratings")

# Seconds that the broker has for an answer before it counts as away. Shorter, and a pause that
# means nothing (a new leader, a slow disk) sends ratings through the outbox, which costs
# duplicates and an fsync; longer, and that is what the first visitors of an outage wait.
_PATIENCE: Final = 1.0
# Seconds between two looks at that. Longer, and it comes on top of the patience.
_LOOK: Final = 0.25
# Ratings that go on in one call. More gains nothing; fewer, and an outbox of hours takes longer.
_BATCH: Final = 1_000
# Ratings in the outbox from which on new ones wait for the others to have gone, instead of
# queuing behind them. More, and they wait for longer than some hundredths of a second; much
# fewer, and under load it is never so few.
_LAST: Final = 1_000
# Seconds between two looks for spools that were left over. What lies there waits for so long,
# but for what is found at the start.
_ADOPT: Final = 30.0
# Seconds for which an id may come again otherwise: a rating that a worker held comes again for
# a day, and clients try again for an hour. What a ledger that forgets ids must know on top of
# what a rating waits here; its own shortest horizon is the same number.
_COMES_AGAIN: Final = 90_000.0


@final
class SpoolRefusedError(MessagingError):
    """The broker is away, and the spool takes no more; the rating was not stored."""


@final
class ForgetfulLedgerError(Exception):
    """The ledger forgets ids before a rating that waited in the spool is sure to have come."""


@final
@dataclass(frozen=True, slots=True)
class SpoolSettings:
    """How ratings are kept while the broker is away.

    Attributes:
        folder: Where.
        limit: How many, for each process.
        hours: For how long. New ones are refused as soon as the oldest has waited so long.
    """

    folder: Path
    limit: int
    hours: float

    def check_horizon(self, horizon_seconds: float | None) -> None:
        """Raise where a ledger forgets ids too early for what may wait here.

        Args:
            horizon_seconds: How long the ledger remembers ids; None for ever.

        Raises:
            ForgetfulLedgerError: A rating could be counted twice.
        """
        needed = self.hours * 3_600 + _COMES_AGAIN
        if horizon_seconds is not None and horizon_seconds < needed:
            most = max(0.0, (horizon_seconds - _COMES_AGAIN) / 3_600)
            raise ForgetfulLedgerError(
                f"ratings may wait in the spool for {self.hours:g} h and come again for 25 h, and "
                f"the ledger remembers ids for {horizon_seconds / 3_600:,.0f} h: one could count "
                f"twice. Give the ledger horizon={round(needed)} or more, or the spool "
                f"--spool-hours {int(most)} or fewer"
            )


class _State(Enum):
    WITH_BROKER = "with the broker"
    AWAY = "away"
    CLOSING = "closing"


def means_away(error: MessagingError) -> bool:
    """Return whether an error of a send means that the broker is away."""
    return isinstance(error, UnavailableError) and not isinstance(error, BrokenBrokerError)


@final
class Spool:
    """Where an HTTP process sends ratings to: the broker, or the outbox while that is away.

    Attributes:
        send: Stores a rating, in the broker or in the outbox. Raises what ``Topic.send``
            raises, and SpoolRefusedError; where what it raised ``means_away``, ``take`` is next.
        broker: Where ratings go; None as long as it was never reached.

    Args:
        outbox: What is in this process's own spool.
        folder: Where those of others are.
        settings: How much is kept.
        broker: The broker, where it is open.
        open_broker: Opens it otherwise, and checks that it is what was asked for.
        clock: Where time comes from.
        on_failure: Called with what ends this process: another one has to go on.
    """

    send: Callable[[Message], Awaitable[None]]

    def __init__(
        self,
        *,
        outbox: Outbox,
        folder: SpoolFolder,
        settings: SpoolSettings,
        broker: Topic | None,
        open_broker: Callable[[], Awaitable[Topic]],
        clock: Clock,
        on_failure: Callable[[Exception], None],
    ) -> None:
        self.broker = broker
        self.refused = 0
        self._outbox = outbox
        self._folder = folder
        self._settings = settings
        self._open_broker = open_broker
        self._clock = clock
        self._on_failure = on_failure
        # What was left over by others and is being sent on.
        self._adopted: Outbox | None = None
        self._left_dead = 0
        self._left_waiting = self._unreadable = 0
        # URLs of those that could not be sent on when that was tried last.
        self._stuck: set[str] = set()
        # Set while there may be something in the outbox; and unless new ratings have to wait.
        self._left, self._open = asyncio.Event(), asyncio.Event()
        self._outage = self._new_outage("the broker is away, and ratings wait in the spool")
        # Whether it is open if the broker takes anything: then one rating is sent to find out.
        self._doubtful = True
        # How many messages the broker holds, where it is back and has no room for what waits here.
        self._full_at: int | None = None
        self._state = _State.AWAY
        if broker is not None and outbox.is_empty:
            self._return()
        else:
            self._leave()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        settings: SpoolSettings,
        *,
        broker: Topic | None,
        open_broker: Callable[[], Awaitable[Topic]],
        clock: Clock,
        on_failure: Callable[[Exception], None],
        options: str = "",
    ) -> "AsyncIterator[Self]":
        """Take a spool and keep it going, for the block.

        Args:
            settings: Where, how many, for how long.
            broker: See the class, as for those that follow.
            open_broker: Opens the broker.
            clock: Where time comes from.
            on_failure: Ends this process.
            options: Further options of this process's queue file, for tests: ``?vfs=…``.

        Raises:
            MessagingError: The spool's file cannot be used.
        """
        folder = SpoolFolder(settings.folder)
        file = folder.take()
        try:
            outbox = await Outbox.open(file.url + options, limit=settings.limit, clock=clock)
            try:
                spool = cls(
                    outbox=outbox,
                    folder=folder,
                    settings=settings,
                    broker=broker,
                    open_broker=open_broker,
                    clock=clock,
                    on_failure=on_failure,
                )
                works = (spool._watch(), spool._empty_own(), spool._adopt())
                tasks = [asyncio.ensure_future(spool._guarded(work)) for work in works]
                try:
                    yield spool
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.wait(tasks)
            finally:
                await outbox.close()
        finally:
            file.release()

    # What is told -----------------------------------------------------------------------

    @property
    def survives(self) -> frozenset[str]:
        """What a rating in the spool outlives."""
        return self._outbox.survives

    @property
    def limit(self) -> int:
        """How many ratings it may hold."""
        return self._settings.limit

    @property
    def is_away(self) -> bool:
        """Whether ratings go into the spool."""
        return self._state is not _State.WITH_BROKER

    @property
    def length(self) -> int:
        """How many ratings wait in this process's spool, and in one that it adopted."""
        return self._outbox.length + (0 if self._adopted is None else self._adopted.length)

    @property
    def left_over(self) -> int:
        """How many ratings wait in spools that nobody holds, as of the last look into them."""
        return self._left_waiting

    @property
    def unreadable(self) -> int:
        """How many spools that nobody holds cannot be read, as of the last look."""
        return self._unreadable

    @property
    def oldest_seconds(self) -> float:
        """Age of the oldest of these; 0 where there is none."""
        boxes = (self._outbox, self._adopted)
        times = [box.oldest_at_us for box in boxes if box is not None]
        known = [time for time in times if time is not None]
        return max(0.0, (self._clock.now_us() - min(known)) / 1e6) if known else 0.0

    @property
    def stored(self) -> int:
        """How many ratings were stored in the spool since this process started."""
        return self._outbox.stored

    @property
    def dead_letters(self) -> int:
        """How many ratings the broker refused for good, in this spool and those left over.

        Those left over as of the last look into them, half a minute ago at most.
        """
        return self._outbox.dead + self._left_dead

    # Storing ----------------------------------------------------------------------------

    async def take(self, message: Message, error: MessagingError) -> None:
        """Keep a rating that the broker could not be given, for an error that ``means_away``.

        Raises:
            SpoolRefusedError: There is no room for it.
            BrokenBrokerError: This process must not write to the spool again.
        """
        if self._state is _State.WITH_BROKER:
            self._leave(error)
        await self._keep(message)

    async def _keep(self, message: Message) -> None:
        """Store a rating in the outbox, behind all that is there."""
        broker, oldest = self.broker, self._outbox.oldest_at_us
        if self._full_at is not None:
            raise QueueFullError(self._full_at)
        if broker is not None and len(message.body) > broker.capabilities.max_body_bytes:
            raise MessageTooLargeError(len(message.body), broker.capabilities.max_body_bytes)
        hours = 0.0 if oldest is None else (self._clock.now_us() - oldest) / 3.6e9
        if hours >= self._settings.hours:
            raise self._refusal(f"ratings have waited in the spool for {hours:.1f} h")
        try:
            await self._outbox.store(message)
        except QueueFullError as error:
            problem = f"the spool holds its limit of {self._settings.limit:,} ratings"
            raise self._refusal(problem) from error
        except UnavailableError as error:
            if not means_away(error):
                raise
            raise self._refusal("the spool cannot be written") from error

    async def _wait_then_send(self, message: Message) -> None:
        """Wait until the last ratings have gone, or the broker has; then go where all go."""
        await self._open.wait()
        await self.send(message)

    def _refusal(self, problem: str) -> SpoolRefusedError:
        self.refused += 1
        return SpoolRefusedError(f"the broker is away, and {problem}; send it again later")

    # States -----------------------------------------------------------------------------

    def _leave(self, error: MessagingError | None = None) -> None:
        """Send into the outbox from now on."""
        self._state, self._doubtful = _State.AWAY, True
        self.send = self._keep
        self._left.set()
        self._open.set()
        if error is not None:
            self._outage.begin(error)

    def _close(self) -> None:
        """Let new ratings wait until the last ones have gone."""
        self._state = _State.CLOSING
        self._open.clear()
        self.send = self._wait_then_send

    def _return(self) -> None:
        """Send to the broker from now on: the outbox is empty, and nothing is on its way in."""
        assert self.broker is not None, "it is open, or nothing could have gone"
        self._state = _State.WITH_BROKER
        self.send = self.broker.send
        self._left.clear()
        self._open.set()
        self._outage.over()

    # Emptying ---------------------------------------------------------------------------

    async def _watch(self) -> None:
        """See to it that a broker that does not answer holds nobody up for long."""
        while True:
            await self._clock.sleep(_LOOK)
            broker = self.broker
            if broker is None or broker.sending_seconds <= _PATIENCE:
                continue
            if self._state is _State.WITH_BROKER:
                self._leave(UnavailableError(f"no answer for {broker.sending_seconds:.1f} s"))
                # Whoever waits is told, and comes to ``take``.
                await broker.give_up()
            elif self._state is _State.CLOSING:
                self._leave()

    async def _empty_own(self) -> None:
        """Send on what is in the outbox, whenever something is."""
        while True:
            await self._left.wait()
            if self._state is _State.WITH_BROKER:
                await self._look_again()
            if self._outbox.is_empty and self._answers():
                self._return()
                continue
            if self._state is _State.AWAY and not self._doubtful and self._outbox.length <= _LAST:
                self._close()
            gone, obstacle = await self._send_on()
            self._full_at = obstacle.capacity if isinstance(obstacle, QueueFullError) else None
            if obstacle is not None:
                self._leave()
                await self._outage.wait(obstacle)
            elif gone:
                self._doubtful = False
                self._outage.over()

    async def _look_again(self) -> None:
        """See whether something is in the outbox after all: a dead letter that was sent back."""
        try:
            await self._outbox.recount()
        except BrokenBrokerError:
            raise  # passes only with this process
        except MessagingError as error:
            _logger.warning("the spool was not looked into: %s", error)
        if not self._outbox.is_empty:
            self._leave()

    def _answers(self) -> bool:
        """Return whether the broker is open, and no call hangs there."""
        return self.broker is not None and self.broker.sending_seconds <= _PATIENCE

    async def _send_on(self) -> Progress:
        """Send some ratings on: the oldest one as long as it is open whether the broker is back."""
        try:
            if self.broker is None:
                self.broker = await self._open_broker()
            return await self._outbox.forward(self.broker, 1 if self._doubtful else _BATCH)
        except BrokenBrokerError:
            raise  # passes only with this process
        except OutboxDamagedError as damaged:
            raise damaged.reason from None  # does not pass at all
        except MessagingError as error:
            return Progress(0, error)

    async def _adopt(self) -> None:
        """Send on what other processes have left over, and what was sent back, now and then."""
        await self._count_left_over()
        while True:
            self._left.set()  # to look into our own, too
            was_away = self.is_away
            await self._empty_left_over()
            await self._count_left_over()
            looked_at = self._clock.monotonic()
            while self._clock.monotonic() - looked_at < _ADOPT:
                await self._clock.sleep(_LOOK)
                if was_away and not self.is_away and self._left_waiting:
                    break

    async def _count_left_over(self) -> None:
        """See how much lies where nobody sends it on, also while the broker is away."""
        waiting = dead = unreadable = 0
        for url, is_held in self._folder.look():
            if is_held:
                continue
            try:
                stat = await look_into(url)
            except (MessagingError, OSError):
                unreadable += 1
                continue
            if url in self._stuck:
                unreadable += 1
            else:
                waiting += stat.pending
                dead += stat.dead
        self._left_waiting, self._left_dead, self._unreadable = waiting, dead, unreadable

    async def _empty_left_over(self) -> None:
        stuck = set()
        with contextlib.closing(self._folder.left_over()) as every:
            for file in every:
                if self.broker is None or self.is_away:
                    return
                try:
                    await self._empty(file)
                except BrokenBrokerError:
                    raise  # passes only with this process
                except (MessagingError, OSError) as error:
                    # Damaged, or of a newer version, or somebody else's. The others go on.
                    _logger.error("%s cannot be sent on: %s", file.folder, error)
                    stuck.add(file.url)
        self._stuck = stuck

    async def _empty(self, file: SpoolFile) -> None:
        """Send on all that lies in a spool that was left over, then remove it.

        What the broker refused for good stays there, and the file with it: to be seen, and to be
        sent on where somebody makes it wait again.
        """
        outbox = await Outbox.open(file.url, limit=None, clock=self._clock)
        self._adopted = outbox
        found = outbox.length
        # They are in ``length`` from now on.
        self._left_waiting = max(0, self._left_waiting - found)
        outage = self._new_outage(f"{file.folder}: what was left over waits")
        try:
            while True:
                if outbox.is_empty:
                    # Counting along does not see a dead letter that is sent back just now.
                    await outbox.recount()
                    if outbox.is_empty:
                        break
                if self.broker is None or self.is_away:
                    await self._clock.sleep(_LOOK)
                    continue
                _, obstacle = await outbox.forward(self.broker, _BATCH)
                if obstacle is not None:
                    await outage.wait(obstacle)
        finally:
            self._adopted = None
            await outbox.close()
        if not outbox.dead:
            file.remove()
        if found:
            _logger.warning(
                "%s: %d ratings that were left over were sent on; %d dead letters are kept there",
                file.folder,
                found,
                outbox.dead,
            )

    async def _guarded(self, work: Awaitable[None]) -> None:
        """Run what must run for as long as this process does."""
        try:
            await work
        except Exception as error:  # noqa: BLE001 - whatever it is, another process has to go on
            _logger.error("the spool cannot go on in this process: %s", error)
            self._on_failure(error)

    def _new_outage(self, trouble: str) -> Outage:
        # Nothing ends a pause early: who ends the spool cancels it.
        return Outage(trouble, logger=_logger, stopping=asyncio.Event(), clock=self._clock)
