"""What can go wrong with a server, arranged by what the caller does next.

BrokersError
├── MissingServerError    install it, or skip
└── ServerFailedError     read its log
"""

from pathlib import Path

# Lines of a server's log that an error shows: enough for a stack trace of Java.
_TAIL_LINES = 30


class BrokersError(RuntimeError):
    """A server is not there."""


class MissingServerError(BrokersError):
    """Nothing on this machine can run the server, and nothing may be installed."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"no {name} here: {reason}")
        self.name = name
        self.reason = reason


class ServerFailedError(BrokersError):
    """The server was started and did not become ready; the message ends with its log."""

    def __init__(self, name: str, reason: str, log_path: Path | None = None) -> None:
        tail = ""
        if log_path is not None and log_path.exists():
            lines = log_path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            tail = f"\nIts log, {log_path}, ends with:\n" + "\n".join(f"  {x}" for x in lines)
        super().__init__(f"{name}: {reason}{tail}")
        self.name = name
