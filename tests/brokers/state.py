"""Servers that outlive the command that started them: a folder remembers which they are.

Each has a record ``NAME.json`` beside its folder ``NAME/``. A record is believed only of a
process that was started at the very time it says, with a command line that names the folder:
process ids are used again, and what is stopped here must be ours.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.brokers import docker
from tests.brokers.errors import BrokersError, ServerFailedError
from tests.brokers.kind import Kind, Place
from tests.brokers.ports import free_ports
from tests.brokers.server import Server, ensure_local, wait_ready
from tests.brokers.table import KINDS

__all__ = ["Record", "State", "default_folder"]

# Seconds that the start time of one process may seem to differ: the clock may be set between
# two looks. Who else got its id meanwhile does not run out of this folder.
_START_TOLERANCE = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A server that runs: where it came from, and how to know it again."""

    name: str
    source: str
    """``environment``, ``local`` or ``docker``."""
    version: str | None
    url: str
    pid: int | None = None
    started_at: float | None = None
    ports: tuple[int, ...] = ()
    container: str | None = None


def default_folder() -> Path:
    """Return the folder of this user's servers; MOLVA_BROKERS_DIR says another."""
    given = os.environ.get("MOLVA_BROKERS_DIR")
    return Path(given or Path(tempfile.gettempdir()) / f"molva-brokers-{os.getuid()}").absolute()


class State:
    """The servers that one folder remembers.

    ``hurried``: those that it starts are ready sooner, and slower ever after.
    """

    def __init__(self, folder: Path, *, hurried: bool = False) -> None:
        self.folder = folder
        self._hurried = hurried
        # Those of this process, which is their parent and has to wait for their ends.
        self._children: dict[str, Server] = {}

    def start(self, name: str) -> Record:
        """Return the running server, starting it first if need be."""
        kind = KINDS[name]
        if kind.given_url is not None:
            return Record(name, "environment", wait_ready(kind, kind.given_url), kind.given_url)
        with self._locked():
            record = self.find(name)
            if record is not None:
                wait_ready(kind, record.url)
                return record
            self._remove(name)
            record = self._start_local(kind) or self._start_container(kind)
            self._file(name).write_text(json.dumps(dataclasses.asdict(record), indent=2))
            return record

    def find(self, name: str) -> Record | None:
        """Return the server if it runs, started from here or given by the environment."""
        kind = KINDS[name]
        if kind.given_url is not None:
            return Record(name, "environment", None, kind.given_url)
        record = self._read(name)
        if record is None:
            return None
        if record.container is not None:
            return record if docker.is_running(record.container) else None
        return record if self._process(record) is not None else None

    def stop(self, name: str) -> bool:
        """Stop the server if it was started from here; remove its data. False: nothing ran."""
        if not self.folder.exists():
            return False
        with self._locked():
            record = self._read(name)
            ran = False
            if record is not None and record.container is not None:
                ran = docker.is_running(record.container)
                docker.stop_container(record.container)
            elif record is not None and (process := self._process(record)) is not None:
                (self._children.pop(name, None) or self._found(record, process)).stop()
                ran = True
            self._remove(name)
        self._tidy()
        return ran

    def _start_local(self, kind: Kind) -> Record | None:
        """Start it by programs of this machine; None if Docker should be asked instead."""
        if kind.missing() is not None and docker.docker_answers():
            return None
        ensure_local(kind)
        try:
            server = self._created(kind)
        except ServerFailedError:
            # Somebody may have taken one of its ports meanwhile; others will do.
            server = self._created(kind)
        place = server.place
        self._children[kind.name] = server
        return Record(
            name=kind.name,
            source="local",
            version=server.version,
            url=server.url,
            pid=server.pid,
            started_at=server.process.create_time(),
            ports=place.ports,
        )

    def _created(self, kind: Kind) -> Server:
        folder, ports = self.folder / kind.name, free_ports(kind.ports)
        server = Server(kind, Place(folder=folder, ports=ports, hurried=self._hurried))
        server.create()
        return server

    def _start_container(self, kind: Kind) -> Record:
        [port] = free_ports(1)
        container = docker.run_container(kind, port)
        place = Place(folder=self.folder / kind.name, ports=(port,))
        url = kind.url(place)
        try:
            version = wait_ready(kind, url)
        except BrokersError as error:
            log = docker.container_log(container)
            docker.stop_container(container)
            raise ServerFailedError(kind.name, f"{error}\nIts container said:\n{log}") from error
        version = version or kind.image.name.rpartition(":")[2]
        return Record(kind.name, "docker", version, url, ports=(port,), container=container)

    def _process(self, record: Record) -> psutil.Process | None:
        """Return the record's process, if it lives and is that very one."""
        if record.pid is None or record.started_at is None:
            return None
        try:
            process = psutil.Process(record.pid)
            same_start = abs(process.create_time() - record.started_at) < _START_TOLERANCE
            own = any(f"{self.folder / record.name}/" in each for each in process.cmdline())
            alive = process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if same_start and own and alive else None

    def _found(self, record: Record, process: psutil.Process) -> Server:
        place = Place(folder=self.folder / record.name, ports=record.ports)
        return Server(KINDS[record.name], place, process)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, name: str) -> Record | None:
        try:
            fields = json.loads(self._file(name).read_text())
            return Record(**{**fields, "ports": tuple(fields["ports"])})
        except FileNotFoundError:
            return None

    def _remove(self, name: str) -> None:
        self._file(name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / name, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one command at a time start and stop; make the folder, and make sure it is ours."""
        # Others may pass through: PostgreSQL runs as somebody else.
        self.folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        found = self.folder.lstat()
        if found.st_uid != os.getuid() or self.folder.is_symlink():
            raise BrokersError(f"{self.folder} belongs to somebody else; set MOLVA_BROKERS_DIR")
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _tidy(self) -> None:
        """Remove the folder with its lock when nothing is left in it."""
        if [each.name for each in self.folder.iterdir()] == ["lock"]:
            shutil.rmtree(self.folder, ignore_errors=True)
