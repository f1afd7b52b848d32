"""The same job in FastStream's way: FastAPI, Kafka, a subscriber that counts in Redis.

``python -m benchmarks.peers.faststream_way serve|work PORT BOOTSTRAP TOPIC REDIS``.

At the same safety as Molva: a request is answered when Kafka confirmed (``acks=all``,
idempotent); the subscriber's offsets are committed after the batch was counted; and a message
that comes again counts once, because its id is looked up in the function that counts.
Batches, as FastStream's documentation recommends for throughput, go to Redis in one pipeline.
"""

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio
import uvicorn
import uvloop
from fastapi import FastAPI, HTTPException
from faststream import AckPolicy, FastStream
from faststream.kafka import KafkaBroker, KafkaMessage
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


def serve(port: int, bootstrap: str, topic: str, counted: str) -> None:
    broker = KafkaBroker(bootstrap, acks="all", enable_idempotence=True, logger=None)
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
        await broker.publish(rating, topic)
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


async def work(bootstrap: str, topic: str, counted: str) -> None:
    broker = KafkaBroker(bootstrap, logger=None)
    client = redis.asyncio.Redis.from_url(counted)
    count = client.register_script(COUNT)

    @broker.subscriber(
        topic,
        group_id="process",
        batch=True,
        max_records=1_000,
        batch_timeout_ms=5,
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.NACK_ON_ERROR,
    )
    async def process(ratings: list[Rating], _: KafkaMessage) -> None:
        async with client.pipeline(transaction=False) as pipeline:
            for rating in ratings:
                await count(
                    keys=["peer:{1}:seen", "peer:{1}:total", "peer:{1}:window"],
                    args=[rating.id, rating.rate],
                    client=pipeline,
                )
            await pipeline.execute()

    await FastStream(broker, logger=None).run()


if __name__ == "__main__":
    role, port, *where = sys.argv[1:]
    if role == "serve":
        serve(int(port), *where)
    else:
        uvloop.install()
        asyncio.run(work(*where))
