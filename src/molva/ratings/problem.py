"""Refusals have one shape: a problem document (RFC 9457), whoever refuses.

``type`` is a URN, stable across versions and made to be compared by programs; ``title``
belongs to it; ``detail`` is about this one request; ``errors`` names each field that was
refused and what it would accept.
"""

from collections.abc import Sequence
from typing import Final, final

import msgspec

from molva.ratings.rating import FieldError

__all__ = ["PROBLEM_MEDIA_TYPE", "TITLES", "Problem", "problem"]

PROBLEM_MEDIA_TYPE: Final = "application/problem+json"

# Slug to title. Adding one here? Also docs/http.md, which a test compares.
TITLES: Final = {
    "invalid-request": "The request cannot be read",
    "invalid-field": "A field was refused",
    "unknown-campaign": "There is no such campaign",
    "not-found": "There is nothing here",
    "method-not-allowed": "This method is not accepted here",
    "unsupported-media-type": "This content type is not accepted",
    "body-too-large": "The body is too large",
    "request-timeout": "The request did not arrive in time",
    "id-conflict": "This id was used for another rating",
    "nothing-to-average": "There is nothing to average yet",
    "overloaded": "The queue is full",
    "unavailable": "Ratings cannot be stored right now",
    "stopping": "The service is stopping",
    "ledger-failed": "The ledger cannot be read",
    "ledger-unavailable": "The ledger cannot be read right now",
    "not-kept": "The ledger does not keep that",
    "internal-error": "Something went wrong here",
}


@final
class Problem(msgspec.Struct, frozen=True, omit_defaults=True):
    """A problem document: see RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    errors: Sequence[FieldError] = ()


def problem(status: int, slug: str, detail: str, errors: Sequence[FieldError] = ()) -> bytes:
    """Return the body of a problem document, UTF-8 JSON. ``slug`` is a key of TITLES."""
    document = Problem(f"urn:molva:problem:{slug}", TITLES[slug], status, detail, errors)
    return msgspec.json.encode(document)
