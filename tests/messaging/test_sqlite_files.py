"""Which files the SQLite driver opens, and what it says of the others."""

import os
import shutil
from pathlib import Path

import apsw
import pytest

from molva.messaging import (
    IncompatibleBrokerError,
    InvalidURLError,
    Message,
    TopicNotFoundError,
    UnavailableError,
    open_subscription,
    open_topic,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queue.db"


async def _open(path: Path, options: str = "") -> None:
    async with await open_topic(f"sqlite://{path}?topic=t{options}"):
        pass


async def _filled(path: Path) -> None:
    async with await open_topic(f"sqlite://{path}?topic=t") as topic:
        await topic.send_many([Message(bytes(1_000)) for _ in range(200)])


def _everything(folder: Path) -> dict[str, bytes]:
    """Return what is in each file; a WAL's index and an empty WAL are nothing."""
    files = (file for file in folder.iterdir() if file.is_file() and file.suffix != ".db-shm")
    found = {file.name: file.read_bytes() for file in files}
    return {name: content for name, content in found.items() if content or name[-4:] != "-wal"}


async def test_a_file_of_a_newer_version_is_refused_untouched(path: Path) -> None:
    await _filled(path)
    with apsw.Connection(str(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = _everything(path.parent)

    with pytest.raises(IncompatibleBrokerError, match=r"version 99.*upgrade"):
        await _open(path)

    assert _everything(path.parent) == before


async def test_a_newer_file_whose_process_was_killed_is_refused_untouched(
    path: Path, tmp_path: Path
) -> None:
    await _filled(path)
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA user_version = 99")
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for name in ("queue.db", "queue.db-wal"):  # as a kill leaves them, WAL and all
        shutil.copy(path.with_name(name), crashed / name)
    connection.close()
    before = _everything(crashed)

    with pytest.raises(IncompatibleBrokerError, match="upgrade"):
        await _open(crashed / "queue.db")

    assert _everything(crashed) == before


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
async def test_somebody_elses_database_is_refused_untouched(path: Path, journal_mode: str) -> None:
    connection = apsw.Connection(str(path))
    connection.pragma("journal_mode", journal_mode)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    before = _everything(path.parent)

    with pytest.raises(IncompatibleBrokerError, match="something else"):
        await _open(path)

    assert _everything(path.parent) == before


@pytest.mark.parametrize("size", [1, 511, 20_000])
async def test_what_is_no_database_is_refused_untouched(path: Path, size: int) -> None:
    path.write_bytes(b"not a database, just notes\n" * (size // 27 + 1))
    before = _everything(path.parent)

    with pytest.raises(IncompatibleBrokerError, match="no SQLite database"):
        await _open(path)

    assert _everything(path.parent) == before


@pytest.mark.parametrize("size", [120, 4_096, 10_000])
async def test_a_truncated_file_is_refused(path: Path, size: int) -> None:
    await _filled(path)
    os.truncate(path, size)

    with pytest.raises(IncompatibleBrokerError):
        await _open(path)


async def test_a_missing_folder_is_named(path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"nowhere does not exist; make it"):
        await _open(path.parent / "nowhere" / "queue.db")


async def test_a_folder_is_no_queue(path: Path) -> None:
    path.mkdir()

    with pytest.raises(UnavailableError, match="cannot be opened"):
        await _open(path)


async def test_a_lanes_folder_that_cannot_be_made_is_an_error_of_ours(path: Path) -> None:
    path.with_name("queue.db-lanes").write_bytes(b"")

    with pytest.raises(UnavailableError, match=r"queue\.db-lanes"):
        await open_subscription(f"sqlite://{path}?topic=t&subscription=s")


async def test_create_never_makes_no_file(path: Path) -> None:
    with pytest.raises(TopicNotFoundError, match="create=never"):
        await _open(path, "&create=never")

    assert not path.exists()


async def test_an_empty_file_becomes_a_queue(path: Path) -> None:
    path.touch()

    await _filled(path)


async def test_a_host_in_the_url_is_explained() -> None:
    with pytest.raises(InvalidURLError, match="three slashes"):
        await open_topic("sqlite://var/queue.db?topic=t")


async def test_a_url_without_a_file_is_explained() -> None:
    with pytest.raises(InvalidURLError, match="names no file"):
        await open_topic("sqlite://?topic=t")


@pytest.mark.parametrize("text", ["0", "63", "-1", "x", "1.5", "²"])
async def test_a_number_of_lanes_that_makes_no_sense_is_refused(path: Path, text: str) -> None:
    with pytest.raises(InvalidURLError, match="1 to 62 is accepted"):
        await _open(path, f"&lanes={text}")


async def test_an_unknown_way_to_commit_is_refused(path: Path) -> None:
    with pytest.raises(InvalidURLError, match="one of auto, loop, thread is accepted"):
        await _open(path, "&commit=never")


async def test_a_refused_open_leaves_nothing_open(path: Path) -> None:
    await _open(path, "&lanes=4")
    before = set(os.listdir("/proc/self/fd"))

    for _ in range(5):
        with pytest.raises(InvalidURLError):
            await _open(path, "&lanes=5")

    assert len(os.listdir("/proc/self/fd")) <= len(before) + 1


async def test_closing_leaves_nothing_open(path: Path) -> None:
    url = f"sqlite://{path}?topic=t"
    await _filled(path)
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(5):
        async with (
            await open_topic(url) as topic,
            await open_subscription(url + "&subscription=s") as subscription,
        ):
            await topic.send(Message(b"1"))
            await subscription.receive()

    assert len(os.listdir("/proc/self/fd")) <= before


async def test_names_with_odd_characters_are_paths(tmp_path: Path) -> None:
    await _open(tmp_path / "a%20b %3F.db".replace("%", "%25"))

    assert (tmp_path / "a%20b %3F.db").exists()
