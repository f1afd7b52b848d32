"""The OpenAPI 3.1 document of the whole HTTP surface, the fast lane included.

Schemas come from the types that handlers encode, operations from the table below. A test
walks the routes of the API, ``/rate`` and ``/total`` and compares: adding a route without
a line here fails, and so does a line without a route.

What a status answers stands beside it: the slugs of its problem documents, or its type.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import msgspec

import molva
from molva.ratings.answers import Accepted, CampaignList, LiveTotal, Readiness, TotalAnswer
from molva.ratings.campaign import Campaign
from molva.ratings.problem import PROBLEM_MEDIA_TYPE, TITLES, Problem
from molva.ratings.rating import (
    MAX_COMMENT_CHARACTERS,
    MAX_ID_CHARACTERS,
    MAX_ITEM_CHARACTERS,
)

__all__ = ["openapi_document"]

_Json = dict[str, Any]

_SCHEMAS: Final = (
    Accepted,
    Campaign,
    CampaignList,
    LiveTotal,
    Problem,
    Readiness,
    TotalAnswer,
)

_TEXT: Final[_Json] = {"type": "string"}
_CAMPAIGN_NAME: Final[_Json] = {
    "type": "string",
    "pattern": "^[a-z0-9][a-z0-9_.-]{0,63}$",
    "default": "default",
}
_ITEM: Final[_Json] = {"type": "string", "maxLength": MAX_ITEM_CHARACTERS}
_ID: Final[_Json] = {"type": "string", "minLength": 1, "maxLength": MAX_ID_CHARACTERS}
_POSITIVE: Final[_Json] = {"type": "integer", "minimum": 1}

# The fields of a rating, as a query's parameters and as a body's properties.
_RATING_FIELDS: Final[Mapping[str, tuple[_Json, str]]] = {
    "rate": ({"type": "integer"}, "What the visitor gives: an integer on the campaign's scale."),
    "campaign": (_CAMPAIGN_NAME, "Name of the campaign."),
    "item": (_ITEM, "What is rated within the campaign: a page, a lecture, an answer."),
    "id": (
        _ID,
        "The rating's id, best a UUID: sending it again under the same id counts it once.",
    ),
    "comment": ({"type": "string", "maxLength": MAX_COMMENT_CHARACTERS}, "The visitor's words."),
}

_RATE_DESCRIPTION: Final = (
    "The answer comes when the broker has confirmed that the rating is stored; it is counted "
    "a moment later, exactly once. Fields come in the query, as a form, or as JSON; no field "
    "twice. After a 5xx, or no answer at all, send the same rating again with the same id."
)
_TOTAL_DESCRIPTION: Final = (
    "As text with two decimals, `4.55`, or as JSON with what stands around it where the "
    "request accepts `application/json`."
)
_LIVE_DESCRIPTION: Final = (
    "Server-sent events. At once, and whenever the campaign's numbers changed, an event "
    "`total` whose data is a LiveTotal; an event `trouble`, whose data is a Problem, while the "
    "ledger cannot be read. Changes that follow one another quickly come as one."
)


@final
@dataclass(frozen=True, slots=True)
class _Operation:
    """One method of one path.

    Attributes:
        parameters: Of the path, the query or the headers.
        answers: Media type to schema, of the status ``status``.
        refusals: Status to the slugs of its problem documents.
    """

    method: str
    path: str
    id: str
    summary: str
    answers: Mapping[str, _Json]
    description: str = ""
    status: int = 200
    answer: str = "As asked."
    parameters: Sequence[_Json] = ()
    body: _Json | None = None
    refusals: Mapping[int, Sequence[str]] | None = None


def openapi_document() -> bytes:
    """Return the document: UTF-8 JSON."""
    _, schemas = msgspec.json.schema_components(_SCHEMAS, ref_template=_REF)
    for schema in schemas.values():
        _tidy(schema)
    paths: _Json = {}
    for operation in _operations():
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Molva",
            "version": molva.__version__,
            "summary": "Ratings, counted exactly once, and their moving average.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": {"schemas": schemas},
    }
    return msgspec.json.encode(document)


_REF: Final = "#/components/schemas/{name}"

_TAGS: Final = {
    "ratings": "Giving ratings and reading their average.",
    "campaigns": "The questions, their scales and windows.",
    "operation": "What whoever runs the service asks it.",
    "page": "The page for visitors, and this document.",
}


def _tidy(schema: _Json) -> None:
    """Cut the docstring down to its sentence, the attributes' texts go to the properties."""
    text, _, attributes = schema.get("description", "").partition("Attributes:")
    schema["description"] = " ".join(text.split())
    name = ""
    texts: dict[str, str] = {}
    for line in attributes.splitlines():
        words = line.strip()
        if line.startswith(" " * 8) and not line.startswith(" " * 9) and ":" in words:
            name, _, words = words.partition(":")
        texts[name] = f"{texts.get(name, '')} {words.strip()}".strip()
    for name, attribute in schema.get("properties", {}).items():
        if name in texts:
            attribute["description"] = texts[name].replace("``", "`")


def _operations() -> tuple[_Operation, ...]:
    return (
        _Operation(
            "post",
            "/rate",
            "giveRating",
            "Give a rating",
            {"application/json": _schema("Accepted")},
            _RATE_DESCRIPTION,
            202,
            "The rating is stored and will be counted once.",
            (*_rating_parameters(), _IDEMPOTENCY_KEY),
            _rating_body(),
            {
                400: ("invalid-request", "invalid-field"),
                404: ("unknown-campaign",),
                408: ("request-timeout",),
                409: ("id-conflict",),
                413: ("body-too-large",),
                415: ("unsupported-media-type",),
                503: ("overloaded", "unavailable", "stopping"),
            },
        ),
        _Operation(
            "get",
            "/total",
            "readTotal",
            "Read the moving average",
            {"text/plain": _TEXT, "application/json": _schema("TotalAnswer")},
            _TOTAL_DESCRIPTION,
            answer="The average of the last n ratings.",
            parameters=(
                _parameter("campaign", _CAMPAIGN_NAME, "Name of the campaign."),
                _parameter("item", _ITEM, "One item of it; without, all of its ratings."),
                _parameter("n", _POSITIVE, "The window; without, the campaign's own."),
                _parameter("as_of", _POSITIVE, "The sequence number to read at; without, now."),
            ),
            refusals={
                400: ("invalid-request", "invalid-field", "not-kept"),
                404: ("unknown-campaign",),
                413: ("body-too-large",),
                500: ("ledger-failed",),
                503: ("nothing-to-average", "ledger-unavailable", "unavailable"),
            },
        ),
        _Operation(
            "get",
            "/api/campaigns",
            "listCampaigns",
            "List all campaigns",
            {"application/json": _schema("CampaignList")},
            answer="All campaigns, in the order of their names.",
            refusals={400: ("invalid-field",), 503: ("unavailable",)},
        ),
        _Operation(
            "get",
            "/api/campaigns/{name}",
            "readCampaign",
            "Read one campaign",
            {"application/json": _schema("Campaign")},
            answer="The campaign.",
            parameters=(_NAME_IN_PATH,),
            refusals={
                400: ("invalid-field",),
                404: ("unknown-campaign",),
                503: ("unavailable",),
            },
        ),
        _Operation(
            "get",
            "/api/campaigns/{name}/live",
            "watchTotal",
            "Watch the moving average",
            {"text/event-stream": _TEXT},
            _LIVE_DESCRIPTION,
            answer="A stream that ends when the service stops.",
            parameters=(
                _NAME_IN_PATH,
                _parameter("item", _ITEM, "One item of it; without, all of its ratings."),
            ),
            refusals={
                400: ("invalid-field",),
                404: ("unknown-campaign",),
                500: ("ledger-failed",),
                503: ("overloaded", "ledger-unavailable", "unavailable", "stopping"),
            },
        ),
        _Operation(
            "get",
            "/healthz",
            "checkHealth",
            "Does the process answer?",
            {"text/plain": _TEXT},
            answer="It does.",
        ),
        _Operation(
            "get",
            "/readyz",
            "checkReadiness",
            "Should the process get requests?",
            {"application/json": _schema("Readiness")},
            answer="It should.",
            refusals={503: ("unavailable",)},
        ),
        _Operation(
            "get",
            "/metrics",
            "readMetrics",
            "Read the metrics, as Prometheus does",
            {"text/plain": _TEXT},
            answer="Prometheus' text format, version 0.0.4.",
        ),
        _Operation(
            "get",
            "/openapi.json",
            "readOpenAPI",
            "Read this document",
            {"application/json": {"type": "object"}},
            answer="This document.",
        ),
        _Operation(
            "get",
            "/",
            "showPage",
            "The page for visitors",
            {"text/html": _TEXT},
            answer="A page to rate on and to watch the average, of ?campaign= and ?item=.",
        ),
        _Operation(
            "get",
            "/static/{name}",
            "readPageFile",
            "A file of the page",
            {"text/css": _TEXT, "text/javascript": _TEXT, "image/svg+xml": _TEXT},
            answer="The file.",
            parameters=(_parameter("name", _TEXT, "Name of the file.", place="path"),),
            refusals={404: ("not-found",)},
        ),
    )


def _described(operation: _Operation) -> _Json:
    """Return the operation as OpenAPI writes it."""
    content = {media: {"schema": schema} for media, schema in operation.answers.items()}
    responses: _Json = {
        str(operation.status): {"description": operation.answer, "content": content}
    }
    # What any path may answer, whatever else it answers.
    refusals = {500: ("internal-error",), 405: ("method-not-allowed",)}
    for status, slugs in (operation.refusals or {}).items():
        refusals[status] = (*slugs, *refusals.get(status, ()))
    for status, slugs in sorted(refusals.items()):
        responses[str(status)] = _refusal(status, slugs)
    described: _Json = {
        "operationId": operation.id,
        "summary": operation.summary,
        "tags": [_tag(operation.path)],
        "responses": responses,
    }
    if operation.description:
        described["description"] = operation.description
    if operation.parameters:
        described["parameters"] = list(operation.parameters)
    if operation.body is not None:
        described["requestBody"] = operation.body
    return described


def _tag(path: str) -> str:
    if path in ("/rate", "/total"):
        return "ratings"
    if path.startswith("/api/campaigns"):
        return "campaigns"
    return "operation" if path in ("/healthz", "/readyz", "/metrics") else "page"


def _refusal(status: int, slugs: Sequence[str]) -> _Json:
    lines = [f"`urn:molva:problem:{slug}`: {TITLES[slug]}." for slug in slugs]
    response: _Json = {
        "description": "\n\n".join(lines),
        "content": {PROBLEM_MEDIA_TYPE: {"schema": _schema("Problem")}},
    }
    if status == 503:
        response["headers"] = {
            "Retry-After": {
                "description": "Seconds after which trying again makes sense.",
                "schema": {"type": "integer", "minimum": 0},
            }
        }
    elif status == 405:
        response["headers"] = {
            "Allow": {"description": "The methods that are accepted.", "schema": _TEXT}
        }
    return response


def _rating_parameters() -> list[_Json]:
    return [_parameter(name, schema, text) for name, (schema, text) in _RATING_FIELDS.items()]


def _rating_body() -> _Json:
    schema = {
        "type": "object",
        # The rate may stand in the query instead, so that no field is required here.
        "properties": {
            name: {**schema, "description": text} for name, (schema, text) in _RATING_FIELDS.items()
        },
        "additionalProperties": False,
    }
    media_types = ("application/json", "application/x-www-form-urlencoded")
    return {
        "description": "The fields that are not in the query; 16 KiB at most.",
        "required": False,
        "content": {media: {"schema": schema} for media in media_types},
    }


def _parameter(name: str, schema: _Json, text: str, *, place: str = "query") -> _Json:
    required = place == "path"
    return {"name": name, "in": place, "required": required, "schema": schema, "description": text}


def _schema(name: str) -> _Json:
    return {"$ref": _REF.format(name=name)}


_NAME_IN_PATH: Final = _parameter(
    "name",
    {"type": "string", "pattern": _CAMPAIGN_NAME["pattern"]},
    "Name of the campaign.",
    place="path",
)
_IDEMPOTENCY_KEY: Final = _parameter(
    "Idempotency-Key", _ID, "The same as the field `id`; one of the two.", place="header"
)
