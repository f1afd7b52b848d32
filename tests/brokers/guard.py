"""The far end of ``reaper``'s pipe: lines ``+FOLDER`` and ``-FOLDER``, then the end."""

import contextlib
import shutil
import sys
from pathlib import Path

import psutil


def _kill_out_of(folder: Path) -> None:
    """Kill every process whose command line names a path in ``folder``, with its children."""
    victims: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(f"{folder}/" in argument for argument in process.cmdline()):
                victims += [process, *process.children(recursive=True)]
    for victim in victims:
        with contextlib.suppress(psutil.Error):
            victim.kill()
    psutil.wait_procs(victims, timeout=10)


def _main() -> None:
    folders: set[str] = set()
    for line in sys.stdin:
        (folders.add if line[0] == "+" else folders.discard)(line[1:].strip())
    for folder in folders:
        _kill_out_of(Path(folder))
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _main()
