"""The manual is true: its code blocks run, and it names everything that exists."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from _pytest.mark.structures import ParameterSet

from molva.cli import exits
from molva.cli.main import main
from molva.messaging import errors, url
from molva.messaging.conformance import Harness
from molva.ratings import ledger
from molva.ratings.ledger import protocol
from molva.ratings.problem import TITLES
from tests.conftest import MolvaProcess, StartMolva, skip_without

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHARED_OPTIONS = {"--data", "--broker", "--ledger", "--catalog", "--capacity", "--json"}
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[ParameterSet]:
    found = []
    for page in PAGES:
        code = [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]
        if code:
            found.append(pytest.param(code, id=str(page.relative_to(ROOT))))
    return found


def manual(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: list[str], tmp_path: Path) -> None:
    for block in code:
        # Each run has files of its own, wherever the manual puts them.
        text = block.replace("sqlite:///tmp/", f"sqlite://{tmp_path}/")
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", text],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("code", blocks("sh"))
def test_shell_blocks_run(code: list[str], start_molva: StartMolva, tmp_path: Path) -> None:
    """The blocks of one page run one after the other, beside one running service."""
    if shutil.which("curl") is None:
        skip_without("curl", "the manual's examples use it, and it is not installed")
    molva: MolvaProcess = start_molva()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("MOLVA_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MOLVA_DATA": str(molva.data),
    }
    for block in code:
        text = block.replace("localhost:8081", f"127.0.0.1:{molva.port}")
        text = text.replace("sqlite:///tmp/", f"sqlite://{tmp_path}/")
        # A refusal is a failure too.
        text = text.replace("curl ", "curl -sS --fail-with-body --retry 20 --retry-delay 1 ")
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"


def commands() -> dict[str, click.Command]:
    context = click.Context(main)
    found: dict[str, click.Command] = {}
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found |= {f"{name} {sub}": c for sub, c in command.commands.items()}
        else:
            found[name] = command
    return found


def test_every_command_and_option_is_in_the_manual() -> None:
    text = manual("cli.md")
    for name, command in commands().items():
        assert f"molva {name}" in text or f"`{name}`" in text, name
        for option in command.params:
            if isinstance(option, click.Option):
                assert any(f"`{o}`" in text for o in option.opts), f"{name} {option.opts}"


def test_every_option_is_also_a_variable() -> None:
    for name, command in commands().items():
        for option in command.params:
            if isinstance(option, click.Option):
                long = max(option.opts, key=len).lstrip("-").replace("-", "_").upper()
                # Names that mean something else in each command carry it.
                prefix = {
                    "campaign put": "PUT_",
                    "pub": "PUB_",
                    "sub": "SUB_",
                    "queue purge": "PURGE_",
                    "queue replay": "REPLAY_",
                }.get(name, "")
                if f"--{long.lower()}" in SHARED_OPTIONS:
                    prefix = ""
                wanted = "MOLVA_WINDOW" if long == "N" else f"MOLVA_{prefix}{long}"
                assert option.envvar == wanted, f"{name} {option.opts}"


def test_every_exit_code_is_in_the_manual() -> None:
    text = manual("cli.md")
    for name in exits.__all__:
        code = getattr(exits, name)
        if isinstance(code, int):
            assert re.search(rf"^\| {code} \| ", text, re.MULTILINE), name


def test_every_problem_is_in_the_manual() -> None:
    text = manual("http.md")
    for slug in TITLES:
        assert f"`{slug}`" in text, slug


def test_every_messaging_error_is_in_the_manual() -> None:
    text = manual("messaging.md")
    for name in errors.__all__:
        assert f"`{name}`" in text, name
        assert name in (errors.__doc__ or ""), name


def drivers() -> list[ParameterSet]:
    """Return every driver with its scheme; one that is another's over TLS is the same."""
    found: dict[object, str] = {}
    for scheme in url.known_schemes():
        found.setdefault(url.load_driver(url.BrokerURL.parse(f"{scheme}://x")), scheme)
    return [pytest.param(driver, scheme, id=scheme) for driver, scheme in found.items()]


def options_of(driver: object) -> set[str]:
    return {o for kind in ("TOPIC", "QUEUE") for o in getattr(driver, f"{kind}_OPTIONS", ())}


def section_of(scheme: str) -> str:
    """Return what the manual says of the URLs of one driver."""
    begins = re.search(rf"^### {scheme}://.*?(?=^##)", manual("messaging.md"), re.M | re.DOTALL)
    assert begins is not None, f"no section on {scheme}://"
    return begins[0]


def tables_of_options(text: str) -> list[set[str]]:
    """Return the names in the first column of each table of options."""
    tables = re.findall(r"^\| option \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [
        {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
        for table in tables
    ]


@pytest.mark.parametrize(("driver", "scheme"), drivers())
def test_every_url_option_is_in_the_drivers_section_of_the_manual(
    driver: object, scheme: str
) -> None:
    named = set(re.findall(r"`(\w+)`", section_of(scheme)))

    assert options_of(driver) - named == set()


@pytest.mark.parametrize(("driver", "scheme"), drivers())
def test_every_url_option_is_in_the_drivers_header(driver: object, scheme: str) -> None:
    for option in options_of(driver):
        assert f"``{option}``" in (driver.__doc__ or ""), f"{scheme}: {option}"


@pytest.mark.parametrize(("driver", "scheme"), drivers())
def test_the_manuals_tables_of_url_options_name_the_drivers_and_no_others(
    driver: object, scheme: str
) -> None:
    section = section_of(scheme)
    pages = [section, *map(manual, re.findall(r"\]\(([a-z-]+\.md)\)", section))]
    tables = [table for page in pages for table in tables_of_options(page)]

    assert tables or scheme == "memory", "only memory:// names its options in a sentence"
    for table in tables:
        assert table - set(url.COMMON_OPTIONS) == options_of(driver)


def test_every_common_url_option_is_in_the_manual() -> None:
    text = manual("messaging.md")
    for option in url.COMMON_OPTIONS:
        assert f"`{option}`" in text, option
        assert f"``{option}``" in (url.__doc__ or ""), option


@pytest.mark.parametrize(
    ("page", "generator"),
    [
        ("capabilities.md", "generate_capabilities"),
        ("ledgers.md", "generate_ledgers"),
        ("scaling.md", "generate_scaling"),
        ("choosing-a-broker.md", "generate_measured"),
    ],
)
def test_a_table_of_the_manual_is_what_the_code_or_a_measurement_says(
    page: str, generator: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"from {generator} import page; print(page(), end='')"],
        cwd=ROOT / "scripts",
        capture_output=True,
        text=True,
        check=True,
    )
    assert manual(page) == result.stdout, f"run scripts/{generator}.py"


@pytest.mark.parametrize("scheme", sorted(ledger._OPTIONS))
def test_every_ledger_option_is_in_the_manual_and_in_the_ledgers_header(scheme: str) -> None:
    text = manual("ledgers.md") + manual("cli.md")
    module = importlib.import_module(f"molva.ratings.ledger.{scheme.replace('rediss', 'redis')}")
    for option in ledger._OPTIONS[scheme]:
        assert f"`{option}`" in text, option
        assert f"``{option}``" in (module.__doc__ or ""), option


def test_every_ledger_error_is_in_the_tree_of_errors() -> None:
    for name in ledger.__all__:
        if name.endswith("Error"):
            assert name in (protocol.__doc__ or "") or name == "LedgerError", name


async def test_every_metric_is_in_the_manual(start_molva: StartMolva) -> None:
    molva = start_molva()
    molva.request("POST", "/rate?rate=7")
    molva.wait_counted(1)
    _, _, body = molva.request("GET", "/metrics")

    text = manual("metrics.md")
    names = set(re.findall(r"^# TYPE (molva_\w+)", body.decode(), re.MULTILINE))
    assert len(names) >= 12
    for name in names:
        assert f"`{name}" in text, name


def test_what_the_manual_quotes_of_a_file_stands_in_it() -> None:
    quotes = re.findall(
        r"^```py from=(\S+)\n(.*?)^```$", manual("writing-a-driver.md"), re.MULTILINE | re.DOTALL
    )
    assert len(quotes) >= 4
    for name, text in quotes:
        assert text in (ROOT / name).read_text(), f"{name} has changed: {text}"


def test_the_table_of_the_suite_names_tests_that_exist() -> None:
    folder = ROOT / "src/molva/messaging/conformance"
    code = "\n".join(path.read_text() for path in folder.glob("*.py"))
    exist = set(re.findall(r"async def (test_\w+)", code))
    table = manual("conformance.md")
    named = set(re.findall(r"`(test_\w+)`", table))
    assert named - exist == set()
    for path in re.findall(r"`(tests/\S+)`", table):
        assert (ROOT / path).exists(), path
    for letter, last in {
        "B": 11,
        "G": 5,
        "A": 13,
        "O": 8,
        "F": 4,
        "H": 4,
        "C": 4,
        "R": 6,
        "X": 7,
    }.items():
        for number in range(1, last + 1):
            assert f"| {letter}{number} | " in table


def test_every_part_of_a_harness_is_in_the_guide() -> None:
    text = manual("writing-a-driver.md")
    for name in [*Harness.__annotations__, "base_url", "restart_broker", "cut_connections"]:
        if name not in ("kind", "clock", "duplicates"):
            assert f"`{name}" in text, name


def test_links_inside_the_manual_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_decision_is_listed() -> None:
    text = manual("decisions/README.md")
    for page in (ROOT / "docs" / "decisions").glob("0*.md"):
        assert f"({page.name})" in text, page.name
