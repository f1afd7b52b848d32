"""The OpenAPI document against the routes, and against the specification's own rules."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import msgspec
import pytest
from starlette.types import Message

from molva._base.clock import SYSTEM_CLOCK
from molva.ratings.answers import Accepted, LiveTotal, TotalAnswer
from molva.ratings.api import Api, build_api
from molva.ratings.catalog import open_catalog
from molva.ratings.openapi import openapi_document
from molva.ratings.problem import TITLES
from molva.ratings.request import RATE_FIELDS, TOTAL_FIELDS
from molva.ratings.service import Service

DOCUMENT: Final[dict[str, Any]] = json.loads(openapi_document())

# The intake's, in front of the routes of the API.
FAST_LANE: Final = {("/rate", "post"), ("/total", "get")}


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async def last_seq(campaign: str) -> int:
        return 0

    async def total(campaign: str, *, item: str | None, n: int) -> None:
        return None

    async def ready() -> list[str]:
        return []

    async def pending() -> None:
        return None

    async def metrics() -> bytes:
        return b""

    catalog = await open_catalog(f"sqlite://{tmp_path}/catalog.db")
    service = SimpleNamespace(
        catalog=catalog,
        ledger=SimpleNamespace(last_seq=last_seq, total=total),
        clock=SYSTEM_CLOCK,
        ready=ready,
        pending=pending,
        metrics=metrics,
    )
    api = build_api(cast(Service, service))
    yield api
    api.shutdown()
    await catalog.close()


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


async def head(api: Api, path: str) -> tuple[int, str]:
    """Return status and media type of a HEAD, which also a stream answers at once."""
    answers: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        answers.append(message)

    scope = {
        "type": "http",
        "method": "HEAD",
        "path": path,
        "root_path": "",
        "query_string": b"",
        "headers": [],
    }
    await api(scope, receive, send)
    media_type = dict(answers[0]["headers"])[b"content-type"].decode()
    return answers[0]["status"], media_type.partition(";")[0]


def test_every_route_is_described(api: Api) -> None:
    routes = {
        (path, method.lower()) for path, methods in api.routes for method in methods - {"HEAD"}
    }
    described = {(path, method) for path, method, _ in operations()}
    assert described == routes | FAST_LANE


async def test_every_documented_path_answers_as_documented(api: Api) -> None:
    for path, method, operation in operations():
        if (path, method) in FAST_LANE:
            continue
        target = path.replace("/static/{name}", "/static/page.js").replace("{name}", "default")
        status, media_type = await head(api, target)
        assert status == 200, path
        assert media_type in operation["responses"]["200"]["content"], path


def test_the_fields_of_the_fast_lane_are_described() -> None:
    rate, total = DOCUMENT["paths"]["/rate"]["post"], DOCUMENT["paths"]["/total"]["get"]

    def in_query(operation: dict[str, Any]) -> set[str]:
        return {p["name"] for p in operation["parameters"] if p["in"] == "query"}

    assert in_query(rate) == RATE_FIELDS
    assert in_query(total) == TOTAL_FIELDS
    bodies = rate["requestBody"]["content"]
    assert set(bodies) == {"application/json", "application/x-www-form-urlencoded"}
    assert all(set(body["schema"]["properties"]) == RATE_FIELDS for body in bodies.values())


def test_every_kind_of_refusal_is_described_somewhere() -> None:
    text = openapi_document().decode()
    assert set(re.findall(r"urn:molva:problem:([a-z-]+)", text)) == set(TITLES)


def test_the_document_says_which_version_it_follows() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    assert DOCUMENT["info"]["title"]
    assert DOCUMENT["info"]["version"]


def test_every_reference_resolves() -> None:
    references = set(
        re.findall(r'"\$ref":"#/components/schemas/(\w+)"', openapi_document().decode())
    )
    assert references
    assert references <= set(DOCUMENT["components"]["schemas"])
    assert openapi_document().count(b'"$ref"') == openapi_document().count(b'"$ref":"#/components/')


def test_operation_ids_are_unique() -> None:
    ids = [operation["operationId"] for *_, operation in operations()]
    assert len(set(ids)) == len(ids)


def test_every_tag_is_declared() -> None:
    declared = {tag["name"] for tag in DOCUMENT["tags"]}
    assert {tag for *_, operation in operations() for tag in operation["tags"]} == declared


def test_every_response_has_a_description_with_content_that_has_a_schema() -> None:
    for path, _, operation in operations():
        for status, response in operation["responses"].items():
            assert re.fullmatch(r"[1-5]\d\d", status), path
            assert response["description"], (path, status)
            assert all("schema" in media for media in response["content"].values())


def test_every_refusal_is_a_problem() -> None:
    for path, _, operation in operations():
        for status, response in operation["responses"].items():
            is_problem = set(response["content"]) == {"application/problem+json"}
            assert is_problem == (int(status) >= 400), (path, status)


def test_refusals_carry_the_headers_that_belong_to_them() -> None:
    wanted = {"405": {"Allow"}, "503": {"Retry-After"}}
    for path, _, operation in operations():
        for status, response in operation["responses"].items():
            found = set(response.get("headers", {}))
            assert found == wanted.get(status, set()), (path, status)


def test_parameters_in_paths_are_declared_and_required() -> None:
    for path, _, operation in operations():
        declared = [p for p in operation.get("parameters", []) if p["in"] == "path"]
        assert {p["name"] for p in declared} == set(re.findall(r"{(\w+)}", path)), path
        assert all(p["required"] for p in declared)


def test_parameters_are_unique_within_an_operation() -> None:
    for path, _, operation in operations():
        keys = [(p["name"], p["in"]) for p in operation.get("parameters", [])]
        assert len(set(keys)) == len(keys), path


def test_every_property_says_what_it_is() -> None:
    for name in ("Accepted", "Campaign", "LiveTotal", "Readiness", "TotalAnswer"):
        for field, schema in DOCUMENT["components"]["schemas"][name]["properties"].items():
            assert schema.get("description"), (name, field)


def test_what_is_encoded_has_the_properties_that_are_described() -> None:
    total = {"average": 4.5, "n": 2, "count": 2, "distribution": {4: 1, 5: 1}, "as_of": 2}
    for document in (
        Accepted("0190f0a0-0000-7000-8000-000000000000"),
        TotalAnswer(**total, pending=None),  # type: ignore[arg-type]
        LiveTotal(**total),  # type: ignore[arg-type]
    ):
        schema = DOCUMENT["components"]["schemas"][type(document).__name__]
        encoded = json.loads(msgspec.json.encode(document))
        assert set(encoded) <= set(schema["properties"])
        assert set(schema["required"]) <= set(encoded)
