"""Which servers there are. A new kind is a file beside this one and a row here."""

from typing import Final

from tests.brokers.kafka import Kafka
from tests.brokers.kind import Kind
from tests.brokers.nats import Nats
from tests.brokers.postgresql import PostgreSQL
from tests.brokers.rabbitmq import RabbitMQ
from tests.brokers.redis import Redis

__all__ = ["KINDS"]

KINDS: Final[dict[str, Kind]] = {
    kind.name: kind for kind in (Kafka(), Redis(), PostgreSQL(), RabbitMQ(), Nats())
}
