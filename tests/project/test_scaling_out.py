"""The example of scaling out does what its page says."""

import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from molva.messaging import with_options

ROOT = Path(__file__).parent.parent.parent


# Broker and ledger in one server, which is the quickest; and what has a server of its own.
@pytest.mark.parametrize("kind", ["redis", "nats"])
def test_it_kills_two_processes_and_misses_no_rating(
    kind: str, redis_url: str, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue(f"{kind}_url")
    broker = with_options(server, lease="3", prefix=f"scaling-{secrets.token_hex(4)}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "examples.scaling_out", "--broker", broker),
            *("--ledger", redis_url, "--seconds", "2", "--rate", "100"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    shown = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines()[2:])
    assert shown["processes killed"] == "2"
    assert shown["difference"] == "0"
    assert shown["counted"] == shown["accepted"] != "0"
