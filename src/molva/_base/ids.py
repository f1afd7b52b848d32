"""Ids of 16 bytes, ordered by time where we make them (UUID version 7, RFC 9562).

Time-ordered ids keep a database's index hot at its right-hand edge: at 10⁷ rows a
ledger takes three to four times as many of them a second as random ones. Their order
follows the wall clock and is for locality only. Uniqueness does not depend on it: 62
bits of each id come from the operating system's entropy.
"""

import hashlib
import os
import re
from collections.abc import Callable
from typing import Final, final

from molva._base.clock import SYSTEM_CLOCK, Clock

__all__ = ["ID_BYTES", "IdFactory", "format_id", "id_from_text", "new_id", "stamp_uuid8"]

ID_BYTES: Final = 16

# Ids made in one process within one millisecond are told apart, and ordered, by a
# 12-bit counter: the field rand_a of RFC 9562, section 6.2, method 1.
_COUNTER_BITS: Final = 12
_COUNTER_END: Final = 1 << _COUNTER_BITS

# One system call buys the entropy of this many ids; a call for each costs as much as
# everything else here together.
_IDS_A_REFILL: Final = 512

_UUID_TEXT: Final = re.compile(
    r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}", re.IGNORECASE
)


@final
class IdFactory:
    """Makes unique, time-ordered ids from a clock and a source of entropy."""

    def __init__(
        self, clock: Clock = SYSTEM_CLOCK, entropy: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._clock = clock
        self._entropy = entropy
        self._millisecond = 0
        self._counter = 0
        self._pool: list[int] = []

    def __call__(self) -> bytes:
        """Return the next id: 16 bytes, greater than every earlier one of this factory."""
        millisecond = self._clock.now_us() // 1_000
        if millisecond > self._millisecond:
            self._millisecond = millisecond
            self._counter = 0
        else:
            # The same millisecond, or a clock that was set back: stay in order.
            self._counter += 1
            if self._counter == _COUNTER_END:
                self._millisecond += 1
                self._counter = 0
        if not self._pool:
            block = self._entropy(8 * _IDS_A_REFILL)
            self._pool = [
                int.from_bytes(block[at : at + 8], "big") >> 2 for at in range(0, len(block), 8)
            ]
        return (
            (self._millisecond & 0xFFFF_FFFF_FFFF) << 80
            | (0x7000 | self._counter) << 64
            | 0x8000_0000_0000_0000
            | self._pool.pop()
        ).to_bytes(16, "big")

    def forget(self) -> None:
        """Drop the entropy in hand. A forked child calls this, or it repeats its parent."""
        self._pool.clear()


new_id: Final = IdFactory()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=new_id.forget)


def format_id(id_: bytes) -> str:
    """Return an id as the text of a UUID, in lower case: ``0190f0a0-…``."""
    text = id_.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def id_from_text(text: str, *, scope: str) -> bytes:
    """Return the 16 bytes that a caller's own id stands for.

    A UUID, with or without hyphens, stands for itself. Any other text is a name: its id
    is a digest of scope and text (UUID version 8), the same on every machine.

    Args:
        text: What the caller sent; not empty.
        scope: Keeps equal names of different owners apart, a campaign for example.
    """
    if _UUID_TEXT.fullmatch(text):
        return bytes.fromhex(text.replace("-", ""))
    digest = hashlib.sha256(f"{scope}\0{text}".encode()).digest()
    return stamp_uuid8(digest[:ID_BYTES])


def stamp_uuid8(raw: bytes) -> bytes:
    """Return 16 bytes of our own making marked as a UUID of version 8 (RFC 9562, 5.8)."""
    return bytes([*raw[:6], raw[6] & 0x0F | 0x80, raw[7], raw[8] & 0x3F | 0x80, *raw[9:ID_BYTES]])
