"""The SQLite catalog passes the suite of all catalogs; what only its file can do."""

import sqlite3
from pathlib import Path

import apsw
import pytest

from molva.ratings.campaign import Campaign
from molva.ratings.catalog import (
    CatalogBrokenError,
    CatalogDamagedError,
    CatalogUnavailableError,
    CatalogURLError,
    CatalogVersionError,
    open_catalog,
)
from molva.ratings.catalog.sqlite import SQLiteCatalog
from tests.ratings.catalog_suite import TALK, CatalogSuite


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite://{tmp_path}/catalog.db"


class TestSQLiteCatalog(CatalogSuite):
    pass


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
        ("mongodb://host/x", "unknown scheme 'mongodb'; known are postgresql://, sqlite://"),
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
        await open_catalog("mongodb://ann:s3cret@host/db")
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
