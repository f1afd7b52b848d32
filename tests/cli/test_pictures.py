"""``molva timeline``, ``molva topology`` and ``--plot``: what they print and write."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molva.cli.exits import USAGE
from tests.cli.commands import document, run

ROOT = Path(__file__).parent.parent.parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def keys(found: Any) -> set[str]:
    """Return all keys at every depth."""
    if isinstance(found, list):
        return set().union(*map(keys, found)) if found else set()
    if isinstance(found, dict):
        return set(found).union(*map(keys, found.values()))
    return set()


def test_a_timeline_is_drawn_for_people() -> None:
    code, output = run("timeline", "2*D(1ms)/D(0.5ms)/1", "--duration", "3ms")

    assert code == 0
    lines = output.splitlines()
    assert lines[0] == "2*D(1ms)/D(0.5ms)/1   exact"
    assert lines[-1] == "6 arrived, 3 refused, 3 departed, server busy 50 %"


def test_the_json_of_a_timeline_has_every_job() -> None:
    found = document("timeline", "2*D(1ms)/D(0.5ms)/1/1", "--duration", "2ms")

    assert found["model"] == "2*D(1ms)/D(0.5ms)/1/1"
    assert found["road"] == "exact"
    assert (found["begin_seconds"], found["end_seconds"]) == (0, 0.002)
    assert (found["arrived"], found["refused"], found["departed"]) == (4, 0, 4)
    assert found["busy_shares"] == [1]
    assert found["jobs"][1] == {
        "number": 2,
        "fate": "served",
        "arrival_seconds": 0,
        "start_seconds": 0.0005,
        "departure_seconds": 0.001,
        "services": [{"server": 1, "begin_seconds": 0.0005, "end_seconds": 0.001}],
    }
    assert found["waits"][0] == {
        "job": 2,
        "place": 1,
        "begin_seconds": 0,
        "end_seconds": 0.0005,
    }


def test_what_never_happened_to_a_job_is_null() -> None:
    found = document("timeline", "2*D(1ms)/D(0.5ms)/1", "--duration", "1ms")

    refused = found["jobs"][1]
    assert refused["fate"] == "refused"
    assert refused["start_seconds"] is refused["departure_seconds"] is None
    assert refused["services"] == []


def test_the_window_and_the_seed_are_options() -> None:
    spec = "M(8/s)/M(200ms)/2/3"
    later = document("timeline", spec, "--begin", "10s", "--duration", "500ms", "--seed", "4")

    assert later["road"] == "simulation, seed 4"
    assert (later["begin_seconds"], later["end_seconds"]) == (10, 10.5)
    assert later != document("timeline", spec, "--begin", "10s", "--duration", "500ms")


def test_the_other_habit_is_read_on_request() -> None:
    assert document("timeline", "--kendall", "D(1ms)/D(1ms)/1/3")["model"] == "D(1ms)/D(1ms)/1/2"


def test_one_topology_is_described() -> None:
    code, output = run("topology", "full-mesh", "--services", "a,b,c")

    assert code == 0
    assert "a  ·  ▶  ▶" in output
    assert "n² links and T(1): 3² = 9 counts a link of each service to itself" in output
    assert "a … c  66.7 %  66.7 %          0 %" in output


def test_without_a_kind_all_are_compared() -> None:
    code, output = run("topology", "--sources", "3", "--receivers", "2")

    assert code == 0
    rows = [line.split()[:3] for line in output.splitlines()[3:7]]
    assert rows == [
        ["full-mesh", "6", "6"],
        ["hub-and-spoke", "4", "4"],
        ["one-hub", "5", "5"],
        ["queue", "5", "5"],
    ]


def test_the_json_of_a_topology_has_every_node() -> None:
    found = document("topology", "queue", "--sources", "2", "--receivers", "billing,mail")

    assert found["kind"] == "queue"
    assert (found["sources"], found["receivers"], found["hubs"]) == (2, 2, 0)
    assert (found["links"], found["one_way_links"]) == (4, 4)
    assert (found["mean_hops"], found["most_hops"]) == (2, 2)
    assert found["nodes"][2] == {
        "name": "billing",
        "role": "receiver",
        "is_hub": False,
        "load_share": 0.5,
        "lost_share": 0,
        "lost_by_others_share": 0,
    }


def test_the_json_of_all_is_a_list() -> None:
    found = document("topology", "--services", "100")

    assert [each["one_way_links"] for each in found] == [9900, 198, 200, 200]


def test_hubs_are_an_option() -> None:
    assert document("topology", "hub-and-spoke", "--services", "9", "--hubs", "3")["most_hops"] == 4
    compared = document("topology", "--services", "9", "--hubs", "3")
    assert [each["hubs"] for each in compared] == [0, 3, 0, 0]


def test_every_key_is_in_the_manual() -> None:
    text = (ROOT / "docs" / "queueing-pictures.md").read_text()
    found = document("timeline", "2*D(1ms)/D(0.5ms)/1/1"), document("topology", "--services", "3")

    for key in keys(list(found)):
        assert f"`{key}`" in text, key


@pytest.mark.parametrize("ending", ["svg", "png", "txt"])
@pytest.mark.parametrize(
    "command",
    [
        ("model", "M(8/s)/M(1s)/10"),
        ("simulate", "M(8/s)/M(1s)/10", "--jobs", "2000"),
        ("timeline", "2*D(1ms)/D(0.5ms)/1"),
        ("topology", "queue", "--services", "5"),
        ("topology", "--services", "5"),
    ],
    ids=lambda command: "-".join(command[:2]).replace("/", "_"),
)
def test_a_picture_is_written_beside_what_is_printed(
    command: tuple[str, ...], ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"picture.{ending}"

    code, output = run(*command, "--plot", str(path))

    assert code == 0
    assert output == run(*command)[1]
    start = {"svg": b"<?xml", "png": b"\x89PNG", "txt": b""}[ending]
    assert path.read_bytes().startswith(start)
    assert len(path.read_bytes()) > 100


@pytest.mark.parametrize(
    ("missing", "command", "extra"),
    [
        ("numpy", ["timeline", "D(1ms)/D(0.5ms)/1"], "queueing"),
        ("matplotlib", ["topology", "--services", "3", "--plot", "x.svg"], "plot"),
    ],
)
def test_a_missing_library_is_said_to_be_of_an_extra(
    missing: str, command: list[str], extra: str
) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from molva.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=False
    )

    assert result.returncode == USAGE
    assert f"pip install 'molva[{extra}]'" in result.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("timeline", "D(1)/D(1ms)/1"), "1 has no unit"),
        (("timeline", "D(1ms)/D(1ms)/1", "--duration", "3"), "3 has no unit"),
        (("timeline", "D(1ms)/D(1ms)/1", "--duration", "0s"), "ends after it began"),
        (("timeline", "D(1ms)/D(1ms)/1", "--begin", "-1s"), "a time is at least 0"),
        (("timeline", "D(1ms)/D(1ms)/1", "--duration", "1h"), "played for at most 100000"),
        (("timeline", "D(1ms)/D(1ms)/1", "--plot", "x.gif"), "ends in .png, .svg, .txt"),
        (("timeline", "D(1ms)/D(1ms)/1", "--plot", "/no/x.svg"), "cannot be written"),
        (("timeline", "D(1ms)/D(1ms)/1", "--plot", "/tmp"), "ends in .png, .svg, .txt"),
        (("model", "M(8/s)/M(1s)/10", "--plot", "x"), "ends in .png, .svg, .txt"),
        (("topology", "ring", "--services", "3"), "unknown topology 'ring'"),
        (("topology", "mesh", "--services", "3"), "did you mean 'full-mesh'?"),
        (("topology", "--services", "1"), "at least 2 services"),
        (("topology", "--sources", "1"), "sources need receivers"),
        (("topology",), "services, or else sources and receivers"),
        (("topology", "queue", "--services", "3", "--hubs", "1"), "not in queue"),
        (("topology", "--services", "a,,b"), "no name"),
        (("topology", "--services", "61", "--plot", "x.svg"), "up to 60 members; there are 61"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(
    run_molva: Run, command: tuple[str, ...], words: str
) -> None:
    result = run_molva(*command)

    assert result.returncode == USAGE
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.startswith("molva: ")
    assert len(result.stderr.splitlines()) == 1
