"""The servers that one run of tests shares: found or started at first use, stopped at its end.

A run in several processes shares those that take long to start: the process that hands out the
tests owns a folder, in which whoever needs such a server first starts it for all. Of the others
each process starts its own, so that a test may count a server's commands or cut its connections.
"""

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Final

from tests.brokers import reaper
from tests.brokers.errors import MissingServerError
from tests.brokers.state import Record, State, default_folder

__all__ = ["SharedServers"]

# A JVM and an Erlang: some ten seconds of a processor each until they are ready, and hundreds
# of megabytes.
_SLOW_TO_START: Final = ("kafka", "rabbitmq")


class SharedServers:
    """Servers by name. Those that ran before are used and left alone.

    ``common``: the ``folder`` of the process that hands out the tests, in those that run them.
    """

    def __init__(self, common: Path | None = None) -> None:
        self._common = State(common, hurried=True) if common is not None else None
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
                state = State(default_folder())
                if state.find(name) is None:
                    shared = self._common if name in _SLOW_TO_START else None
                    state = shared or self._state()
                self._records[name] = state.start(name)
            except MissingServerError as missing:
                self._missing[name] = missing
                raise
        return self._records[name].url

    def used(self) -> list[Record]:
        """Return the servers that were asked for."""
        return list(self._records.values())

    def folder(self) -> Path:
        """Make a folder for servers that other processes of the run start; ``close`` ends them."""
        return self._state().folder

    def close(self) -> None:
        """Stop what was started for this run, by this process or in its folder."""
        if self._own is not None:
            for name in {*self._records, *_SLOW_TO_START}:
                self._own.stop(name)
        self._cleanup.close()

    def _state(self) -> State:
        if self._own is None:
            folder = Path(tempfile.mkdtemp(prefix="molva-session-"))
            folder.chmod(0o711)
            self._cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
            self._cleanup.enter_context(reaper.guarded(folder))
            self._own = State(folder, hurried=True)
        return self._own
