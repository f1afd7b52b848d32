"""Dockerfile, compose.yaml and the manual's table of versions agree with what runs."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import aiormq
import asyncpg
import nats
import redis

from tests.brokers.kafka import pinned_version
from tests.brokers.nats import VERSION
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


def compose_command() -> list[str]:
    found = [each for each in (["docker", "compose"], ["docker-compose"]) if answers(each)]
    if not found:
        skip_without("compose", "neither docker compose nor docker-compose is installed")
    return found[0]


def answers(command: list[str]) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0


def test_compose_accepts_the_file_with_redis_behind() -> None:
    config = compose_config()

    assert "redis://redis:6379/0" in config
    assert "condition: service_healthy" in config


def test_compose_accepts_the_file_with_postgresql_behind() -> None:
    ledger = "postgresql://molva@postgresql:5432/molva"

    assert ledger in compose_config(COMPOSE_PROFILES="postgresql", MOLVA_LEDGER=ledger)


def test_compose_accepts_the_file_with_rabbitmq_in_front() -> None:
    broker = "amqp://molva:molva@rabbitmq"

    assert broker in compose_config(COMPOSE_PROFILES="redis,rabbitmq", MOLVA_BROKER=broker)


def test_compose_accepts_the_file_with_nats_in_front() -> None:
    config = compose_config(COMPOSE_PROFILES="nats,redis", MOLVA_BROKER="nats://nats:4222")

    assert "MOLVA_BROKER: nats://nats:4222" in config
    assert "sync_interval: always" in config


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
