"""File systems of our own: small ones to fill, and images that can lose their power.

A power cut, on one machine and without device-mapper or FUSE:

    An ext4 image is mounted through a loop device. What a program writes waits in the page
    cache of that file system; an fsync, and nothing sooner, moves it to the image: the
    file system's own timer is set to 300 s. So a copy of the image *is* the disk of a
    machine that lost its power at that moment, and mounting the copy replays the journal
    as a real start does.

    Copying takes time, and a disk that changes meanwhile would be one that never existed.
    So whoever writes is stopped (SIGSTOP) before the copy and killed after it. What was
    acknowledged is noted before they are stopped.

    The image is sparse, and only blocks in use are copied: tens of milliseconds.

So what was not synced is lost, all of it. A drive may also have written some of it, in any
order, a sector at a time. For that a second copy is made, behind a sync of the whole file system
with the writers still stopped: it has all that was ever written. ``tear`` then takes sectors at
random from the second copy into the files of the first, where both have the same blocks of the
same file: blocks that the first one's metadata does not know could hold anything, and nobody
would see it. The file system's own metadata is never mixed: its journal orders it, and a mixture
would be a state that no real disk with barriers can have.

Of several writes to one sector since the last sync it has the last or none. Disks that lie about
an fsync are beyond it.
"""

import contextlib
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from random import Random
from typing import IO, Final, final

__all__ = ["Image", "can_mount", "limited", "quiet"]

# Seconds until ext4 writes by itself. Its usual 5 would save us.
_COMMIT_SECONDS: Final = 300


_SECTOR: Final = 512
# What ext4 allocates; every image here is made with it.
_BLOCK: Final = 4_096
# Linux: on which block of the disk a block of a file lies. Needs root.
_FIBMAP: Final = 1


def quiet(*command: str | os.PathLike[str]) -> None:
    """Run a command; raise RuntimeError with what it said where it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        shown = " ".join(map(str, command))
        raise RuntimeError(f"{shown}: {done.stderr.strip() or done.returncode}")


def can_mount(folder: Path) -> str:
    """Return why file systems cannot be mounted here; empty where they can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    probe = Image(folder / "probe.img", megabytes=32)
    try:
        probe.make()
        probe.mount(folder / "probe")
    except (RuntimeError, OSError) as error:
        return str(error)
    finally:
        probe.discard()
    return ""


@final
class Image:
    """An ext4 file system in a file."""

    def __init__(self, path: Path, *, megabytes: int = 256) -> None:
        self.path = path
        self.megabytes = megabytes
        self.mounted_at: Path | None = None

    def make(self) -> None:
        """Make an empty file system."""
        with self.path.open("wb") as file:
            file.truncate(self.megabytes * 2**20)
        # No lazy initialisation: a kernel thread would write to the image on its own.
        options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
        quiet(
            "mkfs.ext4",
            "-q",
            "-F",
            "-b",
            str(_BLOCK),
            "-m",
            "0",
            "-J",
            "size=4",
            "-E",
            options,
            self.path,
        )

    def mount(self, folder: Path) -> None:
        """Mount it at ``folder``, replaying its journal where it has one."""
        folder.mkdir(exist_ok=True)
        options = f"loop,commit={_COMMIT_SECONDS},noatime"
        quiet("mount", "-t", "ext4", "-o", options, self.path, folder)
        self.mounted_at = folder

    def cut(self, copy: Path) -> "Image":
        """Return the disk as a power cut at this moment would leave it. Nobody may write."""
        # cp knows holes; --reflink shares what the file system below can share.
        quiet("cp", "--sparse=always", "--reflink=auto", self.path, copy)
        return Image(copy, megabytes=self.megabytes)

    def flush(self) -> None:
        """Move all that was written to the image, as no power cut would."""
        assert self.mounted_at is not None
        quiet("sync", "-f", self.mounted_at)

    def tear(self, later: "Image", folder: Path, names: Collection[str], dice: Random) -> int:
        """Take sectors at random from ``later`` into files of this image; return how many.

        Args:
            later: The same disk with all that was written. Not mounted.
            folder: Where to mount it meanwhile.
            names: Names of files to tear, wherever they lie.
            dice: Which sectors.
        """
        assert self.mounted_at is not None
        later.mount(folder)
        try:
            return sum(
                _tear(path, folder / path.relative_to(self.mounted_at), dice)
                for path in sorted(self.mounted_at.rglob("*"))
                if path.name in names
            )
        finally:
            later.unmount()

    def unmount(self) -> None:
        """Unmount, once nobody holds it; after two seconds as soon as nobody does."""
        if self.mounted_at is None:
            return
        folder, self.mounted_at = self.mounted_at, None
        deadline = time.monotonic() + 2
        while True:
            try:
                quiet("umount", folder)
                return
            except RuntimeError:
                if time.monotonic() > deadline:
                    quiet("umount", "-l", folder)
                    return
                time.sleep(0.05)

    def discard(self) -> None:
        """Unmount and delete it."""
        with contextlib.suppress(RuntimeError):
            self.unmount()
        self.path.unlink(missing_ok=True)


def _tear(path: Path, later_path: Path, dice: Random) -> int:
    if not later_path.exists() or path.stat().st_ino != later_path.stat().st_ino:
        return 0  # another file of the same name
    torn = 0
    with path.open("r+b") as file, later_path.open("rb") as later:
        for block in range(path.stat().st_size // _BLOCK):
            old, new = _block(file, block), _block(later, block)
            if old == new or _place(file, block) in (0, -1):
                continue
            if _place(file, block) != _place(later, block):
                continue  # truncated and written anew, somewhere else
            for at in range(0, len(new), _SECTOR):
                if old[at : at + _SECTOR] != new[at : at + _SECTOR] and dice.random() < 0.5:
                    os.pwrite(file.fileno(), new[at : at + _SECTOR], block * _BLOCK + at)
                    torn += 1
        os.fsync(file.fileno())
    return torn


def _block(file: IO[bytes], block: int) -> bytes:
    return os.pread(file.fileno(), _BLOCK, block * _BLOCK)


def _place(file: IO[bytes], block: int) -> int:
    """Return on which block of its disk a block of a file lies; 0 where it has none."""
    [place] = struct.unpack("i", fcntl.ioctl(file.fileno(), _FIBMAP, struct.pack("i", block)))
    assert isinstance(place, int)
    return place


@contextlib.contextmanager
def limited(folder: Path, *, megabytes: int) -> Iterator[Path]:
    """Give a file system in memory that holds so much and no more; needs root."""
    folder.mkdir(exist_ok=True)
    quiet("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder)
    try:
        yield folder
    finally:
        try:
            quiet("umount", folder)
        except RuntimeError:
            quiet("umount", "-l", folder)
