"""What several test files share: a real service in real processes, and its HTTP."""

import contextlib
import gc
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
from hypothesis import HealthCheck, settings

from tests.brokers.errors import MissingServerError
from tests.brokers.ports import free_ports
from tests.brokers.session import SharedServers

# A process that stands still for a second, as on a busy machine, breaks no property.
settings.register_profile("molva", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("molva")

Answer = tuple[int, dict[str, str], bytes]


class MolvaProcess:
    """A running ``molva`` command and its HTTP address."""

    def __init__(self, command: str, data: Path, port: int, arguments: tuple[str, ...]) -> None:
        self.data = data
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MOLVA_")}
        self.log_path = data.parent / f"{command}-{port}-{time.monotonic_ns()}.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "molva", command, "--data", str(data)),
                    *(() if command == "work" else ("--port", str(port))),
                    *arguments,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_ready(self, seconds: float = 60.0) -> "MolvaProcess":
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.request("GET", "/readyz")[0] == 200:
                    return self
            assert self.process.poll() is None, self.log
            time.sleep(0.02)
        raise AssertionError(f"not ready within {seconds} s: {self.log}")

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return response.status, found, response.read()
        finally:
            connection.close()

    def total(self, query: str = "") -> dict[str, Any]:
        status, _, body = self.request(
            "GET", f"/total{query}", headers={"Accept": "application/json"}
        )
        document: dict[str, Any] = json.loads(body)
        return document if status == 200 else {"status": status, **document}

    def wait_counted(self, count: int, query: str = "", seconds: float = 30.0) -> dict[str, Any]:
        """Wait until so many ratings are counted; return the total then."""
        deadline = time.monotonic() + seconds
        found: dict[str, Any] = {}
        while time.monotonic() < deadline:
            # Who was killed just now resets its connections.
            with contextlib.suppress(OSError, http.client.HTTPException):
                found = self.total(query)
            if found.get("count", 0) >= count:
                return found
            time.sleep(0.02)
        raise AssertionError(f"{count} ratings were not counted, only {found}: {self.log}")

    def wait_working(self, workers: int, seconds: float = 60.0) -> "MolvaProcess":
        """Wait until so many workers take ratings: HTTP may be ready before they are."""
        deadline = time.monotonic() + seconds
        while self.log.count("molva work: taking ratings") < workers:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)
        return self

    def children(self) -> dict[str, psutil.Process]:
        """Return the service's processes by their command: serve, work."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                found[child.cmdline()[3]] = child
        return found

    def stop(self, seconds: float = 12.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


StartMolva = Callable[..., MolvaProcess]


def free_port() -> int:
    """Return a port that nobody of these tests is given as well."""
    return free_ports(1)[0]


@pytest.fixture
def start_molva(tmp_path: Path) -> Iterator[StartMolva]:
    """Start ``molva up`` (or another command); everything is stopped after the test."""
    started: list[MolvaProcess] = []

    def start(
        *arguments: str,
        command: str = "up",
        data: Path | None = None,
        port: int | None = None,
        ready: bool = True,
    ) -> MolvaProcess:
        molva = MolvaProcess(command, data or tmp_path / "data", port or free_port(), arguments)
        started.append(molva)
        return molva.wait_ready() if ready else molva

    yield start
    for molva in started:
        if molva.process.poll() is None:
            molva.process.kill()
            molva.process.wait()


def skip_without(tool: str, reason: str) -> NoReturn:
    """Skip the test; fail it where MOLVA_REQUIRE names the tool."""
    if tool in os.environ.get("MOLVA_REQUIRE", "").split(","):
        pytest.fail(f"MOLVA_REQUIRE names {tool}, but {reason}")
    pytest.skip(f"{tool}: {reason}")


_servers = pytest.StashKey[SharedServers]()
_used: set[str] = set()  # lines that say which servers were used

# Whole files are handed out in this order, and then the others. Who begins a long one last is
# waited for by everybody; side by side at first are those that mostly compute and those that
# mostly wait. A file that takes a minute or more belongs here.
_LONG = (
    "tests/messaging/test_rabbitmq.py",
    "tests/ratings/test_insteval.py",
    "tests/messaging/test_kafka.py",
    "tests/project/test_repository.py",
    "tests/messaging/test_redis.py",
    "tests/faults/simulation/test_simulation.py",
    "tests/ratings/test_service_servers.py",
    "tests/messaging/test_rabbitmq_faults.py",
    "tests/faults/live/test_pairs.py",
    "tests/messaging/test_kafka_faults.py",
    "tests/faults/crash/test_crash_points.py",
    "tests/messaging/test_kafka_topic.py",
    "tests/messaging/test_sqlite.py",
    "tests/queueing/test_simulation_agrees.py",
    "tests/faults/live/test_live.py",
    "tests/faults/crash/test_errors.py",
    "tests/faults/live/test_power.py",
    "tests/ratings/test_ledger_outages.py",
    "tests/messaging/test_nats.py",
    "tests/messaging/test_outages.py",
    "tests/project/test_docs.py",
    "tests/faults/test_mutants.py",
    "tests/ratings/test_spool_servers.py",
    "tests/messaging/test_rabbitmq_power.py",
    "tests/faults/live/test_queues.py",
    "tests/project/test_scaling_out.py",
    "tests/messaging/test_kafka_cluster.py",
    "tests/messaging/test_nats_cluster.py",
    "tests/brokers/test_private.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place = {config.rootpath / name: at for at, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_configure(config: pytest.Config) -> None:
    given = getattr(config, "workerinput", {}).get("servers")
    config.stash[_servers] = SharedServers(Path(given) if given else None)
    # Whoever runs the tests in the background may have them ignore it, and so all children.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_servers].close()


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """Tell a file of what it left behind, and not whichever test finds it."""
    yield
    gc.collect()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    """Skip a test whose fixture wants a server that nothing here can run."""
    try:
        return (yield)
    except MissingServerError as missing:
        skip_without(missing.name, missing.reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip a test that wants a server of its own that nothing here can run."""
    try:
        return (yield)
    except MissingServerError as missing:
        skip_without(missing.name, missing.reason)


@pytest.fixture(scope="session")
def kafka_url(pytestconfig: pytest.Config) -> str:
    """A Kafka that the whole run shares: use names of your own in it."""
    return pytestconfig.stash[_servers].url("kafka")


@pytest.fixture(scope="session")
def redis_url(pytestconfig: pytest.Config) -> str:
    """A Redis that the whole run shares, durable: use names of your own in it."""
    return pytestconfig.stash[_servers].url("redis")


@pytest.fixture(scope="session")
def nats_url(pytestconfig: pytest.Config) -> str:
    """A NATS that the whole run shares, durable: use names of your own in it."""
    return pytestconfig.stash[_servers].url("nats")


@pytest.fixture(scope="session")
def postgresql_url(pytestconfig: pytest.Config) -> str:
    """A database of a PostgreSQL that the whole run shares: make a schema of your own in it."""
    return pytestconfig.stash[_servers].url("postgresql")


@pytest.fixture(scope="session")
def rabbitmq_url(pytestconfig: pytest.Config) -> str:
    """A RabbitMQ that the whole run shares: use names of your own in it."""
    return pytestconfig.stash[_servers].url("rabbitmq")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell which servers were used; in a worker of pytest-xdist, to whoever prints it."""
    config = session.config
    used = {
        f"tested with {server.name} {server.version or 'of unknown version'} ({server.source})"
        for server in config.stash[_servers].used()
    }
    if hasattr(config, "workeroutput"):
        config.workeroutput["used"] = sorted(used)
    else:
        _used.update(used)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist where servers are that all workers share."""
    node.workerinput["servers"] = str(node.config.stash[_servers].folder())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist has used."""
    _used.update(getattr(node, "workeroutput", {}).get("used", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly what was not tested: a skip that nobody sees looks like a success."""
    for line in sorted(_used):
        terminalreporter.line(line)
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section("NOT TESTED HERE", red=True, bold=True)
        terminalreporter.line(
            f"{len(skipped)} tests were skipped, for the reasons above. MOLVA_INSTALL=1 installs "
            "the system packages that they need; MOLVA_REQUIRE=NAME,… makes a skip a failure."
        )


@pytest.fixture
def run_molva() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run a ``molva`` command to its end."""

    def run(
        *arguments: str, stdin: str = "", environment: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MOLVA_")}
        return subprocess.run(
            [sys.executable, "-m", "molva", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            env={**clean, **(environment or {})},
            timeout=60,
            check=False,
        )

    return run
