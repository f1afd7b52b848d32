"""The ceiling with NATS: an ASGI app that awaits JetStream's answer, on Molva's server.

``python -m benchmarks.peers.raw_nats PORT URL TOPIC``. nats-py with one connection, each request
publishing for itself, under an id, as a send that may be tried again needs. It validates
nothing and counts nothing.
"""

import sys
import uuid

import nats
import uvloop

from benchmarks.peers.empty_app import serve, storing


async def main(port: int, url: str, topic: str) -> None:
    stream = (await nats.connect(url)).jetstream()

    async def store(body: bytes) -> None:
        await stream.publish(topic, body, headers={"Nats-Msg-Id": uuid.uuid4().hex})

    await serve(storing(store), port)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
