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

It models that what was not synced is lost, all of it. Torn sectors and disks that lie
about an fsync are beyond it.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, final

__all__ = ["Image", "can_mount", "limited", "quiet"]

# Seconds until ext4 writes by itself. Its usual 5 would save us.
_COMMIT_SECONDS: Final = 300


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
        quiet("mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=4", "-E", options, self.path)

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
