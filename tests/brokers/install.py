"""Getting what is missing, only where MOLVA_INSTALL=1 allows it."""

import os
import subprocess
from pathlib import Path

from tests.brokers.errors import MissingServerError

__all__ = ["ROOT", "install_packages", "may_install"]

ROOT = Path(__file__).parent.parent.parent

# Seconds for a package manager on a slow mirror. Bounded, so that a run says what hung.
INSTALL_SECONDS = 900


def may_install() -> bool:
    """Whether system packages may be installed."""
    return os.environ.get("MOLVA_INSTALL") == "1"


def install_packages(name: str) -> None:
    """Install the system packages for a server or tool that scripts/test-tools knows."""
    done = subprocess.run(
        [str(ROOT / "scripts" / "test-tools"), name],
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise MissingServerError(name, f"installing it failed: {done.stderr.strip()[-2000:]}")
