"""The example of scaling out does what its page says."""

import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from molva.messaging import with_options

ROOT = Path(__file__).parent.parent.parent


# Redis with the ledger in the same server, which is the quickest; others in ones of their own.
@pytest.mark.parametrize(
    ("kind", "options"), [("redis", {"lease": "3"}), ("rabbitmq", {}), ("nats", {"lease": "3"})]
)
def test_it_kills_two_processes_and_misses_no_rating(
    kind: str, options: dict[str, str], redis_url: str, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue(f"{kind}_url")
    broker = with_options(server, prefix=f"scaling-{secrets.token_hex(4)}", **options)
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
