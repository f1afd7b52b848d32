"""One server of ours in a process of its own: start, kill, pause, restart, stop."""

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import psutil

from tests.brokers.certificates import Certificates
from tests.brokers.errors import MissingServerError, ServerFailedError
from tests.brokers.install import may_install
from tests.brokers.kind import Kind, Place

__all__ = ["Server", "ensure_local", "wait_ready"]

# Seconds that an orderly stop may take before the server is killed. Kafka takes two or three
# to hand over what it leads, also where nobody is there to take it.
_STOP_SECONDS: Final = 20.0

# Seconds between two questions whether it is ready.
_PROBE_SECONDS: Final = 0.1


class Server:
    """A server that was started here, or by an earlier run of ``scripts/brokers``."""

    def __init__(self, kind: Kind, place: Place, process: psutil.Process | None = None) -> None:
        self.kind = kind
        self.place = place
        self.version: str | None = None
        self._process = process
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What to put into Molva's options, credentials included."""
        return self.kind.url(self.place)

    @property
    def port(self) -> int:
        """The port on 127.0.0.1; the same over restarts."""
        return self.place.port

    @property
    def password(self) -> str | None:
        """The password of user ``molva`` (of Redis: of the default user)."""
        return self.place.password

    @property
    def certificates(self) -> Certificates | None:
        """What it shows and what its clients trust, where it speaks TLS."""
        return self.place.certificates

    @property
    def data_dir(self) -> str:
        """The folder with what it stores."""
        return str(self.place.data)

    @property
    def log(self) -> str:
        """What it has said so far, over all its starts."""
        return self.place.log.read_text(errors="replace")

    @property
    def process(self) -> psutil.Process:
        """The server's main process."""
        assert self._process is not None, f"{self.kind.name} was never started"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def create(self) -> None:
        """Make its folder, write its configuration, start it, wait until it is ready."""
        self.place.data.mkdir(parents=True)
        try:
            self.kind.prepare(self.place)
            self.start()
        except BaseException:
            self.remove()
            raise

    def start(self) -> None:
        """Start it with the data that are there; return when it is ready."""
        with self.place.log.open("ab") as log:
            self._child = subprocess.Popen(
                self.kind.command(self.place),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.place.folder,
                # Ctrl-C on a terminal is for the tests; they stop their servers in order.
                start_new_session=True,
                **self.kind.run_as(),
            )
        self._process = psutil.Process(self._child.pid)
        try:
            self.version = wait_ready(self.kind, self.url, self.place, self._child)
        except BaseException:
            self.kill()
            raise

    def restart(self) -> None:
        """Stop it in order if it still runs; start it on the same port with the same data."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """End it with SIGKILL, helpers of PostgreSQL included, and wait until it is gone."""
        victims = self._held_family()
        for each in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
        _wait_ended(victims)
        self._forget()

    def pause(self) -> None:
        """Hold it with SIGSTOP: connections stay open and, once this returns, nothing answers."""
        family = self._held_family()
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.suspend()
        _wait_until(lambda: all(_is_held(each) for each in family))

    def _held_family(self) -> list[psutil.Process]:
        """Hold the server itself, and return it with its helpers: it starts no more of them."""
        family = self._family()
        if family:
            with contextlib.suppress(psutil.NoSuchProcess):
                family[0].suspend()
            _wait_until(lambda: _is_held(family[0]))
        return self._family()

    def resume(self) -> None:
        """Let a paused server go on."""
        for each in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.resume()

    def stop(self) -> None:
        """End it in order, paused or not; kill it if that takes too long."""
        self.resume()
        family = self._family()
        for each in family[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(self.kind.stop_signal)
        if not _wait_ended(family):
            self.kill()
        self._forget()

    def remove(self) -> None:
        """Stop it, and remove its folder with all data."""
        self.stop()
        shutil.rmtree(self.place.folder, ignore_errors=True)

    def is_running(self) -> bool:
        """Whether its process lives and is the one that was started."""
        return bool(self._family())

    def _family(self) -> list[psutil.Process]:
        """Return the main process and then those that it started; none if it is gone."""
        if self._process is None or not _is_alive(self._process):
            return []
        try:
            return [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _forget(self) -> None:
        if self._child is not None:
            # It has ended; this collects its exit code, whoever was faster.
            self._child.wait(_STOP_SECONDS)


def _wait_ended(processes: list[psutil.Process]) -> bool:
    """Wait until all have ended; False if that takes too long."""
    # Ended is enough: orphans wait for the system's first process to collect them, and inside
    # a container that may take it seconds.
    return _wait_until(lambda: not any(_is_alive(process) for process in processes))


def _wait_until(come: Callable[[], bool]) -> bool:
    """Wait until something has come true; False if that takes too long."""
    deadline = time.monotonic() + _STOP_SECONDS
    while not come():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _is_held(process: psutil.Process) -> bool:
    """Tell whether each of its threads is stopped, or gone.

    A stop reaches them one after the other: some still answer while others stand.
    """
    states = set()
    for told in Path(f"/proc/{process.pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread has ended
            # Behind the name, which may hold anything.
            states.add(told.read_text().rpartition(")")[2].split()[0])
    return states <= {"T", "t", "X", "Z"}


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ensure_local(kind: Kind) -> None:
    """Make sure that programs here can run the server, installing them where allowed."""
    reason = kind.missing()
    if reason is not None and may_install():
        kind.install()
        reason = kind.missing()
    if reason is not None:
        raise MissingServerError(kind.name, f"{reason}; MOLVA_INSTALL=1 installs it")


def wait_ready(
    kind: Kind,
    url: str,
    place: Place | None = None,
    child: "subprocess.Popen[bytes] | None" = None,
) -> str | None:
    """Wait until the server answers a question of its own protocol; return its version."""
    deadline = time.monotonic() + kind.ready_seconds
    log = place.log if place is not None else None
    while True:
        if child is not None and child.poll() is not None:
            raise ServerFailedError(kind.name, f"it ended with {child.returncode}", log)
        try:
            return kind.probe(url, place.certificates if place is not None else None)
        except Exception as error:  # each client library has errors of its own
            if time.monotonic() > deadline:
                reason = f"not ready within {kind.ready_seconds:.0f} s: {error!r}"
                raise ServerFailedError(kind.name, reason, log) from error
        time.sleep(_PROBE_SECONDS)
