"""Who consumes a subscription of a SQLite file, who owns which lane, and how to wake them.

Everything here is file locks and named pipes in a folder beside the database:

    queue.db-lanes/<subscription>.member.<slot>   locked by each live consumer
    queue.db-lanes/<subscription>.lane.<lane>     locked by the lane's owner
    queue.db-lanes/<subscription>.wake.<slot>     a pipe that the consumer reads

(``q<queue>`` instead of the subscription's number where it is a queue, which has no lanes.)
Senders that wait for room have the same in a folder below this one (``_sqlite_room``).

A lock of ``flock`` belongs to an open file and is free the moment its last process dies,
whatever killed it. So there is no heartbeat, no lease to renew and nothing to clean up: a
killed consumer's lanes can be taken at once, and a stopped one keeps them until it goes
on or dies.

Rejected: POSIX record locks, which a process loses when it closes any descriptor of the
file; rows with a heartbeat, which write while idle and hand over only after a time-out;
polling the database, which costs either latency or idle CPU.
"""

import contextlib
import errno
import fcntl
import os
import stat
import time
import weakref
from pathlib import Path
from typing import Final, final

__all__ = ["Members", "Waker", "lanes_folder", "live_members"]

# A folder's time stamp moves in steps of the kernel's clock, up to 10 ms. One that is
# younger than this may change again without a sign.
_STAMP_DOUBT_NS: Final = 50_000_000


def lanes_folder(database: Path) -> Path:
    """Return the folder of locks and pipes that belongs to a database."""
    return database.with_name(database.name + "-lanes")


@final
class Members:
    """One consumer's membership: its slot, its lanes, its pipe.

    Args:
        folder: As ``lanes_folder`` gives it; made where missing.
        owner: Keeps the subscriptions and queues of one database apart.
    """

    def __init__(self, folder: Path, owner: int | str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._prefix = f"{owner}."
        self._probes: dict[int, int] = {}
        self._lanes: dict[int, int] = {}
        self._slot, self._slot_lock = self._take_slot()
        self._wake_path = folder / f"{self._prefix}wake.{self._slot}"
        # Made anew each time: the folder's time stamp is how senders learn of us.
        with contextlib.suppress(FileNotFoundError):
            self._wake_path.unlink()
        os.mkfifo(self._wake_path)
        self.wake_descriptor: Final = os.open(self._wake_path, os.O_RDONLY | os.O_NONBLOCK)
        # Our own writing end: without one, a pipe whose last sender has gone reads as
        # ended, and waiting for it would spin.
        self._wake_writer = os.open(self._wake_path, os.O_WRONLY | os.O_NONBLOCK)
        _members.add(self)

    def share(self) -> tuple[int, int]:
        """Return (rank of this consumer, number of live consumers).

        Lane ``l`` is meant for the consumer of rank ``l % number``.
        """
        rank = number = 0
        for slot in self._slots():
            if slot == self._slot:
                rank = number
                number += 1
            elif self._is_live(slot):
                number += 1
        return rank, max(1, number)

    def take_lane(self, lane: int) -> bool:
        """Own a lane if nobody else does; return whether it is ours now."""
        if lane in self._lanes:
            return True
        descriptor = _open_lock(self._folder / f"{self._prefix}lane.{lane}")
        if not _lock(descriptor, fcntl.LOCK_EX):
            os.close(descriptor)
            return False
        self._lanes[lane] = descriptor
        return True

    def free_lane(self, lane: int) -> None:
        """Let another consumer own a lane."""
        os.close(self._lanes.pop(lane))

    def drain_wake(self) -> None:
        """Forget the wake-ups so far. Look for messages after this, then wait."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self.wake_descriptor, 65_536)) == 65_536:
                pass

    def close(self) -> None:
        """Leave: free the lanes, the slot and the pipe."""
        with contextlib.suppress(FileNotFoundError):
            self._wake_path.unlink()
        os.close(self.wake_descriptor)
        os.close(self._wake_writer)
        for descriptor in (*self._lanes.values(), *self._probes.values(), self._slot_lock):
            os.close(descriptor)
        self._lanes.clear()
        self._probes.clear()
        _members.discard(self)

    def let_go_in_fork(self) -> None:
        """Close the descriptors that a fork inherited; the parent keeps what it holds."""
        for descriptor in (*self._lanes.values(), *self._probes.values(), self._slot_lock):
            os.close(descriptor)
        self._lanes.clear()
        self._probes.clear()

    def _take_slot(self) -> tuple[int, int]:
        slot = 0
        while True:
            descriptor = _open_lock(self._folder / f"{self._prefix}member.{slot}")
            if _lock(descriptor, fcntl.LOCK_EX):
                return slot, descriptor
            os.close(descriptor)
            slot += 1

    def _slots(self) -> list[int]:
        return _slots(self._folder, self._prefix)

    def _is_live(self, slot: int) -> bool:
        descriptor = self._probes.get(slot)
        if descriptor is None:
            path = self._folder / f"{self._prefix}member.{slot}"
            descriptor = self._probes[slot] = _open_lock(path)
        # A shared lock, so that two consumers who look at once do not see each other.
        if _lock(descriptor, fcntl.LOCK_SH):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            return False
        return True


@final
class Waker:
    """The other side: wakes every consumer of the database that waits.

    Args:
        folder: As ``lanes_folder`` gives it; may be missing as long as nobody consumes.
            Senders that wait for room have another (``_sqlite_room``).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stamp = -1
        self._pipes: dict[str, int] = {}

    def wake(self) -> None:
        """Tell all who wait to look again. Never blocks, never raises.

        It is a courtesy: what was stored is stored, and who is not woken looks for itself
        a moment later.
        """
        with contextlib.suppress(OSError):
            self._wake()

    def anybody(self) -> bool:
        """Return whether somebody waits to be woken, as far as can be told. Never raises."""
        with contextlib.suppress(OSError):
            self._look_if_changed()
        return bool(self._pipes)

    def _wake(self) -> None:
        self._look_if_changed()
        for name, descriptor in list(self._pipes.items()):
            try:
                os.write(descriptor, b"\0")
            except BlockingIOError:
                pass  # its pipe is full of wake-ups: it is awake
            except BrokenPipeError:
                os.close(self._pipes.pop(name))

    def close(self) -> None:
        """Let go of the pipes."""
        for descriptor in self._pipes.values():
            os.close(descriptor)
        self._pipes.clear()

    def _look_if_changed(self) -> None:
        try:
            stamp = os.stat(self._folder).st_mtime_ns
        except FileNotFoundError:
            return
        if stamp != self._stamp or time.time_ns() - stamp < _STAMP_DOUBT_NS:
            self._stamp = stamp
            self._look()

    def _look(self) -> None:
        """Open the pipes that appeared, and those that were made anew."""
        found = {name for name in os.listdir(self._folder) if ".wake." in name}
        for name in self._pipes.keys() - found:
            os.close(self._pipes.pop(name))
        for name in found:
            old = self._pipes.get(name)
            try:
                descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                # ENXIO: nobody reads it, its consumer was killed. ENOENT: it just left.
                if error.errno not in (errno.ENXIO, errno.ENOENT):
                    raise
                continue
            if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                continue
            if old is not None:
                os.close(old)
            self._pipes[name] = descriptor


def _let_go_in_fork() -> None:
    for members in _members:
        with contextlib.suppress(OSError):  # closed before the fork
            members.let_go_in_fork()
    _members.clear()


# A lock of flock is free when its last descriptor is closed, and a fork has copies of them
# all: without this a child, whatever it does, would hold the lanes of a parent that died.
_members: Final["weakref.WeakSet[Members]"] = weakref.WeakSet()
os.register_at_fork(after_in_child=_let_go_in_fork)


def live_members(folder: Path, owner: int | str) -> int:
    """Return how many consumers are live."""
    number = 0
    if folder.is_dir():
        for slot in _slots(folder, f"{owner}."):
            descriptor = _open_lock(folder / f"{owner}.member.{slot}")
            number += not _lock(descriptor, fcntl.LOCK_SH)
            os.close(descriptor)
    return number


def _slots(folder: Path, prefix: str) -> list[int]:
    prefix += "member."
    names = os.listdir(folder)
    return sorted(int(name[len(prefix) :]) for name in names if name.startswith(prefix))


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
