"""The processes of a service: started, killed, stopped."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self, final

__all__ = ["Fleet"]

# Seconds that all of them have to be at work, and to end.
_READY: Final = 60.0
_END: Final = 15.0

_SAYS: Final = {"serve": "ratings survive", "work": "taking ratings"}

Process = subprocess.Popen[bytes]


@final
@dataclass(slots=True)
class Fleet:
    """Processes of one deployment; ``environment`` says which: MOLVA_BROKER and the like.

    URLs are there and not in arguments, which everybody on a machine can see.
    """

    folder: Path
    environment: Mapping[str, str]
    ports: list[int] = field(default_factory=list)
    killed: int = 0
    _processes: dict[str, list[Process]] = field(default_factory=lambda: {"serve": [], "work": []})

    def run(self, command: str, *arguments: str) -> None:
        """Run a command to its end."""
        subprocess.run(self._command(command, *arguments), env=self._environment(), check=True)

    def start(self, command: str) -> None:
        """Start one more ``molva serve`` or ``molva work``."""
        arguments: tuple[str, ...] = ()
        if command == "serve":
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.ports.append(probe.getsockname()[1])
            arguments = ("--port", str(self.ports[-1]))
        started = self._processes[command]
        with self._log(command, len(started)).open("wb") as log:
            started.append(
                subprocess.Popen(
                    self._command(command, *arguments),
                    env=self._environment(), stdout=log, stderr=log,
                )
            )  # fmt: skip

    def wait_ready(self) -> None:
        """Wait until each has said that it is at work."""
        deadline = time.monotonic() + _READY
        for command, processes in self._processes.items():
            for number, process in enumerate(processes):
                while True:
                    over = process.poll() is not None or time.monotonic() > deadline
                    said = self._log(command, number).read_text()
                    if _SAYS[command] in said:
                        break
                    if over:
                        raise RuntimeError(f"molva {command} does not start: {said}")
                    time.sleep(0.05)

    def kill(self, command: str) -> None:
        """Kill the first of them, which has no time to tidy up. It stays away."""
        self._processes[command][0].send_signal(signal.SIGKILL)
        self.killed += 1

    def _command(self, command: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "molva", *command.split(), *arguments]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment, "MOLVA_DATA": str(self.folder)}

    def _log(self, command: str, number: int) -> Path:
        return self.folder / f"{command}-{number}.log"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        processes = [each for processes in self._processes.values() for each in processes]
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END)
            process.kill()
            process.wait()
