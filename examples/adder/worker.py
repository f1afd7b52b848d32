"""The worker: takes two numbers from the queue, sends their sum back."""

import asyncio
import signal

from examples.adder.places import Places

from molva.messaging import Delivery, RejectError, open_responder
from molva.messaging.codecs import JSON, JSONValue

__all__ = ["work"]


async def work(broker: str, *, seconds: float) -> None:
    """Add until SIGTERM; each sum takes ``seconds``, as if adding were hard."""

    async def add(numbers: JSONValue, request: Delivery) -> JSONValue:
        match numbers:
            case [int(a), int(b)]:
                await asyncio.sleep(seconds)
                return a + b
        raise RejectError("two whole numbers are added here")  # goes to whoever asked

    async with await open_responder(Places.of(broker).taken) as responder:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, responder.stop)
        print("adding", flush=True)
        await responder.run(JSON.answering(add, JSON), concurrency=8)
