"""The HTTP side: ``GET /add?a=2&b=3`` asks the workers, and answers ``{"sum":5}``.

What goes wrong is a problem document (RFC 9457):

    400  a or b is no whole number of at most 100 digits
    502  the worker failed
    503  too many wait already, or the broker is away; try again
    504  no sum came in time; asking again is safe, since adding changes nothing
"""

import asyncio
import re
import signal
from typing import Final

from examples.adder.places import Places
from granian.constants import HTTPModes, Interfaces
from granian.log import LogLevels
from granian.server.embed import Server
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from molva.messaging import (
    DeadlineExceededError,
    QueueFullError,
    Requester,
    RequestFailedError,
    UnavailableError,
    open_requester,
)
from molva.messaging.codecs import JSON

__all__ = ["adder", "serve"]

# Whole, so that every sum is exact; of 100 digits, so that nobody sends us a million.
_NUMBER: Final = re.compile(r"-?[0-9]{1,100}", re.ASCII)


async def serve(broker: str, *, port: int, timeout: float) -> None:
    """Answer HTTP on 127.0.0.1 until SIGTERM."""
    places = Places.of(broker)
    async with await open_requester(places.asked, places.replies) as requester:
        server = Server(
            adder(requester, timeout=timeout),
            address="127.0.0.1",
            port=port,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            websockets=False,
            log_level=LogLevels.error,
        )
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        serving = asyncio.ensure_future(server.serve())
        waiting = asyncio.ensure_future(stopping.wait())
        if await _listens(port, unless=serving):
            print(f"serving http://127.0.0.1:{port}/add?a=2&b=3", flush=True)
        await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        server.stop()  # type: ignore[no-untyped-call]
        await serving


async def _listens(port: int, *, unless: "asyncio.Future[None]") -> bool:
    """Wait until the server can be reached; return False where it ended instead."""
    while not unless.done():
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.01)
        else:
            writer.close()
            return True
    return False


def adder(requester: Requester, *, timeout: float) -> Starlette:
    """Return the application; a sum has ``timeout`` seconds to come."""

    async def add(request: Request) -> Response:
        numbers = []
        for name in ("a", "b"):
            text = request.query_params.get(name, "")
            if _NUMBER.fullmatch(text) is None:
                return _problem(400, f"{name}={text[:100]!r} is no whole number; try {name}=2")
            numbers.append(int(text))
        try:
            reply = await requester.ask(JSON.message(numbers), timeout=timeout)
        except DeadlineExceededError:
            return _problem(504, f"no sum came within {timeout:g} s; ask again")
        except (QueueFullError, UnavailableError):
            return _problem(503, "no worker can be asked now; try again", {"Retry-After": "1"})
        except RequestFailedError as failed:
            return _problem(502, f"the worker failed: {failed.kind}")
        return JSONResponse({"sum": JSON.decode(reply)})

    return Starlette(routes=[Route("/add", add)])


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(
        {"type": "about:blank", "status": status, "detail": detail},
        status,
        headers,
        media_type="application/problem+json",
    )
