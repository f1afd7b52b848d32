"""Failing the next fsync of a running process, from outside."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import skip_without

__all__ = ["failing_fsync"]


@contextlib.contextmanager
def failing_fsync(pid: int, folder: Path) -> Iterator[None]:
    """Let the next fsync of a process fail with EIO, for the block.

    Args:
        pid: The process.
        folder: Where the tracer writes.
    """
    strace = shutil.which("strace")
    if strace is None:
        skip_without("strace", "it injects the error, and is not installed")
    tracer = subprocess.Popen(
        [
            *(strace, "-f", "-p", str(pid), "-o", str(folder / "trace")),
            *("-e", "inject=fsync,fdatasync:error=EIO:when=1"),
        ],
        stderr=subprocess.PIPE,
    )
    try:
        assert tracer.stderr is not None
        if b"attached" not in tracer.stderr.readline():
            skip_without("strace", "processes cannot be traced here")
        yield
    finally:
        tracer.kill()
        tracer.communicate()
