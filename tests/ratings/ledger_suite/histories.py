"""Whatever happened, every total at every moment is the reference's."""

import asyncio
import random
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings

from molva.ratings.ledger import Ledger, LedgerEntry, LedgerUnsupportedError
from molva.ratings.rating import Submission
from molva.ratings.totals import total
from tests.ratings.ledger_suite.harness import LedgerHarness, Suite, differences, entries
from tests.ratings.ledger_suite.reference import Reference
from tests.ratings.ledger_suite.submissions import HISTORIES, apply, long_history, rating

__all__ = ["Histories"]

_CORRECTIONS = ("change", "retraction", "exclusion", "restoration")


class Histories(Suite):
    def test_any_history_reads_as_the_reference_at_every_moment(
        self, harness: LedgerHarness
    ) -> None:
        @settings(
            max_examples=harness.examples, deadline=None, suppress_health_check=[*HealthCheck]
        )
        @given(HISTORIES)
        def compare(history: list[list[Submission]]) -> None:
            asyncio.run(compare_everything(harness, history))

        compare()

    @pytest.mark.parametrize("seed", [1, 2])
    async def test_a_long_history_reads_as_the_reference(
        self, harness: LedgerHarness, seed: int
    ) -> None:
        random_ = random.Random(seed)
        history = list(long_history(random_, harness.long))
        async with harness.opened() as ledger:
            reference = Reference(ledger.capabilities.ids)
            at = 0
            while at < len(history):
                batch = history[at : at + random_.choice([1, 7, 300])]
                at += len(batch)
                assert await apply(ledger, *batch) == [reference.apply(s) for s in batch]
            log = reference.entries["c"]
            for _ in range(300):
                as_of = random_.choice([None, random_.randint(1, len(log))])
                item = random_.choice([None, "hot", "item-3"])
                n = random_.choice([1, 3, 10, 100, 1_000, 10_000])
                for trusted in (True, False):
                    await compare_total(ledger, log, item=item, n=n, as_of=as_of, trusted=trusted)
            assert await differences(ledger) == []
        await compare_rebuild(harness)

    async def test_sums_stay_exact_far_beyond_what_a_float_adds_up(
        self, harness: LedgerHarness
    ) -> None:
        """A running average kept as a float is wrong in its last digits, and stays so."""
        rates = [1_000_000, 1, -1_000_000, 3, 999_983, 7, 1, 1, 2]
        async with harness.opened() as ledger:
            for at in range(0, 900, 9):
                await apply(ledger, *(rating(at + i, r) for i, r in enumerate(rates)))
            for n in (1, 3, 7, 10, 100, 899, 900):
                found = await ledger.total("c", n=n)
                assert found is not None
                assert (found.sum, found.n) == (sum((rates * 100)[-n:]), n)
                assert found.average == sum((rates * 100)[-n:]) / n


async def compare_everything(harness: LedgerHarness, history: list[list[Submission]]) -> None:
    await harness.reset()
    reference: Reference | None = None
    for batch in history:
        # Opened anew for each batch: nothing may live in memory alone.
        async with harness.opened() as ledger:
            reference = reference or Reference(ledger.capabilities.ids)
            expected = [reference.apply(submission) for submission in batch]
            assert await apply(ledger, *batch) == expected
    reference = reference or Reference()
    async with harness.opened() as ledger:
        for campaign in ("c", "d"):
            log = reference.entries[campaign]
            assert await entries(ledger, campaign) == log
            assert await ledger.last_seq(campaign) == len(log)
            for as_of in (None, *range(-1, len(log) + 2)):
                for item in (None, "", "a", "b"):
                    for n in (1, 2, 5, 100):
                        for trusted in (True, False):
                            await compare_total(
                                ledger, log, campaign, item=item, n=n, as_of=as_of, trusted=trusted
                            )
        assert await differences(ledger) == []
    await compare_rebuild(harness)


async def compare_total(
    ledger: Ledger,
    log: Sequence[LedgerEntry],
    campaign: str = "c",
    *,
    item: str | None,
    n: int,
    as_of: int | None,
    trusted: bool,
) -> None:
    expected = total(log, item=item, n=n, as_of=as_of, trusted=trusted)
    try:
        found = await ledger.total(campaign, item=item, n=n, as_of=as_of, trusted=trusted)
    except LedgerUnsupportedError:
        # What such a ledger may refuse is little: trusted numbers from before a correction.
        assert not ledger.capabilities.history
        assert trusted
        assert as_of is not None
        assert any(e.kind in _CORRECTIONS and e.seq > as_of for e in log)
        return
    assert found == expected


async def compare_rebuild(harness: LedgerHarness) -> None:
    async with harness.opened() as ledger:
        if not ledger.capabilities.history:
            with pytest.raises(LedgerUnsupportedError):
                await ledger.rebuild()
            return
        before = await harness.derived()
        await ledger.rebuild()
        assert await harness.derived() == before
