"""The ceiling: an ASGI app that does nothing, on the server and loop that Molva uses."""

import json
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server

from molva.ratings import server

_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"2")]

Message = MutableMapping[str, Any]


async def app(
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    await send({"type": "http.response.start", "status": 202, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": b"{}"})


def storing(store: Callable[[bytes], Awaitable[object]]) -> Any:
    """Return an app that answers a rating when ``store`` has it confirmed, and does no more."""

    async def storing_app(
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        rate = int(scope["query_string"].partition(b"rate=")[2])
        await store(json.dumps({"rate": rate}).encode())
        await send({"type": "http.response.start", "status": 202, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": b"{}"})

    return storing_app


async def serve(application: Any, port: int) -> None:
    """Serve an application as Molva's own server does, and nothing beside it."""
    await Server(
        application,
        address="127.0.0.1",
        port=port,
        interface=Interfaces.ASGINL,
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(header_read_timeout=server._HEADER_TIMEOUT_MS),
        websockets=False,
        backlog=server._BACKLOG,
        backpressure=server._CONCURRENT_REQUESTS,
        log_level=LogLevels.error,
    ).serve()


if __name__ == "__main__":
    sys.setswitchinterval(server._SWITCH_INTERVAL)
    uvloop.run(serve(app, int(sys.argv[1])))
