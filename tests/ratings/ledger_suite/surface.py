"""What a caller may ask, and what is answered where there is nothing."""

import pytest

from molva.ratings.ledger import Ledger, LedgerError, LedgerSize, LedgerUnsupportedError, Total
from tests.ratings.ledger_suite.harness import LedgerHarness, Suite, entries
from tests.ratings.ledger_suite.submissions import apply, rating, ratings

__all__ = ["Surface"]


class Surface(Suite):
    async def test_an_empty_batch_is_applied(self, ledger: Ledger) -> None:
        assert await ledger.apply([], applied_at_us=1) == []

    async def test_an_empty_ledger_has_size_nought(self, ledger: Ledger) -> None:
        assert await ledger.size() == LedgerSize(campaigns=0, entries=0, ratings=0)

    async def test_what_was_never_rated_has_no_total(self, ledger: Ledger) -> None:
        assert await ledger.total("nobody", n=1) is None
        await apply(ledger, rating(1, 5, "a"))
        assert await ledger.total("c", item="b", n=1) is None
        assert await ledger.total("c", n=1, as_of=0) is None
        assert await ledger.last_seq("nobody") == 0
        assert await entries(ledger, "nobody") == []

    async def test_an_as_of_beyond_the_last_is_read_as_the_last(self, ledger: Ledger) -> None:
        await apply(ledger, rating(1, 5), rating(2, 7))
        assert await ledger.total("c", n=1, as_of=99) == Total(7, 1, 2, {5: 1, 7: 1}, 2)

    async def test_a_window_of_none_is_refused(self, ledger: Ledger) -> None:
        with pytest.raises(ValueError, match="n=0"):
            await ledger.total("c", n=0)

    async def test_entries_go_on_after_a_sequence_number(self, ledger: Ledger) -> None:
        await apply(ledger, *(rating(i, 1) for i in range(1, 2_501)))
        seqs = [entry.seq async for entry in ledger.entries("c", since_seq=2)]
        assert seqs == list(range(3, 2_501))

    async def test_every_item_of_many_in_one_batch_is_counted(self, ledger: Ledger) -> None:
        await apply(ledger, *ratings(1, 2_000, items=700))
        found = await ledger.total("c", item="item-3", n=2)
        # Of the ids 3, 703 and 1403.
        assert found == Total(
            703 % 11 + 1_403 % 11, 2, 3, found.distribution if found else {}, 2_000
        )
        assert await ledger.size() == LedgerSize(campaigns=1, entries=2_000, ratings=2_000)

    async def test_what_is_kept_of_a_long_campaign_is_as_declared(self, ledger: Ledger) -> None:
        window = ledger.capabilities.window
        kept = 10_000 if window is None else window
        number = kept + 1_500
        for first in range(1, number + 1, 1_000):
            await apply(ledger, *ratings(first, min(1_000, number + 1 - first), items=1))
        rates = [i % 11 for i in range(1, number + 1)]
        for n in (1, kept - 1, kept):
            for item in (None, "item-0"):
                found = await ledger.total("c", item=item, n=n)
                assert found is not None
                assert (found.sum, found.n, found.count) == (sum(rates[-n:]), n, number)
        everything = await ledger.total("c", n=number)
        assert everything is not None
        assert (everything.sum, everything.n) == (sum(rates), number)
        early = number - kept - 1
        if window is None:
            assert await ledger.total("c", n=10, as_of=early) is not None
            assert len(await entries(ledger)) == number
            return
        with pytest.raises(LedgerUnsupportedError, match=f"{window:,}"):
            await ledger.total("c", n=window + 1)
        with pytest.raises(LedgerUnsupportedError, match=f"{window:,}"):
            await ledger.total("c", n=10, as_of=early)
        with pytest.raises(LedgerUnsupportedError, match=f"{window:,}"):
            await entries(ledger)
        late = await ledger.total("c", n=10, as_of=number - 1_000)
        assert late is not None
        assert late.sum == sum(rates[:-1_000][-10:])

    async def test_a_closed_ledger_says_so(self, harness: LedgerHarness) -> None:
        async with harness.opened() as ledger:
            pass
        await ledger.close()
        with pytest.raises(LedgerError, match="closed"):
            await apply(ledger, rating(1, 5))
        with pytest.raises(LedgerError, match="closed"):
            await ledger.last_seq("c")
