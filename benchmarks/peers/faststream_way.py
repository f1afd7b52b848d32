"""The same job in FastStream's way: FastAPI, a broker, a subscriber that counts in Redis.

``python -m benchmarks.peers.faststream_way serve|work PORT BROKER TOPIC REDIS``, where BROKER is the
URL of a NATS, a RabbitMQ or a Redis, or Kafka's HOST:PORT.

At the same safety as Molva: a request is answered when the broker confirmed (Kafka ``acks=all``,
idempotent; JetStream's answer; RabbitMQ persistent, mandatory, to a quorum queue; Redis's answer to
an XADD); the subscriber acknowledges after it has counted; and a message that comes again counts
once, because its id is looked up in the function that counts. On Kafka, NATS and Redis batches, as
FastStream's documentation recommends for throughput, go to the ledger's Redis in one pipeline; on
RabbitMQ it has none, so many messages are counted side by side.
"""

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio
import uvicorn
import uvloop
from fastapi import FastAPI, HTTPException
from faststream import AckPolicy, FastStream
from faststream.kafka import KafkaBroker
from faststream.nats import JStream, NatsBroker, PullSub
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue
from faststream.redis import RedisBroker, StreamSub
from pydantic import BaseModel

COUNT = """
if redis.call('SADD', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HINCRBY', KEYS[2], 'n', 1)
redis.call('HINCRBY', KEYS[2], 'sum', ARGV[2])
redis.call('RPUSH', KEYS[3], ARGV[2])
redis.call('LTRIM', KEYS[3], -100, -1)
return 1
"""


class Rating(BaseModel):
    id: str
    rate: int


# None, as for the others, whose annotations say so.
_NO_LOGGER: Any = None

# Messages that one batch holds, and that RabbitMQ has under way to a worker.
BATCH = 1_000
ABREAST = 256
# Seconds that a fetch from NATS collects: of 0.005, 0.05, 0.2, 1 and 5 it counts most with this. With
# the shorter ones some messages come only when JetStream hands them over again, after 30 s.
PULL = 1.0


def sender(where: str, topic: str) -> tuple[Any, Callable[[Rating], Awaitable[object]]]:
    """Return a broker, and what publishes a rating until it is confirmed."""
    if where.startswith("nats://"):
        nats = NatsBroker(where, logger=None)
        return nats, lambda rating: nats.publish(rating, topic, stream=topic)
    if where.startswith("amqp://"):
        rabbit = RabbitBroker(
            where,
            default_channel=Channel(publisher_confirms=True, on_return_raises=True),
            logger=None,
        )
        return rabbit, lambda rating: rabbit.publish(
            rating, routing_key=topic, persist=True, mandatory=True
        )
    if where.startswith("redis://"):
        streams = RedisBroker(where, max_connections=1_000, logger=_NO_LOGGER)
        return streams, lambda rating: streams.publish(rating, stream=topic)
    kafka = KafkaBroker(where, acks="all", enable_idempotence=True, logger=None)
    return kafka, lambda rating: kafka.publish(rating, topic)


def serve(port: int, where: str, topic: str, counted: str) -> None:
    broker, publish = sender(where, topic)
    client = redis.asyncio.Redis.from_url(counted)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await broker.start()
        yield
        await broker.stop()

    app = FastAPI(lifespan=lifespan)

    @app.post("/rate", status_code=202)
    async def rate(rate: int) -> dict[str, str]:
        if not 0 <= rate <= 10:
            raise HTTPException(400)
        rating = Rating(id=uuid.uuid4().hex, rate=rate)
        await publish(rating)
        return {"id": rating.id}

    @app.get("/total")
    async def total() -> dict[str, Any]:
        return {"count": int(await client.hget("peer:{1}:total", "n") or 0)}

    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        log_level="error",
        access_log=False,
        loop="uvloop",
        http="httptools",
    )


async def work(where: str, topic: str, counted: str) -> None:
    client = redis.asyncio.Redis.from_url(counted)
    script = client.register_script(COUNT)

    async def count(rating: Rating, connection: Any) -> None:
        await script(
            keys=["peer:{1}:seen", "peer:{1}:total", "peer:{1}:window"],
            args=[rating.id, rating.rate],
            client=connection,
        )

    async def count_all(ratings: list[Rating]) -> None:
        async with client.pipeline(transaction=False) as pipeline:
            for rating in ratings:
                await count(rating, pipeline)
            await pipeline.execute()

    async def count_one(rating: Rating) -> None:
        await count(rating, client)

    broker: Any
    if where.startswith("nats://"):
        broker = NatsBroker(where, logger=None)
        pull = PullSub(batch_size=BATCH, timeout=PULL, batch=True)
        stream = JStream(topic, subjects=[topic], declare=False)
        broker.subscriber(
            topic,
            stream=stream,
            durable="process",
            pull_sub=pull,
            ack_policy=AckPolicy.NACK_ON_ERROR,
        )(count_all)
    elif where.startswith("amqp://"):
        broker = RabbitBroker(where, default_channel=Channel(prefetch_count=ABREAST), logger=None)
        queue = RabbitQueue(topic, queue_type=QueueType.QUORUM, durable=True)
        broker.subscriber(queue, ack_policy=AckPolicy.NACK_ON_ERROR)(count_one)
    elif where.startswith("redis://"):
        broker = RedisBroker(where, logger=_NO_LOGGER)
        group = StreamSub(
            topic,
            group="process",
            consumer="0",
            batch=True,
            max_records=BATCH,
            polling_interval=100,
        )
        broker.subscriber(stream=group, ack_policy=AckPolicy.NACK_ON_ERROR)(count_all)
    else:
        broker = KafkaBroker(where, logger=None)
        broker.subscriber(
            topic,
            group_id="process",
            batch=True,
            max_records=BATCH,
            batch_timeout_ms=5,
            auto_offset_reset="earliest",
            ack_policy=AckPolicy.NACK_ON_ERROR,
        )(count_all)
    await FastStream(broker, logger=None).run()


if __name__ == "__main__":
    role, port, *where = sys.argv[1:]
    if role == "serve":
        serve(int(port), *where)
    else:
        uvloop.install()
        asyncio.run(work(*where))
