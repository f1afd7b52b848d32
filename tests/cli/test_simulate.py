"""``molva simulate``: what it prints, and what it ends with."""

import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from molva.cli.exits import USAGE
from molva.cli.main import main
from tests.cli import commands

ROOT = Path(__file__).parent.parent.parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]


run = partial(commands.run, "simulate")
document = partial(commands.document, "simulate")


def test_json_has_the_keys_of_model_with_intervals() -> None:
    found = document("M(8/s)/M(200ms)/2/inf", "--jobs", "40000", "--seed", "3")

    assert found["road"] == "simulation, 95 % interval"
    assert found["seed"] == 3
    wait = found["mean_wait_seconds"]
    assert isinstance(wait, dict)
    assert wait["low"] < 0.3556 < wait["high"]
    waits = found["wait_seconds"]
    assert isinstance(waits, dict)
    assert list(waits) == ["p50", "p90", "p99", "p99.9"]
    assert list(waits["p90"]) == ["value", "low", "high"]


def test_what_is_not_defined_is_null() -> None:
    found = document("M(1/s)/M(1s)/inf", "--jobs", "2000")

    assert found["utilisation"] is None
    assert found["abandonment_probability"] is None
    assert found["refusals"] is None
    assert found["reached"] is None


def test_every_key_is_in_the_manual() -> None:
    text = (ROOT / "docs" / "queueing.md").read_text()
    found = document("M(2/s)/M(1s)/2/3/priority(3,7)/patience(M(1s))", "--jobs", "4000")
    classes = found["classes"]
    assert isinstance(classes, list)
    nested = [key for value in found.values() if isinstance(value, dict) for key in value]

    for key in [*found, *nested, *classes[0]]:
        assert f"`{key}`" in text, key


def test_every_option_is_in_the_manual() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    command = main.get_command(None, "simulate")  # type: ignore[arg-type]
    assert command is not None

    for option in command.params:
        for name in option.opts:
            if name.startswith("--"):
                assert re.search(rf"`{name}` \| .*`simulate`", text), name


def test_people_get_a_table_with_intervals() -> None:
    code, output = run("M(2/s)/M(1s)/2/3/priority(3,7)/patience(M(1s))", "--jobs", "8000")

    assert code == 0
    assert re.search(
        r"^mean wait +\d+(\.\d+)? ms  \(\d+(\.\d+)? ms to \d+(\.\d+)? ms\)$", output, re.M
    )
    assert re.search(r"^  class 2 +\d", output, re.M)
    assert re.search(r"^out of patience +\d", output, re.M)


def test_a_short_run_carries_its_note() -> None:
    _, output = run("M(0.999/s)/M(1s)/1/inf", "--jobs", "5000")

    assert "note: the run is short for this load" in output


def test_a_precision_is_reached() -> None:
    found = document("M(3/s)/M(1s)/4", "--precision", "0.05")

    assert found["reached"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["M(9/s)/M(1s)/8/inf"], "the line grows by 1 jobs/s"),
        (["M(8)/M(1s)/8"], "8 has no unit"),
        (["M(8/s)/M(1s)/8", "--jobs", "3"], "at least 400 jobs, not 3"),
        (["M(8/s)/M(1s)/8", "--precision", "2"], "as 0.01 for ±1 %; it is 2"),
        (["M(8/s)/M(1s)/8", "--jobs", "1000", "--precision", "0.1"], "not both"),
        (["M(8/s)/M(1s)/8", "--replications", "0"], "from 1 to 1000 replications, not 0"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(
    run_molva: Run, arguments: list[str], words: str
) -> None:
    result = run_molva("simulate", *arguments)

    assert result.returncode == USAGE
    assert result.stdout == ""
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_nothing_moves_where_nobody_looks(run_molva: Run) -> None:
    result = run_molva("simulate", "M(1/s)/M(1s)/1", "--jobs", "2000")

    assert result.stderr == ""
