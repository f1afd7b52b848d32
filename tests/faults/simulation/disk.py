"""A disk that can lose its power and fail its fsync, for the ledger of a simulated run.

Each file has a part that is durable and a list of what was done since. A sync makes the second
part of the first. A sync that fails does what Linux does: the pages are taken for clean, so
that no later sync writes them, and yet they can be read until the power goes.
"""

import itertools
import random
from pathlib import Path
from typing import Final, final

import apsw

__all__ = ["Disk"]

_numbers: Final = itertools.count()

# (offset, data), or (length, None) for a truncation.
_Change = tuple[int, bytes | None]


@final
class Disk(apsw.VFS):
    """The system's own VFS, and beside it what would be left of each file.

    Attributes:
        failing: How many further syncs fail.
        failed: How many did.
    """

    def __init__(self) -> None:
        self.vfs_name: Final = f"simulated-{next(_numbers)}"
        self.failing = self.failed = 0
        self._files: dict[str, _Durable] = {}
        super().__init__(self.vfs_name, "")

    def begin(self, folder: Path) -> None:
        """Take what is in a folder for durable."""
        self._files = {path.name: _Durable(path.read_bytes()) for path in folder.iterdir()}

    def cut(self, folder: Path, dice: random.Random) -> None:
        """Write to ``folder`` what a power cut leaves: what was synced, and some of the rest."""
        for name, file in self._files.items():
            if not name.endswith("-shm"):
                (folder / name).write_bytes(file.left(dice))
        self.begin(folder)

    def xOpen(  # noqa: N802 - SQLite's name
        self, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> "_File":
        return _File(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        super().xDelete(filename, syncdir)
        self._files.pop(Path(filename).name, None)

    def note(self, name: str, change: _Change) -> None:
        """Remember a change until it is synced."""
        self._files.setdefault(name, _Durable(b"")).since.append(change)

    def sync(self, name: str) -> None:
        """Make a file's changes durable, or fail for good."""
        file = self._files.setdefault(name, _Durable(b""))
        if self.failing:
            self.failing -= 1
            self.failed += 1
            file.since.clear()
            raise apsw.IOError("fsync failed")
        for change in file.since:
            _do(file.content, change)
        file.since.clear()


@final
class _Durable:
    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.since: list[_Change] = []

    def left(self, dice: random.Random) -> bytes:
        found = bytearray(self.content)
        # Some of the rest, in order: what the kernel had begun to write by itself.
        for change in self.since[: dice.randint(0, len(self.since))] if dice.random() < 0.5 else ():
            _do(found, change)
        return bytes(found)


def _do(content: bytearray, change: _Change) -> None:
    offset, data = change
    if data is None:
        del content[offset:]
        return
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self._disk = disk
        self._name = Path(path).name
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        super().xWrite(data, offset)
        self._disk.note(self._name, (offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        super().xTruncate(newsize)
        self._disk.note(self._name, (newsize, None))

    def xSync(self, flags: int) -> None:  # noqa: N802
        self._disk.sync(self._name)
