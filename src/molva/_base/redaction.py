"""Keeping secrets out of whatever is shown: logs, errors, reprs, metrics."""

import re
from typing import Final

__all__ = ["redact"]

# Greedy up to the last @ before the path: a password may itself hold an @.
_USERINFO: Final = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<userinfo>[^/?#\s]*)@")
# A password with a / ? or # that was not percent-encoded: no port follows the colon, and
# an @ comes later. Whoever made this mistake is about to read it in an error message.
_UNQUOTED: Final = re.compile(
    r"(?P<start>[a-zA-Z][a-zA-Z0-9+.-]*://[^/?#\s:@\[]*):(?!\d+(?:[,/?#\s]|$))[^\s@]*[/?#]\S*@"
)
_SECRET_OPTION: Final = re.compile(
    r"(?P<name>[?&](?:password|passwd|token|secret|api_key|apikey|sasl_password)=)[^&#\s]*",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Return ``text`` with the password of every URL in it replaced by ``***``.

    >>> redact("cannot reach redis://ann:s3cret@host:6379/0?token=abc")
    'cannot reach redis://ann:***@host:6379/0?token=***'
    """

    def userinfo(match: re.Match[str]) -> str:
        user, colon, _ = match["userinfo"].partition(":")
        return f"{match['scheme']}{user}{':***' if colon else ''}@"

    text = _UNQUOTED.sub(r"\g<start>:***@", _USERINFO.sub(userinfo, text))
    return _SECRET_OPTION.sub(r"\g<name>***", text)
