"""Kafka in KRaft mode: one process is broker and controller, with a small heap."""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
import xml.etree.ElementTree as ET
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import ClassVar, final
from urllib.parse import urlsplit

from tests.brokers.certificates import Certificates
from tests.brokers.errors import MissingServerError, ServerFailedError
from tests.brokers.install import INSTALL_SECONDS, ROOT, install_packages
from tests.brokers.kind import Image, Kind, Place

__all__ = ["Kafka", "pinned_version"]

_POM = ROOT / "scripts" / "kafka" / "pom.xml"
_LOGGING = ROOT / "scripts" / "kafka" / "log4j2.properties"
_POM_NAMES = {"m": "http://maven.apache.org/POM/4.0.0"}

# Kafka 4 needs Java 17.
_OLDEST_JAVA = 17

# A broker alone runs in 256 MB; transactions and a thousand partitions of a test want more.
_HEAP = "-Xmx384m"

_SETTINGS = {
    "node.id": "1",
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "BROKER",
    # A test that misspells a topic must fail, not make it.
    "auto.create.topics.enable": "false",
    # There is one node: what is internal cannot have three copies. Fewer partitions than the
    # usual 50, which are 50 folders and files that every start and stop would sync.
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "4",
    # Three seconds for members who join later; a test of joining measures that instead.
    "group.initial.rebalance.delay.ms": "0",
    # A test of a dead member waits for its session to end: allow short ones, of both protocols.
    "group.min.session.timeout.ms": "500",
    "group.consumer.min.session.timeout.ms": "500",
    "group.consumer.min.heartbeat.interval.ms": "100",
    # A broker that was killed is taken back only after its old session has ended. The usual
    # 9 s would be added to every restart of a test.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    # Of a small machine: the usual ones are 8 threads of I/O and 128 MB for the cleaner.
    "num.network.threads": "2",
    "num.io.threads": "4",
    "log.cleaner.dedupe.buffer.size": "4194304",
    "log.index.size.max.bytes": "1048576",
}


@final
class Kafka(Kind):
    """An Apache Kafka server; the table's row."""

    name: ClassVar[str] = "kafka"
    image: ClassVar[Image] = Image(
        "apache/kafka:4.3.1",
        9092,
        environment={
            "KAFKA_NODE_ID": "1",
            "KAFKA_PROCESS_ROLES": "broker,controller",
            "KAFKA_LISTENERS": "BROKER://:9092,CONTROLLER://:9093",
            "KAFKA_ADVERTISED_LISTENERS": "BROKER://127.0.0.1:{port}",
            "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "KAFKA_INTER_BROKER_LISTENER_NAME": "BROKER",
            "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
            "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
            "KAFKA_HEAP_OPTS": _HEAP,
            "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
            "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
            "KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS": "4",
            "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
            "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
            "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
            "KAFKA_GROUP_MIN_SESSION_TIMEOUT_MS": "500",
        },
    )
    ports: ClassVar[int] = 2
    ready_seconds: ClassVar[float] = 150.0
    stop_signal: ClassVar[int] = signal.SIGTERM

    def missing(self) -> str | None:
        found = _java_version()
        if found is None or found < _OLDEST_JAVA:
            return f"it needs Java {_OLDEST_JAVA} or newer, and java is {found or 'not on PATH'}"
        if _jars() is None:
            return f"its jars are neither in KAFKA_HOME nor in {_cache()}"
        return None

    def install(self) -> None:
        install_packages(self.name)
        folder = _cache()
        if not folder.exists():
            _download(folder)

    def prepare(self, place: Place) -> None:
        given = {name.replace("_", "."): value for name, value in place.settings.items()}
        broker, own = place.ports
        # Of a cluster the others must know both before there is a first one.
        controller = given.pop("controller.port", str(own))
        # A first letter of our own: an id that begins with a hyphen is taken for an option.
        name = "M" + urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")[1:]
        cluster = given.pop("cluster.id", name)
        security = ("SASL_" if place.password is not None else "") + (
            "SSL" if place.certificates is not None else "PLAINTEXT"
        )
        settings = {
            **_SETTINGS,
            "listeners": f"BROKER://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"BROKER://127.0.0.1:{broker}",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listener.security.protocol.map": f"BROKER:{security},CONTROLLER:PLAINTEXT",
            "log.dirs": str(place.data),
        }
        if place.password is not None:
            settings |= {
                "sasl.mechanism.inter.broker.protocol": "PLAIN",
                "sasl.enabled.mechanisms": "PLAIN",
                "listener.name.broker.plain.sasl.jaas.config": (
                    "org.apache.kafka.common.security.plain.PlainLoginModule required "
                    f'username="molva" password="{place.password}" '
                    f'user_molva="{place.password}";'
                ),
            }
        if place.certificates is not None:
            files = place.certificates
            store = place.folder / "server.pem"
            store.write_bytes(files.key.read_bytes() + files.chain.read_bytes())
            store.chmod(0o600)
            settings |= {
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": str(store),
                "ssl.truststore.type": "PEM",
                "ssl.truststore.location": str(files.authority),
                # The broker is a client of itself, whatever name its certificate has.
                "ssl.endpoint.identification.algorithm": "",
            }
        settings |= given
        file = _properties(place)
        file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        # One tier of the compiler: this JVM lives for a second.
        formatted = subprocess.run(
            [
                *_java("-XX:TieredStopAtLevel=1", "kafka.tools.StorageTool"),
                *("format", "--cluster-id", cluster, "--config", str(file)),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if formatted.returncode != 0:
            reason = f"formatting failed: {formatted.stdout.strip()}\n{formatted.stderr.strip()}"
            raise ServerFailedError(self.name, reason)

    def command(self, place: Place) -> list[str]:
        # Compiling it well takes as long as half of a start.
        compiler = ("-XX:TieredStopAtLevel=1",) if place.hurried else ()
        return [
            *_java(_HEAP, "-XX:+UseSerialGC", *compiler, "kafka.Kafka"),
            str(_properties(place)),
        ]

    def url(self, place: Place) -> str:
        user = "" if place.password is None else f"molva:{place.password}@"
        return f"kafka://{user}127.0.0.1:{place.port}"

    def probe(self, url: str, certificates: Certificates | None = None) -> str | None:
        from confluent_kafka.admin import AdminClient

        parts = urlsplit(url)
        hosts = parts.netloc.rpartition("@")[2]
        first = urlsplit(f"kafka://{hosts.split(',')[0]}")
        # Before librdkafka, which would keep trying in threads and complain on standard error.
        socket.create_connection((first.hostname or "127.0.0.1", first.port or 9092), 2).close()
        settings: dict[str, str | int] = {"bootstrap.servers": hosts, "log_level": 0}
        security = "SSL" if certificates is not None else "PLAINTEXT"
        if certificates is not None:
            settings |= {
                "ssl.ca.location": str(certificates.authority),
                # A test may want a certificate with another name: that is no failed start.
                "ssl.endpoint.identification.algorithm": "none",
            }
        if parts.password is not None:
            security = f"SASL_{security}"
            settings |= {
                "sasl.mechanism": "PLAIN",
                "sasl.username": parts.username or "",
                "sasl.password": parts.password,
            }
        client = AdminClient({**settings, "security.protocol": security})
        # Brokers are listed once the controller knows that they live: that is ready.
        if not client.list_topics(timeout=3).brokers:
            raise ConnectionError("no broker has registered yet")
        # Kafka's protocol does not tell versions: of a server of ours, its jars do.
        jars = _jars()
        return _version_of(jars) if self.given_url != url and jars is not None else None


def pinned_version() -> str:
    """Return the version that scripts/kafka/pom.xml names."""
    found = ET.parse(_POM).findtext("m:properties/m:kafka.version", namespaces=_POM_NAMES)
    assert found is not None, f"{_POM} has no kafka.version"
    return found


def _cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "molva" / f"kafka-{pinned_version()}"


def _jars() -> Path | None:
    """Return the folder of Kafka's jars: of KAFKA_HOME, of what is on PATH, or our cache."""
    homes = [Path(os.environ["KAFKA_HOME"])] if os.environ.get("KAFKA_HOME") else []
    for script in ("kafka-server-start.sh", "kafka-server-start"):
        if found := shutil.which(script):
            homes.append(Path(found).resolve().parent.parent)
    for folder in (*(home / "libs" for home in homes), _cache()):
        if any(folder.glob("kafka_2.1*.jar")):
            return folder
    return None


def _version_of(jars: Path) -> str | None:
    for jar in jars.glob("kafka-clients-*.jar"):
        return jar.stem.removeprefix("kafka-clients-")
    return None


def _java_version() -> int | None:
    java = shutil.which("java")
    if java is None:
        return None
    shown = subprocess.run(
        [java, "-XshowSettings:properties", "-version"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    ).stderr
    for line in shown.splitlines():
        if line.strip().startswith("java.specification.version = "):
            found = line.rpartition("= ")[2].strip()
            return int(found) if found.isdigit() else 8
    return None


def _java(*arguments: str) -> list[str]:
    jars = _jars()
    assert jars is not None, "missing() was not asked"
    return [
        *("java", "-cp", f"{jars}/*", f"-Dlog4j2.configurationFile={_LOGGING}"),
        *arguments,
    ]


def _download(folder: Path) -> None:
    """Have Maven copy the jars, all or none: a folder that is there is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        # Maven does not expect a second one in its own cache.
        (folder.parent / "maven.lock").open("w") as lock,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix="kafka-") as made,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return
        done = subprocess.run(
            [
                *("mvn", "--quiet", "--batch-mode", "--file", str(_POM)),
                *("dependency:copy-dependencies", "-DincludeScope=runtime"),
                f"-DoutputDirectory={made}/jars",
            ],
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise MissingServerError("kafka", f"Maven failed: {done.stdout.strip()[-2000:]}")
        try:
            Path(made, "jars").rename(folder)
        except OSError:
            # Another run was faster; its folder is as good.
            if not folder.exists():
                raise


def _properties(place: Place) -> Path:
    return place.folder / "server.properties"
