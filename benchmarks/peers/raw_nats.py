"""The ceiling with NATS: an ASGI app that awaits JetStream's answer, on Molva's server.

``python -m benchmarks.peers.raw_nats PORT URL TOPIC``. nats-py with one connection, each request
publishing for itself, under an id, as a send that may be tried again needs. It validates
nothing and counts nothing.
"""

import json
import sys
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import nats
import uvloop

from benchmarks.peers.empty_app import serve

_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"2")]

Message = MutableMapping[str, Any]


async def main(port: int, url: str, topic: str) -> None:
    stream = (await nats.connect(url)).jetstream()

    async def app(
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        rate = int(scope["query_string"].partition(b"rate=")[2])
        body = json.dumps({"rate": rate}).encode()
        await stream.publish(topic, body, headers={"Nats-Msg-Id": uuid.uuid4().hex})
        await send({"type": "http.response.start", "status": 202, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": b"{}"})

    await serve(app, port)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
