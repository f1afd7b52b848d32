"""The worker: takes ratings from the broker and applies them to the ledger, in batches.

The order of three steps is the whole promise: apply in one transaction, commit, then
acknowledge. A worker that dies in between leaves messages that come again, and their ids
make the second time a no-op. Any number of workers may run; each gets lanes of its own.

What no retry can mend goes to the dead letters with its reason and stops nobody: a body
that is no entry, a campaign that does not exist, a rate outside its scale, an id that was
used for another rating.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar, final

from molva._base.clock import Clock
from molva._base.ids import format_id
from molva._base.outage import Outage
from molva.messaging import (
    Action,
    BrokenBrokerError,
    Delivery,
    LeaseLostError,
    Subscription,
    UnavailableError,
)
from molva.ratings.campaign import Campaign
from molva.ratings.catalog.known import KnownCampaigns
from molva.ratings.catalog.protocol import Catalog, CatalogError
from molva.ratings.ledger.protocol import (
    Ledger,
    LedgerBrokenError,
    LedgerUnavailableError,
    Outcome,
)
from molva.ratings.rating import (
    Change,
    Rating,
    Submission,
    check_comment,
    check_item,
    check_rate,
    decode_entry,
)

__all__ = ["Worker", "WorkerCounters"]

T = TypeVar("T")

_logger: Final = logging.getLogger("molva.ratings")

# Ratings that one transaction takes. Larger ones gain little and keep readers of the
# newest rating waiting.
_BATCH: Final = 1_000
# Seconds to wait for more after a batch that was not full. Under load a few hundred ratings
# then share one commit instead of a dozen; a lone rating is applied at once all the same,
# because the wait comes behind it.
_BREATHER: Final = 0.01
# Seconds that one look for messages waits. Drivers wake at once when one comes.
_WAIT: Final = 5.0


@final
@dataclass(slots=True)
class WorkerCounters:
    """What a worker has done since it started; numbers only ever grow.

    Attributes:
        outcomes: What became of the submissions, by the outcome's name.
        rejected: Messages sent to the dead letters.
        batches: Transactions.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    rejected: int = 0
    batches: int = 0


@final
class Worker:
    """Moves ratings from a subscription into a ledger.

    Args:
        subscription: Where ratings come from.
        ledger: Where they are counted.
        catalog: Where campaigns are looked up.
        clock: Where time comes from.
    """

    def __init__(
        self, *, subscription: Subscription, ledger: Ledger, catalog: Catalog, clock: Clock
    ) -> None:
        self._subscription = subscription
        self._ledger = ledger
        self._clock = clock
        self._campaigns = KnownCampaigns(catalog, clock)
        self._stopping = asyncio.Event()
        self._broker_away = self._outage("no ratings can be taken")
        self._settling_away = self._outage("what was counted cannot be acknowledged")
        self._catalog_away = self._outage("the catalog cannot be read")
        self._ledger_away = self._outage("the ledger takes nothing")
        self.counters: Final = WorkerCounters()

    def stop(self) -> None:
        """End ``run`` after the batch under way."""
        self._stopping.set()

    async def run(self) -> None:
        """Apply ratings until ``stop``. Broker, ledger and catalog may go away and come back.

        Raises:
            LedgerBrokenError: This process must not write to the ledger again; another
                one goes on, with the same messages.
            BrokenBrokerError: Likewise of the broker.
            MessagingError: The broker refuses in a way that does not pass.
        """
        while not self._stopping.is_set():
            deliveries = await self._patiently(self._receive, UnavailableError, self._broker_away)
            if not deliveries:
                continue
            # A ledger may be away for longer than many leases. Without this other workers
            # would take these messages, and wait with them in turn, until good ratings have
            # been handed over too often and are dead letters.
            async with self._subscription.keeping(deliveries):
                await self._process(deliveries)
            if len(deliveries) < _BATCH:
                await self._clock.sleep(_BREATHER)

    async def _receive(self) -> list[Delivery]:
        receiving = asyncio.ensure_future(self._subscription.receive(_BATCH, wait=_WAIT))
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((receiving, stopping), return_when=asyncio.FIRST_COMPLETED)
            # Stopped: whatever was handed over to us meanwhile is given back by `close`.
            return receiving.result() if receiving.done() else []
        finally:
            receiving.cancel()
            stopping.cancel()
            await asyncio.wait((receiving, stopping))

    async def _process(self, deliveries: Sequence[Delivery]) -> None:
        """Apply one batch, then settle it. Left unsettled where we are stopped before."""
        good: list[Delivery] = []
        submissions: list[Submission] = []
        dead: list[tuple[Delivery, str]] = []
        campaigns = await self._look_up()
        if campaigns is None:
            return
        for delivery in deliveries:
            try:
                submissions.append(_read(delivery, campaigns))
                good.append(delivery)
            except ValueError as error:
                dead.append((delivery, str(error)))
        outcomes = await self._apply(submissions)
        if outcomes is None:
            return
        done: list[tuple[Delivery, Action]] = []
        for delivery, outcome in zip(good, outcomes, strict=True):
            reason = _reason(outcome)
            if reason is None:
                done.append((delivery, Action.ACK))
            else:
                dead.append((delivery, reason))
        await self._settle(done, dead)

    async def _look_up(self) -> Mapping[str, Campaign] | None:
        """Return the campaigns, as often as it takes; None where we are stopped meanwhile.

        Never what was known a while ago: a rating of a campaign that is newer than that
        would become a dead letter.
        """
        return await self._patiently(self._campaigns.refresh, CatalogError, self._catalog_away)

    async def _apply(
        self, submissions: Sequence[Submission]
    ) -> Sequence[Outcome | Exception] | None:
        """Apply, as often as it takes; None where we are stopped while it cannot be done."""
        if not submissions:
            return []
        # The same ids make trying again safe. Nothing new is taken meanwhile, so that what
        # waits, waits in the broker and not here.
        outcomes = await self._patiently(
            lambda: self._ledger.apply(submissions, applied_at_us=self._clock.now_us()),
            LedgerUnavailableError,
            self._ledger_away,
        )
        if outcomes is not None:
            self.counters.batches += 1
            for outcome, number in Counter(outcomes).items():
                name = outcome.value if isinstance(outcome, Outcome) else "failed"
                self.counters.outcomes[name] += number
        return outcomes

    async def _patiently(
        self, call: Callable[[], Awaitable[T]], passing: type[Exception], outage: Outage
    ) -> T | None:
        """Call until ``passing`` is not raised any more; None where we are stopped first."""
        while True:
            try:
                result = await call()
            except (LedgerBrokenError, BrokenBrokerError):
                raise  # passes only with this process
            except passing as error:
                if not await outage.wait(error):
                    return None
            else:
                outage.over()
                return result

    def _outage(self, trouble: str) -> Outage:
        return Outage(trouble, logger=_logger, stopping=self._stopping, clock=self._clock)

    async def _settle(
        self, done: Sequence[tuple[Delivery, Action]], dead: Sequence[tuple[Delivery, str]]
    ) -> None:
        # Harmless where the lease is lost: what was applied stays applied, and whoever has
        # the message now finds its id.
        by_reason: dict[str, list[tuple[Delivery, Action]]] = {}
        for delivery, reason in dead:
            by_reason.setdefault(reason, []).append((delivery, Action.REJECT))
        for reason, rejected in by_reason.items():
            await self._settle_patiently(rejected, reason)
        await self._settle_patiently(done)
        if dead:
            self.counters.rejected += len(dead)
            delivery, reason = dead[0]
            # One line a batch: a flood of bad messages must not become a flood of lines.
            _logger.warning(
                "%d of %d messages go to the dead letters; rating %s: %s",
                len(dead),
                len(done) + len(dead),
                format_id(delivery.message.id),
                reason,
            )

    async def _settle_patiently(
        self, settlements: Sequence[tuple[Delivery, Action]], reason: str = ""
    ) -> None:
        """Settle, as often as it takes; left to come again where we are stopped meanwhile."""

        async def settle() -> None:
            with contextlib.suppress(LeaseLostError):
                await self._subscription.settle(settlements, reason=reason)

        await self._patiently(settle, UnavailableError, self._settling_away)


def _read(delivery: Delivery, campaigns: Mapping[str, Campaign]) -> Submission:
    """Return what a message submits.

    Raises:
        ValueError: No retry can make this message count; says why.
    """
    entry = decode_entry(delivery.message.body)
    campaign = campaigns.get(entry.campaign)
    if campaign is None:
        raise ValueError(f"unknown campaign {entry.campaign!r:.80}")
    if isinstance(entry, Rating | Change):
        check_rate(entry.rate, campaign)
    if isinstance(entry, Rating):
        check_item(entry.item)
        if entry.comment is not None:
            check_comment(entry.comment)
    return Submission(delivery.message.id, entry)


def _reason(outcome: Outcome | Exception) -> str | None:
    """Return why a submission goes to the dead letters; None where it is settled."""
    match outcome:
        case Outcome.APPLIED | Outcome.DUPLICATE | Outcome.NO_EFFECT:
            return None
        case Outcome.CONFLICT:
            return "its id was used for another rating, which stands"
        case Outcome.NO_RATING:
            return "it corrects a rating that its campaign does not have"
        case _:
            return f"the ledger cannot take it: {outcome}"
