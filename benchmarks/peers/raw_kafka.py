"""The ceiling with Kafka: an ASGI app that awaits a raw delivery report, on Molva's server.

``python -m benchmarks.peers.raw_kafka PORT BOOTSTRAP TOPIC``. confluent-kafka used as well as one
can: an idempotent producer with ``acks=all``, produced to straight from the loop, one
thread that polls, and reports handed over to the loop many at a time. It validates
nothing, makes no id and counts nothing.
"""

import asyncio
import sys
import threading

import uvloop
from confluent_kafka import KafkaError, Producer

from benchmarks.peers.empty_app import serve, storing
from molva.ratings import server

Report = tuple["asyncio.Future[None]", "KafkaError | None"]


class Reports:
    """Delivery reports, from the polling thread to the loop, many at a time."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Report] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._poll, daemon=True).start()

    def _poll(self) -> None:
        while True:
            self._producer.poll(0.1)

    def add(self, future: "asyncio.Future[None]", error: "KafkaError | None") -> None:
        with self._lock:
            self._waiting.append((future, error))
            if len(self._waiting) > 1:
                return  # the loop has been told already
        self._loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        with self._lock:
            reports, self._waiting = self._waiting, []
        for future, error in reports:
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(RuntimeError(str(error)))


async def main(port: int, bootstrap: str, topic: str) -> None:
    loop = asyncio.get_running_loop()
    producer = Producer(
        {
            "bootstrap.servers": bootstrap,
            "enable.idempotence": True,
            "acks": "all",
            "linger.ms": 0,
        }
    )
    reports = Reports(producer)

    def store(body: bytes) -> "asyncio.Future[None]":
        future: asyncio.Future[None] = loop.create_future()
        producer.produce(topic, body, on_delivery=lambda error, _: reports.add(future, error))
        return future

    await serve(storing(store), port)


if __name__ == "__main__":
    sys.setswitchinterval(server._SWITCH_INTERVAL)
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
