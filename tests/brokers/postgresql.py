"""PostgreSQL: a cluster of its own, one database ``molva`` that belongs to ``molva``."""

import asyncio
import os
import pwd
import re
import shutil
import signal
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any, ClassVar, final

import asyncpg

from tests.brokers.certificates import Certificates
from tests.brokers.errors import ServerFailedError
from tests.brokers.install import install_packages
from tests.brokers.kind import Image, Kind, Place

__all__ = ["PostgreSQL"]


@final
class PostgreSQL(Kind):
    """A PostgreSQL server; the table's row."""

    name: ClassVar[str] = "postgresql"
    image: ClassVar[Image] = Image(
        "postgres:18",
        5432,
        environment={
            "POSTGRES_USER": "molva",
            "POSTGRES_DB": "molva",
            "POSTGRES_HOST_AUTH_METHOD": "trust",
        },
    )
    user: ClassVar[str | None] = "postgres"
    # SIGINT is its fast shutdown; SIGTERM waits until every client has gone.
    stop_signal: ClassVar[int] = signal.SIGINT

    def missing(self) -> str | None:
        if _programs() is None:
            return "initdb and postgres are neither on PATH nor in /usr/lib/postgresql/*/bin"
        if os.geteuid() == 0 and not _user_exists("postgres"):
            return "it does not run as root, and there is no user postgres to run it"
        return None

    def install(self) -> None:
        install_packages(self.name)

    def prepare(self, place: Place) -> None:
        programs = _programs()
        assert programs is not None, "missing() was not asked"
        password_file = place.folder / "password"
        method = ["--auth=trust"]
        if place.password is not None:
            password_file.write_text(place.password)
            method = ["--auth=scram-sha-256", f"--pwfile={password_file}"]
        self._give_away(place.folder)
        self._run(
            place,
            *(str(programs / "initdb"), f"--pgdata={place.data}", "--username=molva"),
            *("--encoding=UTF8", "--locale=C.UTF-8", *method),
            # Only the empty cluster is not synced; the server syncs.
            "--no-sync",
        )
        password_file.unlink(missing_ok=True)
        # Without a server: no client has to wait for a database that is not there yet.
        self._run(
            place,
            *(str(programs / "postgres"), "--single", "-D", str(place.data), "postgres"),
            stdin="CREATE DATABASE molva;\n",
        )
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(place.port),
            "unix_socket_directories": "",
            "fsync": "on",
            "synchronous_commit": "on",
            "shared_buffers": "64MB",
        }
        if (files := place.certificates) is not None:
            settings |= {
                "ssl": "on",
                # Copies, since it takes no key that belongs to somebody else.
                "ssl_cert_file": str(shutil.copy(files.chain, place.data / "server.pem")),
                "ssl_key_file": str(shutil.copy(files.key, place.data / "server.key")),
            }
            hba = "hostssl all all 127.0.0.1/32 " + method[0].removeprefix("--auth=") + "\n"
            (place.data / "pg_hba.conf").write_text(hba)
        settings |= place.settings
        lines = [f"{name} = '{value}'\n" for name, value in settings.items()]
        with (place.data / "postgresql.conf").open("a") as file:
            file.writelines(lines)
        self._give_away(place.folder)

    def command(self, place: Place) -> list[str]:
        programs = _programs()
        assert programs is not None, "missing() was not asked"
        return [str(programs / "postgres"), "-D", str(place.data)]

    def url(self, place: Place) -> str:
        password = "" if place.password is None else f":{place.password}"
        options = "" if place.certificates is None else "?sslmode=require"
        return f"postgresql://molva{password}@127.0.0.1:{place.port}/molva{options}"

    def probe(self, url: str, certificates: Certificates | None = None) -> str | None:
        answer: list[str | Exception] = []

        def ask() -> None:
            try:
                answer.append(asyncio.run(_ask_version(url, certificates)))
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                answer.append(error)

        # A thread, because whoever waits for a server may have an event loop running.
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def _run(self, place: Place, *command: str, stdin: str = "") -> None:
        done = subprocess.run(
            command,
            input=stdin,
            cwd=place.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **self.run_as(),
        )
        if done.returncode != 0:
            reason = f"{Path(command[0]).name} failed: {done.stderr.strip()}"
            raise ServerFailedError(self.name, reason)

    def _give_away(self, folder: Path) -> None:
        owner = self.run_as()
        if owner:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, owner["user"], owner["group"])


async def _ask_version(url: str, certificates: Certificates | None) -> str:
    trust: dict[str, Any] = {}
    if certificates is not None:
        # A test may want a certificate with another name on it: that is no failed start.
        context = ssl.create_default_context(cafile=certificates.authority)
        context.check_hostname = False
        trust = {"ssl": context}
    async with asyncio.timeout(3):
        connection = await asyncpg.connect(url, **trust)
        try:
            return str(await connection.fetchval("SHOW server_version")).split()[0]
        finally:
            await connection.close()


def _programs() -> Path | None:
    """Return the folder with initdb and postgres: PATH's, or the newest of Debian's."""
    on_path = shutil.which("initdb")
    if on_path and shutil.which("postgres"):
        return Path(on_path).resolve().parent
    found = [p.parent for p in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(found, key=lambda p: [int(n) for n in re.findall(r"\d+", str(p))], default=None)


def _user_exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
