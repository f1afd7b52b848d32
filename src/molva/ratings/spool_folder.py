"""Where spools lie: a folder of one machine, with a numbered spool for each process.

    spool/1.lock       locked by the process whose spool it is
    spool/1/queue.db   the spool itself, a queue file with all that belongs to it

A process takes the first spool that nobody holds, with whatever is in it: so one that is
started anew after a kill goes on where the last one ended. What is left over, because fewer
processes run than before, is adopted by any that does: it belongs to nobody as soon as its lock
is free, which it is the moment its process dies.

A spool that was emptied by another, and has no dead letters, is removed whole, under its lock.
The lock files stay, 0 bytes each: deleting one that somebody is about to lock would let two lock
"the same" file.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Final, final
from urllib.parse import quote

from molva.messaging import UnavailableError

__all__ = ["SpoolFile", "SpoolFolder"]

_logger: Final = logging.getLogger("molva.ratings")

_DATABASE: Final = "queue.db"


@final
class SpoolFile:
    """One spool, held by this process until it is released.

    Attributes:
        folder: The spool's own folder.
    """

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder: Final = folder
        self._lock: int | None = lock

    @property
    def url(self) -> str:
        """The queue file in it, as a broker's URL without a topic."""
        return _url(self.folder)

    def remove(self) -> None:
        """Delete the spool: nothing waits in it, it has no dead letters, nobody has it open."""
        assert self._lock is not None, "only who holds a spool may delete it"
        shutil.rmtree(self.folder, ignore_errors=True)

    def release(self) -> None:
        """Let others take it. Idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@final
class SpoolFolder:
    """The spools of one machine's processes.

    Args:
        path: The folder; made when it is first needed.
    """

    def __init__(self, path: Path) -> None:
        self.path: Final = path

    def take(self) -> SpoolFile:
        """Take the first spool that nobody holds, with what is in it; make it where it is new.

        Raises:
            UnavailableError: The folder cannot be written.
        """
        number = 1
        try:
            _make(self.path)
            while (lock := self._lock(number)) is None:
                number += 1
            folder = self.path / str(number)
            _make(folder)
        except OSError as error:
            raise UnavailableError(
                f"{self.path}: no spool can be kept there ({error.strerror}); choose another "
                "folder with --data, or --when-broker-down refuse"
            ) from error
        return SpoolFile(folder, lock)

    def left_over(self) -> Generator[SpoolFile, None, None]:
        """Take, one after the other, each spool that is there and that nobody holds.

        Who takes one releases it before the next. One that may not be taken, as of another user, is
        logged and left out.
        """
        for number in self._numbers():
            try:
                lock = self._lock(number)
            except OSError as error:
                _logger.error("%s cannot be sent on: %s", self.path / str(number), error)
                continue
            if lock is None:
                continue
            found = SpoolFile(self.path / str(number), lock)
            try:
                if _may_hold_something(found.folder):
                    yield found
            finally:
                found.release()

    def look(self) -> list[tuple[str, bool]]:
        """Return the URL of each spool that is there, and whether a process holds it.

        Changes nothing. Whoever asks for a lock in this very moment finds it taken, takes the
        next one, and the one that we looked at is adopted.
        """
        found = []
        for number in self._numbers():
            folder = self.path / str(number)
            if _may_hold_something(folder):
                found.append((_url(folder), self._is_held(number)))
        return found

    def _is_held(self, number: int) -> bool:
        try:
            lock = self._lock(number)
        except OSError:
            return False  # whoever could hold it; what reading it says is the next question
        if lock is not None:
            os.close(lock)
        return lock is None

    def _numbers(self) -> list[int]:
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        except OSError as error:
            _logger.error("%s cannot be looked into: %s", self.path, error)
            return []
        return sorted(int(name) for name in names if name.isdecimal())

    def _lock(self, number: int) -> int | None:
        """Lock a spool; return the lock's descriptor, None where somebody else has it."""
        # Not inherited, so that it is free when this process ends, whatever it has started.
        lock = os.open(self.path / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except BaseException:
            os.close(lock)
            raise
        return lock


def _may_hold_something(folder: Path) -> bool:
    try:
        return (folder / _DATABASE).exists()
    except OSError:
        return True  # it is somebody else's; what reading it says is the next question


def _url(folder: Path) -> str:
    return f"sqlite://{quote(str(folder.absolute() / _DATABASE))}"


def _make(folder: Path) -> None:
    """Make a folder that is there after a power cut, too."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for changed in (folder, folder.parent):
        descriptor = os.open(changed, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
