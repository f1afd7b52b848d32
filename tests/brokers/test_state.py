"""What ``scripts/brokers`` remembers, and what it believes of it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import redis

from tests.brokers import MissingServerError
from tests.brokers.install import ROOT
from tests.brokers.session import SharedServers
from tests.brokers.state import State
from tests.brokers.table import KINDS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's servers live, and no server that runs already."""
    for kind in KINDS.values():
        monkeypatch.delenv(kind.variable, raising=False)
    monkeypatch.setenv("MOLVA_BROKERS_DIR", str(tmp_path / "brokers"))
    return tmp_path / "brokers"


def brokers(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tests.brokers", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_server_outlives_its_command_until_it_is_stopped(folder: Path, redis_url: str) -> None:
    assert brokers("start", "redis").returncode == 0
    try:
        shown = json.loads(brokers("status", "--json", "redis").stdout)
        url = brokers("url", "redis").stdout.strip()
        assert shown["running"]
        assert shown["url"] == url != redis_url
        with redis.Redis.from_url(url) as client:
            client.set("kept", "7")
            again = brokers("start", "redis")
            assert again.stdout == f"redis {url}\n"
            assert client.get("kept") == b"7", "the second start made a new server"
    finally:
        assert brokers("stop", "redis").stdout == "redis stopped\n"
    assert has_ended(shown["pid"])
    assert not folder.exists()
    assert brokers("url", "redis").returncode == 3


def test_a_process_that_only_has_the_remembered_id_is_left_alone(folder: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        try:
            remember(folder, stranger.pid, psutil.Process(stranger.pid).create_time())

            assert State(folder).find("redis") is None
            assert State(folder).stop("redis") is False

            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_process_that_was_started_at_another_time_is_left_alone(folder: Path) -> None:
    named = f"{folder}/redis/redis.conf"
    with subprocess.Popen([sys.executable, "-c", "input()", named], stdin=subprocess.PIPE) as other:
        try:
            remember(folder, other.pid, psutil.Process(other.pid).create_time() - 3600)

            assert State(folder).stop("redis") is False

            assert other.poll() is None
        finally:
            other.kill()


def test_a_folder_of_somebody_else_is_refused(folder: Path) -> None:
    folder.symlink_to(folder.parent)

    refused = brokers("start", "redis")

    assert refused.returncode == 1
    assert "set MOLVA_BROKERS_DIR" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_server_that_already_runs_is_used_where_the_environment_names_it(
    folder: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLVA_TEST_REDIS", redis_url)

    assert brokers("start", "redis").stdout == f"redis {redis_url}\n"
    assert brokers("stop", "redis").stdout == "redis was not running\n"

    with redis.Redis.from_url(redis_url) as client:
        assert client.ping()
    assert not folder.exists()


@pytest.mark.usefixtures("folder")
def test_a_server_that_nothing_can_run_is_missing_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MOLVA_INSTALL", raising=False)

    servers = SharedServers()
    try:
        for _ in range(2):
            with pytest.raises(MissingServerError, match="redis-server is not on PATH"):
                servers.url("redis")
    finally:
        servers.close()


@pytest.mark.parametrize(("required", "outcome"), [("", "1 skipped"), ("redis", "1 error")])
def test_a_missing_server_skips_a_test_unless_it_is_required(
    tmp_path: Path, required: str, outcome: str
) -> None:
    """A run of pytest in a run of pytest, on a machine without programs."""
    programs = tmp_path / "programs"
    programs.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MOLVA_")}
    where = {"PATH": str(programs), "MOLVA_BROKERS_DIR": str(tmp_path / "brokers")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q"),
            *("tests/brokers/test_shared.py", "-k", "redis"),
        ],
        cwd=ROOT,
        env={**clean, **where, "MOLVA_REQUIRE": required},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome in done.stdout
    assert "redis-server is not on PATH" in done.stdout
    assert ("NOT TESTED HERE" in done.stdout) == (outcome == "1 skipped")


@pytest.mark.usefixtures("redis_url")
def test_servers_of_a_run_that_was_killed_are_ended() -> None:
    """SIGKILL leaves no chance to clean up; the guard at the other end of the pipe does it."""
    code = (
        "import time\n"
        "from tests.brokers import private_redis\n"
        "with private_redis() as server:\n"
        "    print(server.pid, server.data_dir, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        pid, _, data = run.stdout.readline().strip().partition(" ")
        run.kill()

    deadline = time.monotonic() + 20
    while not has_ended(int(pid)) or Path(data).exists():
        assert time.monotonic() < deadline, "the server, or its data, outlived its run"
        time.sleep(0.05)


def has_ended(pid: int) -> bool:
    """Whether it has; the system's first process may take a while to collect an orphan."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def remember(folder: Path, pid: int, started_at: float) -> None:
    folder.mkdir()
    record = {
        "name": "redis",
        "source": "local",
        "version": "7",
        "url": "redis://127.0.0.1:1/0",
        "pid": pid,
        "started_at": started_at,
        "ports": [1],
        "container": None,
    }
    (folder / "redis.json").write_text(json.dumps(record))
