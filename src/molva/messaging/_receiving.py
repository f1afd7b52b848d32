"""The receiving side: what subscriptions and queues have in common."""

import asyncio
import contextlib
import functools
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Final, TypeVar, cast, final

from molva._base.outage import Outage
from molva._base.waiting import first_of, is_being_cancelled
from molva.messaging._about import about
from molva.messaging._ahead import Ahead
from molva.messaging._batching import Batcher
from molva.messaging._leases import LeaseKeeper
from molva.messaging._opened import Opened
from molva.messaging._retry import Retries
from molva.messaging._running import Runner
from molva.messaging._sharing import SharedReceive
from molva.messaging._watchdog import watched
from molva.messaging.delivery import Delivery
from molva.messaging.driver import (
    AcksMany,
    Action,
    ConsumerDriver,
    DeadLetter,
    FirstDeliveries,
    Outcome,
    Peeked,
    RawDelivery,
    Settlement,
    Token,
)
from molva.messaging.errors import (
    BrokenBrokerError,
    LeaseLostError,
    MessagingError,
    UnavailableError,
)
from molva.messaging.message import Message

__all__ = ["ReceiveCounters", "Receiving"]

T = TypeVar("T")

_logger: Final = logging.getLogger("molva.messaging")

# Seconds that one call to the driver waits for a message before it looks whether it should
# stop. Drivers wake at once; this bounds nothing that a user sees.
_WAIT: Final = 5.0

# How often a message that was in the hands of consumers that died comes alone before it is taken
# for what killed them. Once could be the machine's fault.
_ALONE: Final = 2

# A settlement of a tuple of its fields: one is made for every message, and so it takes half
# the time.
_settlement_of = cast(
    Callable[[tuple[Token, Action, float, str, int]], Settlement],
    functools.partial(tuple.__new__, Settlement),
)


@final
@dataclass(slots=True)
class ReceiveCounters:
    """What a subscription or queue has received since it was opened; they only ever grow.

    Attributes:
        received: Hand-overs of messages.
        redelivered: Those of messages that had been handed over before.
        acked, nacked, rejected, returned: Messages, by how their hand-over ended.
        expired: Messages whose time to live was over; they are dead letters.
        lost: Settlements that came too late, because a lease had run out.
        handled, failed: Handlers that ``run`` ran to their end, and those that raised.
        handler_seconds: Time spent in handlers.
        unavailable: Receives that failed because the broker could not be reached; ``run`` and
            iterating try again.
    """

    received: int = 0
    redelivered: int = 0
    acked: int = 0
    nacked: int = 0
    rejected: int = 0
    returned: int = 0
    expired: int = 0
    lost: int = 0
    handled: int = 0
    failed: int = 0
    handler_seconds: float = 0.0
    unavailable: int = 0


class Receiving(Opened):
    """Hands over messages and settles them: in batches, one after the other, or by handlers.

    Use one of three ways at a time: ``receive`` for batches, ``async for`` for one after
    the other, ``run`` for handlers side by side.
    """

    def _begin_receiving(self, driver: ConsumerDriver, retries: Retries) -> None:
        self._takes_from = driver
        self._retries = retries
        self._aggregate = self._url.aggregate
        self._settles_first = self._url.delivery == "at-most-once"
        self._leased = driver.capabilities.holding != "lane"
        # Lanes narrow down what kills, and what a connection holds has a grace of its driver.
        self._alone = _ALONE if driver.capabilities.holding == "lease" else 0
        self._is_careful = False
        self._stopping = asyncio.Event()
        self._outage = Outage(
            f"{self.name}: nothing can be received",
            logger=_logger,
            stopping=self._stopping,
            clock=self._clock,
        )
        self._drain_seconds: float | None = None
        self.received = ReceiveCounters()
        # Where each settlement is a write, those of many tasks share one. Lanes settle in
        # memory, and a batcher would only cost.
        self._settles = Batcher(self._settle_batch) if self._leased else None
        self._acks = driver if isinstance(driver, AcksMany) and not self._leased else None
        self._shared = SharedReceive(
            driver.receive_batch, give_back=self._return_raw, clock=self._clock
        )

    async def receive(self, limit: int = 1, *, wait: float = _WAIT) -> list[Delivery]:
        """Return up to ``limit`` deliveries; none if none came.

        Returns at once with what is there, and waits up to ``wait`` seconds only while
        there is nothing. Cancelling loses no message.

        Raises:
            UnavailableError: The broker cannot be reached now.
            IncompatibleBrokerError: What is stored there is damaged.
            ClosedError: It was closed.
        """
        self._check_open()
        if limit < 1:
            raise ValueError(f"limit={limit} is refused; at least 1 is accepted")
        wanted = limit if self._aggregate is None else limit * self._aggregate
        receive = self._shared.receive if self._leased else self._takes_from.receive_batch
        deadline = self._clock.monotonic() + wait
        while True:
            try:
                raw = await receive(1 if self._is_careful else wanted, wait=wait)
            except UnavailableError:
                self.received.unavailable += 1
                raise
            except MessagingError:
                raise
            except Exception as error:
                self.received.unavailable += 1
                raise UnavailableError(f"{self._url}: {error}") from error
            self._check_open()  # closed while we waited
            self._is_careful = False
            if not raw:
                return []
            buried = self.received.rejected
            found = await self._deliveries(raw)
            left = deadline - self._clock.monotonic()
            # Where nothing could be buried, the same ones come again.
            if found or (left <= 0 and self.received.rejected == buried):
                return found
            # All of them were expired, or tried too often.
            wait = max(0.0, left)

    async def settle(
        self,
        settlements: Sequence[tuple[Delivery, Action]],
        *,
        delay: float = 0.0,
        reason: str = "",
    ) -> None:
        """Settle several deliveries in one call; those settled before are passed over.

        Args:
            settlements: Each delivery with what becomes of it.
            delay: Seconds before nacked messages come again.
            reason: Why rejected ones are dead letters.

        Raises:
            LeaseLostError: At least one is no longer ours (it names the first); the
                others are settled.
            UnavailableError: The broker cannot be told; all of them may come again.
        """
        self._check_open()
        taken: list[tuple[Delivery, Action]] = []
        plain = True
        for pair in settlements:
            delivery, action = pair
            if delivery.settled:
                continue
            # Marked before the driver is told: the first wins, also of two at once.
            delivery.settled = True
            plain = plain and action is Action.ACK and not delivery._rest
            taken.append(pair)
        if not taken:
            return
        owners = [delivery for delivery, _ in taken]
        try:
            if plain:
                # By the thousand: nearly every batch is done as a whole.
                lost = await self._ack([delivery.token for delivery in owners])
            else:
                items, owners = [], []
                for delivery, action in taken:
                    of_one = self._settlements(delivery, action, delay, reason)
                    items += of_one
                    owners += [delivery] * len(of_one)
                lost = _lost_of(await self._settle(items))
        except BaseException:
            for delivery, _ in taken:
                delivery.settled = False
            raise
        if lost:
            first = owners[lost[0]]
            first.lost = True
            raise LeaseLostError(first.message.id, attempt=first.attempt)

    async def extend(
        self, deliveries: Sequence[Delivery], seconds: float | None = None
    ) -> list[Delivery]:
        """Hold deliveries for ``seconds`` from now; None for another lease.

        ``run`` and iterating do this by themselves while a message is worked on. Where a
        consumer owns what it holds there is nothing to extend, and this tells what is
        still held.

        Returns:
            Those that were lost: another consumer has them, or will. Where one delivery
            was given, that is an error instead.

        Raises:
            LeaseLostError: The only delivery is no longer ours.
            UnavailableError: The broker cannot be told.
        """
        self._check_open()
        if seconds is None:
            seconds = self._takes_from.lease or 0.0
        elif not seconds > 0:
            raise ValueError(f"seconds={seconds} is refused; a lease is extended by more than 0")
        lost = await self._extend(deliveries, seconds)
        if lost and len(deliveries) == 1:
            raise LeaseLostError(lost[0].message.id, attempt=lost[0].attempt)
        return lost

    @contextlib.asynccontextmanager
    async def keeping(self, deliveries: Sequence[Delivery]) -> AsyncIterator[None]:
        """Keep the leases of deliveries alive for as long as the block runs.

        For those that came by ``receive``; ``run`` and iterating do it by themselves. One
        that is lost all the same is marked so: ``Delivery.lost``. Does nothing where a
        consumer owns what it holds.

        Args:
            deliveries: What is worked on; those that are settled meanwhile are let go.
        """
        self._check_open()
        keeper = self._keeper()
        for delivery in deliveries:
            keeper.hold(delivery)
        try:
            yield
        finally:
            await keeper.close()

    async def __aiter__(self) -> AsyncIterator[Delivery]:
        """Yield deliveries one after the other, until ``stop`` or ``close``.

        A broker that goes away is tried again until it is back, as ``run`` does.
        """
        held: deque[Delivery] = deque()
        ahead = Ahead(1, leased=self._leased, limit=self._url.prefetch)
        keeper = self._keeper()
        try:
            while not self._stopping.is_set():
                for delivery in await self._receive_patiently(ahead.size):
                    held.append(delivery)
                    keeper.hold(delivery)
                while held and not self._stopping.is_set():
                    delivery = held.popleft()
                    if delivery.lost:
                        continue
                    began = self._clock.monotonic()
                    yield delivery
                    ahead.note(self._clock.monotonic() - began)
                    keeper.let_go(delivery)
        finally:
            await keeper.close()
            await self._give_back(held)

    async def run(
        self,
        handler: Callable[[Delivery], Awaitable[object]],
        *,
        concurrency: int = 1,
        timeout: float | None = None,
    ) -> None:
        """Run ``handler`` for each delivery until ``stop`` or ``close``.

        A delivery is acknowledged when its handler returns, unless the handler settled
        it. If the handler raises, the message is tried again with growing delays, and
        becomes a dead letter after the last attempt; after a ``RejectError`` at once.
        Messages of one key run one after the other, in order, also across such retries,
        which hold up no other key. Leases are kept alive meanwhile. Cancelling cancels the
        handlers too, and gives their messages back.

        A broker that goes away is tried again, with growing pauses, until it is back; the log
        says when, and ``received.unavailable`` counts the tries. Handlers under way go on;
        what they could not settle comes again.

        Args:
            handler: Called with each delivery.
            concurrency: How many handlers may run at once, ≥ 1.
            timeout: Seconds after which a handler is cancelled, which counts as a failure;
                None lets it take as long as it takes.

        Raises:
            BrokenBrokerError: This process must not use the broker again; another one goes on.
            IncompatibleBrokerError: What is stored there is damaged.
            NotFoundError: What was opened has been removed.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency} is refused; at least 1 is accepted")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout={timeout} is refused; more than 0 seconds is accepted")
        keeper = self._keeper()
        runner = Runner(
            self._traced(handler),
            name=_name_of(handler),
            concurrency=concurrency,
            timeout=timeout,
            ahead=Ahead(concurrency, leased=self._leased, limit=self._url.prefetch),
            leased=self._leased,
            keeper=keeper,
            retries=self._retries,
            give_back=self._give_back,
            stopping=self._stopping,
            clock=self._clock,
            counters=self.received,
        )
        with watched():
            try:
                while room := await runner.room():
                    found = await self._receive_patiently(room)
                    if self._is_careful:
                        await self._run_alone(runner, found)
                        continue
                    for delivery in found:
                        runner.start(delivery)
            except asyncio.CancelledError:
                runner.cancel()
                raise
            finally:
                await runner.finish(self._drain_seconds)
                await keeper.close()

    async def _run_alone(self, runner: Runner, suspects: Sequence[Delivery]) -> None:
        """Run a handler when no other runs, and receive nothing meanwhile.

        Whatever else were in our hands would be taken for the killer as well.
        """
        keeper = self._keeper()
        for delivery in suspects:
            keeper.hold(delivery)
        try:
            await first_of(runner.idle(), self._stopping.wait())
        except BaseException:
            await self._give_back(suspects)
            raise
        finally:
            await keeper.close()
        if self._stopping.is_set():
            await self._give_back(suspects)
            return
        for delivery in suspects:
            runner.start(delivery)
        await first_of(runner.idle(), self._stopping.wait())

    def stop(self, *, timeout: float | None = None) -> None:
        """End iterating and ``run``, after the handlers under way.

        Args:
            timeout: Seconds after which handlers that still run are cancelled, and their
                messages given back; None waits for as long as they take.
        """
        self._drain_seconds = timeout
        self._stopping.set()

    async def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """Return up to ``limit`` dead letters, oldest first."""
        self._check_open()
        return await self._takes_from.dead_letters(limit)

    async def replay(self, ids: Collection[bytes] | None = None, *, limit: int = 1_000_000) -> int:
        """Send dead letters back, to be tried anew; return how many.

        They come to this subscription or queue only, with the ids they always had, and are
        no dead letters any more.

        Args:
            ids: The messages; None for all.
            limit: At most so many, oldest first.
        """
        self._check_can("replay")
        return await self._takes_from.replay(ids, limit)

    async def purge(self, *, dead: bool = False) -> int:
        """Remove all that waits, or with ``dead`` all dead letters; return how many.

        Raises:
            InUseError: Other consumers hold what waits; stop them first.
            UnsupportedFeatureError: This broker cannot.
        """
        self._check_can("purge")
        return await self._takes_from.purge(dead=dead)

    async def peek(self, limit: int = 100) -> list[Peeked]:
        """Return up to ``limit`` waiting messages without taking them, next first."""
        self._check_can("peek")
        return await self._takes_from.peek(limit)

    async def _end_receiving(self) -> None:
        """Settle what is being settled."""
        if self._settles is not None:
            await self._settles.drain()

    # Handing over -----------------------------------------------------------------------

    async def _deliveries(self, raw: Sequence[RawDelivery]) -> list[Delivery]:
        """Make deliveries of what may be handed over; bury the rest."""
        most = self._retries.max_attempts
        counters = self.received
        counters.received += len(raw)
        found: list[Delivery] = []
        buried: list[tuple[Message, Settlement]] = []
        # Looked at by the thousand first: nearly always all of them are new, and for ever.
        first = True
        if isinstance(raw, FirstDeliveries):
            messages, tokens, stored = raw.messages, raw.tokens, raw.stored_at_us
        else:
            messages, attempts, tokens, stored = zip(*raw, strict=True)
            first = attempts.count(1) == len(raw)
        if first and [message.ttl for message in messages].count(None) == len(raw):
            found = list(map(Delivery, messages, repeat(1), tokens, stored, repeat(self)))
            raw = ()
        elif self._alone and not first:
            raw = await self._suspects_apart(raw)
        for message, attempt, token, stored_at_us in raw:
            if attempt > 1 or message.ttl is not None:
                counters.redelivered += attempt > 1
                reason = self._reason_to_bury(message.ttl, attempt, stored_at_us, most)
                if reason:
                    burial = Settlement(token, Action.REJECT, 0.0, reason, attempt - 1)
                    buried.append((message, burial))
                    continue
            found.append(Delivery(message, attempt, token, stored_at_us, self))
        if buried or self._settles_first:
            await self._settle_before(found, buried)
            found = [delivery for delivery in found if not delivery.lost]
        if self._aggregate is not None:
            return self._aggregated(found, self._aggregate)
        return found

    async def _suspects_apart(self, raw: Sequence[RawDelivery]) -> Sequence[RawDelivery]:
        """Return one of those that may kill, alone, or all where there is none.

        Each message that a consumer had in hand when it died was handed over once more, though
        one of them killed it. So those that were too often in such hands come alone a few times
        before they are buried; what was fetched with one goes back, and counts nothing.
        """
        most = self._retries.max_attempts
        suspects = (one for one in raw if 0 < one.attempt - most <= self._alone)
        suspect = next(suspects, None)
        if suspect is None:
            return raw
        # Until something else comes: what would be fetched with the next had to go back, too.
        self._is_careful = True
        try:
            if len(raw) > 1:
                await self._return_raw([one for one in raw if one is not suspect])
        except BaseException:
            await self._return_raw([suspect])
            raise
        return [suspect]

    def _reason_to_bury(self, ttl: float | None, attempt: int, stored_at_us: int, most: int) -> str:
        if ttl is not None:
            age = (self._clock.now_us() - stored_at_us) / 1e6
            if age > ttl:
                self.received.expired += 1
                return f"expired: it waited {age:.1f} s, and was of use for {ttl:g} s"
        if attempt > most + self._alone:
            return (
                f"handed over {attempt - 1} times and never settled; its consumers may have "
                "died of it"
            )
        return ""

    async def _settle_before(
        self, found: list[Delivery], buried: list[tuple[Message, Settlement]]
    ) -> None:
        """Bury what must not be handed over; for at-most-once, acknowledge the rest."""
        items = [burial for _, burial in buried]
        if self._settles_first:
            items += [Settlement(delivery.token, Action.ACK) for delivery in found]
        try:
            outcomes = await self._settle(items)
            if self._settles_first:
                await self._takes_from.flush()
        except BaseException:
            await self._give_back(found)
            raise
        if self._settles_first:
            for delivery, outcome in zip(found, outcomes[len(buried) :], strict=True):
                delivery.settled = True
                delivery.lost = outcome is Outcome.LEASE_LOST
        for (message, burial), outcome in zip(buried, outcomes, strict=False):
            if outcome is Outcome.LEASE_LOST:
                continue  # it comes again
            _logger.error(
                "%s: a message became a dead letter: %s",
                self.name,
                burial.reason,
                extra=about(message, burial.attempt),
            )

    def _aggregated(self, found: list[Delivery], most: int) -> list[Delivery]:
        """Put messages together, in their order, at most ``most`` into one delivery.

        What was tried before travels alone: one poisonous message then takes no others
        with it to the dead letters.
        """
        taken: list[Delivery] = []
        together: list[Delivery] = []

        def put() -> None:
            if together:
                first, *others = together
                first._rest = [
                    RawDelivery(d.message, d.attempt, d.token, d.stored_at_us) for d in others
                ]
                taken.append(first)
                together.clear()

        for delivery in found:
            if delivery.attempt > 1:
                put()
                taken.append(delivery)
                continue
            together.append(delivery)
            if len(together) == most:
                put()
        put()
        return taken

    def _traced(
        self, handler: Callable[[Delivery], Awaitable[object]]
    ) -> Callable[[Delivery], Awaitable[object]]:
        tracing = self._tracing
        if tracing is None:
            return handler
        place = self._place

        async def traced(delivery: Delivery) -> object:
            with tracing.processing(place, delivery):
                return await handler(delivery)

        return traced

    def _keeper(self) -> LeaseKeeper:
        async def extend(held: Sequence[Delivery]) -> list[Delivery]:
            return await self._extend(held, self._takes_from.lease or 0.0)

        return LeaseKeeper(extend, lease=self._takes_from.lease, clock=self._clock)

    async def _receive_patiently(self, limit: int) -> list[Delivery]:
        """Receive as soon as the broker can be reached; return nothing once we are stopped."""
        while True:
            try:
                found = await self._receive_or_stop(limit)
            except BrokenBrokerError:
                raise  # passes only with this process
            except UnavailableError as error:
                if not await self._outage.wait(error):
                    return []
            else:
                if not self._stopping.is_set():
                    self._outage.over()
                return found

    async def _receive_or_stop(self, limit: int) -> list[Delivery]:
        """Receive, but return nothing as soon as somebody stops us."""
        receiving = asyncio.ensure_future(self.receive(limit))
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((receiving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                receiving.cancel()
                await asyncio.wait((receiving,))
        except asyncio.CancelledError:
            # It may have received in the very moment in which we were cancelled.
            if not receiving.cancel() and not receiving.cancelled() and not receiving.exception():
                await self._give_back(receiving.result())
            raise
        finally:
            stopping.cancel()
        if receiving.cancelled() or (self._closed and receiving.exception()):
            return []
        return receiving.result()

    # Settling ---------------------------------------------------------------------------

    def _settlements(
        self, delivery: Delivery, action: Action, delay: float, reason: str
    ) -> list[Settlement]:
        if action is Action.NACK and delivery.attempt >= self._retries.max_attempts:
            action = Action.REJECT
            reason = reason or f"given back at attempt {delivery.attempt}, the last one"
        return delivery.settlements(action, delay=delay, reason=reason)

    async def _ack(self, tokens: Sequence[Token]) -> Sequence[int]:
        """Settle as done; return the places of those that are lost."""
        if self._acks is None:
            same = repeat(Action.ACK), repeat(0.0), repeat(""), repeat(1)
            items = list(map(_settlement_of, zip(tokens, *same)))  # noqa: B905 - those have no end
            return _lost_of(await self._settle(items))
        lost = await self._answer(self._acks.ack_batch(tokens))
        self.received.acked += len(tokens) - len(lost)
        self.received.lost += len(lost)
        return lost

    async def _settle(self, items: Sequence[Settlement]) -> list[Outcome]:
        if self._settles is None:
            return await self._settle_batch(items)
        if len(items) == 1:
            return [await self._settles.submit(items[0])]
        results = await self._settles.submit_many(items)
        if results.count(Outcome.SETTLED) == len(items):
            return cast(list[Outcome], results)
        outcomes = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            outcomes.append(result)
        return outcomes

    async def _settle_batch(self, items: Sequence[Settlement]) -> list[Outcome]:
        outcomes = await self._answer(self._takes_from.settle_batch(items))
        counters = self.received
        # Looked at by the thousand first: nearly always all of them are done, and settled.
        actions = [item.action for item in items]
        if actions.count(Action.ACK) == outcomes.count(Outcome.SETTLED) == len(items):
            counters.acked += len(items)
            return outcomes
        for action, outcome in zip(actions, outcomes, strict=True):
            if outcome is Outcome.LEASE_LOST:
                counters.lost += 1
            elif action is Action.ACK:
                counters.acked += 1
            elif action is Action.NACK:
                counters.nacked += 1
            elif action is Action.REJECT:
                counters.rejected += 1
            else:
                counters.returned += 1
        return outcomes

    async def _extend(self, deliveries: Sequence[Delivery], seconds: float) -> list[Delivery]:
        tokens, owners = [], []
        for delivery in deliveries:
            for token in delivery.tokens:
                tokens.append(token)
                owners.append(delivery)
        outcomes = await self._answer(self._takes_from.extend_batch(tokens, seconds))
        lost: dict[int, Delivery] = {}
        for delivery, outcome in zip(owners, outcomes, strict=True):
            if outcome is Outcome.LEASE_LOST:
                lost[id(delivery)] = delivery
                delivery.lost = not delivery.settled
        return list(lost.values())

    async def _give_back(self, deliveries: Iterable[Delivery], *, delay: float = 0.0) -> None:
        """Let deliveries come again that nobody worked on."""
        if self._closed:
            return
        returned = [
            settlement
            for delivery in deliveries
            if not delivery.settled
            for settlement in delivery.settlements(Action.RETURN, delay=delay)
        ]
        if returned:
            with contextlib.suppress(MessagingError):
                await self._settle(returned)

    async def _answer(self, asked: Awaitable[T]) -> T:
        """Return what the driver answers; what its client raises is of the portable kind."""
        try:
            return await asked
        except MessagingError:
            raise
        except asyncio.CancelledError as error:
            if is_being_cancelled():
                raise
            raise UnavailableError(f"{self._url}: the connection was closed") from error
        except Exception as error:
            raise UnavailableError(f"{self._url}: {error}") from error

    async def _return_raw(self, raw: Sequence[RawDelivery]) -> None:
        if self._closed:
            return  # closing gives everything back
        returned = [Settlement(r.token, Action.RETURN, attempt=r.attempt) for r in raw]
        with contextlib.suppress(MessagingError):
            await self._settle(returned)


def _lost_of(outcomes: Sequence[Outcome]) -> list[int]:
    """Return the places of what is lost."""
    if Outcome.LEASE_LOST not in outcomes:
        return []
    return [place for place, found in enumerate(outcomes) if found is Outcome.LEASE_LOST]


def _name_of(handler: Callable[..., object]) -> str:
    """Return what a handler is called, for people."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    name = getattr(handler, "__qualname__", type(handler).__qualname__)
    return cast(str, name)
