"""A SQLite VFS that counts what is done to the WAL and the database, and fails on command."""

import itertools
from collections.abc import Callable

import apsw

_names = itertools.count()


class FaultyVFS(apsw.VFS):
    """The system's own VFS, with faults.

    Attributes:
        fail_sync: Asked at each fsync of the WAL; True makes it fail.
        fail_write: Asked at each write to the WAL; True says that the disk is full.
        fail_io: Asked at each write to the WAL; True makes it an I/O error.
        syncs, writes: How often the WAL was synced, and any file written.
    """

    def __init__(self) -> None:
        self.vfs_name = f"faulty-{next(_names)}"
        self.fail_sync: Callable[[], bool] = lambda: False
        self.fail_write: Callable[[], bool] = lambda: False
        self.fail_io: Callable[[], bool] = lambda: False
        self.syncs = self.writes = 0
        super().__init__(self.vfs_name, "")

    def xOpen(  # noqa: N802 - SQLite's name
        self, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> "_File":
        return _File(self, name, flags)


class _File(apsw.VFSFile):
    def __init__(
        self, vfs: FaultyVFS, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> None:
        self._vfs = vfs
        self._is_wal = bool(flags[0] & apsw.SQLITE_OPEN_WAL)
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self._vfs.writes += 1
        if self._is_wal and self._vfs.fail_write():
            raise apsw.FullError("no space left")
        if self._is_wal and self._vfs.fail_io():
            raise apsw.IOError("the disk is dying")
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:  # noqa: N802
        if self._is_wal:
            self._vfs.syncs += 1
            if self._vfs.fail_sync():
                raise apsw.IOError("fsync failed")
        super().xSync(flags)
