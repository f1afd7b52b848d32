"""``python -m benchmarks [NAME…]``: run all measurements, or those that are named."""

import sys
from collections.abc import Callable
from typing import Final

from benchmarks.kafka import kafka
from benchmarks.ledger import ledger
from benchmarks.ledgers import ledgers
from benchmarks.messaging import messaging
from benchmarks.nats import nats
from benchmarks.queueing import queueing, queueing_limits
from benchmarks.queues import queues
from benchmarks.rabbitmq import rabbitmq
from benchmarks.redis import redis
from benchmarks.scaled import scaled, scaled_nats, scaled_rabbitmq, scaled_redis
from benchmarks.service import idle, minute, service
from benchmarks.slow import slow
from benchmarks.spool import spool

MEASUREMENTS: Final[dict[str, Callable[[], None]]] = {
    "service": service,
    "minute": minute,
    "idle": idle,
    "scaled": scaled,
    "scaled-nats": scaled_nats,
    "scaled-rabbitmq": scaled_rabbitmq,
    "scaled-redis": scaled_redis,
    "spool": spool,
    "messaging": messaging,
    "queues": queues,
    "ledger": ledger,
    "kafka": kafka,
    "ledgers": ledgers,
    "rabbitmq": rabbitmq,
    "redis": redis,
    "nats": nats,
    "slow": slow,
    "queueing": queueing,
    "queueing-limits": queueing_limits,
}


def main() -> None:
    names = sys.argv[1:] or list(MEASUREMENTS)
    unknown = [name for name in names if name not in MEASUREMENTS]
    if unknown:
        sys.exit(f"benchmarks: unknown {', '.join(unknown)}; known are {', '.join(MEASUREMENTS)}")
    for name in names:
        print(f"\n{name}", flush=True)
        MEASUREMENTS[name]()


if __name__ == "__main__":
    main()
