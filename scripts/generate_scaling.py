"""Writes the table of pairs in docs/scaling.md from what drivers and ledgers say of themselves.

    python scripts/generate_scaling.py

A test holds the page to it, so that the manual cannot promise what no pair does.
"""

from pathlib import Path
from typing import Final

from generated_table import row, with_table

from molva.messaging.driver import Capabilities
from molva.messaging.url import BrokerURL, load_driver
from molva.ratings.ledger import best_capabilities
from molva.ratings.ledger.protocol import LedgerCapabilities

PAGE: Final = Path(__file__).parent.parent / "docs" / "scaling.md"

_PAIRS: Final = (
    ("kafka", "redis"),
    ("kafka", "postgresql"),
    ("amqp", "redis"),
    ("amqp", "postgresql"),
    ("redis", "redis"),
    ("redis", "postgresql"),
    ("nats", "redis"),
    ("nats", "postgresql"),
    ("sqlite", "postgresql"),
    ("sqlite", "sqlite"),
)

# What lies in a file is on one machine.
_FILES: Final = frozenset({"sqlite"})

_BOUND: Final = {
    "exact": "to the rating",
    "approximate": "nearly",
    "none": "looked at every second",
}


def page() -> str:
    """Return the page with the table as the code has it."""
    return with_table(PAGE, "generate_scaling", _table())


def _table() -> list[str]:
    columns = [
        (*pair, load_driver(BrokerURL.parse(f"{pair[0]}://x")).TOPIC_CAPABILITIES, ledger)
        for pair in _PAIRS
        if (ledger := best_capabilities()[pair[1]])
    ]
    rows = [_promises(*column) for column in columns]
    lines = [
        row("", *(f"{broker} → {ledger}" for broker, ledger, *_ in columns)),
        row(*["---"] * (1 + len(columns))),
    ]
    lines += [row(name, *(promises[name] for promises in rows)) for name in rows[0]]
    return lines


def _promises(
    broker: str, ledger: str, topic: Capabilities, counted: LedgerCapabilities
) -> dict[str, str]:
    common = topic.survives & counted.survives
    days = None if counted.horizon_seconds is None else counted.horizon_seconds / 86_400
    return {
        "counted exactly once": "yes" if days is None else f"what comes again within {days:g} days",
        "survives, at best": ", ".join(f for f in ("kill", "power", "node") if f in common),
        "one item's ratings count in their order": _mark(topic.ordering == "per-key"),
        "what waits is bounded": _bound(topic),
        "totals at every `as_of`": _mark(counted.history),
        "on several machines": _mark(not _FILES & {broker, ledger}),
    }


def _bound(topic: Capabilities) -> str:
    # The service looks where the broker does not bound; it needs to be told what waits.
    return "–" if topic.capacity == topic.stat == "none" else _BOUND[topic.capacity]


def _mark(value: bool) -> str:
    return "yes" if value else "–"


if __name__ == "__main__":
    PAGE.write_text(page())
