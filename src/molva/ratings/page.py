"""The page at ``/`` and its files: read once, answered from memory.

What is not in the table does not exist, so no path can leave the folder. The files carry
no version in their names. Browsers therefore keep them and ask each time (``no-cache``),
and the strong ETag makes the answer 304 and a few bytes; a page of one version with the
script of another is never shown.
"""

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Final, final

from starlette.requests import Request
from starlette.responses import Response

__all__ = ["Asset", "asset_response", "load_assets"]

_MEDIA_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing inline and nothing from elsewhere: whatever a visitor's data is, it cannot run.
_CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


@final
@dataclass(frozen=True, slots=True)
class Asset:
    """One file of the page: its bytes and the headers that go with them."""

    content: bytes
    etag: str
    headers: dict[str, str]


def load_assets() -> dict[str, Asset]:
    """Return the page's files by name: ``index.html``, ``page.css`` and so on."""
    folder = resources.files("molva.ratings").joinpath("web")
    assets = {}
    for file in folder.iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in _MEDIA_TYPES:
            assets[file.name] = _asset(file.read_bytes(), _MEDIA_TYPES[suffix])
    return assets


def asset_response(request: Request, asset: Asset) -> Response:
    """Return the file, or 304 where the client has it already."""
    if _holds(request.headers.get("if-none-match", ""), asset.etag):
        return Response(status_code=304, headers=asset.headers)
    return Response(asset.content, headers=asset.headers)


def _asset(content: bytes, media_type: str) -> Asset:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "content-type": media_type,
        "etag": etag,
        "cache-control": "no-cache",
        "content-security-policy": _CONTENT_SECURITY_POLICY,
    }
    return Asset(content, etag, headers)


def _holds(if_none_match: str, etag: str) -> bool:
    # The comparison is the weak one (RFC 9110, 13.1.2): proxies that compress a file mark
    # its tag with W/. Our tags hold no comma.
    tags = (tag.strip().removeprefix("W/") for tag in if_none_match.split(","))
    return any(tag in ("*", etag) for tag in tags)
