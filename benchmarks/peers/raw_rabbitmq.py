"""The ceiling with RabbitMQ: an ASGI app that awaits a confirm, on Molva's server.

``python -m benchmarks.peers.raw_rabbitmq PORT URL TOPIC``. aio-pika with one connection and one
channel, whose confirms are awaited by many requests at once: persistent, mandatory. It
validates nothing, makes no id and counts nothing.
"""

import sys

import aio_pika
import uvloop

from benchmarks.peers.empty_app import serve, storing


async def main(port: int, url: str, topic: str) -> None:
    connection = await aio_pika.connect(url)
    channel = await connection.channel(on_return_raises=True)
    exchange = channel.default_exchange

    async def store(body: bytes) -> None:
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await exchange.publish(message, topic, mandatory=True)

    await serve(storing(store), port)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
