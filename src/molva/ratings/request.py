"""Reading the fields of a request: from its query, a form or JSON, bounded and strict.

Pure but for waiting for the body. Whatever is wrong becomes a ``ProblemError`` that names
the field and what it would accept: an unknown field, one given twice, broken encodings,
JSON of the wrong shape, a body that is too large or too slow.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final, final
from urllib.parse import unquote_to_bytes

from molva.ratings.rating import FieldError

__all__ = [
    "RATE_FIELDS",
    "TOTAL_FIELDS",
    "ProblemError",
    "Receive",
    "Scope",
    "query_fields",
    "read_body",
    "read_head",
]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# Bytes of a body. A comment of 2,000 characters takes 8,000 as UTF-8, and up to six times
# its length when a client escapes all of it; nobody needs more.
_MAX_BODY_BYTES: Final = 16 * 1024
# Bytes of a query. An item of 512 characters, percent-encoded, takes 6,144.
_MAX_QUERY_BYTES: Final = 16 * 1024
# Seconds from the head of a request to the end of its body. A phone on a bad line needs
# two; a client that sends a byte now and then would otherwise hold its place for ever.
_BODY_DEADLINE: Final = 10.0

RATE_FIELDS: Final = frozenset({"rate", "campaign", "item", "id", "comment"})
TOTAL_FIELDS: Final = frozenset({"campaign", "item", "n", "as_of"})


@final
class ProblemError(Exception):
    """A request that is refused: status, slug, detail, fields, further headers."""

    def __init__(
        self,
        status: int,
        slug: str,
        detail: str,
        errors: Iterable[FieldError] = (),
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.slug = slug
        self.errors = tuple(errors)
        self.headers = tuple(headers)


def read_head(scope: Scope, known: frozenset[str]) -> tuple[dict[str, Any], str | None, bool]:
    """Return the query's fields, the id in Idempotency-Key, and whether a body follows."""
    id_text = None
    length = 0
    for name, value in scope["headers"]:
        if name == b"content-length":
            length = int(value) if value.isdigit() and len(value) < 19 else -1
        elif name == b"idempotency-key":
            id_text = _header_text(value)
        elif name == b"transfer-encoding":
            length = -1
        elif name == b"content-encoding" and value != b"identity":
            detail = f"a body encoded as {value[:40]!r} is not accepted; send it as it is"
            raise ProblemError(415, "unsupported-media-type", detail)
    if length > _MAX_BODY_BYTES:
        raise _too_large()
    query = scope["query_string"]
    return (query_fields(query, known) if query else {}), id_text, length != 0


async def read_body(scope: Scope, receive: Receive, fields: dict[str, Any]) -> None:
    """Add the fields of the body, text in a form, text or numbers in JSON."""
    body = await _read_body(receive)
    if not body:
        return
    content_type = next((v for name, v in scope["headers"] if name == b"content-type"), None)
    for name, value in _body_fields(body, content_type).items():
        if name in fields:
            errors = [FieldError(name, "is given in the query and in the body; once is enough")]
            raise ProblemError(400, "invalid-field", f"{name} is given twice", errors)
        fields[name] = value


async def _read_body(receive: Receive) -> bytes:
    chunks = []
    size = 0
    try:
        async with asyncio.timeout(_BODY_DEADLINE):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ProblemError(400, "invalid-request", "the body ended too early")
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > _MAX_BODY_BYTES:
                    raise _too_large()
                chunks.append(chunk)
                if not message.get("more_body"):
                    return b"".join(chunks)
    except TimeoutError:
        detail = f"the body did not arrive within {_BODY_DEADLINE:.0f} s"
        headers = [(b"connection", b"close")]
        raise ProblemError(408, "request-timeout", detail, headers=headers) from None


def _too_large() -> ProblemError:
    detail = f"a body of at most {_MAX_BODY_BYTES:,} bytes is accepted"
    return ProblemError(413, "body-too-large", detail, headers=[(b"connection", b"close")])


def _body_fields(body: bytes, content_type: bytes | None) -> dict[str, Any]:
    media_type = (content_type or b"").partition(b";")[0].strip().lower()
    if media_type == b"application/json":
        return _json_fields(body)
    if media_type == b"application/x-www-form-urlencoded":
        return query_fields(body, RATE_FIELDS)
    shown = media_type.decode("latin-1")[:60] or "a body without a content type"
    detail = (
        f"{shown} is not accepted; send application/json, application/x-www-form-urlencoded, "
        "or the fields in the query"
    )
    raise ProblemError(415, "unsupported-media-type", detail)


def query_fields(query: bytes, known: frozenset[str]) -> dict[str, Any]:
    """Return the fields of a query string or a form."""
    fields: dict[str, Any] = {}
    if len(query) > _MAX_QUERY_BYTES:
        raise _too_large()
    if query.isascii() and b"%" not in query and b"+" not in query:
        # As most are: nothing is encoded.
        for pair in query.decode("ascii").split("&"):
            name, _, value = pair.partition("=")
            if name in known and name not in fields:
                fields[name] = value
            elif pair:
                _add_field(fields, name, value, known)
        return fields
    for raw_pair in query.split(b"&"):
        if raw_pair:
            raw_name, _, raw_value = raw_pair.partition(b"=")
            name, value = _decoded(raw_name, raw_name), _decoded(raw_value, raw_name)
            _add_field(fields, name, value, known)
    return fields


def _decoded(raw: bytes, name: bytes) -> str:
    try:
        return unquote_to_bytes(raw.replace(b"+", b" ")).decode()
    except UnicodeDecodeError:
        shown = name.decode("ascii", "backslashreplace")[:40]
        errors = [FieldError(shown, "is no valid UTF-8")]
        raise ProblemError(400, "invalid-field", f"{shown}: is no valid UTF-8", errors) from None


def _json_fields(body: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            _add_field(fields, name, value, RATE_FIELDS)
        return fields

    try:
        # Numbers stay text, so that one judge says what a rate is, in JSON as elsewhere;
        # and an integer of thousands of digits is never made.
        fields = json.loads(
            body.decode(),
            object_pairs_hook=unique,
            parse_int=_Number,
            parse_float=_Number,
            parse_constant=_Number,
        )
    except ProblemError:
        raise
    except RecursionError:
        detail = "the JSON is nested too deep; one flat object is accepted"
        raise ProblemError(400, "invalid-request", detail) from None
    except ValueError as error:
        # Broken JSON or broken UTF-8.
        detail = f"the body is no JSON that can be read: {str(error)[:120]}"
        raise ProblemError(400, "invalid-request", detail) from None
    if not isinstance(fields, dict):
        raise ProblemError(400, "invalid-request", "the body must be one JSON object")
    for name, value in fields.items():
        _check_json_type(name, value)
    return {name: value for name, value in fields.items() if value is not None}


@final
class _Number(str):
    """A number of a JSON body, as it was written."""

    __slots__ = ()


def _check_json_type(name: str, value: object) -> None:
    if value is None or type(value) is (_Number if name == "rate" else str):
        return
    wanted = "an integer on the campaign's scale is" if name == "rate" else "text is"
    names = {bool: "true or false", str: "text", _Number: "a number", dict: "an object"}
    found = names.get(type(value), "an array")
    errors = [FieldError(name, f"{wanted} accepted, not {found}")]
    raise ProblemError(400, "invalid-field", f"{name}: {wanted} accepted, not {found}", errors)


def _add_field(fields: dict[str, Any], name: str, value: object, known: frozenset[str]) -> None:
    if name not in known:
        shown = ascii(name[:40])[1:-1]
        names = ", ".join(sorted(known)) or "none"
        detail = f"is no field here; known are {names}"
        raise ProblemError(400, "invalid-field", f"{shown} {detail}", [FieldError(shown, detail)])
    if name in fields:
        errors = [FieldError(name, "is given twice; once is enough")]
        raise ProblemError(400, "invalid-field", f"{name} is given twice", errors)
    fields[name] = value


def _header_text(value: bytes) -> str:
    """Return an Idempotency-Key as text: the draft standard quotes it, most clients do not."""
    # Spaces of HTTP only, and UTF-8 as in a field: otherwise two keys would be one.
    value = value.strip(b" \t")
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = value.decode("latin-1")
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    return text
