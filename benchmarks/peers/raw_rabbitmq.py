"""The ceiling with RabbitMQ: an ASGI app that awaits a confirm, on Molva's server.

``python -m benchmarks.peers.raw_rabbitmq PORT URL TOPIC``. aio-pika with one connection and one
channel, whose confirms are awaited by many requests at once: persistent, mandatory. It
validates nothing, makes no id and counts nothing.
"""

import json
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import aio_pika
import uvloop

from benchmarks.peers.empty_app import serve

_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"2")]

Message = MutableMapping[str, Any]


async def main(port: int, url: str, topic: str) -> None:
    connection = await aio_pika.connect(url)
    channel = await connection.channel(on_return_raises=True)
    exchange = channel.default_exchange

    async def app(
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        rate = int(scope["query_string"].partition(b"rate=")[2])
        message = aio_pika.Message(
            json.dumps({"rate": rate}).encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT
        )
        await exchange.publish(message, topic, mandatory=True)
        await send({"type": "http.response.start", "status": 202, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": b"{}"})

    await serve(app, port)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
