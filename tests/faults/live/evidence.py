"""What broker and ledger hold when a run is over.

The ledger is read by a road of our own; see ``ledgers``. Dead letters have no second road;
they are read through messaging.
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self, final
from urllib.parse import parse_qs, urlsplit

from molva.messaging import open_topic, with_options
from molva.ratings.deployment import TOPIC
from tests.faults.live.ledgers import Kept, Row, read_ledger

__all__ = ["Dead", "Evidence", "Place", "collect"]


class Dead(NamedTuple):
    """One dead letter."""

    id: bytes
    body: bytes
    reason: str


@final
@dataclass(frozen=True, slots=True)
class Evidence:
    """What broker and ledger hold.

    Attributes:
        rows: The ledger's ratings, by campaign and sequence number.
        totals: The totals that the ledger keeps.
        dead: Dead letters.
        stored: Messages that the broker ever took.
        duplicates: Ratings that the workers say they met again.
        received: Messages that the workers say they were given.
        known: (campaign, id) of what the ledger would know again, where it keeps that apart.
    """

    rows: list[Row]
    totals: Kept
    dead: list[Dead]
    stored: int
    duplicates: int
    received: int = 0
    known: frozenset[tuple[str, bytes]] | None = None


@final
@dataclass(frozen=True, slots=True)
class Place:
    """Where a service keeps what.

    Attributes:
        data: The folder of what is kept in files.
        broker: URL of the broker, without a subscription.
        ledger: URL of the ledger.
        catalog: URL of the catalog.
        witness: What the workers write down; see ``launch``.
        added: What ``launch`` adds to each process of the service.
        waiting: Tells how many ratings wait, held ones too, where the broker's own protocol
            does not.
    """

    data: Path
    broker: str
    ledger: str
    catalog: str
    witness: Path
    added: tuple[str, ...] = ()
    waiting: Callable[[], int] | None = None

    @classmethod
    def of_files(cls, data: Path, ledger: Path, witness: Path) -> Self:
        """Return the embedded defaults; ``ledger`` may lie on another disk."""
        return cls(
            data=data,
            broker=f"sqlite://{data / 'queue.db'}",
            ledger=f"sqlite://{ledger}",
            catalog=f"sqlite://{data / 'catalog.db'}",
            witness=witness,
        )

    @property
    def options(self) -> tuple[str, ...]:
        """Return the options of every command that say so."""
        return (
            *("--data", str(self.data), "--broker", self.broker),
            *("--ledger", self.ledger, "--catalog", self.catalog),
        )

    @property
    def topic_url(self) -> str:
        """Return the URL of accepted ratings. Nothing is made where nothing is."""
        named = "topic" in parse_qs(urlsplit(self.broker).query)
        more = {} if named else {"topic": TOPIC}
        return with_options(self.broker, create="never", **more)


async def collect(place: Place) -> Evidence:
    """Read broker and ledger, while nothing is being counted."""
    content = await read_ledger(place.ledger)
    async with await open_topic(place.topic_url) as topic:
        dead = [
            Dead(letter.message.id, letter.message.body, letter.reason)
            for letter in await topic.dead_letters("process", 1_000_000)
        ]
        stat = await topic.stat()
        assert stat is not None or place.waiting is not None
    # Where nobody tells, what was taken is what can be told apart; then what clients sent twice
    # looks like what was handed over again.
    apart = len({row.id for row in content.rows} | {letter.id for letter in dead})
    return Evidence(
        rows=content.rows,
        totals=content.totals,
        dead=dead,
        stored=apart if stat is None else stat.stored,
        duplicates=_told(place.witness, "DUPLICATE"),
        received=_told(place.witness, "RECEIVED"),
        known=content.known,
    )


def _told(witness: Path, what: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        return sum(map(int, re.findall(rf"{what}=(\d+)", witness.read_text())))
    return 0
