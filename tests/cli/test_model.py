"""``molva model``: what it prints, and what it ends with."""

import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from molva.cli.exits import USAGE
from molva.queueing import errors
from molva.queueing.analytic import METHODS
from tests.cli import commands

ROOT = Path(__file__).parent.parent.parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]


run = partial(commands.run, "model")
document = partial(commands.document, "model")


def test_json_has_the_numbers_of_the_model() -> None:
    found = document("M(8/s)/M(200ms)/2/inf")

    assert found["model"] == "M(8/s)/M(0.2s)/2/inf"
    assert found["road"] == "closed form"
    assert found["utilisation"] == pytest.approx(0.8)
    assert found["loss_probability"] == 0
    assert found["probability_of_waiting"] == pytest.approx(0.7111111111111111)
    assert found["throughput_per_second"] == pytest.approx(8)
    assert found["mean_wait_seconds"] == pytest.approx(0.35555555555555557)
    assert found["mean_time_in_system_seconds"] == pytest.approx(0.5555555555555556)
    assert found["mean_waiting"] == pytest.approx(2.8444444444444446)
    assert found["mean_in_system"] == pytest.approx(4.444444444444445)
    waits = found["wait_seconds"]
    assert isinstance(waits, dict)
    assert list(waits) == ["p50", "p90", "p99", "p99.9"]
    assert waits["p99"] == pytest.approx(2.1321217995087)
    assert found["refusals"] is None


def test_what_is_not_defined_is_null() -> None:
    found = document("M(0.5/s)/G(mean=1s,scv=2)/1/inf")

    assert found["mean_wait_seconds"] == pytest.approx(1.5)
    assert found["wait_seconds"] == {"p50": None, "p90": None, "p99": None, "p99.9": None}
    assert document("M(1/s)/M(1s)/inf")["utilisation"] is None


def test_every_key_is_in_the_manual() -> None:
    text = (ROOT / "docs" / "queueing.md").read_text()
    found = document("M(2/s)/M(1s)/2/3")
    nested = [key for value in found.values() if isinstance(value, dict) for key in value]

    for key in [*found, *nested]:
        assert f"`{key}`" in text, key


def test_the_keys_are_those_that_programs_rely_on() -> None:
    found = document("M(2/s)/M(1s)/3")

    assert list(found) == [
        "model",
        "road",
        "error",
        "method",
        "source",
        "utilisation",
        "loss_probability",
        "probability_of_waiting",
        "throughput_per_second",
        "mean_wait_seconds",
        "mean_time_in_system_seconds",
        "mean_waiting",
        "mean_in_system",
        "wait_seconds",
        "time_in_system_seconds",
        "output",
        "refusals",
    ]


def test_every_method_and_error_is_in_the_manual() -> None:
    text = (ROOT / "docs" / "queueing.md").read_text()

    for name in [*METHODS, *errors.__all__]:
        assert f"`{name}`" in text, name
    for name, models in METHODS.items():
        assert f"| `{name}` | {models} |" in text
    for name in errors.__all__:
        assert name in (errors.__doc__ or "")


def test_people_get_a_table_with_units() -> None:
    code, output = run("2*D(1ms)/D(0.5ms)/1/1")

    assert code == 0
    rows = dict(line.split("  ", 1) for line in output.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["model"] == "2*D(1ms)/D(0.5ms)/1/1"
    assert rows["throughput"] == "2000/s"
    assert rows["time in system"] == "p50 500 µs · p90 1 ms · p99 1 ms · p99.9 1 ms"


def test_an_approximation_says_how_far_it_can_be_trusted() -> None:
    _, output = run("E2(2/s)/LN(mean=1s,scv=1.5)/3/inf")

    assert "approximation (mean wait within" in output


def test_the_other_habit_is_read_on_request() -> None:
    assert document("--kendall", "M(8/s)/M(200ms)/2/10")["model"] == "M(8/s)/M(0.2s)/2/8"


def test_a_method_can_be_forced() -> None:
    found = document("M(0.8/s)/M(1s)/1/inf", "--method", "pollaczek-khinchine")

    assert found["method"] == "pollaczek-khinchine"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("M(8)/M(200ms)/2/inf", "8 has no unit"),
        ("M(8/s)/M(-1ms)/2", "above 0"),
        ("M(8/s)/M(0s)/2", "above 0"),
        ("M(0/s)/M(1s)/2", "above 0"),
        ("M(8/s)/M(1ms)/0", "at least 1, not 0"),
        ("M(8/s)/M(1ms)/2.5", "not 2.5"),
        ("M(9/s)/M(1s)/8/inf", "the line grows by 1 jobs/s"),
        ("Q(9/s)/M(1s)/8/inf", "unknown letter 'Q'"),
        ("exp(9/s)/M(1s)/8/inf", "did you mean M?"),
        ("M(9/s)/lognorm(mean=1s,scv=2)/8", "did you mean LN?"),
        ("3*M(3/s)/M(1s)/8/inf", "the line grows by 1 jobs/s"),
        ("sin(level=3/s,amplitude=1/s,period=1h)/M(1s)/2/inf", "the line grows by 1 jobs/s"),
        ("U(2s,1s)/M(1s)/1", "from the smaller time to the larger"),
        ("LN(mean=1s,scv=-1)/M(1s)/1", "at least 0"),
        ("H2(mean=1s,scv=0.5)/M(1s)/1", "no H2 has scv 0.5"),
        ("trace(/nowhere)/M(1s)/1", "cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(run_molva: Run, spec: str, words: str) -> None:
    result = run_molva("model", spec)

    assert result.returncode == USAGE
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.startswith("molva: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "is empty"),
        ("# nothing\n\n", "is empty"),
        ("1\n3\n2\n", "is unsorted"),
        ("4\n4\n4\n", "is constant"),
        ("1\n2\nthree\n", "line 3: 'three' is no number"),
    ],
)
def test_a_trace_of_no_use_is_one_sentence_and_code_2(
    run_molva: Run, tmp_path: Path, lines: str, words: str
) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(lines)

    result = run_molva("model", f"trace({path})/M(1s)/1")

    assert result.returncode == USAGE
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_reading_and_closed_forms_load_no_library() -> None:
    code = (
        "import sys; from molva.queueing import analyse\n"
        "state = analyse('M(2.2/s)/M(1s)/2/5'); state.wait_percentile(0.99)\n"
        "analyse('D(1ms)/D(0.5ms)/1'); analyse('M(1/s)/E2(1s)/3')\n"
        "print(sorted({'numpy', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert result.stdout.strip() == "[]"


def cpu_seconds(*command: str) -> float:
    """Return the processor time of a command, which a busy machine does not change much."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.timed
def test_importing_costs_less_than_0_3_s() -> None:
    assert min(cpu_seconds("-c", "import molva.queueing") for _ in range(7)) < 0.3


@pytest.mark.timed
def test_a_closed_form_costs_less_than_0_7_s() -> None:
    command = ("-m", "molva", "model", "M(2.2/s)/M(1s)/2/5")

    assert min(cpu_seconds(*command) for _ in range(3)) < 0.7


@pytest.mark.timed
def test_a_million_servers_and_places_take_less_than_2_s() -> None:
    command = ("-m", "molva", "model", "M(1000000/s)/M(1s)/1000000/1000000")

    assert min(cpu_seconds(*command) for _ in range(3)) < 2


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['numpy', 'scipy']))\n"
        "from molva.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "model"]
    exact = subprocess.run(
        [*command, "M(8/s)/M(0.2s)/2/inf"], capture_output=True, text=True, check=False
    )
    numerical = subprocess.run(
        [*command, "M(8/s)/D(0.2s)/2/inf"], capture_output=True, text=True, check=False
    )

    assert exact.returncode == 0, exact.stderr
    assert numerical.returncode == USAGE
    assert "molva[queueing]" in numerical.stderr
