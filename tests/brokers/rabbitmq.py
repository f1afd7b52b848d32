"""RabbitMQ: one node on loopback, with Erlang's port mapper (epmd) of its own.

A node is reached in three ways, and each has a port of its own on 127.0.0.1: by clients, by
other Erlang nodes (``rabbitmqctl`` is one), and through epmd, which tells the second port. An
epmd that is started by the first node and outlives it, as is usual, would serve all nodes of the
machine on all its interfaces; so each server here has one, which ends with it.
"""

import asyncio
import os
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, ClassVar, Final, final
from urllib.parse import urlsplit

import aiormq

from tests.brokers.certificates import Certificates
from tests.brokers.errors import ServerFailedError
from tests.brokers.install import install_packages
from tests.brokers.kind import Image, Kind, Place

__all__ = ["RabbitMQ", "messages_in", "rabbitmqctl"]

# What the package's own scripts in /usr/sbin call, after becoming the user rabbitmq, whose home
# is the one place where they would let a server live.
_PROGRAMS = Path("/usr/lib/rabbitmq/bin")

# Seconds for a command of rabbitmqctl, most of which go into starting Erlang.
_CONTROL_SECONDS = 60


@final
class RabbitMQ(Kind):
    """A RabbitMQ server; the table's row."""

    name: ClassVar[str] = "rabbitmq"
    image: ClassVar[Image] = Image("rabbitmq:4.2", 5672)
    # For clients, for other nodes, for epmd.
    ports: ClassVar[int] = 3
    ready_seconds: ClassVar[float] = 150.0
    stop_signal: ClassVar[int] = signal.SIGTERM

    def missing(self) -> str | None:
        if _program("rabbitmq-server") is None:
            return f"rabbitmq-server is neither in {_PROGRAMS} nor on PATH"
        for name in ("epmd", "setpriv"):
            if shutil.which(name) is None:
                return f"{name} is not on PATH"
        return None

    def install(self) -> None:
        install_packages(self.name)

    def prepare(self, place: Place) -> None:
        settings = {
            "listeners.tcp.default": f"127.0.0.1:{place.port}",
            "default_user": "guest" if place.password is None else "molva",
            "default_pass": place.password or "guest",
            # Its log is its standard output, which is kept.
            "log.console": "true",
            "log.console.level": "info",
            "log.file": "false",
        }
        if place.certificates is not None:
            del settings["listeners.tcp.default"]
            settings |= {
                "listeners.tcp": "none",
                "listeners.ssl.default": f"127.0.0.1:{place.port}",
                "ssl_options.cacertfile": str(place.certificates.authority),
                "ssl_options.certfile": str(place.certificates.chain),
                "ssl_options.keyfile": str(place.certificates.key),
                "ssl_options.verify": "verify_none",
            }
        settings |= place.settings
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        (place.folder / "rabbitmq.conf").write_text("".join(lines))
        (place.folder / "plugins").write_text("[].\n")

    def command(self, place: Place) -> list[str]:
        server = _program("rabbitmq-server")
        assert server is not None, "missing() was not asked"
        epmd = ["epmd", "-address", "127.0.0.1", "-port", str(place.ports[2])]
        # The shell becomes the server, so epmd is the server's child, and ends with it.
        both = f"setpriv --pdeathsig TERM {shlex.join(epmd)} & exec {shlex.quote(server)}"
        # An option that nobody reads: by the folder in it the process is known to be of ours.
        both += f" -molva {shlex.quote(str(place.folder / 'rabbitmq.conf'))}"
        variables = [f"{name}={value}" for name, value in _environment(place).items()]
        return ["env", *variables, "sh", "-c", both]

    def url(self, place: Place) -> str:
        scheme = "amqp" if place.certificates is None else "amqps"
        user = "" if place.password is None else f"molva:{place.password}@"
        return f"{scheme}://{user}127.0.0.1:{place.port}"

    def probe(self, url: str, certificates: Certificates | None = None) -> str | None:
        parts = urlsplit(url)
        # Before aiormq, which would log each time that nobody listens yet.
        socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 5672), 2).close()
        answer: list[str | Exception] = []

        def ask() -> None:
            try:
                answer.append(asyncio.run(_ask_version(url, certificates)))
            except Exception as error:  # noqa: BLE001 - the caller raises it
                answer.append(error)

        # A thread, because whoever waits for a server may have an event loop running.
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]


# What it says of a server that runs, where the machine is too busy for the server to answer it, or
# to shake hands, in time: it has done nothing then. Seconds until it is asked again.
_NOT_SEEN: Final = ("requires the 'rabbit' app to be running", "unable to perform an operation")
_ASKED_AGAIN: Final = (0.5, 1.0, 2.0, 0.0)


def rabbitmqctl(place: Place, *arguments: str) -> str:
    """Run a command of rabbitmqctl on the server that lives at ``place``; return what it said."""
    program = _program("rabbitmqctl")
    assert program is not None, "missing() was not asked"
    for pause in _ASKED_AGAIN:
        done = subprocess.run(
            [program, "--quiet", "--node", _node(place), *arguments],
            env={**os.environ, **_environment(place)},
            cwd=place.folder,
            capture_output=True,
            text=True,
            timeout=_CONTROL_SECONDS,
            check=False,
        )
        if not any(each in done.stdout + done.stderr for each in _NOT_SEEN):
            break
        time.sleep(pause)
    if done.returncode != 0:
        said = f"{done.stdout.strip()} {done.stderr.strip()}".strip()
        raise ServerFailedError("rabbitmq", f"rabbitmqctl {shlex.join(arguments)}: {said}")
    return done.stdout


def messages_in(place: Place, queue: str) -> int:
    """Return how many messages a queue holds, those that consumers hold among them."""
    told = rabbitmqctl(place, "list_queues", "name", "messages", "--no-table-headers")
    counts = dict(line.rsplit("\t", 1) for line in told.splitlines() if "\t" in line)
    return int(counts.get(queue, 0))


def _program(name: str) -> str | None:
    own = _PROGRAMS / name
    return str(own) if own.exists() else shutil.which(name)


def _node(place: Place) -> str:
    return f"molva-{place.port}@localhost"


def _environment(place: Place) -> dict[str, str]:
    """Return what tells Erlang's and RabbitMQ's scripts that nothing is outside the folder."""
    _, distribution, epmd = place.ports
    # Erlang's threads look for work in a loop before they sleep: for a server that is alone.
    schedulers = "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none" if place.hurried else "+S 2:2"
    return {
        # Where Erlang keeps the secret by which nodes know each other.
        "HOME": str(place.folder),
        "ERL_EPMD_PORT": str(epmd),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": _node(place),
        "RABBITMQ_DIST_PORT": str(distribution),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
            f"-kernel inet_dist_use_interface {{127,0,0,1}} {schedulers}"
        ),
        "RABBITMQ_CTL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "RABBITMQ_CONFIG_FILE": f"{place.folder}/rabbitmq.conf",
        "RABBITMQ_ADVANCED_CONFIG_FILE": f"{place.folder}/advanced.config",
        "RABBITMQ_GENERATED_CONFIG_DIR": f"{place.folder}/generated",
        "RABBITMQ_ENABLED_PLUGINS_FILE": f"{place.folder}/plugins",
        "RABBITMQ_MNESIA_BASE": str(place.data),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_PID_FILE": f"{place.folder}/pid",
    }


async def _ask_version(url: str, certificates: Certificates | None) -> str:
    trust: dict[str, Any] = {}
    if certificates is not None:
        # A test may want a certificate with another name on it: that is no failed start.
        context = ssl.create_default_context(cafile=certificates.authority)
        context.check_hostname = False
        trust = {"context": context}
    async with asyncio.timeout(5), aiormq.connect(url, **trust) as connection:
        return str(connection.server_properties["version"])
