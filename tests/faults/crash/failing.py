"""A disk on which one operation fails, and that notices who goes on as if it had not.

    error     EIO: the operation did not happen, or nobody knows
    full      ENOSPC, once
    short     ENOSPC after the first half of a write, once
    filled    ENOSPC for every write from then on, until ``free``

As on Linux, an error of a sync is told once to every descriptor that was open then, and what
was written before it may be gone although a later sync succeeds. So whoever writes to that
file before somebody opened the database anew is written down in ``behind``.

Reads do not fail here, nor does the shared memory beside a WAL, which no VFS of ours sees.
"""

import itertools
from pathlib import Path
from typing import Final, Literal, NamedTuple, final

import apsw

__all__ = ["FULL", "FailingDisk", "Fault", "How"]

How = Literal["error", "full", "short", "filled"]
FULL: Final[tuple[How, ...]] = ("full", "short", "filled")

_names = itertools.count()


@final
class Fault(NamedTuple):
    """Operation number ``at`` fails in this way."""

    at: int
    how: How


@final
class FailingDisk(apsw.VFS):
    """The system's own disk with one fault.

    Attributes:
        done: Every operation so far: (kind, file).
        struck: The operation that failed; None so far.
        behind: Files that were written behind a failed sync.
    """

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault
        self.done: list[tuple[str, str]] = []
        self.struck: tuple[str, str] | None = None
        self.behind: list[str] = []
        self.unsound: set[str] = set()
        self.files: list[_File] = []
        self._full = False
        self.vfs_name = f"failing-{next(_names)}"
        super().__init__(self.vfs_name, "")

    def free(self) -> None:
        """Give the disk room again."""
        self._full = False

    def fails(self, kind: str, file: str) -> How | None:
        """Note an operation; return how it fails, None where it does not."""
        number = len(self.done)
        self.done.append((kind, file))
        if self.fault is not None and number == self.fault.at:
            self.struck = (kind, file)
            self._full = self.fault.how == "filled"
            return self.fault.how
        return "full" if self._full and kind == "write" else None

    def xOpen(  # noqa: N802 - SQLite's name
        self, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> "_File":
        path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        file = Path(path).name
        if self.fails("open", file):
            raise apsw.CantOpenError("no open")  # what SQLite's own VFS makes of every reason
        if flags[0] & apsw.SQLITE_OPEN_MAIN_DB:
            self.unsound -= {file, f"{file}-wal", f"{file}-journal"}
        opened = _File(self, file, name, flags)
        self.files.append(opened)
        return opened

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        if self.fails("delete", Path(filename).name):
            raise apsw.IOError("no delete")
        super().xDelete(filename, syncdir)


@final
class _File(apsw.VFSFile):
    def __init__(
        self,
        disk: FailingDisk,
        file: str,
        name: str | apsw.URIFilename | None,
        flags: list[int],
    ) -> None:
        self._disk = disk
        self.file = file
        self.must_tell = False
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        how = self._disk.fails("write", self.file)
        if how is None:
            if self.file in self._disk.unsound:
                self._disk.behind.append(self.file)
            super().xWrite(data, offset)
            return
        if how == "short":
            super().xWrite(data[: len(data) // 2], offset)
        raise apsw.IOError("no write") if how == "error" else apsw.FullError("no room")

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        if self._disk.fails("truncate", self.file):
            raise apsw.IOError("no truncate")
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:  # noqa: N802
        if self._disk.fails("sync", self.file):
            self._disk.unsound.add(self.file)
            for other in self._disk.files:
                other.must_tell |= other.file == self.file and other is not self
            raise apsw.IOError("no sync")
        if self.must_tell:
            self.must_tell = False
            raise apsw.IOError("no sync, told late")
        super().xSync(flags)

    def xClose(self) -> None:  # noqa: N802
        super().xClose()
        self._disk.files.remove(self)
