"""``molva up``: one HTTP process and some workers, kept running together.

The supervisor serves nothing itself. It starts the others, starts one anew when it dies,
and stops all of them when it is told to; should it be killed, its end of a pipe closes
and the others drain and go. A child that says that starting it again cannot help (a wrong
option, an address in use, a file of a newer version) ends everything with its exit code, and
so does one that fails for an unknown reason before the service was ever ready.

A folder of data is used by one supervisor at a time. Its lock is handed down to the
children, so that it is free only when the last of them has gone.
"""

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

__all__ = ["Child", "FolderInUseError", "Supervisor", "locked_folder"]

# Seconds before a child that died is started again: at first, and at most. The pause
# doubles only for one that dies as soon as it starts: one that had been at work for a
# while was killed or met something rare, and its visitors wait.
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
_WELL_SECONDS: Final = 1.5
# How Python ends after an exception that nobody expected.
_UNEXPECTED: Final = 1
# Seconds that children get to drain before they are killed.
_DRAIN_SECONDS: Final = 9.5
# Seconds for which a lock is waited for whose supervisor was killed: its children drain.
_LOCK_SECONDS: Final = 10.0
# Seconds between two looks at the children while nothing happens. Signals wake us at once.
_LOOK_INTERVAL: Final = 5.0


@final
class FolderInUseError(Exception):
    """Another supervisor uses the folder."""


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[int]:
    """Hold the folder's lock for the block; yield its descriptor, to be handed down.

    Raises:
        FolderInUseError: Another supervisor holds it.
    """
    descriptor = os.open(folder / "molva.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _try_lock(descriptor):
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            if _is_alive(holder) or time.monotonic() > deadline:
                raise FolderInUseError(
                    f"{folder} is in use by another molva (process {holder or 'unknown'}); stop "
                    "it, or choose another folder with --data"
                )
            time.sleep(0.05)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(process: str) -> bool:
    if not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@final
@dataclass(slots=True)
class Child:
    """One process to keep running.

    ``inherit`` and ``environment``: what this one is handed beside what all are.
    """

    name: str
    arguments: Sequence[str]
    inherit: Sequence[int] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0
    restart_at: float = 0.0
    pause: float = _FIRST_PAUSE
    was_well: bool = False  # some process of it lived for longer than _WELL_SECONDS


@final
class Supervisor:
    """Keeps children running until it is told to stop.

    Args:
        children: What to run.
        inherit: Descriptors handed down to each child.
        environment: Added to each child's environment.
        fatal: Exit codes after which starting again cannot help.
    """

    def __init__(
        self,
        children: Sequence[Child],
        *,
        inherit: Sequence[int],
        environment: Mapping[str, str],
        fatal: frozenset[int],
    ) -> None:
        self._children = children
        self._inherit = tuple(inherit)
        self._environment = {**os.environ, **environment}
        self._fatal = fatal
        self._stopping = False
        self._is_ready: bool | None = None  # None: nothing tells
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        os.set_blocking(self._wake_reader, False)

    def run(self, *, ready: int | None, on_ready: Callable[[], None]) -> int:
        """Run until a signal or a fatal end; return the exit code.

        Args:
            ready: Descriptor that can be read once the service answers; None where none
                tells, and a child counts as ready that lived for a while.
            on_ready: Called once, when it does. What it raises ends nothing.
        """
        self._listen_to_signals()
        watched = [self._wake_reader]
        if ready is not None:
            watched.append(ready)
            self._is_ready = False
        try:
            for child in self._children:
                self._start(child)
            while not self._stopping:
                code = self._look()
                if code is not None:
                    self._stop()
                    return code
                readable = self._wait(watched)
                if ready is not None and ready in readable:
                    watched.remove(ready)
                    self._is_ready = True
                    _call_unharmed(on_ready)
            return self._stop()
        finally:
            self._kill()

    def _listen_to_signals(self) -> None:
        def stop(*_: object) -> None:
            self._stopping = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)

    def _wait(self, watched: Sequence[int]) -> list[int]:
        """Sleep until a signal comes or a child is due to start; return what can be read."""
        seconds = _LOOK_INTERVAL
        due = [c.restart_at for c in self._children if c.process is None]
        if due:
            seconds = min(seconds, max(0.0, min(due) - time.monotonic()))
        readable, _, _ = select.select(watched, [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_reader, 4_096)
        return readable

    def _start(self, child: Child) -> None:
        child.started = time.monotonic()
        try:
            child.process = subprocess.Popen(
                [sys.executable, "-m", "molva", *child.arguments],
                pass_fds=(*self._inherit, *child.inherit),
                env={**self._environment, **child.environment},
                stdin=subprocess.DEVNULL,
                # A terminal's Ctrl-C goes to the whole group; ours to stop in order is us.
                start_new_session=True,
            )
        except OSError as error:  # no memory or process left: the other children go on
            _start_later(child, f"could not be started ({error})", well=False)

    def _look(self) -> int | None:
        """Start again what died; return a fatal exit code."""
        now = time.monotonic()
        for child in self._children:
            if child.process is None:
                if now >= child.restart_at:
                    self._start(child)
                continue
            code = child.process.poll()
            if code is None:
                continue
            child.process = None
            well = now - child.started > _WELL_SECONDS
            child.was_well = child.was_well or well
            was_ready = child.was_well if self._is_ready is None else self._is_ready
            if code in self._fatal or (code == _UNEXPECTED and not was_ready):
                return code
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            _start_later(child, how, well=well)
        return None

    def _stop(self) -> int:
        """Tell all children to drain, and wait; return 0 if all did, in order."""
        running = [c.process for c in self._children if c.process is not None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _DRAIN_SECONDS
        clean = True
        for process in running:
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
                # The signal itself ends a child that has not come to listen to it yet.
                clean = clean and code in (0, -signal.SIGTERM)
            except subprocess.TimeoutExpired:
                clean = False
        return 0 if clean else 1

    def _kill(self) -> None:
        for child in self._children:
            if child.process is not None and child.process.poll() is None:
                child.process.kill()
                child.process.wait()


def _start_later(child: Child, how: str, *, well: bool) -> None:
    child.pause = _FIRST_PAUSE if well else min(_LONGEST_PAUSE, child.pause * 2)
    child.restart_at = time.monotonic() + child.pause
    _say(f"{child.name} {how}; starting it again in {child.pause:.1f} s")


def _call_unharmed(on_ready: Callable[[], None]) -> None:
    try:
        on_ready()
    except Exception as error:  # noqa: BLE001 - a closed stdout, for one, stops no service
        _say(f"the service is ready, but saying so failed ({error})")


def _say(text: str) -> None:
    # Whoever read our stderr may have gone; the service stays.
    with contextlib.suppress(OSError, ValueError):
        print(f"molva up: {text}", file=sys.stderr, flush=True)
