"""The fast lane: ``POST /rate`` and ``GET /total``, plain ASGI.

No framework stands on this path: half of a request's time would go there. A request with
its fields in the query costs one look at the headers, one validation, one message and one
awaited batch; the 202 leaves when the broker has confirmed, never before.

Everything else is handed to the ordinary API (``api``).

What a request may cost is bounded before it is read: 16 KiB of body, ten seconds to
arrive, a bounded number waiting for the broker. What does not fit is refused at once and
counted by reason.
"""

import logging
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, Protocol, final

import msgspec

from molva._base.clock import Clock
from molva._base.ids import format_id, id_from_text, new_id
from molva._base.seldom import SeldomLog
from molva.messaging import (
    BrokenBrokerError,
    ClosedError,
    Message,
    MessagingError,
    QueueFullError,
)
from molva.ratings.admission import Admission
from molva.ratings.answers import TotalAnswer
from molva.ratings.campaign import DEFAULT_CAMPAIGN, Campaign
from molva.ratings.catalog.known import KnownCampaigns
from molva.ratings.catalog.protocol import Catalog, CatalogError
from molva.ratings.ledger.protocol import (
    Ledger,
    LedgerError,
    LedgerUnavailableError,
    LedgerUnsupportedError,
    Total,
)
from molva.ratings.problem import PROBLEM_MEDIA_TYPE, problem
from molva.ratings.rating import (
    MAX_ID_CHARACTERS,
    FieldError,
    Rating,
    RefusedError,
    check_comment,
    check_item,
    encode_entry,
    rate_from_text,
)
from molva.ratings.request import (
    RATE_FIELDS,
    TOTAL_FIELDS,
    ProblemError,
    Receive,
    Scope,
    query_fields,
    read_body,
    read_head,
)
from molva.ratings.spool import Spool, SpoolRefusedError, means_away

__all__ = ["LATENCY_BUCKETS", "Intake", "IntakeCounters", "Outlet"]

_logger: Final = logging.getLogger("molva.ratings")

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

# Ids of clients that are remembered, to answer 409 at once when one comes again with
# another rating. What is forgotten is found by the ledger, and goes to the dead letters.
_REMEMBERED_IDS: Final = 20_000

# Upper bounds of the latency histogram, in seconds.
LATENCY_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

# What every answer of the fast lane carries. Any page may rate and read: there are no
# cookies and no credentials here that another site could abuse.
_COMMON: Final[Headers] = [
    (b"access-control-allow-origin", b"*"),
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
]
_JSON: Final = (b"content-type", b"application/json")
_ACCEPTED: Final[Headers] = [_JSON, (b"content-length", b"45"), *_COMMON]
_PREFLIGHT: Final[Headers] = [
    (b"access-control-allow-headers", b"content-type, idempotency-key"),
    (b"access-control-max-age", b"86400"),
    (b"content-length", b"0"),
    *_COMMON,
]


# Seconds after which a client may ask again, where the broker is away.
_AWAY_RETRY: Final = 5


class Outlet(Protocol):
    """Where accepted ratings go: a topic, or a spool in front of one."""

    @property
    def send(self) -> Callable[[Message], Awaitable[None]]:
        """Stores a message: when it returns, that outlives what the deployment says.

        Asked for anew with each message: a spool has another one while the broker is away.
        """
        ...


@final
@dataclass(slots=True)
class IntakeCounters:
    """What the fast lane has done since it started; numbers only ever grow.

    Attributes:
        accepted: Ratings answered with 202.
        refused: Problem slug to requests refused with it.
        latency: Accepted ratings by time to the answer: one count for each bucket of
            LATENCY_BUCKETS, and a last one for all above.
        latency_seconds: Sum of these times.
        totals: Reads of ``/total`` that were answered.
    """

    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    latency: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BUCKETS) + 1))
    latency_seconds: float = 0.0
    totals: int = 0


@final
class Intake:
    """The ASGI application of the service.

    Args:
        outlet: Where accepted ratings go.
        spool: Keeps those that the broker cannot take; None where they are refused.
        catalog: Where campaigns are looked up.
        ledger: Where totals are read.
        pending: How many ratings are accepted and not yet counted; None if unknown.
        admission: Whether one more may be accepted, where the broker bounds nothing.
        api: What handles every other path.
        clock: Where time comes from.
        on_broken: Called when the broker must not be written to by this process again.
    """

    def __init__(
        self,
        *,
        outlet: Outlet,
        spool: Spool | None = None,
        catalog: Catalog,
        ledger: Ledger,
        pending: Callable[[], Awaitable[int | None]],
        admission: Admission,
        api: ASGIApp,
        clock: Clock,
        on_broken: Callable[[], None],
    ) -> None:
        self._outlet = outlet
        self._spool = spool
        self._ledger = ledger
        self._pending = pending
        self._admission = admission
        self._api = api
        self._clock = clock
        self._on_broken = on_broken
        self._campaigns = KnownCampaigns(catalog, clock)
        self._remembered = _RememberedIds()
        self._stopping = False
        self._log = SeldomLog(_logger, clock)
        self.counters: Final = IntakeCounters()

    def stop(self) -> None:
        """Refuse new ratings from now on; those under way are answered."""
        self._stopping = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._api(scope, receive, send)
            return
        path = scope["path"]
        handle: Callable[[Scope, Receive], Awaitable[tuple[int, Headers, bytes]]]
        if path == "/rate":
            handle = self._rate
        elif path == "/total":
            handle = self._total
        else:
            await self._api(scope, receive, send)
            return
        try:
            status, headers, body = await handle(scope, receive)
        except ProblemError as refusal:
            status, headers, body = self._refuse(refusal)
        except Exception as error:  # noqa: BLE001 - the client gets an answer, whatever it was
            self._log.error("%s %s failed", scope["method"], path, trace=error)
            status, headers, body = self._refuse(
                ProblemError(500, "internal-error", "see the log of the service")
            )
        if scope["method"] == "HEAD":
            body = b""
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    # POST /rate -------------------------------------------------------------------------

    async def _rate(self, scope: Scope, receive: Receive) -> tuple[int, Headers, bytes]:
        started = self._clock.monotonic()
        if scope["method"] != "POST":
            return self._other_method(scope, b"POST, OPTIONS")
        if self._stopping:
            raise _unavailable("stopping", "this process is stopping; send it again", 1)
        # What a spool keeps has a limit of its own.
        if self._admission.is_full and not (self._spool is not None and self._spool.is_away):
            detail = f"{self._admission.capacity:,} ratings wait to be counted; send it again later"
            raise _unavailable("overloaded", detail, 1)
        fields, id_text, has_body = read_head(scope, RATE_FIELDS)
        if has_body:
            await read_body(scope, receive, fields)
        name = fields.get("campaign", DEFAULT_CAMPAIGN)
        campaign = self._campaigns.get(name) or await self._look_up(name)
        try:
            rating = _rating(fields, campaign, self._clock.now_us())
            own_id = _own_id(fields.get("id"), id_text, campaign.name)
        except RefusedError as error:
            raise ProblemError(400, "invalid-field", str(error), error.errors) from None
        if own_id is None:
            id_ = new_id()
            await self._store(id_, rating)
        else:
            id_ = own_id
            self._remembered.check(id_, rating)
            await self._store(id_, rating)
            self._remembered.add(id_, rating)
        counters = self.counters
        seconds = self._clock.monotonic() - started
        counters.accepted += 1
        counters.latency[bisect_left(LATENCY_BUCKETS, seconds)] += 1
        counters.latency_seconds += seconds
        return 202, _ACCEPTED, b'{"id":"%b"}' % format_id(id_).encode()

    async def _look_up(self, name: str) -> Campaign:
        try:
            campaign = (await self._campaigns.refresh()).get(name)
        except CatalogError as error:
            self._log.error("the catalog cannot be read: %s", error)
            campaign = self._campaigns.last_known(name)
            if campaign is None:
                detail = "the catalog of campaigns could not be read; try again"
                raise _unavailable("unavailable", detail, 2) from error
        if campaign is None:
            shown = ascii(name[:64])
            errors = [
                FieldError("campaign", f"{shown} does not exist; GET /api/campaigns lists all")
            ]
            raise ProblemError(404, "unknown-campaign", f"there is no campaign {shown}", errors)
        return campaign

    async def _store(self, id_: bytes, rating: Rating) -> None:
        # One item's ratings keep their order, so they share a key. A campaign's name
        # holds no slash.
        message = Message(encode_entry(rating), id_, f"{rating.campaign}/{rating.item}")
        try:
            await self._outlet.send(message)
        except MessagingError as error:
            await self._store_otherwise(message, error)

    async def _store_otherwise(self, message: Message, error: MessagingError) -> None:
        """Keep in the spool what the broker could not take; refuse what cannot be kept."""
        if self._spool is not None and means_away(error):
            try:
                await self._spool.take(message, error)
            except MessagingError as failure:
                error = failure
            else:
                return
        match error:
            case QueueFullError():
                raise _unavailable("overloaded", str(error), 1) from None
            case BrokenBrokerError():
                self._on_broken()
                raise _unavailable("unavailable", _STORE_FAILED, 2) from error
            case ClosedError():
                detail = "this process is stopping; send it again"
                raise _unavailable("stopping", detail, 1) from None
            case SpoolRefusedError():
                why = "" if error.__cause__ is None else f" ({error.__cause__})"
                self._log.error("ratings are refused: %s%s", error, why)
                raise _unavailable("unavailable", str(error), _AWAY_RETRY) from error
            case _:
                self._log.error("ratings cannot be stored: %s", error)
                raise _unavailable("unavailable", _STORE_FAILED, 2) from error

    # GET /total -------------------------------------------------------------------------

    async def _total(self, scope: Scope, _: Receive) -> tuple[int, Headers, bytes]:
        if scope["method"] not in ("GET", "HEAD"):
            return self._other_method(scope, b"GET, HEAD, OPTIONS")
        fields = query_fields(scope["query_string"], TOTAL_FIELDS)
        try:
            name = fields.get("campaign", DEFAULT_CAMPAIGN)
            campaign = self._campaigns.get(name) or await self._look_up(name)
            item = check_item(fields["item"]) if fields.get("item") else None
            n = _positive("n", fields["n"]) if "n" in fields else campaign.window
            as_of = _positive("as_of", fields["as_of"]) if "as_of" in fields else None
        except RefusedError as error:
            raise ProblemError(400, "invalid-field", str(error), error.errors) from None
        try:
            total = await self._ledger.total(campaign.name, item=item, n=n, as_of=as_of)
        except LedgerUnsupportedError as error:
            raise ProblemError(400, "not-kept", str(error)) from None
        except LedgerUnavailableError as error:
            self._log.error("totals cannot be read now: %s", error)
            detail = "the ledger cannot be read right now; ratings are still accepted"
            raise _unavailable("ledger-unavailable", detail, 2) from error
        except LedgerError as error:
            self._log.error("totals cannot be read: %s", error)
            detail = "the ledger could not be read; ratings are still accepted"
            raise ProblemError(500, "ledger-failed", detail) from error
        if total is None:
            raise _unavailable("nothing-to-average", _nothing(campaign, item, as_of), 1)
        self.counters.totals += 1
        if _wants_json(scope["headers"]):
            body = await self._total_as_json(total)
            media_type = b"application/json"
        else:
            body = b"%.2f" % total.average
            media_type = b"text/plain; charset=utf-8"
        return 200, _headers(media_type, body, [(b"vary", b"Accept")]), body

    async def _total_as_json(self, total: Total) -> bytes:
        answer = TotalAnswer(
            average=total.average,
            n=total.n,
            count=total.count,
            distribution=dict(total.distribution),
            as_of=total.as_of,
            pending=await self._pending(),
        )
        return msgspec.json.encode(answer)

    # Refusals ---------------------------------------------------------------------------

    def _other_method(self, scope: Scope, allowed: bytes) -> tuple[int, Headers, bytes]:
        if scope["method"] == "OPTIONS":
            # A browser asks before it sends JSON, or an Idempotency-Key, to another site.
            return 204, [*_PREFLIGHT, (b"access-control-allow-methods", allowed)], b""
        detail = f"{scope['method']:.20} is not accepted here; {allowed.decode()} are"
        raise ProblemError(405, "method-not-allowed", detail, headers=[(b"allow", allowed)])

    def _refuse(self, refusal: ProblemError) -> tuple[int, Headers, bytes]:
        refused = self.counters.refused
        refused[refusal.slug] = refused.get(refusal.slug, 0) + 1
        body = problem(refusal.status, refusal.slug, str(refusal), refusal.errors)
        return refusal.status, _headers(PROBLEM_MEDIA_TYPE.encode(), body, refusal.headers), body


@final
class _RememberedIds:
    """The last ids that clients chose, with what they stood for. Bounded: two generations."""

    def __init__(self) -> None:
        # Digests, not contents: comments of strangers must not fill our memory.
        self._young: dict[bytes, bytes] = {}
        self._old: dict[bytes, bytes] = {}

    def check(self, id_: bytes, rating: Rating) -> None:
        """Raise where the id stands for another rating."""
        known = self._young.get(id_) or self._old.get(id_)
        if known is not None and known != _content(rating):
            detail = (
                f"id {format_id(id_)} was used for another rating, which stands; a new rating "
                "needs a new id"
            )
            errors = [FieldError("id", "an id that was not used before, or the same rating")]
            raise ProblemError(409, "id-conflict", detail, errors)

    def add(self, id_: bytes, rating: Rating) -> None:
        """Remember what an id stands for."""
        if len(self._young) >= _REMEMBERED_IDS:
            self._old, self._young = self._young, {}
        self._young[id_] = _content(rating)


def _content(rating: Rating) -> bytes:
    parts = (rating.campaign, rating.item, rating.rate, rating.comment)
    return blake2b(repr(parts).encode(), digest_size=8).digest()


_STORE_FAILED: Final = "the rating was not confirmed; send it again with the same id"


def _unavailable(slug: str, detail: str, seconds: int) -> ProblemError:
    headers = [(b"retry-after", b"%d" % seconds)]
    return ProblemError(503, slug, detail, headers=headers)


def _nothing(campaign: Campaign, item: str | None, as_of: int | None) -> str:
    what = f"campaign {campaign.name!r}" if item is None else f"item {item!r:.80}"
    when = "" if as_of is None else f" at as_of {as_of}"
    return f"{what} has no rating{when}"


def _headers(
    media_type: bytes, body: bytes, further: Iterable[tuple[bytes, bytes]] = ()
) -> Headers:
    return [
        (b"content-type", media_type),
        (b"content-length", b"%d" % len(body)),
        *_COMMON,
        *further,
    ]


def _wants_json(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"accept" and b"application/json" in value for name, value in headers)


# Reading a rating ---------------------------------------------------------------------------


def _rating(fields: Mapping[str, Any], campaign: Campaign, now_us: int) -> Rating:
    rate = fields.get("rate")
    if rate is None:
        detail = f"is missing; an integer from {campaign.minimum} to {campaign.maximum}"
        raise RefusedError(FieldError("rate", detail))
    rate = rate_from_text(rate, campaign)
    item = fields.get("item", "")
    if item:
        check_item(item)
    comment = fields.get("comment") or None
    if comment is not None:
        check_comment(comment)
    return Rating(campaign.name, now_us, rate, item, comment)


def _own_id(field_text: str | None, header_text: str | None, scope: str) -> bytes | None:
    """Return the id that the client chose; None where it chose none."""
    if field_text is not None and header_text is not None and field_text != header_text:
        detail = "differs from the Idempotency-Key; send one of the two"
        raise RefusedError(FieldError("id", detail))
    text = header_text if field_text is None else field_text
    if text is None:
        return None
    if not 1 <= len(text) <= MAX_ID_CHARACTERS or not text.isprintable():
        detail = f"1 to {MAX_ID_CHARACTERS} printable characters are accepted, best a UUID"
        raise RefusedError(FieldError("id", detail))
    return id_from_text(text, scope=scope)


def _positive(name: str, text: str) -> int:
    if len(text) <= 18 and text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise RefusedError(FieldError(name, "a whole number of at least 1 is accepted"))
