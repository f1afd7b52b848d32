"""A disk that remembers every operation, so that any crash can be had afterwards.

A scenario runs once, on files of a recording VFS: each write, truncation, sync and deletion is
noted with its data, and between them what the program was promised or had promised. From this
log the image of a crash behind any operation is built:

    kill      what was written stays: the kernel has it.
    power     of each file only what was synced stays.
    torn      of what was not synced some writes stay, in whatever order, and one of them only
              up to a sector's end: what a drive may do with its cache.

So all points are tried for the price of one run and many openings. Running the scenario anew
for each point and stopping it there was rejected: it costs a hundred times as much, and a point
is then the same only if nothing else differs. Files that are locks, pipes or shared memory are
not on this disk; nothing of them outlives a machine.
"""

import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple, final

import apsw

__all__ = ["MODES", "Disk", "Mode", "Operation"]

Mode = Literal["kill", "power", "torn"]
MODES: Final[tuple[Mode, ...]] = ("kill", "power", "torn")

_SECTOR: Final = 512

_names = itertools.count()


class Operation(NamedTuple):
    """What was done to a file, or (``mark``) what was promised: ``file`` then says what."""

    kind: Literal["write", "truncate", "sync", "delete", "mark"]
    file: str
    offset: int = 0
    data: bytes = b""


@final
class Disk(apsw.VFS):
    """Records what is done to the files of one folder."""

    def __init__(self) -> None:
        self.log: list[Operation] = []
        self.vfs_name = f"disk-{next(_names)}"
        super().__init__(self.vfs_name, "")

    def mark(self, what: str, data: bytes) -> None:
        """Note a promise."""
        self.log.append(Operation("mark", what, 0, data))

    def xOpen(  # noqa: N802 - SQLite's name
        self, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> "_File":
        return _File(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        super().xDelete(filename, syncdir)
        self.log.append(Operation("delete", Path(filename).name))

    def image(self, points: int, mode: Mode, seed: int = 0) -> dict[str, bytes]:
        """Return the files as a crash behind the first ``points`` operations leaves them."""
        return next(self.images([points], mode, seed))

    def images(
        self, points: Iterable[int], mode: Mode, seed: int = 0
    ) -> Iterator[dict[str, bytes]]:
        """Return the files of one crash after the other, behind ever more operations."""
        files: dict[str, _Image] = {}
        done = 0
        for point in points:
            for operation in self.log[done:point]:
                if operation.kind == "delete":
                    files.pop(operation.file, None)
                elif operation.kind != "mark":
                    files.setdefault(operation.file, _Image()).apply(operation)
            done = point
            dice = random.Random(f"{seed} {point}")
            yield {name: image.left(mode, dice) for name, image in files.items()}

    def marks(self, points: int, what: str) -> list[bytes]:
        """Return what had been promised by then."""
        return [o.data for o in self.log[:points] if o.kind == "mark" and o.file == what]


@final
class _Image:
    """One file: what is synced, and what was done since."""

    def __init__(self) -> None:
        self._synced = bytearray()
        self._now = bytearray()
        self._since: list[Operation] = []

    def apply(self, operation: Operation) -> None:
        if operation.kind == "sync":
            self._synced = bytearray(self._now)
            self._since.clear()
            return
        _do(self._now, operation)
        self._since.append(operation)

    def left(self, mode: Mode, dice: random.Random) -> bytes:
        if mode == "kill":
            return bytes(self._now)
        found = bytearray(self._synced)
        if mode == "torn" and self._since:
            kept = [operation for operation in self._since if dice.random() < 0.5]
            dice.shuffle(kept)
            cut = dice.randrange(len(kept)) if kept else -1
            for number, operation in enumerate(kept):
                if number == cut and operation.kind == "write":
                    sectors = dice.randrange(len(operation.data) // _SECTOR + 1)
                    operation = operation._replace(data=operation.data[: sectors * _SECTOR])
                _do(found, operation)
        return bytes(found)


def _do(content: bytearray, operation: Operation) -> None:
    offset, data = operation.offset, operation.data
    if operation.kind == "truncate":
        del content[offset:]
        return
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self._log = disk.log
        self._name = Path(path).name
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        super().xWrite(data, offset)
        self._log.append(Operation("write", self._name, offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        super().xTruncate(newsize)
        self._log.append(Operation("truncate", self._name, newsize))

    def xSync(self, flags: int) -> None:  # noqa: N802
        super().xSync(flags)
        self._log.append(Operation("sync", self._name))
