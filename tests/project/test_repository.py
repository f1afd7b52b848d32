"""The repository as such: what is exported, what is shipped, what must not be in it."""

import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import TypeVar

import pytest

import molva

ROOT = Path(__file__).parent.parent.parent


def modules() -> list[str]:
    found = pkgutil.walk_packages(molva.__path__, "molva.")
    return sorted(m.name for m in found if not m.name.endswith("__main__"))


@pytest.mark.parametrize("name", modules())
def test_what_a_module_exports_exists(name: str) -> None:
    module = importlib.import_module(name)

    exported = getattr(module, "__all__", [])
    for each in exported:
        assert hasattr(module, each), each
    # What has a public name and is defined here is meant for others, so it is exported.
    for each, value in vars(module).items():
        if isinstance(value, TypeVar) or each.startswith("_"):
            continue
        if getattr(value, "__module__", None) == name:
            assert each in exported, f"{name}.{each} is public and not in __all__"


def test_importing_messaging_loads_no_part_of_the_service() -> None:
    code = (
        "import sys, molva.messaging\n"
        "heavy = {'msgspec', 'starlette', 'granian', 'prometheus_client', 'uvloop', 'apsw'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_requirement_files_are_hashed_and_name_no_host() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        text = path.read_text()
        # No option at all but the hashes: each other one names a place to look.
        named = re.search(r"https?://|file:|--(?!hash=sha256:)|^\s*-[a-z]", text, re.MULTILINE)
        assert named is None, path
        pins = re.findall(r"^[a-z0-9._-]+==", text, re.MULTILINE | re.IGNORECASE)
        assert len(pins) > 5
        for block in re.split(r"\n(?=\S)", text.strip()):
            if not block.startswith("#"):
                assert "--hash=sha256:" in block, block.splitlines()[0]


def test_every_requirement_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"]]
    for group in (*project["project"]["optional-dependencies"].values(),):
        wanted += group
    wanted += project["dependency-groups"]["dev"] + project["dependency-groups"]["build"]
    pinned = set(
        re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements/dev.txt").read_text(), re.MULTILINE)
    )
    for requirement in wanted:
        name = re.split(r"[\[<>=!; ]", requirement)[0].lower()
        assert name in pinned | {"molva"}, name


@pytest.fixture(scope="module")
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel and install it where nothing else is."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, timeout=120)
    [wheel] = folder.glob("*.whl")
    venv.create(folder / "venv")
    install = installing_into(folder)
    requirements = ["--require-hashes", "-r", str(ROOT / "requirements" / "run.txt")]
    subprocess.run([*install, *requirements], check=True, capture_output=True, timeout=300)
    subprocess.run([*install, "--no-deps", str(wheel)], check=True, capture_output=True)
    return folder


def installing_into(folder: Path) -> list[str]:
    """Return the command that installs into a clean environment.

    By our pip, and compiling nothing: a pip of its own and the byte code of all requirements
    take longer than the rest, and prove nothing.
    """
    python = str(folder / "venv" / "bin" / "python")
    return [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-compile"]


@pytest.mark.timeout(400)
def test_the_wheel_works_in_a_clean_environment(clean_environment: Path, tmp_path: Path) -> None:
    python = str(clean_environment / "venv" / "bin" / "python")
    code = f"""
import asyncio, importlib.resources, molva
from molva.messaging import Message, open_topic
from molva.ratings.page import load_assets
assert importlib.resources.files("molva").joinpath("py.typed").is_file()
assert "index.html" in load_assets()
from molva.queueing import analyse
assert analyse("M(1/s)/M(0.5s)/1/inf").mean_wait == 0.5
assert abs(analyse("M(1/s)/D(0.5s)/1/inf").mean_wait - 0.25) < 1e-12
from molva.queueing import Plot
Plot.of("M(1/s)/M(0.5s)/1/inf").save("{tmp_path}/plot.png")
async def main():
    async with await open_topic("sqlite://{tmp_path}/q.db?topic=t") as topic:
        await topic.send(Message(b"x"))
asyncio.run(main())
print(molva.__file__)
"""
    result = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert str(clean_environment) in result.stdout
    doctor = subprocess.run(
        [str(clean_environment / "venv/bin/molva"), "doctor", "--data", str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert doctor.returncode == 0, doctor.stderr + doctor.stdout


@pytest.mark.timeout(400)
def test_the_base_needs_no_extra(clean_environment: Path, tmp_path: Path) -> None:
    python = str(clean_environment / "venv" / "bin" / "python")
    extras = ["granian", "msgspec", "prometheus_client", "starlette", "uvloop"]
    # Importing these fails, as where they are not installed.
    block = f"import sys; sys.modules.update(dict.fromkeys({extras!r}))"
    url = f"sqlite://{tmp_path}/q.db?topic=t"
    code = f"{block}; from molva.cli.main import main; main()"
    send = subprocess.run(
        [python, "-I", "-c", code, "pub", url], input="one\n", text=True, check=False
    )
    receive = subprocess.run(
        [python, "-I", "-c", code, "sub", f"{url}&subscription=s", "--limit", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    up = subprocess.run(
        [python, "-I", "-c", code, "up", "--data", str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert send.returncode == 0
    assert receive.stdout == "one\n", receive.stderr
    assert up.returncode == 2
    assert "molva[ratings]" in up.stderr


@pytest.mark.timeout(600)
def test_a_driver_of_others_passes_the_shipped_suite(
    clean_environment: Path, tmp_path: Path
) -> None:
    python = str(clean_environment / "venv" / "bin" / "python")
    pins = (ROOT / "requirements" / "dev.txt").read_text()
    wanted = ("pytest", "pytest-asyncio", "iniconfig", "packaging", "pluggy", "pygments")
    also = ("typing-extensions", "backports-asyncio-runner")  # on older Pythons
    blocks = re.split(r"\n(?=\S)", pins.strip())
    chosen = [b for b in blocks if re.split("[=; ]", b)[0] in (*wanted, *also)]
    assert len(chosen) >= len(wanted)
    (tmp_path / "pins.txt").write_text("\n".join(chosen) + "\n")
    install = installing_into(clean_environment)
    pinned = ["--no-deps", "--require-hashes", "-r", str(tmp_path / "pins.txt")]
    subprocess.run([*install, *pinned], check=True, capture_output=True, timeout=300)
    example = tmp_path / "file_driver"
    shutil.copytree(ROOT / "examples" / "file_driver", example)
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(example)], check=True, capture_output=True, timeout=120)
    [wheel] = tmp_path.glob("molva_files-*.whl")
    subprocess.run([*install, "--no-deps", str(wheel)], check=True, capture_output=True)

    options = ["-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto"]
    result = subprocess.run(
        [python, "-m", "pytest", *options, str(example / "tests")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=500,
    )

    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("files ")]
    assert [line.partition(":")[0] for line in lines] == ["files queue", "files topic"]
    assert all("none beyond what is declared" in line for line in lines)


def test_data_for_tests_is_not_shipped(clean_environment: Path) -> None:
    [wheel] = clean_environment.glob("*.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "insteval" not in names
    assert "molva/py.typed" in names
    assert "molva/ratings/web/index.html" in names
