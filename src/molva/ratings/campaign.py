"""A campaign: one question, with its scale and its window."""

import re
from typing import Final, final

import msgspec

__all__ = ["DEFAULT_CAMPAIGN", "Campaign", "check_campaign"]

DEFAULT_CAMPAIGN: Final = "default"

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
# A running sum of 10¹³ ratings at this rate still fits a signed 64-bit integer.
_MAX_RATE: Final = 100_000
_MAX_STEPS: Final = 100
_MAX_WINDOW: Final = 1_000_000_000
_MAX_QUESTION_CHARACTERS: Final = 500


@final
class Campaign(msgspec.Struct, frozen=True, kw_only=True):
    """One question, its scale and its window.

    Attributes:
        name: 1 to 64 of ``a-z 0-9 _ . -``, beginning with a letter or a digit.
        question: What the visitor is asked.
        minimum: The lowest rate of the scale.
        maximum: The highest rate of the scale, above ``minimum``.
        window: How many of the last ratings the moving average takes where nobody says.
    """

    name: str = DEFAULT_CAMPAIGN
    question: str = "How do you like it?"
    minimum: int = 0
    maximum: int = 10
    window: int = 10


def check_campaign(campaign: Campaign) -> Campaign:
    """Return ``campaign`` if it can be used.

    Raises:
        ValueError: A field is outside what is accepted; says which and what would be.
    """
    if not _NAME.fullmatch(campaign.name):
        raise ValueError(
            f"campaign name {campaign.name[:80]!r} is refused: 1 to 64 of a-z, 0-9, '_', '.' "
            "and '-' are accepted, beginning with a letter or a digit"
        )
    if not -_MAX_RATE <= campaign.minimum < campaign.maximum <= _MAX_RATE:
        raise ValueError(
            f"scale {campaign.minimum} to {campaign.maximum} is refused: two integers from "
            f"-{_MAX_RATE} to {_MAX_RATE}, the lower one first, are accepted"
        )
    if campaign.maximum - campaign.minimum > _MAX_STEPS:
        raise ValueError(
            f"scale {campaign.minimum} to {campaign.maximum} is refused: at most {_MAX_STEPS} "
            "steps are accepted"
        )
    if not 1 <= campaign.window <= _MAX_WINDOW:
        raise ValueError(
            f"window {campaign.window} is refused: 1 to {_MAX_WINDOW:,} ratings are accepted"
        )
    if not 1 <= len(campaign.question) <= _MAX_QUESTION_CHARACTERS:
        raise ValueError(
            f"a question of {len(campaign.question)} characters is refused: 1 to "
            f"{_MAX_QUESTION_CHARACTERS} are accepted"
        )
    if "\0" in campaign.question:
        raise ValueError("a question with U+0000 in it is refused: not every database keeps it")
    return campaign
