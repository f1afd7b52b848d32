"""Every planted mistake is found within three runs of the net that must find it."""

import importlib
import re
import subprocess
import sys
from itertools import count, islice
from pathlib import Path

import pytest

from tests.faults.mutants import MUTANTS, Mutant
from tests.faults.simulation.machines import LeaseMachine, PathMachine, check
from tests.faults.simulation.plan import draw
from tests.faults.simulation.run import simulate

_ROOT = Path(__file__).parents[2]

# Runs in which a mutant must be found, and what one run of each net is.
_RUNS = 3
_SEEDS_A_RUN = 50
_EXAMPLES_A_RUN = 60

# Of the model's mutants those that are about a topic, not about a queue.
_OF_THE_PATH = {"trim-ahead"}


def _of(net: str) -> list[str]:
    return [mutant.name for mutant in MUTANTS.values() if mutant.net == net]


def _seeds(mutant: Mutant) -> list[int]:
    fitting = (seed for seed in count() if mutant.where(draw(seed)))
    return list(islice(fitting, _RUNS * _SEEDS_A_RUN))


@pytest.mark.parametrize("name", _of("simulation"))
def test_the_simulation_finds(name: str) -> None:
    mutant = MUTANTS[name]
    with mutant.put():
        found = next((seed for seed in _seeds(mutant) if simulate(seed).violations), None)
    assert found is not None, f"{mutant.what}: not found in {_RUNS} runs"
    # The seed finds the mistake, and not something else.
    assert simulate(found).violations == []


@pytest.mark.parametrize("name", _of("model"))
def test_the_models_find(name: str) -> None:
    mutant = MUTANTS[name]
    machine = PathMachine if mutant.name in _OF_THE_PATH else LeaseMachine
    found = False
    with mutant.put():
        for seed in range(_RUNS):
            try:
                check(machine, "memory", seed=seed, examples=_EXAMPLES_A_RUN, shrink=False)
            except AssertionError:
                found = True
                break
    assert found, f"{mutant.what}: not found"


def test_the_models_agree_with_what_is_not_broken() -> None:
    for seed in range(_RUNS):
        check(LeaseMachine, "memory", seed=seed, examples=_EXAMPLES_A_RUN, shrink=False)


@pytest.mark.parametrize("name", _of("tests"))
def test_the_tests_find(name: str) -> None:
    mutant = MUTANTS[name]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.mutants", name, "-q", "-x", *mutant.tests],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # 1: tests failed. Anything else is no finding: 4 and 5 say that there were none.
    assert done.returncode == 1, done.stdout[-2_000:] + done.stderr[-2_000:]


@pytest.mark.parametrize("name", _of("live") + _of("crash points"))
def test_what_is_proved_elsewhere_is_proved_there(name: str) -> None:
    for test in MUTANTS[name].tests:
        path, function = test.split("::")
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        assert callable(getattr(module, function))


def test_the_thirteen_are_there_and_at_least_seven_more() -> None:
    named = [mutant for mutant in MUTANTS.values() if mutant.note]
    assert len(named) == 13
    assert len(MUTANTS) >= 20


def test_the_manual_lists_every_mutant() -> None:
    text = (_ROOT / "docs/reliability.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert rows == [(m.name, m.what, m.net) for m in MUTANTS.values()]
