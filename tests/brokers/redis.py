"""Redis, set up to keep what it confirmed: every write is in its log, with an fsync."""

import shutil
import signal
from typing import ClassVar, final

from tests.brokers.certificates import Certificates
from tests.brokers.install import install_packages
from tests.brokers.kind import Image, Kind, Place

__all__ = ["Redis"]

_DURABLE = {"appendonly": "yes", "appendfsync": "always", "save": ""}


@final
class Redis(Kind):
    """A Redis server; the table's row."""

    name: ClassVar[str] = "redis"
    image: ClassVar[Image] = Image(
        "redis:8.2",
        6379,
        arguments=("redis-server", "--appendonly", "yes", "--appendfsync", "always", "--save", ""),
    )
    stop_signal: ClassVar[int] = signal.SIGTERM

    def missing(self) -> str | None:
        return None if shutil.which("redis-server") else "redis-server is not on PATH"

    def install(self) -> None:
        install_packages(self.name)

    def prepare(self, place: Place) -> None:
        settings: dict[str, str] = {
            "bind": "127.0.0.1",
            "port": str(place.port),
            "dir": str(place.data),
            # Keeps its command line as it was started, by which we know it again.
            "set-proc-title": "no",
            **_DURABLE,
        }
        if place.password is not None:
            settings["requirepass"] = place.password
        if place.certificates is not None:
            settings |= {
                "port": "0",
                "tls-port": str(place.port),
                "tls-auth-clients": "no",
                "tls-ca-cert-file": str(place.certificates.authority),
                "tls-cert-file": str(place.certificates.chain),
                "tls-key-file": str(place.certificates.key),
            }
        settings |= {name.replace("_", "-"): value for name, value in place.settings.items()}
        lines = [f'{name} "{value}"\n' for name, value in settings.items()]
        (place.folder / "redis.conf").write_text("".join(lines))

    def command(self, place: Place) -> list[str]:
        return ["redis-server", str(place.folder / "redis.conf")]

    def url(self, place: Place) -> str:
        scheme = "redis" if place.certificates is None else "rediss"
        user = "" if place.password is None else f":{place.password}@"
        return f"{scheme}://{user}127.0.0.1:{place.port}/0"

    def probe(self, url: str, certificates: Certificates | None = None) -> str | None:
        import redis

        trust: dict[str, object] = {}
        if certificates is not None:
            # A test may want a certificate with another name on it: that is no failed start.
            trust = {"ssl_ca_certs": str(certificates.authority), "ssl_check_hostname": False}
        client = redis.Redis.from_url(
            url, socket_timeout=2, socket_connect_timeout=2, decode_responses=True, **trust
        )
        try:
            # While it loads its log it answers PING's connection with LOADING: an error here.
            client.ping()
            found: dict[str, str] = client.info("server")
            return str(found["redis_version"])
        finally:
            client.close()
