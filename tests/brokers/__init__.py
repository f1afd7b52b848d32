"""Real servers for tests and for trying: Kafka, NATS, PostgreSQL, RabbitMQ and Redis, on loopback.

``scripts/brokers`` is the command line of this package. Tests take a session's server from
the fixtures ``kafka_url``, ``redis_url`` and the like, and one of their own, to be
killed and paused, from here::

    with private_redis(appendfsync="everysec") as server:
        use(server.url)
        server.kill()
        server.restart()

Where nothing can run a server, ``MissingServerError`` is raised; a test that lets it pass is
skipped, or fails where ``MOLVA_REQUIRE`` names the server.

A kind of server is one file here and one row of ``table.KINDS``.
"""

from tests.brokers.certificates import Certificates, make_certificates
from tests.brokers.errors import BrokersError, MissingServerError, ServerFailedError
from tests.brokers.private import (
    private_kafka,
    private_nats,
    private_postgresql,
    private_rabbitmq,
    private_redis,
)
from tests.brokers.server import Server

__all__ = [
    "BrokersError",
    "Certificates",
    "MissingServerError",
    "Server",
    "ServerFailedError",
    "make_certificates",
    "private_kafka",
    "private_nats",
    "private_postgresql",
    "private_rabbitmq",
    "private_redis",
]
