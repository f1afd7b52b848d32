"""The fast lane, called as an ASGI app: what it stores, what it refuses, what it counts."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molva._base.clock import SYSTEM_CLOCK
from molva._base.ids import format_id
from molva.messaging import (
    BrokenBrokerError,
    Subscription,
    Topic,
    UnavailableError,
    open_subscription,
    open_topic,
)
from molva.ratings import request as request_module
from molva.ratings.admission import Admission
from molva.ratings.campaign import Campaign
from molva.ratings.catalog import open_catalog
from molva.ratings.intake import Intake
from molva.ratings.ledger import open_ledger
from molva.ratings.ledger.protocol import (
    LedgerError,
    LedgerUnavailableError,
    LedgerUnsupportedError,
)
from molva.ratings.rating import Rating, Submission, decode_entry
from molva.ratings.request import RATE_FIELDS, ProblemError, query_fields, read_head
from molva.ratings.spool import Spool

UUID = "01a20a35-01f8-7000-bafb-9c6f32d3c062"
JSON = {"content-type": "application/json"}
FORM = {"content-type": "application/x-www-form-urlencoded"}


class Answer:
    def __init__(self, messages: list[dict[str, Any]]) -> None:
        start, body = messages
        self.status: int = start["status"]
        self.headers = {name.decode(): value.decode() for name, value in start["headers"]}
        self.body: bytes = body["body"]

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


class Site:
    """An intake over a memory broker, with a ledger and a catalog in files."""

    def __init__(
        self, intake: Intake, topic: Topic, subscription: Subscription, admission: Admission
    ) -> None:
        self.intake = intake
        self.admission = admission
        self.topic = topic
        self.subscription = subscription
        self.broken = False

    async def call(
        self,
        method: str,
        path: str,
        body: bytes | list[bytes] = b"",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        path, _, query = path.partition("?")
        chunks = [body] if isinstance(body, bytes) else body
        sent = dict(headers or {})
        if any(chunks) and "content-length" not in sent and "transfer-encoding" not in sent:
            sent["content-length"] = str(sum(map(len, chunks)))
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in sent.items()],
        }
        waiting = [
            {"type": "http.request", "body": chunk, "more_body": at < len(chunks) - 1}
            for at, chunk in enumerate(chunks)
        ]
        messages: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if not waiting:
                await asyncio.Event().wait()
            return waiting.pop(0)

        async def send(message: Any) -> None:
            messages.append(message)

        await self.intake(scope, receive, send)
        return Answer(messages)

    async def rate(self, query: str, **more: Any) -> Answer:
        return await self.call("POST", f"/rate?{query}", **more)

    async def stored(self) -> list[tuple[str, Rating]]:
        found = []
        for delivery in await self.subscription.receive(1_000, wait=0):
            entry = decode_entry(delivery.message.body)
            assert isinstance(entry, Rating)
            found.append((format_id(delivery.message.id), entry))
            await delivery.ack()
        return found


async def _no_api(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 418, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    url = f"memory://{uuid4().hex}?topic=ratings&capacity=100"
    topic = await open_topic(url)
    subscription = await open_subscription(f"{url}&subscription=process")
    catalog = await open_catalog(f"sqlite://{tmp_path}/catalog.db")
    await catalog.put_campaign(Campaign(name="stars", minimum=1, maximum=5))
    ledger = await open_ledger(f"sqlite://{tmp_path}/ledger.db")

    async def pending() -> int | None:
        return None

    def broken() -> None:
        found.broken = True

    admission = Admission(1_000, lambda: None, pending, SYSTEM_CLOCK)
    intake = Intake(
        outlet=topic,
        catalog=catalog,
        ledger=ledger,
        pending=pending,
        admission=admission,
        api=_no_api,
        clock=SYSTEM_CLOCK,
        on_broken=broken,
    )
    found = Site(intake, topic, subscription, admission)
    yield found
    await topic.close()
    await subscription.close()
    await ledger.close()
    await catalog.close()


class TestAccepted:
    async def test_a_rate_in_the_query_is_stored_under_a_new_id(self, site: Site) -> None:
        answer = await site.rate("rate=7")

        assert answer.status == 202
        assert int(answer.headers["content-length"]) == len(answer.body)
        [(id_, rating)] = await site.stored()
        assert answer.document == {"id": id_}
        assert (rating.campaign, rating.rate, rating.item, rating.comment) == (
            "default",
            7,
            "",
            None,
        )

    async def test_all_fields_travel(self, site: Site) -> None:
        fields = {"campaign": "stars", "item": "/a b/ü", "comment": "naïve\nbut «fine» 🙂"}
        query = "&".join(f"{name}={quote(value)}" for name, value in fields.items())

        await site.rate(f"rate=5&id={UUID}&{query}")

        [(id_, rating)] = await site.stored()
        assert id_ == UUID
        assert (rating.campaign, rating.item, rating.comment) == tuple(fields.values())

    @pytest.mark.parametrize(
        ("body", "headers"),
        [
            (b'{"rate": 5, "campaign": "stars", "item": "x y"}', JSON),
            (b'{"rate": 5, "campaign": "stars", "item": "x y", "comment": null}', JSON),
            (b"rate=5&campaign=stars&item=x+y", FORM),
            (b"rate=5&campaign=stars&item=x%20y", FORM | {"content-type": FORM["content-type"]}),
        ],
    )
    async def test_json_and_form_say_the_same(
        self, site: Site, body: bytes, headers: dict[str, str]
    ) -> None:
        answer = await site.call("POST", "/rate", body, headers)

        assert answer.status == 202, answer.body
        [(_, rating)] = await site.stored()
        assert (rating.rate, rating.campaign, rating.item) == (5, "stars", "x y")

    async def test_a_body_in_pieces_without_a_length_is_read(self, site: Site) -> None:
        answer = await site.call(
            "POST", "/rate", [b'{"ra', b'te"', b":3}"], JSON | {"transfer-encoding": "chunked"}
        )

        assert answer.status == 202

    @pytest.mark.parametrize("key", [UUID, f'"{UUID}"', UUID.replace("-", "").upper()])
    async def test_an_idempotency_key_is_the_id(self, site: Site, key: str) -> None:
        answer = await site.rate("rate=7", headers={"Idempotency-Key": key})

        assert answer.document == {"id": UUID}

    @pytest.mark.parametrize(
        ("header", "text"),
        [
            (
                " a-\N{LATIN SMALL LETTER A WITH GRAVE} \t".encode(),
                "a-\N{LATIN SMALL LETTER A WITH GRAVE}",
            ),
            (
                "a-\N{LATIN CAPITAL LETTER A WITH RING ABOVE}".encode(),
                "a-\N{LATIN CAPITAL LETTER A WITH RING ABOVE}",
            ),
            (b"caf\xe9", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
            (b'"order 17"', "order 17"),
        ],
    )
    def test_an_idempotency_key_is_the_text_that_a_field_would_be(
        self, header: bytes, text: str
    ) -> None:
        scope: dict[str, Any] = {
            "query_string": b"rate=7",
            "headers": [(b"idempotency-key", header)],
        }
        assert read_head(cast(Any, scope), RATE_FIELDS)[1] == text

    async def test_a_text_id_means_the_same_rating_in_one_campaign_only(self, site: Site) -> None:
        first = await site.rate("rate=4&id=order-17")
        again = await site.rate("rate=4&id=order-17")
        other = await site.rate("rate=4&id=order-17&campaign=stars")

        assert first.document == again.document != other.document

    async def test_a_campaign_added_elsewhere_is_known_at_once(
        self, site: Site, tmp_path: Path
    ) -> None:
        await site.rate("rate=1")
        elsewhere = await open_catalog(f"sqlite://{tmp_path}/catalog.db")
        await elsewhere.put_campaign(Campaign(name="fresh"))
        await elsewhere.close()

        assert (await site.rate("rate=1&campaign=fresh")).status == 202

    async def test_other_paths_are_the_apis(self, site: Site) -> None:
        assert (await site.call("GET", "/elsewhere")).status == 418

    async def test_any_site_may_rate_and_read(self, site: Site) -> None:
        preflight = await site.call("OPTIONS", "/rate")
        answer = await site.rate("rate=7")

        assert preflight.status == 204
        assert "idempotency-key" in preflight.headers["access-control-allow-headers"]
        assert answer.headers["access-control-allow-origin"] == "*"


DEEP = b'{"rate":' + b"[" * 10_000 + b"]" * 10_000 + b"}"


class TestRefused:
    @pytest.mark.parametrize(
        ("query", "status", "field"),
        [
            ("", 400, "rate"),
            ("rate=", 400, "rate"),
            ("rate=7.5", 400, "rate"),
            ("rate=eleven", 400, "rate"),
            ("rate=11", 400, "rate"),
            ("rate=-1", 400, "rate"),
            ("rate=--1", 400, "rate"),
            ("rate=1_0", 400, "rate"),
            ("rate=%D9%A3", 400, "rate"),  # an Arabic-Indic three: int() would take it
            ("rate=+7", 400, "rate"),
            ("rate=7%00", 400, "rate"),
            ("rate=NaN", 400, "rate"),
            ("rate=" + "7" * 5_000, 400, "rate"),
            ("rate=7&rate=7", 400, "rate"),
            ("rate=0&campaign=stars", 400, "rate"),
            ("rate=7&campaign=nope", 404, "campaign"),
            ("rate=7&campaign=" + "x" * 9_000, 404, "campaign"),
            ("rate=7&item=" + "x" * 10_000, 400, "item"),
            ("rate=7&item=a%00b", 400, "item"),
            ("rate=7&item=%ED%A0%80", 400, "item"),  # a lone surrogate
            ("rate=7&item=%FF", 400, "item"),
            ("rate=7&comment=" + "x" * 2_001, 400, "comment"),
            ("rate=7&comment=a%07b", 400, "comment"),
            ("rate=7&id=", 400, "id"),
            ("rate=7&id=" + "x" * 201, 400, "id"),
            ("rate=7&id=a%0Ab", 400, "id"),
            ("rate=7&colour=red", 400, "colour"),
        ],
    )
    async def test_a_bad_field_is_named(
        self, site: Site, query: str, status: int, field: str
    ) -> None:
        answer = await site.rate(query)

        assert answer.status == status
        assert answer.headers["content-type"] == "application/problem+json"
        document = answer.document
        assert document["status"] == status
        assert [error["field"] for error in document["errors"]] == [field]
        assert len(answer.body) < 1_000
        assert await site.stored() == []

    @pytest.mark.parametrize(
        ("body", "headers", "status"),
        [
            (b"{", JSON, 400),
            (b"", {"content-length": "0"}, 400),
            (b"[7]", JSON, 400),
            (b"7", JSON, 400),
            (b'{"rate": 7.0}', JSON, 400),
            (b'{"rate": "7"}', JSON, 400),
            (b'{"rate": true}', JSON, 400),
            (b'{"rate": null}', JSON, 400),
            (b'{"rate": NaN}', JSON, 400),
            (b'{"rate": Infinity}', JSON, 400),
            (b'{"rate": 1e2}', JSON, 400),
            (b'{"rate": ' + b"7" * 5_000 + b"}", JSON, 400),
            (b'{"rate": 7, "rate": 8}', JSON, 400),
            (b'{"rate": 7, "item": "\\ud800"}', JSON, 400),
            (b'{"rate": 7, "comment": "\\ud800"}', JSON, 400),
            (b'{"rate": 7, "id": "\\ud800"}', JSON, 400),
            (b'{"rate": 7, "item": "\\u0000"}', JSON, 400),
            (b'{"rate": 7, "item": 5}', JSON, 400),
            (b'{"rate": 7, "item": {"rate": 7}}', JSON, 400),
            (b'{"rate": 7, "extra": 1}', JSON, 400),
            (b'{"rate": 7}\xff', JSON, 400),
            ('{"rate": 7}'.encode("utf-16"), JSON, 400),
            (DEEP, JSON, 413),
            (DEEP[:8_000], JSON, 400),
            (b'{"rate": 7}', {}, 415),
            (b'{"rate": 7}', {"content-type": "text/plain"}, 415),
            (b"rate=7", {"content-type": "multipart/form-data"}, 415),
            (b"\x1f\x8b", JSON | {"content-encoding": "gzip"}, 415),
            (b"x" * 2_000_000, JSON, 413),
            ([b"x" * 9_000] * 3, JSON | {"transfer-encoding": "chunked"}, 413),
            (b"rate=7", FORM | {"content-length": "999999999999999999999"}, 202),
        ],
    )
    async def test_a_bad_body_is_refused(
        self, site: Site, body: bytes | list[bytes], headers: dict[str, str], status: int
    ) -> None:
        answer = await site.call("POST", "/rate", body, headers)

        assert answer.status == status, answer.body
        if status != 202:
            assert answer.document["status"] == status
            assert await site.stored() == []

    @pytest.mark.parametrize(
        "rate", ["NaN", "Infinity", "7.5", "7.0", "1e2", "11", "-1", "7" * 5_000]
    )
    async def test_a_bad_number_in_json_is_named_with_what_would_be_right(
        self, site: Site, rate: str
    ) -> None:
        answer = await site.call("POST", "/rate", f'{{"rate": {rate}}}'.encode(), JSON)

        [error] = answer.document["errors"]
        assert error["field"] == "rate"
        assert "an integer from 0 to 10" in error["detail"]

    async def test_remembered_ids_take_little_memory(self, site: Site) -> None:
        for number in range(50):
            await site.rate(f"rate=7&id={number}&comment={quote('🙂' * 900)}")

        remembered = site.intake._remembered._young
        assert len(remembered) == 50
        assert all(len(content) == 8 for content in remembered.values())

    async def test_json_nested_ten_thousand_deep_is_refused_by_its_shape(self, site: Site) -> None:
        deep = b"[" * 8_000 + b"]" * 8_000

        answer = await site.call("POST", "/rate", deep, JSON)

        assert answer.status == 400

    async def test_a_field_in_query_and_body_is_refused(self, site: Site) -> None:
        answer = await site.call("POST", "/rate?rate=7", b"rate=7", FORM)

        assert answer.status == 400

    @pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "BREW"])
    async def test_other_methods_are_told_the_right_one(self, site: Site, method: str) -> None:
        answer = await site.call(method, "/rate?rate=7")

        assert answer.status == 405
        assert "POST" in answer.headers["allow"]
        assert await site.stored() == []

    async def test_different_ids_in_header_and_field_are_refused(self, site: Site) -> None:
        answer = await site.rate(f"rate=7&id={UUID}", headers={"Idempotency-Key": "other"})

        assert answer.status == 400

    async def test_a_used_id_with_another_rating_is_a_conflict(self, site: Site) -> None:
        await site.rate(f"rate=7&id={UUID}")

        answer = await site.rate(f"rate=8&id={UUID}")

        assert answer.status == 409
        assert [rating.rate for _, rating in await site.stored()] == [7]

    async def test_a_body_that_does_not_come_is_given_up(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(request_module, "_BODY_DEADLINE", 0.05)

        answer = await site.call("POST", "/rate", [], JSON | {"content-length": "20"})

        assert answer.status == 408

    async def test_every_refusal_is_counted_by_its_reason(self, site: Site) -> None:
        await site.rate("rate=11")
        await site.rate("rate=12")
        await site.rate("rate=7&campaign=nope")

        assert site.intake.counters.refused == {"invalid-field": 2, "unknown-campaign": 1}

    @given(st.binary(max_size=200))
    def test_no_query_breaks_the_reader(self, query: bytes) -> None:
        try:
            fields = query_fields(query, RATE_FIELDS)
        except ProblemError as error:
            assert error.status in (400, 413)  # noqa: PT017 - either outcome is fine
        else:
            assert fields.keys() <= RATE_FIELDS


class TestOverload:
    async def test_a_full_queue_is_503_with_retry_after(self, site: Site) -> None:
        for _ in range(100):
            assert (await site.rate("rate=7")).status == 202

        answer = await site.rate("rate=7")

        assert answer.status == 503
        assert answer.document["type"] == "urn:molva:problem:overloaded"
        assert int(answer.headers["retry-after"]) >= 1
        assert len(await site.stored()) == 100

    @pytest.mark.parametrize(
        ("error", "is_broken"), [(UnavailableError("x"), False), (BrokenBrokerError("x"), True)]
    )
    async def test_a_broker_that_cannot_store_is_never_202(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception, is_broken: bool
    ) -> None:
        async def refuse(_: object) -> None:
            raise error

        monkeypatch.setattr(site.topic, "send", refuse)

        answer = await site.rate("rate=7")

        assert answer.status == 503
        assert "retry-after" in answer.headers
        assert site.broken is is_broken

    async def test_a_stopping_process_refuses(self, site: Site) -> None:
        site.intake.stop()

        answer = await site.rate("rate=7")

        assert answer.status == 503
        assert answer.document["type"] == "urn:molva:problem:stopping"

    async def test_trouble_that_every_request_meets_is_logged_once(
        self, site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def refuse(_: object) -> None:
            raise UnavailableError("the disk is full")

        monkeypatch.setattr(site.topic, "send", refuse)

        for _ in range(50):
            await site.rate("rate=7")

        assert len(caplog.records) == 1

    async def test_what_would_wait_too_long_is_refused_before_it_is_stored(
        self, site: Site
    ) -> None:
        site.admission.is_full = True

        answer = await site.rate("rate=7")

        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.document["type"] == "urn:molva:problem:overloaded"
        assert await site.subscription.receive(wait=0.0) == []
        site.admission.is_full = False
        assert (await site.rate("rate=7")).status == 202

    async def test_what_waits_at_a_broker_that_is_away_is_no_bound_of_its_spool(
        self, site: Site
    ) -> None:
        site.admission.is_full = True
        spool = site.intake._spool = cast(Spool, SimpleNamespace(is_away=True))

        assert (await site.rate("rate=7")).status == 202
        cast(Any, spool).is_away = False
        assert (await site.rate("rate=7")).status == 503


class TestTotal:
    async def apply(self, site: Site, *rates: int, item: str = "") -> None:
        ledger = site.intake._ledger
        batch = [
            Submission(bytes([len(item), at, rate] + [0] * 13), Rating("default", 1, rate, item))
            for at, rate in enumerate(rates)
        ]
        await ledger.apply(batch, applied_at_us=2)

    async def test_nothing_to_average_is_503(self, site: Site) -> None:
        answer = await site.call("GET", "/total")

        assert answer.status == 503
        assert answer.document["type"] == "urn:molva:problem:nothing-to-average"

    async def test_text_has_two_decimals(self, site: Site) -> None:
        await self.apply(site, 1, 2, 2)

        answer = await site.call("GET", "/total")

        assert (answer.status, answer.body) == (200, b"1.67")
        assert answer.headers["content-type"].startswith("text/plain")

    async def test_json_says_everything(self, site: Site) -> None:
        await self.apply(site, *range(11), 4)

        answer = await site.call("GET", "/total?n=3", headers={"Accept": "application/json"})

        assert answer.document == {
            "average": (9 + 10 + 4) / 3,
            "n": 3,
            "count": 12,
            "distribution": {str(rate): 2 if rate == 4 else 1 for rate in range(11)},
            "as_of": 12,
            "pending": None,
        }

    async def test_the_default_window_is_the_campaigns(self, site: Site) -> None:
        await self.apply(site, *[0] * 10, *[10] * 10)

        assert (await site.call("GET", "/total")).body == b"10.00"

    async def test_an_item_has_its_own_average(self, site: Site) -> None:
        await self.apply(site, 2, item="/a")
        await self.apply(site, 9, item="/bb")

        assert (await site.call("GET", "/total?item=/a")).body == b"2.00"
        assert (await site.call("GET", "/total")).body == b"5.50"

    async def test_an_old_as_of_reads_as_then(self, site: Site) -> None:
        await self.apply(site, 1, 2, 3)

        assert (await site.call("GET", "/total?as_of=2")).body == b"1.50"

    async def test_head_has_no_body(self, site: Site) -> None:
        await self.apply(site, 1)

        answer = await site.call("HEAD", "/total")

        assert (answer.status, answer.body) == (200, b"")

    @pytest.mark.parametrize(
        "query", ["n=0", "n=-1", "n=x", "n=1.5", "as_of=0", "as_of=" + "9" * 30, "item=%00", "m=3"]
    )
    async def test_a_bad_field_is_400(self, site: Site, query: str) -> None:
        assert (await site.call("GET", f"/total?{query}")).status == 400

    async def test_an_unknown_campaign_is_404(self, site: Site) -> None:
        assert (await site.call("GET", "/total?campaign=nope")).status == 404

    @pytest.mark.parametrize(
        ("error", "status", "slug"),
        [
            (LedgerError, 500, "ledger-failed"),
            (LedgerUnavailableError, 503, "ledger-unavailable"),
        ],
    )
    async def test_a_ledger_that_fails_says_whether_it_passes(
        self,
        site: Site,
        monkeypatch: pytest.MonkeyPatch,
        error: type[LedgerError],
        status: int,
        slug: str,
    ) -> None:
        async def fail(*_: object, **__: object) -> None:
            raise error("the disk is gone")

        monkeypatch.setattr(site.intake._ledger, "total", fail)

        answer = await site.call("GET", "/total")

        assert answer.status == status
        assert answer.document["type"] == f"urn:molva:problem:{slug}"
        assert ("retry-after" in answer.headers) == (status == 503)
        assert b"disk" not in answer.body

    async def test_what_the_ledger_does_not_keep_is_400(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def refuse(*_: object, **__: object) -> None:
            raise LedgerUnsupportedError("as_of=3: only the last 10,000 are kept")

        monkeypatch.setattr(site.intake._ledger, "total", refuse)

        answer = await site.call("GET", "/total?as_of=3")

        assert answer.status == 400
        assert answer.document["type"] == "urn:molva:problem:not-kept"
        assert b"10,000" in answer.body
