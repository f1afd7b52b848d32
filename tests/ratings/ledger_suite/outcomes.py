"""What becomes of submissions: counted, known, in conflict, without effect, refused."""

import pytest

from molva.ratings.ledger import Ledger, LedgerSize, Total
from molva.ratings.rating import (
    Change,
    Comment,
    Exclusion,
    Rating,
    Restoration,
    Retraction,
    Submission,
)
from tests.ratings.ledger_suite.harness import LedgerHarness, Suite, differences, entries, need
from tests.ratings.ledger_suite.submissions import (
    APPLIED,
    CONFLICT,
    DUPLICATE,
    NO_EFFECT,
    NO_RATING,
    about,
    apply,
    number,
    rating,
    ratings,
)

__all__ = ["Outcomes"]


class Outcomes(Suite):
    async def test_equal_ratings_under_different_ids_are_both_counted(self, ledger: Ledger) -> None:
        assert await apply(ledger, rating(1, 5), rating(2, 5)) == [APPLIED, APPLIED]
        assert await ledger.total("c", n=10) == Total(10, 2, 2, {5: 2}, 2)

    async def test_a_batch_that_comes_twice_counts_once(self, ledger: Ledger) -> None:
        batch = [rating(1, 5, comment="good"), about(2, Change, 1, 7), about(3, Exclusion, 1)]
        await apply(ledger, *batch)
        before = await ledger.total("c", n=10, trusted=False)
        assert await apply(ledger, *batch) == [DUPLICATE] * 3
        assert await ledger.total("c", n=10, trusted=False) == before
        assert await ledger.last_seq("c") == 4

    async def test_of_a_batch_half_of_which_is_known_the_other_half_counts(
        self, ledger: Ledger
    ) -> None:
        await apply(ledger, *ratings(1, 300))
        outcomes = await apply(ledger, *ratings(151, 300))
        assert outcomes == [DUPLICATE] * 150 + [APPLIED] * 150
        found = await ledger.total("c", n=1_000)
        assert found is not None
        assert (found.count, found.sum) == (450, sum(i % 11 for i in range(1, 451)))
        assert await differences(ledger) == []

    async def test_a_duplicate_within_one_batch_counts_once(self, ledger: Ledger) -> None:
        outcomes = await apply(ledger, rating(1, 5), rating(1, 5), rating(2, 3), rating(1, 6))
        assert outcomes == [APPLIED, DUPLICATE, APPLIED, CONFLICT]
        assert await ledger.total("c", n=10) == Total(8, 2, 2, {3: 1, 5: 1}, 2)

    async def test_a_later_time_of_acceptance_is_still_the_same_rating(
        self, ledger: Ledger
    ) -> None:
        await apply(ledger, rating(1, 5))
        assert await apply(ledger, Submission(number(1), Rating("c", 999_999, 5))) == [DUPLICATE]

    @pytest.mark.parametrize(
        "other",
        [
            rating(1, 6, "a", comment="so"),
            rating(1, 5, "b", comment="so"),
            rating(1, 5, "a", comment="other"),
            rating(1, 5, "a"),
            about(1, Comment, 1, "so"),
            about(1, Retraction, 1),
        ],
    )
    async def test_a_used_id_with_other_content_is_a_conflict(
        self, ledger: Ledger, other: Submission
    ) -> None:
        await apply(ledger, rating(1, 5, "a", comment="so"))
        assert await apply(ledger, other) == [CONFLICT]
        assert await ledger.total("c", n=10) == Total(5, 1, 1, {5: 1}, 2)
        assert await ledger.size() == LedgerSize(campaigns=1, entries=2, ratings=1)

    async def test_an_id_of_another_campaign_is_known_as_far_as_is_declared(
        self, ledger: Ledger
    ) -> None:
        await apply(ledger, rating(1, 5, "a"))
        [outcome] = await apply(ledger, rating(1, 5, "a", campaign="d"))
        expected = {"ledger": CONFLICT, "campaign": APPLIED}
        assert outcome == expected[ledger.capabilities.ids]
        assert await ledger.total("c", n=10) == Total(5, 1, 1, {5: 1}, 1)

    async def test_a_duplicate_is_known_after_its_comment_was_erased(
        self, ledger: Ledger, harness: LedgerHarness
    ) -> None:
        await apply(ledger, rating(1, 5, comment="my name is Ann"))
        await harness.erase_comments()
        assert [entry.text for entry in await entries(ledger)] == [None, None]
        assert await apply(ledger, rating(1, 5, comment="my name is Ann")) == [DUPLICATE]
        assert await apply(ledger, rating(1, 5, comment="my name is Eve")) == [CONFLICT]
        assert await differences(ledger) == []

    async def test_what_has_no_effect_answers_the_same_when_it_comes_again(
        self, ledger: Ledger
    ) -> None:
        await apply(ledger, rating(1, 5), rating(2, 9), about(3, Exclusion, 1))
        assert await apply(ledger, about(4, Exclusion, 1)) == [NO_EFFECT]
        await apply(ledger, about(5, Restoration, 1))
        # Excluding again would have an effect now, but not under an id that was answered.
        assert await apply(ledger, about(4, Exclusion, 1)) == [NO_EFFECT]
        assert await apply(ledger, about(4, Exclusion, 2)) == [CONFLICT]
        assert await ledger.total("c", n=10) == Total(14, 2, 2, {5: 1, 9: 1}, 4)

    async def test_a_correction_waits_for_its_rating(self, ledger: Ledger) -> None:
        assert await apply(ledger, about(2, Change, 1, 7)) == [NO_RATING]
        assert await ledger.last_seq("c") == 0
        await apply(ledger, rating(1, 5))
        assert await apply(ledger, about(2, Change, 1, 7)) == [APPLIED]

    async def test_the_trusted_window_reaches_back_past_excluded_ratings(
        self, ledger: Ledger
    ) -> None:
        await apply(ledger, *(rating(i, i) for i in range(1, 7)))
        await apply(ledger, about(10, Exclusion, 5), about(11, Exclusion, 6))
        trusted = await ledger.total("c", n=3)
        raw = await ledger.total("c", n=3, trusted=False)
        assert trusted is not None
        assert raw is not None
        assert (trusted.sum, raw.sum) == (2 + 3 + 4, 4 + 5 + 6)

    async def test_an_undone_correction_leaves_the_numbers_as_they_were(
        self, ledger: Ledger
    ) -> None:
        await apply(ledger, *(rating(i, i) for i in range(1, 7)))
        before = await ledger.total("c", n=3)
        await apply(ledger, about(10, Exclusion, 5), about(11, Change, 6, 1))
        await apply(ledger, about(12, Restoration, 5), about(13, Change, 6, 6))
        after = await ledger.total("c", n=3)
        assert before is not None
        assert after == Total(before.sum, before.n, before.count, before.distribution, 10)

    async def test_a_campaign_whose_ratings_were_all_retracted_has_nothing_to_average(
        self, ledger: Ledger
    ) -> None:
        await apply(ledger, rating(1, 5), about(2, Retraction, 1))
        assert await ledger.total("c", n=10) is None
        assert await ledger.total("c", n=10, trusted=False) == Total(5, 1, 1, {5: 1}, 2)

    async def test_an_old_as_of_reads_as_before_a_correction(self, ledger: Ledger) -> None:
        need(ledger, "history")
        await apply(ledger, rating(1, 5), about(2, Retraction, 1))
        assert await ledger.total("c", n=10, as_of=1) == Total(5, 1, 1, {5: 1}, 1)

    async def test_an_item_of_another_campaign_is_another_item(self, ledger: Ledger) -> None:
        await apply(ledger, rating(1, 5, "a"), rating(2, 9, "a", campaign="d"))
        assert await ledger.total("c", item="a", n=10) == Total(5, 1, 1, {5: 1}, 1)
        assert await apply(ledger, about(3, Change, 2, 1)) == [NO_RATING]

    async def test_long_runs_of_comments_do_not_hide_the_window(self, ledger: Ledger) -> None:
        await apply(ledger, *(rating(i, i % 11) for i in range(1, 1_001)))
        await apply(ledger, *(about(i, Comment, 1, "x") for i in range(2_000, 5_000)))
        await apply(ledger, *(rating(i, 10) for i in range(9_000, 9_005)))
        found = await ledger.total("c", n=10)
        assert found is not None
        assert found.sum == 5 * 10 + sum(i % 11 for i in range(996, 1_001))

    async def test_words_come_back_as_they_were(self, ledger: Ledger) -> None:
        words = "naïve 🙂 \t\n 'quoted' \"twice\" \\ {braces} \0 nul \x7f"
        await apply(ledger, rating(1, 5, comment=words), about(2, Comment, 1, ""))
        await apply(ledger, about(3, Exclusion, 1, words))
        assert [entry.text for entry in await entries(ledger)] == [None, words, "", words]
        assert await differences(ledger) == []

    @pytest.mark.parametrize(
        "item",
        ["", " ", "{a}", "a}b{c", "ünïcode/🙂", "a:b", "%7B", "'; DROP TABLE entry", "x" * 512],
    )
    async def test_any_name_that_is_accepted_names_an_item(self, ledger: Ledger, item: str) -> None:
        await apply(ledger, rating(1, 3, item), rating(2, 9, "other"), rating(3, 5, item))
        assert await ledger.total("c", item=item, n=1) == Total(5, 1, 2, {3: 1, 5: 1}, 3)
        assert [entry.item for entry in await entries(ledger)] == [item, "other", item]

    @pytest.mark.parametrize("campaign", ["a", "a.b-c_d", "{x}", "a}b{c:d", "ünïcode/🙂 %7B"])
    async def test_campaigns_of_any_name_are_kept_apart(
        self, ledger: Ledger, campaign: str
    ) -> None:
        await apply(ledger, rating(1, 3, campaign=campaign), rating(2, 9, campaign="other"))
        assert await ledger.total(campaign, n=5) == Total(3, 1, 1, {3: 1}, 1)
        assert await ledger.last_seq(campaign) == 1

    # -------------------------------------------------------------------- poison

    @pytest.mark.parametrize(
        "poison",
        [
            rating(2, 2**63),
            rating(2, -(2**40)),
            Submission(b"short", Rating("c", 1, 5)),
            rating(2, 5, "\ud800"),
            rating(2, 5, campaign="\udfff"),
            rating(2, 5, comment="\ud800"),
            Submission(number(2), Rating("c", 2**70, 5)),
            Submission(number(2), Rating("c", 1, 5.5)),  # type: ignore[arg-type]
            Submission(number(2), Rating("c", "x", 5)),  # type: ignore[arg-type]
            Submission(number(2), Rating("c", 1, 5, None)),  # type: ignore[arg-type]
            about(2, Change, 1, 2**62),
            about(2, Comment, 1, "\ud800"),
        ],
        ids=repr,
    )
    async def test_what_cannot_be_stored_fails_alone(
        self, ledger: Ledger, poison: Submission
    ) -> None:
        outcomes = await apply(ledger, rating(1, 5, "new"), poison, rating(3, 6, "new"))
        assert [outcomes[0], outcomes[2]] == [APPLIED, APPLIED]
        assert isinstance(outcomes[1], Exception)
        assert await ledger.total("c", n=10) == Total(11, 2, 2, {5: 1, 6: 1}, 2)
        assert await differences(ledger) == []
