"""Scaled out, on every pair of broker and ledger: what was accepted is counted once.

Seconds here; ``make faults ARGS="pairs …"`` does it for minutes.
"""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.live.controller import run
from tests.faults.live.faults import Planned
from tests.faults.live.pair import PAIRS, Pool
from tests.faults.live.pairs import RESTARTED, scaled_out

SEED = 20_26

# Seconds. Starting Kafka and a dozen processes takes a busy machine ten times as long.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Servers for all pairs: Kafka alone takes as long to start as a run."""
    with Pool() as pool:
        yield pool


@pytest.mark.parametrize("name", PAIRS)
async def test_what_was_accepted_is_counted_once(name: str, pool: Pool, tmp_path: Path) -> None:
    servers = await asyncio.to_thread(pool.of, PAIRS[name])

    # As in test_live: a run in which a busy machine let too little happen is done again.
    for seed in range(SEED, SEED + 3):
        report = await run(scaled_out(PAIRS[name], seed=seed), tmp_path / str(seed), servers)
        shown = json.dumps(report.shown(), indent=1)
        assert report.violations == [], shown
        happened = (
            report.kills >= 2,
            report.faults.get("storm", 0) == 1,
            report.faults.get("broker restart", 0) == 2 * name.startswith(RESTARTED),
        )
        if not report.vacuous and all(happened):
            break

    assert report.vacuous == [], shown
    assert all(happened), f"{happened}: {shown}"


# Whoever holds ratings at this moment is killed while what it needs cannot answer.
_WORKERS_DIE_BEFORE_THE_COMMIT = (
    Planned(1.0, "ledger", (), 2.0, "pause"),
    Planned(2.0, "kill", (("work", 0), ("work", 1), ("work", 2)), 0.2),
)
_HTTP_DIES_BEFORE_THE_COMMIT = (
    Planned(1.0, "broker", (), 2.0, "pause"),
    Planned(2.0, "kill", (("serve", 0), ("serve", 1), ("serve", 2)), 0.2),
)


@pytest.mark.parametrize(
    ("mutant", "role", "schedule"),
    [
        ("ack-before-commit", "work", _WORKERS_DIE_BEFORE_THE_COMMIT),
        ("early-202", "serve", _HTTP_DIES_BEFORE_THE_COMMIT),
    ],
)
async def test_a_service_that_breaks_a_promise_is_found(
    mutant: str, role: str, schedule: tuple[Planned, ...], pool: Pool, tmp_path: Path
) -> None:
    servers = await asyncio.to_thread(pool.of, PAIRS["kafka-postgresql"])
    found: list[str] = []
    for seed in (1, 2, 3):
        config = replace(
            scaled_out(PAIRS["kafka-postgresql"], seed=seed),
            seconds=4.0,
            accepted=0,
            least=0.0,
            schedule=schedule,
            added={role: mutant},
            strict=False,
        )
        report = await run(config, tmp_path / str(seed), servers)
        found += report.violations
        if any(each.startswith("lost") for each in found):
            return
    pytest.fail(f"{mutant} was not found in three runs, only {found}")
