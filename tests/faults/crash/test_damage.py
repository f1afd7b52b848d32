"""A damaged file is read exactly, or refused with one clear error; never read wrongly.

What is not noticed is in docs/reliability.md, and here: ``_is_right`` says what counts as right.
"""

import itertools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import apsw
import pytest

from molva.messaging import open_queue
from tests.faults.crash.damage import ERRORS, KINDS, Content, Kind, flips, make, read, truncations

# In memory where there is such a folder: nothing here tests the real disk.
_SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None

# Bytes between two flipped bits. A prime: every column of a row is met in some row.
_STRIDE: Final = 509

Files = dict[str, bytes]


class Whole(NamedTuple):
    """A file in one state, and what is in it. ``damaged``: what of it is to be damaged."""

    kind: Kind
    files: Files
    content: Content
    damaged: Files


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=_SHM))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=[f"{kind} {state}" for kind in KINDS for state in ("closed", "killed")])
async def whole(request: pytest.FixtureRequest) -> Whole:
    kind, state = request.param.split()
    with _folder() as folder:
        killed = folder / "killed"
        killed.mkdir()
        await make(kind, folder, killed)
        source = folder if state == "closed" else killed
        files = {f.name: f.read_bytes() for f in source.iterdir() if f.is_file()}
        files = {name: content for name, content in files.items() if content}
    problem, content = await _outcome(kind, files)
    assert problem is None, problem
    assert content is not None
    # Of a file that is there in both states, its last one is enough.
    damaged = {name: files[name] for name in files if state == "closed" or name[-3:] != ".db"}
    return Whole(kind, files, content, damaged)


async def _outcome(kind: Kind, files: Files) -> tuple[str | None, Content | None]:
    """Return (what the product said, None) or (None, what was read)."""
    with _folder() as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            return None, await read(kind, folder)
        except ERRORS as error:
            return str(error).replace(str(folder), ""), None


def _is_right(kind: Kind, found: Content, whole: Content) -> bool:
    """Return whether what was read is what was stored, or ``verify`` says that it is not."""
    if kind == "ledger":
        return bool(found["verify"]) or found == whole
    if kind == "queue":
        # At least once: what was settled may come again. All else must be there, as it was.
        waiting, expected = found["waiting"], whole["waiting"]
        assert isinstance(waiting, list)
        assert isinstance(expected, list)
        rest = {key: value for key, value in found.items() if key != "waiting"}
        return set(expected) <= set(waiting) and rest == {key: whole[key] for key in rest}
    return found == whole


async def _sweep(
    whole: Whole, damaged: Iterator[tuple[str, Files]]
) -> tuple[Counter[str], list[str]]:
    """Return how often what came of it, and what should not have been."""
    counts: Counter[str] = Counter()
    wrong = []
    for what, files in damaged:
        try:
            problem, content = await _outcome(whole.kind, files)
        except Exception as error:  # noqa: BLE001 - anything that is not ours is a finding
            wrong.append(f"{what}: {error!r:.200}")
            continue
        if content is None:
            assert problem is not None
            counts["refused"] += 1
            if f"{whole.kind}.db" not in problem:
                wrong.append(f"{what}: an error that names no file: {problem}")
        elif _is_right(whole.kind, content, whole.content):
            counts["right"] += 1
        else:
            wrong.append(f"{what}: read wrongly, without a word")
    return counts, wrong


def _flipped(whole: Whole) -> Iterator[tuple[str, Files]]:
    for name, content in whole.damaged.items():
        for at in flips(name, len(content), stride=_STRIDE):
            changed = bytearray(content)
            changed[at] ^= 1 << (at * 5 + at // 8) % 8
            yield f"{name} bit flipped at {at}", {**whole.files, name: bytes(changed)}


def _truncated(whole: Whole) -> Iterator[tuple[str, Files]]:
    for name, content in whole.damaged.items():
        for size in truncations(name, len(content)):
            yield f"{name} cut to {size}", {**whole.files, name: content[:size]}


async def test_a_flipped_bit_is_harmless_or_refused(
    whole: Whole, capsys: pytest.CaptureFixture[str]
) -> None:
    counts, wrong = await _sweep(whole, _flipped(whole))

    with capsys.disabled():
        print(f" {whole.kind}: {dict(counts)} ", end="")
    assert wrong == []
    assert counts["refused"] > 50


async def test_a_truncated_file_is_refused(whole: Whole) -> None:
    counts, wrong = await _sweep(whole, _truncated(whole))

    assert wrong == []
    assert counts["refused"] > 3


@pytest.mark.parametrize("kind", KINDS)
async def test_a_file_that_was_emptied_is_refused(kind: Kind) -> None:
    with _folder() as folder:
        (folder / "killed").mkdir()
        await make(kind, folder, folder / "killed")
        os.truncate(folder / f"{kind}.db", 0)

        with pytest.raises(ERRORS, match=rf"{kind}\.db: the {kind} is empty, and was not"):
            await read(kind, folder)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_folder_in_the_place_of_a_file_is_refused(kind: Kind) -> None:
    with _folder() as folder:
        (folder / f"{kind}.db").mkdir()

        with pytest.raises(ERRORS, match=rf"{kind}\.db: the {kind} cannot be opened"):
            await read(kind, folder)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_file_of_another_kind_is_refused_untouched(kind: Kind) -> None:
    other: Kind = "ledger" if kind != "ledger" else "queue"
    with _folder() as folder:
        (folder / "killed").mkdir()
        await make(other, folder, folder / "killed")
        os.rename(folder / f"{other}.db", folder / f"{kind}.db")
        before = (folder / f"{kind}.db").read_bytes()

        with pytest.raises(ERRORS, match=rf"{kind}\.db: is no {kind}"):
            await read(kind, folder)

        assert (folder / f"{kind}.db").read_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
async def test_a_file_of_a_newer_version_is_refused_untouched(kind: Kind) -> None:
    with _folder() as folder:
        (folder / "killed").mkdir()
        await make(kind, folder, folder / "killed")
        connection = apsw.Connection(str(folder / f"{kind}.db"))
        connection.pragma("user_version", 99)
        connection.close()
        before = (folder / f"{kind}.db").read_bytes()

        with pytest.raises(ERRORS, match=rf"{kind}\.db: the {kind} has version 99.*upgrade"):
            await read(kind, folder)

        assert (folder / f"{kind}.db").read_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
async def test_a_file_that_may_not_be_read_is_refused(kind: Kind) -> None:
    with _folder() as folder:
        (folder / "killed").mkdir()
        await make(kind, folder, folder / "killed")
        folder.chmod(0o755)
        (folder / f"{kind}.db").chmod(0)

        with _nobody(), pytest.raises(ERRORS, match=rf"{kind}\.db: the {kind} cannot be"):
            await read(kind, folder)


@contextmanager
def _nobody() -> Iterator[None]:
    """Give up root's right to read what it may not."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(user)


# The net itself: without what guards against it, damage is read, and found here.


@pytest.mark.parametrize(
    ("guard", "without"),
    [
        ("molva._base.sqlite_file.lost_frames", lambda *_: None),
        ("molva.messaging.drivers._sqlite_file.is_damaged", lambda *_: False),
    ],
    ids=["the mark of the WAL", "checksums of messages"],
)
async def test_damage_that_nothing_guards_against_is_found(
    guard: str, without: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with _folder() as folder:
        killed = folder / "killed"
        killed.mkdir()
        await make("queue", folder, killed)
        files = {f.name: f.read_bytes() for f in killed.iterdir() if f.stat().st_size}
    _, content = await _outcome("queue", files)
    assert content is not None
    monkeypatch.setattr(guard, without)
    part = {"queue.db-wal": files["queue.db-wal"]} if "lost" in guard else {}
    whole = Whole("queue", files, content, part or {"queue.db": files["queue.db"]})
    if not part:
        # All of it in the file.
        with _folder() as folder:
            for name, bytes_ in files.items():
                (folder / name).write_bytes(bytes_)
            async with await open_queue(f"sqlite://{folder}/queue.db?queue=q"):
                pass
            main = (folder / "queue.db").read_bytes()
        whole = Whole("queue", {"queue.db": main}, content, {"queue.db": main})

    _, wrong = await _sweep(whole, itertools.islice(_flipped(whole), 0, None, 7))

    assert wrong != []
