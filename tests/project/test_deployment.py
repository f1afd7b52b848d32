"""Dockerfile, compose.yaml and the manual's table of versions agree with what runs."""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiormq
import asyncpg
import nats
import pytest
import redis
from examples.scaling_out.fleet import Fleet
from examples.scaling_out.visitors import Visitors, total

from molva.cli.exits import UNAVAILABLE
from tests.brokers import private_nats, private_redis
from tests.brokers.kafka import pinned_version
from tests.brokers.nats import VERSION
from tests.brokers.ports import free_ports
from tests.brokers.table import KINDS
from tests.conftest import skip_without

ROOT = Path(__file__).parent.parent.parent
COMPOSE = ROOT / "compose.yaml"


def compose_config(**environment: str) -> str:
    """Return compose.yaml as Compose understands it; skip without any Compose."""
    command = compose_command()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MOLVA_", "COMPOSE_"))}
    done = subprocess.run(
        [*command, "--file", str(COMPOSE), "config"],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def services(config: str) -> dict[str, str]:
    """Return each service of what Compose understood."""
    _, _, rest = config.partition("\nservices:\n")
    if not rest:
        rest = config.removeprefix("services:\n")
    inside = re.split(r"^\S", rest, maxsplit=1, flags=re.MULTILINE)[0]
    _, *named = re.split(r"^  (\w+):\n", inside, flags=re.MULTILINE)
    return dict(zip(named[::2], named[1::2], strict=True))


def started(config: str, profiles: str) -> set[str]:
    """Return the services that ``up`` starts. Old Compose shows the others, too."""
    found = set()
    for name, service in services(config).items():
        listed = re.search(r"^ {4}profiles:\n((?: +- .+\n)+)", service, re.MULTILINE)
        own = set() if listed is None else set(re.findall(r"- (\w+)", listed[1]))
        if not own or own & set(profiles.split(",")):
            found.add(name)
    return found


def ways() -> list[dict[str, str]]:
    """Return the variables of each way that the manual has, the first without any."""
    text = (ROOT / "docs" / "brokers.md").read_text()
    exports = re.findall(r"^export (COMPOSE_PROFILES=.+)$", text, re.MULTILINE)
    assert len(exports) == 3
    return [{}, *(dict(one.split("=", 1) for one in shlex.split(export)) for export in exports)]


def defaults() -> dict[str, str]:
    lines = (ROOT / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def compose_command() -> list[str]:
    found = [each for each in (["docker", "compose"], ["docker-compose"]) if answers(each)]
    if not found:
        skip_without("compose", "neither docker compose nor docker-compose is installed")
    return found[0]


def answers(command: list[str]) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("way", ways(), ids=lambda way: way.get("COMPOSE_PROFILES", "default"))
def test_compose_starts_the_servers_that_molva_is_pointed_at_and_no_others(
    way: dict[str, str],
) -> None:
    config = compose_config(**way)
    running = started(config, {**defaults(), **way}["COMPOSE_PROFILES"])

    for name in ("http", "worker"):
        urls = re.findall(r"MOLVA_(?:BROKER|LEDGER): (\S+)", services(config)[name])
        assert {urlsplit(url).hostname for url in urls} == running - {"http", "worker"}


def test_compose_runs_kafka_and_redis_unless_told_otherwise() -> None:
    config = compose_config()

    assert started(config, defaults()["COMPOSE_PROFILES"]) == {"http", "worker", "kafka", "redis"}


def test_no_service_of_compose_pulls_in_a_server_that_was_not_asked_for() -> None:
    assert "depends_on" not in compose_config()


def test_what_compose_tells_nats_reaches_it() -> None:
    config = compose_config(COMPOSE_PROFILES="nats,redis")

    assert "sync_interval: always" in services(config)["nats"]


def test_molva_is_told_that_the_nats_of_compose_syncs() -> None:
    """No client can ask for it; untold, ``power`` is not said, and nothing is sent in batches."""
    assert "sync_interval: always" in (ROOT / "compose.yaml").read_text()
    [url] = [way["MOLVA_BROKER"] for way in ways() if "nats" in way.get("COMPOSE_PROFILES", "")]

    assert url == "nats://nats:4222?sync=always"


def ends(data: Path, deployment: dict[str, str]) -> list[int]:
    """Return the exit codes of what the image runs, where it should end by itself."""
    [port] = free_ports(1)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "molva", command],
            env={**os.environ, **deployment, "MOLVA_DATA": str(data), "MOLVA_PORT": str(port)},
            stderr=subprocess.DEVNULL,
        )
        for command in ("serve", "work")
    ]
    try:
        return [process.wait(60) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("scheme", ["amqp", "kafka", "nats", "redis"])
def test_a_broker_that_is_not_there_ends_processes_so_that_they_are_started_again(
    tmp_path: Path, scheme: str
) -> None:
    [port] = free_ports(1)

    codes = ends(tmp_path, {"MOLVA_BROKER": f"{scheme}://127.0.0.1:{port}"})

    assert codes == [UNAVAILABLE, UNAVAILABLE]


async def test_what_ended_for_want_of_a_server_serves_when_it_is_started_again(
    tmp_path: Path,
) -> None:
    with private_nats() as broker, private_redis() as ledger:
        deployment = {"MOLVA_BROKER": broker.url, "MOLVA_LEDGER": ledger.url}
        broker.stop()
        assert ends(tmp_path, deployment) == [UNAVAILABLE, UNAVAILABLE]
        broker.start()
        ledger.stop()
        assert ends(tmp_path, deployment) == [UNAVAILABLE, UNAVAILABLE]
        ledger.start()

        with Fleet(tmp_path, deployment) as fleet:
            fleet.start("work")
            fleet.start("serve")
            await asyncio.to_thread(fleet.wait_ready)
            visitors = Visitors(fleet.ports[0], "default")
            await visitors.rate(per_second=20, seconds=0.1)
            while await total(fleet.ports[0], "default") < visitors.accepted:
                await asyncio.sleep(0.1)

    assert visitors.accepted >= 20


def test_compose_runs_the_versions_that_scripts_brokers_runs_in_docker() -> None:
    named = set(re.findall(r"image: (\S+:\S+)", COMPOSE.read_text()))

    assert named == {kind.image.name for kind in KINDS.values()}
    assert f"apache/kafka:{pinned_version()}" in named


def test_the_image_installs_only_what_is_pinned() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    installs = re.findall(r"^RUN .*pip install .*$", dockerfile, re.MULTILINE)

    assert len(installs) == 2
    assert "--require-hashes -r requirements/run.txt" in installs[0]
    assert "--no-deps" in installs[1]
    assert re.search(r"^USER (?!root)", dockerfile, re.MULTILINE)


def test_the_image_has_every_broker_s_client() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every: dict[str, Any] = extras["optional-dependencies"]
    pinned = (ROOT / "requirements" / "run.txt").read_text()

    for name in KINDS:
        assert name in every["all"][0]
        client = re.split(r"[\[>=]", every[name][0])[0]
        assert re.search(rf"^{client}==", pinned, re.MULTILINE), client


def manual_versions() -> dict[str, str]:
    """Return the manual's table: server to version."""
    text = (ROOT / "docs" / "brokers.md").read_text()
    return dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", text, re.MULTILINE))


def only_in_the_gate(name: str) -> None:
    """Skip elsewhere: a laptop may well have another version than the manual's."""
    if name not in os.environ.get("MOLVA_REQUIRE", "").split(","):
        skip_without("versions", f"the manual's are of runs where MOLVA_REQUIRE names {name}")


def test_the_manual_names_every_server_and_the_kafka_of_the_pom() -> None:
    assert set(manual_versions()) == set(KINDS)
    assert manual_versions()["kafka"] == pinned_version()


def test_the_manual_names_the_redis_of_the_gate(redis_url: str) -> None:
    only_in_the_gate("redis")
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        version = client.info("server")["redis_version"]

    assert version.startswith(manual_versions()["redis"] + ".")


async def test_the_manual_names_the_nats_of_the_gate(nats_url: str) -> None:
    only_in_the_gate("nats")
    client = await nats.connect(nats_url)
    found = client.connected_server_version
    version = f"{found.major}.{found.minor}.{found.patch}"
    await client.close()

    assert version == VERSION
    assert version.startswith(manual_versions()["nats"] + ".")


async def test_the_manual_names_the_postgresql_of_the_gate(postgresql_url: str) -> None:
    only_in_the_gate("postgresql")
    connection = await asyncpg.connect(postgresql_url)
    version = str(await connection.fetchval("SHOW server_version"))
    await connection.close()

    assert version.startswith(manual_versions()["postgresql"] + ".")


async def test_the_manual_names_the_rabbitmq_of_the_gate(rabbitmq_url: str) -> None:
    only_in_the_gate("rabbitmq")
    async with aiormq.connect(rabbitmq_url) as connection:
        version = connection.server_properties["version"]

    assert version == manual_versions()["rabbitmq"]


def test_the_health_check_of_the_image_asks_the_port_that_molva_listens_on() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    health = re.search(r"CMD (\[\"python\".*\])", dockerfile)
    assert health is not None

    [port] = re.findall(r"127\.0\.0\.1:(\d+)/readyz", json.loads(health[1])[2])
    assert f"EXPOSE {port}" in dockerfile
    assert "MOLVA_PORT" not in dockerfile, "the health check asks the default port"
