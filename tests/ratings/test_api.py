"""The HTTP surface beside the fast lane, called as an ASGI app, with a ledger in memory."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from starlette.types import Message

from molva._base.clock import ManualClock
from molva.ratings.api import Api, build_api
from molva.ratings.campaign import Campaign
from molva.ratings.catalog import Catalog, CatalogUnavailableError, open_catalog
from molva.ratings.ledger.protocol import (
    Difference,
    LedgerCapabilities,
    LedgerEntry,
    LedgerError,
    LedgerSize,
    LedgerUnavailableError,
    Outcome,
    Total,
)
from molva.ratings.problem import TITLES
from molva.ratings.rating import Submission

SECRET: Final = "redis://ann:s3cret@host"


class FakeLedger:
    """Ratings in a list; counts how often it is asked, and fails on demand."""

    capabilities: Final = LedgerCapabilities(
        frozenset(), history=False, window=None, horizon_seconds=None, ids="ledger"
    )

    def __init__(self) -> None:
        self.rates: list[tuple[str, int]] = []
        self.error: Exception | None = None
        self.polls = 0
        self.reads = 0

    async def total(
        self,
        campaign: str,
        *,
        item: str | None = None,
        n: int,
        as_of: int | None = None,
        trusted: bool = True,
    ) -> Total | None:
        self.reads += 1
        if self.error:
            raise self.error
        rates = [rate for of, rate in self.rates if item is None or of == item]
        if not rates:
            return None
        spread = {rate: rates.count(rate) for rate in set(rates)}
        last = rates[-n:]
        return Total(sum(last), len(last), len(rates), spread, len(self.rates))

    async def last_seq(self, campaign: str) -> int:
        self.polls += 1
        if self.error:
            raise self.error
        return len(self.rates)

    async def apply(
        self, batch: Sequence[Submission], *, applied_at_us: int
    ) -> list[Outcome | Exception]:
        raise AssertionError("the API never calls this")

    def entries(self, campaign: str, *, since_seq: int = 0) -> AsyncIterator[LedgerEntry]:
        raise AssertionError("the API never calls this")

    async def size(self) -> LedgerSize:
        raise AssertionError("the API never calls this")

    def verify(self) -> AsyncIterator[Difference]:
        raise AssertionError("the API never calls this")

    async def rebuild(self) -> None:
        raise AssertionError("the API never calls this")

    async def close(self) -> None:
        pass


class FakeService:
    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.ledger = FakeLedger()
        self.clock = ManualClock()
        self.reasons: list[str] = []
        self.error: Exception | None = None

    async def pending(self) -> int | None:
        return 3

    async def ready(self) -> list[str]:
        if self.error:
            raise self.error
        return self.reasons

    async def metrics(self) -> bytes:
        return b"molva_up 1\n"


class Exchange:
    """One request under way, and what was answered so far."""

    def __init__(self, app: Api, method: str, target: str, headers: dict[str, str]) -> None:
        path, _, query = target.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 50_000),
            "server": ("127.0.0.1", 8_000),
        }
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.stuck = False
        self._gone = asyncio.Event()
        self._asked = False
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self.stuck:
            await asyncio.Event().wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {
                name.decode().lower(): value.decode() for name, value in message["headers"]
            }
        else:
            self.body += message.get("body", b"")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[tuple[str, Any]]:
        """The events of a stream so far, without comments and hints."""
        found = []
        for block in self.body.decode().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.splitlines())
            if "event" in fields:
                found.append((fields["event"], json.loads(fields["data"])))
        return found

    def disconnect(self) -> None:
        self._gone.set()


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[FakeService]:
    catalog = await open_catalog(f"sqlite://{tmp_path}/catalog.db")
    await catalog.put_campaign(Campaign(name="talk", question="How?", minimum=1, maximum=5))
    yield FakeService(catalog)
    await catalog.close()


@pytest.fixture
async def api(service: FakeService) -> AsyncIterator[Api]:
    api = build_api(service, max_listeners=3)
    yield api
    api.shutdown()


async def get(api: Api, target: str, *, method: str = "GET", **headers: str) -> Exchange:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    exchange = Exchange(api, method, target, named)
    await asyncio.wait_for(exchange.task, 5)
    return exchange


async def settle() -> None:
    """Let everything run that can run without time passing."""
    for _ in range(20):
        await asyncio.sleep(0)


async def listen(api: Api, target: str = "/api/campaigns/default/live") -> Exchange:
    exchange = Exchange(api, "GET", target, {})
    await settle()
    return exchange


def assert_problem(exchange: Exchange, status: int, slug: str) -> None:
    assert exchange.status == status, exchange.body
    assert exchange.headers["content-type"] == "application/problem+json"
    assert exchange.headers["x-content-type-options"] == "nosniff"
    assert exchange.json["type"] == f"urn:molva:problem:{slug}"
    assert exchange.json["title"] == TITLES[slug]
    assert exchange.json["status"] == status
    assert exchange.json["detail"]


# Campaigns


async def test_all_campaigns_are_listed(api: Api) -> None:
    answer = await get(api, "/api/campaigns")
    assert answer.status == 200
    assert [campaign["name"] for campaign in answer.json["campaigns"]] == ["default", "talk"]


async def test_one_campaign_is_read_by_its_name(api: Api) -> None:
    answer = await get(api, "/api/campaigns/talk")
    assert answer.json == {
        "name": "talk",
        "question": "How?",
        "minimum": 1,
        "maximum": 5,
        "window": 10,
    }


@pytest.mark.parametrize("target", ["/api/campaigns/nobody", "/api/campaigns/nobody/live"])
async def test_an_unknown_campaign_is_404(api: Api, target: str) -> None:
    assert_problem(await get(api, target), 404, "unknown-campaign")


@pytest.mark.parametrize(
    "target",
    [
        "/api/campaigns?nam=x",
        "/api/campaigns/talk?item=x",
        "/api/campaigns/talk/live?itm=x",
        "/api/campaigns/talk/live?item=x&item=y",
        "/api/campaigns/talk/live?item=%FF",
        "/api/campaigns/talk/live?item=%00",
        "/api/campaigns/talk/live?item=" + "x" * 513,
    ],
)
async def test_a_wrong_query_names_the_field(api: Api, target: str) -> None:
    answer = await get(api, target)
    assert_problem(answer, 400, "invalid-field")
    field = target.partition("?")[2].partition("=")[0]
    assert [error["field"] for error in answer.json["errors"]] == [field]


# Health


async def test_health_is_200_whatever_else_fails(api: Api, service: FakeService) -> None:
    service.error = service.ledger.error = LedgerError("down")
    assert (await get(api, "/healthz")).status == 200


async def test_ready_says_how_much_is_pending(api: Api) -> None:
    answer = await get(api, "/readyz")
    assert (answer.status, answer.json) == (200, {"pending": 3})


async def test_not_ready_says_why(api: Api, service: FakeService) -> None:
    service.reasons = ["the ledger cannot be read", "the broker is away"]
    answer = await get(api, "/readyz")
    assert_problem(answer, 503, "unavailable")
    assert answer.json["detail"] == "the ledger cannot be read; the broker is away"
    assert answer.headers["retry-after"]


async def test_metrics_are_prometheus_text(api: Api) -> None:
    answer = await get(api, "/metrics")
    assert answer.body == b"molva_up 1\n"
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


# Refusals


@pytest.mark.parametrize(
    "target",
    ["/none", "/api", "/api/campaigns/", "/static/", "/static/none.js", "/api/campaigns/a/b"],
)
async def test_an_unknown_path_is_404(api: Api, target: str) -> None:
    assert_problem(await get(api, target), 404, "not-found")


async def test_every_route_refuses_other_methods_with_allow(api: Api) -> None:
    for path, _ in api.routes:
        answer = await get(api, path.replace("{name}", "default"), method="DELETE")
        assert_problem(answer, 405, "method-not-allowed")
        assert answer.headers["allow"] == "GET, HEAD"


async def test_every_route_answers_head_as_get_without_a_body(api: Api) -> None:
    for path, _ in api.routes:
        target = path.replace("/static/{name}", "/static/page.js").replace("{name}", "default")
        head = await get(api, target, method="HEAD")
        assert (head.status, head.body) == (200, b""), path
        if not target.endswith("/live"):
            got = await get(api, target)
            assert head.headers == got.headers, path


async def test_what_nobody_expected_is_a_500_without_a_traceback(
    api: Api, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    service.error = RuntimeError(SECRET)
    answer = await get(api, "/readyz")
    assert_problem(answer, 500, "internal-error")
    assert b"s3cret" not in answer.body
    assert b"Traceback" not in answer.body
    assert [record.name for record in caplog.records] == ["molva.ratings"]


async def test_a_ledger_that_cannot_be_reached_is_a_503_of_its_own(
    api: Api, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    service.ledger.error = LedgerUnavailableError(SECRET)
    answer = await get(api, "/api/campaigns/default/live")
    assert_problem(answer, 503, "ledger-unavailable")
    assert b"s3cret" not in answer.body
    assert len(caplog.records) == 1


async def test_a_failing_catalog_is_503(
    api: Api, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(name: str) -> Campaign | None:
        raise CatalogUnavailableError(SECRET)

    monkeypatch.setattr(service.catalog, "campaign", fail)
    answer = await get(api, "/api/campaigns/default")
    assert_problem(answer, 503, "unavailable")
    assert answer.headers["retry-after"]
    assert b"s3cret" not in answer.body


# The page


async def test_the_page_is_html_under_a_strict_policy(api: Api) -> None:
    answer = await get(api, "/?campaign=talk&utm_source=mail")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    for directive in (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "form-action 'none'",
    ):
        assert directive in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


async def test_every_file_that_the_page_names_exists(api: Api) -> None:
    html = (await get(api, "/")).body.decode()
    named = {part.split('"')[0] for part in html.split('="')[1:] if part.startswith("static/")}
    assert named == {"static/favicon.svg", "static/page.css", "static/page.js"}
    for name in named:
        assert (await get(api, f"/{name}")).status == 200


async def test_nothing_in_the_page_is_inline(api: Api) -> None:
    html = (await get(api, "/")).body.decode()
    script = (await get(api, "/static/page.js")).body.decode()
    assert "<style" not in html
    assert "style=" not in html
    assert " on" not in {part[:3] for part in html.split("<")}
    assert html.count("<script") == html.count('<script type="module" src="static/page.js">') == 1
    assert "innerHTML" not in script


async def test_a_file_that_is_known_is_not_sent_again(api: Api) -> None:
    first = await get(api, "/static/page.css")
    tag = first.headers["etag"]
    assert tag.startswith('"')
    for known in (tag, f'"x", W/{tag}', "*"):
        again = await get(api, "/static/page.css", if_none_match=known)
        assert (again.status, again.body) == (304, b"")
        assert again.headers["etag"] == tag
    assert (await get(api, "/static/page.css", if_none_match='"old"')).status == 200


def luminance(colour: str) -> float:
    """Return the relative luminance of ``#rrggbb``, as WCAG 2.2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_colours_can_be_told_apart(api: Api, scheme: str) -> None:
    style = (await get(api, "/static/page.css")).body.decode()
    light, dark = (block.partition("}")[0] for block in style.split(":root {")[1:])
    names = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))
    text = [(of, on) for of in ("ink", "muted", "accent", "warn") for on in ("card", "paper")]
    text += [("ink", "accent-soft"), ("on-accent", "accent")]
    shapes = [("edge", "card"), ("bar", "card"), ("accent", "card")]
    for pairs, least in ((text, 4.5), (shapes, 3.0)):
        for of, on in pairs:
            low, high = sorted((luminance(names[of]), luminance(names[on])))
            assert (high + 0.05) / (low + 0.05) >= least, (of, on)


@pytest.mark.parametrize(
    "path",
    [
        "/static/../api.py",
        "/static/..",
        "/static/.",
        "/static/..%2fapi.py",
        "/static//etc/passwd",
        "/static/web/../../api.py",
        "/static/page.js\0",
    ],
)
async def test_no_path_leaves_the_folder(api: Api, path: str) -> None:
    assert_problem(await get(api, path), 404, "not-found")


# Live totals


async def test_a_listener_gets_the_current_total_at_once(api: Api, service: FakeService) -> None:
    service.ledger.rates = [("", 4), ("", 5)]
    stream = await listen(api)
    assert stream.status == 200
    assert stream.headers["content-type"] == "text/event-stream"
    assert stream.headers["cache-control"] == "no-store"
    assert stream.body.startswith(b"retry: ")
    assert stream.events == [
        (
            "total",
            {"count": 2, "average": 4.5, "n": 2, "distribution": {"4": 1, "5": 1}, "as_of": 2},
        )
    ]


async def test_nothing_yet_is_a_count_of_zero(api: Api) -> None:
    stream = await listen(api)
    assert stream.events == [("total", {"count": 0})]


async def test_a_change_is_one_event(api: Api, service: FakeService) -> None:
    stream = await listen(api)
    service.ledger.rates.append(("", 7))
    await service.clock.pass_time(1.0)
    await settle()
    assert [data["count"] for _, data in stream.events] == [0, 1]


async def test_changes_that_follow_quickly_come_as_one(api: Api, service: FakeService) -> None:
    stream = await listen(api)
    service.ledger.rates.extend([("", 7)] * 1_000)
    await service.clock.pass_time(0.2)
    await settle()
    assert [data["count"] for _, data in stream.events] == [0, 1_000]


async def test_no_change_is_no_event(api: Api, service: FakeService) -> None:
    service.ledger.rates = [("", 4)]
    stream = await listen(api)
    await service.clock.pass_time(10.0)
    await settle()
    assert len(stream.events) == 1


async def test_an_item_is_watched_alone(api: Api, service: FakeService) -> None:
    service.ledger.rates = [("a", 4), ("b", 10)]
    stream = await listen(api, "/api/campaigns/default/live?item=a")
    assert stream.events[0][1]["average"] == 4.0


async def test_an_empty_item_is_the_whole_campaign(api: Api, service: FakeService) -> None:
    service.ledger.rates = [("a", 4), ("b", 10)]
    stream = await listen(api, "/api/campaigns/default/live?item=")
    assert stream.events[0][1]["average"] == 7.0


async def test_listeners_share_one_poller(api: Api, service: FakeService) -> None:
    streams = [await listen(api) for _ in range(3)]
    service.ledger.polls = service.ledger.reads = 0
    service.ledger.rates.append(("", 1))
    await service.clock.pass_time(0.16)
    await settle()
    assert all(len(stream.events) == 2 for stream in streams)
    assert service.ledger.reads == 1
    assert service.ledger.polls == 2  # the poll that saw it, and the read


async def test_nobody_is_polled_for_when_nobody_listens(api: Api, service: FakeService) -> None:
    stream = await listen(api)
    stream.disconnect()
    await asyncio.wait_for(stream.task, 10)
    await settle()
    service.ledger.polls = 0
    await service.clock.pass_time(5.0)
    assert service.ledger.polls == 0


async def test_a_new_listener_after_the_last_one_left_is_served(
    api: Api, service: FakeService
) -> None:
    first = await listen(api)
    first.disconnect()
    await first.task
    second = await listen(api)
    service.ledger.rates.append(("", 7))
    await service.clock.pass_time(0.2)
    await settle()
    assert [data["count"] for _, data in second.events] == [0, 1]


async def test_a_heartbeat_comes_every_15_seconds(api: Api, service: FakeService) -> None:
    stream = await listen(api)
    await service.clock.pass_time(31.0)
    await settle()
    assert stream.body.count(b": still here\n\n") == 2


async def test_a_new_window_is_followed(api: Api, service: FakeService) -> None:
    service.ledger.rates = [("", 0), ("", 10)]
    stream = await listen(api)
    await service.catalog.put_campaign(Campaign(window=1))
    await service.clock.pass_time(0.2)
    await settle()
    assert [data["average"] for _, data in stream.events] == [5.0, 10.0]


async def test_too_many_listeners_are_refused_with_a_hint(api: Api) -> None:
    for _ in range(3):
        await listen(api)
    refused = await get(api, "/api/campaigns/talk/live")
    assert_problem(refused, 503, "overloaded")
    assert refused.headers["retry-after"]


async def test_a_place_is_free_again_when_its_listener_left(api: Api) -> None:
    streams = [await listen(api) for _ in range(3)]
    streams[0].disconnect()
    await streams[0].task
    assert (await listen(api)).status == 200


async def test_a_listener_whose_first_read_fails_leaves_its_place(
    api: Api, service: FakeService
) -> None:
    service.ledger.error = LedgerError("down")
    for _ in range(4):
        assert_problem(await get(api, "/api/campaigns/talk/live"), 500, "ledger-failed")


async def test_head_takes_no_place(api: Api) -> None:
    for _ in range(4):
        answer = await get(api, "/api/campaigns/talk/live", method="HEAD")
        assert (answer.status, answer.body) == (200, b"")


async def test_trouble_is_said_once_and_its_end_too(
    api: Api, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    service.ledger.rates = [("", 4)]
    stream = await listen(api)
    service.ledger.error = LedgerUnavailableError(SECRET)
    await service.clock.pass_time(5.0)
    service.ledger.error = None
    await service.clock.pass_time(1.1)
    await settle()
    assert [name for name, _ in stream.events] == ["total", "trouble", "total"]
    assert b"s3cret" not in stream.body
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_a_bug_in_the_poller_ends_the_streams(
    api: Api, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    stream = await listen(api)
    service.ledger.error = ZeroDivisionError("a bug")
    await service.clock.pass_time(0.2)
    await asyncio.wait_for(stream.task, 10)
    assert len(caplog.records) == 1
    service.ledger.error = None
    assert (await listen(api)).status == 200


async def test_shutdown_ends_all_streams(api: Api) -> None:
    streams = [await listen(api), await listen(api, "/api/campaigns/talk/live")]
    api.shutdown()
    for stream in streams:
        await asyncio.wait_for(stream.task, 10)


async def test_shutdown_ends_a_stream_whose_client_does_not_read(
    api: Api, service: FakeService
) -> None:
    stream = await listen(api)
    stream.stuck = True
    service.ledger.rates.append(("", 7))
    await service.clock.pass_time(0.2)
    api.shutdown()
    await asyncio.wait_for(stream.task, 10)


async def test_no_stream_begins_after_shutdown(api: Api) -> None:
    api.shutdown()
    assert_problem(await get(api, "/api/campaigns/talk/live"), 503, "stopping")


async def test_the_end_of_lifespan_is_a_shutdown(api: Api) -> None:
    stream = await listen(api)
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[str] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message["type"])

    await api({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
    await asyncio.wait_for(stream.task, 10)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
