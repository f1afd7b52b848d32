"""What every catalog does, written once. Subclasses bring the fixture ``url``."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from molva.ratings.campaign import Campaign
from molva.ratings.catalog import Catalog, CatalogError, ScaleNarrowedError, open_catalog

__all__ = ["TALK", "CatalogSuite"]

TALK = Campaign(name="talk", question="How was the talk?", minimum=1, maximum=5, window=20)


class CatalogSuite:
    """The suite: ``url`` names a catalog that is missing at first."""

    @pytest.fixture
    async def catalog(self, url: str) -> AsyncIterator[Catalog]:
        catalog = await open_catalog(url)
        yield catalog
        await catalog.close()

    async def test_a_new_catalog_holds_the_default_campaign(self, catalog: Catalog) -> None:
        assert await catalog.campaigns() == [Campaign()]

    async def test_a_stored_campaign_is_found_again(self, catalog: Catalog) -> None:
        assert await catalog.put_campaign(TALK) is True
        assert await catalog.campaign("talk") == TALK

    async def test_campaigns_come_in_the_order_of_their_names(self, catalog: Catalog) -> None:
        for name in ("z", "a", "m"):
            await catalog.put_campaign(Campaign(name=name))
        assert [campaign.name for campaign in await catalog.campaigns()] == [
            "a",
            "default",
            "m",
            "z",
        ]

    async def test_an_unknown_campaign_is_none(self, catalog: Catalog) -> None:
        assert await catalog.campaign("nobody") is None

    async def test_a_campaign_outlives_the_process(self, url: str) -> None:
        first = await open_catalog(url)
        await first.put_campaign(TALK)
        await first.close()
        second = await open_catalog(url)
        assert await second.campaign("talk") == TALK
        await second.close()

    async def test_storing_a_known_name_replaces_what_was_there(self, catalog: Catalog) -> None:
        await catalog.put_campaign(TALK)
        longer = Campaign(name="talk", question="And now?", minimum=1, maximum=5, window=99)
        assert await catalog.put_campaign(longer) is False
        assert await catalog.campaign("talk") == longer

    async def test_a_scale_can_become_wider(self, catalog: Catalog) -> None:
        await catalog.put_campaign(TALK)
        await catalog.put_campaign(Campaign(name="talk", minimum=0, maximum=10))
        found = await catalog.campaign("talk")
        assert found is not None
        assert (found.minimum, found.maximum) == (0, 10)

    @pytest.mark.parametrize(("minimum", "maximum"), [(2, 5), (1, 4), (0, 4), (2, 6), (6, 9)])
    async def test_a_scale_cannot_leave_out_what_was_on_it(
        self, catalog: Catalog, minimum: int, maximum: int
    ) -> None:
        await catalog.put_campaign(TALK)
        with pytest.raises(ScaleNarrowedError, match="can only become wider"):
            await catalog.put_campaign(Campaign(name="talk", minimum=minimum, maximum=maximum))
        assert await catalog.campaign("talk") == TALK

    async def test_a_campaign_that_cannot_be_used_is_refused(self, catalog: Catalog) -> None:
        with pytest.raises(ValueError, match="campaign name"):
            await catalog.put_campaign(Campaign(name="No Spaces"))
        assert len(await catalog.campaigns()) == 1

    async def test_the_revision_stands_still_without_a_change(self, catalog: Catalog) -> None:
        await catalog.put_campaign(TALK)
        before = await catalog.revision()
        await catalog.put_campaign(TALK)
        await catalog.campaigns()
        assert await catalog.revision() == before

    async def test_the_revision_moves_with_an_own_change(self, catalog: Catalog) -> None:
        before = await catalog.revision()
        await catalog.put_campaign(TALK)
        assert await catalog.revision() != before

    async def test_the_revision_moves_with_another_processs_change(
        self, catalog: Catalog, url: str
    ) -> None:
        before = await catalog.revision()
        program = (
            "import asyncio, sys\n"
            "from molva.ratings.campaign import Campaign\n"
            "from molva.ratings.catalog import open_catalog\n"
            "async def main():\n"
            "    catalog = await open_catalog(sys.argv[1])\n"
            "    await catalog.put_campaign(Campaign(name='other'))\n"
            "    await catalog.close()\n"
            "asyncio.run(main())\n"
        )
        subprocess.run([sys.executable, "-c", program, url], check=True, timeout=30)
        assert await catalog.revision() != before
        assert await catalog.campaign("other") is not None

    async def test_the_revision_moves_again_after_a_look_up(self, catalog: Catalog) -> None:
        # A statement left half-way would hold its snapshot, and the revision with it.
        seen = {await catalog.revision()}
        for name in ("a", "b", "c"):
            await catalog.campaign("default")
            await catalog.put_campaign(Campaign(name=name))
            seen.add(await catalog.revision())
        assert len(seen) == 4

    async def test_writers_at_once_all_succeed(self, url: str) -> None:
        catalogs = [await open_catalog(url) for _ in range(4)]
        writes = [
            catalog.put_campaign(Campaign(name=f"c{number}-{at}"))
            for at, catalog in enumerate(catalogs)
            for number in range(5)
        ]
        assert await asyncio.gather(*writes) == [True] * 20
        assert len(await catalogs[0].campaigns()) == 21
        for catalog in catalogs:
            await catalog.close()

    async def test_a_cancelled_write_leaves_the_catalog_usable(self, catalog: Catalog) -> None:
        writing = asyncio.create_task(catalog.put_campaign(TALK))
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        assert await catalog.put_campaign(Campaign(name="next")) is True

    async def test_closing_twice_is_closing_once(self, url: str) -> None:
        catalog = await open_catalog(url)
        await catalog.close()
        await catalog.close()
        with pytest.raises(CatalogError, match="closed"):
            await catalog.revision()
