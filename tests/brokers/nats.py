"""NATS with JetStream, set up to keep what it confirmed: it syncs every write before that."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
from pathlib import Path
from typing import ClassVar, final
from urllib.parse import unquote, urlsplit

from tests.brokers.certificates import Certificates
from tests.brokers.errors import MissingServerError
from tests.brokers.install import INSTALL_SECONDS, install_packages
from tests.brokers.kind import Image, Kind, Place

__all__ = ["VERSION", "Nats", "program_version"]

# Built from its source by Go's own tool, which checks the sum. Debian 12 has 2.9.10.
VERSION = "2.15.2"
_MODULE = f"github.com/nats-io/nats-server/v2@v{VERSION}"

# Settings that stand inside the block of JetStream; all others stand beside it.
_OF_JETSTREAM = ("sync_interval", "max_file_store", "max_memory_store")

# Older ones refuse a configuration that asks them to sync before they answer.
_FIRST_THAT_SYNCS = (2, 10)

# What a setting jetstream="off" leaves is core NATS.
_SWITCH = "jetstream"

# Of a container.
_CONFIGURATION = "jetstream { store_dir: /data, sync_interval: always }\nhttp: 127.0.0.1:8222\n"


@final
class Nats(Kind):
    """A NATS server; the table's row."""

    name: ClassVar[str] = "nats"
    image: ClassVar[Image] = Image(
        "nats:2.15-alpine",
        4222,
        arguments=(
            *("sh", "-c"),
            f"printf '{_CONFIGURATION}' > /tmp/nats.conf && exec nats-server -c /tmp/nats.conf",
        ),
    )
    stop_signal: ClassVar[int] = signal.SIGTERM

    def missing(self) -> str | None:
        return None if _program() else f"nats-server is neither in {_cache()} nor on PATH"

    def install(self) -> None:
        if shutil.which("go"):
            _build(_cache())
        else:
            install_packages(self.name)

    def prepare(self, place: Place) -> None:
        inside = {"store_dir": json.dumps(str(place.data))}
        if program_version() >= _FIRST_THAT_SYNCS:
            inside["sync_interval"] = "always"
        beside = {"listen": f'"127.0.0.1:{place.port}"', "server_name": "molva"}
        for name, value in place.settings.items():
            if name in _OF_JETSTREAM:
                inside[name] = value
            elif name != _SWITCH:
                beside[name] = value
        lines = [f"{name}: {value}" for name, value in beside.items()]
        if place.settings.get(_SWITCH) != "off":
            block = "\n".join(f"  {name}: {value}" for name, value in inside.items())
            lines.append(f"jetstream {{\n{block}\n}}")
        if place.password is not None:
            lines.append(f"authorization {{ user: molva, password: {json.dumps(place.password)} }}")
        if place.certificates is not None:
            files = place.certificates
            lines.append(f'tls {{ cert_file: "{files.chain}", key_file: "{files.key}" }}')
        _configuration(place).write_text("\n".join(lines) + "\n")

    def command(self, place: Place) -> list[str]:
        program = _program()
        assert program is not None, "missing() was not asked"
        return [str(program), "-c", str(_configuration(place))]

    def url(self, place: Place) -> str:
        scheme = "nats" if place.certificates is None else "tls"
        user = "" if place.password is None else f"molva:{place.password}@"
        return f"{scheme}://{user}127.0.0.1:{place.port}"

    def probe(self, url: str, certificates: Certificates | None = None) -> str | None:
        # By hand: its client library can be asked from a coroutine only, and tests start
        # servers from wherever they are.
        parts = urlsplit(url)
        address = parts.hostname or "127.0.0.1", parts.port or 4222
        with contextlib.ExitStack() as held:
            connection = held.enter_context(socket.create_connection(address, 2))
            connection.settimeout(2)
            about = json.loads(_line(connection).removeprefix(b"INFO "))
            about.setdefault("version", None)
            if parts.scheme == "tls":
                trust = ssl.create_default_context(
                    cafile=None if certificates is None else str(certificates.authority)
                )
                # A test may want a certificate with another name: that is no failed start.
                trust.check_hostname = False
                connection = held.enter_context(trust.wrap_socket(connection))
            options: dict[str, object] = {"verbose": False, "pedantic": False}
            if parts.username:
                options["user"] = unquote(parts.username)
                options["pass"] = unquote(parts.password or "")
            elif token := os.environ.get("MOLVA_NATS_TOKEN"):
                options["auth_token"] = token
            connection.sendall(b"CONNECT %b\r\nPING\r\n" % json.dumps(options).encode())
            answer = _line(connection)
            if answer != b"PONG":
                raise ConnectionError(f"it answered {answer!r}")
        return None if about["version"] is None else str(about["version"])


def _line(connection: socket.socket) -> bytes:
    """Read a line, and nothing behind it: what follows may be TLS."""
    line = bytearray()
    while not line.endswith(b"\r\n"):
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError("it closed the connection")
        line += byte
    return bytes(line[:-2])


def _configuration(place: Place) -> Path:
    return place.folder / "nats.conf"


def _cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "molva" / f"nats-server-{VERSION}"


def _program() -> Path | None:
    """Return the server: that of NATS_SERVER, the one built here, or what is on PATH."""
    given = os.environ.get("NATS_SERVER")
    if given:
        return Path(given)
    built = _cache() / "nats-server"
    if built.exists():
        return built
    found = shutil.which("nats-server")
    return None if found is None else Path(found)


def program_version() -> tuple[int, ...]:
    """Return the version of the server that is run here."""
    shown = subprocess.run(
        [str(_program()), "--version"], capture_output=True, text=True, timeout=20, check=True
    ).stdout
    found = re.search(r"v(\d+)\.(\d+)", shown)
    assert found is not None, shown
    return int(found[1]), int(found[2])


def _build(folder: Path) -> None:
    """Have Go build it, whole or not at all: a folder that is there is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        (folder.parent / "nats-server.lock").open("w") as lock,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix="nats-server-") as made,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return
        done = subprocess.run(
            ["go", "install", _MODULE],
            env={**os.environ, "GOBIN": made, "CGO_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise MissingServerError("nats", f"building it failed: {done.stderr.strip()[-2000:]}")
        Path(made, "nats-server").chmod(0o755)
        folder.mkdir()
        Path(made, "nats-server").rename(folder / "nats-server")
