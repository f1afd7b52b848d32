"""The HTTP surface beside the fast lane: campaigns, live totals, health, the page.

``POST /rate`` and ``GET /total`` are the intake's, in front of this app. Here nothing is
hot, so it is written with a framework, and one place makes every refusal a problem
document: unknown paths, wrong methods, refused fields, failures of ledger and catalog, and
what nobody expected.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final, final

import msgspec
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molva._base.seldom import SeldomLog
from molva.ratings.answers import CampaignList, Readiness
from molva.ratings.campaign import Campaign
from molva.ratings.catalog.protocol import CatalogError
from molva.ratings.ledger.protocol import LedgerError, LedgerUnavailableError
from molva.ratings.live import Listener, LiveTotals, StoppingError, TooManyListenersError
from molva.ratings.openapi import openapi_document
from molva.ratings.page import asset_response, load_assets
from molva.ratings.problem import PROBLEM_MEDIA_TYPE, problem
from molva.ratings.rating import FieldError, RefusedError, check_item
from molva.ratings.request import ProblemError, query_fields
from molva.ratings.service import Service

__all__ = ["Api", "build_api"]

_logger: Final = logging.getLogger("molva.ratings")

# A listener is a socket, two tasks and some 20 KiB. The usual limit of open files is
# 1,024 for a whole process, which must keep some for the intake.
_MAX_LISTENERS: Final = 500

# Seconds after which a stream whose client does not read is cut when the service stops.
_STREAM_GRACE: Final = 1.0

_NO_FIELDS: Final[frozenset[str]] = frozenset()
_LIVE_FIELDS: Final = frozenset({"item"})

_RETRY_AFTER: Final = {"retry-after": "5"}

_COMMON_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)

_STREAM_START: Final[Message] = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream"),
        (b"cache-control", b"no-store"),
        # nginx would hold events back until its buffer is full.
        (b"x-accel-buffering", b"no"),
    ],
}


@final
class Api:
    """The ASGI app of everything that is not the fast lane. Made by ``build_api``."""

    def __init__(self, app: Starlette, streams: "_LiveEndpoint") -> None:
        self._app = app
        self._streams = streams

    @property
    def routes(self) -> list[tuple[str, frozenset[str]]]:
        """Every path with its methods: what the OpenAPI document must describe."""
        return [
            (route.path, frozenset(route.methods or ()))
            for route in self._app.routes
            if isinstance(route, Route)
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; also takes ``lifespan``, whose end ends all streams."""
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["type"] == "lifespan":
                self.shutdown()

    def shutdown(self) -> None:
        """End all live streams and accept no new ones. Call when the server begins to stop.

        Servers wait for open requests before they say so to the app, and a stream would
        keep them waiting. Returns at once; idempotent.
        """
        self._streams.shutdown()


def build_api(service: Service, *, max_listeners: int = _MAX_LISTENERS) -> Api:
    """Return the app of everything that is not the fast lane.

    Args:
        service: What the process offers; used as it is at each request.
        max_listeners: Live streams served at a time, in this process.
    """
    handlers = _Handlers(service)
    streams = _LiveEndpoint(service, max_listeners)
    log = SeldomLog(_logger, service.clock)
    app = Starlette(
        routes=[
            Route("/", handlers.page),
            Route("/static/{name}", handlers.static),
            Route("/healthz", handlers.healthz),
            Route("/readyz", handlers.readyz),
            Route("/metrics", handlers.metrics),
            Route("/openapi.json", handlers.openapi),
            Route("/api/campaigns", handlers.campaigns),
            Route("/api/campaigns/{name}", handlers.campaign),
            # An ASGI app as its endpoint, which Starlette lets all methods through to,
            # unless told.
            Route("/api/campaigns/{name}/live", streams, methods=["GET"]),
        ],
        middleware=[Middleware(_Shell, log=log)],
        exception_handlers=_refusals(log),
    )
    # A path with a slash too many is a path that is not there.
    app.router.redirect_slashes = False
    return Api(app, streams)


@final
class _Handlers:
    """One method for each route: read, call one function, answer."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._assets = load_assets()
        self._openapi = openapi_document()

    async def page(self, request: Request) -> Response:
        return asset_response(request, self._assets["index.html"])

    async def static(self, request: Request) -> Response:
        asset = self._assets.get(request.path_params["name"])
        if asset is None:
            raise HTTPException(404)
        return asset_response(request, asset)

    async def healthz(self, request: Request) -> Response:
        return Response(b"ok\n", media_type="text/plain", headers={"cache-control": "no-store"})

    async def readyz(self, request: Request) -> Response:
        reasons = await self._service.ready()
        if reasons:
            return _refuse(503, "unavailable", "; ".join(reasons), headers=_RETRY_AFTER)
        return _json(Readiness(pending=await self._service.pending()))

    async def metrics(self, request: Request) -> Response:
        return Response(await self._service.metrics(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def openapi(self, request: Request) -> Response:
        return Response(self._openapi, media_type="application/json")

    async def campaigns(self, request: Request) -> Response:
        query_fields(request.scope["query_string"], _NO_FIELDS)
        return _json(CampaignList(await self._service.catalog.campaigns()))

    async def campaign(self, request: Request) -> Response:
        query_fields(request.scope["query_string"], _NO_FIELDS)
        return _json(await _campaign(self._service, request))


@final
class _LiveEndpoint:
    """``/api/campaigns/{name}/live``: server-sent events, as an ASGI app of its own.

    A response object could not hold the listener's place from before its first byte to
    after its last, however the stream ends.
    """

    def __init__(self, service: Service, max_listeners: int) -> None:
        self._service = service
        self._live = LiveTotals(service, max_listeners=max_listeners)
        self._writers: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        # An empty item is none, as for the fast lane.
        item = query_fields(scope["query_string"], _LIVE_FIELDS).get("item") or None
        if item is not None:
            check_item(item)
        campaign = await _campaign(self._service, request)
        with self._live.listen(campaign, item) as listener:
            await listener.start()
            await send(_STREAM_START)
            if request.method == "HEAD":
                await send({"type": "http.response.body", "body": b""})
            else:
                await self._stream(listener, receive, send)

    def shutdown(self) -> None:
        self._live.shutdown()
        # Streams end by themselves now, but for those that wait in a send, because their
        # client does not read.
        for writer in self._writers:
            writer.get_loop().call_later(_STREAM_GRACE, writer.cancel)

    async def _stream(self, listener: Listener, receive: Receive, send: Send) -> None:
        """Write until the service stops or the client goes, whichever comes first."""
        writer = asyncio.create_task(_write(listener, send))
        leaver = asyncio.create_task(_gone(receive))
        self._writers.add(writer)
        try:
            await asyncio.wait((writer, leaver), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._writers.discard(writer)
            writer.cancel()
            leaver.cancel()
            await asyncio.gather(writer, leaver, return_exceptions=True)
        if not writer.cancelled():
            error = writer.exception()
            # An OSError is how some servers say that the client went away.
            if error is not None and not isinstance(error, OSError):
                raise error


async def _write(listener: Listener, send: Send) -> None:
    # Closed here and not when it is collected: a cut stream must let go at once.
    async with contextlib.aclosing(listener.events()) as events:
        async for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _campaign(service: Service, request: Request) -> Campaign:
    name = request.path_params["name"]
    campaign = await service.catalog.campaign(name)
    if campaign is None:
        raise _UnknownCampaignError(name)
    return campaign


def _json(document: msgspec.Struct) -> Response:
    return Response(
        msgspec.json.encode(document),
        media_type="application/json",
        headers={"cache-control": "no-store"},
    )


@final
class _Shell:
    """The outermost layer: headers on every answer, no body to HEAD, no exception outside."""

    def __init__(self, app: ASGIApp, log: SeldomLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def shell_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message["headers"], *_COMMON_HEADERS]}
            elif scope["method"] == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(scope, receive, shell_send)
        except Exception as error:  # noqa: BLE001 - the client gets an answer, whatever it was
            self._log.error("%s %s failed", scope["method"], scope["path"], trace=error)
            # What has begun cannot become a refusal: the server cuts it short.
            if not started:
                refusal = _refuse(500, "internal-error", "the log of the service says more")
                await refusal(scope, receive, shell_send)


def _refuse(
    status: int,
    slug: str,
    detail: str,
    *,
    errors: tuple[FieldError, ...] = (),
    headers: dict[str, str] | None = None,
) -> Response:
    return Response(
        problem(status, slug, detail, errors),
        status_code=status,
        media_type=PROBLEM_MEDIA_TYPE,
        headers={"cache-control": "no-store", **(headers or {})},
    )


@final
class _UnknownCampaignError(Exception):
    """No campaign has this name."""


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _refuse(404, "not-found", f"there is nothing at {request.scope['path'][:80]!a}")
    if error.status_code == 405:
        # Starlette's set has no order of its own.
        methods = ", ".join(sorted((error.headers or {})["Allow"].split(", ")))
        detail = f"{request.method[:20]!a} is not accepted here; {methods} are"
        return _refuse(405, "method-not-allowed", detail, headers={"allow": methods})
    return _refuse(error.status_code, "invalid-request", error.detail)


async def _refuse_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return _refuse(error.status, error.slug, str(error), errors=error.errors, headers=headers)


async def _refuse_fields(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _refuse(400, "invalid-field", str(error), errors=error.errors)


async def _refuse_campaign(request: Request, error: Exception) -> Response:
    shown = ascii(str(error)[:80])
    return _refuse(404, "unknown-campaign", f"no campaign is named {shown}")


async def _refuse_listener(request: Request, error: Exception) -> Response:
    return _refuse(503, "overloaded", str(error), headers=_RETRY_AFTER)


async def _refuse_stopping(request: Request, error: Exception) -> Response:
    return _refuse(503, "stopping", str(error), headers=_RETRY_AFTER)


_Refusal = Callable[[Request, Exception], Awaitable[Response]]


def _refusals(log: SeldomLog) -> dict[type[Exception], _Refusal]:
    """Return what answers which exception."""

    async def refuse_ledger(request: Request, error: Exception) -> Response:
        log.error("%s %s: the ledger failed", request.method, request.scope["path"], trace=error)
        return _refuse(500, "ledger-failed", "the ledger cannot be read right now")

    async def refuse_for_now(request: Request, error: Exception) -> Response:
        log.error("%s %s: the ledger failed", request.method, request.scope["path"], trace=error)
        detail = "the ledger cannot be read right now"
        return _refuse(503, "ledger-unavailable", detail, headers=_RETRY_AFTER)

    async def refuse_catalog(request: Request, error: Exception) -> Response:
        log.error("%s %s: the catalog failed", request.method, request.scope["path"], trace=error)
        detail = "the campaigns cannot be read right now"
        return _refuse(503, "unavailable", detail, headers=_RETRY_AFTER)

    return {
        HTTPException: _refuse_http,
        ProblemError: _refuse_problem,
        RefusedError: _refuse_fields,
        _UnknownCampaignError: _refuse_campaign,
        LedgerError: refuse_ledger,
        LedgerUnavailableError: refuse_for_now,
        CatalogError: refuse_catalog,
        TooManyListenersError: _refuse_listener,
        StoppingError: _refuse_stopping,
    }
