"""What there is to know about one kind of server; each has a file beside this one."""

import os
import pwd
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tests.brokers.certificates import Certificates

__all__ = ["Image", "Kind", "Place"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one server lives and how it is set up; the same over its restarts."""

    folder: Path
    """Its own; holds configuration, log and data."""
    ports: tuple[int, ...]
    """The first is the one that clients use."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The server's own settings that differ from the usual ones."""
    password: str | None = None
    certificates: Certificates | None = None
    hurried: bool = False
    """Whether it is to start quickly and may be slower ever after: never for a measurement."""

    @property
    def port(self) -> int:
        return self.ports[0]

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def log(self) -> Path:
        return self.folder / "log"


@dataclass(frozen=True, slots=True)
class Image:
    """How Docker runs the server."""

    name: str
    port: int
    """Of the server inside the container."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """``{port}`` stands for the port outside, which Kafka has to tell its clients."""
    arguments: tuple[str, ...] = ()


class Kind(ABC):
    """A kind of server: what runs it, how it is set up, when it is ready."""

    name: ClassVar[str]
    image: ClassVar[Image]
    ports: ClassVar[int] = 1
    """Ports that one server needs."""
    user: ClassVar[str | None] = None
    """Who runs it where we are root and it refuses to be."""
    ready_seconds: ClassVar[float] = 90.0
    """Until a start has failed. A busy machine starts several at once."""
    stop_signal: ClassVar[int]
    """Ends it in order, without waiting for its clients."""

    @property
    def variable(self) -> str:
        """Name of the environment variable with the URL of a server that already runs."""
        return f"MOLVA_TEST_{self.name.upper()}"

    @property
    def given_url(self) -> str | None:
        return os.environ.get(self.variable) or None

    @abstractmethod
    def missing(self) -> str | None:
        """Return what is missing here to run it without Docker; None if nothing is."""

    @abstractmethod
    def install(self) -> None:
        """Get what is missing. Called only where MOLVA_INSTALL=1 allows it."""

    @abstractmethod
    def prepare(self, place: Place) -> None:
        """Write configuration and what must be there before the first start."""

    @abstractmethod
    def command(self, place: Place) -> list[str]:
        """Return the command that runs it in the foreground."""

    @abstractmethod
    def url(self, place: Place) -> str:
        """Return what to put into Molva's options."""

    @abstractmethod
    def probe(self, url: str, certificates: Certificates | None = None) -> str | None:
        """Ask the server something that it answers only when ready, once and briefly.

        Returns:
            Its version; None if it has no way to tell.

        Raises:
            Exception: What its client library raised: it is not ready.
        """

    def run_as(self) -> dict[str, Any]:
        """Return what Popen needs to run it, and its tools, as whom it accepts."""
        if self.user is None or os.geteuid() != 0:
            return {}
        owner = pwd.getpwnam(self.user)
        return {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
