"""The catalog: what a URL opens, what a campaign may become, what other processes see."""

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from molva.ratings.campaign import Campaign
from molva.ratings.catalog import (
    Catalog,
    CatalogBrokenError,
    CatalogDamagedError,
    CatalogError,
    CatalogUnavailableError,
    CatalogURLError,
    CatalogVersionError,
    ScaleNarrowedError,
    open_catalog,
)
from molva.ratings.catalog.sqlite import SQLiteCatalog

TALK = Campaign(name="talk", question="How was the talk?", minimum=1, maximum=5, window=20)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite://{tmp_path}/catalog.db"


@pytest.fixture
async def catalog(url: str) -> AsyncIterator[Catalog]:
    catalog = await open_catalog(url)
    yield catalog
    await catalog.close()


async def test_a_new_catalog_holds_the_default_campaign(catalog: Catalog) -> None:
    assert await catalog.campaigns() == [Campaign()]


async def test_a_stored_campaign_is_found_again(catalog: Catalog) -> None:
    assert await catalog.put_campaign(TALK) is True
    assert await catalog.campaign("talk") == TALK


async def test_campaigns_come_in_the_order_of_their_names(catalog: Catalog) -> None:
    for name in ("z", "a", "m"):
        await catalog.put_campaign(Campaign(name=name))
    assert [campaign.name for campaign in await catalog.campaigns()] == ["a", "default", "m", "z"]


async def test_an_unknown_campaign_is_none(catalog: Catalog) -> None:
    assert await catalog.campaign("nobody") is None


async def test_a_campaign_outlives_the_process(url: str) -> None:
    first = await open_catalog(url)
    await first.put_campaign(TALK)
    await first.close()
    second = await open_catalog(url)
    assert await second.campaign("talk") == TALK
    await second.close()


async def test_storing_a_known_name_replaces_what_was_there(catalog: Catalog) -> None:
    await catalog.put_campaign(TALK)
    longer = Campaign(name="talk", question="And now?", minimum=1, maximum=5, window=99)
    assert await catalog.put_campaign(longer) is False
    assert await catalog.campaign("talk") == longer


async def test_a_scale_can_become_wider(catalog: Catalog) -> None:
    await catalog.put_campaign(TALK)
    await catalog.put_campaign(Campaign(name="talk", minimum=0, maximum=10))
    found = await catalog.campaign("talk")
    assert found is not None
    assert (found.minimum, found.maximum) == (0, 10)


@pytest.mark.parametrize(("minimum", "maximum"), [(2, 5), (1, 4), (0, 4), (2, 6), (6, 9)])
async def test_a_scale_cannot_leave_out_what_was_on_it(
    catalog: Catalog, minimum: int, maximum: int
) -> None:
    await catalog.put_campaign(TALK)
    with pytest.raises(ScaleNarrowedError, match="can only become wider"):
        await catalog.put_campaign(Campaign(name="talk", minimum=minimum, maximum=maximum))
    assert await catalog.campaign("talk") == TALK


async def test_a_campaign_that_cannot_be_used_is_refused(catalog: Catalog) -> None:
    with pytest.raises(ValueError, match="campaign name"):
        await catalog.put_campaign(Campaign(name="No Spaces"))
    assert len(await catalog.campaigns()) == 1


async def test_the_revision_stands_still_without_a_change(catalog: Catalog) -> None:
    await catalog.put_campaign(TALK)
    before = catalog.revision()
    await catalog.put_campaign(TALK)
    await catalog.campaigns()
    assert catalog.revision() == before


async def test_the_revision_moves_with_an_own_change(catalog: Catalog) -> None:
    before = catalog.revision()
    await catalog.put_campaign(TALK)
    assert catalog.revision() != before


async def test_the_revision_moves_with_another_processs_change(catalog: Catalog, url: str) -> None:
    before = catalog.revision()
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
    assert catalog.revision() != before
    assert await catalog.campaign("other") is not None


async def test_the_revision_moves_again_after_a_look_up(catalog: Catalog) -> None:
    # A statement left half-way would hold its snapshot, and the revision with it.
    seen = {catalog.revision()}
    for name in ("a", "b", "c"):
        await catalog.campaign("default")
        await catalog.put_campaign(Campaign(name=name))
        seen.add(catalog.revision())
    assert len(seen) == 4


async def test_writers_at_once_all_succeed(url: str) -> None:
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


async def test_a_cancelled_write_leaves_the_catalog_usable(catalog: Catalog) -> None:
    writing = asyncio.create_task(catalog.put_campaign(TALK))
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    assert await catalog.put_campaign(Campaign(name="next")) is True


async def test_closing_twice_is_closing_once(url: str) -> None:
    catalog = await open_catalog(url)
    await catalog.close()
    await catalog.close()
    with pytest.raises(CatalogError, match="closed"):
        catalog.revision()


async def test_nothing_is_written_behind_an_io_error(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = await open_catalog(url)

    def fail(*_: object) -> bool:
        raise apsw.IOError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr("molva.ratings.catalog.sqlite._store", fail)
        with pytest.raises(CatalogUnavailableError):
            await catalog.put_campaign(TALK)
    with pytest.raises(CatalogBrokenError, match="restart"):
        await catalog.put_campaign(TALK)
    assert await catalog.campaigns() == [Campaign()]
    await catalog.close()


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("sqlit:///tmp/x.db", "unknown scheme 'sqlit'; did you mean 'sqlite'"),
        ("mongodb://host/x", "unknown scheme 'mongodb'; known are sqlite://"),
        ("/tmp/x.db", "is no catalog URL; write one like 'sqlite:///"),
        ("sqlite://relative/x.db", "three slashes"),
        ("sqlite://", "names no file"),
        ("sqlite:///tmp/x.db?creat=never", "unknown option 'creat'; did you mean 'create'"),
        ("sqlite:///tmp/x.db?create=nevr", "create='nevr' is refused; did you mean 'never'"),
        ("sqlite:///tmp/x.db?create=auto&create=auto", "given twice"),
        ("sqlite:///tmp/x#1.db", "%23"),
    ],
)
async def test_a_wrong_url_says_what_would_be_right(url: str, complaint: str) -> None:
    with pytest.raises(CatalogURLError) as caught:
        await open_catalog(url)
    assert complaint in str(caught.value)


async def test_a_wrong_url_keeps_its_password_to_itself() -> None:
    with pytest.raises(CatalogURLError) as caught:
        await open_catalog("postgresql://ann:s3cret@host/db")
    assert "s3cret" not in str(caught.value)


async def test_a_path_is_percent_decoded(tmp_path: Path) -> None:
    catalog = await open_catalog(f"sqlite://{tmp_path}/a%20%23b.db")
    await catalog.close()
    assert (tmp_path / "a #b.db").exists()


async def test_create_never_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(CatalogUnavailableError, match="is missing"):
        await open_catalog(f"sqlite://{tmp_path}/none.db?create=never")
    assert not (tmp_path / "none.db").exists()


async def test_a_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE t (x)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(CatalogVersionError, match="is no catalog"):
        await open_catalog(f"sqlite://{path}")
    assert path.read_bytes() == before


async def test_a_newer_catalog_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    catalog = await open_catalog(f"sqlite://{path}")
    await catalog.close()
    connection = apsw.Connection(str(path))
    connection.pragma("user_version", 99)
    connection.close()
    with pytest.raises(CatalogVersionError, match="upgrade"):
        await open_catalog(f"sqlite://{path}")


async def test_a_truncated_catalog_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    catalog = await open_catalog(f"sqlite://{path}")
    await catalog.close()
    content = path.read_bytes()
    path.write_bytes(content[:4_096] + b"\xff" * (len(content) - 4_096))
    with pytest.raises(CatalogDamagedError, match="restore it"):
        await SQLiteCatalog.open(str(path))
