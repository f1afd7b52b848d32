"""Commands run in this process, for tests of what they print."""

import json
from typing import Any

from click.testing import CliRunner

from molva.cli.main import main

__all__ = ["document", "run"]


def run(*arguments: str) -> tuple[int, str]:
    """Run ``molva`` with these arguments; return its exit code and all that it printed."""
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.output


def document(*arguments: str) -> Any:
    """Run ``molva`` with these arguments and --json; return what it printed, read."""
    code, output = run(*arguments, "--json")
    assert code == 0, output
    return json.loads(output)
