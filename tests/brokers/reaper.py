"""Ends servers whose tests were killed before they could do so.

A process of its own, ``guard``, waits at the end of a pipe that the tests hold. While they
live it does nothing; when they die, however that is, the pipe ends, and it kills what runs
out of the folders that it was told, and removes them.

Asking the kernel instead, by PR_SET_PDEATHSIG, was rejected: that signal comes when the
*thread* dies that started the server, and a server restarted from ``asyncio.to_thread`` would
die with its test's event loop.
"""

import atexit
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["guarded"]

_guard: "subprocess.Popen[str] | None" = None
# Servers may be started by several threads at once.
_telling: Final = threading.Lock()


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Have ``folder`` and what runs out of it removed should this process die in the block."""
    _tell(f"+{folder}")
    try:
        yield
    finally:
        _tell(f"-{folder}")


def _tell(line: str) -> None:
    with _telling:
        _tell_alone(line)


def _tell_alone(line: str) -> None:
    global _guard
    if _guard is None:
        atexit.register(_close)
        _guard = subprocess.Popen(
            [sys.executable, "-m", "tests.brokers.guard"],
            stdin=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent.parent,
            start_new_session=True,
        )
    assert _guard.stdin is not None
    _guard.stdin.write(line + "\n")
    _guard.stdin.flush()


def _close() -> None:
    """Let the guard end; it removes what is still guarded."""
    if _guard is not None:
        assert _guard.stdin is not None
        _guard.stdin.close()
        _guard.wait(60)
