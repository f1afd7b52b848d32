"""What a ledger brings to the suite, and what its tests are written with."""

import contextlib
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import ClassVar, Final

import pytest

from molva.ratings.ledger import Difference, Ledger, LedgerEntry, open_ledger

__all__ = ["LedgerHarness", "Suite", "assert_sound", "differences", "entries", "need", "writer"]


class LedgerHarness(ABC):
    """One ledger, empty at first, that tests may open as often as they like."""

    # Histories that hypothesis tries; opening anew for each batch is what costs.
    examples: ClassVar[int] = 100
    # Entries of the long history that is compared with the reference.
    long: ClassVar[int] = 4_000

    @abstractmethod
    def url(self, **options: str) -> str:
        """Return the URL of the ledger, with options."""

    @abstractmethod
    async def reset(self) -> None:
        """Make the ledger empty again."""

    @abstractmethod
    async def erase_comments(self) -> None:
        """Erase the words of all comments, as an owner has to who is asked to."""

    @abstractmethod
    async def derived(self) -> object:
        """Return everything that the ledger derives from its entries, to be compared."""

    @contextlib.asynccontextmanager
    async def opened(self, **options: str) -> AsyncIterator[Ledger]:
        ledger = await open_ledger(self.url(**options))
        try:
            yield ledger
        finally:
            await ledger.close()

    async def assert_sound(self, *, last_seq: int, campaign: str = "c") -> None:
        """Nothing lost, nothing twice, every number right."""
        async with self.opened() as ledger:
            await assert_sound(ledger, last_seq=last_seq, campaign=campaign)


class Suite:
    """Where every part of the suite comes from: the fixtures."""

    @pytest.fixture
    async def ledger(self, harness: LedgerHarness) -> AsyncIterator[Ledger]:
        async with harness.opened() as ledger:
            yield ledger


def need(ledger: Ledger, capability: str) -> None:
    """Skip where the ledger declares that it lacks ``capability``: the only way to skip."""
    value = getattr(ledger.capabilities, capability)
    if not value:
        pytest.skip(f"declared: {capability}={value}")


async def differences(ledger: Ledger) -> list[Difference]:
    return [difference async for difference in ledger.verify()]


async def entries(ledger: Ledger, campaign: str = "c", *, since_seq: int = 0) -> list[LedgerEntry]:
    return [entry async for entry in ledger.entries(campaign, since_seq=since_seq)]


async def assert_sound(ledger: Ledger, *, last_seq: int, campaign: str = "c") -> None:
    """Nothing lost, nothing twice, every number right."""
    assert await ledger.last_seq(campaign) == last_seq
    since = 0
    if ledger.capabilities.window is not None:
        since = max(0, last_seq - ledger.capabilities.window)
    seqs = [entry.seq async for entry in ledger.entries(campaign, since_seq=since)]
    assert seqs == list(range(since + 1, last_seq + 1))
    assert await differences(ledger) == []


# Applies ratings from argv[2] on, argv[3] of them at a time, up to argv[4], and says how
# far it came. Each rating comes with a comment: two entries.
_WRITER: Final = """
import asyncio, sys
from molva.ratings.ledger import LedgerUnavailableError, open_ledger
from molva.ratings.rating import Rating, Submission

async def main():
    ledger = await open_ledger(sys.argv[1])
    at, size, end = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    while at < end:
        batch = [
            Submission(i.to_bytes(16, "big"), Rating("c", 1, i % 11, f"item-{i % 3}", "so"))
            for i in range(at, min(at + size, end))
        ]
        while True:
            try:
                await ledger.apply(batch, applied_at_us=1)
                break
            except LedgerUnavailableError:  # as a worker does
                await asyncio.sleep(0.1)
        at += len(batch)
        print(at, flush=True)
    await ledger.close()

asyncio.run(main())
"""


def writer(url: str, first: int, size: int, end: int) -> "subprocess.Popen[str]":
    """Start a process of its own that applies ratings."""
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, url, str(first), str(size), str(end)],
        stdout=subprocess.PIPE,
        text=True,
    )
