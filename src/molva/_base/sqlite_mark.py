"""How much of a SQLite file's WAL is known to be on the disk: found missing, it is said.

A WAL is a chain of frames, each with a checksum. Whoever opens the file first reads it up to
the first frame that is not right, and takes that for the end: so it is after a power cut, when
the last frames never reached the disk. A flipped bit looks the same to SQLite, and everything
behind it would be gone without a word, however well it had been synced.

So a small file beside the WAL, ``-mark``, says how many frames of which WAL have been synced.
It is written after the fsync, and is not synced itself: after a power cut it may be older than
the WAL and claim less than there is, never more. Finding less than it claims is damage.

A WAL that is missing or empty is no contradiction: SQLite leaves it so whenever all of it was
copied into the file. A checksum guards the mark; one that is wrong claims nothing.
"""

import contextlib
import os
import struct
from typing import Final, NamedTuple, final
from zlib import crc32

import apsw

__all__ = ["Mark", "has_mark", "lost_frames", "mark_file"]

# Salts of the WAL (8 bytes as they stand in it), frames, checksum of both.
_MARK: Final = struct.Struct("<8sQI")
# Of SQLite's file format: the WAL's header, in it the salts, its checksum in the last 8 bytes.
_HEADER_BYTES: Final = 32
_FRAME_HEADER_BYTES: Final = 24
_SALTS: Final = slice(16, 24)
_MAGIC_BIG_ENDIAN: Final = 0x377F0683


def mark_file(path: str) -> str:
    """Return the name of the mark of a database file."""
    return f"{path}-mark"


@final
class Mark:
    """Writes the mark of one file; it costs two calls of the system, and no fsync."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._wal = self._file = -1

    def write(self, frames: int) -> None:
        """Note that the first ``frames`` of the WAL are on the disk.

        An error is no reason to refuse what is safe: the claim is then an older one.
        """
        with contextlib.suppress(OSError):
            if self._wal < 0:
                # The WAL is never replaced while a connection of ours is open.
                self._wal = os.open(f"{self._path}-wal", os.O_RDONLY | os.O_CLOEXEC)
                flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
                self._file = os.open(mark_file(self._path), flags, 0o644)
            salts = os.pread(self._wal, 8, _SALTS.start)
            if len(salts) == 8:
                self._put(_packed(salts, frames))

    def _put(self, content: bytes) -> None:
        os.pwrite(self._file, content, 0)

    def close(self) -> None:
        """Release both files."""
        for descriptor in (self._wal, self._file):
            if descriptor >= 0:
                os.close(descriptor)
        self._wal = self._file = -1


def has_mark(path: str) -> bool:
    """Return whether anything was ever synced to the WAL of this file."""
    return _claim(path) is not None


@final
class _Claim(NamedTuple):
    salts: bytes
    frames: int


def lost_frames(connection: apsw.Connection, path: str) -> tuple[int, int] | None:
    """Return how many frames of the WAL can be read and how many were synced, if that is more.

    Args:
        connection: Has read from the file, so SQLite knows its WAL; not in a transaction.
        path: The database file.
    """
    claim = _claim(path)
    if claim is None or not _is_of(claim, _wal_start(path)):
        return None
    # Looks only: how many frames SQLite takes the WAL to have.
    found, _ = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
    if found >= claim.frames:
        return None
    # Another process may have begun the WAL anew between the two looks.
    return (found, claim.frames) if _is_of(claim, _wal_start(path)) else None


def _packed(salts: bytes, frames: int) -> bytes:
    return _MARK.pack(salts, frames, crc32(salts + frames.to_bytes(8, "little")))


def _claim(path: str) -> _Claim | None:
    try:
        with open(mark_file(path), "rb") as file:
            content = file.read(_MARK.size)
    except OSError:
        return None
    if len(content) < _MARK.size:
        return None
    salts, frames, _ = _MARK.unpack(content)
    return _Claim(salts, frames) if content == _packed(salts, frames) else None


def _wal_start(path: str) -> bytes:
    try:
        with open(f"{path}-wal", "rb") as file:
            return file.read(_HEADER_BYTES + _FRAME_HEADER_BYTES)
    except OSError:
        return b""


def _is_of(claim: _Claim, start: bytes) -> bool:
    """Return whether a WAL that starts like this is the one that the claim is about."""
    if not start:
        return False
    if len(start) < _HEADER_BYTES:
        return True  # SQLite leaves it empty, or writes a whole header: it was cut
    if _is_sound(start[:_HEADER_BYTES]):
        return start[_SALTS] == claim.salts
    # SQLite reads none of it. The first frame repeats the salts.
    frame = start[_HEADER_BYTES:]
    return claim.salts in (start[_SALTS], frame[8:16])


def _is_sound(header: bytes) -> bool:
    """Return whether the checksum of a WAL's header is right, as SQLite computes it."""
    [magic] = struct.unpack(">I", header[:4])
    order = ">" if magic == _MAGIC_BIG_ENDIAN else "<"
    words = struct.unpack(f"{order}6I", header[:24])
    first = second = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFF_FFFF
        second = (second + odd + first) & 0xFFFF_FFFF
    return (first, second) == struct.unpack(">2I", header[24:32])
