"""The ceiling with Redis: an ASGI app that awaits the answer to an XADD, on Molva's server.

``python -m benchmarks.peers.raw_redis PORT URL TOPIC``. redis-py with hiredis and its pool, a
connection for each request that waits, so that one fsync of the server's confirms many. It
validates nothing, makes no id and counts nothing.
"""

import sys

import uvloop
from redis.asyncio import Redis

from benchmarks.peers.empty_app import serve, storing


async def main(port: int, url: str, topic: str) -> None:
    # As many as may ask at once: beyond its bound the pool does not wait, it fails.
    client = Redis.from_url(url, max_connections=1_000)

    async def store(body: bytes) -> None:
        await client.xadd(topic, {"body": body})

    await serve(storing(store), port)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
