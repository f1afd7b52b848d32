"""Environments of their own for peers whose dependencies are not ours."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any, Final

__all__ = ["Peer", "peer"]

_ROOT: Final = Path(__file__).parent.parent.parent
_FOLDER: Final = _ROOT / ".venv" / "peers"


class Peer:
    """A program in an environment of its own, which answers in JSON."""

    def __init__(self, name: str, version: str, python: Path, script: Path) -> None:
        self.name = name
        self.version = version
        self._python = python
        self._script = script

    def ask(self, *arguments: object, seconds: float = 600) -> dict[str, Any]:
        """Run the script on one core; return the last line that it printed."""
        one_core = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        result = subprocess.run(
            [str(self._python), str(self._script), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            env=os.environ | one_core,
        )
        if result.returncode:
            raise RuntimeError(f"{self.name}: {result.stderr.strip()[-500:]}")
        answer: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
        return answer


def peer(package: str, version: str, script: str) -> Peer:
    """Return a peer; make its environment where there is none, which needs a network."""
    folder = _FOLDER / f"{package}-{version}"
    python = folder / "bin" / "python"
    done = folder / "complete"
    if not done.exists():
        print(f"  making an environment for {package} {version}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", f"{package}=={version}"],
            check=True,
            stdout=sys.stderr,
        )
        done.touch()
    return Peer(package, version, python, Path(__file__).parent / script)
