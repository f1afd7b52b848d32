"""The servers that one run of tests shares: found or started at first use, stopped at its end."""

import contextlib
import shutil
import tempfile
from pathlib import Path

from tests.brokers import reaper
from tests.brokers.errors import MissingServerError
from tests.brokers.state import Record, State, default_folder

__all__ = ["SharedServers"]


class SharedServers:
    """Servers by name. Those that ran before are used and left alone."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._missing: dict[str, MissingServerError] = {}
        self._own: State | None = None
        self._cleanup = contextlib.ExitStack()

    def url(self, name: str) -> str:
        """Return the server's URL. Raises MissingServerError, each time, if none can be had."""
        if name in self._missing:
            raise self._missing[name]
        if name not in self._records:
            try:
                # One that scripts/brokers started saves seconds; it may hold data of others.
                started = State(default_folder())
                found = started.find(name) is not None
                self._records[name] = (started if found else self._state()).start(name)
            except MissingServerError as missing:
                self._missing[name] = missing
                raise
        return self._records[name].url

    def used(self) -> list[Record]:
        """Return the servers that were asked for."""
        return list(self._records.values())

    def close(self) -> None:
        """Stop what was started for this run."""
        if self._own is not None:
            for name in self._records:
                self._own.stop(name)
        self._cleanup.close()

    def _state(self) -> State:
        if self._own is None:
            folder = Path(tempfile.mkdtemp(prefix="molva-session-"))
            folder.chmod(0o711)
            self._cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
            self._cleanup.enter_context(reaper.guarded(folder))
            self._own = State(folder)
        return self._own
