"""A server of a test's own, to be killed, paused, restarted, and set up as the test needs.

It runs by programs of this machine, never by Docker: SIGKILL and SIGSTOP reach the real
process, and its data are a folder here. Its folder goes with it.

Starting blocks: from a coroutine, ``await asyncio.to_thread(server.restart)``.
"""

import contextlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.brokers import reaper
from tests.brokers.certificates import Certificates
from tests.brokers.kind import Place
from tests.brokers.ports import free_ports
from tests.brokers.server import Server, ensure_local
from tests.brokers.table import KINDS

__all__ = [
    "private_kafka",
    "private_nats",
    "private_postgresql",
    "private_rabbitmq",
    "private_redis",
    "private_server",
]


@contextlib.contextmanager
def private_server(
    name: str,
    settings: dict[str, str | int],
    *,
    password: str | None = None,
    certificates: Certificates | None = None,
    hurried: bool = False,
) -> Iterator[Server]:
    """Run a server of the kind ``name`` until the block ends.

    ``hurried``: it starts sooner and is slower ever after, for tests that restart it often.
    """
    kind = KINDS[name]
    ensure_local(kind)
    folder = Path(tempfile.mkdtemp(prefix=f"molva-{name}-"))
    # PostgreSQL runs as somebody else and has to reach its data.
    folder.chmod(0o711)
    place = Place(
        folder=folder / secrets.token_hex(4),
        ports=free_ports(kind.ports),
        settings={key: str(value) for key, value in settings.items()},
        password=password,
        certificates=certificates,
        hurried=hurried,
    )
    server = Server(kind, place)
    with reaper.guarded(folder):
        try:
            server.create()
            yield server
        finally:
            server.remove()
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def private_redis(
    *,
    password: str | None = None,
    certificates: Certificates | None = None,
    **settings: str | int,
) -> Iterator[Server]:
    """Run a Redis; ``settings`` are lines of redis.conf: ``appendfsync="everysec"``.

    ``password`` is that of the default user; ``certificates`` make it speak TLS only.
    """
    with private_server("redis", settings, password=password, certificates=certificates) as server:
        yield server


@contextlib.contextmanager
def private_postgresql(
    *,
    password: str | None = None,
    certificates: Certificates | None = None,
    **settings: str | int,
) -> Iterator[Server]:
    """Run a PostgreSQL; ``settings`` are those of its server: ``synchronous_commit="off"``.

    ``password`` is that of the user molva, asked for by SCRAM; ``certificates`` make it take
    connections by TLS only.
    """
    with private_server(
        "postgresql", settings, password=password, certificates=certificates
    ) as server:
        yield server


@contextlib.contextmanager
def private_kafka(
    *,
    password: str | None = None,
    certificates: Certificates | None = None,
    **settings: str | int,
) -> Iterator[Server]:
    """Run a Kafka; ``settings`` are the broker's: ``message_max_bytes=2048``, dots as ``_``.

    Each of several that shall be a cluster is given ``cluster_id`` and ``controller_port``, too.
    ``password`` is that of the user molva, by SASL PLAIN; ``certificates`` make it speak TLS;
    both together are SASL_SSL.
    """
    with private_server("kafka", settings, password=password, certificates=certificates) as server:
        yield server


@contextlib.contextmanager
def private_rabbitmq(
    *,
    password: str | None = None,
    certificates: Certificates | None = None,
    settings: dict[str, str | int] | None = None,
    hurried: bool = False,
) -> Iterator[Server]:
    """Run a RabbitMQ; ``settings`` are lines of rabbitmq.conf, whose names have dots.

    ``password`` is that of the user molva, where there otherwise is guest; ``certificates`` make
    it speak TLS only. ``rabbitmq.rabbitmqctl(server.place, …)`` changes it while it runs.
    """
    with private_server(
        "rabbitmq",
        settings or {},
        password=password,
        certificates=certificates,
        hurried=hurried,
    ) as server:
        yield server


@contextlib.contextmanager
def private_nats(
    *,
    password: str | None = None,
    certificates: Certificates | None = None,
    **settings: str | int,
) -> Iterator[Server]:
    """Run a NATS with JetStream; ``settings`` are the server's: ``sync_interval="2m"``.

    ``jetstream="off"`` leaves core NATS. ``password`` is that of the user molva;
    ``certificates`` make it take connections by TLS only.
    """
    with private_server("nats", settings, password=password, certificates=certificates) as server:
        yield server
